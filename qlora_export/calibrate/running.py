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

from qlora_export import __version__
from qlora_export.calibrate.decoder import open_decoder, require_stored
from qlora_export.calibrate.parameters import Parameters
from qlora_export.calibrate.passing import BlockRun, CalibrationOptions
from qlora_export.calibrate.store import BlockStore, KeptBlock
from qlora_export.calibrate.text import CalibrationTokens
from qlora_export.calibrate.whole_model import tuned
from qlora_export.planning import ArtifactPlan, Made, Plan
from qlora_export.tensors.reading import SourceFiles


def calibrate(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> Made:
    """Decide the layers of an artifact; those outside decoder blocks are left to its format."""
    store = BlockStore(options.out, _digest(plan, item, tokens, options))
    store.require_free()
    decoder = open_decoder(plan)
    count = len(decoder.blocks)
    with SourceFiles() as files, torch.no_grad():
        live = [name for _, name in decoder.parameters_of(decoder.model, "")]
        parameters = Parameters(plan, live, files, item.onto)
        require_stored(decoder, parameters, plan.checkpoint.folder)
        run = BlockRun(plan, item, decoder, parameters, options)
        kept = [store.load(number) for number in range(count)]
        if not all(kept):
            kept = [run.block(number, store) for number in run.start(tokens)]
        if item.recipe.rounding == "tuned":
            subjects = {
                f"{decoder.place}.{number}.{name}": subject
                for number, found in run.subjects.items()
                for name, subject in found.items()
            }
            dtype = plan.training.quantization.compute_dtype
            made = tuned(decoder, parameters, subjects, _together(kept), tokens, options, dtype)
            kept.append(store.save(count, *made))
    together = _together(kept)
    return Made(together.parts, {**_summary(tokens, options), "layers": together.facts})


def _together(blocks: Sequence[KeptBlock | None]) -> KeptBlock:
    """All blocks as one, later ones over earlier ones."""
    parts = {name: tensor for block in blocks if block is not None for name, tensor in block.parts.items()}
    facts: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for name, found in block.facts.items() if block is not None else ():
            facts[name] = {**facts.get(name, {}), **found}
    return KeptBlock(parts, facts)


def _digest(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> str:
    """What decides the blocks: base, adapter, format, the tokens, the method and what computes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in plan.checkpoint.files]
    encoded = sorted(name for name, route in item.routes.items() if route.form is not None and route.form.quantises)
    sources = [plan.checkpoint.headers_sha256, stats, plan.adapter.sha256 if plan.adapter else None]
    training = repr(plan.training.quantization)
    chosen = [item.recipe.format, dict(item.recipe.options), item.onto, encoded]
    computing = [asdict(options.method), options.device, __version__, torch.__version__, transformers.__version__]
    facts = [sources, training, chosen, tokens.sha256, computing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
