"""Parameters of the live model, read one by one from base and adapter: the merged model without holding it.

On the base as it was trained on, that is the trained model; on the original, what the recipe wants in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_export.merge.base_rows import require_finite
from qlora_export.merge.merged_rows import MergedRows
from qlora_export.merge.module_names import names_of
from qlora_export.merge.trained_base import TrainedBase
from qlora_export.planning.plan import Plan
from qlora_export.quant.floats import Float32
from qlora_export.quant.four_bit import GRIDS, NF4, FourBitGrid
from qlora_export.sources.architecture import StoredPlace
from qlora_export.sources.weights import FourBitWeight, Weight
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Onto, StoredScales, TensorSpec


@dataclass(frozen=True)
class BaseGrid:
    """The 4-bit grid that a base lies on, and the scale of every block of it."""

    grid: FourBitGrid
    stored: StoredScales


@dataclass(frozen=True)
class LayerValues:
    """The weight of a linear layer [out, in] before and after the merge, and the grid it lay on in training."""

    spec: TensorSpec
    base: Float32
    merged: Float32
    base_grid: BaseGrid | None


class Parameters:
    """Reads what the live parameters of these names hold, merged onto one of the bases."""

    def __init__(self, plan: Plan, live: Iterable[str], files: SourceFiles, onto: Onto = "as-trained") -> None:
        self._plan = plan
        self._onto: Onto = onto
        self._files = files
        self._names = names_of(plan.checkpoint, False, live)
        self._places = {name: self._names.parameter(name) for name in self._names.parameters}

    def has(self, name: str) -> bool:
        """Whether a parameter is stored."""
        return bool(self._places.get(name))

    def stored(self, name: str) -> str | None:
        """The stored name of a parameter that is one tensor of its own."""
        places = self._places.get(name, ())
        return places[0].tensor if len(places) == 1 and places[0].window is None else None

    def trained(self, name: str) -> Float32:
        """The values of a stored parameter that the merged model computes with, in the shape of the live one."""
        places = self._places[name]
        if places[0].window is None:
            return self._tensor(places[0].tensor)
        return self._packed(places)

    def layer(self, stored: str) -> LayerValues:
        """A linear layer by its stored name."""
        output = self._plan.model.outputs[stored]
        own = self._plan.from_adapter(output.source)
        rows = MergedRows(output, self._plan.training, self._files, own, self._onto)
        base, merged = rows.whole()
        require_finite(merged, rows.spec, str(output.source.stored[0].path), 0)
        if rows.trained is not None:
            rows.trained.require_recorded()
        shape = (rows.spec.rows, rows.spec.columns)
        grid = _trained_grid(rows.trained) if rows.trained is not None else self._stored_grid(output.source)
        return LayerValues(rows.spec, base.reshape(shape), merged.reshape(shape), grid)

    def _stored_grid(self, source: Weight) -> BaseGrid | None:
        """That of a base which is stored in 4 bits."""
        if not isinstance(source, FourBitWeight):
            return None
        return BaseGrid(GRIDS[source.storage], source.scales(self._files))

    def _tensor(self, stored: str) -> Float32:
        output = self._plan.model.outputs[stored]
        values = self.layer(stored).merged
        if output.transposed:
            return np.ascontiguousarray(values.T)
        return values.reshape(output.spec.shape)

    def _packed(self, places: tuple[StoredPlace, ...]) -> Float32:
        """Experts that are stored one by one, the parts of each below one another."""
        windows = [place.window for place in places if place.window is not None]
        experts = 1 + max(window.expert for window in windows)
        rows = max(window.first + window.count for window in windows)
        first = self._tensor(places[0].tensor)
        packed = np.empty((experts, rows, first.shape[1]), np.float32)
        for place, window in zip(places, windows, strict=True):
            packed[window.expert, window.first : window.first + window.count] = self._tensor(place.tensor)
        return packed


def _trained_grid(trained: TrainedBase) -> BaseGrid:
    """That of a base which training quantised."""
    if trained.second_level is None:
        return BaseGrid(NF4, StoredScales(trained.scales))
    offset, nested_absmax = trained.second_level
    return BaseGrid(NF4, StoredScales(trained.scales, None, nested_absmax, offset))
