"""What reports say in words of questions, labels, prompts, layers and graphs: a line for each that was asked."""

from __future__ import annotations

import math

from qlora_export.drift.generation import Generation
from qlora_export.drift.ledger import Entry
from qlora_export.drift.multiple_choice import Choices
from qlora_export.drift.onnx.variants import GraphFindings, VariantDistances
from qlora_export.drift.trace import Trace


def probe_lines(entry: Entry) -> list[str]:
    """The lines on one artifact."""
    found, lines = entry.findings, []
    if found.choices is not None:
        lines.append(_choices(found.choices))
    if found.labels is not None:
        lines.append(_choices(found.labels, "labels"))
    if found.generation is not None:
        lines.append(_generation(found.generation))
    if found.trace is not None:
        lines.append(_trace(found.trace))
    if found.onnx is not None:
        lines.append(graph_line(found.onnx))
    return lines


def _choices(found: Choices, items: str = "questions") -> str:
    error = f" ± {found.accuracy_stderr:.1%}" if math.isfinite(found.accuracy_stderr) else ""
    return (
        f"{found.accuracy:.1%}{error} of {found.items} {items} right, the reference "
        f"{found.accuracy_reference:.1%}: {found.lost} lost, {found.gained} gained, p = {found.p_value:.2g}"
    )


def _generation(found: Generation) -> str:
    return (
        f"writes what the reference writes for {found.agreement_mean:.1f} tokens in the mean, "
        f"{found.agreement_median:g} in the median, {found.whole} of {found.prompts} prompts to their end"
    )


def _trace(found: Trace) -> str:
    if found.note:
        return f"layers not compared, {found.note}"
    if found.broken is None:
        return "no layer stands out"
    return f"{found.broken.name} broke: off by {found.broken.error:.2g}, usual is {found.broken.usual:.2g}"


def graph_line(found: GraphFindings) -> str:
    """Whether its ways of running agree, how far it is from its source, and what other accuracies would change."""
    prefill, *others = found.ways
    levels = [variant for variant in others if variant.name.startswith("accuracy_level")]
    same = [variant for variant in others if variant not in levels]
    parts = [_agreement(found, same)]
    if prefill.from_source is not None:
        parts.append(f"mean KL to {found.source} in torch {prefill.from_source.mean_kl:.2g}")
    if found.accuracy_level is not None:
        parts.append(f"shipped and measured with accuracy_level {found.accuracy_level}")
    parts += [
        f"{variant.name} would move it by {variant.from_prefill.mean_kl:.2g}"
        for variant in levels
        if variant.from_prefill
    ]
    return f"ONNX in {found.weights}: {', '.join(parts)}"


def _agreement(found: GraphFindings, same: list[VariantDistances]) -> str:
    if found.breaches:
        return f"fails {len(found.breaches)} of its comparisons"
    largest = max((variant.from_prefill.mean_kl for variant in same if variant.from_prefill), default=0.0)
    return f"{len(same)} ways of running agree with prefill, mean KL at most {largest:.2g}"
