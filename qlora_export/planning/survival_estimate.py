"""How much of the adapter will survive a rounding, from a sample of rows, before anything is built.

    survival = <decode(encode(base + delta)) - base, delta> / |delta|^2

as `drift/survival.py` finds it in the shipped bytes, here for a few rows of every adapted matrix, spread evenly, with
the format's own encoder. The sample is always the same. Double quantisation of the base is left out, for it needs
whole tensors; what a format computes over whole tensors it computes over the sample. The standard error is that of a
ratio with rows as units. Cost: reads some 32,000 weights of each matrix, and factors whole; seconds for 7 B weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qlora_export.formats.base import Format
from qlora_export.merge.base_rows import BaseRows, Rows, Training
from qlora_export.merge.changes import Changes
from qlora_export.merge.merged_model import Output
from qlora_export.tensors.dtypes import ITEM_BYTES, round_to
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, MergeBase, Piece, TensorSpec

SAMPLE_WEIGHTS = 1 << 15
PLACES = 4


@dataclass(frozen=True)
class SurvivalQuery:
    """A form that encodes these modules merged onto a base."""

    form: Format
    base: MergeBase
    modules: AbstractSet[str]


@dataclass(frozen=True)
class Predicted:
    """Survival by tensor and its standard errors, in the order of the model; there is at least one tensor."""

    survival: Mapping[str, float]
    stderr: Mapping[str, float]

    @property
    def median(self) -> float:
        """Over tensors."""
        return float(np.median([*self.survival.values()]))

    @property
    def lowest(self) -> str:
        """The tensor that keeps least."""
        return min(self.survival, key=lambda name: self.survival[name])


def predict(
    questions: Mapping[str, SurvivalQuery], outputs: Sequence[Output], training: Training
) -> dict[str, Predicted]:
    """Answers to the questions that speak of at least one of the outputs, which have changes other than zero."""
    quantization = replace(training.quantization, double_quant=False, modules={})
    sampled = Training(quantization, training.quantised)
    found: dict[str, dict[str, tuple[float, float]]] = {key: {} for key in questions}
    with SourceFiles() as files:
        for output in outputs:
            asked = {key: item for key, item in questions.items() if output.spec.module in item.modules}
            if asked and len(output.spec.shape) == 2:
                for key, answer in _answers(asked, output, sampled, files):
                    found[key][output.name] = answer
    return {
        key: Predicted({name: one[0] for name, one in by.items()}, {name: one[1] for name, one in by.items()})
        for key, by in found.items()
        if by
    }


def _answers(
    asked: Mapping[str, SurvivalQuery], output: Output, training: Training, files: SourceFiles
) -> Iterator[tuple[str, tuple[float, float]]]:
    spec = output.layer_spec
    changes = Changes(output.changes, files, spec.columns)
    if changes.observes:
        return
    rows = BaseRows(output, training, files, own=False, trained=True)
    multiple = math.lcm(*(item.form.row_multiple(spec) for item in asked.values()))
    places = sample_of(spec.rows, spec.columns, rows.whole_rows(multiple), 1 if output.transposed else PLACES)
    for place in places:
        rows.observe(place.start, len(place))
    rows.settle()
    taken = [(place, rows.take(place.start, len(place))) for place in places]
    trained = np.concatenate([part.trained for _, part in taken])
    deltas = {base: _delta(taken, changes, base) for base in {_reference(item.base) for item in asked.values()}}
    for key, item in asked.items():
        delta, base = deltas[_reference(item.base)], trained
        if item.base == "original":
            base = np.concatenate([part.original for _, part in taken])
        merged = base + delta
        if item.base == "stored":
            merged = np.concatenate([part.stored for _, part in taken]) + delta
        sample = replace(spec, shape=(merged.size // spec.columns, spec.columns))
        kept = round_to(round_trip(item.form, sample, merged), training.quantization.compute_dtype) - base
        if delta.any():
            yield key, _ratio(kept.reshape(sample.shape), delta.reshape(sample.shape))


def _reference(base: MergeBase) -> MergeBase:
    """Whose change is to survive: that of the original, or that of training."""
    return "original" if base == "original" else "as-trained"


def _delta(taken: Sequence[tuple[range, Rows]], changes: Changes, base: MergeBase) -> Float32:
    """What the changes add to a base."""
    parts = []
    for place, part in taken:
        values: Float32 = part.of(base)
        changed = values.copy()
        changes.apply(changed, place.start)
        parts.append(changed - values)
    return np.concatenate(parts)


def sample_of(rows: int, columns: int, multiple: int, places: int) -> list[range]:
    """Rows in a few places from the first to the last, of whole multiples; all rows of a small matrix."""
    if rows * columns <= SAMPLE_WEIGHTS:
        return [range(rows)]
    height = max(1, SAMPLE_WEIGHTS // (places * columns * multiple)) * multiple
    if multiple * columns > SAMPLE_WEIGHTS:
        places = 1
    last = (rows - height) // multiple
    if last < places * height // multiple:
        return [range(min(rows, places * height))]
    firsts = [last * place // max(places - 1, 1) * multiple for place in range(places)]
    return [range(first, first + height) for first in firsts]


def round_trip(form: Format, spec: TensorSpec, values: Float32) -> Float32:
    """Flat values [rows, columns] as the format would give them back."""
    raw = {part.name: np.zeros(math.prod(part.shape) * ITEM_BYTES[part.dtype], np.uint8) for part in form.parts(spec)}
    encoder = form.open(spec)
    _put(raw, encoder.encode(values, 0))
    _put(raw, encoder.seal())
    return form.decode(spec, raw, range(spec.rows))


def _put(raw: Mapping[str, NDArray[np.uint8]], pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        raw[piece.part][piece.offset : piece.offset + piece.data.nbytes] = piece.data.reshape(-1).view(np.uint8)


def _ratio(found: Float32, delta: Float32) -> tuple[float, float]:
    """<found, delta> / |delta|^2 with its standard error."""
    kept = np.einsum("rc,rc->r", found.astype(np.float64), delta.astype(np.float64))
    whole = np.einsum("rc,rc->r", delta.astype(np.float64), delta.astype(np.float64))
    share = float(kept.sum() / whole.sum())
    rows = kept.size
    spread = math.sqrt(float(np.square(kept - share * whole).sum()) * rows / max(rows - 1, 1))
    return share, spread / float(whole.sum())
