"""From what a recipe names to a folder: a path, a folder of the Hub's local cache, or a Hub id with a revision.

    runs/7/checkpoint-900 · ~/.cache/huggingface/hub/models--acme--bot · acme/bot · acme/bot@4e20de3

A Hub id is fetched in two steps, so that what cannot be merged is refused before any weight is downloaded: first the
small files, then, when the headers were looked at, the weights. huggingface_hub keeps both in its cache, resumes, and
works offline with what is there. Whatever a branch names is pinned by the commit it stood at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, InputError, NotAuthorised, RemoteProblem
from qlora_export.sources.checkpoint import SHARD_NAME
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import TensorSpec

HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
CACHE_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL_FILES = ["README.md", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICEN*", "NOTICE*", "USE_POLICY*"]
WEIGHT_FILES = ["*.safetensors"]


def hub_id(text: str, folder: Path) -> tuple[str, str | None] | None:
    """Repository and revision of a Hub id; None for what is a path, or could be one."""
    found = HUB_ID.fullmatch(text)
    path = folder / Path(text).expanduser()
    if found is None or path.exists() or path.parent.exists() or text.startswith((".", "~")):
        return None
    return found["repository"], found["revision"]


def local_folder(text: str, folder: Path) -> Path:
    """The folder that a path names; of a repository in the Hub's cache, the snapshot that `main` stood at."""
    path = folder / Path(text).expanduser()
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or CACHE_FOLDER.fullmatch(path.name) is None:
        return path
    reference = path / "refs" / "main"
    found = sorted(snapshots.iterdir())
    if reference.is_file():
        found = [snapshots / reference.read_text(encoding="utf-8").strip()]
    if len(found) != 1 or not found[0].is_dir():
        raise InputError(f"{path}: {len(found)} snapshots, none of them main", "name one below `snapshots`")
    return found[0]


def identity(folder: Path) -> str:
    """`owner/name@commit` of a snapshot in the Hub's cache, else the folder's own name."""
    place = folder.resolve()
    found = CACHE_FOLDER.fullmatch(place.parent.parent.name)
    if place.parent.name == "snapshots" and found is not None:
        return f"{found['owner']}/{found['name']}@{place.name}"
    return place.name


def hub_id_of_base(stated: str | None, folder: Path) -> str | None:
    """`owner/name` of a base: as it was stated, else that of its snapshot in the Hub's cache."""
    name = stated or identity(folder)
    repository, _, _ = name.partition("@")
    return repository if "/" in repository else None


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache."""
    _, _, revision = identity(folder).partition("@")
    return revision if COMMIT.fullmatch(revision) else None


def fetch_small_files(repository: str, revision: str | None) -> Path:
    """Everything of a repository but its weights, in the Hub's cache; raises when it is not there or not reachable."""
    return _fetch(repository, revision, SMALL_FILES)


def fetch_weights(repository: str, commit: str) -> Path:
    """The safetensors files of a commit beside its small files."""
    return _fetch(repository, commit, [*SMALL_FILES, *WEIGHT_FILES])


def remote_tensors(repository: str, commit: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a repository by their headers, read over the network; they are not in the folder yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = _asked(repository, lambda: HfApi().get_safetensors_metadata(repository, revision=commit))
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"{repository}@{commit}: no safetensors weights: {first}", "only safetensors are read"
        ) from None
    tensors = {}
    for name, file in sorted(metadata.files_metadata.items()):
        if SHARD_NAME.fullmatch(name) is None:
            raise InputError(f"{repository}@{commit}: weight file {name!r} lies in a folder", "is this a model?")
        for tensor, info in file.tensors.items():
            spec = TensorSpec(tensor, info.dtype, tuple(info.shape))
            tensors[tensor] = StoredTensor(spec, folder / name, info.data_offsets[0])
    return tensors


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return str(snapshot_download(repository, revision=revision, allow_patterns=patterns))

    return Path(_asked(repository, fetch))


def _asked(repository: str, ask: Any) -> Any:
    """What the Hub answers, its failures as ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    except GatedRepoError:
        raise NotAuthorised(
            f"{repository}: access has to be granted", "accept its terms on the Hub, and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repository}: the Hub has no such revision", "give a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{repository}: no such folder, and the Hub has no such model that this token may see",
            "check the name; for a private model set HF_TOKEN",
        ) from None
    except LocalEntryNotFoundError:
        raise EnvironmentProblem(
            f"{repository}: not in the local cache, and the Hub cannot be reached",
            "check the network, or give a folder",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        if status in (401, 403):
            raise NotAuthorised(
                f"{repository}: the Hub answers {status}", "set HF_TOKEN to a valid token that may read it"
            ) from None
        raise RemoteProblem(f"{repository}: the Hub answers {status}", "run the same command again later") from None
