"""The templates of the page. Whatever is no `Markup` is a stranger's: made visible and escaped on its way in."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qlora_export.report import templating
from qlora_export.report.html import figures, reading, verdicts, visible
from qlora_export.report.html.section import name_of

if TYPE_CHECKING:
    from jinja2 import Environment

# Nothing of jinja2's own: `safe`, and `join` or `escape` on markup, would let text in that was not made visible.
FILTERS = (
    figures.count, figures.counted, figures.exact, figures.fixed, figures.ratio_of, figures.share, figures.significant,
    figures.stored, reading.number, reading.part, reading.parts, reading.text, reading.texts, verdicts.outcome,
    verdicts.surprising, verdicts.verdict_words, visible.clipped, visible.clipped_before, visible.visible_edges,
    name_of, len,
)  # fmt: skip


def render(template: str, **facts: Any) -> str:
    """A template of the folder `templates`, filled in."""
    return environment().get_template(template).render(facts)


@cache
def environment() -> Environment:
    """The templates of the page."""
    known = {"DASH": figures.DASH, "SYMBOLS": verdicts.SYMBOLS}
    return templating.environment(__package__, FILTERS, known, shown)


def shown(value: object) -> Markup | str:
    """What stands in the page for a value: nothing for None, a float as a coordinate, all text made visible."""
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value
    return figures.short(value) if isinstance(value, float) else visible.visible(str(value))
