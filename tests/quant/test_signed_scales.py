"""A negative absmax mirrors the levels: which readers of 4-bit blocks are proven to multiply by it."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.quant import four_bit
from qlora_export.quant.four_bit import NF4
from tests.helpers.values import random_values

ROWS, COLUMNS = 8, 128


@pytest.fixture(scope="module")
def signed() -> tuple[Any, Any, Any]:
    """Codes, scales of both signs, and the weight [rows, columns] that they stand for by multiplication."""
    values = random_values(ROWS, COLUMNS).reshape(-1)
    scales = np.empty(values.size // 64, np.float32)
    four_bit.block_absmax(values, 64, scales)
    scales[::2] *= -1
    numbers = np.searchsorted(NF4.midpoints, values.reshape(-1, 64) / scales[:, None]).astype(np.uint8)
    weight = NF4.levels[numbers] * scales[:, None]
    return four_bit.pack(numbers.reshape(-1), NF4), scales, weight.reshape(ROWS, COLUMNS)


def test_our_decoding_multiplies(signed: tuple[Any, Any, Any]) -> None:
    codes, scales, weight = signed
    out = np.empty(weight.size, np.float32)
    four_bit.decode(codes, scales, 64, NF4.codebook, out)
    assert np.array_equal(out.reshape(weight.shape), weight)


def test_bitsandbytes_multiplies_on_a_cpu(signed: tuple[Any, Any, Any]) -> None:
    codes, scales, weight = signed
    state = bnb.QuantState(
        torch.from_numpy(scales),
        shape=torch.Size((ROWS, COLUMNS)),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        code=torch.from_numpy(NF4.codebook),
    )
    found = bnb.dequantize_4bit(torch.from_numpy(codes).reshape(-1, 1), state)
    assert np.array_equal(found.numpy(), weight)


def test_onnx_runtime_multiplies_on_a_cpu(signed: tuple[Any, Any, Any]) -> None:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scales, weight = signed
    node = helper.make_node(
        "MatMulBnb4", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=COLUMNS, N=ROWS, block_size=64, quant_type=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [COLUMNS, COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [COLUMNS, ROWS])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(COLUMNS, dtype=np.float32)})
    assert np.allclose(found.T, weight, atol=1e-7)
