"""Comparing formats: one artifact for each, built in a trial folder, measured on the same tokens, beside what it costs.

    OUT/compare-trial/NAME/   the artifacts; kept, so that a second comparison builds nothing

The model that was trained is measured once for all rows. A candidate that cannot be planned, built or opened becomes a
row with its reason; only what is wrong for every one of them is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qlora_export import catalog
from qlora_export.artifact import Artifact
from qlora_export.drift.comparison.candidates import Candidate, candidates
from qlora_export.drift.comparison.costs import cost_of, fp32_cost, linear_modules, low_rank_cost
from qlora_export.drift.comparison.rows import Comparison, Measured, Row, by_size
from qlora_export.drift.comparison.speed import Speed, speed_of
from qlora_export.drift.ledger import Entry, References, make_ledger
from qlora_export.drift.probes import NO_PROBES
from qlora_export.drift.reference import require_reference
from qlora_export.drift.reference_store import ReferenceProbabilities, open_reference
from qlora_export.engine.build import locked
from qlora_export.engine.trial_folders import COMPARISON_TRIAL, make_room
from qlora_export.errors import ExportError
from qlora_export.pipeline.measure import Texts, judged, limits_of, planned_candidate, reference_store, texts_of
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.pipeline.release import build
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.planning.resolve import ResolvedExport, resolve
from qlora_export.planning.rounding_checks import CALIBRATED
from qlora_export.recipe.config import Recipe
from qlora_export.types import TrainingQuantization

BASELINE = "fp32"
AS_TRAINED = "merge.onto is auto: formats without a merge base of their own are compared as-trained"


@dataclass(frozen=True)
class _Built:
    """A finished artifact and the plan that made it."""

    candidate: Candidate
    plan: Plan
    artifact: Artifact


def compare(recipe: Recipe, options: RunOptions, formats: Sequence[str] = ()) -> Comparison:
    """Build and measure every candidate of `formats`, or of the usual list; publishes nothing, judges by the recipe.

    Each is FORMAT[:ROUNDING][@ONTO]. Raises UsageError for one that does not exist, and the first candidate's error
    when none can be measured.
    """
    found = candidates(formats, recipe)
    texts = texts_of(recipe, probes=False)
    recipe, notes = _for_trial(recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        trial = _Trial(recipe, replace(options, out=options.out / COMPARISON_TRIAL))
        built = trial.build(found, texts)
        plan = built[0].plan
        model = trained_model(plan)
        tokens = model.tokens(texts.drift, model.tokenizer([item.artifact for item in built]), recipe.drift)
        with open_reference(reference_store(recipe, options), model.key(options), tokens) as reference:
            references = model.measure(reference, NO_PROBES, options)
            entries = dict(trial.measure(built, references, reference.rows))
    if not entries:
        raise next(iter(trial.failures.values()))
    items = {item.candidate: item for item in built if item.candidate in entries}
    ledger = make_ledger(tokens, references, ())
    linear = linear_modules(planned for item in items.values() for planned in item.plan.artifacts) or _linear(trial)
    baseline = next((speed for item, (_, speed) in entries.items() if item.name == BASELINE), None)
    rows = [_row(items[item], *entries[item], baseline, linear) for item in items]
    rows += [Row(item, reason=_reason(item, error)) for item, error in trial.failures.items()]
    notes += tuple(dict.fromkeys(note for item in items.values() for note in item.plan.assumptions))
    fp32_bytes, cost = fp32_cost(plan, linear)
    return Comparison(
        recipe_digest=recipe.digest,
        tokens=tokens,
        reference=ledger.reference,
        base=ledger.base,
        merged=ledger.merged,
        limits=limits_of(recipe),
        rows=by_size(rows),
        weights=cost.weight_bytes // 4,
        fp32_bytes=next((row.measured.bytes for row in rows if row.measured and row.name == BASELINE), fp32_bytes),
        fp32_cost=cost,
        low_rank=low_rank_cost(plan, linear),
        notes=notes,
    )


class _Trial:
    """The trial folder: what is built and measured there, and the errors of what is not."""

    def __init__(self, recipe: Recipe, options: RunOptions) -> None:
        self.recipe = recipe
        self.options = options
        self.failures: dict[Candidate, ExportError] = {}

    def plan(self, items: Sequence[Candidate]) -> Plan:
        """The plan of some candidates."""
        return make_plan(_recipe_of(self.recipe, items), self.options.out)

    def build(self, items: Sequence[Candidate], texts: Texts) -> list[_Built]:
        """Everything that can be built and measured, in as few passes over the base as there are ways to build."""
        planned = [item for item in items if self._plans(item, texts)]
        if not planned:
            raise next(iter(self.failures.values()))
        built = [found for group in _groups(planned) for found in self._build_together(group)]
        if not built:
            raise next(iter(self.failures.values()))
        return built

    def _plans(self, item: Candidate, texts: Texts) -> bool:
        try:
            plan = self.plan([item])
            require_reference(plan)
            texts.require_measurable(trained_model(plan).protocol(self.recipe.drift))
        except ExportError as error:
            self.failures[item] = error
            return False
        digests = {made.name: made.digest for made in plan.artifacts}
        make_room(self.options.out, digests | {made.name: made.digest for made in plan.exports})
        return True

    def _build_together(self, group: Sequence[Candidate]) -> Iterator[_Built]:
        """All of a group in one pass, or one by one where one of them stops the others."""
        try:
            run = build(_recipe_of(self.recipe, group), self.options)
        except ExportError as error:
            if len(group) == 1:
                self.failures[group[0]] = error
            else:
                for item in group:
                    yield from self._build_together([item])
            return
        made = {artifact.name: artifact for artifact in run.artifacts}
        for item in group:
            yield _Built(item, run.plan, made[item.name])

    def measure(
        self, built: Sequence[_Built], references: References, rows: ReferenceProbabilities
    ) -> Iterator[tuple[Candidate, tuple[Entry, Speed]]]:
        """What each artifact measures, and how fast it runs."""
        for item in built:
            recipe = item.candidate.artifact(self.recipe)
            candidate = planned_candidate(item.plan, item.artifact, recipe, self.options.device)
            try:
                with candidate.open() as opened:
                    measured = candidate.measured(opened, rows, self.options.track)
                    speed = speed_of(opened, rows.tokens)
            except ExportError as error:
                self.failures[item.candidate] = error
            else:
                (entry,) = judged(self.recipe, [measured], references, rows.tokens)
                yield item.candidate, (entry, speed)


def _for_trial(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe without a publication and with a merge base that needs no measurement to be settled."""
    recipe = recipe.model_copy(update={"publish": None})
    if recipe.merge.onto != "auto":
        return recipe, ()
    return recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"onto": "as-trained"})}), (AS_TRAINED,)


