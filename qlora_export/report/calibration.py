"""What reports say of calibration: the tokens an artifact was rounded by, the layers left to its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def calibration_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokens, how many layers were looked at, how many were left to the format by reason; None without any."""
    found = manifest.get("calibration")
    if not found:
        return None
    layers = [facts for facts in found["layers"].values() if "fallback" in facts or "output_error" in facts]
    left = Counter(str(facts["fallback"]) for facts in layers if "fallback" in facts)
    return {
        "sequences": found["sequences"],
        "tokens": found["tokens"],
        "tokens_sha256": found["tokens_sha256"],
        "layers": len(layers),
        "fallbacks": dict(sorted(left.items())),
        "notes": list(found.get("notes", ())),
    }


def calibration_lines(manifest: Mapping[str, Any]) -> list[str]:
    """The same in words: a line, and one for each note of the text."""
    found = calibration_of(manifest)
    if found is None:
        return []
    left = found["fallbacks"]
    line = (
        f"{found['layers'] - sum(left.values())} layers rounded by {found['sequences']} sequences of calibration, "
        f"{found['tokens']} tokens, sha256 {found['tokens_sha256'][:12]}"
    )
    if left:
        why = "; ".join(f"{count} because {reason}" for reason, count in left.items())
        line += f"; {sum(left.values())} left to the format: {why}"
    return [line, *found["notes"]]
