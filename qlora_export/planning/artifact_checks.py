"""What an artifact of the recipe is told that its format cannot do: every problem, before anything is written."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Set as AbstractSet

from qlora_export import catalog
from qlora_export.errors import ExitCode, Problem, UsageError
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.planning.overrides import mixed, override_problems
from qlora_export.recipe.config import ArtifactRecipe, Recipe

LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def artifact_problems(recipe: Recipe, facts: TrainingFacts) -> list[Problem]:
    """What an artifact is told that its format cannot do."""
    problems = []
    training = facts.live
    for artifact in recipe.artifacts:
        if artifact.format in catalog.EXPORTERS:
            if artifact.keep or artifact.overrides:
                problems.append((artifact, f"{artifact.format} is exported whole, nothing can be kept dense"))
            continue
        form = _format(artifact, facts)
        if isinstance(form, UsageError):
            problems.append((artifact, form.message))
            form = load_format(artifact.format, training)
        problems += [(artifact, what) for what in _override_problems(artifact, facts)]
        unmatched = [pattern for pattern in artifact.keep if not fnmatch.filter(facts.encodable, pattern)]
        problems += [(artifact, f"keep {pattern!r} matches no quantised module") for pattern in unmatched]
        if artifact.keep and not form.quantises:
            problems.append((artifact, f"{artifact.format} quantises nothing, so there is nothing to keep"))
        if form.keeps_adapter and not recipe.adapters:
            problems.append((artifact, f"{artifact.format} ships an adapter, the recipe has none"))
        if form.keeps_adapter and training.quant_type != "nf4":
            problems.append((artifact, f"{artifact.format} ships an NF4 base, training had {training.quant_type}"))
        if not recipe.adapters and artifact.onto == "as-trained":
            problems.append((artifact, "there is no training without an adapter"))
        if form.keeps_adapter and (artifact.keep or artifact.onto == "original"):
            problems.append((artifact, f"{artifact.format} ships the base of training as it was"))
    return [
        Problem(
            ExitCode.USAGE, f"artifact {artifact.name}: {message}", "see `keep`, `onto` and `options` of this artifact"
        )
        for artifact, message in problems
    ]


def _format(artifact: ArtifactRecipe, facts: TrainingFacts) -> Format | UsageError:
    """The artifact's format, or what is wrong with its options."""
    try:
        return load_format(artifact.format, facts.live, artifact.options)
    except UsageError as error:
        return error


def _override_problems(artifact: ArtifactRecipe, facts: TrainingFacts) -> list[str]:
    return override_problems(artifact, sorted(encoded_modules(artifact, facts)), facts.live)


def encoded_modules(artifact: ArtifactRecipe, facts: TrainingFacts) -> AbstractSet[str]:
    """The stored linear layers that a quantising format encodes: all that it can but those to keep."""
    kept = {name for pattern in artifact.keep for name in fnmatch.filter(facts.encodable, pattern)}
    return facts.encodable - kept


def layer_problems(recipe: Recipe, facts: TrainingFacts, model: MergedModel) -> list[Problem]:
    """Layers whose shape a format cannot encode and that are not kept dense; layers of all numbers are told at once."""
    problems = []
    for artifact in recipe.artifacts:
        form = _format(artifact, facts) if artifact.format in catalog.FORMATS else None
        if form is None or isinstance(form, UsageError) or not form.quantises:
            continue
        try:
            names = {module: (module,) for module in encoded_modules(artifact, facts)}
            form = mixed(artifact, form, facts.live, names)
        except UsageError:
            continue  # told elsewhere
        if facts.experts and not form.beside_experts:
            message = f"artifact {artifact.name}: transformers does not load {artifact.format} beside dense experts"
            problems.append(Problem(ExitCode.USAGE, message, "fp8, int8, nf4 and bf16 serve a mixture of experts"))
        counts: Counter[tuple[str, str]] = Counter()
        for module in sorted(encoded_modules(artifact, facts)):
            output = model.outputs.get(f"{module}.weight")
            reason = form.obstacle(output.layer_spec, output.transposed) if output is not None else None
            if reason is not None:
                counts[LAYER_NUMBER.sub(".*", module), reason] += 1
        for (name, reason), count in counts.items():
            message = f"artifact {artifact.name}: {artifact.format} cannot hold {name} ({count} layers): {reason}"
            hint = f'keep: ["{name}"] leaves it dense; other formats and options have other limits'
            problems.append(Problem(ExitCode.USAGE, message, hint))
    return problems


def kept_adapter_problems(recipe: Recipe, facts: TrainingFacts, model: MergedModel) -> list[Problem]:
    """An adapter that does not load onto the base as it was: peft does not resize the vocabulary by itself."""
    if "vocab_size" not in model.settings:
        return []
    rows = model.settings["vocab_size"]
    return [
        Problem(
            ExitCode.USAGE,
            f"artifact {item.name}: vocabulary resized to {rows} rows in training, the base to ship has its own",
            "choose a merged format",
        )
        for item in recipe.artifacts
        if item.format in catalog.FORMATS and load_format(item.format, facts.live).keeps_adapter
    ]
