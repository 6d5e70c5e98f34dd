"""What a folder is, from its headers: an adapter, a checkpoint, or an artifact of ours.

With weights, the size of every change of an adapter is measured too, `|delta| / |W|` in the Frobenius norm, row
block by row block on the original weights of its base. Nothing is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.artifact import MANIFEST_NAME, read_artifact
from qlora_export.errors import InputError, Problem, UsageError
from qlora_export.merge.adapter_keys import factor_modules, sort_tensors
from qlora_export.merge.base_rows import BaseRows, Training
from qlora_export.merge.changes import Changes
from qlora_export.merge.matching import Match, match_adapter
from qlora_export.merge.merged_model import Output
from qlora_export.merge.module_names import EMBEDDING, HEAD
from qlora_export.merge.trained_quantization import training_facts
from qlora_export.planning.source_checks import (
    base_problems,
    merge_problems,
    opened,
    read_values,
    training_problems,
    value_problems,
)
from qlora_export.recipe.config import Merge
from qlora_export.sources.adapter import CONFIG_NAME, Adapter, open_adapter, variant_problems
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.sources.locate import identity, local_folder
from qlora_export.sources.sidecar import SIDECAR_NAME
from qlora_export.sources.weights import weight_bytes
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import TORCH_NAMES, TrainingQuantization

Facts = Mapping[str, Any]
VARIANTS = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "lora_bias": "bias of B",
    "modules_to_save": "saved modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "packed parameters",
    "use_bdlora": "block-diagonal",
    "rank_pattern": "rank pattern",
    "alpha_pattern": "alpha pattern",
}


@dataclass(frozen=True)
class Inspection:
    """What was found: `facts` as they are shown, `layers` by name with their numbers, `problems` of a merge."""

    kind: str
    path: Path
    facts: Facts
    layers: Mapping[str, Facts]
    problems: tuple[Problem, ...]

    @property
    def mergeable(self) -> bool | None:
        """Whether a merge would go through; None where there is no adapter, or no base to match it with."""
        if self.problems:
            return False
        return True if "base" in self.facts and self.kind == "adapter" else None


def inspect(path: Path, base: Path | None = None, weights: bool = False) -> Inspection:
    """Inspect a folder; raises InputError or Refused when it cannot be opened, UsageError for flags that do not fit."""
    folder = local_folder(str(path), Path())
    if (folder / CONFIG_NAME).is_file():
        return _inspect_adapter(folder, base, weights)
    if base is not None or weights:
        raise UsageError(f"{path}: is no adapter", "--base and --weights are for adapters")
    if (folder / MANIFEST_NAME).is_file():
        return _inspect_artifact(folder)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise InputError(
            f"{path}: no adapter, no checkpoint and no artifact",
            f"a folder with {CONFIG_NAME}, config.json or {MANIFEST_NAME} can be inspected",
        )
    return _inspect_checkpoint(folder)


def _inspect_adapter(folder: Path, base: Path | None, weights: bool) -> Inspection:
    adapter = open_adapter(folder)
    tensors = sort_tensors(adapter.tensors)
    modules = list(factor_modules(tensors))
    ranks = Counter(adapter.rank(item.module) for item in modules)
    config = adapter.config
    found = [name for key, name in VARIANTS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"biases ({config['bias']})")
    facts = {
        "variant": ", ".join(["LoRA", *found]) if config.get("peft_type", "LORA") == "LORA" else config["peft_type"],
        "task": config.get("task_type"),
        "rank": ", ".join(f"{rank}" if len(ranks) == 1 else f"{rank} x {n}" for rank, n in ranks.most_common()),
        "alpha": config.get("lora_alpha"),
        "targets": _targets([item.module for item in modules]),
        "saved whole": len(tensors.whole),
        "tensors": len(adapter.tensors),
        "bytes": sum(tensor.bytes for tensor in adapter.tensors.values()),
        "sha256": adapter.sha256,
        "trained on": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "training quantisation": _training(adapter.training, len(adapter.training.modules)),
    }
    problems, values = variant_problems(adapter), read_values(adapter)
    layers: dict[str, Facts] = {}
    checkpoint = _base_of(adapter, base, weights)
    if checkpoint is None:
        problems += value_problems(adapter, values, Merge())
    else:
        facts["base"] = identity(checkpoint.folder)
        match = match_adapter(adapter, checkpoint)
        problems += merge_problems(adapter, checkpoint, match, values, Merge())
        known = opened(partial(training_facts, adapter, None), match.names)
        if isinstance(known, Problem):
            problems.append(known)
        else:
            facts["training quantisation"] = _training(known.live, len(known.stored.quantised))
            problems += training_problems(adapter, checkpoint, known)
        if weights and not problems:
            layers = _change_sizes(match)
    return Inspection("adapter", folder, facts, layers, tuple(dict.fromkeys(problems)))


def _base_of(adapter: Adapter, base: Path | None, weights: bool) -> Checkpoint | None:
    """The base that was given, else the folder that the adapter's config names, where it is there."""
    if base is not None:
        return open_checkpoint(local_folder(str(base), Path()))
    named = adapter.config.get("base_model_name_or_path")
    for place in (Path(str(named)), adapter.folder / str(named)) if named else ():
        if (place / "config.json").is_file():
            found = opened(open_checkpoint, place)
            return None if isinstance(found, Problem) else found
    if weights:
        raise UsageError(f"{adapter.folder}: --weights needs the base, {named} is no folder here", "give --base")
    return None


