"""The text of the managed block: what this is, how to load it, how far it drifted, what was assumed, how to check it.

Numbers come from the published report alone and names of the machine are left out, so the same publication gives the
same text wherever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_export.publish.card.escaping import code, escape, recipe_yaml
from qlora_export.publish.card.facts import CardFacts, CardItem, drift_from
from qlora_export.publish.card.javascript import javascript
from qlora_export.publish.card.snippets import served, snippet
from qlora_export.report.calibration import calibration_lines
from qlora_export.report.markdown import ArtifactRow, ledger_table
from qlora_export.report.tokens import protocol_line, unit_of

NOTICE = (
    "<!-- Written by qlora-export. A new release replaces what stands between these two lines, and nothing else. -->"
)
LIMITS = (
    ("perplexity_ratio", "perplexity ratio at most {:g}"),
    ("mean_kl", "mean KL at most {:g}"),
    ("same_top1", "same top-1 at least {:.4g} %"),
    ("gain_kept", "gain kept at least {:.4g} %"),
    ("survival_min", "lowest survival at least {:.4g} %"),
)
PERCENT = {"same_top1", "gain_kept", "survival_min"}
LEGEND = (
    "Ratio: of perplexities, paired, ± standard error. Mean KL: in nats a token, from the reference to the artifact. "
    "Same top-1: the same most likely token. Gain kept: share of the fine-tuning gain. Survival: of the delta, in the "
    "worst layer."
)

LABELS_LEGEND = (
    "Perplexity: of the labels, the exponential of their mean cross-entropy. Ratio: of perplexities, paired, ± "
    "standard error. Mean KL: in nats a text, from the reference to the artifact. Same top-1: the same predicted "
    "label. Gain kept has no number, since an untrained head says nothing. Survival: of the delta, in the worst layer."
)


def body(facts: CardFacts) -> str:
    """Everything between the two markers, as Markdown."""
    parts = [
        NOTICE,
        *(paragraph(facts, item) for item in facts.items),
        *_loading(facts),
        *_drift(facts),
        *_calibrated(facts),
        *_assumed(facts),
        *_recipe(facts),
        *_checking(facts),
    ]
    return "\n\n".join(parts)


def paragraph(facts: CardFacts, item: CardItem) -> str:
    """What one artifact is, in a few sentences."""
    base = code(facts.base_id) + (f" at commit {code(facts.base_commit)}" if facts.base_commit else "")
    where = f"In {code(item.prefix)}: " if item.prefix else ""
    if item.info.base_model_relation == "adapter":
        text = f"the LoRA adapter {_adapter(item)} for {base}, as it was trained, without the base"
    elif item.info.beside == "adapter":
        text = (
            f"{base} in {item.info.weights}, in the codes that the adapter was trained on, with the adapter "
            f"{_adapter(item)} untouched in {code(f'{item.prefix}adapter/')}. Both must be loaded: the base alone "
            "opens without an error and is not the fine-tuned model"
        )
    elif item.has_adapter:
        text = f"{base} with the adapter {_adapter(item)} merged into its weights, {_stored(item)}. {_onto(item)}"
    else:
        text = f"{base} as it is, {_stored(item)}; no adapter was merged into it"
    if item.info.beside == "correction":
        text += (
            f". The LoRA adapter in {code(f'{item.prefix}adapter/')} was not trained: it corrects what rounding these "
            "weights left wrong, and must be loaded with them. Without it they open without an error, further from the "
            "model that was trained"
        )
    return f"{where}{text[0].upper() if not where else text[0]}{text[1:]}."


def _adapter(item: CardItem) -> str:
    combined = item.manifest["sources"].get("combined_from") or []
    if combined:
        return "combined from " + ", ".join(f"{code(str(part['id']))} x {part['weight']:g}" for part in combined)
    return code(str(item.manifest["sources"]["adapter"]["id"]))


def _stored(item: CardItem) -> str:
    verb = "exported to" if item.info.library == "onnx" else "stored in"
    if item.info.library != "onnx" and item.info.base_model_relation == "quantized":
        verb = "rounded to"
    return f"{verb} {item.info.weights}"


def _onto(item: CardItem) -> str:
    """What the adapter was added to."""
    training: Mapping[str, Any] = item.manifest.get("training_quantization") or {}
    kind = training.get("quant_type", "none")
    if item.manifest.get("onto") == "original":
        seen = "" if kind == "none" else f", not to the {kind} weights that training saw"
        return f"The delta was added to the base's original weights{seen}"
    if kind == "none":
        return "The delta was added to the base's weights, which training saw as they are"
    return f"The delta was added to the base as training saw it: its {kind} weights, de-quantised"


def _loading(facts: CardFacts) -> Iterator[str]:
    yield "## How to load it"
    for item in facts.items:
        if len(facts.items) > 1:
            yield f"{code(item.artifact.name)}:"
        yield _fenced("bash", f"pip install {' '.join(item.packages)}")
        yield _fenced("python", snippet(facts, item))
        if script := javascript(facts, item):
            yield "In a browser, or in Node:"
            yield _fenced("bash", "npm install @huggingface/transformers")
            yield _fenced("js", script)
        block_size = (item.manifest.get("training_quantization") or {}).get("block_size", 64)
        if item.info.base_model_relation == "adapter" and block_size != 64:
            yield (
                f"Training quantised in blocks of {int(block_size)} values, where bitsandbytes takes 64 by default: "
                "the base above is not exactly the one that training saw."
            )
        if command := served(facts, item):
            yield "vLLM serves it where it knows the architecture:"
            yield _fenced("bash", command)


def _drift(facts: CardFacts) -> Iterator[str]:
    tokens, reference = facts.report.get("tokens"), facts.report.get("reference")
    if not tokens or not reference:
        return
    original = "the model that was trained" if facts.main.has_adapter else "the base"
    unit = unit_of(tokens)
    yield f"## Drift from {original}"
    yield (
        f"Every artifact was opened from its own files in its own runtime and compared, {unit[:-1]} by {unit[:-1]}, "
        f"with {original} ({escape(str(reference['model']))}) on {int(tokens['count'])} {unit}. That tells how close "
        "they are, not how good or how safe the model is."
    )
    base, merged = (drift_from(found) if found else None for found in (reference["base"], reference["merged"]))
    rows = [_row(facts, item) for item in facts.items]
    yield "\n".join(ledger_table(float(reference["perplexity"]), base, merged, rows))
    yield (
        f"{escape(protocol_line(tokens))}; {escape(str(reference['activations']))} activations; "
        f"tokens {code(str(tokens['sha256']))}. {LABELS_LEGEND if unit == 'labels' else LEGEND}"
    )
    yield from _accuracies(facts)
    yield from _limits(facts)


def _accuracies(facts: CardFacts) -> Iterator[str]:
    """Of a classifier, how many labels each artifact predicts right."""
    found = ((item.artifact.name, facts.entry(item).get("labels")) for item in facts.items)
    lines = [
        f"- {code(name)} predicts {labels['accuracy']:.1%} of {int(labels['items'])} labels right, the reference "
        f"{labels['accuracy_reference']:.1%}: {int(labels['lost'])} lost, {int(labels['gained'])} gained"
        for name, labels in found
        if labels is not None
    ]
    if lines:
        yield "\n".join(lines)


def _row(facts: CardFacts, item: CardItem) -> ArtifactRow:
    verdict = str(facts.entry(item).get("verdict", "pass"))
    return ArtifactRow(item.artifact.name, item.artifact.bytes, facts.drift(item), verdict)


def _limits(facts: CardFacts) -> Iterator[str]:
    """What the gate wanted of each artifact."""
    lines = []
    for item in facts.items:
        limits = facts.entry(item).get("limits")
        if limits is None:
            continue
        wanted = [
            text.format(limits[name] * 100 if name in PERCENT else limits[name])
            for name, text in LIMITS
            if limits.get(name) is not None
        ]
        lines.append(f"- {code(item.artifact.name)}: {'; '.join(wanted) or 'no limits'}")
    if lines:
        yield "The limits that it kept with 95 % confidence:"
        yield "\n".join(lines)


def _calibrated(facts: CardFacts) -> Iterator[str]:
    """On which text artifacts were rounded by calibration, and how many layers were not."""
    items = ((item.artifact.name, calibration_lines(item.manifest)) for item in facts.items)
    if lines := [f"- {code(name)}: {escape(line)}" for name, found in items for line in found]:
        yield "## Calibration"
        yield "\n".join(lines)


def _assumed(facts: CardFacts) -> Iterator[str]:
    stated = (str(text) for item in facts.items for text in item.manifest.get("assumptions", ()))
    if lines := [f"- {escape(text)}" for text in dict.fromkeys(stated)]:
        yield "## What was assumed"
        yield "\n".join(lines)


def _recipe(facts: CardFacts) -> Iterator[str]:
    yield "<details>\n<summary>The recipe</summary>"
    yield _fenced("yaml", recipe_yaml(facts.recipe).rstrip("\n"))
    yield "</details>"


def _checking(facts: CardFacts) -> Iterator[str]:
    manifests = ", ".join(f"[{item.prefix}manifest.json]({item.prefix}manifest.json)" for item in facts.items)
    yield "## How to check it"
    yield (
        "All numbers are in [qlora-export/report.json](qlora-export/report.json), where every byte comes from in "
        "[qlora-export/provenance.json](qlora-export/provenance.json), the sha256 of every file in "
        f"[SHA256SUMS](SHA256SUMS), and how it was made in {manifests}. To compare the published files with them:"
    )
    yield _fenced("bash", f"qlora-export verify {facts.repository}@COMMIT")


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
