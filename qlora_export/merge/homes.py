"""Every adapter tensor finds its home in the base, or is listed as a problem; nothing is dropped in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_export.errors import ExitCode, Problem
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor

PREFIX = "base_model.model."
LORA_NAME = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
TIED_NAME = re.compile(r"(^|\.)(lm_head|embed_tokens|wte|embed_in|embed_out|word_embeddings)$")
OTHER_BASE = "was the adapter trained on another base?"


@dataclass(frozen=True)
class Adaptation:
    """One weight that the adapter changes: `W + scale * B @ A` with A [rank, in] and B [out, rank]."""

    target: str
    a: StoredTensor
    b: StoredTensor
    scale: float


def match_adapter(adapter: Adapter, checkpoint: Checkpoint) -> tuple[dict[str, Adaptation], list[Problem]]:
    """The adaptations by base tensor name, and everything that does not fit."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in adapter.tensors.items():
        found = LORA_NAME.fullmatch(name)
        if found is None and name.endswith(".base_layer.weight"):
            hint = "save the adapter with save_embedding_layers=False, if this layer was not trained itself"
            message = f"{adapter.weights}: tensor {name} is a saved copy of a base weight, which cannot be merged yet"
            problems.append(Problem(ExitCode.REFUSED, message, hint))
        elif found is None:
            problems.append(_problem(adapter, f"tensor {name} has no home", "it is no LoRA A or B of a known module"))
        else:
            sides.setdefault(found["module"], {})[found["side"]] = tensor
    matched = {}
    for module, pair in sides.items():
        if reason := _misfit(adapter, checkpoint, module, pair):
            problems.append(_problem(adapter, *reason))
        else:
            target = f"{module}.weight"
            matched[target] = Adaptation(target, pair["A"], pair["B"], adapter.scale(module))
    if not sides and not problems:
        problems.append(_problem(adapter, "no tensor at all", "save the adapter again"))
    return matched, problems


def _problem(adapter: Adapter, message: str, hint: str) -> Problem:
    return Problem(ExitCode.BAD_INPUT, f"{adapter.weights}: {message}", hint)


def _misfit(
    adapter: Adapter, checkpoint: Checkpoint, module: str, pair: Mapping[str, StoredTensor]
) -> tuple[str, str] | None:
    """Message and hint of why this pair does not fit the base, or None."""
    name = f"{PREFIX}{module}"
    if len(pair) < 2:
        missing = "B" if "A" in pair else "A"
        return f"tensor {name}.lora_{missing}.weight is missing, its partner is there", "save the adapter again"
    target = checkpoint.tensors.get(f"{module}.weight")
    if target is None:
        hint = "the base ties lm_head to its embedding; untie it first" if checkpoint.tied else OTHER_BASE
        return f"tensor {name}.lora_A.weight has no home: the base has no {module}.weight", hint
    a, b, rank = pair["A"].spec, pair["B"].spec, adapter.rank(module)
    wrong = next((spec for spec in (a, b, target.spec) if spec.dtype not in FLOATS), None)
    if wrong is not None:
        return f"tensor {wrong.name} has dtype {wrong.dtype}", "only 16 and 32-bit floats can be merged yet"
    if len(target.spec.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        return f"tensor {name}.lora_A.weight meets {list(target.spec.shape)}, expected matrices", OTHER_BASE
    rows, columns = target.spec.shape
    if a.shape != (rank, columns):
        return f"tensor {a.name} is {list(a.shape)}, the base and r need {[rank, columns]}", OTHER_BASE
    if b.shape != (rows, rank):
        return f"tensor {b.name} is {list(b.shape)}, the base and r need {[rows, rank]}", OTHER_BASE
    if checkpoint.tied and TIED_NAME.search(module):
        return f"tensor {a.name} changes one side of a tied pair, {module}", "untie lm_head and embedding in the base"
    scale = adapter.scale(module)
    if scale == 0 or not math.isfinite(scale):
        return f"the scale of {module} is {scale:g}, so the delta is lost", "see lora_alpha in adapter_config.json"
    return None
