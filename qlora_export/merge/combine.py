"""Several adapters made into one, as a folder that peft loads like any other.

    sum               s_1 w_1 B_1 A_1 + s_2 w_2 B_2 A_2 + ...: the factors side by side, exact, ranks add up
    linear            the factors themselves weighted and summed (equal ranks)
    ties, dare_*, magnitude_prune     the same on pruned factors
    svd, *_svd        the weighted deltas, pruned where the name says so, cut to `svd_rank` by singular values

Everything but `sum` is what `add_weighted_adapter` of peft 0.21 computes, by its own `peft.utils.merge_utils`; the
random pruning of DARE is seeded by module, so that bytes do not change from run to run. TIES is arXiv 2306.01708, DARE
arXiv 2311.03099. Cost: the factors in memory; with `svd` the deltas too, one module at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export._version import __version__
from qlora_export.errors import ExitCode, ExportError, Problem
from qlora_export.merge.adapter_keys import PREFIX, ModuleTensors, sort_tensors
from qlora_export.quant.floats import Float32
from qlora_export.recipe.config import Merge
from qlora_export.sources.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, open_adapter
from qlora_export.sources.sidecar import SIDECAR_NAME
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import write_tensors

COMBINED_NAME = "combined-adapter-"
WHOLE_NAME = "combined.sha256"
KINDS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
UNMIXED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_bdlora")


@dataclass(frozen=True)
class Weighted:
    """An adapter and its weight in the combination."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Factors:
    """A [rank, in] and B [out, rank] of one adapter in one module, their scale, and the adapter's weight."""

    a: Float32
    b: Float32
    scale: float
    weight: float

    @property
    def factor(self) -> float:
        """What the product is multiplied with."""
        return self.scale * self.weight


def combination_problems(items: Sequence[Weighted], merge: Merge) -> list[Problem]:
    """Why these adapters cannot be combined."""
    problems = []
    for item in items:
        config = item.adapter.config
        for key in UNMIXED:
            if config.get(key):
                message = f"{item.adapter.folder / CONFIG_NAME}: {key} = {config[key]!r}"
                hint = "only the low-rank deltas of several adapters can be combined"
                problems.append(Problem(ExitCode.REFUSED, message, hint))
        if config.get("bias", "none") != "none" or sort_tensors(item.adapter.tensors).whole:
            message = f"{item.adapter.weights}: holds more than factors (biases or whole modules)"
            problems.append(Problem(ExitCode.REFUSED, message, "only low-rank deltas can be combined"))
    recorded = [item.adapter for item in items if item.adapter.training.recorded]
    for other in recorded[1:]:
        if other.training.modules != recorded[0].training.modules:
            message = f"{other.folder}: was trained on another quantised base than {recorded[0].folder}"
            problems.append(Problem(ExitCode.BAD_INPUT, message, "combine adapters of one base"))
    if len({item.adapter.classifier for item in items}) > 1:
        problems.append(Problem(ExitCode.BAD_INPUT, "a classifier cannot be combined with a language model", ""))
    for item in items:
        scales = [item.adapter.scale(module.module) for module in sort_tensors(item.adapter.tensors).modules]
        if any(np.float32(scale * item.weight) == 0 for scale in scales):
            message = f"{item.adapter.folder}: its weight {item.weight:g} leaves nothing of its deltas"
            problems.append(Problem(ExitCode.USAGE, message, "give a weight that is not lost in float32"))
    if merge.combine in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        problems += _rank_problems(items, merge)
    return problems


def _rank_problems(items: Sequence[Weighted], merge: Merge) -> list[Problem]:
    """The first module in which the ranks differ."""
    ranks: dict[str, dict[str, int]] = {}
    for item in items:
        for module in sort_tensors(item.adapter.tensors).modules:
            for kind in KINDS.keys() & module.parts.keys():
                ranks.setdefault(module.module, {})[str(item.adapter.folder)] = module.parts[kind].spec.shape[0]
    for name, found in ranks.items():
        if len(set(found.values())) > 1:
            described = " and ".join(f"{rank} in {folder}" for folder, rank in found.items())
            message = f"the ranks of {name} differ, {described}: {merge.combine} needs equal ones"
            return [Problem(ExitCode.USAGE, message, f"use combine: sum, or {merge.combine}_svd where there is one")]
    return []


