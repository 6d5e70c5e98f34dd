"""Where the numbers come from: tokens, protocol, reference, recipe, every artifact's digest, what was published."""

from __future__ import annotations

from typing import Any

from qlora_export.report.html.figures import counted
from qlora_export.report.html.reading import Facts, artifacts, number, part, parts, text, texts
from qlora_export.report.html.section import Section

LEAD = "What makes these numbers again, and what they were made of."
TRAINING = {
    "sidecar": "from the sidecar of the training run",
    "base": "from the base",
    "stated": "as stated",
    "assumed": "assumed",
}
NO_BEGIN = "windows hold no begin token"


def provenance(report: Facts) -> Section:
    """The section; every report has it."""
    tokens, reference = part(report, "tokens"), part(report, "reference")
    training = text(reference, "training_quantization")
    facts = {
        "tokens": tokens,
        "labels": ", ".join(texts(tokens, "labels")),
        "documents": _documents(part(tokens, "documents")),
        "begin": text(tokens, "begin") or NO_BEGIN if "begin" in tokens else "",
        "reference": reference,
        "training": TRAINING.get(training, training),
        "digest": text(report, "recipe_digest"),
        "assumptions": texts(report, "assumptions"),
        "folders": [artifact for artifact in artifacts(report) if text(artifact, "path")],
        "calibrated": [_calibrated(item) for item in artifacts(report) if part(item, "calibration")],
        "published": parts(report, "published"),
    }
    return Section("provenance", "Provenance", LEAD, "provenance.html", facts)


def _documents(documents: Facts) -> str:
    names = {"count": "document", "words": "word", "bytes": "byte"}
    return ", ".join(counted(number(documents, key), word) for key, word in names.items()) if documents else ""


def _calibrated(artifact: Facts) -> tuple[Facts, Facts, float, dict[str, Any]]:
    """An artifact, its calibration, how many layers were rounded by it, and how many were not for which reason."""
    facts = part(artifact, "calibration")
    left = {reason: number(part(facts, "fallbacks"), reason) for reason in part(facts, "fallbacks")}
    return artifact, facts, (number(facts, "layers") or 0.0) - sum(many or 0.0 for many in left.values()), left