def _recipe_of(recipe: Recipe, items: Sequence[Candidate]) -> Recipe:
    """The recipe that makes these candidates, and the dense artifacts that exporters start from."""
    made = [item.artifact(recipe) for item in items]
    for item in items:
        if item.format in catalog.EXPORTERS:
            source = _source(item, recipe).artifact(recipe)
            made = [source, *(artifact for artifact in made if artifact.name != source.name)]
    return recipe.model_copy(update={"artifacts": tuple(made)})


def _source(item: Candidate, recipe: Recipe) -> Candidate:
    """What an exporter starts from."""
    found = resolve(item.artifact(recipe), TrainingQuantization())
    takes = found.exporter.takes if isinstance(found, ResolvedExport) else "dense"
    return Candidate("bf16" if takes in ("dense", "adapter") else takes, item.rounding, item.onto)


def _groups(items: Sequence[Candidate]) -> list[list[Candidate]]:
    """Formats without data, formats with, and every exporter for itself."""
    formats = [item for item in items if item.format in catalog.FORMATS]
    calibrated = [item for item in formats if item.rounding in CALIBRATED]
    groups = [[item for item in formats if item not in calibrated], calibrated]
    groups += [[item] for item in items if item.format in catalog.EXPORTERS]
    return [group for group in groups if group]


def _linear(trial: _Trial) -> frozenset[str]:
    """The layers that formats encode, where none that was compared encodes any."""
    try:
        return linear_modules(trial.plan([Candidate("nf4", "nearest")]).artifacts)
    except ExportError:
        return frozenset()


def _row(item: _Built, entry: Entry, speed: Speed, baseline: Speed | None, linear: frozenset[str]) -> Row:
    planned = next((found for found in item.plan.artifacts if found.name == item.artifact.name), None)
    measured = Measured(
        entry=entry,
        bytes=item.artifact.bytes,
        onto=item.artifact.manifest["onto"],
        rounding=planned.rounding.chosen if planned else None,
        cost=cost_of(item.plan, planned, linear) if planned else None,
        speed=speed,
        base_speed=baseline,
    )
    return Row(item.candidate, measured)


def _reason(item: Candidate, error: ExportError) -> str:
    """The error in one line, without the name of the row that it stands in."""
    return error.message.splitlines()[0].removeprefix(f"artifact {item.name}: ")
