"""Names and licences by themselves, without a release."""

from __future__ import annotations

import string
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_export.publish.lint import lint
from qlora_export.publish.lint.licence import allowed
from qlora_export.publish.lint.names import CODE_SUFFIXES, PICKLE_SUFFIXES, collisions, hostile, name_problems
from qlora_export.publish.lint.rules import RULES, finding, shown
from qlora_export.publish.staged_folder import Staged

plain_parts = st.text(string.ascii_lowercase + string.digits + "_-", min_size=1, max_size=8).filter(
    lambda part: not hostile(part) and part != "wandb" and not part.startswith("checkpoint-")
)
plain_paths = st.lists(plain_parts, min_size=1, max_size=4).map("/".join)
# Control, bidirectional and other invisible characters, lone surrogates, line separators, and those of other systems.
bad_characters = st.one_of(
    st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Co"]),
    st.sampled_from('\\:*?"<>|\0\r\n\u202e\u2066\u200b\ufeff'),
)


@st.composite
def hostile_paths(draw: st.DrawFn) -> str:
    """A plain path that was made hostile in one way."""
    path = draw(plain_paths)
    parts = path.split("/")
    place = draw(st.integers(0, len(parts)))
    way = draw(st.sampled_from(["absolute", "climbs", "character", "empty", "drive", "dot", "space", "device"]))
    if way == "absolute":
        return "/" + path
    if way in ("climbs", "empty"):
        step = draw(st.sampled_from(["..", "."])) if way == "climbs" else ""
        return "/".join([*parts[:place], step, *parts[place:]])
    if way == "character":
        at = draw(st.integers(0, len(path)))
        return path[:at] + draw(bad_characters) + path[at:]
    if way == "drive":
        return draw(st.sampled_from("CZ")) + ":/" + path
    if way == "device":
        return "/".join([*parts[:place], draw(st.sampled_from(["con", "NUL", "aux.txt", "COM1.json"])), *parts[place:]])
    return path + {"dot": ".", "space": " "}[way]


@settings(max_examples=300)
@given(path=hostile_paths())
def test_any_hostile_path_is_refused(path: str) -> None:
    (problem,) = name_problems(path)
    assert problem.message.endswith("[hostile-path]")
    assert problem.message.isprintable()


@settings(max_examples=60)
@given(path=hostile_paths())
def test_a_hostile_path_on_the_list_is_refused_and_never_opened(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    opened: list[str] = []
    real = Path.open

    def watched(self: Path, *words: object, **more: object) -> object:
        opened.append(str(self))
        return real(self, *words, **more)  # type: ignore[call-overload]

    with mock.patch.object(Path, "open", watched):
        problems = lint(Staged(folder, {path: {"bytes": 1, "sha256": "0" * 64}}, {}), "mit", None)
    assert opened == []
    assert any(problem.message == f"{shown(path)}: {problem.message.partition(': ')[2]}" for problem in problems)
    assert sum(problem.message.endswith("[hostile-path]") for problem in problems) == 1


@settings(max_examples=60)
@given(path=plain_paths)
def test_a_plain_path_is_clean(path: str) -> None:
    assert name_problems(path) == []


@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, *(suffix.upper() for suffix in PICKLE_SUFFIXES)])
def test_a_name_that_can_hold_a_pickle(suffix: str) -> None:
    (problem,) = name_problems(f"onnx/weights{suffix}")
    assert problem.message.endswith("[pickle]")


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt"])
def test_what_a_trainer_leaves(name: str) -> None:
    assert any(problem.message.endswith("[pickle]") for problem in name_problems(name))


@pytest.mark.parametrize("suffix", CODE_SUFFIXES)
def test_a_name_of_code(suffix: str) -> None:
    (problem,) = name_problems(f"modeling_bot{suffix}")
    assert problem.message.endswith("[code]")


@pytest.mark.parametrize(
    "path",
    [
        ".env", ".git/config", "a/.DS_Store", ".tmpAbCd12", "model.safetensors.tmp", "x.tmp.7", "a.incomplete",
        "events.out.tfevents.17.host", "wandb/run.json", "checkpoint-900/config.json", "__pycache__/x", "config.json~",
        "model.partial", ".eval_results/../x.yaml", ".eval_results/.env", ".gitattributes/x",
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_release(path: str) -> None:
    assert name_problems(path)


@pytest.mark.parametrize(
    "path",
    [
        ".gitattributes", ".eval_results/wikitext.yaml", "onnx-int4/model.onnx.data", "qwen.tiktoken",
        "model-00001-of-00002.safetensors", "qlora-export/bom.cdx.json", "adapter/qlora_export.json", "README.md",
        "modèle.json", "onnx/adapter.onnx_adapter",
    ],
)  # fmt: skip
def test_what_is_part_of_one(path: str) -> None:
    assert name_problems(path) == []


@pytest.mark.parametrize(
    ("paths", "count"),
    [
        (["config.json", "Config.json"], 1),
        (["a/x", "A/y"], 1),
        (["straße.json", "STRASSE.json"], 1),
        (["e\u0301.json", "é.json"], 1),
        (["a", "a/b", "a/c"], 1),
        (["a/x", "a/y", "b/x", "ab"], 0),
    ],
)
def test_paths_that_are_one_on_some_disks(paths: list[str], count: int) -> None:
    assert len(set(collisions(paths))) == count


@given(path=plain_paths, at=st.integers(0, 30))
def test_any_change_of_case_collides(path: str, at: int) -> None:
    place = at % len(path)
    other = path[:place] + path[place].upper() + path[place + 1 :]
    assert bool(list(collisions([path, other]))) == (path != other)


def test_a_path_is_printed_so_that_it_cannot_mislead() -> None:
    assert shown("a\u202egnp.exe\n") == "a\\u202egnp.exe\\n"
    assert shown("modèle.json") == "modèle.json"


def test_a_finding_is_of_a_known_rule() -> None:
    with pytest.raises(KeyError):
        finding("no-such-rule", "a", "b", "c")
    assert all(text.endswith(".") and text.isprintable() for text in RULES.values())


@pytest.mark.parametrize(
    ("stated", "base", "passes"),
    [
        ("apache-2.0", "mit", True),
        ("mit", "apache-2.0", True),
        ("MIT", "mit", True),
        ("mit", "gpl-3.0", False),
        ("gpl-3.0", "mit", True),
        ("agpl-3.0", "gpl-3.0", True),
        ("apache-2.0", "llama3.1", False),
        ("gpl-3.0", "gemma", False),
        ("gemma", "gemma", True),
        ("llama3.2", "llama3.1", False),
        ("gemma", "apache-2.0", True),
        ("cc-by-nc-4.0", "llama3.1", True),
        ("llama3.1", "cc-by-nc-4.0", False),
        ("apache-2.0", "cc-by-nc-sa-4.0", False),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", True),
        ("apache-2.0", "creativeml-openrail-m", False),
        ("openrail", "bigscience-openrail-m", False),
        ("acme-1", "acme-1", True),
        ("acme-1", "mit", False),
        ("mit", "acme-1", False),
        ("other", "mit", True),
        ("other", "llama3.1", False),
        ("other", "other", True),
        ("apache-2.0", "other", False),
    ],
)
def test_which_licence_may_follow_which(stated: str, base: str, passes: bool) -> None:
    assert allowed(stated, base) == passes
