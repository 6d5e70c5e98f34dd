"""Everything of one repository in one local folder, before a byte of it is uploaded.

    OUT/.publication/OWNER--NAME@BRANCH/        hard links to the artifact's files, copies of a graph's data; card,
                                                report, provenance, sums
    OUT/.publication/OWNER--NAME@BRANCH.ndjson  what has been sent

A publication is told by its invocation: a digest over manifests, where they lie, the recipe, and the tool's version.
Where the Hub already holds that invocation, the documents are made from the report that lies there, so that publishing
again changes no byte, whatever a second measurement on another machine gave.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export._version import __version__
from qlora_export.artifact import MANIFEST_NAME, Artifact, FileFacts, file_facts
from qlora_export.drift.results import Verified
from qlora_export.errors import PlanRefused
from qlora_export.publish.base import Account
from qlora_export.publish.card import CardFacts, CardItem, make_card
from qlora_export.publish.checksums import checksums
from qlora_export.publish.cyclonedx import bill_of_materials
from qlora_export.publish.hub.destination import Place
from qlora_export.publish.hub.job import (
    BOM_PATH,
    CARD_PATH,
    CHECKSUMS_PATH,
    EDITED_BY_PEOPLE,
    PROVENANCE_PATH,
    REPORT_PATH,
    SIGNATURE_PATH,
    PublishedRevision,
    TargetState,
)
from qlora_export.publish.lint import lint
from qlora_export.publish.model_signature import sign, signature_holds
from qlora_export.publish.provenance import invocation_of, provenance
from qlora_export.publish.public_report import public_recipe, public_report
from qlora_export.publish.signers import Signer, parse_signer
from qlora_export.publish.staged_folder import Staged
from qlora_export.recipe.config import CardRecipe, Recipe
from qlora_export.tensors.external_data import DATA_NAME

FOLDER_NAME = ".publication"
IGNORED_BY_SIGNATURE = (*EDITED_BY_PEOPLE, SIGNATURE_PATH)


@dataclass(frozen=True)
class Publication:
    """What is to be published at one place, and what is there already."""

    place: Place
    seen: TargetState
    verified: Sequence[Verified]
    recipe: Recipe
    account: Account

    @property
    def license(self) -> str | None:
        """The stated licence, else the base's."""
        return self.settings.license or self.account.base_license

    @property
    def settings(self) -> CardRecipe:
        """What the recipe says for the card."""
        return self.recipe.publish.card if self.recipe.publish else CardRecipe()

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts by where they lie in the repository."""
        return {self.place.prefixes[item.artifact.name]: item.artifact for item in self.verified}

    @property
    def told(self) -> dict[str, Any]:
        """The recipe as it is published: without machine paths, and without where it is published to."""
        return {key: value for key, value in public_recipe(self.recipe).items() if key != "publish"}

    @property
    def invocation(self) -> str:
        """sha256 that tells this publication from every other."""
        facts = {
            "version": __version__,
            "recipe": self.told,
            "card": self.settings.model_dump(mode="json"),
            "license": self.license,
            "manifests": {prefix: item.manifest_sha256 for prefix, item in sorted(self.artifacts.items())},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def held(self) -> PublishedRevision | None:
        """The revision on the Hub that already has this invocation."""
        for found in self.seen.candidates:
            if invocation_of(found.texts.get(PROVENANCE_PATH, "").encode()) == self.invocation:
                return found
        return None


def stage(publication: Publication, out: Path) -> Staged:
    """Lay everything out and lint it; raises PlanRefused with every finding."""
    folder = staging_folder(out, publication.place)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    files = _link_artifacts(folder, publication.artifacts)
    _write_documents(folder, publication, files)
    staged = Staged(folder, files, publication.artifacts)
    if problems := lint(staged, publication.license, publication.account.base_license):
        raise PlanRefused(problems)
    return staged


def staging_folder(out: Path, place: Place) -> Path:
    """Where the files of a place are laid out."""
    name = f"{place.target.repository}@{place.target.branch}".replace("/", "--")
    return out / FOLDER_NAME / name


def signer_of(recipe: Recipe) -> Signer | None:
    """Who signs, if anybody; a key's path starts at the recipe's folder. Raises UsageError for what is no signer."""
    stated = recipe.publish.sign if recipe.publish else None
    if stated is None:
        return None
    kind, colon, path = stated.partition(":")
    return parse_signer(f"key:{recipe.path(path)}" if kind == "key" and colon else stated)


def _link_artifacts(folder: Path, artifacts: Mapping[str, Artifact]) -> FileFacts:
    files: FileFacts = {}
    for prefix, artifact in artifacts.items():
        facts = {**artifact.manifest["files"], MANIFEST_NAME: file_facts(artifact.path / MANIFEST_NAME)}
        for name, fact in facts.items():
            place = _copy if DATA_NAME.fullmatch(name.rpartition("/")[2]) else _link
            place(artifact.path / name, folder / prefix / name)
            files[f"{prefix}{name}"] = fact
    return files


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """The bytes once more: ONNX Runtime opens no data that has a second name, which a failed run may leave behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target, follow_symlinks=False)


