"""Products of a dense graph, rounded one at a time, against ONNX Runtime's quantiser over the whole graph."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as quantiser

from qlora_export.errors import Refused
from qlora_export.exporters.onnx.constant_products import constant_products
from qlora_export.exporters.onnx.graph import BuiltGraph
from qlora_export.exporters.onnx.rounded_products import BlockRounding, round_products

ROWS, COLUMNS = 38, 120
KINDS = list(itertools.product(("default", "rtn", "k_quant"), (4, 8), (True, False), (16, 32), ("float32", "float16")))


def values(seed: int, *shape: int) -> Any:
    """With a block of zeros and one of a constant, which have no range."""
    made = np.random.default_rng(seed).standard_normal(shape)
    made[:32, :1], made[:32, 1:2] = 0, 0.5
    return made


def plain_graph(kind: str = "float32", name: str = "a") -> onnx.ModelProto:
    tensor = numpy_helper.from_array(values(1, COLUMNS, ROWS).astype(kind), f"{name}.weight")
    node = helper.make_node("MatMul", ["x", tensor.name], ["y"], name=f"/{name}/MatMul")
    return model_of([node], [tensor], ["y"], kind)


def model_of(nodes: Any, tensors: Any, outputs: Any, kind: str = "float32") -> onnx.ModelProto:
    number = {"float32": 1, "float16": 10}[kind]
    ins, outs = ([helper.make_tensor_value_info(name, number, None) for name in names] for names in (["x"], outputs))
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", ins, outs, tensors), opset_imports=versions, ir_version=10)


def rounded(model: onnx.ModelProto, folder: Path, rounding: BlockRounding) -> onnx.ModelProto:
    (folder / "dense").mkdir()
    path = folder / "dense/model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    graph = BuiltGraph(folder / "dense")
    graph.write(round_products(graph, constant_products(graph), lambda product: rounding), folder)
    return onnx.load(folder / "model.onnx")


def tensors_of(model: onnx.ModelProto) -> dict[str, tuple[Any, ...]]:
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.filterwarnings("ignore:.*(divide|invalid value)")
@pytest.mark.parametrize(("algorithm", "bits", "symmetric", "block", "kind"), KINDS)
def test_nodes_names_and_bytes_are_those_of_the_quantiser(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    bits: int,
    symmetric: bool,
    block: int,
    kind: str,
) -> None:
    """Six rows at a time here, all at once there."""
    monkeypatch.setattr("qlora_export.exporters.onnx.rounded_products.CHUNK_VALUES", 6 * COLUMNS + 1)
    weights = {"/a/MatMul": {"bits": bits}}
    settings: Any = {
        "default": None,
        "rtn": quantiser.RTNWeightOnlyQuantConfig(customized_weight_config=weights),
        "k_quant": quantiser.KQuantWeightOnlyQuantConfig(customized_weight_config=weights),
    }[algorithm]
    whole = quantiser.MatMulNBitsQuantizer(plain_graph(kind), bits, block, symmetric, 4, algo_config=settings)
    whole.process()
    found = rounded(plain_graph(kind), tmp_path, BlockRounding(bits, block, symmetric, algorithm))
    expected = whole.model.model
    assert list(found.graph.node) == list(expected.graph.node)
    assert tensors_of(found) == tensors_of(expected)


def test_weights_that_are_turned_and_products_with_a_bias(tmp_path: Path) -> None:
    """Four products by the same weight, one of which needs it dense, too."""
    weight = values(1, COLUMNS, ROWS).astype(np.float32)
    tensors = [numpy_helper.from_array(weight, "straight"), numpy_helper.from_array(weight.T.copy(), "turned")]
    tensors.append(numpy_helper.from_array(np.arange(ROWS, dtype=np.float32), "bias"))
    nodes = [
        helper.make_node("MatMul", ["x", "straight"], ["a"], name="a"),
        helper.make_node("Transpose", ["turned"], ["again"], name="t"),
        helper.make_node("MatMul", ["x", "again"], ["b"], name="b"),
        helper.make_node("Gemm", ["x", "turned", "bias"], ["c"], name="c", transB=1),
        helper.make_node("Gemm", ["x", "straight", "bias"], ["d"], name="d"),
        helper.make_node("Gemm", ["x", "straight", "bias"], ["e"], name="e", alpha=0.5),
    ]
    found = rounded(model_of(nodes, tensors, list("abcde")), tmp_path, BlockRounding(8, accuracy_level=0))
    assert [node.op_type for node in found.graph.node].count("MatMulNBits") == 4
    assert "Transpose" not in [node.op_type for node in found.graph.node]
    assert {"straight", "bias"} == {name for name in tensors_of(found) if "_" not in name}
    x = np.random.default_rng(2).standard_normal((3, COLUMNS)).astype(np.float32)
    a, b, c, d, e = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": x})
    assert 0 < np.abs(a - x @ weight).max() < 0.3
    assert np.array_equal(a, b)
    assert np.allclose(a + np.arange(ROWS), c)
    assert np.array_equal(c, d)
    assert np.allclose(0.5 * x @ weight + np.arange(ROWS), e, atol=1e-4)


def test_blocks_that_the_quantiser_cannot_pack_are_refused(tmp_path: Path) -> None:
    """Zero points of an odd number of blocks: it mixes those of two rows up and then fails."""
    with pytest.raises(Refused, match="/a/MatMul: 120 columns in blocks of 128 cannot be rounded by rtn") as error:
        rounded(plain_graph(), tmp_path, BlockRounding(4, 128, False, "rtn"))
    assert error.value.hint
