"""Which paths are large files, which are left out; where git is installed it has the last word."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_export.testing.attributes import DEFAULT_ATTRIBUTES, is_ignored, is_large, large_rule

PATHS = [
    *(
        "model.safetensors",
        "onnx/model.onnx",
        "model.onnx.data",
        "config.json",
        "a/saved_model/b/c.txt",
        "x.safetensors.d",
    ),
    *("saved_model/a", "saved_model/a/b/c", "events.tfevents.1", "a.tar.gz", "a.lfs.b", "sub/x.bin", "safetensors"),
    *("with space.json", "dir/exact.json", "exact.json", "other/exact.json", "a?.npy", "plain.txt", "ax.txt"),
]
RULES = (
    DEFAULT_ATTRIBUTES + large_rule("with space.json") + large_rule("dir/exact.json") + "# a\n\na[x-z].txt filter=lfs\n"
)
IGNORED = "*.log\n/only-here.txt\ncache/\n!keep.log\n# note\ndocs/**/draft.md\nbuild/*.o\n"
CANDIDATES = [
    *("a.log", "sub/a.log", "keep.log", "sub/keep.log", "cache/a", "sub/cache/a/b", "cache/keep.log", "cache"),
    *(
        "only-here.txt",
        "sub/only-here.txt",
        "docs/draft.md",
        "docs/a/b/draft.md",
        "draft.md",
        "build/a.o",
        "build/a/b.o",
    ),
]


def test_the_rules_without_git() -> None:
    assert is_large(DEFAULT_ATTRIBUTES, "deep/down/model.safetensors")
    assert not is_large(DEFAULT_ATTRIBUTES, "tokenizer.json")
    assert not is_large(DEFAULT_ATTRIBUTES + "*.bin -filter\n", "a.bin")
    assert not is_large(DEFAULT_ATTRIBUTES + "*.bin !filter\n", "a.bin")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_agrees(tmp_path: Path) -> None:
    def git(*arguments: str, given: list[str] | None = None) -> list[str]:
        command = ["git", "-C", str(tmp_path), *arguments]
        result = subprocess.run(command, input="\n".join(given or []), capture_output=True, text=True)
        return result.stdout.splitlines()

    git("init", "-q")
    (tmp_path / ".gitattributes").write_text(RULES)
    (tmp_path / ".gitignore").write_text(IGNORED)
    answers = git("check-attr", "--stdin", "filter", given=PATHS)
    assert {path: is_large(RULES, path) for path in PATHS} == {
        path: answer.endswith(": lfs") for path, answer in zip(PATHS, answers, strict=True)
    }
    left_out = git("check-ignore", "--no-index", "--stdin", given=CANDIDATES)
    assert [path for path in CANDIDATES if is_ignored(IGNORED, path)] == left_out
