"""The adapter's two small products beside a product of the base, their factors constants or inputs with a default.

    constant   WEIGHT.lora_A [in, rank], WEIGHT.lora_B [rank, rows]: of each product its own, WEIGHT as in the graph
    inputs     MODULE.lora_A [in, rank], MODULE.lora_B [rank, out]: of each module, MODULE as in the checkpoint

An input that is an initialiser too has that as its default. Where the graph cuts a module into several products they
share its inputs, and each takes its columns of B. Each module's rank has a symbol of its own: ONNX Runtime gives values
whose symbols are the same the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_export.exporters.onnx.adapted import AdaptedLayer, factors
from qlora_export.exporters.onnx.graph import FLOAT, Product, Replacement, array, node, numbers
from qlora_export.exporters.onnx.skeleton import Run
from qlora_export.tensors.reading import SourceFiles

# What adds a layer's adapter to the output of its base, of that name.
Beside = Callable[[SourceFiles, Product, Run, AdaptedLayer, str], Replacement]


def input_names(module: str) -> tuple[str, str]:
    """The names of a module's factors."""
    return f"{module}.lora_A", f"{module}.lora_B"


def as_constants(files: SourceFiles, product: Product, run: Run, layer: AdaptedLayer, base: str) -> Replacement:
    """Factors that stay what they are."""
    assert layer.change is not None
    first, second = factors(layer.change, files)
    a = array(f"{product.weight}.lora_A", first)
    b = array(f"{product.weight}.lora_B", second[:, run.first_row : run.first_row + run.rows])
    return Replacement(_products(product, a.name, b.name, base), (a, b))


def as_inputs(files: SourceFiles, product: Product, run: Run, layer: AdaptedLayer, base: str) -> Replacement:
    """Factors that another adapter can take the place of."""
    assert layer.change is not None
    spec = layer.weight.spec
    rank = f"{spec.module}.rank"
    pairs = zip(input_names(spec.module), factors(layer.change, files), strict=True)
    a, b = (array(name, values) for name, values in pairs)
    inputs = (_input(a.name, [spec.columns, rank]), _input(b.name, [rank, spec.rows]))
    part, cut = (b.name, ()) if run.rows == spec.rows else _columns(product, run, b.name)
    return Replacement((*cut, *_products(product, a.name, part, base)), (a, b), inputs)


def _products(product: Product, a: str, b: str, base: str) -> tuple[Any, ...]:
    inner, added = f"{product.output}/lora_A", f"{product.output}/lora_B"
    return (
        node("MatMul", [product.input, a], inner, f"{product.node}/lora_A"),
        node("MatMul", [inner, b], added, f"{product.node}/lora_B"),
        node("Add", [base, added], product.output, f"{product.node}/lora_Add"),
    )


def _columns(product: Product, run: Run, whole: str) -> tuple[str, tuple[Any, ...]]:
    """The columns of B that a product of some rows needs."""
    name = f"{product.weight}.lora_B"
    places = {"first": run.first_row, "end": run.first_row + run.rows, "axis": 1}
    ends = [numbers(f"{name}_{word}", [place]) for word, place in places.items()]
    inputs = [whole, *(f"{name}_{word}" for word in places)]
    return name, (*ends, node("Slice", inputs, name, f"{product.node}/lora_Slice"))


def _input(name: str, shape: list[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, FLOAT, shape)
