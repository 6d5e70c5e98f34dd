"""The safetensors files of a repository: headers, shards and their index, and no value that is NaN or infinite.

The files of one directory belong together: `model.safetensors`, or `model-0000k-of-0000n.safetensors` with
`model.safetensors.index.json`; the same with `adapter_model`. Headers are parsed by `tensors.header`, which refuses
what is too long, has holes or overlaps. Values are read once, in blocks of 2 MiB, at the speed of the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_export.errors import InputError, Problem, Refused
from qlora_export.publish.lint.contents import Contents, base_of, directory_of
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.lint.values import first_nonfinite
from qlora_export.sources.checkpoint import SHARD_NAME, weight_map
from qlora_export.tensors.header import StoredTensor, read_header
from qlora_export.tensors.reading import SourceFiles

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
NUMBERED = re.compile(r"(?P<stem>model|adapter_model)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
WHOLE = re.compile(r"(model|adapter_model)\.safetensors")
BUILD_AGAIN = "build the artifact again; its files do not belong together"


@dataclass(frozen=True)
class WeightFolder:
    """The safetensors files of one directory by name, each with its tensors; `complete` when all could be parsed."""

    directory: str
    files: Mapping[str, Mapping[str, StoredTensor]]
    complete: bool

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}


def read_weights(contents: Contents) -> tuple[list[WeightFolder], list[Problem]]:
    """The headers of all safetensors files, by directory, and findings about those that cannot be parsed."""
    problems: list[Problem] = []
    found: dict[str, dict[str, Mapping[str, StoredTensor]]] = {}
    broken: set[str] = set()
    for name in sorted(name for name in contents.names if name.lower().endswith(SUFFIX)):
        files = found.setdefault(directory_of(name), {})
        try:
            files[name] = read_header(contents.path(name))
        except InputError as error:
            problems.append(contents.finding("header", name, error))
            broken.add(directory_of(name))
    return [WeightFolder(where, files, where not in broken) for where, files in found.items()], problems


def index_problems(contents: Contents, folder: WeightFolder) -> Iterator[Problem]:
    """Where the shards of a directory, their names and their index do not agree."""
    yield from _doubled(folder)
    indexes = [name for name in contents.beside(folder.directory) if name.endswith(INDEX_SUFFIX)]
    names = [base_of(name) for name in folder.files]
    for name in names:
        if not SHARD_NAME.fullmatch(name) or not (WHOLE.fullmatch(name) or NUMBERED.fullmatch(name)):
            yield finding("index", folder.directory + name, "no loader looks for weights by this name", BUILD_AGAIN)
    if not folder.complete:
        return
    if len(indexes) > 1 or (indexes and any(WHOLE.fullmatch(name) for name in names)):
        yield finding("index", indexes[0], "is not the only way to the weights: loaders do not agree", BUILD_AGAIN)
    elif indexes:
        yield from _against_index(contents, folder, indexes[0])
    elif len(names) > 1 or any(NUMBERED.fullmatch(name) for name in names):
        yield finding("index", next(iter(folder.files)), "is one of several shards that no index names", BUILD_AGAIN)
    yield from _numbers(folder, names)


def value_problems(folder: WeightFolder) -> Iterator[Problem]:
    """One finding for each file with values that are not finite."""
    with SourceFiles() as files:
        for name, tensors in folder.files.items():
            bad = [
                (tensor, place) for tensor in tensors.values() if (place := first_nonfinite(files, tensor)) is not None
            ]
            if bad:
                (tensor, place), more = bad[0], len(bad) - 1
                what = f"tensor {tensor.spec.name} is NaN or infinite at value {place}"
                what += f", and {more} more tensors are somewhere" if more else ""
                yield finding("non-finite", name, what, "train or merge again; such a model answers with noise")


def _doubled(folder: WeightFolder) -> Iterator[Problem]:
    places: dict[str, str] = {}
    for name, tensors in folder.files.items():
        for tensor in tensors:
            first = places.setdefault(tensor, name)
            if first != name:
                yield finding("index", name, f"tensor {tensor} is in {base_of(first)} as well", BUILD_AGAIN)


def _against_index(contents: Contents, folder: WeightFolder, index: str) -> Iterator[Problem]:
    try:
        table = weight_map(contents.path(index))
    except (InputError, Refused) as error:
        yield contents.finding("index", index, error)
        return
    places = {tensor: base_of(name) for name, tensors in folder.files.items() for tensor in tensors}
    for tensor in sorted(set(table) | set(places)):
        if tensor not in places:
            yield finding("index", index, f"names tensor {tensor}, which is in no shard", BUILD_AGAIN)
        elif tensor not in table:
            yield finding("index", index, f"does not name tensor {tensor} of {places[tensor]}", BUILD_AGAIN)
        elif table[tensor] != places[tensor]:
            what = f"says that tensor {tensor} is in {table[tensor]}, it is in {places[tensor]}"
            yield finding("index", index, what, BUILD_AGAIN)
    stated = (contents.table(index, "index") or {}).get("metadata")
    total = stated.get("total_size") if isinstance(stated, Mapping) else None
    found = sum(tensor.bytes for tensors in folder.files.values() for tensor in tensors.values())
    if total != found:
        yield finding("index", index, f"says total_size {total}, the tensors have {found} bytes", BUILD_AGAIN)


def _numbers(folder: WeightFolder, names: list[str]) -> Iterator[Problem]:
    """Shards that their own names count: all of them, and no other."""
    numbered = [match for name in names if (match := NUMBERED.fullmatch(name))]
    found = sorted(int(match["number"]) for match in numbered)
    if numbered and (
        found != list(range(1, int(numbered[0]["count"]) + 1)) or len({match["count"] for match in numbered}) > 1
    ):
        what = f"is one of {int(numbered[0]['count'])} shards by its name, there are numbers {found}"
        yield finding("index", folder.directory + numbered[0].string, what, BUILD_AGAIN)
