"""The frame of every page: head with its policy, what stands on top, contents, sections, script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_export.report.html.assets import policy, script, style
from qlora_export.report.html.elements import Markup, element, joined
from qlora_export.report.html.section import Section


def document(title: str, header: Markup, sections: Sequence[Section], about: str) -> str:
    """A whole page."""
    page = element("html", _head(title), _body(header, sections, about), lang="en")
    return f"<!doctype html>\n{page}\n"


def write_whole(text: str, path: Path) -> Path:
    """Write a page, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.rename(path)
    return path


def _head(title: str) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(style())),
    )


def _body(header: Markup, sections: Sequence[Section], about: str) -> Markup:
    links = [element("li", element("a", section.heading, href=f"#{section.place}")) for section in sections]
    contents = element("nav", element("ul", links), aria_label="Contents")
    return element(
        "body",
        element("a", "Skip to the numbers", href="#numbers", class_="skip"),
        header,
        contents,
        element("main", joined(section.html() for section in sections), id="numbers", tabindex="-1"),
        element("footer", element("p", about)),
        element("script", Markup(script())),
    )
