"""Integers in a traced graph: the float graph is filled, then ONNX Runtime's quantiser rounds its products one by one.

The last product is the output head, which may have bits of its own; a classifier's, some rows, stays as it is. Cost:
four bytes a weight of disk while it works (two where activations are float16), of memory a matrix.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from qlora_export.exporters.onnx.constant_products import constant_products
from qlora_export.exporters.onnx.graph import BuiltGraph, Product
from qlora_export.exporters.onnx.rounded_products import BlockRounding, round_products
from qlora_export.exporters.onnx.traced.tracer import trace
from qlora_export.exporters.transformers_js import GENAI_CONFIG


@dataclass(frozen=True)
class TracedRounding:
    """How products are rounded, the last one otherwise; those of some nodes are not."""

    usual: BlockRounding
    last: BlockRounding
    excluded: frozenset[str]


def trace_rounded(name: str, dtype: str, rounding: TracedRounding, source: Path, destination: Path) -> None:
    """Fill `destination` with a graph whose products hold integers; raises what `trace` does."""
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=destination) as work:
        dense = Path(work)
        trace(name, dtype, source, dense)
        graph = BuiltGraph(dense)
        products = constant_products(graph)
        is_decoder = (dense / GENAI_CONFIG).is_file()

        def choose(product: Product) -> BlockRounding | None:
            if product.node in rounding.excluded:
                return None
            if product is not products[-1]:
                return rounding.usual
            return rounding.last if is_decoder else None

        graph.write(round_products(graph, products, choose), destination)
        if is_decoder:
            (dense / GENAI_CONFIG).rename(destination / GENAI_CONFIG)
