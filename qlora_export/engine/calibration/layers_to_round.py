"""The linear layers of a decoder block that an artifact's format has a grid for, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_export.blocks.live_parameters import Parameters
from qlora_export.engine.calibration.round_layer import Parts
from qlora_export.engine.calibration.store import KeptBlock
from qlora_export.formats.base import GridFormat
from qlora_export.planning.plan import ArtifactPlan
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, TensorSpec


@dataclass(frozen=True)
class LayerToRound:
    """A linear layer to round: its name within the block, its stored name, its format, and the layer [out, in].

    A `turned` layer is stored [in, out], and so is its live parameter.
    """

    name: str
    stored: str
    form: GridFormat
    spec: TensorSpec
    turned: bool

    def as_live(self, values: Float32, device: torch.device) -> Tensor:
        """The weight [out, in] as the live parameter holds it."""
        return torch.from_numpy(np.ascontiguousarray(values.T if self.turned else values)).to(device, copy=True)


def layers_of_block(block: Any, prefix: str, item: ArtifactPlan, parameters: Parameters) -> dict[str, LayerToRound]:
    """The layers of a block, whose name in the model is `prefix`, by their names within it."""
    found = {}
    for name, _ in block.named_modules():
        stored = parameters.stored(f"{prefix}.{name}.weight")
        route = item.routes.get(stored) if stored is not None else None
        if stored is not None and route is not None and isinstance(route.form, GridFormat) and route.form.quantises:
            found[name] = LayerToRound(name, stored, route.form, route.spec, route.output.transposed)
    return found


def raw_parts(kept: KeptBlock, subject: LayerToRound) -> Parts | None:
    """The bytes that were decided for a layer; None when it was left to its format."""
    names = [part.name for part in subject.form.parts(subject.spec)]
    if not all(name in kept.parts for name in names):
        return None
    with SourceFiles() as files:
        return {name: files.read_bytes(kept.parts[name], 0, kept.parts[name].bytes) for name in names}
