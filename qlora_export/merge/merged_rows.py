"""One tensor of the merged model, whole: the base's rows, and the same rows with every change made."""

from __future__ import annotations

import numpy as np

from qlora_export.merge.base_rows import BaseRows, Training
from qlora_export.merge.changes import Changes
from qlora_export.merge.merged_model import Output
from qlora_export.merge.trained_base import TrainedBase
from qlora_export.quant.floats import Float32
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Onto


class MergedRows:
    """Rows [out, in] of one tensor before and after the merge; each block of `blocks` may be asked for once.

    `own` says that the values come from the adapter. Opening it reads the tensor where that is needed first, for the
    absmax of the base or the norms of DoRA.
    """

    def __init__(
        self, output: Output, training: Training, files: SourceFiles, own: bool, onto: Onto, multiple: int = 1
    ) -> None:
        self._original = onto == "original"
        self._rows = BaseRows(output, training, files, own, trained=not self._original)
        self.spec = self._rows.spec
        self._changes = Changes(output.changes, files, self.spec.columns)
        self.blocks = self._rows.blocks(multiple)
        if self._rows.observes:
            for rows in self.blocks:
                self._rows.observe(rows.start, len(rows))
            self._rows.settle()
        if self._changes.observes:
            for rows in self.blocks:
                self._changes.observe(self.base(rows), rows.start)
            self._changes.settle()

    @property
    def trained(self) -> TrainedBase | None:
        """The 4-bit state of the base, where training quantised this tensor and it is merged onto that."""
        return self._rows.base

    def base(self, rows: range) -> Float32:
        """Flat rows of the merge base."""
        taken = self._rows.take(rows.start, len(rows))
        values: Float32 = taken.original if self._original else taken.trained
        return values

    def merged(self, base: Float32, rows: range) -> Float32:
        """The same rows with every change made, a new array."""
        changed = base.copy()
        self._changes.apply(changed, rows.start)
        return changed

    def whole(self) -> tuple[Float32, Float32]:
        """Base and merged rows of the whole tensor, each flat."""
        base = np.empty(self.spec.size, np.float32)
        merged = np.empty(self.spec.size, np.float32)
        for rows in self.blocks:
            place = slice(rows.start * self.spec.columns, rows.stop * self.spec.columns)
            base[place] = self.base(rows)
            merged[place] = self.merged(base[place], rows)
        return base, merged
