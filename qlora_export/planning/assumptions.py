"""What a plan takes for granted or does unasked, in sentences: no silent choice."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_export.merge.combine import Weighted
from qlora_export.merge.companion_files import differing_tokenizer_files
from qlora_export.planning.inputs import Inputs
from qlora_export.recipe.config import Merge, Recipe
from qlora_export.sources.locate import hub_id, identity
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import TORCH_NAMES, TrainingQuantization


def assumptions_of(inputs: Inputs) -> tuple[str, ...]:
    """Every choice that nobody stated, and everything done beyond adding deltas."""
    recipe, checkpoint, adapter = inputs.recipe, inputs.checkpoint, inputs.adapter
    model, facts, names = inputs.model, inputs.facts, inputs.names
    found = [*_reasons(recipe), *_auto(recipe), *_pinned(inputs), *model.notes]
    if adapter is None:
        found.append("no adapter: the base is released as it is, and is its own reference")
    else:
        found += _training(recipe, facts.live)
        if differing := differing_tokenizer_files(checkpoint, adapter):
            found.append(f"taken from the adapter, where they differ from the base's: {', '.join(differing)}")
    if not model.settings.keys() & {"tie_word_embeddings"} and names.tied and checkpoint.states_tying is not False:
        found.append("the output head is tied to the embedding, and stays so")
    if carried := sorted(name for name, output in model.outputs.items() if output.carried):
        found.append(
            f"{len(carried)} tensors that the model does not have are carried along, the first is {carried[0]}"
        )
    found += [f"{name} is left out: {reason}" for name, reason in model.dropped.items()]
    if "auto_map" in checkpoint.config:
        found.append(
            "auto_map is left out of config.json: no remote code is shipped, transformers has the model itself"
        )
    found += _dense_experts(inputs)
    return tuple(found)


def combination_notes(combined: Sequence[Weighted], merge: Merge) -> tuple[str, ...]:
    """How several adapters became one."""
    if not combined:
        return ()
    described = ", ".join(f"{identity(item.adapter.folder)} x {item.weight:g}" for item in combined)
    how: str = merge.combine
    if how not in ("sum", "linear", "svd"):
        how += f" with density {merge.density:g}"
    return (f"adapters combined by {how}: {described}",)


def _pinned(inputs: Inputs) -> list[str]:
    """Which commit a branch of the Hub stood at."""
    named = [(inputs.recipe.base, inputs.checkpoint.folder)]
    if len(inputs.recipe.adapters) == 1 and inputs.adapter is not None:
        named.append((inputs.recipe.adapters[0].path, inputs.adapter.folder))
    found = [(text, identity(folder)) for text, folder in named if hub_id(text, inputs.recipe.folder) is not None]
    return [f"{text} stood at {pinned}" for text, pinned in found if text != pinned]


def _reasons(recipe: Recipe) -> list[str]:
    return [f"{item.name}: {item.why}" for item in recipe.artifacts if item.why]


def _auto(recipe: Recipe) -> list[str]:
    if recipe.merge.onto != "auto":
        return []
    return ["merge.onto auto is settled when it is built, by measuring both; planned as as-trained"]


def _training(recipe: Recipe, training: TrainingQuantization) -> list[str]:
    described = (
        f"{training.quant_type} in blocks of {training.block_size}"
        f"{' with double quantisation' if training.double_quant else ''}, "
        f"loaded in {TORCH_NAMES[training.storage_dtype]}, computed in {TORCH_NAMES[training.compute_dtype]}"
    )
    if training.quant_type in ("none", "int8"):
        described = {"none": "16-bit weights", "int8": "int8 as stored"}[training.quant_type]
    unused = training.provenance in ("sidecar", "base") and recipe.training_quantization is not None
    found = [f"the stated training quantisation is not used: the {training.provenance} knows"] if unused else []
    if training.provenance == "assumed":
        found.append(f"no sidecar: assumed {described}, every linear layer quantised but the output head")
    elif training.provenance == "base":
        found.append(f"no sidecar: taken from the base, which is stored in {described}")
    elif training.provenance == "stated":
        found.append(f"no sidecar: stated {described}")
    elif training.base_sha256 is None:
        found.append("the sidecar does not say which base it was: only the hashes of its weights are checked")
    return found


def _dense_experts(inputs: Inputs) -> list[str]:
    facts, forms = inputs.facts, inputs.formats
    quantising = [item.recipe.name for item in forms if item.form.quantises and item.form.consumes == "merged"]
    if not facts.experts or not quantising:
        return []
    weights = [weight for weight in inputs.checkpoint.weights.values() if weight.spec.module in facts.experts]
    size = sum(weight.spec.size * ITEM_BYTES[facts.live.storage_dtype] for weight in weights)
    dense = f"{', '.join(quantising)}: {len(weights)} expert weights stay dense ({size / 1e6:.2f} MB)"
    return [
        f"{dense}, since transformers does not load experts in 4 or 8 bits; bf16 serves a mixture of experts as well"
    ]
