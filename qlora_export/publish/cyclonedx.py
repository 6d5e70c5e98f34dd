"""bom.cdx.json: the bill of materials of a published model, CycloneDX 1.6.

    metadata.component   the model: its files with hashes, licence, ancestors (base, adapters), a modelCard with
                         perplexity and mean KL of each artifact, and the chat template's hash as a property
    metadata.tools       this tool

The serial number is the UUIDv5 of the content: the same release gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from qlora_export._version import __version__
from qlora_export.artifact import MANIFEST_NAME, FileFacts
from qlora_export.drift.gate import Z_95
from qlora_export.publish.origins import ADAPTER_DIGEST, Origin, origins

METRICS = ("perplexity", "mean_kl", "same_top1", "gain_kept")
TEMPLATE_SUFFIX = ".jinja"
NO_LICENSE = ("", "unknown")
SPDX_IDS = (
    "AFL-3.0", "AGPL-3.0", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear",
    "BSL-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
    "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0",
    "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0",
    "C-UDA-1.0", "ECL-2.0", "EPL-1.0", "EPL-2.0", "EUPL-1.1", "EUPL-1.2", "GFDL-1.3-or-later", "GPL-2.0", "GPL-3.0",
    "ISC", "LGPL-2.1", "LGPL-3.0", "LPPL-1.3c", "MIT", "MPL-2.0", "MS-PL", "NCSA", "ODbL-1.0", "OFL-1.1", "OSL-3.0",
    "PDDL-1.0", "PostgreSQL", "Unlicense", "WTFPL", "Zlib",
)  # fmt: skip
SPDX = {name.lower(): name for name in SPDX_IDS}


def bill_of_materials(
    name: str,
    version: str,
    files: FileFacts,
    manifests: Sequence[Mapping[str, Any]],
    license_id: str,
    report: Mapping[str, Any],
) -> bytes:
    """Content of bom.cdx.json of the model `name`; `license_id` is the Hub's word, `report` the published one."""
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "hashes": [_hash(facts["sha256"]) for path, facts in sorted(files.items()) if _name(path) == MANIFEST_NAME],
        "licenses": _licenses(license_id),
        "pedigree": {"ancestors": [_ancestor(origin, n) for n, origin in enumerate(origins(manifests), 1)]},
        "components": [_file(path, facts["sha256"]) for path, facts in sorted(files.items())],
        "modelCard": {
            "modelParameters": {"task": "text-generation"},
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(manifests, report))},
        },
        "properties": list(_properties(files, manifests, report)),
    }
    bom: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "qlora-export", "version": __version__}]},
            "component": {key: value for key, value in model.items() if value},
        },
    }
    bom["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bom, sort_keys=True)).urn
    return json.dumps(bom, indent=2).encode() + b"\n"


def _metrics(manifests: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The measured numbers of the published artifacts with their 95 % intervals; the slice is the artifact's name."""
    drifts = {item["name"]: item.get("drift") or {} for item in report.get("artifacts", ())}
    for artifact in (manifest["name"] for manifest in manifests):
        for metric in METRICS:
            value = drifts.get(artifact, {}).get(metric)
            if value is None:
                continue
            found = {"type": metric, "value": repr(float(value)), "slice": artifact}
            if (stderr := drifts[artifact].get(f"{metric}_stderr")) is not None:
                reach = Z_95 * stderr
                found["confidenceInterval"] = {"lowerBound": repr(value - reach), "upperBound": repr(value + reach)}
            yield found


def _properties(
    files: FileFacts, manifests: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """What CycloneDX has no field for."""
    yield _property("hashes", f"sha256 of each artifact's {MANIFEST_NAME}, which lists its files")
    for path, facts in sorted(files.items()):
        if path.endswith(TEMPLATE_SUFFIX):
            yield _property(f"chat-template.sha256:{path}", facts["sha256"])
    if report.get("tokens"):
        yield _property("drift-tokens.sha256", report["tokens"]["sha256"])
    for manifest in manifests:
        yield _property(f"format:{manifest['name']}", manifest["format"])


def _ancestor(origin: Origin, number: int) -> dict[str, Any]:
    """A source as a component; `number` keeps two of one name apart."""
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"ancestor-{number}",
        "name": origin.repository or origin.name,
        "version": origin.commit,
        "purl": origin.package_url,
        "components": [_file(name, sha256, f"ancestor-{number}/") for name, sha256 in origin.files],
        "properties": [_property("role", origin.role)],
    }
    if origin.sha256:
        component["hashes"] = [_hash(origin.sha256)]
        component["properties"].append(_property("hashes", ADAPTER_DIGEST))
    if origin.weight is not None:
        component["properties"].append(_property("weight", repr(origin.weight)))
    return {key: value for key, value in component.items() if value}


def _file(path: str, sha256: str, below: str = "file:") -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"{below}{path}", "name": path, "hashes": [_hash(sha256)]}


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _licenses(license_id: str) -> list[dict[str, Any]]:
    """An SPDX id where the Hub's name is one; else the name, as for licences of their own such as llama3.2."""
    if license_id.lower() in NO_LICENSE:
        return []
    known = SPDX.get(license_id.lower())
    return [{"license": {"id": known} if known else {"name": license_id}}]


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": f"qlora-export:{name}", "value": value}


def _name(path: str) -> str:
    return PurePosixPath(path).name
