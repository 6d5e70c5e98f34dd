"""A section of the page, and the artifacts within one."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.report.html.elements import Child, Markup, element, joined
from qlora_export.report.html.reading import Facts, text
from qlora_export.report.html.table import folded
from qlora_export.report.html.verdicts import badge, outcome


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading that the list of contents names; `place` is its anchor."""

    place: str
    heading: str
    lead: str
    body: Markup

    def html(self) -> Markup:
        """The section as an element."""
        heading = element("h2", self.heading, id=f"{self.place}-heading")
        lead = element("p", self.lead, class_="lead") if self.lead else None
        return element("section", heading, lead, self.body, id=self.place, aria_labelledby=f"{self.place}-heading")


def name_of(artifact: Facts) -> str:
    """What the artifact is called."""
    return text(artifact, "name") or "unnamed"


def artifact_heading(artifact: Facts, said: str = "") -> Markup:
    """The artifact's name as a heading, with its verdict and what is to be said in a few words."""
    words = element("span", said, class_="said") if said else None
    return joined(element("h3", element("code", name_of(artifact))), badge(artifact), words)


def artifact_block(artifact: Facts, said: str, *content: Child, opened: bool | None = None) -> Markup:
    """One artifact's content, folded where it passed."""
    wide_open = outcome(artifact) != "pass" if opened is None else opened
    return element("div", folded(artifact_heading(artifact, said), *content, opened=wide_open), class_="artifact")
