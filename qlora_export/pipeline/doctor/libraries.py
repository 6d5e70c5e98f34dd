"""Versions of the libraries against the ranges that the installed package declares; none of them is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from qlora_export.pipeline.doctor.checks import Check

PACKAGE = "qlora-export"
OPTIONAL_EXTRAS = ("data", "onnx", "sign")


def library_checks(needed_extras: Iterable[str], requirements: Iterable[str] | None = None) -> list[Check]:
    """Python, every dependency, and the extras; a missing extra fails where it is needed, and is told otherwise."""
    found = [Check("python", "ok", platform.python_version())]
    needed = set(needed_extras)
    texts = requires(PACKAGE) if requirements is None else requirements
    for requirement in map(Requirement, texts or ()):
        if _applies(requirement, ""):
            found.append(_library(requirement))
        for extra in OPTIONAL_EXTRAS:
            if requirement.marker is not None and "extra" in str(requirement.marker) and _applies(requirement, extra):
                found += _of_extra(requirement, extra, extra in needed)
    return found


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _of_extra(requirement: Requirement, extra: str, needed: bool) -> Iterator[Check]:
    check = _library(requirement)
    if check.status == "ok":
        yield check
    elif needed:
        yield Check(check.id, "fail", check.value, f"pip install '{PACKAGE}[{extra}]'")
    else:
        yield Check(check.id, "warn", check.value, f"only where it is used: pip install '{PACKAGE}[{extra}]'")


def _library(requirement: Requirement) -> Check:
    name = f"library.{requirement.name}"
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Check(name, "fail", "not installed", fix)
    if requirement.specifier.contains(installed, prereleases=True):
        return Check(name, "ok", installed)
    return Check(name, "fail", f"{installed}, {requirement.specifier} is needed", fix)
