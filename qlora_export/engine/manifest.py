"""The manifest of a finished folder: every file with size and sha256, what it was made from, and by what.

`manifest.json` is written last and holds no time and no path of the machine, so the same plan gives the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import numba
import numpy as np

from qlora_export._version import __version__
from qlora_export.artifact import FileFacts
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.sources.locate import identity
from qlora_export.types import TORCH_NAMES


def make_manifest(plan: Plan, artifact: ArtifactPlan, sources: FileFacts, files: FileFacts) -> bytes:
    """Content of manifest.json; `sources` are the base's weight files, `files` the artifact's."""
    manifest = {
        "schema": 1,
        "name": artifact.name,
        "format": artifact.form.name,
        "runtime": "transformers",
        "plan_digest": artifact.digest,
        "recipe_digest": plan.recipe.digest,
        "versions": versions(),
        "onto": artifact.onto,
        "rounding": artifact.rounding.facts,
        **({"calibration": artifact.made.facts} if artifact.made.facts else {}),
        **origin(plan, sources),
        "files": files,
    }
    return manifest_bytes(manifest)


def versions() -> dict[str, str]:
    """What computes."""
    return {
        "qlora_export": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def origin(plan: Plan, base_files: FileFacts) -> dict[str, Any]:
    """What every manifest says of where its artifact comes from."""
    training = plan.live_training
    adapter = plan.adapter
    return {
        "training_quantization": {
            "provenance": training.provenance,
            "quant_type": training.quant_type,
            "block_size": training.block_size,
            "double_quant": training.double_quant,
            "storage_dtype": TORCH_NAMES[training.storage_dtype],
            "compute_dtype": TORCH_NAMES[training.compute_dtype],
        }
        if adapter
        else None,
        "assumptions": list(plan.assumptions),
        "sources": {
            "base": {
                "id": plan.recipe.base_id or identity(plan.checkpoint.folder),
                "headers_sha256": plan.checkpoint.headers_sha256,
                "files": base_files,
            },
            "adapter": {"id": identity(adapter.folder), "sha256": adapter.sha256} if adapter else None,
            "combined_from": [
                {"id": identity(item.adapter.folder), "sha256": item.adapter.sha256, "weight": item.weight}
                for item in plan.opened.combined
            ],
        },
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=2).encode() + b"\n"
