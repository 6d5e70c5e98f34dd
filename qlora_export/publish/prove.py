"""Proof that what consumers get is what was released: every sha256, then the model opened and a short drift check.

The sample is the mean NLL over the first few hundred scored tokens, as the report recorded it. The same bytes in the
same runtime give the same number; another machine's sums differ in the last digits only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlora_export.artifact import file_facts, read_artifact
from qlora_export.drift.results import Sample
from qlora_export.drift.statistics import SAMPLE_TOKENS
from qlora_export.drift.tokens import TokenSet, first_windows
from qlora_export.errors import VerifyMismatch
from qlora_export.planning.plan import Plan
from qlora_export.report.run import Proof, Receipt
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.open import open_artifact

TOLERANCE_NATS = 1e-3


def prove_files(folder: Path, files: Mapping[str, str]) -> Proof:
    """Compare every file with its sha256; raises VerifyMismatch naming the first that differs."""
    total = 0
    for name, sha256 in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            raise VerifyMismatch(f"{path}: is missing from what was published", "do not use it; publish again")
        found = file_facts(path)
        if found["sha256"] != sha256:
            raise VerifyMismatch(
                f"{path}: sha256 {found['sha256'][:12]}, released was {sha256[:12]}",
                "do not use it; publish again",
            )
        total += int(found["bytes"])
    return Proof(len(files), total)


def prove_sample(name: str, session: Session, tokens: TokenSet, sample: Sample) -> float:
    """Repeat the recorded sample in an opened model; raises VerifyMismatch when it gives another number."""
    found = mean_nll(session, first_windows(tokens, SAMPLE_TOKENS))
    if not abs(found - sample.nll) <= TOLERANCE_NATS:
        where = f"nats a {tokens.unit[:-1]} over {sample.tokens} {tokens.unit}"
        raise VerifyMismatch(
            f"{name}: {found:.6f} {where}, the release measured {sample.nll:.6f}",
            "the bytes agree: is the runtime of another version, or the machine faulty?",
        )
    return found


def mean_nll(session: Session, tokens: TokenSet) -> float:
    """Mean NLL of the scored tokens in nats."""
    losses: list[float] = []
    for window in tokens.windows:
        rows = session.log_probabilities(window.fed)
        targets = np.array(window.tokens)[list(window.scored)]
        losses += (-rows[list(window.rows), targets]).astype(np.float64).tolist()
    return float(np.mean(losses))


def prove(receipt: Receipt, fetched: Path, plan: Plan, sample: Sample | None, tokens: TokenSet | None) -> Proof:
    """Compare what was fetched with the receipt, open it, and repeat the sample where one was measured."""
    folder = fetched / receipt.prefix
    proof = prove_files(folder, receipt.files)
    if sample is None or tokens is None:
        return proof
    with open_artifact(read_artifact(folder), plan) as session:
        found = prove_sample(receipt.artifact, session, tokens, sample)
    return replace(proof, sample_tokens=sample.tokens, nll=found, nll_released=sample.nll)
