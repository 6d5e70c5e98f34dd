"""What a build takes at its peak, known from the plan: it does not grow with the model, only with its largest tensors.

    interpreter and libraries
    + threads * (a row block, its raw bytes and what it becomes in every artifact)
    + the tensors that are open at once, one more than there are workers: absmax of whole tensors, factors in float32,
      and what a format holds back until a tensor is whole

A weight that is stored [in, out] moves as a whole. The estimate is compared with the kernel's number in the tests.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from qlora_export.errors import EnvironmentProblem
from qlora_export.formats.base import HoldingFormat
from qlora_export.merge.base_rows import BLOCK_WEIGHTS
from qlora_export.planning.plan import Plan, Route
from qlora_export.sources.weights import Weight

# An absmax and the scale it decodes to, where training quantised; an absmax and its codes, where an artifact does.
TRAINED_STATE_BYTES = 8
ENCODED_STATE_BYTES = 5


def peak_memory_bytes(plan: Plan, workers: int) -> int:
    """Estimate of the resident memory of a build with so many workers."""
    widest = max((weight.spec.columns for weight in plan.sources), default=0)
    turned = [output.spec.size for output in plan.model.outputs.values() if output.transposed]
    whole = [_whole_rows(route) for artifact in plan.artifacts for route in artifact.routes.values()]
    block = max(BLOCK_WEIGHTS, widest * plan.training.quantization.block_size, *turned, *whole)
    states = heapq.nlargest(workers + 1, _states(plan))
    threads = workers + spare_threads(workers)
    return plan.library_bytes + threads * block * 4 * (4 + len(plan.artifacts)) + sum(states)


def spare_threads(workers: int) -> int:
    """Threads beside the workers, for when these wait for the disk."""
    return max(1, workers // 2)


def workers_within(plan: Plan, workers: int, limit_bytes: int | None) -> int:
    """The most workers, up to so many, that keep a build within a limit; raises EnvironmentProblem for none."""
    if limit_bytes is None:
        return workers
    fitting = [count for count in range(1, workers + 1) if peak_memory_bytes(plan, count) <= limit_bytes]
    if not fitting:
        needed = peak_memory_bytes(plan, 1)
        raise EnvironmentProblem(
            f"the build takes about {needed / 1e6:.0f} MB of memory with one worker, "
            f"--memory-limit is {limit_bytes / 1e6:.0f} MB",
            "give it more, or make fewer artifacts at once",
        )
    return fitting[-1]


def _states(plan: Plan) -> Iterator[int]:
    """What each source keeps in memory while it is open."""
    routes: dict[int, list[Route]] = {}
    sources: dict[int, Weight] = {}
    for artifact in plan.artifacts:
        for route in artifact.routes.values():
            sources[id(route.output.source)] = route.output.source
            routes.setdefault(id(route.output.source), []).append(route)
    block_size = plan.training.quantization.block_size
    for key, source in sources.items():
        blocks = -(-source.spec.size // block_size)
        encoded = sum(route.form is not None and route.form.quantises for route in routes[key])
        trained = any(route.output.layer_spec.module in plan.training.quantised for route in routes[key])
        held = sum(_held_bytes(route) for route in routes[key])
        factors = {change for route in routes[key] for change in route.output.changes}
        yield (
            blocks * (TRAINED_STATE_BYTES * trained + ENCODED_STATE_BYTES * encoded)
            + held
            + 6 * sum(tensor.spec.size for change in factors for tensor in change.tensors)
        )


def _held_bytes(route: Route) -> int:
    return route.form.held_bytes(route.spec) if isinstance(route.form, HoldingFormat) else 0


def _whole_rows(route: Route) -> int:
    """Weights in the fewest rows that a format can encode."""
    return route.form.row_multiple(route.spec) * route.spec.columns if route.form else 0
