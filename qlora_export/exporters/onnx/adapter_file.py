"""An adapter as the `.onnx_adapter` file that ONNX Runtime and ONNX Runtime GenAI run on a graph with inputs for it.

    MODULE.lora_A   float32 [in, rank]      MODULE.lora_B   float32 [rank, out], scale included

The file has every input of its graph: what it lacked would stay the adapter that the graph was exported with. Layers
that only that one changes get zeros, of rank 1. On disk it is a flatbuffer of ONNX Runtime, whose offsets have 31 bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qlora_export.errors import Refused, UsageError
from qlora_export.exporters.onnx.adapted import AdaptedBase, AdaptedLayer, adapted_base, factors
from qlora_export.exporters.onnx.beside import input_names
from qlora_export.exporters.onnx.builder import require_packages
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.sources.adapter import Adapter, open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32

FILE_NAME = "adapter.onnx_adapter"
FILE_VERSION = 1
LARGEST_BYTES = (1 << 31) - (1 << 24)


def write_onnx_adapter(adapter: Path, source: Path, destination: Path) -> None:
    """Write the file of another adapter for the graph that was exported, with `adapter: inputs`, from `source`.

    `source` is a finished `nf4-adapter` folder. Raises Refused for an adapter that is no plain LoRA, that changes
    layers which the graph has no inputs for, or that was trained on other 4-bit codes as far as its sidecar says;
    UsageError where the destination exists.
    """
    require_packages("an .onnx_adapter file")
    if os.path.lexists(destination):
        raise UsageError(f"{destination}: exists", "choose another name, or remove it")
    checkpoint, opened = open_checkpoint(source), open_adapter(adapter)
    own = adapted_base(checkpoint, open_adapter(source / ADAPTER_FOLDER))
    other = adapted_base(checkpoint, opened)
    missing = sorted(other.changes.keys() - own.changes.keys())
    if missing:
        what = f"{adapter}: changes {missing[0]}, which the graph has no inputs for"
        raise Refused(what, "export the graph with an adapter of all the layers that others change")
    with SourceFiles() as files:
        _require_same_codes(opened, other, files)
        write_factors(_pairs(own, other, files), destination)


def write_factors(pairs: Iterator[tuple[str, Float32, Float32]], destination: Path) -> None:
    """Write a file of modules and their factors; raises Refused where it would be larger than the format can be."""
    import onnxruntime

    parameters: dict[str, Float32] = {}
    for module, first, second in pairs:
        for name, values in zip(input_names(module), (first, second), strict=True):
            parameters[name] = np.ascontiguousarray(values, np.float32)
    if sum(values.nbytes for values in parameters.values()) > LARGEST_BYTES:
        raise Refused(f"{destination.name}: an adapter of 2 GiB or more fits into no such file", "leave `adapter` out")
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(FILE_VERSION)
    made.set_model_version(FILE_VERSION)
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(parameters[name]) for name in parameters})
    partial = destination.absolute().with_name(f"{destination.name}.partial")
    made.export_adapter(str(partial))
    partial.rename(destination)


def own_factors(base: AdaptedBase, files: SourceFiles) -> Iterator[tuple[str, Float32, Float32]]:
    """The modules that an adapter changes, with its factors."""
    return _pairs(base, base, files)


def _pairs(graph: AdaptedBase, adapter: AdaptedBase, files: SourceFiles) -> Iterator[tuple[str, Float32, Float32]]:
    for layer in graph.layers.values():
        module = layer.weight.spec.module
        if module in graph.changes:
            change = adapter.changes.get(module)
            yield (module, *(_zeros(layer) if change is None else factors(change, files)))


def _zeros(layer: AdaptedLayer) -> tuple[Float32, Float32]:
    spec = layer.weight.spec
    return np.zeros((spec.columns, 1), np.float32), np.zeros((1, spec.rows), np.float32)


def _require_same_codes(adapter: Adapter, base: AdaptedBase, files: SourceFiles) -> None:
    """Raise Refused for the first layer whose codes in training, as the sidecar has them, were others."""
    for layer in base.layers.values():
        module, codes = layer.weight.spec.module, layer.weight.codes
        if (recorded := adapter.training.modules.get(module)) is None:
            continue
        if hashlib.sha256(files.read_bytes(codes, 0, codes.bytes).data).hexdigest() != recorded.codes_sha256:
            what = f"{adapter.folder}: was trained on other 4-bit codes of {module} than the graph has"
            raise Refused(what, "export a graph of the base that it was trained on")