def combine(items: Sequence[Weighted], merge: Merge, out: Path) -> Adapter:
    """The combined adapter, written below `out` unless it is there; the same adapters give the same bytes."""
    facts = {
        "version": __version__,
        "merge": merge.model_dump(exclude={"onto", "zero_delta"}),
        "adapters": [[item.adapter.sha256, repr(item.adapter.training), item.weight] for item in items],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = out / f"{COMBINED_NAME}{digest[:12]}"
    if (whole := _whole(folder)) is not None:
        return whole
    partial = folder.with_name(f"{folder.name}.partial")
    for place in (partial, folder):
        shutil.rmtree(place, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(items, merge, partial)
    (partial / WHOLE_NAME).write_text(open_adapter(partial).sha256 + "\n", encoding="utf-8")
    partial.rename(folder)
    return open_adapter(folder)


def _whole(folder: Path) -> Adapter | None:
    """The combined adapter that is there with the bytes that were written, hashed; None where there is none."""
    recorded = folder / WHOLE_NAME
    if not recorded.is_file():
        return None
    try:
        adapter = open_adapter(folder)
    except ExportError:
        return None
    return adapter if adapter.sha256 == recorded.read_text(encoding="utf-8").strip() else None


def _write(items: Sequence[Weighted], merge: Merge, folder: Path) -> None:
    tensors: dict[str, Float32] = {}
    ranks: dict[str, int] = {}
    with SourceFiles() as files:
        for module, kind, factors in _modules(items, files):
            a, b = _combined(factors, merge, module, kind)
            ranks[module] = a.shape[0]
            tensors[f"{PREFIX}{module}.{kind}"] = a
            tensors[f"{PREFIX}{module}.{KINDS[kind]}"] = b
    write_tensors(folder / WEIGHTS_NAME, tensors)
    config = {
        **items[0].adapter.config,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": None,
        "exclude_modules": None,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    recorded = next((item.adapter for item in items if item.adapter.training.recorded), None)
    if recorded is not None:
        shutil.copyfile(recorded.folder / SIDECAR_NAME, folder / SIDECAR_NAME)


def _modules(items: Sequence[Weighted], files: SourceFiles) -> list[tuple[str, str, list[Factors]]]:
    """Every module that any adapter changes, with the factors of those that do."""
    found: dict[tuple[str, str], list[Factors]] = {}
    for item in items:
        for module in sort_tensors(item.adapter.tensors).modules:
            for kind in KINDS:
                if kind in module.parts:
                    factors = _factors(item, module, kind, files)
                    found.setdefault((module.module, kind), []).append(factors)
    return [(module, kind, factors) for (module, kind), factors in sorted(found.items())]


def _factors(item: Weighted, module: ModuleTensors, kind: str, files: SourceFiles) -> Factors:
    a, b = files.values(module.parts[kind]), files.values(module.parts[KINDS[kind]])
    return Factors(a, b, item.adapter.scale(module.module), item.weight)


def _combined(factors: Sequence[Factors], merge: Merge, module: str, kind: str) -> tuple[Float32, Float32]:
    """A and B whose product, with scale 1, is the combined delta."""
    if merge.combine == "sum":
        scaled = [item.b * np.float32(item.factor) for item in factors]
        return np.concatenate([item.a for item in factors]), np.concatenate(scaled, axis=1)
    import torch

    seed = hashlib.sha256(f"{merge.seed}:{module}".encode()).digest()[:8]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(seed, "little"))
        if merge.combine.endswith("svd"):
            return _by_singular_values(factors, merge)
        signs = [1 if item.factor >= 0 else -1 for item in factors]
        roots = [abs(item.factor) ** 0.5 for item in factors]
        a = _pruned([item.a for item in factors], [root * sign for root, sign in zip(roots, signs, strict=True)], merge)
        return a, _pruned([item.b for item in factors], roots, merge)


def _by_singular_values(factors: Sequence[Factors], merge: Merge) -> tuple[Float32, Float32]:
    import torch

    deltas = [(item.b @ item.a) * np.float32(item.scale) for item in factors]
    whole = torch.from_numpy(_pruned(deltas, [item.weight for item in factors], merge))
    rank = min(merge.svd_rank or max(item.a.shape[0] for item in factors), *whole.shape)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return right[:rank].contiguous().numpy(), (left[:, :rank] * values[:rank]).contiguous().numpy()


def _pruned(tensors: Sequence[Float32], weights: Sequence[float], merge: Merge) -> Float32:
    """The weighted combination by peft's own functions."""
    import torch
    from peft.utils import merge_utils

    given = [torch.from_numpy(tensor) for tensor in tensors]
    scales = torch.tensor(list(weights))
    method = merge.combine.removesuffix("_svd")
    settings: Mapping[str, Any] = {}
    if method in ("svd", "linear"):
        combined = merge_utils.task_arithmetic(given, scales)
    else:
        if method.endswith("ties"):
            settings = {"majority_sign_method": merge.majority_sign}
        combined = getattr(merge_utils, method)(given, scales, merge.density, **settings)
    result: Float32 = combined.float().contiguous().numpy()
    return result
