"""Verification of a published model, later and by anybody: a commit on the Hub, or a folder.

    SHA256SUMS          what the release consists of; without it, manifest.json
    the tree            on the Hub, the digests of stored objects are compared before anything is downloaded
    the bytes           all files, or a random share of them
    model.sig           against the key or identity that the caller names
    the runtime         every artifact opens; with the text of its drift check, the recorded sample comes out again

Cost: reading (and downloading) the chosen files once, and opening the artifacts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_export import catalog
from qlora_export.artifact import MANIFEST_NAME, Artifact, read_artifact
from qlora_export.drift.protocols import token_set
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.window_sizes import recorded_protocol
from qlora_export.errors import InputError, UsageError, VerifyMismatch
from qlora_export.publish.checksums import read_checksums
from qlora_export.publish.hub.commit import WEIGHTS
from qlora_export.publish.hub.job import CHECKSUMS_PATH, EDITED_BY_PEOPLE, REPORT_PATH, SIGNATURE_PATH
from qlora_export.publish.hub.process import Client, run_job
from qlora_export.publish.model_signature import verify_signature
from qlora_export.publish.prove import prove_files, prove_sample
from qlora_export.publish.signers import parse_verifier
from qlora_export.report.recorded import read_report, recorded_sample
from qlora_export.report.run import Proof
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.locate import hub_id
from qlora_export.sources.text import read_text

UNLISTED = (*EDITED_BY_PEOPLE, CHECKSUMS_PATH, SIGNATURE_PATH)
DO_NOT_USE = "do not use it: it is not what was released"


@dataclass(frozen=True)
class Wanted:
    """What to verify: the share of bytes to read, the text to repeat the sample on, whom the signature must be of."""

    share: float = 1.0
    opens: bool = True
    text: Path | None = None
    signer: str | None = None


@dataclass(frozen=True)
class Verification:
    """What was found to agree."""

    place: str
    commit: str | None
    files: int
    listed: int
    bytes: int
    signature: str
    opened: Mapping[str, Proof] = field(default_factory=dict)


@dataclass(frozen=True)
class _Copy:
    """A local copy with the digests it must have, all of them and those of the files that are here."""

    folder: Path
    expected: Mapping[str, str]
    chosen: Mapping[str, str]
    commit: str | None = None


def verify(place: str, wanted: Wanted, client: Client) -> Verification:
    """Verify `OWNER/NAME[@REVISION]` or a folder; raises VerifyMismatch naming the first file that differs."""
    named = hub_id(place, Path())
    with ExitStack() as stack:
        if named is None:
            copy = _local(Path(place), wanted)
        else:
            copy = stack.enter_context(_remote(named[0], named[1] or "main", wanted, client))
        proof = prove_files(copy.folder, copy.chosen)
        _require_manifests(copy)
        signature = _signature(copy, wanted)
        opened = _opened(copy, wanted) if wanted.opens and copy.chosen == copy.expected else {}
    return Verification(place, copy.commit, proof.files, len(copy.expected), proof.bytes, signature, opened)


def _local(folder: Path, wanted: Wanted) -> _Copy:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "give a folder, or a model on the Hub as OWNER/NAME@REVISION")
    expected = _expected(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in expected and name not in UNLISTED and not name.startswith(".cache/"):
            raise VerifyMismatch(f"{path}: is not part of the release", DO_NOT_USE)
    sizes = {name: (folder / name).stat().st_size for name in expected if (folder / name).is_file()}
    return _Copy(folder, expected, _chosen(expected, sizes, wanted.share))


@contextmanager
def _remote(repository: str, revision: str, wanted: Wanted, client: Client) -> Iterator[_Copy]:
    tree = run_job(client, "listing", repository=repository, revision=revision)
    commit, found = str(tree["commit"]), tree["files"]
    if CHECKSUMS_PATH not in found and MANIFEST_NAME not in found:
        raise InputError(f"{repository}@{revision}: no {CHECKSUMS_PATH}", "was it published by qlora-export?")
    with TemporaryDirectory(prefix="qlora-export-verify-") as cache:

        def pull(names: list[str]) -> Path:
            answer = run_job(client, "pull", repository=repository, revision=commit, cache=cache, files=names)
            return Path(answer["folder"])

        listing = [name for name in (CHECKSUMS_PATH, MANIFEST_NAME) if name in found]
        expected = _expected(pull(listing))
        _require_tree(f"{repository}@{commit[:12]}", found, expected)
        chosen = _chosen(expected, {name: found[name]["bytes"] for name in expected}, wanted.share)
        beside = [name for name in (*UNLISTED, REPORT_PATH) if name in found]
        yield _Copy(pull([*chosen, *beside]), expected, chosen, commit)


def _expected(folder: Path) -> dict[str, str]:
    """sha256 of everything that was released, by its path."""
    if (sums := folder / CHECKSUMS_PATH).is_file():
        return read_checksums(sums.read_bytes())
    if (folder / MANIFEST_NAME).is_file():
        return read_artifact(folder).digests
    raise InputError(f"{folder}: no {CHECKSUMS_PATH} and no {MANIFEST_NAME}", "was it made by qlora-export?")


def _require_tree(place: str, found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, str]) -> None:
    """Compare names, and the digests of stored objects, before anything large is downloaded."""
    for name, sha256 in sorted(expected.items()):
        if name not in found:
            raise VerifyMismatch(f"{place}: {name} is missing", DO_NOT_USE)
        stored = found[name]["sha256"]
        if stored is not None and stored != sha256:
            raise VerifyMismatch(
                f"{place}: {name} has sha256 {stored[:12]}, {CHECKSUMS_PATH} says {sha256[:12]}", DO_NOT_USE
            )
    for name in sorted(set(found) - set(expected) - set(UNLISTED)):
        if WEIGHTS.fullmatch(name.rsplit("/", 1)[-1]) or name.endswith((".py", ".bin", ".pt", ".pkl")):
            raise VerifyMismatch(f"{place}: {name} is not part of the release", DO_NOT_USE)


def _chosen(expected: Mapping[str, str], sizes: Mapping[str, int], share: float) -> dict[str, str]:
    """All files, or at least one and so many at random that they hold the share of all bytes."""
    if share >= 1:
        return dict(expected)
    names = sorted(expected)
    random.SystemRandom().shuffle(names)
    budget = share * sum(sizes.values())
    chosen: dict[str, str] = {}
    for name in names:
        if chosen and budget <= 0:
            break
        chosen[name] = expected[name]
        budget -= sizes.get(name, 0)
    return chosen


def _require_manifests(copy: _Copy) -> None:
    """Raise VerifyMismatch where a manifest and the list of checksums tell of different files."""
    for prefix, artifact in _artifacts(copy.folder, copy.chosen):
        for file, facts in artifact.manifest["files"].items():
            if copy.expected.get(f"{prefix}{file}") != facts["sha256"]:
                place = artifact.path / MANIFEST_NAME
                raise VerifyMismatch(f"{place}: {CHECKSUMS_PATH} has another {prefix}{file}", DO_NOT_USE)


def _artifacts(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Artifact]]:
    """The artifacts whose manifests are among these names, each with its prefix."""
    for name in names:
        if name.rpartition("/")[2] == MANIFEST_NAME:
            yield name.removesuffix(MANIFEST_NAME), read_artifact((folder / name).parent)


def _signature(copy: _Copy, wanted: Wanted) -> str:
    path = copy.folder / SIGNATURE_PATH
    if wanted.signer is None:
        return "there, not checked: name the signer" if path.is_file() else "none"
    if not path.is_file():
        raise VerifyMismatch(f"{path}: there is no signature", "the release was not signed, or the signature was lost")
    if copy.chosen != copy.expected:
        raise UsageError("a signature is over all files", "verify without --sample")
    verify_signature(
        copy.folder, path, parse_verifier(wanted.signer), [copy.folder / name for name in EDITED_BY_PEOPLE]
    )
    return f"good, of {wanted.signer}"


def _opened(copy: _Copy, wanted: Wanted) -> dict[str, Proof]:
    """Open every artifact of the copy in its runtime; adapters on their own have none."""
    artifacts = (artifact for _, artifact in _artifacts(copy.folder, sorted(copy.expected)))
    return {item.name: _open(copy, item, wanted) for item in artifacts if item.runtime in catalog.RUNTIMES}


def _open(copy: _Copy, artifact: Artifact, wanted: Wanted) -> Proof:
    proof = Proof(len(artifact.manifest["files"]), artifact.bytes)
    with load_runtime(artifact.runtime).open(artifact.path) as session:
        if wanted.text is None:
            return proof
        report = read_report(copy.folder / REPORT_PATH)
        sample = recorded_sample(report, artifact.name)
        if sample is None:
            raise InputError(f"{artifact.name}: the report holds no sample", "it was published without a measurement")
        tokens = _tokens(wanted.text, artifact, report)
        found = prove_sample(artifact.name, session, tokens, sample)
        return replace(proof, sample_tokens=sample.tokens, nll=found, nll_released=sample.nll)


def _tokens(text: Path, artifact: Artifact, report: Mapping[str, Any]) -> TokenSet:
    """The tokens of the drift check; raises UsageError when the text gives others."""
    from qlora_export.runtimes.tokenizer import FolderTokenizer

    told = report["tokens"]
    tokens = token_set(read_text(text), FolderTokenizer(artifact.path), recorded_protocol(told), told["limit"])
    if tokens.sha256 != told["sha256"]:
        raise UsageError(
            f"{text}: gives tokens of sha256 {tokens.sha256[:12]}, the release was measured on {told['sha256'][:12]}",
            "give the very text of the drift check, or leave --text out",
        )
    return tokens


def parse_share(text: str) -> float:
    """`5%` or `0.05` as a share; raises UsageError outside of 0 to 1."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {text}: is no share", "as in --sample 5%")
    return share
