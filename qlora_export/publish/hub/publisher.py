"""The publisher `hub:OWNER/NAME[@BRANCH]`: what is asked of the child process, in which order.

    require_ready   token, repositories, visibility            before any work
    publish         look, stage, lint, create, upload, commit, read the tree back
    fetch           the pinned commit into an empty cache      for the proof
    conclude        the version's tag, the collection          only then

All objects of all repositories are uploaded before the first commit is made.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_export.drift.results import Verified
from qlora_export.errors import Refused, RemoteConflict, UsageError
from qlora_export.publish.base import Account
from qlora_export.publish.hub.destination import Place, places_of
from qlora_export.publish.hub.job import (
    CARD_PATH,
    PROVENANCE_PATH,
    REPORT_PATH,
    SIGNATURE_PATH,
    TargetState,
    Upload,
    as_data,
    seen_from,
)
from qlora_export.publish.hub.process import Client, run_job
from qlora_export.publish.model_signature import require_signer
from qlora_export.publish.stage import FOLDER_NAME, Publication, signer_of, stage, staging_folder
from qlora_export.publish.staged_folder import Staged
from qlora_export.recipe.config import PublishRecipe, Recipe
from qlora_export.report.run import Receipt

TEXTS = (CARD_PATH, PROVENANCE_PATH, REPORT_PATH, SIGNATURE_PATH)
CLASSIC = {"HF_HUB_DISABLE_XET": "1"}


def open_hub(recipe: Recipe, out: Path, environment: Mapping[str, str]) -> HubPublisher:
    """The publisher of a recipe."""
    publish = recipe.publish
    if publish is None:
        raise UsageError("the recipe has no publish.to", "add `publish: {to: hub:OWNER/NAME}`")
    return HubPublisher(recipe, publish, out, Client(environment, publish.timeout_seconds))


class HubPublisher:
    """Publishes to the endpoint that the client's environment names."""

    def __init__(self, recipe: Recipe, publish: PublishRecipe, out: Path, client: Client) -> None:
        self._recipe = recipe
        self._publish = publish
        self._out = out
        self._client = client
        self._places = places_of(publish, recipe.artifacts)

    def require_ready(self, forbidden: Sequence[Path]) -> None:
        """Raise unless the endpoint knows this token, and repositories and collection are as the recipe needs them."""
        if (signer := signer_of(self._recipe)) is not None:
            require_signer(signer)
        run_job(self._client, "authorise", collection=self._publish.collection)
        self._look(self._places)

    def require_account(self, account: Account) -> None:
        """Raise UsageError without a Hub id of the base, Refused without a licence."""
        if account.base_id is None:
            raise UsageError(
                "the base is a folder, and a model card names its base by a Hub id", "add base_id: OWNER/NAME"
            )
        if not (self._publish.card.license or account.base_license):
            raise Refused(
                "the base states no licence, and a release needs one",
                "add publish.card.license, as in `card: {license: apache-2.0}`",
            )

    def publish(self, verified: Sequence[Verified], account: Account) -> list[Receipt]:
        """Stage, lint, upload, commit and read back; where the Hub holds this very publication, nothing is sent.

        The recipe's deadline starts here, and holds for the proof and the version too.
        """
        if not verified:
            return []
        if (seconds := self._publish.deadline_seconds) is not None:
            self._client = replace(self._client, deadline=time.monotonic() + seconds)
        places = [place for place in self._places if any(item.artifact.name in place.prefixes for item in verified)]
        publications = [self._publication(place, seen, verified, account) for place, seen in self._look(places)]
        staged = [stage(item, self._out) for item in publications]
        targets = [as_data(item.place.target) for item in publications]
        created = run_job(self._client, "create", targets=targets)
        uploads = [
            self._upload(item, lies, head)
            for item, lies, head in zip(publications, staged, created["heads"], strict=True)
        ]
        answer = run_job(self._sender(created["xet"]), "publish", uploads=[as_data(upload) for upload in uploads])
        transport = "xet" if created["xet"] else "lfs"
        return [
            receipt
            for item, committed in zip(publications, answer["committed"], strict=True)
            for receipt in _receipts(item, committed, transport)
        ]

    @contextmanager
    def fetch(self, receipt: Receipt) -> Iterator[Path]:
        """The commit, downloaded into an empty cache that is gone afterwards."""
        cache = self._out / FOLDER_NAME / "proof"
        if cache.exists():
            shutil.rmtree(cache)
        try:
            answer = run_job(
                self._sender(receipt.transport == "xet"),
                "pull",
                repository=receipt.destination,
                revision=receipt.commit,
                cache=str(cache),
            )
            yield Path(answer["folder"])
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def conclude(self, receipts: Sequence[Receipt]) -> None:
        """Tag the commits with the recipe's version, if it has one, and list the repositories in its collection."""
        if not receipts:
            return
        commits = [{"repository": receipt.destination, "commit": receipt.commit} for receipt in receipts]
        version = self._publish.version if self._publish.mode == "commit" else None
        run_job(self._client, "name", commits=commits, version=version, collection=self._publish.collection)
        for place in self._places:
            shutil.rmtree(staging_folder(self._out, place), ignore_errors=True)

    def _look(self, places: Sequence[Place]) -> list[tuple[Place, TargetState]]:
        targets = [as_data(place.target) for place in places]
        answer = run_job(self._client, "look", targets=targets, texts=TEXTS)
        return list(zip(places, map(seen_from, answer["seen"]), strict=True))

    def _publication(
        self, place: Place, seen: TargetState, verified: Sequence[Verified], account: Account
    ) -> Publication:
        chosen = [item for item in verified if item.artifact.name in place.prefixes]
        publication = Publication(place, seen, chosen, self._recipe, account)
        tagged = next((item for item in seen.candidates if item.revision == place.target.version), None)
        if tagged is not None and publication.held() != tagged:
            raise RemoteConflict(
                f"{place.target.repository}: the tag {tagged.revision} names another release ({tagged.commit[:12]})",
                "a version never changes: publish under another version",
            )
        return publication

    def _upload(self, item: Publication, staged: Staged, head: str) -> Upload:
        target, held = item.place.target, item.held()
        version = f" {target.version}" if target.version else ""
        names = ", ".join(sorted(artifact.name for artifact in item.artifacts.values()))
        return Upload(
            target=target,
            folder=str(staged.folder),
            files=staged.files,
            prefixes=tuple(item.artifacts),
            parent=held.commit if held else item.seen.head or head,
            revision=held.revision if held else target.branch,
            title=f"Release{version}: {names}",
            description=f"Invocation {item.invocation}",
            journal=str(staged.folder.with_name(f"{staged.folder.name}.ndjson")),
        )

    def _sender(self, xet: bool) -> Client:
        """The client with classic LFS where the endpoint has no xet."""
        if xet:
            return self._client
        return replace(self._client, environment={**self._client.environment, **CLASSIC})


def _receipts(item: Publication, committed: Mapping[str, Any], transport: str) -> list[Receipt]:
    """One receipt for every artifact of a repository."""
    return [
        Receipt(
            artifact=artifact.name,
            destination=committed["repository"],
            commit=committed["commit"],
            files=artifact.digests,
            url=committed["url"],
            revision=committed["revision"],
            prefix=prefix,
            changed=committed["changed"],
            transport=transport,
        )
        for prefix, artifact in item.artifacts.items()
    ]
