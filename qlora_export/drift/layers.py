"""What is known of how single layers kept their delta: the row of a layer, and what a whole artifact says in a line.

Numbers in the metric of the layer's inputs, H = E[x x^T], are those that calibration wrote into the manifest:

    weighted survival = <(shipped - base) H, delta> / <delta H, delta>
    output error      = sqrt(tr(E H E^T) / tr(T H T^T)),    E = shipped - merged,  T = merged

Tuning moves scales after they were taken, so they are then of weights that are not shipped, and no summary has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from qlora_export.drift.results import Drift

WeightedOf = Literal["shipped", "before tuning"]


@dataclass(frozen=True)
class KeptLayer:
    """How one adapted matrix kept its delta.

    `codes_changed` is the share of 4-bit codes that are not those of training. `weighted_survival` and `output_error`
    are what calibration measured, of the `weighted_of` weights. None where a number does not apply.
    """

    tensor: str
    survival: float
    codes_changed: float | None = None
    weighted_survival: float | None = None
    output_error: float | None = None
    weighted_of: WeightedOf | None = None

    @property
    def in_outputs(self) -> float:
        """Survival in the layer's outputs where calibration measured it, else in its weights."""
        return self.survival if self.weighted_survival is None else self.weighted_survival


def with_calibration(layers: Iterable[KeptLayer], manifest: Mapping[str, Any]) -> tuple[KeptLayer, ...]:
    """The layers with what the manifest of a calibrated artifact knows of them."""
    facts: Mapping[str, Any] = manifest.get("calibration", {}).get("layers", {})
    # Step 0 is the start: its scales were the best ones.
    weighted_of: WeightedOf = "before tuning" if facts.get("tuning", {}).get("step") else "shipped"
    return tuple(_with_facts(layer, facts.get(layer.tensor, {}), weighted_of) for layer in layers)


def _with_facts(layer: KeptLayer, facts: Mapping[str, Any], weighted_of: WeightedOf) -> KeptLayer:
    survival, error = facts.get("weighted_survival"), facts.get("output_error")
    if survival is None and error is None:
        return layer
    return replace(layer, weighted_survival=survival, output_error=error, weighted_of=weighted_of)


def lowest(layers: Sequence[KeptLayer], count: int) -> list[KeptLayer]:
    """The layers that kept least, the least first."""
    return sorted(layers, key=lambda layer: layer.survival)[:count]


def summarised(drift: Drift, layers: Sequence[KeptLayer]) -> Drift:
    """The drift with medians, and lowest layers by name, of what is known of the shipped weights.

    Among layers with a survival in their outputs, one that was left to its format counts with that of its weights.
    """
    if not layers:
        return drift
    least = lowest(layers, 1)[0]
    changed = [layer.codes_changed for layer in layers if layer.codes_changed is not None]
    weighted = []
    if any(layer.weighted_survival is not None for layer in layers):
        weighted = [(layer.in_outputs, layer.tensor) for layer in layers]
    weighted_min, weighted_name = min(weighted) if weighted else (None, None)
    return replace(
        drift,
        survival_median=median(layer.survival for layer in layers),
        survival_min=least.survival,
        survival_min_tensor=least.tensor,
        codes_changed_median=median(changed) if changed else None,
        weighted_survival_median=median(value for value, _ in weighted) if weighted else None,
        weighted_survival_min=weighted_min,
        weighted_survival_min_tensor=weighted_name,
    )
