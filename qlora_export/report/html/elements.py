"""Elements of HTML and SVG as text. Whatever is no `Markup` is a stranger's: made visible and escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

from qlora_export.report.html.visible import LINE_END, visible

VOID = frozenset({"meta", "br", "hr"})


class Markup(str):
    """HTML that is ready to stand in a page."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Value: TypeAlias = str | float | bool | None


def element(tag: str, *children: Child, **attributes: Value) -> Markup:
    """One element; attributes that are None or False are left out, `class_` is class and `data_value` data-value."""
    start = f"<{tag}{''.join(_attribute(name, value) for name, value in attributes.items())}>"
    if tag in VOID:
        return Markup(start)
    return Markup(f"{start}{joined(*children)}</{tag}>")


def joined(*children: Child) -> Markup:
    """Children one after the other; lists are opened, None is nothing."""
    return Markup("".join(map(_child, children)))


def escaped(text: str) -> Markup:
    """Any text as HTML, in one line."""
    return Markup(html.escape(visible(text), quote=True))


def quoted(text: str) -> Markup:
    """Text of a file, its lines kept, isolated from the direction of what stands around it."""
    lines = Markup(f"{LINE_END}\n").join(map(escaped, text.split("\n")))
    return element("bdi", Markup(lines), class_="text")


def code(text: str) -> Markup:
    """A name or a digest."""
    return element("code", text)


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escaped(child)
    return "".join(map(_child, child))


def _attribute(name: str, value: Value) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    if isinstance(value, str):
        return f' {name}="{value if isinstance(value, Markup) else escaped(value)}"'
    return f' {name}="{short(value)}"'


def short(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
