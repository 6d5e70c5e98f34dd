"""The values of one tensor that its artifacts receive: rows of a merge base, and what the adapter changes in them.

    as they are       base
    in place          change(trained)                   where nobody else takes these rows
    on a copy         change(base)
    added             change(trained) - trained         for codes, which are dithered with it
    added to stored   stored + change(trained) - trained

The last is for changes whose size depends on what they change, as DoRA's: what training added is added to other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from qlora_export.merge.base_rows import Rows, require_finite
from qlora_export.merge.changes import Changes
from qlora_export.merge.merged_model import Output
from qlora_export.planning.plan import Route
from qlora_export.quant.device import kernels
from qlora_export.quant.device.kernels import Values
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import MergeBase


class Merging(Enum):
    """How changes meet rows."""

    AS_THEY_ARE = auto()
    IN_PLACE = auto()
    ON_A_COPY = auto()
    ADDED = auto()
    ADDED_TO_STORED = auto()


@dataclass(frozen=True)
class Merge:
    """A tensor of the merged model on a merge base, its loaded changes, and how they are made."""

    output: Output
    base: MergeBase
    changes: Changes | None
    merging: Merging

    @property
    def needs_trained(self) -> bool:
        """Whether rows of training are merged into, or decide what is added to others."""
        return self.base in ("as-trained", "codes") or self.merging is Merging.ADDED_TO_STORED

    def values(self, rows: Rows, first: int) -> Values:
        """The merged rows, flat, which begin at the row `first`; raises InputError for one that is not finite."""
        if self.changes is None:
            return rows.of(self.base)
        added = self.merging in (Merging.ADDED, Merging.ADDED_TO_STORED)
        values = rows.trained if added else rows.of(self.base)
        if self.merging is not Merging.IN_PLACE:
            values = kernels.copy(values)
        self.changes.apply(values, first)
        if added:
            values -= rows.trained
        if self.merging is Merging.ADDED_TO_STORED:
            values += rows.stored
        return require_finite(values, self.output.layer_spec, str(self.output.source.stored[0].path), first)


def open_merge(route: Route, files: SourceFiles) -> Merge:
    """Load the changes of a tensor; others may take the rows of the base, too."""
    output, base = route.output, route.base
    if not output.changes:
        return Merge(output, base, None, Merging.AS_THEY_ARE)
    changes = Changes(output.changes, files, output.layer_spec.columns)
    if base == "codes":
        return Merge(output, base, changes, Merging.ADDED)
    depends = base == "stored" and not changes.adds
    return Merge(output, base, changes, Merging.ADDED_TO_STORED if depends else Merging.ON_A_COPY)


def in_place(merges: Sequence[Merge]) -> list[Merge]:
    """The same where rows of training are an array of their own: merged into it where only one needs it."""
    alone = sum(merge.needs_trained for merge in merges) == 1
    suit = [alone and merge.base == "as-trained" and merge.changes is not None for merge in merges]
    return [replace(one, merging=Merging.IN_PLACE) if suits else one for one, suits in zip(merges, suit, strict=True)]
