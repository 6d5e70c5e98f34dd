"""The recipe's section on calibration: which text, how much of it, and in which mixture.

calibration: {text: train.jsonl, sequences: 128}
calibration: {mixture: [{text: train.jsonl, share: 0.5}, {text: general.txt, share: 0.5}], sequences: 256}
calibration: [{text: train.jsonl, share: 0.5}, {text: general.txt, share: 0.5}]      # 128 sequences
calibration: {text: train.jsonl, method: {sweeps: 0}}                                 # faster, less exact
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_SEQUENCES = 128
SHARE_TOLERANCE = 0.005


class CalibrationPart(BaseModel):
    """One text of a mixture, and the share of the sequences that come from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    share: float = Field(1.0, gt=0, le=1)


class CalibrationMethod(BaseModel):
    """Which steps rounding takes; each has a default that paid on the models it was tried on.

    `correction` is how far targets are corrected for inputs of the rounded prefix, from 0 to 1; `sweeps` of coordinate
    descent follow error feedback; `fit_scales` ends with least squares; up to `delta_rounds` make up for a delta that
    rounding shrinks. Tuned rounding takes `tuning_steps`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    correction: float = Field(1.0, ge=0, le=1)
    sweeps: int = Field(2, ge=0)
    fit_scales: bool = True
    delta_rounds: int = Field(3, ge=1)
    tuning_steps: int = Field(150, ge=1)


class CalibrationRecipe(BaseModel):
    """The text that calibrated rounding looks at: one, or a mixture; never the text of drift.

    `sequences` windows of at most `window_tokens` are drawn by `seed`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, min_length=1)
    mixture: tuple[CalibrationPart, ...] = ()
    sequences: int = Field(DEFAULT_SEQUENCES, ge=1)
    window_tokens: int = Field(512, ge=8)
    seed: int = Field(0, ge=0)
    method: CalibrationMethod = CalibrationMethod()

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_list(cls, data: Any) -> Any:
        return {"mixture": data} if isinstance(data, list) else data

    @model_validator(mode="after")
    def _is_one_text_or_a_whole_mixture(self) -> CalibrationRecipe:
        if (self.text is None) == (not self.mixture):
            raise ValueError("name either one text, or a mixture of several")
        names = [part.text for part in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is twice in the mixture: give it one share")
        total = math.fsum(part.share for part in self.parts)
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"the shares of the mixture come to {total:g}, and not to 1")
        return self

    @property
    def parts(self) -> tuple[CalibrationPart, ...]:
        """The texts with their shares, which come to about 1."""
        return self.mixture if self.text is None else (CalibrationPart(text=self.text),)
