"""What a publisher is: it takes what the gate verified, and returns receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_export.drift.results import Verified
from qlora_export.report.run import Receipt


@dataclass(frozen=True)
class Account:
    """What a publication tells beside its artifacts: the report, and the base's Hub id and licence where known."""

    report: Mapping[str, Any]
    base_id: str | None = None
    base_license: str | None = None


class Publisher(Protocol):
    """Brings verified artifacts to their users, once and whole."""

    def require_ready(self, forbidden: Sequence[Path]) -> None:
        """Raise when the destination cannot take anything, or lies in one of these folders; before any work."""
        ...

    def require_account(self, account: Account) -> None:
        """Raise when what is known of the base is not enough to publish; before anything is built."""
        ...

    def publish(self, verified: Sequence[Verified], account: Account) -> list[Receipt]:
        """Publish all or none, read back, and say where; publishing the same bytes again changes nothing."""
        ...

    def fetch(self, receipt: Receipt) -> AbstractContextManager[Path]:
        """The folder that a consumer of the artifact gets, for as long as it is looked at."""
        ...

    def conclude(self, receipts: Sequence[Receipt]) -> None:
        """Give the proven publications their version."""
        ...
