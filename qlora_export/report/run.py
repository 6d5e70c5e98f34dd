"""What a run came to, and what every report needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from qlora_export.contracts import Artifact, Provenance, Receipt
from qlora_export.drift.ledger import Ledger
from qlora_export.errors import ExitCode
from qlora_export.planning import Plan
from qlora_export.recipe import DriftRecipe


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