def _write_documents(folder: Path, publication: Publication, files: FileFacts) -> None:
    """Report, provenance, bill of materials, checksums, card and signature; adds each to `files`."""
    held = publication.held()
    report = _report(publication, held)
    manifests = [item.manifest for item in publication.artifacts.values()]
    artifact_files = dict(files)
    repository = publication.place.target.repository
    documents = {
        REPORT_PATH: json.dumps(report, indent=2).encode() + b"\n",
        PROVENANCE_PATH: provenance(artifact_files, manifests, publication.told, publication.invocation),
        BOM_PATH: bill_of_materials(
            repository, publication.invocation, artifact_files, manifests, publication.license or "", report
        ),
    }
    for path, content in documents.items():
        _write(folder, path, content, files)
    _write(folder, CHECKSUMS_PATH, checksums(files), files)
    _write(folder, CARD_PATH, _card(publication, held, report).encode(), files)
    _sign(folder, publication, held, files)


def _report(publication: Publication, held: PublishedRevision | None) -> dict[str, Any]:
    """The report to publish: the one on the Hub where it is of this invocation, else this run's."""
    if held is not None:
        with suppress(KeyError, ValueError):
            found: dict[str, Any] = json.loads(held.texts[REPORT_PATH])
            return found
    return public_report(publication.account.report)


def _card(publication: Publication, held: PublishedRevision | None, report: Mapping[str, Any]) -> str:
    target = publication.place.target
    there = held or next((item for item in publication.seen.candidates if item.revision == target.branch), None)
    items = tuple(
        CardItem(item.artifact, item.drift, publication.place.prefixes[item.artifact.name])
        for item in publication.verified
    )
    facts = CardFacts(
        repository=target.repository,
        items=items,
        base_id=publication.account.base_id or "",
        license=publication.license or "",
        settings=publication.settings,
        report=report,
        recipe=publication.told,
    )
    return make_card(facts, there.texts.get(CARD_PATH) if there else None)


def _sign(folder: Path, publication: Publication, held: PublishedRevision | None, files: FileFacts) -> None:
    """Sign what lies there; a signature that the Hub holds and that still fits is kept, since each is another one."""
    signer = signer_of(publication.recipe)
    if signer is None:
        return
    path, ignored = folder / SIGNATURE_PATH, [folder / name for name in IGNORED_BY_SIGNATURE]
    if held is not None and SIGNATURE_PATH in held.texts:
        path.write_text(held.texts[SIGNATURE_PATH], encoding="utf-8")
        if signature_holds(folder, path, signer, ignored):
            files[SIGNATURE_PATH] = file_facts(path)
            return
        path.unlink()
    sign(folder, signer, path, ignored)
    files[SIGNATURE_PATH] = file_facts(path)


def _write(folder: Path, path: str, content: bytes, files: FileFacts) -> None:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    files[path] = file_facts(target)
