"""What tuning takes at its peak, known from the plan and the calibration text, and whether that is there.

    the trained model in float32                           4 bytes a weight
    what is rounded, once more: numbers of levels, levels, weights with what led to them    16 bytes a weight
    scales, their gradients and Adam's moments             16 bytes a scale
    a batch: what layers keep for the gradients            8 bytes a token for each input and output of a layer
             logits of both models on the way to the KL    24 bytes a token for each entry of the vocabulary

Gradients of weights live for one layer at a time. Compared with what the kernel counts in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_export.blocks.activations import batches_of
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.errors import EnvironmentProblem
from qlora_export.formats.base import GridFormat
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.quant.device.available_memory import available_bytes

TRAINED_BYTES, ROUNDED_BYTES, SCALE_BYTES = 4, 16, 16
ACTIVATION_BYTES, LOGIT_BYTES = 8, 24


def require_memory(
    plan: Plan, items: Iterable[ArtifactPlan], tokens: CalibrationTokens, options: CalibrationOptions
) -> None:
    """Raise EnvironmentProblem where the device has less memory than tuning one of the artifacts takes."""
    available = available_bytes(options.device)
    for item in items:
        needed = tuning_bytes(plan, item, tokens.windows, options.tuning.batch_tokens)
        if item.rounding.chosen == "tuned" and available is not None and needed > available:
            place = "this machine" if options.device == "cpu" else options.device
            raise EnvironmentProblem(
                f"artifact {item.name}: tuning takes about {needed / 1e9:.1f} GB of memory, the whole model in float32 "
                f"with its gradients and batches of {options.tuning.batch_tokens} tokens; "
                f"{place} has {available / 1e9:.1f} GB available",
                "`rounding: calibrated` holds one decoder block at a time; or tune on a device that has as much",
            )


def tuning_bytes(plan: Plan, item: ArtifactPlan, windows: Sequence[Sequence[int]], batch_tokens: int) -> int:
    """Estimate of the memory that tuning an artifact adds to the process."""
    trained = sum(output.spec.size for output in plan.model.outputs.values())
    tokens = max((batch.tokens.numel() for batch in batches_of(windows, batch_tokens)), default=0)
    vocabulary = plan.model.settings.get("vocab_size", plan.checkpoint.text_config.get("vocab_size"))
    needed = TRAINED_BYTES * trained + LOGIT_BYTES * tokens * int(vocabulary or 0)
    for route in item.routes.values():
        grid = route.form.grid(route.spec) if isinstance(route.form, GridFormat) else None
        if grid is not None:
            scales = -(-route.spec.rows // grid.height) * (route.spec.columns // grid.group)
            needed += ROUNDED_BYTES * route.spec.size + SCALE_BYTES * scales
            needed += ACTIVATION_BYTES * tokens * (route.spec.rows + route.spec.columns)
    return needed
