"""From marked weights to an artifact: build the graph around the marks, read where they are, replace those products."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.exporters.onnx.builder import Order
from qlora_export.exporters.onnx.graph import DATA_NAME, GRAPH_NAME, BuiltGraph, Product, Replacement
from qlora_export.exporters.onnx.graphs import make_graph
from qlora_export.exporters.onnx.skeleton import (
    MARK_COLUMNS,
    MixedRows,
    Run,
    require_all_placed,
    runs_of,
    write_skeleton,
)
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import TensorSpec

# The skeleton in 16 bits, what the builder stacks, and of its graph in float32 what is not marked: the rest is holes.
SURGERY_BYTES_PER_WEIGHT = 4.0
# What stands in for a product that is made of these rows; raises MixedRows where they are not stored alike.
Replace = Callable[[Product, tuple[Run, ...]], Replacement]


@dataclass(frozen=True)
class Model:
    """A finished folder as the skeleton needs it: its dense tensors, and weights [out, in] that get marks."""

    folder: Path
    config: Mapping[str, Any]
    dense: Sequence[StoredTensor]
    marked: Sequence[TensorSpec]


def make_exact(name: str, model: Model, stacked: bool, replace: Replace, destination: Path) -> None:
    """Fill `destination`; where `stacked`, q, k and v share a product, unless their rows do not go together."""
    with tempfile.TemporaryDirectory(prefix=".graph-", dir=destination) as work:
        skeleton = Path(work) / "skeleton"
        skeleton.mkdir()
        write_skeleton(skeleton, model.folder, model.config, model.dense, model.marked)
        for fused in (True, False) if stacked else (False,):
            built = Path(work) / f"built-{fused}"
            words = () if fused else ("fuse_qkv=false",)
            make_graph(name, Order("fp32", "cpu", words), skeleton, built)
            try:
                graph = BuiltGraph(built)
                replacements = _replacements(name, graph, model, replace)
            except MixedRows:
                if not fused:
                    raise
                shutil.rmtree(built)
                continue
            shutil.rmtree(skeleton)
            graph.write(replacements, destination)
            _take_others(built, destination)
            return


def _replacements(name: str, graph: BuiltGraph, model: Model, replace: Replace) -> dict[str, Replacement]:
    found: dict[str, Replacement] = {}
    placed: list[Run] = []
    for product in graph.products():
        marks = graph.first_rows(product, min(MARK_COLUMNS, product.columns))
        runs = runs_of(marks, model.marked, product.weight) if len(marks) == MARK_COLUMNS else None
        if runs is not None:
            placed += runs
            found[product.node] = replace(product, runs)
    require_all_placed(placed, model.marked, name)
    return found


def _take_others(built: Path, destination: Path) -> None:
    """What the builder left beside graph and data."""
    for path in sorted(built.iterdir()):
        if path.is_file() and path.name not in (GRAPH_NAME, DATA_NAME):
            path.rename(destination / path.name)
