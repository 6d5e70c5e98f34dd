"""Rows of tables as text: a Parquet file, or a split of a data set on the Hub at a stated commit.

    notes.parquet                                       columns `messages`, `text`, or `prompt` and `completion`;
                                                        beside `text` also `label` and `text_pair`
    hub:owner/name@COMMIT#train                         the split `train`
    hub:owner/name@COMMIT#CONFIGURATION/train[:1000]    of a configuration, the first 1,000 rows

The Hub is read with the `datasets` library, which from version 4 runs no code of a data set. It keeps what it fetched
in its cache and works offline with what is there; it fetches a split whole. A commit is asked for, since a branch would
change the text under a recipe that stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_export.errors import (
    EnvironmentProblem,
    ExportError,
    InputError,
    NotAuthorised,
    Refused,
    RemoteProblem,
    UsageError,
)
from qlora_export.sources.text_entries import ROW_HINT, Entry, entry_of

HUB_PREFIX = "hub:"
PARQUET_SUFFIX = ".parquet"
HUB_TEXT = re.compile(
    r"hub:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(?P<commit>[0-9a-f]{40})"
    r"#((?P<configuration>[\w.-]+)/)?(?P<split>[\w.-]+(\[[\d:%-]*\])?)"
)
COLUMNS = ("messages", "text", "prompt", "completion")
BESIDE_TEXT = ("label", "text_pair")
EXTRA_HINT = "pip install 'qlora-export[data]'"


def is_table(name: str) -> bool:
    """Whether a text of this name is read as rows of a table, for which the extra is needed."""
    return name.startswith(HUB_PREFIX) or Path(name).suffix == PARQUET_SUFFIX


def parquet_entries(path: Path) -> tuple[Entry, ...]:
    """The rows of a Parquet file; raises InputError naming the row, EnvironmentProblem without pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EnvironmentProblem(f"{path}: Parquet is read with pyarrow, which is not installed", EXTRA_HINT) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = _known(str(path), file.schema_arrow.names)
            batches = file.iter_batches(columns=columns)
            return tuple(_entries(str(path), (row for batch in batches for row in batch.to_pylist())))
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {_first_line(error)}", "is the file whole?") from None


def hub_entries(name: str) -> tuple[Entry, ...]:
    """The rows of a split on the Hub; raises UsageError for a name without commit or split."""
    found = HUB_TEXT.fullmatch(name)
    if found is None:
        raise UsageError(
            f"{name}: no data set, commit and split",
            "as in hub:owner/name@COMMIT#train, with all 40 digits of the commit",
        )
    # datasets would read a folder of this name instead, whatever its commit.
    if Path(found["repository"]).exists():
        raise UsageError(
            f"{name}: a folder {found['repository']} lies here, and would be read in place of the data set",
            "run from another folder, or name a file of that folder",
        )
    rows = _asked(
        name,
        lambda load: load(
            found["repository"],
            name=found["configuration"],
            revision=found["commit"],
            split=found["split"],
        ),
    )
    return tuple(_entries(name, rows.select_columns(_known(name, rows.column_names))))


def _entries(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    for number, row in enumerate(rows, 1):
        entry = entry_of(row, f"row {number}")
        if entry is None:
            raise InputError(f"{name}: row {number} has neither messages nor text", ROW_HINT)
        yield entry


def _known(name: str, columns: Iterable[str]) -> list[str]:
    present = list(columns)
    known = [column for column in COLUMNS if column in present]
    if not known:
        raise InputError(
            f"{name}: none of the columns {', '.join(COLUMNS)}, only {', '.join(present) or 'none'}",
            "rename the column that holds the text",
        )
    return known + [column for column in BESIDE_TEXT if column in present]


def _asked(name: str, ask: Callable[[Callable[..., Any]], Any]) -> Any:
    """What `datasets` answers, its failures as ours."""
    try:
        import datasets
    except ImportError:
        raise EnvironmentProblem(f"{name}: the Hub's data sets are read with datasets", EXTRA_HINT) from None
    datasets.disable_progress_bars()
    try:
        return ask(datasets.load_dataset)
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise _translated(name, error) from error


def _translated(name: str, error: Exception) -> ExportError:
    from huggingface_hub.errors import HfHubHTTPError

    text = _first_line(error)
    if "gated" in text:
        return NotAuthorised(f"{name}: {text}", "accept its terms on the Hub, and set HF_TOKEN")
    if "scripts are no longer supported" in text:
        return Refused(
            f"{name}: this data set is made by code of its own, which is not run", "look for a copy in Parquet"
        )
    if isinstance(error, ConnectionError):
        return EnvironmentProblem(f"{name}: not in the local cache, and the Hub cannot be reached", "check the network")
    if isinstance(error, HfHubHTTPError):
        return RemoteProblem(f"{name}: {text}", "run the same command again later")
    return InputError(f"{name}: {text}", "check data set, commit, configuration and split")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
