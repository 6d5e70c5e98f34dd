"""The frame of every page: head with its policy, what stands on top, contents, sections, script."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from qlora_export.report.html.assets import policy, script, style
from qlora_export.report.html.rendering import render
from qlora_export.report.html.section import Section


def document(title: str, head: Section, sections: Sequence[Section], about: str) -> str:
    """A whole page."""
    assets = {"policy": policy(), "style": Markup(style()), "script": Markup(script())}  # noqa: S704 - files of ours
    return render("page.html", title=title, head=head, sections=sections, about=about, **assets)
