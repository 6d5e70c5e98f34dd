"""A traced graph made one that a runtime and a reader can use: folded, weights as products take them, named by module.

torch stores the weight of a linear layer as [out, in] and turns it in the graph; here it is declared [in, out] and the
turning left out, unless something else reads it as it is (a tied embedding). A product of two dimensions with its bias
in one node becomes product and sum, as all others are. Constants become nodes, so that data are weights alone. Each
node is called by the path of its module, from what torch notes of it; other notes, paths of source files among them,
go.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SCOPES = "pkg.torch.onnx.name_scopes"
PREFIX = "model."


def tidy(program: Any, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Tidy the program's graph in place; its weights, those of `names` that it has: name and whether it was turned."""
    graph = program.model.graph
    weights = [value for name, value in graph.initializers.items() if name in names]
    for value in weights:
        del graph.initializers[value.name]
        value.const_value = None
    graph.inputs.extend(weights)
    program.optimize()
    graph = program.model.graph
    for node in list(graph):
        if node.op_type == "Gemm" and all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta")):
            _split(graph, node)
    turned = [value for value in weights if _turn(graph, value)]
    _state_constants(graph)
    for value in weights:
        value.name = value.name.removeprefix(PREFIX)
    _name(program.model)
    return [{"name": value.name, "turned": value in turned} for value in weights]


def _split(graph: Any, node: Any) -> None:
    """Product and sum for a Gemm, whose second factor is turned before, where it was inside."""
    import onnx_ir

    factor, made = node.inputs[1], []
    if node.attributes.get_int("transB", 0):
        made.append(onnx_ir.node("Transpose", [factor], {"perm": [1, 0]}))
        factor = made[-1].outputs[0]
    made.append(onnx_ir.node("MatMul", [node.inputs[0], factor]))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        made.append(onnx_ir.node("Add", [made[-1].outputs[0], node.inputs[2]]))
    for item in made:
        item.metadata_props.update(node.metadata_props)
    last = made[-1].outputs[0]
    last.shape, last.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, made)
    onnx_ir.convenience.replace_all_uses_with(node.outputs, [last], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _turn(graph: Any, weight: Any) -> bool:
    """Whether everything that read a weight turned it first, so that it is now declared turned."""
    import onnx_ir

    readers = [node for node, _ in weight.uses()]
    if not readers or not all(_turns(node) for node in readers):
        return False
    for node in readers:
        onnx_ir.convenience.replace_all_uses_with(node.outputs, [weight], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    weight.shape = onnx_ir.Shape(reversed(weight.shape.numpy()))
    return True


def _state_constants(graph: Any) -> None:
    """Have a node give each constant, so that what lies in the data file are the weights and nothing else."""
    import onnx_ir

    constants = list(graph.initializers.values())
    made = [onnx_ir.node("Constant", [], {"value": value.const_value}) for value in constants]
    for node, value in zip(made, constants, strict=True):
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        onnx_ir.convenience.replace_all_uses_with([value], node.outputs)
        name = value.name
        del graph.initializers[name]
        node.outputs[0].name = name
    if made:
        graph.insert_before(graph[0], made)


def _turns(node: Any) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _name(model: Any) -> None:
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        path = _path(node.metadata_props.get(SCOPES))
        place = f"{path}/{node.op_type}"
        counts[place] += 1
        node.name = place if counts[place] == 1 else f"{place}_{counts[place] - 1}"
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None


def _path(scopes: str | None) -> str:
    """`/model/layers.0/mlp` for what torch notes as ['', 'model', 'model.model.layers.0', ..., 'linear']."""
    found = [str(scope) for scope in ast.literal_eval(scopes)[:-1]] if scopes else []
    found = [scope for scope in found if scope.startswith(PREFIX)]
    if not found:
        return ""
    parts: list[str] = []
    for part in found[-1].removeprefix(PREFIX).split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)
