"""What a run came to, and what every report needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from qlora_export.artifact import Artifact
from qlora_export.drift.ledger import Ledger
from qlora_export.errors import ExitCode
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import DriftRecipe
from qlora_export.types import Provenance


@dataclass(frozen=True)
class RunFacts:
    """What a report says beside numbers; `rounded` names the artifacts that hold the delta in quantised weights."""

    recipe_digest: str | None
    reference: str
    reference_name: str
    training: Provenance | None
    drift: DriftRecipe | None
    assumptions: tuple[str, ...]
    rounded: frozenset[str] = field(default_factory=frozenset)

    @property
    def compared_with(self) -> str:
        """What drift is measured from, in words."""
        return "the model" if self.training is None else "the model that was trained"


class Reported(Protocol):
    """A run, or a check of a folder that no run of ours made."""

    @property
    def facts(self) -> RunFacts:
        """What is said beside numbers."""
        ...

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What exists."""
        ...

    @property
    def ledger(self) -> Ledger | None:
        """What was measured."""
        ...

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What was published."""
        ...

    @property
    def failure(self) -> ExitCode | None:
        """The exit code of a publication that failed."""
        ...


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

    @property
    def facts(self) -> RunFacts:
        """What is said of the plan."""
        plan = self.plan
        rounded = [item.name for item in plan.artifacts if item.form.quantises and not item.form.keeps_adapter]
        return RunFacts(
            recipe_digest=plan.recipe.digest,
            reference="4-bit base with live adapter" if plan.adapter else "the model itself",
            reference_name="as trained" if plan.adapter else "the model",
            training=plan.live_training.provenance if plan.adapter else None,
            drift=plan.recipe.drift,
            assumptions=tuple(plan.assumptions),
            rounded=frozenset(rounded),
        )


@dataclass(frozen=True)
class Checked:
    """A folder that was measured against a model, without a recipe."""

    facts: RunFacts
    artifacts: tuple[Artifact, ...]
    ledger: Ledger | None
    receipts: tuple[Receipt, ...] = ()
    failure: ExitCode | None = None


@dataclass(frozen=True)
class Proof:
    """A publication as a consumer found it: files whose sha256 agreed, and the sample's NLL when opened there."""

    files: int
    bytes: int
    sample_tokens: int = 0
    nll: float | None = None
    nll_released: float | None = None


@dataclass(frozen=True)
class Receipt:
    """Where an artifact went, as which commit, and the digest of what was read back.

    On the Hub also: the page's `url`, the `revision` that names the commit, the artifact's folder as `prefix`, whether
    anything `changed`, and the `transport` of its weights, `xet` or `lfs`.
    """

    artifact: str
    destination: str
    commit: str
    files: Mapping[str, str]
    url: str | None = None
    revision: str | None = None
    prefix: str = ""
    changed: bool = True
    transport: str | None = None
    proof: Proof | None = None
