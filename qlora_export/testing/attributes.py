""".gitattributes and .gitignore as the Hub reads them: which paths are large files, which are left out.

The rules are git's, without its rarer forms: `*`, `?`, `[...]` and `**`, a pattern without a slash meets the last
part of a path, later lines win.
"""

from __future__ import annotations

import re
from functools import lru_cache

ATTRIBUTES_NAME = ".gitattributes"
LARGE_RULE = "filter=lfs diff=lfs merge=lfs -text"
_LARGE_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
DEFAULT_ATTRIBUTES = "".join(f"{pattern} {LARGE_RULE}\n" for pattern in _LARGE_PATTERNS.split())


def is_large(attributes: str, path: str) -> bool:
    """Whether the rules send a path to large file storage."""
    large = False
    for line in attributes.splitlines():
        pattern, *settings = line.split() or [""]
        if not pattern or pattern.startswith("#") or not _meets(pattern, path):
            continue
        for setting in settings:
            if setting.lstrip("-!").partition("=")[0] == "filter":
                large = setting == "filter=lfs"
    return large


def is_ignored(rules: str, path: str) -> bool:
    """Whether .gitignore rules leave out a path, or a folder above it, which no later rule brings back."""
    parts = path.split("/")
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(_is_left_out(rules, folder, True) for folder in folders) or _is_left_out(rules, path, False)


def large_rule(path: str) -> str:
    """The line that makes one path a large file."""
    return f"{path.replace(' ', '[[:space:]]')} {LARGE_RULE}\n"


def _is_left_out(rules: str, path: str, folder: bool) -> bool:
    left_out = False
    for line in rules.splitlines():
        rule = line.strip()
        pattern = rule.lstrip("!")
        if rule and not rule.startswith("#") and (folder or not pattern.endswith("/")):
            left_out = not rule.startswith("!") if _meets(pattern.rstrip("/"), path) else left_out
    return left_out


def _meets(pattern: str, path: str) -> bool:
    whole = "/" in pattern
    return _expression(pattern.lstrip("/")).fullmatch(path if whole else path.rsplit("/", 1)[-1]) is not None


@lru_cache(maxsize=256)
def _expression(pattern: str) -> re.Pattern[str]:
    translated = ""
    for token in re.findall(r"\[\[:space:\]\]|\*\*/|\*\*|\*|\?|\[[^]]*\]|.", pattern):
        meanings = {"[[:space:]]": r"\s", "**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        character_class = token.startswith("[") and len(token) > 2
        translated += meanings.get(token, token if character_class else re.escape(token))
    return re.compile(translated)
