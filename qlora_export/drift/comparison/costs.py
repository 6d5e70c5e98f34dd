"""What an artifact costs in theory, counted on its plan: storage, arithmetic and bytes moved for one token.

    multiplications   2 K N a matrix [N, K], whatever it is stored in: weight-only formats decode, then multiply alike
    adapter beside    2 r (K + N) more
    8-bit activations the same number, in integers or 8-bit floats: what faster units can do
    bytes read        every weight once a token: what bounds decoding one sequence, where arithmetic waits for memory

Attention over the cache, norms and decoding of weights are left out: the first is alike in all, the others grow with
K N, not with tokens. Of routed experts the share that a token takes counts; of an embedding one row, unless the output
head is tied to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from qlora_export.merge.changes import LowRank
from qlora_export.merge.merged_model import Output
from qlora_export.merge.module_names import EMBEDDING, EMBEDDING_LIKE, EXPERT, HEAD
from qlora_export.planning.plan import ArtifactPlan, Plan, Route, route_parts
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import Part

Arithmetic = Literal["float", "int8", "fp8"]
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Cost:
    """Bytes of the linear weights with scales and an adapter beside them, and what a token costs; see the module."""

    weight_bytes: int
    bits_per_weight: float
    flops_per_token: int
    bytes_per_token: int
    arithmetic: Arithmetic


@dataclass(frozen=True)
class Span:
    """The smallest and the largest of some numbers."""

    min: float
    max: float


@dataclass(frozen=True)
class LowRankCost:
    """The adapter's low-rank products against whole matrices of the same shapes.

    `break_even_rank` is K N / (K + N), from which on two factors hold more than the matrix: of the smallest matrix and
    of the largest.
    """

    matrices: int
    full_parameters: int
    factored_parameters: int
    bytes: int
    bits_per_weight: float
    flops_per_token: int
    ranks: Span
    break_even_rank: Span


def linear_modules(plans: Iterable[ArtifactPlan]) -> frozenset[str]:
    """The layers that a quantising format encodes, and whose bits are compared; of the plan that encodes most."""
    found = [
        frozenset(route.output.spec.module for route in item.routes.values() if route.form and route.form.quantises)
        for item in plans
    ]
    return max(found, key=len, default=frozenset())


def cost_of(plan: Plan, item: ArtifactPlan, linear: AbstractSet[str]) -> Cost:
    """Count one artifact; `linear` names the layers whose bits are told."""
    cost = _cost(plan, linear, [(route.output, _stored_bytes(route)) for route in item.routes.values()])
    beside = low_rank_cost(plan, linear) if item.form.keeps_adapter else None
    if beside is not None:
        cost = replace(
            cost,
            weight_bytes=cost.weight_bytes + beside.bytes,
            bits_per_weight=cost.bits_per_weight + beside.bits_per_weight,
            flops_per_token=cost.flops_per_token + beside.flops_per_token,
            bytes_per_token=cost.bytes_per_token + beside.bytes,
        )
    factors = sum(prod(part.shape) for route in item.routes.values() for part in route_parts(route) if part.file)
    return replace(cost, arithmetic=_arithmetic(item), flops_per_token=cost.flops_per_token + 2 * factors)


def fp32_cost(plan: Plan, linear: AbstractSet[str]) -> tuple[int, Cost]:
    """Bytes of all tensors of the merged model in float32, and what it costs."""
    outputs = plan.model.outputs.values()
    cost = _cost(plan, linear, [(output, 4 * output.spec.size) for output in outputs])
    return sum(4 * output.spec.size for output in outputs), cost


def _cost(plan: Plan, linear: AbstractSet[str], stored: Sequence[tuple[Output, int]]) -> Cost:
    """The cost of tensors and the bytes that each is stored in, all multiplied in floats."""
    tied = not any(HEAD.search(output.spec.module) for output, _ in stored)
    weight_bytes, weights, flops, moved = 0, 0, 0, 0.0
    for output, size_bytes in stored:
        if _is_linear(output, linear):
            weight_bytes, weights = weight_bytes + size_bytes, weights + output.spec.size
        share = _share(output, tied, plan.checkpoint.text_config)
        moved += share * size_bytes
        if len(output.spec.shape) > 1 and not output.carried and not _looked_up(output, tied):
            flops += int(2 * output.spec.size * share)
    return Cost(weight_bytes, 8 * weight_bytes / max(weights, 1), flops, int(moved), "float")


def low_rank_cost(plan: Plan, linear: AbstractSet[str]) -> LowRankCost | None:
    """The adapter's cost where it is kept beside the weights; None without low-rank products."""
    products = {
        name: [change for change in output.changes if isinstance(change, LowRank)]
        for name, output in plan.model.changed.items()
    }
    products = {name: found for name, found in products.items() if found}
    if not products:
        return None
    factors: dict[tuple[str, int], StoredTensor] = {}
    for change in (change for found in products.values() for change in found):
        factors |= {(str(tensor.path), tensor.offset): tensor for tensor in change.tensors}
    ranks = [_rank(change) for found in products.values() for change in found]
    shapes = [plan.model.outputs[name].layer_spec.shape[-2:] for name in products]
    breaks = [rows * columns / (rows + columns) for rows, columns in shapes]
    weights = sum(output.spec.size for output in plan.model.outputs.values() if _is_linear(output, linear))
    kept = sum(tensor.bytes for tensor in factors.values())
    factored = sum(tensor.spec.size for tensor in factors.values())
    return LowRankCost(
        matrices=len(products),
        full_parameters=sum(plan.model.outputs[name].spec.size for name in products),
        factored_parameters=factored,
        bytes=kept,
        bits_per_weight=8 * kept / max(weights, 1),
        flops_per_token=2 * factored,
        ranks=Span(min(ranks), max(ranks)),
        break_even_rank=Span(min(breaks), max(breaks)),
    )


def _rank(change: LowRank) -> int:
    experts = change.experts.count if change.experts else 1
    return change.a.spec.shape[0] // experts


def _is_linear(output: Output, linear: AbstractSet[str]) -> bool:
    return output.spec.module in linear and output.spec.name.endswith(".weight")


def _stored_bytes(route: Route) -> int:
    return sum(_part_bytes(part) for part in route_parts(route))


def _part_bytes(part: Part) -> int:
    return prod(part.shape) * ITEM_BYTES[part.dtype]


def _looked_up(output: Output, tied: bool) -> bool:
    """Whether a token takes one row of it and multiplies with none."""
    module = output.spec.module
    return EMBEDDING_LIKE.search(module) is not None and not (tied and EMBEDDING.search(module))


def _share(output: Output, tied: bool, config: Mapping[str, Any]) -> float:
    """How much of a tensor one token reads."""
    if _looked_up(output, tied):
        return 1 / output.spec.rows
    if EXPERT.search(output.spec.name):
        count = next((config[key] for key in EXPERT_COUNTS if isinstance(config.get(key), int)), None)
        taken = config.get("num_experts_per_tok")
        return taken / count if count and isinstance(taken, int) else 1.0
    return 1.0


def _arithmetic(item: ArtifactPlan) -> Arithmetic:
    """What the linear layers multiply in where the hardware can, by what the folder's config states."""
    stated = item.form.quantization_config(()) or {}
    if stated.get("load_in_8bit"):
        return "int8"
    groups = stated.get("config_groups") or {}
    for group in groups.values():
        activations = group.get("input_activations") or {}
        if activations.get("num_bits") == 8:
            return "int8" if activations.get("type") == "int" else "fp8"
    return "float"
