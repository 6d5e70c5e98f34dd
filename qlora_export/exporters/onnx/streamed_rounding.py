"""The model builder's rounding of its graph, a matrix at a time and while it is written.

The builder's own steps run on its graph with stand-ins, two rows to a weight. What they leave says which products are
rounded, how, and under which names; the weights themselves are then rounded when these tensors are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import onnx_ir

from qlora_export.exporters.onnx.graph import FLOATS, Floats, NewTensor, Product
from qlora_export.exporters.onnx.rounded_products import BlockRounding, rounded_product
from qlora_export.exporters.onnx.streamed_tensors import StreamedMatrix

STAND_IN_ROWS = 2


class RoundedTensor(onnx_ir.LazyTensor):
    """Codes, scales or zero points of a weight, which is rounded when the first of them is written."""

    def __init__(self, tensor: NewTensor) -> None:
        self._new = tensor
        super().__init__(self._whole, onnx_ir.DataType(tensor.type), onnx_ir.Shape(tensor.shape), name=tensor.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write all of it at the position of the file."""
        file.writelines(chunk.data for chunk in self._new.chunks())

    def _whole(self) -> onnx_ir.TensorProtocol:
        raw = np.concatenate(list(self._new.chunks()))
        return onnx_ir.Tensor(raw.view(self.dtype.numpy()).reshape(self._new.shape), dtype=self.dtype, name=self.name)


def stream_rounding(model_class: Any) -> None:
    """Have the builder's class round weights when they are written, but for a graph that needs them before."""
    round_all = model_class.to_nbits

    def to_nbits(self: Any) -> onnx_ir.Model:
        if not _can_stand_in(self):
            return _as_it_is(round_all, self)
        matrices = {
            name: value.const_value
            for name, value in self.model.graph.initializers.items()
            if isinstance(value.const_value, StreamedMatrix)
        }
        products = [node for node in self.model.graph if node.op_type == "MatMul" and node.inputs[1].name in matrices]
        _stand_in(self.model.graph, matrices)
        model = _as_it_is(round_all, self)
        _put_back(model.graph, matrices)
        weights = {node.outputs[0].name: node for node in products}
        for node in model.graph:
            if node.op_type == "MatMulNBits" and node.outputs[0].name in weights:
                old = weights[node.outputs[0].name]
                _round_later(model.graph, node, old, matrices[old.inputs[1].name], self)
        return model

    model_class.to_nbits = to_nbits


def _as_it_is(round_all: Callable[[Any], Any], builder: Any) -> onnx_ir.Model:
    model: onnx_ir.Model = round_all(builder)
    return model


def _can_stand_in(builder: Any) -> bool:
    """Whether only matrix products are rounded, to float32 or float16 scales, and not rearranged afterwards."""
    facts, graph = builder.quant_attrs, builder.model.graph
    looked_up = any(
        node.op_type == "Gather" and isinstance(node.inputs[0].const_value, StreamedMatrix) for node in graph
    )
    return (
        not facts["use_qdq"]
        and not (looked_up and "Gather" in facts["op_types_to_quantize"])
        and not (builder.ep == "cuda" and builder.matmul_attrs["weights_prepacked"] > 0)
        and int(builder.io_dtype) in FLOATS
    )


def _stand_in(graph: onnx_ir.Graph, matrices: dict[str, StreamedMatrix]) -> None:
    for name, matrix in matrices.items():
        rows, kind = matrix.lengths[0], FLOATS[int(matrix.dtype)]
        ramp = np.linspace(-1, 1, rows * STAND_IN_ROWS).astype(kind).reshape(rows, STAND_IN_ROWS)
        graph.initializers[name].const_value = onnx_ir.Tensor(ramp, name=name)


def _put_back(graph: onnx_ir.Graph, matrices: dict[str, StreamedMatrix]) -> None:
    for name in matrices.keys() & graph.initializers.keys():
        graph.initializers[name].const_value = matrices[name]
        graph.initializers[name].shape = matrices[name].shape


def _round_later(
    graph: onnx_ir.Graph, node: onnx_ir.Node, old: onnx_ir.Node, matrix: StreamedMatrix, builder: Any
) -> None:
    facts = {name: attribute.value for name, attribute in node.attributes.items()}
    rounding = BlockRounding(
        facts["bits"],
        facts["block_size"],
        builder.quant_attrs["is_symmetric"],
        builder.quantization_algo,
        facts.get("accuracy_level", 0),
    )
    columns, rows = matrix.lengths
    product = Product(str(old.name), str(matrix.name), columns, rows, "input", "output", type=int(matrix.dtype))

    def read(first: int, count: int) -> Floats:
        values: Floats = matrix.columns(first, count).numpy()
        return values

    for tensor in rounded_product(product, read, rounding).tensors:
        value = graph.initializers[tensor.name]
        value.const_value = RoundedTensor(tensor)
        value.shape = onnx_ir.Shape(tensor.shape)
    node.attributes["N"] = onnx_ir.AttrInt64("N", rows)
