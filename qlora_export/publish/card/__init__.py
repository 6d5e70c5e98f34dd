"""The model card: front matter that tools read, and a block of text that is ours among the prose of people."""

from __future__ import annotations

from dataclasses import replace

from qlora_export.publish.card.block import find_block, place_block
from qlora_export.publish.card.body import body
from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.publish.card.front_matter import edit_metadata, read_metadata, split_readme
from qlora_export.publish.card.licence import licence_of
from qlora_export.publish.card.metadata import dropped_keys, metadata

__all__ = ["CardFacts", "CardItem", "licence_of", "make_card"]


def make_card(facts: CardFacts, existing: str | None) -> str:
    """The README for a repository that holds `existing` now; making it again from the result changes nothing.

    Raises UsageError for facts that no card can state, InputError for front matter that is not YAML, RemoteConflict
    for a managed block that was torn apart.
    """
    readme = split_readme(existing or "")
    find_block(readme)  # so that a complaint tells the line of the file as it is
    before = read_metadata(readme)
    edited = edit_metadata(readme, metadata(facts, before), dropped_keys(facts, before))
    return replace(edited, prose=place_block(edited, body(facts), f"# {facts.name}")).text
