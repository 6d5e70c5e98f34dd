"""Settling `merge.onto: auto`: both merge bases are built and measured on a sample of the text, the better is taken.

The evidence is the ledger of a trial run in `onto-trial` below the run folder: the same base, adapter and runtime, one
dense artifact on each merge base, mean KL from the model that was trained. The decision and its numbers are kept in
`onto.json`, so that the next run of the same inputs does not measure again; the trial folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export import catalog
from qlora_export.drift.ledger import Ledger
from qlora_export.engine.trial_folders import ONTO_TRIAL
from qlora_export.errors import UsageError
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.report.templating import write_whole
from qlora_export.sources.text import read_text
from qlora_export.types import Onto

DECISION_NAME = "onto.json"
SAMPLE_TOKENS = 4096
BASES: tuple[Onto, Onto] = ("as-trained", "original")
# Makes and measures the artifacts of a recipe in a folder.
Measure = Callable[[Recipe, Path], Ledger | None]


@dataclass(frozen=True)
class ResolvedMergeBase:
    """A recipe whose merge base is one of two, and the sentence that says why."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def resolve_merge_base(recipe: Recipe, out: Path, measure: Measure) -> ResolvedMergeBase:
    """Settle `auto`; any other recipe is returned as it is. Raises UsageError without an adapter or a text."""
    if recipe.merge.onto != "auto":
        return ResolvedMergeBase(recipe)
    require_evidence(recipe)
    base = make_plan(_on(recipe, "as-trained"), out)
    if base.live_training.provenance == "base" or base.live_training.quant_type == "none":
        return ResolvedMergeBase(_on(recipe, "as-trained"), ("merge.onto auto: there is one base only, as stored",))
    decision = _decided(recipe, base, out, measure)
    chosen: Onto = "original" if decision["chosen"] == "original" else "as-trained"
    numbers = ", ".join(f"{name} {kl:.3g}" for name, kl in decision["mean_kl_nats"].items())
    note = f"merge.onto auto: {chosen}, by mean KL in nats on {decision['tokens']} tokens: {numbers}"
    return ResolvedMergeBase(_on(recipe, chosen), (note,))


def require_evidence(recipe: Recipe) -> None:
    """Raise where `auto` has nothing to measure, before anything is done: UsageError, or InputError for its text."""
    if recipe.merge.onto != "auto":
        return
    if not recipe.adapters or recipe.drift is None:
        raise UsageError(
            "merge.onto is auto, which needs an adapter and a text to measure on",
            "add `drift: {text: FILE}`, or choose as-trained or original",
        )
    read_text(recipe.drift.text, recipe.folder)


def _on(recipe: Recipe, onto: Onto) -> Recipe:
    return recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"onto": onto})})


def _decided(recipe: Recipe, base: Plan, out: Path, measure: Measure) -> dict[str, Any]:
    """The decision that was kept for these inputs, else a new one."""
    trial = _trial(recipe, base)
    text = recipe.path(trial.drift.text if trial.drift else "")
    facts = [trial.digest, base.checkpoint.headers_sha256, base.adapter.sha256 if base.adapter else ""]
    facts.append(hashlib.sha256(text.read_bytes()).hexdigest() if text.is_file() else "")
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = out / DECISION_NAME
    if (kept := _kept(path)).get("inputs") == digest:
        return kept
    ledger = measure(trial, out / ONTO_TRIAL)
    if ledger is None:
        raise UsageError("merge.onto is auto, and nothing was measured", "choose as-trained or original")
    divergences = {entry.artifact.name: entry.drift.mean_kl for entry in ledger.entries}
    decision = {
        "schema": 1,
        "inputs": digest,
        "chosen": min(divergences, key=lambda name: divergences[name]),
        "mean_kl_nats": divergences,
        "tokens": ledger.tokens.count,
        "tokens_sha256": ledger.tokens.sha256,
    }
    write_whole(json.dumps(decision, indent=2) + "\n", path)
    shutil.rmtree(out / ONTO_TRIAL)
    return decision


def _kept(path: Path) -> dict[str, Any]:
    """The decision of an earlier run; empty where there is none that can be read, and it is measured again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(kept, dict) and {"inputs", "chosen", "mean_kl_nats", "tokens"} <= kept.keys()
    return kept if whole and isinstance(kept["mean_kl_nats"], dict) else {}


def _trial(recipe: Recipe, base: Plan) -> Recipe:
    """One dense artifact on each merge base, a sample of the text, no limits and no publication."""
    if recipe.drift is None:
        raise ValueError("a trial measures")
    tokens = min(recipe.drift.tokens or SAMPLE_TOKENS, SAMPLE_TOKENS)
    form = catalog.DENSE_FORMATS[base.checkpoint.dtype]
    artifacts = tuple(ArtifactRecipe(format=form, name=onto, onto=onto) for onto in BASES)
    alone = {"choices": None, "prompts": None, "trace": "never"}
    drift = recipe.drift.model_copy(update={"tokens": tokens, **alone})
    changes = {"artifacts": artifacts, "drift": drift, "publish": None}
    return _on(recipe, "as-trained").model_copy(update=changes)
