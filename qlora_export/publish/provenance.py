"""provenance.json: who made the published files, from what, by which recipe.

An in-toto Statement v1 with the SLSA provenance v1 predicate:

    subject                                         every file with its sha256
    predicate.buildDefinition.externalParameters    the recipe, as told
    predicate.buildDefinition.internalParameters    per artifact: versions, exporter, assumptions
    predicate.buildDefinition.resolvedDependencies  base at its commit, its weight files, the adapters, with digests
    predicate.runDetails.metadata.invocationId      what tells this publication from every other

It holds no time and no path of the machine, so the same release gives the same bytes. It is a claim until it is signed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_export._version import __version__
from qlora_export.artifact import FileFacts
from qlora_export.publish.origins import ADAPTER_DIGEST, Origin, origins
from qlora_export.publish.public_report import without_machine_paths

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILDER = "pkg:pypi/qlora-export"
BUILD_TYPE = f"{BUILDER}#release/v1"
INTERNAL = ("name", "format", "runtime", "onto", "plan_digest", "versions", "exporter", "training_quantization")


def provenance(
    files: FileFacts, manifests: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], invocation: str
) -> bytes:
    """Content of provenance.json about `files`; `recipe` is the one that the public may read."""
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": facts["sha256"]}} for name, facts in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": without_machine_paths(recipe),
                "internalParameters": {"artifacts": without_machine_paths([_internal(item) for item in manifests])},
                "resolvedDependencies": [item for origin in origins(manifests) for item in _resolved(origin)],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"qlora-export": __version__}},
                "metadata": {"invocationId": invocation},
            },
        },
    }
    return json.dumps(statement, indent=2).encode() + b"\n"


def invocation_of(content: bytes) -> str | None:
    """The invocation that a provenance.json records; None when it is not one of ours."""
    try:
        statement = json.loads(content)
        predicate = statement["predicate"]
        ours = (statement["_type"], statement["predicateType"], predicate["buildDefinition"]["buildType"])
        found = predicate["runDetails"]["metadata"]["invocationId"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if ours == (STATEMENT_TYPE, PREDICATE_TYPE, BUILD_TYPE) and isinstance(found, str) else None


def _internal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the user did not say and the tool decided, for one artifact."""
    facts = {key: manifest[key] for key in INTERNAL if manifest.get(key) is not None}
    return {**facts, "assumptions": list(manifest["assumptions"])}


def _resolved(origin: Origin) -> Iterator[dict[str, Any]]:
    """One source as in-toto resource descriptors: itself where it has an address or digest, and each of its files."""
    whole: dict[str, Any] = {"name": origin.name, "annotations": {"role": origin.role}}
    if origin.package_url:
        whole["uri"] = origin.package_url
    if origin.sha256:
        whole["digest"] = {"sha256": origin.sha256}
        whole["annotations"]["digestOf"] = ADAPTER_DIGEST
    elif origin.commit:
        whole["digest"] = {"gitCommit": origin.commit}
    if origin.weight is not None:
        whole["annotations"]["weight"] = origin.weight
    if "uri" in whole or "digest" in whole:
        yield whole
    for name, sha256 in origin.files:
        file: dict[str, Any] = {"name": name, "digest": {"sha256": sha256}}
        if origin.package_url:
            file["uri"] = f"{origin.package_url}#{name}"
        if address := origin.download(name):
            file["downloadLocation"] = address
        yield {**file, "annotations": {"role": origin.role, "of": origin.name}}
