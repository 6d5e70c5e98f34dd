"""Where the numbers come from: tokens, protocol, reference, recipe, every artifact's digest, what was published."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_export.report.html.elements import Child, Markup, code, element, joined
from qlora_export.report.html.figures import count, counted, fixed, share, significant, with_error
from qlora_export.report.html.reading import Facts, artifacts, number, part, parts, text, texts
from qlora_export.report.html.section import Section, name_of
from qlora_export.report.html.table import Column, described, folded, table
from qlora_export.report.terminal import size

TRAINING = {
    "sidecar": "from the sidecar of the training run",
    "base": "from the base",
    "stated": "as stated",
    "assumed": "assumed",
}
NO_BEGIN = "windows hold no begin token"


def provenance(report: Facts) -> Section:
    """The section; every report has it."""
    body = joined(
        _facts("Tokens", _tokens(part(report, "tokens"))),
        _facts("Reference", _reference(part(report, "reference"))),
        _facts("Recipe", _recipe(report)),
        _assumptions(texts(report, "assumptions")),
        _manifests(artifacts(report)),
        _calibrations(artifacts(report)),
        _published(parts(report, "published")),
    )
    return Section("provenance", "Provenance", "What makes these numbers again, and what they were made of.", body)


def _facts(heading: str, pairs: Sequence[tuple[str, Child]]) -> Markup | None:
    return joined(element("h3", heading, class_="aside"), described(pairs)) if pairs else None


def _known(pairs: Sequence[tuple[str, Child]]) -> list[tuple[str, Child]]:
    """Pairs that say something."""
    return [(term, said) for term, said in pairs if said]


def _number(facts: Facts, key: str) -> str:
    value = number(facts, key)
    return "" if value is None else count(value)


def _digest(facts: Facts, key: str) -> Markup | None:
    found = text(facts, key)
    return code(found) if found else None


def _tokens(tokens: Facts) -> list[tuple[str, Child]]:
    if not tokens:
        return []
    labels = texts(tokens, "labels")
    begin = text(tokens, "begin") or NO_BEGIN if "begin" in tokens else ""
    return _known(
        (
            ("sha256", _digest(tokens, "sha256")),
            ("scored tokens" if not labels else "scored labels", _number(tokens, "count")),
            ("labels", ", ".join(labels)),
            ("protocol", joined(*_named_protocol(tokens))),
            ("documents", _documents(part(tokens, "documents"))),
            ("windows", _number(tokens, "windows")),
            ("window, tokens", _number(tokens, "window_tokens")),
            ("stride, tokens", _number(tokens, "stride_tokens")),
            ("begin token", begin),
            ("limit of the recipe, tokens", _number(tokens, "limit")),
        )
    )


def _documents(documents: Facts) -> str:
    names = ("document", "word", "byte")
    known = [counted(number(documents, f"{name}s"), name) for name in names[1:]]
    return ", ".join([counted(number(documents, "count"), names[0]), *known]) if documents else ""


def _named_protocol(tokens: Facts) -> list[Child]:
    name, long = text(tokens, "name"), text(tokens, "protocol")
    return [code(name) if name else None, ": " if name and long else None, long]


def _reference(reference: Facts) -> list[tuple[str, Child]]:
    if not reference:
        return []
    perplexity, stderr = number(reference, "perplexity"), number(reference, "perplexity_stderr")
    training = text(reference, "training_quantization")
    return _known(
        (
            ("model", text(reference, "model")),
            ("training quantisation", TRAINING.get(training, training)),
            ("runtime", text(reference, "runtime")),
            ("activations", text(reference, "activations")),
            ("device", text(reference, "device")),
            ("perplexity", "" if perplexity is None else with_error(fixed(perplexity), stderr)),
            ("noise floor", _noise_floor(part(reference, "noise_floor"))),
        )
    )


def _noise_floor(floor: Facts) -> str:
    """What the reference drifts from itself in another dtype: no artifact can be told to be better than that."""
    if not floor:
        return ""
    mean, same = number(floor, "mean_kl"), number(floor, "same_top1")
    return (
        f"mean KL {significant(mean, 2)}, same top-1 {share(same)}: the reference in {text(floor, 'dtype')} against "
        f"itself, on {counted(number(floor, 'tokens'), 'token')}"
    )


def _recipe(report: Facts) -> list[tuple[str, Child]]:
    digest = _digest(report, "recipe_digest")
    return [("digest", digest or "none: a folder was checked that no recipe made")]


def _assumptions(found: list[str]) -> Markup | None:
    if not found:
        return None
    items = element("ul", [element("li", said) for said in found])
    return joined(element("h3", "Assumed", class_="aside"), items)


def _manifests(found: list[Facts]) -> Markup | None:
    found = [artifact for artifact in found if text(artifact, "path")]
    if not found:
        return None
    names = ("artifact", "format", "runtime", "size", "manifest sha256", "folder")
    rows = [_manifest_row(artifact) for artifact in found]
    drawn = table("Folders that were measured", [Column(name) for name in names], rows)
    return joined(element("h3", "Artifacts", class_="aside"), drawn)


def _manifest_row(artifact: Facts) -> list[Child]:
    stored = number(artifact, "bytes")
    kept = ", kept from an earlier run" if artifact.get("reused") is True else ""
    return [
        code(name_of(artifact)),
        text(artifact, "format"),
        text(artifact, "runtime"),
        "" if stored is None else size(int(stored)),
        _digest(artifact, "manifest_sha256"),
        joined(_digest(artifact, "path"), kept),
    ]


def _calibrations(found: list[Facts]) -> Markup | None:
    known = [(artifact, part(artifact, "calibration")) for artifact in found if part(artifact, "calibration")]
    if not known:
        return None
    items = [element("li", code(name_of(artifact)), ": ", *_calibration(facts)) for artifact, facts in known]
    return joined(element("h3", "Calibration", class_="aside"), element("ul", items))


def _calibration(facts: Facts) -> list[Child]:
    left = {reason: number(part(facts, "fallbacks"), reason) for reason in part(facts, "fallbacks")}
    fallen = sum(many or 0.0 for many in left.values())
    layers = (number(facts, "layers") or 0.0) - fallen
    said = (
        f"{counted(layers, 'layer')} rounded by {counted(number(facts, 'sequences'), 'sequence')}, "
        f"{counted(number(facts, 'tokens'), 'token')}, sha256 "
    )
    why = [f"; {count(many)} left to the format because {reason}" for reason, many in left.items()]
    notes = [f"; {note}" for note in texts(facts, "notes")]
    return [said, _digest(facts, "tokens_sha256"), *why, *notes]


def _published(receipts: list[Facts]) -> Markup | None:
    if not receipts:
        return None
    items = [element("li", *_receipt(receipt)) for receipt in receipts]
    return joined(element("h3", "Published", class_="aside"), element("ul", items, class_="published"))


def _receipt(receipt: Facts) -> list[Child]:
    proof, files = part(receipt, "proof"), part(receipt, "files")
    place = text(receipt, "url") or text(receipt, "destination")
    revision = text(receipt, "revision")
    proven = f"; {counted(number(proof, 'files'), 'file')} read back" if proof else ""
    rows = [[code(name), _digest(files, name)] for name in files]
    columns = (Column("file"), Column("sha256"))
    name = text(receipt, "artifact")
    return [
        joined(code(name), " to ", code(place), f", {revision}" if revision else None),
        joined(", commit ", _digest(receipt, "commit"), proven),
        folded("Files", table(f"Published files of {name} at {place}", columns, rows)) if rows else None,
    ]
