"""The templates of cards. Whatever is no `Markup` is a stranger's, and made harmless where it stands on its way in."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qlora_export.publish.card.escaping import as_json, code, escape, literal, recipe_yaml
from qlora_export.report import templating
from qlora_export.report.tokens import protocol_line, unit_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.runtime import Context

FILTERS = (as_json, code, int, len, literal, protocol_line, recipe_yaml, templating.number, unit_of)


def render(template: str, **facts: Any) -> str:
    """A template of the folder `templates`, filled in."""
    return environment().get_template(template).render(facts)


@cache
def environment() -> Environment:
    """The templates of cards: Markdown in `.md`, all others are code."""
    return templating.environment("qlora_export.publish.card", FILTERS, {}, shown, by_template=True)


def shown(context: Context, value: object) -> Markup:
    """What stands in a template for a value: what is ready as it is, text so that nothing in it takes effect there."""
    if isinstance(value, Markup):
        return value
    return escape(str(value)) if str(context.name).endswith(".md") else literal(str(value))
