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
from qlora_export.exporters.registry import load_exporter
from qlora_export.formats.base import CorrectedFormat
from qlora_export.formats.registry import load_format
from qlora_export.runtimes.registry import load_runtime
from qlora_export.types import TrainingQuantization
from tests.conftest import LONG_FILES
from tests.drift.test_gate import PERFECT

PACKAGE = Path(qlora_export.__file__).parent
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS, MOST_POSITIONAL = 400, 60, 8, 8


def calls(name: str) -> Iterator[Path]:
    """Files in which `name` is called."""
    yield from (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if name in called_in(path))


@functools.cache
def called_in(path: Path) -> set[str]:
    """Names that are called in a file."""
    found = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {function.id for function in found if isinstance(function, ast.Name)}


def too_large(source: str, name: str) -> Iterator[str]:
    """The file, and what is in it, where they ask too much of a reader; typer needs a parameter for every flag."""
    if source.count("\n") > MOST_LINES:
        yield name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = (node.end_lineno or 0) - node.lineno >= MOST_FUNCTION_LINES
            if long or (len(parameters(node.args)) > MOST_PARAMETERS and not name.startswith("cli/")):
                yield f"{name}: {node.name}"
        elif isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            called = ast.unparse(node.func).rpartition(".")[2]
            if called.lstrip("_")[:1].isupper():
                yield f"{name}: {called}(...)"


def parameters(stated: ast.arguments) -> list[str]:
    """Names of all kinds of parameters, but for the object itself."""
    found = [*stated.posonlyargs, *stated.args, *stated.kwonlyargs, stated.vararg, stated.kwarg]
    return [one.arg for one in found if one is not None and one.arg not in ("self", "cls")]


def test_only_the_gate_makes_a_verified() -> None:
    assert {str(path) for path in calls("Verified")} == {"drift/gate.py"}


def test_formats_and_exporters_are_made_at_one_place() -> None:
    assert {str(path) for name in ("load_format", "load_exporter") for path in calls(name)} == {"planning/resolve.py"}


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
        form = load_format(name, TrainingQuantization())
        corrected = "correction" if isinstance(form, CorrectedFormat) else None
        assert form.name == name
        assert catalog.FORMATS[name].beside == ("adapter" if form.keeps_adapter else corrected)
    for name, info in catalog.EXPORTERS.items():
        exporter = load_exporter(name, {})
        assert exporter.name == name
        assert exporter.takes in ("dense", "adapter", *catalog.FORMATS)
        assert (info.base_model_relation == "adapter") == (exporter.takes == "adapter")
    for name in catalog.RUNTIMES:
        assert load_runtime(name).name == name
    assert set(catalog.DENSE_FORMATS.values()) <= set(catalog.FORMATS)


def test_no_module_is_loose() -> None:
    """What stands beside the rooms is used by many of them."""
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "__main__", "_version", "artifact", "catalog", "errors", "training", "types"}


def test_the_long_files_of_the_tests_are_there() -> None:
    assert not [name for name in LONG_FILES if not (PACKAGE.parent / name).is_file()]


def test_no_file_and_no_function_asks_too_much_of_a_reader() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [large for name, source in files.items() for large in too_large(source, name)] == []


@pytest.mark.parametrize(
    ("source", "name", "found"),
    [
        ("\n" * 400, "a.py", []),
        ("\n" * 401, "a.py", ["a.py"]),
        ("def f():\n" + "    x = 1\n" * 59, "a.py", []),
        ("def f():\n" + "    x = 1\n" * 60, "a.py", ["a.py: f"]),
        ("def f(self, a, b, c, d, e, f, *g, **h): ...", "a.py", []),
        ("def f(a, b, c, d, /, e, f, *g, h, **i): ...", "a.py", ["a.py: f"]),
        ("def f(a, b, c, d, /, e, f, *g, h, **i): ...", "cli/a.py", []),
        ("a._Fact(1, 2, 3, 4, 5, 6, 7, 8, nine=9)\nfact(1, 2, 3, 4, 5, 6, 7, 8, 9)", "a.py", []),
        ("a._Fact(1, 2, 3, 4, 5, 6, 7, 8, 9)", "a.py", ["a.py: _Fact(...)"]),
    ],
)
def test_what_asks_too_much_of_a_reader_is_found(source: str, name: str, found: list[str]) -> None:
    assert list(too_large(source, name)) == found


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils", "helpers", "common", "misc", "manager"}
    assert not vague & {path.stem for path in PACKAGE.rglob("*.py")}
