"""The model card: front matter that tools read, and a block of text that is ours among the prose of people."""

from __future__ import annotations

from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.publish.card.licence import licence_of
from qlora_export.publish.card.making import make_card

__all__ = ["CardFacts", "CardItem", "licence_of", "make_card"]
