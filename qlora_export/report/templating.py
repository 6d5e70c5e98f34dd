"""Folders of templates, and what is made of them on the disk; jinja2 is imported with the first one filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(
    package: str,
    filters: Iterable[Callable[..., Any]],
    known: Mapping[str, Any],
    shown: Callable[..., Markup | str] | None,
    by_template: bool = False,
) -> Environment:
    """The templates of a package, which know these filters and names alone; a name that is not there is an error.

    `shown` makes what stands there of every value; `by_template` gives it jinja2's context, with the template's name,
    before the value. None shows values as they are.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context

    found = Environment(
        loader=PackageLoader(package),
        autoescape=shown is not None,  # noqa: S701 - without it there is no markup
        undefined=StrictUndefined,
        finalize=pass_context(shown) if shown is not None and by_template else shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters = {function.__name__: function for function in filters}
    found.globals = dict(known)
    return found


def number(value: float | None, form: str) -> Markup:
    """A number as Python's format writes it; nothing for None."""
    return Markup("" if value is None else format(value, form))  # noqa: S704 - digits


def write_whole(text: str, path: Path) -> Path:
    """Write a report, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.rename(path)
    return path
