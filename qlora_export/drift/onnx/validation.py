"""An ONNX folder run in every way that a consumer may, and compared with itself and with its source's model in torch.

Prefill, decoding with the cache, a batch of unequal lengths, with graph optimisation and without, and for integer
weights every accuracy of their products, on real tokens of three lengths. Ways of one graph must agree, and a graph
with float weights must agree with the model that it was made from: mean KL at most 1e-4, and the same most likely
tokens but for near ties; one with the integers of its source within 1e-3, where no activations are rounded. Where
products round activations to integers, ways may differ by what that rounding does, the distance to the same graph
without it: a last bit before it is a step of the grid after it. Cost: nine runs of some 160 tokens, six loads of the
graph, one of the source's model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qlora_export.drift.onnx.first_difference import first_differing, in_torch
from qlora_export.drift.onnx.variants import (
    SAME_INTEGERS_KL,
    SAME_MODEL_KL,
    Distance,
    GraphFindings,
    VariantDistances,
    distance,
)
from qlora_export.drift.recording import Recording
from qlora_export.drift.tokens import TokenSet
from qlora_export.runtimes.base import Session, TracedSession
from qlora_export.runtimes.onnx.cached_graph import LOGITS
from qlora_export.runtimes.onnx.folder import open_graph
from qlora_export.runtimes.onnx.graph_copy import accuracy_level, layers_of, stored_as
from qlora_export.runtimes.onnx.process import Worker, running
from qlora_export.types import Float32

WORKER = "qlora_export.runtimes.onnx.variants_worker"
WINDOW_TOKENS = (96, 48, 16)
DECODED_TOKENS = 8
FLOATS = ("float32", "float16")
LEVELS = (0, 1, 4)
EXACT_LEVELS = (0, 1)
Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Source:
    """What the graph was made from, in words, and what opens it in torch; `same_integers` where it has those."""

    name: str
    open: Callable[[], AbstractContextManager[Session]]
    same_integers: bool = False


@dataclass(frozen=True)
class Variant:
    """How a graph is run; at its own accuracy where none is named, perhaps with the `adapter` of the file beside it."""

    name: str
    decoded: int = 0
    batched: bool = False
    optimised: bool = True
    accuracy_level: int | None = None
    adapter: bool = False


PREFILL = Variant("prefill")
SAME_GRAPH = (
    Variant("decoding with the cache", decoded=DECODED_TOKENS),
    Variant("a batch of three, padded", batched=True),
    Variant("decoding a batch of three, padded", decoded=DECODED_TOKENS, batched=True),
    Variant("prefill without graph optimisation", optimised=False),
    Variant("decoding without graph optimisation", decoded=DECODED_TOKENS, optimised=False),
)
FROM_FILE = Variant("prefill with the adapter's file", adapter=True)


def validate(folder: Path, tokens: TokenSet, source: Source | None) -> GraphFindings:
    """What running the folder in every way comes to; raises InputError for a graph that the checker refuses."""
    opened = open_graph(folder)
    model = opened.model
    windows = validation_windows(tokens)
    in_source = _source_rows(source, windows)
    with running(WORKER, folder) as worker:
        runs = _Runs(worker, windows, opened.is_classifier, opened.adapter is not None)
        found = GraphFindings(
            weights=stored_as(model),
            accuracy_level=accuracy_level(model),
            window_tokens=tuple(len(window) for window in windows),
            source=source.name if source else None,
            ways=tuple(_all_distances(runs, in_source, _source_limit(model, source), accuracy_level(model))),
            departs=None,
            breaches=(),
        )
        return _judged(found, _Search(runs, model, source, found.weights, folder))


def validation_windows(tokens: TokenSet) -> list[tuple[int, ...]]:
    """The beginnings of three windows of the text, or of as many as there are over again, in three lengths.

    Of shorter windows as much less, so that lengths differ wherever there are tokens enough.
    """
    found = []
    for place, length in enumerate(WINDOW_TOKENS):
        fed = tokens.windows[place % len(tokens.windows)].fed
        share = max(2, len(fed) * length // WINDOW_TOKENS[0])
        found.append(tuple(fed[: min(length, share)]))
    return [window for window in found if len(window) > 1] or found[:1]


@dataclass(frozen=True)
class _Runs:
    """A graph and what is run on it."""

    worker: Worker
    windows: Windows
    is_classifier: bool
    has_adapter: bool

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those beside prefill that the graph should agree in; a classifier decodes nothing."""
        same = tuple(variant for variant in SAME_GRAPH if not (variant.decoded and self.is_classifier))
        return (*same, FROM_FILE) if self.has_adapter else same

    def rows(self, variant: Variant, output: str = LOGITS) -> list[Float32]:
        """An array for each window."""
        request = {
            "windows": [list(window) for window in self.windows],
            "decoded": variant.decoded,
            "batched": variant.batched,
            "optimised": variant.optimised,
            "accuracy_level": variant.accuracy_level,
            "output": output,
            "adapter": variant.adapter,
        }
        return self.worker.ask(request, len(self.windows))


def _source_rows(source: Source | None, windows: Windows) -> list[Float32] | None:
    if source is None:
        return None
    with source.open() as session:
        return [session.log_probabilities(window) for window in windows]


