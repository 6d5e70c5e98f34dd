"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.contracts import Artifact, Receipt
from qlora_export.drift.ledger import Ledger
from qlora_export.errors import ExitCode
from qlora_export.planning import Plan


@dataclass(frozen=True)
class Run:
    """The plan, the artifacts that exist, their ledger when measured, the receipts when published.

    `failure` is the exit code of a publication that failed.
    """

    plan: Plan
    artifacts: tuple[Artifact, ...] = ()
    ledger: Ledger | None = None
    receipts: tuple[Receipt, ...] = ()
    failure: ExitCode | None = None
