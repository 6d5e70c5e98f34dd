"""Rules of the house that import-linter cannot see."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_export
from qlora_export import catalog
from qlora_export.artifact import Artifact
from qlora_export.drift.results import Drift, Verdict, Verified
from qlora_export.errors import GateFailed
from qlora_export.formats.registry import load_format
from qlora_export.runtimes.registry import load_runtime
from qlora_export.types import TrainingQuantization
from tests.conftest import LONG_FILES
from tests.drift.test_gate import PERFECT

PACKAGE = Path(qlora_export.__file__).parent


def calls(name: str) -> Iterator[Path]:
    """Files in which `name` is called."""
    yield from (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if name in called_in(path))


@functools.cache
def called_in(path: Path) -> set[str]:
    """Names that are called in a file."""
    found = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {function.id for function in found if isinstance(function, ast.Name)}


def test_only_the_gate_makes_a_verified() -> None:
    assert {str(path) for path in calls("Verified")} == {"drift/gate.py"}


def test_only_cli_and_terminal_print() -> None:
    assert {str(path) for path in calls("print") if path.parts[0] != "cli"} <= {"report/terminal.py"}


@pytest.mark.parametrize("outcome", ["fail", "inconclusive", "not-measured"])
def test_a_verified_without_a_passing_verdict_cannot_exist(outcome: str) -> None:
    artifact = Artifact("a", "bf16", Path("a"), {"files": {}}, "0")
    drift = Drift(**PERFECT)
    with pytest.raises(GateFailed, match=outcome):
        Verified(artifact, Verdict(outcome), drift)  # type: ignore[arg-type]


def test_every_name_in_the_catalog_loads() -> None:
    for name in catalog.FORMATS:
        assert load_format(name, TrainingQuantization()).name == name
    for name in catalog.RUNTIMES:
        assert load_runtime(name).name == name
    assert set(catalog.DENSE_FORMATS.values()) <= set(catalog.FORMATS)


def test_the_long_files_of_the_tests_are_there() -> None:
    assert not [name for name in LONG_FILES if not (PACKAGE.parent / name).is_file()]


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils", "helpers", "common", "misc", "manager"}
    assert not vague & {path.stem for path in PACKAGE.rglob("*.py")}
