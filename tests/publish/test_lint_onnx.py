"""Graphs made by hand, whose external data is wrong in one way each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qlora_export.errors import ExitCode
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.onnx_data import graph_problems

VALUES = np.arange(8, dtype=np.float32)


def outside(name: str = "weight", kind: int = TensorProto.FLOAT, shape: tuple[int, ...] = (8,), **facts: object) -> Any:
    """A tensor whose bytes lie in `model.onnx.data`, or where the facts say."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx.data", "offset": 0, "length": 32, **facts}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(*tensors: Any, nodes: tuple[Any, ...] = ()) -> Any:
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [8])
    return helper.make_graph([*nodes, helper.make_node("Identity", ["weight"], ["out"])], "g", [], [output], tensors)


def messages(folder: Path, model: Any, data: bytes | None = VALUES.tobytes()) -> list[str]:
    """What is found in a graph and its data."""
    (folder / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    if data is not None:
        (folder / "model.onnx.data").write_bytes(data)
    names = frozenset(path.name for path in folder.iterdir() if not path.is_symlink())
    return [problem.message for problem in graph_problems(Contents(folder, names))]


def test_a_graph_and_its_data_are_clean(tmp_path: Path) -> None:
    assert messages(tmp_path, helper.make_model(graph(outside()))) == []


def test_four_bit_codes_are_half_a_byte_each(tmp_path: Path) -> None:
    tensor = outside(kind=TensorProto.UINT4, shape=(3, 5), length=8)
    assert messages(tmp_path, helper.make_model(graph(tensor)), bytes(8)) == []


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"location": "../secret.data"}, "lies in '../secret.data', which is no plain name"),
        ({"location": "/etc/passwd"}, "lies in '/etc/passwd', which is no plain name"),
        ({"location": "a/model.onnx.data"}, "lies in 'a/model.onnx.data', which is no plain name"),
        ({"location": ".."}, "which is no plain name"),
        ({"location": "model.safetensors"}, "which is no plain name"),
        ({"location": None}, "lies in '', which is no plain name"),
        ({"location": "other.onnx.data"}, "lies in other.onnx.data, which is not published"),
        ({"length": 31}, "has 31 bytes, its shape [8] needs 32"),
        ({"length": 1 << 40}, f"has {1 << 40} bytes, its shape [8] needs 32"),
        ({"offset": 4}, "ends at byte 36, model.onnx.data has 32"),
        ({"offset": -4}, "ends at byte 28, model.onnx.data has 32"),
        ({"offset": "x"}, "has the offset 'x' and the length '32'"),
        ({"basepath": "/etc"}, "has the external data keys ['location', 'offset', 'length', 'basepath']"),
        ({"shape": (-8,)}, "has type 1 and shape [-8]"),
        ({"shape": (1 << 40,)}, f"has 32 bytes, its shape [{1 << 40}] needs {1 << 42}"),
        ({"kind": 99}, "has type 99 and shape [8]"),
    ],
)
def test_external_data_that_is_not_what_it_says(tmp_path: Path, facts: dict[str, Any], says: str) -> None:
    (message,) = messages(tmp_path, helper.make_model(graph(outside(**facts))))
    assert message.startswith("model.onnx: tensor 'weight' ")
    assert says in message
    assert message.endswith("[external-data]")


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    tensor = outside()
    tensor.external_data.add(key="location", value="../x.onnx.data")
    (message,) = messages(tmp_path, helper.make_model(graph(tensor)))
    assert "['location', 'offset', 'length', 'location']" in message


def test_data_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/data").write_bytes(VALUES.tobytes())
    (tmp_path / "model.onnx.data").symlink_to(tmp_path / "elsewhere/data")
    (message,) = messages(tmp_path, helper.make_model(graph(outside())), None)
    assert "lies in model.onnx.data, which is not published" in message


def in_attribute(bad: Any) -> Any:
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    return helper.make_model(graph(outside(), nodes=(constant,)))


def in_subgraph(bad: Any) -> Any:
    branch = helper.make_graph([], "branch", [], [], [bad])
    node = helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=graph())
    return helper.make_model(graph(outside(), nodes=(node,)))


def in_function(bad: Any) -> Any:
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    function = helper.make_function("local", "f", [], ["c"], [constant], [helper.make_opsetid("", 21)])
    return helper.make_model(graph(outside()), functions=[function])


def in_sparse_weight(bad: Any) -> Any:
    model = helper.make_model(graph(outside()))
    model.graph.sparse_initializer.add(values=bad, dims=[8])
    return model


@pytest.mark.parametrize("hide", [in_attribute, in_subgraph, in_function, in_sparse_weight])
def test_a_tensor_hides_nowhere(tmp_path: Path, hide: Callable[[Any], Any]) -> None:
    (message,) = messages(tmp_path, hide(outside("bad", location="../../etc/passwd")))
    assert "tensor 'bad' lies in '../../etc/passwd'" in message


def test_a_location_without_the_mark_is_looked_at(tmp_path: Path) -> None:
    tensor = outside(location="/etc/passwd")
    tensor.data_location = TensorProto.DEFAULT
    (message,) = messages(tmp_path, helper.make_model(graph(tensor)))
    assert "/etc/passwd" in message


def test_data_that_no_graph_names(tmp_path: Path) -> None:
    (tmp_path / "old.onnx.data").write_bytes(b"1234")
    assert messages(tmp_path, helper.make_model(graph(outside()))) == [
        "old.onnx.data: belongs to no graph [external-data]"
    ]


def test_data_that_goes_on_after_the_last_tensor(tmp_path: Path) -> None:
    found = messages(tmp_path, helper.make_model(graph(outside())), VALUES.tobytes() + bytes(1 << 16))
    assert found == ["model.onnx.data: has 65568 bytes, its last tensor ends at 32 [external-data]"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_is_not_finite(tmp_path: Path, dtype: Any) -> None:
    values = VALUES.astype(dtype)
    values[5] = np.inf
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    found = messages(tmp_path, helper.make_model(graph(outside(kind=kind, length=values.nbytes))), values.tobytes())
    assert found == ["model.onnx.data: tensor 'weight' of model.onnx is NaN or infinite at value 5 [non-finite]"]


@pytest.mark.parametrize("raw", [b"no graph", b"\x80\x02", b""])
def test_what_is_no_graph(tmp_path: Path, raw: bytes) -> None:
    found = messages(tmp_path, raw, None)
    assert [message.rpartition(" ")[2] for message in found] == ["[onnx]"]


def test_without_onnx_a_graph_cannot_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(helper.make_model(graph()), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    (problem,) = graph_problems(Contents(tmp_path, frozenset(["model.onnx"])))
    assert problem.exit_code == ExitCode.ENVIRONMENT
    assert problem.hint == "pip install 'qlora-export[onnx]'"
