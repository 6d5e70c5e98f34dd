"""The order of things: plan, build, export, check, gate, publish. Only this file knows it.

Every function takes values and returns values; printing is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qlora_export import catalog, engine
from qlora_export.contracts import Artifact, Progress, Session, Track
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.ledger import Ledger, References, enter, make_ledger
from qlora_export.drift.measure import (
    ReferenceProbabilities,
    keep_reference,
    measure,
    measure_reference,
    reference_probabilities,
)
from qlora_export.drift.reference import require_reference
from qlora_export.drift.survival import survival
from qlora_export.drift.tokens import TokenSet, token_set
from qlora_export.errors import ExportError, InputError, UsageError
from qlora_export.planning import Plan, make_plan
from qlora_export.recipe import Recipe
from qlora_export.report.data import write_report
from qlora_export.report.run import Run
from qlora_export.settling import require_evidence, settle
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.text import read_text


@contextmanager
def untracked(stage: str) -> Iterator[Progress]:
    """A track that shows nothing."""
    yield lambda done, total: None


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes and how it shows its progress."""

    out: Path
    workers: int = field(default_factory=lambda: engine.BuildOptions().workers)
    track: Track = untracked


def plan(recipe: Recipe, options: RunOptions) -> Run:
    """Plan only; where the merge base is `auto`, as if it were as-trained."""
    require_evidence(recipe)
    return Run(make_plan(recipe, options.out))


def build(recipe: Recipe, options: RunOptions) -> Run:
    """Plan and build."""
    return _build(recipe, options, lambda plan: None)


def _trial(options: RunOptions, recipe: Recipe, out: Path) -> Ledger | None:
    return check(recipe, replace(options, out=out)).ledger


def _build(recipe: Recipe, options: RunOptions, require: Callable[[Plan], None]) -> Run:
    """Settle the merge base, plan, make sure of what is needed later, and build."""
    settled = settle(recipe, options.out, partial(_trial, options))
    recipe = settled.recipe
    plan = make_plan(recipe, options.out, settled.notes)
    require(plan)
    with options.track("build") as progress:
        built = engine.build(plan, options.out, engine.BuildOptions(options.workers, progress=progress))
    made = {artifact.name: artifact for artifact in built}
    for item in plan.exports:
        with options.track(f"export {item.name}"):
            made[item.name] = engine.export(plan, item, made.get(item.source_name), options.out)
    return Run(plan, tuple(made[item.name] for item in recipe.artifacts))


def check(recipe: Recipe, options: RunOptions) -> Run:
    """Plan, build what is missing, and measure every artifact against the model that was trained."""
    if recipe.drift is None:
        raise UsageError("the recipe has no drift.text to measure on", "add `drift: {text: FILE}` or give --text")
    text = read_text(recipe.path(recipe.drift.text))
    run = _build(recipe, options, require_reference)

    from qlora_export.runtimes.loading import FolderTokenizer

    tokenizer = FolderTokenizer(_tokenizer_folder(run))
    tokens = token_set(text, tokenizer, recipe.drift.window_tokens, recipe.drift.tokens)
    _require_in_vocabulary(tokens, run.plan)
    with reference_probabilities(options.out, tokens) as store:
        references = _measure_references(run.plan, store, options)
        ledger = _measure_artifacts(run, references, tokens, store, options)
    return Run(run.plan, run.artifacts, ledger)


def release(recipe: Recipe, options: RunOptions) -> Run:
    """Check, then publish what passed; nothing at all when an artifact failed that may not be withheld."""
    if recipe.publish is None:
        raise UsageError("the recipe has no publish.to", "add `publish: {to: folder:PATH}`, or use check")
    publisher = catalog.load_publisher(recipe.publish.to, recipe.publish.version, recipe.folder)
    publisher.require_ready([recipe.path(text) for text in recipe.sources])
    run = check(recipe, options)
    write_report(run, options.out)
    entries = run.ledger.entries if run.ledger else ()
    if any(not entry.as_expected and not entry.withheld for entry in entries):
        return run
    chosen = [entry.verified for entry in entries if entry.verified is not None and entry.as_expected]
    try:
        with options.track("publish"):
            return replace(run, receipts=tuple(publisher.publish(chosen)))
    except ExportError as error:
        write_report(replace(run, failure=error.exit_code), options.out)
        raise


def _tokenizer_folder(run: Run) -> Path:
    """The first artifact that ships a tokenizer, else the base."""
    shipped = (artifact.path for artifact in run.artifacts if (artifact.path / "tokenizer_config.json").is_file())
    return next(shipped, run.plan.checkpoint.folder)


def _require_in_vocabulary(tokens: TokenSet, plan: Plan) -> None:
    """Raise InputError when the tokenizer knows tokens that the embedding has no row for."""
    rows = plan.model.settings.get("vocab_size", plan.checkpoint.text_config.get("vocab_size"))
    highest = max(max(window.tokens) for window in tokens.windows)
    if isinstance(rows, int) and highest >= rows:
        raise InputError(
            f"{plan.checkpoint.folder}: token {highest} of the text has no row in an embedding of {rows}",
            "the adapter's tokenizer has more tokens than the base: was the vocabulary resized in training?",
        )


def _measure_references(plan: Plan, store: ReferenceProbabilities, options: RunOptions) -> References:
    """Measure the live model of training with the adapter, without it, and merged."""
    if plan.adapter is None:
        opening = catalog.load_runtime("transformers").open(plan.checkpoint.folder)
        with opening as session, options.track("measure the model") as progress:
            keep_reference(session, store, progress)
        return References(measure_reference("the model", store))

    from qlora_export.runtimes.as_trained import open_as_trained

    live = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training, plan.model.settings.get("vocab_size"))
    with options.track("measure as trained") as progress:
        keep_reference(live.tuned(), store, progress)
    with live.base() as session, options.track("measure the base") as progress:
        base = measure("base", "transformers", session, store, progress)
    with live.merged() as session, options.track("measure merged") as progress:
        merged = measure("merged", "transformers", session, store, progress)
    return References(measure_reference("as trained", store), base, merged)


def _measure_artifacts(
    run: Run, references: References, tokens: TokenSet, store: ReferenceProbabilities, options: RunOptions
) -> Ledger:
    entries = []
    defaults = run.plan.recipe.drift.limits.over(DEFAULT_LIMITS) if run.plan.recipe.drift else DEFAULT_LIMITS
    planned = {item.name: item for item in run.plan.artifacts}
    for recipe, artifact in zip(run.plan.recipe.artifacts, run.artifacts, strict=True):
        runtime = str(artifact.manifest["runtime"])
        with _opened(runtime, artifact, run.plan) as session, options.track(f"measure {artifact.name}") as progress:
            measured = measure(artifact.name, runtime, session, store, progress)
        kept = survival(run.plan, planned[artifact.name], artifact) if artifact.name in planned else {}
        limits = recipe.limits.over(defaults)
        entries.append(enter(artifact, recipe, measured, kept, references, limits, tokens))
    return make_ledger(tokens, references, tuple(entries))


@contextmanager
def _opened(runtime: str, artifact: Artifact, plan: Plan) -> Iterator[Session]:
    """An artifact in its own runtime; an adapter on its own runs on the base of its training."""
    if runtime == "as-trained":
        from qlora_export.runtimes.as_trained import open_as_trained

        rows = plan.model.settings.get("vocab_size")
        yield open_as_trained(plan.checkpoint, open_adapter(artifact.path), plan.live_training, rows).tuned()
        return
    with catalog.load_runtime(runtime).open(artifact.path) as session:
        yield session
