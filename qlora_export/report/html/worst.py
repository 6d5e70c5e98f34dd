"""Where an artifact drifted most: single tokens with the text before them, and whole windows."""

from __future__ import annotations

from qlora_export.report.html.elements import Child, Markup, element, joined, quoted
from qlora_export.report.html.figures import count, share, significant
from qlora_export.report.html.reading import Facts, artifacts_with, labelled, number, parts, scored_word, text
from qlora_export.report.html.section import Section, artifact_block, name_of
from qlora_export.report.html.table import Cell, Column, table
from qlora_export.report.html.visible import clipped, clipped_before, visible_edges

LONGEST_CONTEXT, LONGEST_TOKEN, LONGEST_START = 240, 60, 240
TOKEN_COLUMNS = (
    Column("place"),
    Column("KL", numeric=True),
    Column("text", wide=True),
    Column("reference said"),
    Column("candidate said"),
    Column("p, reference", numeric=True),
    Column("p, candidate", numeric=True),
)
WINDOW_COLUMNS = (
    Column("place"), Column("mean KL", numeric=True), Column("tokens", numeric=True), Column("starts with", wide=True),
)  # fmt: skip


def worst(report: Facts) -> Section | None:
    """The section, where the report names tokens or windows."""
    found = artifacts_with(report, "worst")
    word = scored_word(report)
    blocks = [_block(artifact, facts, word) for _, artifact, facts in found if _named(facts)]
    if not blocks:
        return None
    lead = (
        f"The {word}s that drifted most, marked in their text: what the reference held for most likely there, what the "
        f"artifact did, and what both gave the {word} of the text."
    )
    heading = "Worst labels" if labelled(report) else "Worst tokens and windows"
    return Section("worst", heading, lead, joined(blocks))


def _named(facts: Facts) -> bool:
    return bool(parts(facts, "tokens") or parts(facts, "windows"))


def _block(artifact: Facts, facts: Facts, word: str) -> Markup:
    tokens, windows = parts(facts, "tokens"), parts(facts, "windows")
    name = name_of(artifact)
    largest = max((number(token, "kl") or 0.0 for token in tokens), default=None)
    said = "" if largest is None else f"up to {significant(largest, 2)} nats"
    return artifact_block(
        artifact,
        said,
        table(f"Worst {word}s of {name}", TOKEN_COLUMNS, list(map(_token_row, tokens)), True) if tokens else None,
        table(f"Worst windows of {name}", WINDOW_COLUMNS, list(map(_window_row, windows)), True) if windows else None,
    )


def token_mark(said: str) -> Markup:
    """A token on its own: its spaces to be seen, in a box."""
    return element("bdi", visible_edges(clipped(said, LONGEST_TOKEN)), class_="token")


def _token_row(token: Facts) -> list[Cell | Child]:
    kl = number(token, "kl")
    reference, candidate = number(token, "p_reference"), number(token, "p_candidate")
    shown = element("mark", token_mark(text(token, "token")))
    return [
        _where(token),
        Cell(significant(kl, 3), kl),
        joined(quoted(clipped_before(text(token, "before"), LONGEST_CONTEXT)), shown),
        token_mark(text(token, "reference_says")),
        token_mark(text(token, "candidate_says")),
        Cell(_probability(reference), reference),
        Cell(_probability(candidate), candidate),
    ]


def _probability(value: float | None) -> str:
    """A probability in per cent, by its first digits where it is tiny."""
    return share(value) if value is None or value >= 0.001 else f"{significant(value * 100, 1)}%"


def _where(facts: Facts) -> Cell:
    """The place in the file, and for a token its place in the window."""
    window, position = number(facts, "window"), number(facts, "position")
    beneath = ", ".join(
        f"{word} {count(value)}" for word, value in (("window", window), ("token", position)) if value is not None
    )
    place = text(facts, "place")
    order = None if window is None else window * 1e6 + (position or 0.0)
    return Cell(joined(place, " ", element("small", beneath)) if place else beneath, order)


def _window_row(window: Facts) -> list[Cell | Child]:
    mean, tokens = number(window, "mean_kl"), number(window, "tokens")
    return [
        _where(window),
        Cell(significant(mean, 3), mean),
        Cell(count(tokens), tokens),
        quoted(clipped(text(window, "start"), LONGEST_START)),
    ]
