"""Whether the model that was trained can run on this machine, which every number of the ledger is compared with."""

from __future__ import annotations

from qlora_export.errors import Refused
from qlora_export.planning.plan import Plan

TRANSFORMERS_BLOCK = 64


def require_reference(plan: Plan) -> None:
    """Raise Refused when there is no reference for this plan: before anything is built for a measurement."""
    if plan.adapter is None:
        return
    training = plan.live_training
    kept = [item.name for item in plan.artifacts if item.form.keeps_adapter]
    storages = {weight.storage for weight in plan.checkpoint.weights.values()}
    if plan.adapter.classifier and (kept or storages != {"plain"}):
        whose = f"artifact {kept[0]}" if kept else str(plan.checkpoint.folder)
        raise Refused(
            f"{whose}: transformers cannot load quantised weights beside a classifier's head that they lack",
            "use build, or leave the artifact out" if kept else "use build, or give the 16-bit base",
        )
    if "fp8" in storages:
        raise Refused(
            f"{plan.checkpoint.folder}: transformers has no FP8 kernels for a CPU, so the reference cannot run",
            "use build, or give the 16-bit base",
        )
    quantised = storages == {"plain"} and training.quant_type != "none"
    if quantised and training.block_size != TRANSFORMERS_BLOCK:
        raise Refused(
            f"{plan.adapter.folder}: trained on a base in blocks of {training.block_size}; transformers quantises "
            f"in blocks of {TRANSFORMERS_BLOCK}, so the reference cannot run",
            "use build, which reproduces any block size",
        )
