"""Rules on names and kinds of files: nothing outside the list, nothing hostile, nothing that can run.

A path that breaks a rule here is never opened by a later one. Pickles are refused outright: a scanner for bad ones is
no gate. They are known by their suffix, and under any other name by their first bytes (pickle protocols 2 to 5, zip as
torch and numpy write it, HDF5). Cost: a walk over the folder and eight bytes of each file.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from qlora_export.errors import Problem
from qlora_export.publish.lint.contents import base_of
from qlora_export.publish.lint.rules import finding

PICKLE_SUFFIXES = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".hdf5", ".keras",
)  # fmt: skip
CODE_SUFFIXES = (
    ".py", ".pyc", ".pyi", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js", ".ipynb",
    ".jar", ".wasm", ".whl",
)  # fmt: skip
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x89HDF", b"\x93NUMPY")
# A safetensors file starts with the length of its header, which may be any of these bytes; its parse says what it is.
STARTS_FREELY = (".safetensors", ".data", ".onnx_data")
FORBIDDEN_CHARACTERS = frozenset('\\:*?"<>|')
FORBIDDEN_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
ALLOWED_DOTFILE = re.compile(r"\.gitattributes|\.eval_results/[A-Za-z0-9_-][A-Za-z0-9._-]*\.ya?ml")
TEMPORARY = re.compile(
    r".*\.tmp.*|.*\.incomplete|.*\.partial|.*\.lock|.*\.swp|.*~|events\.out\.tfevents.*|thumbs\.db", re.IGNORECASE
)
RUN_FOLDER = re.compile(r"wandb|checkpoint-.*|__pycache__", re.IGNORECASE)
RENAME = "give the file a plain name, or leave it out"
KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISDIR, "a folder"),
)


def name_problems(path: str) -> list[Problem]:
    """Every rule that a path in the repository breaks by its spelling alone."""
    if what := hostile(path):
        return [finding("hostile-path", path, what, RENAME)]
    return [*_unwanted(path), *_by_suffix(path)]


def hostile(path: str) -> str:
    """Why a path cannot be trusted on every machine, or an empty text."""
    parts = path.split("/")
    if not path or path.startswith("/"):
        return "is no relative path"
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty part, `.` or `..`"
    for character in path:
        if character in FORBIDDEN_CHARACTERS or unicodedata.category(character) in FORBIDDEN_CATEGORIES:
            return f"has the character U+{ord(character):04X}"
    if any(part != part.strip() or part.endswith(".") or WINDOWS_DEVICE.fullmatch(part) for part in parts):
        return "has a part that ends in a dot, begins or ends in a space, or is the name of a device"
    return ""


def collisions(paths: Iterable[str]) -> Iterator[Problem]:
    """Paths that are one on a disk that ignores case or composes letters, and files that others want as a folder."""
    files = sorted(set(paths))
    spellings: dict[str, set[str]] = {}
    folders: dict[str, str] = {}
    for path in files:
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            whole = "/".join(parts[:count])
            spellings.setdefault(_folded(whole), set()).add(whole)
            if count < len(parts):
                folders.setdefault(whole, path)
    for path in files:
        if path in folders:
            yield finding("hostile-path", path, f"is a file, and the folder of {folders[path]!a}", RENAME)
    for found in spellings.values():
        if len(found) > 1:
            first, *others = sorted(found)
            yield finding(
                "hostile-path", first, f"is the same as {', '.join(map(ascii, others))} on some disks", RENAME
            )


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder that is no folder itself, by its path in the repository; links are not followed."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name, entry.stat(follow_symlinks=False)


def kind_problem(path: str, mode: int) -> Problem | None:
    """A finding for what is no regular file."""
    if stat.S_ISREG(mode):
        return None
    what = next((what for matches, what in KINDS if matches(mode)), "no regular file")
    return finding("hostile-path", path, f"is {what}, expected a regular file", "put the real file there")


def disguised(folder: Path, names: Collection[str]) -> Iterator[Problem]:
    """Files that begin as a pickle, or as an archive of pickles, does."""
    for name in sorted(names):
        if not name.endswith(STARTS_FREELY):
            with (folder / name).open("rb") as file:
                start = file.read(8)
            if start.startswith(PICKLE_STARTS):
                yield finding(
                    "pickle", name, "begins as a pickle or an archive does", "publish safetensors, JSON or text"
                )


def _unwanted(path: str) -> Iterator[Problem]:
    parts = path.split("/")
    hidden = any(part.startswith(".") for part in parts) and not ALLOWED_DOTFILE.fullmatch(path)
    left = any(TEMPORARY.fullmatch(part) for part in parts) or any(RUN_FOLDER.fullmatch(part) for part in parts[:-1])
    if hidden or left:
        what = "is hidden" if hidden else "is left over from a run"
        yield finding("foreign-file", path, f"{what}, and no part of a release", "leave it out")


def _by_suffix(path: str) -> Iterator[Problem]:
    name = base_of(path).lower()
    if name.endswith(PICKLE_SUFFIXES):
        yield finding("pickle", path, "can hold a pickle, which can run code", "publish safetensors, JSON or text")
    if name.endswith(CODE_SUFFIXES):
        yield finding("code", path, "is code, which a user of the model would run", "leave it out")


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
