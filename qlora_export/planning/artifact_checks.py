"""What an artifact of the recipe is told that its format cannot do: every problem, before anything is written."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator

from qlora_export.errors import ExitCode, Problem, UsageError
from qlora_export.formats.base import Format
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.overrides import mixed, override_problems
from qlora_export.planning.resolve import ResolvedExport, ResolvedFormat

LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def artifact_problems(inputs: Inputs) -> list[Problem]:
    """What an artifact is told that its format cannot do."""
    hint = "see `keep`, `onto` and `options` of this artifact"
    return [
        Problem(ExitCode.USAGE, f"artifact {item.recipe.name}: {message}", hint)
        for item in inputs.artifacts
        for message in (_whole(item) if isinstance(item, ResolvedExport) else _misfits(inputs, item))
    ]


def _whole(item: ResolvedExport) -> Iterator[str]:
    if item.recipe.keep or item.recipe.overrides:
        yield f"{item.recipe.format} is exported whole, nothing can be kept dense"


def _misfits(inputs: Inputs, item: ResolvedFormat) -> Iterator[str]:
    """Why a format does not fit what the recipe says of it, the adapter or the training."""
    recipe, form, adapters = item.recipe, item.form, inputs.recipe.adapters
    if item.error is not None:
        yield item.error.message
    if recipe.overrides:
        yield from override_problems(item, sorted(inputs.encoded(item)))
    for pattern in recipe.keep:
        if not fnmatch.filter(inputs.facts.encodable, pattern):
            yield f"keep {pattern!r} matches no quantised module"
    if recipe.keep and not form.quantises:
        yield f"{recipe.format} quantises nothing, so there is nothing to keep"
    if form.keeps_adapter and not adapters:
        yield f"{recipe.format} ships an adapter, the recipe has none"
    if form.keeps_adapter and inputs.training.quant_type != "nf4":
        yield f"{recipe.format} ships an NF4 base, training had {inputs.training.quant_type}"
    if not adapters and recipe.onto == "as-trained":
        yield "there is no training without an adapter"
    if form.keeps_adapter and (recipe.keep or recipe.onto == "original"):
        yield f"{recipe.format} ships the base of training as it was"


def layer_problems(inputs: Inputs) -> list[Problem]:
    """Layers whose shape a format cannot encode and that are not kept dense; layers of all numbers are told at once."""
    problems = []
    for item in inputs.formats:
        if item.error is not None or item.override_error is not None or not item.form.quantises:
            continue
        try:
            form = mixed(item, item.form, {module: (module,) for module in inputs.encoded(item)})
        except UsageError:
            continue  # told elsewhere
        name, format_name = item.recipe.name, item.recipe.format
        if inputs.facts.experts and not form.beside_experts:
            message = f"artifact {name}: transformers does not load {format_name} beside dense experts"
            problems.append(Problem(ExitCode.USAGE, message, "fp8, int8, nf4 and bf16 serve a mixture of experts"))
        for (layers, reason), count in _obstacles(inputs, item, form).items():
            message = f"artifact {name}: {format_name} cannot hold {layers} ({count} layers): {reason}"
            hint = f'keep: ["{layers}"] leaves it dense; other formats and options have other limits'
            problems.append(Problem(ExitCode.USAGE, message, hint))
    return problems


def _obstacles(inputs: Inputs, item: ResolvedFormat, form: Format) -> Counter[tuple[str, str]]:
    """How many layers a format cannot hold, by their name without its number, and the reason."""
    found: Counter[tuple[str, str]] = Counter()
    for module in sorted(inputs.encoded(item)):
        output = inputs.model.outputs.get(f"{module}.weight")
        reason = form.obstacle(output.layer_spec, output.transposed) if output is not None else None
        if reason is not None:
            found[LAYER_NUMBER.sub(".*", module), reason] += 1
    return found


def kept_adapter_problems(inputs: Inputs) -> list[Problem]:
    """An adapter that does not load onto the base as it was: peft does not resize the vocabulary by itself."""
    rows = inputs.model.settings.get("vocab_size")
    return [
        Problem(
            ExitCode.USAGE,
            f"artifact {item.recipe.name}: vocabulary resized to {rows} rows in training, the base to ship has its own",
            "choose a merged format",
        )
        for item in inputs.formats
        if rows is not None and item.form.keeps_adapter
    ]
