"""What reports say of an ONNX graph that was run in several ways, in a line."""

from __future__ import annotations

from qlora_export.drift.onnx.variants import GraphFindings, RunWay


def graph_line(found: GraphFindings) -> str:
    """Whether its ways of running agree, how far it is from its source, and what other accuracies would change."""
    prefill, *others = found.ways
    levels = [way for way in others if way.name.startswith("accuracy_level")]
    same = [way for way in others if way not in levels]
    parts = [_agreement(found, same)]
    if prefill.from_source is not None:
        parts.append(f"mean KL to {found.source} in torch {prefill.from_source.mean_kl:.2g}")
    if found.accuracy_level is not None:
        parts.append(f"shipped and measured with accuracy_level {found.accuracy_level}")
    parts += [f"{way.name} would move it by {way.from_prefill.mean_kl:.2g}" for way in levels if way.from_prefill]
    return f"ONNX in {found.weights}: {', '.join(parts)}"


def _agreement(found: GraphFindings, same: list[RunWay]) -> str:
    if found.breaches:
        return f"fails {len(found.breaches)} of its comparisons"
    largest = max((way.from_prefill.mean_kl for way in same if way.from_prefill), default=0.0)
    return f"{len(same)} ways of running agree with prefill, mean KL at most {largest:.2g}"
