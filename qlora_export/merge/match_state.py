"""What has found its home so far, while an adapter is matched with its base."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qlora_export.errors import ExitCode, Problem
from qlora_export.merge.changes import Change
from qlora_export.merge.module_names import Names
from qlora_export.sources.adapter import Adapter
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles

OTHER_BASE = "was the adapter trained on another base?"
SAVE_AGAIN = "save the adapter again"
DISAGREE = "adapter_config.json and tensors do not agree"


@dataclass
class MatchState:
    """Changes and replacements by the live name of the parameter, changes of experts by their stored names.

    `accounted` names tensors that need no home: equal copies of others.
    """

    adapter: Adapter
    names: Names
    changes: dict[str, list[Change]] = field(default_factory=dict)
    stored_changes: dict[str, list[Change]] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    accounted: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, hint: str = OTHER_BASE) -> None:
        """Note what does not fit."""
        self.problems.append(Problem(ExitCode.BAD_INPUT, f"{self.adapter.weights}: {message}", hint))

    def stored_shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a parameter that is stored in one tensor, as it is stored."""
        places = self.names.parameter(parameter)
        if len(places) != 1 or places[0].window is not None:
            return None
        return self.names.checkpoint.weights[places[0].tensor].spec.shape

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape [out, in] of a parameter or of its replacement; of a tied head, that of the embedding."""
        if parameter in self.replaced:
            return self.replaced[parameter].spec.shape
        if (shape := self.stored_shape(parameter)) is not None:
            places = self.names.parameter(parameter)
            return shape[::-1] if places[0].tensor in self.names.input_major else shape
        if self.names.tied and parameter == f"{self.names.head}.weight":
            embedding = f"{self.names.embedding}.weight"
            return self.shape(embedding)
        return None

    def fits(self, tensor: StoredTensor, needed: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape that base and rank need; if not, that is noted."""
        if tensor.spec.shape != needed:
            self.problem(f"tensor {tensor.spec.name} is {list(tensor.spec.shape)}, the base and r need {list(needed)}")
            return False
        return True

    def twice(self, tensor: StoredTensor) -> None:
        """Note a tensor whose other spelling holds something else."""
        self.problem(f"tensor {tensor.spec.name} is there twice under two spellings", SAVE_AGAIN)

    def account(self, tensor: StoredTensor) -> None:
        """Take note of a tensor that another stands for."""
        self.accounted.add(tensor.spec.name)


def transposed_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two factors hold the same values, one of them transposed."""
    with SourceFiles() as files:
        return np.array_equal(files.values(first), files.values(second).T)
