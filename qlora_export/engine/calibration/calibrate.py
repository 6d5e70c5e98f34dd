"""Calibrated rounding of a whole model, one decoder block after the other; tuned, with a last pass over all of it.

Two models run side by side: the trained one, and one whose blocks so far hold what will be shipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from qlora_export._version import __version__
from qlora_export.blocks.decoder import open_decoder, require_stored
from qlora_export.blocks.live_parameters import Parameters
from qlora_export.engine.calibration.block_pass import BlockRun, CalibrationOptions
from qlora_export.engine.calibration.store import BlockStore, KeptBlock
from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.engine.calibration.tune_model import tuned
from qlora_export.formats.base import GridFormat
from qlora_export.planning.plan import ArtifactPlan, Made, Plan, route_parts
from qlora_export.tensors.reading import SourceFiles


def calibrate(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> Made:
    """Decide the layers of an artifact; those outside decoder blocks are left to its format."""
    facts = _deciding(plan, item, tokens, options)
    store = BlockStore(options.out, _digest(facts))
    store.require_free()
    decoder = open_decoder(plan)
    with SourceFiles() as files, torch.no_grad():
        parameters = Parameters(plan, decoder.stored_names, files, item.onto)
        require_stored(decoder, parameters, plan.checkpoint.folder)
        run = BlockRun(plan, item, decoder, parameters, options)
        kept = [store.load(number) for number in range(len(decoder.blocks))]
        if not all(kept):
            kept = [run.block(number, store) for number in run.start(tokens)]
        together = _together(kept)
        if item.recipe.rounding == "tuned":
            moved = BlockStore(options.out, _digest([*facts, asdict(options.tuning)]))
            moved.require_free()
            whole = moved.load(0)
            if whole is None:
                dtype = plan.training.quantization.compute_dtype
                whole = moved.save(0, *tuned(decoder, parameters, run.subjects, together, tokens, options, dtype))
            together = _together([together, whole])
    return Made(together.parts, {**_summary(tokens, options), "layers": together.facts})


def _together(blocks: Sequence[KeptBlock | None]) -> KeptBlock:
    """All blocks as one, later ones over earlier ones."""
    parts = {name: tensor for block in blocks if block is not None for name, tensor in block.parts.items()}
    facts: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for name, found in block.facts.items() if block is not None else ():
            facts[name] = {**facts.get(name, {}), **found}
    return KeptBlock(parts, facts)


def _deciding(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> list[Any]:
    """What decides the blocks: base, adapter, the format of every layer, the tokens, the method and what computes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in plan.checkpoint.files]
    sources = [plan.checkpoint.headers_sha256, stats, plan.adapter.sha256 if plan.adapter else None]
    forms = {
        name: repr((route.form.grid(route.spec), route_parts(route)))
        for name, route in item.routes.items()
        if isinstance(route.form, GridFormat)
    }
    training = repr(plan.training.quantization)
    computing = [asdict(options.method), options.device, __version__, torch.__version__, transformers.__version__]
    return [sources, training, item.onto, forms, tokens.sha256, computing]


def _digest(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _summary(tokens: CalibrationTokens, options: CalibrationOptions) -> dict[str, Any]:
    return {
        "sequences": tokens.sequences,
        "tokens": tokens.tokens,
        "tokens_sha256": tokens.sha256,
        "notes": list(tokens.notes),
        "method": {**asdict(options.method), "tuning_steps": options.tuning.steps},
        "device": options.device,
        "torch": torch.__version__,
    }
