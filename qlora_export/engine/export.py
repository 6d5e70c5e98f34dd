"""Run an exporter on a finished dense artifact: into NAME.partial, then manifest, then one rename.

An export is made anew as a whole after a kill: its bytes are the builder's own, and it takes seconds to minutes. The
tokenizer and the licence come from the source artifact byte for byte, whatever the exporter made of them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qlora_export.artifact import MANIFEST_NAME, Artifact, file_facts, read_artifact, verify_artifact
from qlora_export.engine.build import disk_errors, locked
from qlora_export.engine.journal import JOURNAL_NAME, Journal, is_ours
from qlora_export.engine.manifest import manifest_bytes, origin
from qlora_export.engine.partial_folder import remove_partial, sync_folder, write_file
from qlora_export.errors import UsageError
from qlora_export.exporters.base import FinishingExporter
from qlora_export.merge.companion_files import COMPANION_NAME, TOKENIZER_NAME, CompanionFile
from qlora_export.planning.plan import ExportPlan, Plan
from qlora_export.sources.checkpoint import require_contained


def export(plan: Plan, item: ExportPlan, source: Artifact | None, out: Path) -> Artifact:
    """The exported artifact: verified and kept when it is there, else made from `source`, or from the adapter."""
    folder = source.path if source else plan.adapter.folder if plan.adapter else None
    if folder is None:
        raise UsageError(f"artifact {item.name}: nothing to export from", "name an adapter")
    final = out / item.name
    with locked(out):
        if os.path.lexists(final):
            return kept_export(item, source, final)
        partial = out / f"{item.name}.partial"
        if os.path.lexists(partial):
            _remove_ours(partial, item)
        partial.mkdir()
        Journal(partial, item.digest)
        with disk_errors(out, item.bytes):
            item.exporter.export(folder, partial)
            _carry(folder, partial)
            if isinstance(item.exporter, FinishingExporter):
                item.exporter.finish(folder, partial)
            _finish(plan, item, source, partial)
        partial.rename(final)
        sync_folder(out)
        (final / JOURNAL_NAME).unlink()
        return read_artifact(final)


def kept_export(item: ExportPlan, source: Artifact | None, final: Path) -> Artifact:
    """The verified artifact of this export; raises when the folder is anything else."""
    artifact = read_artifact(final)
    made_from = (artifact.manifest["sources"].get("artifact") or {}).get("manifest_sha256")
    if artifact.manifest["plan_digest"] != item.digest or made_from != (source.manifest_sha256 if source else None):
        raise UsageError(
            f"{final}: an artifact of another plan, or made from another {item.source_name}",
            "choose another --out, or remove the folder to export it again",
        )
    (final / JOURNAL_NAME).unlink(missing_ok=True)
    verify_artifact(artifact, artifact.manifest["files"])
    return replace(artifact, reused=True)


def _remove_ours(partial: Path, item: ExportPlan) -> None:
    """Remove what a killed export of this plan left; raises UsageError for anything else."""
    empty = partial.is_dir() and not partial.is_symlink() and not any(partial.iterdir())
    if not empty and not is_ours(partial):
        raise UsageError(f"{partial}: exists and is not left behind by a run of ours", f"move {partial} away")
    if not empty:
        Journal(partial, item.digest)
    remove_partial(partial)


def _carry(folder: Path, partial: Path) -> None:
    """Bring along, byte for byte, what belongs to the weights whatever their kind."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (TOKENIZER_NAME.fullmatch(path.name) or COMPANION_NAME.fullmatch(path.name)):
            write_file(partial, CompanionFile(path.name, require_contained(path)))


def _finish(plan: Plan, item: ExportPlan, source: Artifact | None, partial: Path) -> None:
    """Sync everything and write the manifest last."""
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    facts = {name: file_facts(partial / name) for name in names if name != JOURNAL_NAME}
    for name in facts:
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    base_files = source.manifest["sources"]["base"]["files"] if source else {}
    found = origin(plan, base_files)
    if source is not None:
        found["sources"]["artifact"] = {"name": source.name, "manifest_sha256": source.manifest_sha256}
    manifest = {
        "schema": 1,
        "name": item.name,
        "format": item.exporter.name,
        "runtime": item.exporter.runtime,
        "plan_digest": item.digest,
        "recipe_digest": plan.recipe.digest,
        "exporter": dict(item.exporter.facts()),
        "onto": source.manifest["onto"] if source else "as-trained",
        **found,
        "files": facts,
    }
    write_file(partial, CompanionFile(MANIFEST_NAME, content=manifest_bytes(manifest)))
    sync_folder(partial)
