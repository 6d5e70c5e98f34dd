"""The order of things: plan, build, export, check, gate, publish. Only this file knows it.

Every function takes values and returns values; printing is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_export import engine
from qlora_export.drift.gate import recall
from qlora_export.drift.ledger import Ledger
from qlora_export.drift.reference import require_reference
from qlora_export.drift.results import Verified
from qlora_export.drift.tokens import TokenSet
from qlora_export.engine.build import locked
from qlora_export.errors import ExportError, GateFailed, UsageError
from qlora_export.pipeline.auto_format import resolve_auto_formats
from qlora_export.pipeline.auto_merge_base import require_evidence, resolve_merge_base
from qlora_export.pipeline.calibrate import (
    calibrated,
    calibration_options,
    remove_decided_layers,
    to_calibrate,
    tokens_of,
)
from qlora_export.pipeline.lock import require_pinned, require_pinned_bytes
from qlora_export.pipeline.measure import Evaluation, ledger_of, planned_candidate, texts_of
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.publish.base import Account, Publisher
from qlora_export.publish.card.licence import licence_of
from qlora_export.publish.prove import prove
from qlora_export.publish.registry import load_publisher
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.report.data import REPORT_NAME, report, write_report
from qlora_export.report.recorded import read_report, recorded_entry, recorded_sample
from qlora_export.report.run import Receipt, Run
from qlora_export.sources.locate import hub_id_of_base


def plan(recipe: Recipe, options: RunOptions) -> Run:
    """Plan only; where the merge base is `auto`, as if it were as-trained."""
    require_evidence(recipe)
    return Run(make_plan(resolve_auto_formats(recipe, options.out), options.out))


def build(recipe: Recipe, options: RunOptions) -> Run:
    """Plan and build."""
    return _build(recipe, options, lambda plan: None)


def _trial(options: RunOptions, recipe: Recipe, out: Path) -> Ledger | None:
    return check(recipe, replace(options, out=out)).ledger


def _build(recipe: Recipe, options: RunOptions, require: Callable[[Plan], None]) -> Run:
    """Settle the merge base, plan, make sure of what is needed later, and build."""
    settled = resolve_merge_base(resolve_auto_formats(recipe, options.out), options.out, partial(_trial, options))
    recipe = settled.recipe
    plan = make_plan(recipe, options.out, settled.notes)
    if options.pinned is not None:
        require_pinned(plan, options.pinned)
    require(plan)
    waiting = to_calibrate(plan, options.out)
    if waiting:
        plan = _calibrated(plan, waiting, options)
    with options.track("build") as progress:
        limits = engine.BuildOptions(
            options.workers,
            progress=progress,
            memory_limit_bytes=options.memory_limit_bytes,
            engine=options.engine,
            accelerator=options.accelerator,
        )
        built = engine.build(plan, options.out, limits)
    remove_decided_layers(plan, options.out)
    made = {artifact.name: artifact for artifact in built}
    for item in plan.exports:
        with options.track(f"export {item.name}"):
            made[item.name] = engine.export(plan, item, made.get(item.source_name), options.out)
    if options.pinned is not None:
        require_pinned_bytes(built, options.pinned)
    return Run(plan, tuple(made[item.name] for item in recipe.artifacts))


def _calibrated(plan: Plan, items: Sequence[ArtifactPlan], options: RunOptions) -> Plan:
    """Decide what is rounded by calibration, alone in the run folder."""
    model = trained_model(plan)
    tokens = tokens_of(plan.recipe, model.tokenizer())
    model.require_row(max(max(window) for window in tokens.windows))
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        chosen = calibration_options(plan.recipe, options.out, options.device)
        return calibrated(plan, items, tokens, chosen, options.track)


def check(recipe: Recipe, options: RunOptions) -> Run:
    """Plan, build what is missing, and measure every artifact against the model that was trained."""
    return _check(recipe, options, require_reference)


def _check(recipe: Recipe, options: RunOptions, require: Callable[[Plan], None]) -> Run:
    texts = texts_of(recipe)

    def measurable(plan: Plan) -> None:
        model = trained_model(plan)
        texts.require_measurable(model.protocol(recipe.drift))
        if texts.asked.questions or texts.asked.prompts:
            model.probes(texts.asked, model.tokenizer())
        require(plan)

    run = _build(recipe, options, measurable)
    model = trained_model(run.plan)
    tokenizer = model.tokenizer(run.artifacts)
    tokens = model.tokens(texts.drift, tokenizer, run.plan.recipe.drift)
    asked = Evaluation(tokens, model.probes(texts.asked, tokenizer), tokenizer.decode)
    pairs = zip(run.artifacts, run.plan.recipe.artifacts, strict=True)
    candidates = [planned_candidate(run.plan, *pair, options.device) for pair in pairs]
    return replace(run, ledger=ledger_of(model, candidates, asked, run.plan.recipe, options))


def release(recipe: Recipe, options: RunOptions) -> Run:
    """Check, then publish what passed; nothing at all when an artifact failed that may not be withheld."""
    recipe = resolve_auto_formats(recipe, options.out)
    publisher = _ready_publisher(recipe, options)

    def require(plan: Plan) -> None:
        require_reference(plan)
        publisher.require_account(_account(plan, {}))

    run = _check(recipe, options, require)
    write_report(run, options.out)
    entries = run.ledger.entries if run.ledger else ()
    if any(not entry.as_expected and not entry.withheld for entry in entries):
        return run
    chosen = [entry.verified for entry in entries if entry.verified is not None and entry.as_expected]
    try:
        return _publish(run, chosen, report(run), publisher, options)
    except ExportError as error:
        write_report(replace(run, failure=error.exit_code), options.out)
        raise


def publish(recipe: Recipe, options: RunOptions) -> Run:
    """Publish what an earlier check of this recipe measured and passed; builds and measures nothing."""
    recipe = resolve_auto_formats(recipe, options.out)
    publisher = _ready_publisher(recipe, options)
    recorded = read_report(options.out / REPORT_NAME)
    settled = resolve_merge_base(recipe, options.out, partial(_trial, options))
    plan = make_plan(settled.recipe, options.out, settled.notes)
    publisher.require_account(_account(plan, recorded))
    artifacts = tuple(engine.finished(plan, options.out))
    chosen = []
    for item, artifact in zip(plan.recipe.artifacts, artifacts, strict=True):
        entry = recorded_entry(recorded, artifact.name) or {}
        if not _is_left_out(item, entry):
            chosen.append(recall(artifact, entry))
    return _publish(Run(plan, artifacts), chosen, recorded, publisher, options)


def _is_left_out(item: ArtifactRecipe, entry: Mapping[str, Any]) -> bool:
    """Whether an artifact failed as expected or is withheld; raises GateFailed when it should have failed."""
    outcome = entry.get("verdict")
    if item.expect == "fail" and outcome == "pass":
        raise GateFailed(f"{item.name}: passed, and the recipe expects it to fail", "look at report.md")
    return outcome in ("fail", "inconclusive") and (item.expect == outcome or item.on_failure == "withhold")


def _ready_publisher(recipe: Recipe, options: RunOptions) -> Publisher:
    if recipe.publish is None:
        raise UsageError("the recipe has no publish.to", "add `publish: {to: folder:PATH}`, or use check")
    publisher = load_publisher(recipe.publish.to)(recipe, options.out, options.publisher_environment)
    publisher.require_ready([recipe.path(text) for text in recipe.sources])
    return publisher


def _account(plan: Plan, recorded: Mapping[str, Any]) -> Account:
    """What a publication tells beside the artifacts."""
    return Account(
        recorded, hub_id_of_base(plan.recipe.base_id, plan.checkpoint.folder), licence_of(plan.checkpoint.folder)
    )


def _publish(
    run: Run, chosen: Sequence[Verified], recorded: Mapping[str, Any], publisher: Publisher, options: RunOptions
) -> Run:
    """Publish, prove what consumers get, and only then give it its version; one run at a time in a run folder."""
    with locked(options.out):
        with options.track("publish"):
            receipts = publisher.publish(chosen, _account(run.plan, recorded))
        if run.plan.recipe.publish is not None and run.plan.recipe.publish.prove:
            receipts = _proven(run, receipts, recorded, publisher, options)
        publisher.conclude(receipts)
    return replace(run, receipts=tuple(receipts))


def _tokens(run: Run) -> TokenSet | None:
    """What an earlier run measured on; None where the recipe measures nothing."""
    recipe, model = run.plan.recipe, trained_model(run.plan)
    if recipe.drift is None:
        return None
    return model.tokens(texts_of(recipe, probes=False).drift, model.tokenizer(run.artifacts), recipe.drift)


def _proven(
    run: Run, receipts: Sequence[Receipt], recorded: Mapping[str, Any], publisher: Publisher, options: RunOptions
) -> list[Receipt]:
    """The receipts with the proof of each: fetched, compared, opened, and its sample repeated."""
    tokens = run.ledger.tokens if run.ledger is not None else _tokens(run)
    proven = []
    for receipt in receipts:
        sample = recorded_sample(recorded, receipt.artifact)
        with options.track(f"prove {receipt.artifact}"), publisher.fetch(receipt) as fetched:
            proven.append(replace(receipt, proof=prove(receipt, fetched, run.plan, sample, tokens)))
    return proven