def _targets(modules: list[str]) -> str:
    counts = Counter(module.split(".")[-1] for module in modules)
    return ", ".join(f"{name} x {count}" for name, count in sorted(counts.items()))


def _training(training: TrainingQuantization, modules: int) -> str:
    """How the base was quantised in training, and where that knowledge comes from."""
    known = {
        "sidecar": f"recorded in {SIDECAR_NAME}",
        "base": "as the base is stored",
        "assumed": f"assumed, there is no {SIDECAR_NAME}",
    }
    nested = ", double quantisation" if training.double_quant else ""
    described = (
        f"{training.quant_type} in blocks of {training.block_size}{nested}, loaded in "
        f"{TORCH_NAMES[training.storage_dtype]}, computed in {TORCH_NAMES[training.compute_dtype]}"
    )
    counted = f", {modules} modules" if modules else ""
    return f"{described}{counted}; {known.get(training.provenance, training.provenance)}"


def _change_sizes(match: Match) -> dict[str, Facts]:
    """`|delta| / |W|` of every matrix that the adapter changes."""
    with SourceFiles() as files:
        return {
            name: _change_size(output, files)
            for name, output in match.model.changed.items()
            if len(output.spec.shape) > 1
        }


def _change_size(output: Output, files: SourceFiles) -> Facts:
    rows = BaseRows(output, Training(TrainingQuantization(), frozenset()), files, own=True, trained=False)
    changes = Changes(output.changes, files, rows.spec.columns)
    blocks = rows.blocks()
    if changes.observes:
        for block in blocks:
            changes.observe(rows.original(block.start, len(block)), block.start)
        changes.settle()
    delta, whole = 0.0, 0.0
    for block in blocks:
        before = rows.original(block.start, len(block))
        after = before.copy()
        changes.apply(after, block.start)
        difference = (after - before).astype(np.float64)
        delta += float(difference @ difference)
        whole += float(before.astype(np.float64) @ before)
    return {"shape": list(output.spec.shape), "delta_over_weight": math.sqrt(delta / whole) if whole else None}


def _inspect_checkpoint(folder: Path) -> Inspection:
    checkpoint = open_checkpoint(folder)
    weights = list(checkpoint.weights.values())
    dtypes: Counter[str] = Counter()
    storages: Counter[str] = Counter()
    for weight in weights:
        dtypes[weight.spec.dtype] += weight.spec.size
        storages[weight.storage] += 1
    embeddings = [weight.spec for weight in weights if EMBEDDING.search(weight.spec.module)]
    heads = [weight.spec for weight in weights if HEAD.search(weight.spec.module)]
    facts = {
        "model type": checkpoint.config.get("model_type"),
        "architecture": ", ".join(checkpoint.config.get("architectures") or []),
        "parameters": sum(weight.spec.size for weight in weights),
        "tensors": len(weights),
        "files": len(checkpoint.files),
        "bytes": sum(weight_bytes(weight) for weight in weights),
        "stored as": ", ".join(f"{name} x {count}" for name, count in storages.most_common()),
        "dtypes": ", ".join(f"{name} {count}" for name, count in dtypes.most_common()),
        "vocabulary": embeddings[0].shape[0] if embeddings else None,
        "output head": "its own" if heads else "tied to the embedding, or none",
        "headers sha256": checkpoint.headers_sha256,
    }
    return Inspection("checkpoint", folder, facts, {}, tuple(base_problems(checkpoint)))


def _inspect_artifact(folder: Path) -> Inspection:
    artifact = read_artifact(folder)
    manifest = artifact.manifest
    sources = manifest.get("sources") or {}
    training = manifest.get("training_quantization") or {}
    facts = {
        "format": artifact.format,
        "runtime": manifest.get("runtime"),
        "merged onto": manifest.get("onto"),
        "base": (sources.get("base") or {}).get("id"),
        "adapter": (sources.get("adapter") or {}).get("id"),
        "training quantisation": training.get("provenance"),
        "files": len(manifest["files"]),
        "bytes": artifact.bytes,
        "made by": ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items()),
        "plan digest": manifest["plan_digest"],
        "manifest sha256": artifact.manifest_sha256,
        "notes": "; ".join(manifest.get("assumptions") or []),
    }
    return Inspection("artifact", folder, facts, {}, ())