def _source_limit(model: object, source: Source | None) -> float | None:
    """How far the graph may be from its source in torch; None where its weights are rounded anew."""
    if stored_as(model) in FLOATS:
        return SAME_MODEL_KL
    return SAME_INTEGERS_KL if source is not None and source.same_integers else None


def _all_distances(
    runs: _Runs, in_source: list[Float32] | None, source_limit: float | None, shipped: int | None
) -> list[VariantDistances]:
    """Prefill, the other ways of the same graph, and its other accuracies."""
    prefill = runs.rows(PREFILL)
    rounds = shipped not in (None, *EXACT_LEVELS)
    apart = None if in_source is None else distance(in_source, prefill, None if rounds else source_limit)
    others = []
    for variant in _other_levels(shipped):
        to_source = source_limit if rounds and variant.accuracy_level in EXACT_LEVELS else None
        others.append(_distances(runs, variant, prefill, in_source, None, to_source))
    rounding = [variant.from_prefill.mean_kl for variant in others if variant.from_prefill] if rounds else []
    limit = max([SAME_MODEL_KL, *rounding[:1]])
    same = [_distances(runs, variant, prefill, in_source, limit) for variant in runs.variants]
    return [VariantDistances(PREFILL.name, None, apart), *same, *others]


def _other_levels(shipped: int | None) -> list[Variant]:
    """The ways of integer products that were not shipped."""
    levels = [] if shipped is None else [level for level in LEVELS if level != shipped]
    return [Variant(f"accuracy_level {level}", accuracy_level=level) for level in levels]


def _distances(
    runs: _Runs,
    variant: Variant,
    prefill: list[Float32],
    in_source: list[Float32] | None,
    limit: float | None,
    source_limit: float | None = None,
) -> VariantDistances:
    """One way beside prefill and source; of a way that decodes only what was decoded."""
    rows = runs.rows(variant)
    decoded = min(variant.decoded, *(len(window) - 1 for window in rows))

    def apart(first: list[Float32], limit: float | None) -> Distance:
        return distance([window[-decoded:] for window in first], [window[-decoded:] for window in rows], limit)

    return VariantDistances(
        variant.name, apart(prefill, limit), None if in_source is None else apart(in_source, source_limit)
    )


@dataclass(frozen=True)
class _Search:
    """Where the first layer that departs is looked for."""

    runs: _Runs
    model: object
    source: Source | None
    weights: str
    folder: Path

    def between_variants(self, variant: Variant) -> str | None:
        """The first layer that a way computes otherwise than prefill."""
        layers = layers_of(self.model)
        return first_differing(
            layers, lambda name: self.runs.rows(variant, name), lambda name: self.runs.rows(PREFILL, name), self.weights
        )

    def from_source(self, variant: Variant) -> str | None:
        """The first layer that a way computes otherwise than the source; None where torch shows no layers."""
        if self.source is None:
            return None
        with tempfile.TemporaryDirectory() as folder, Recording(Path(folder)) as recording:
            names = self._record(self.source, recording)
            layers = [layer for layer in layers_of(self.model) if layer.output in names]
            count = len(self.runs.windows)

            def theirs(output: str) -> list[Float32]:
                found = (recording.outputs(number, names[output], 0) for number in range(count))
                return [rows for rows in found if rows is not None]

            return first_differing(layers, lambda name: self.runs.rows(variant, name), theirs, self.weights)

    def _record(self, source: Source, recording: Recording) -> dict[str, str]:
        """Keep what the layers in torch give that the graph has too; their names by the graph's."""
        with source.open() as session:
            if not isinstance(session, TracedSession):
                return {}
            names = dict(in_torch(layers_of(self.model), session.layers()))
            for number, window in enumerate(self.runs.windows):

                def see(name: str, inputs: Float32 | None, outputs: Float32, number: int = number) -> None:
                    del inputs
                    recording.add(number, name, None, outputs)

                session.trace(window, sorted(set(names.values())), see)
        return names


def _judged(found: GraphFindings, search: _Search) -> GraphFindings:
    """The findings with what is wrong, and of the first such thing the layer that it begins at."""
    known = {
        variant.name: variant for variant in (PREFILL, *SAME_GRAPH, FROM_FILE, *_other_levels(found.accuracy_level))
    }
    wrong: list[tuple[str, Callable[[], str | None]]] = []
    for variant in found.ways:
        if variant.from_source is not None and not variant.from_source.agrees:
            what = f"{variant.name} differs from {found.source} in torch: {variant.from_source.said()}"
            wrong.append((what, partial(search.from_source, known[variant.name])))
        if variant.from_prefill is not None and not variant.from_prefill.agrees:
            what = f"{variant.name} differs from prefill: {variant.from_prefill.said()}"
            wrong.append((what, partial(search.between_variants, known[variant.name])))
    if not wrong:
        return found
    departs = wrong[0][1]()
    place = f"; the first layer that departs is {departs}" if departs else ""
    breaches = (wrong[0][0] + place, *(what for what, _ in wrong[1:]))
    return replace(found, departs=departs, breaches=tuple(f"ONNX: {breach}" for breach in breaches))
