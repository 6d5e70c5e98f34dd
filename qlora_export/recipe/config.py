"""The recipe: what a release is made of, as frozen facts from a YAML file.

An unknown key is an error that names the nearest known one. Paths are relative to the recipe's folder. The digest is a
sha256 over the canonical JSON of the facts, so comments and the order of keys do not change it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qlora_export.catalog import PUBLISHERS
from qlora_export.recipe.calibration import CalibrationRecipe
from qlora_export.recipe.protocols import FEWEST_TOKENS
from qlora_export.types import BLOCK_SIZES, FROM_TORCH_NAMES, Onto, OntoChoice, Rounding, TrainingQuantization

DEFAULT_SHARD_BYTES = 5_000_000_000
TraceWhen = Literal["failing", "always", "never"]
Combination = Literal[
    "sum", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
# A format that is settled before anything is planned; see `settling_formats`.
AUTO = "auto"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Yardstick(_Facts):
    """Another artifact of the recipe, and by how much this one may drift further than it.

    `mean_kl` is a difference in nats, `perplexity_ratio` that of the two perplexities.
    """

    artifact: str
    mean_kl: float = Field(1e-3, ge=0)
    perplexity_ratio: float = Field(1.002, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: Any) -> Any:
        return {"artifact": data} if isinstance(data, str) else data


class Limits(_Facts):
    """The gate's limits; None means that a number is reported but not judged."""

    perplexity_ratio: float | None = Field(None, gt=0)
    mean_kl: float | None = Field(None, ge=0)
    same_top1: float | None = Field(None, ge=0, le=1)
    gain_kept: float | None = None
    survival_min: float | None = None
    no_worse_than: Yardstick | None = None

    def over(self, defaults: Limits) -> Limits:
        """These limits, with the gaps filled from `defaults`."""
        stated = {name: getattr(self, name) for name in self.model_fields_set}
        return defaults.model_copy(update=stated)


class Merge(_Facts):
    """Which base the adapter is added to, and how several adapters become one.

    `density` is the fraction of values that pruning keeps, `seed` that of DARE's random pruning. `zero_delta` says what
    becomes of an adapter with factors of zeros, as a part of the model that training never reached leaves them.
    """

    onto: OntoChoice = "as-trained"
    combine: Combination = "sum"
    density: float = Field(0.5, gt=0, le=1)
    majority_sign: Literal["total", "frequency"] = "total"
    svd_rank: int | None = Field(None, ge=1)
    seed: int = 0
    zero_delta: Literal["refuse", "keep"] = "refuse"


class WeightedAdapter(_Facts):
    """One of several adapters and its weight."""

    path: str = Field(min_length=1)
    weight: float = Field(1.0, allow_inf_nan=False)

    @field_validator("weight")
    @classmethod
    def _is_no_zero(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a weight of 0 leaves nothing of the adapter: leave it out")
        return weight

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class Override(_Facts):
    """The format of some modules that differs from the artifact's."""

    format: str
    options: dict[str, str | int | float | bool] = {}

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_format(cls, data: Any) -> Any:
        return {"format": data} if isinstance(data, str) else data


class ArtifactRecipe(_Facts):
    """One artifact to make; without a `rounding`, its format's usual one. `seed` is that of dithering by chance.

    `why` it is made so goes to plan, manifest and card; `format: auto` writes it.
    """

    format: str
    name: str = ""
    rounding: Rounding | None = None
    seed: int = Field(0, ge=0, lt=1 << 63)
    onto: Onto | None = None
    keep: tuple[str, ...] = ()
    overrides: dict[str, Override] = {}
    options: dict[str, str | int | float | bool] = {}
    why: str = ""
    limits: Limits = Limits()
    expect: Literal["pass", "fail"] = "pass"
    on_failure: Literal["stop", "withhold"] = "stop"

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_format(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"format": data}
        if isinstance(data, dict) and not data.get("name"):
            parts = [data.get("format", ""), data.get("rounding")]
            return {**data, "name": "-".join(str(part) for part in parts if part)}
        return data

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not FOLDER_NAME.fullmatch(name) or name.endswith(".partial"):
            raise ValueError(f"{name!r} cannot be the name of a folder")
        return name


class DriftRecipe(_Facts):
    """The text that drift is measured on, and the limits for every artifact that has none of its own.

    The distributions of references are kept in the run folder for the next run, up to `reference_bytes` in all.
    `choices` names a file of questions with answers to choose from, `prompts` one of prompts, each of which every model
    goes on with for `generate_tokens`; `trace` says when layers are compared one by one: where the verdict is no pass,
    always or never. Without a `protocol` it is the usual one of the model: `windows`, or `labels` of a classifier.
    """

    text: str
    protocol: str | None = None
    window_tokens: int | None = Field(None, ge=FEWEST_TOKENS)
    stride_tokens: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    limits: Limits = Limits()
    reference_bytes: int = Field(20_000_000_000, ge=0)
    choices: str | None = Field(None, min_length=1)
    prompts: str | None = Field(None, min_length=1)
    generate_tokens: int = Field(64, ge=1)
    trace: TraceWhen = "failing"


class CardRecipe(_Facts):
    """What the model card says that no file of the run knows; a licence of None is inherited from the base."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class PublishRecipe(_Facts):
    """Where verified artifacts go, as `KIND:PLACE`, and under which version; by default a prefix of their digest.

    `{name}` and `{format}` in `to` and `subfolder` are those of each artifact; `sign` is `key:FILE` or `sigstore`.
    `prove` reads what was published back and opens it; `collection` is the slug of a collection on the Hub. A request
    to the Hub ends after `timeout_seconds` of silence, the whole publication after `deadline_seconds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    to: str
    version: str | None = None
    visibility: Literal["private", "public"] = "private"
    mode: Literal["commit", "pull-request"] = Field("commit", alias="as")
    subfolder: str | None = None
    prove: bool = True
    sign: str | None = None
    collection: str | None = None
    timeout_seconds: float = Field(120, gt=0)
    deadline_seconds: float | None = Field(None, gt=0)
    card: CardRecipe = CardRecipe()

    @field_validator("to")
    @classmethod
    def _names_a_publisher(cls, to: str) -> str:
        kind, _, place = to.partition(":")
        if kind not in PUBLISHERS or not place:
            raise ValueError(f"{to!r} is no destination; known: {', '.join(f'{name}:...' for name in PUBLISHERS)}")
        return to

    @field_validator("version")
    @classmethod
    def _is_a_version(cls, version: str | None) -> str | None:
        taken = (".partial", ".receipt.json")
        if version is not None and (
            not FOLDER_NAME.fullmatch(version) or version.lower() == "latest" or version.lower().endswith(taken)
        ):
            raise ValueError(f"{version!r} cannot be a version")
        return version


class Recipe(_Facts):
    """Everything a run is told; `folder` is where relative paths start."""

    base: str = Field(min_length=1)
    base_id: str | None = None
    adapter: str | tuple[WeightedAdapter, ...] | None = Field(None, min_length=1)
    merge: Merge = Merge()
    training_quantization: str | None = None
    artifacts: tuple[ArtifactRecipe, ...] = Field(min_length=1)
    calibration: CalibrationRecipe | None = None
    drift: DriftRecipe | None = None
    publish: PublishRecipe | None = None
    shard_bytes: int = Field(DEFAULT_SHARD_BYTES, ge=1)
    folder: Path = Field(Path(), exclude=True)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [artifact.name.lower() for artifact in self.artifacts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two artifacts are called {name!r}: give one of them a name of its own")
        return self

    @model_validator(mode="after")
    def _yardsticks_are_others(self) -> Recipe:
        names = {artifact.name for artifact in self.artifacts}
        stated = [(artifact.limits, names - {artifact.name}) for artifact in self.artifacts]
        for limits, others in [
            *stated,
            *([(self.drift.limits, names if len(names) > 1 else set())] if self.drift else []),
        ]:
            if limits.no_worse_than and limits.no_worse_than.artifact not in others:
                raise ValueError(f"no_worse_than: {limits.no_worse_than.artifact!r} is no other artifact of the recipe")
        return self

    @field_validator("training_quantization")
    @classmethod
    def _states_a_quantisation(cls, text: str | None) -> str | None:
        if text is not None:
            parse_training(text)
        return text

    @property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        """The adapters with their weights; none, one, or several to combine."""
        if isinstance(self.adapter, str):
            return (WeightedAdapter(path=self.adapter),)
        return self.adapter or ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Base and adapters, as they are named."""
        return (self.base, *(item.path for item in self.adapters))

    @property
    def stated_training(self) -> TrainingQuantization | None:
        """How the base was quantised in training, where the recipe says so."""
        return parse_training(self.training_quantization) if self.training_quantization else None

    @property
    def digest(self) -> str:
        """sha256 of the recipe's facts, wherever it is published to."""
        return hashlib.sha256(self.model_dump_json(exclude={"publish"}).encode()).hexdigest()

    def path(self, text: str) -> Path:
        """A path of this recipe, seen from its folder."""
        return self.folder / Path(text).expanduser()

    def onto(self, artifact: ArtifactRecipe) -> Onto:
        """The merge base of one artifact; `auto` is settled before anything is built, and plans as as-trained."""
        if artifact.onto is not None:
            return artifact.onto
        return "as-trained" if self.merge.onto == "auto" else self.merge.onto


def parse_training(text: str) -> TrainingQuantization:
    """`nf4,block=64,double,storage=bfloat16,compute=bfloat16,skip=lm_head` or `none`; raises ValueError."""
    kind, *rest = text.split(",")
    if kind not in ("nf4", "none"):
        raise ValueError(f"{kind!r} is no training quantisation that can be reproduced; known: nf4, none")
    if kind == "none" and rest:
        raise ValueError(f"{rest[0]!r}: 16-bit weights have no such setting")
    facts: dict[str, Any] = {"quant_type": kind, "double_quant": False, "provenance": "stated"}
    skip = []
    for item in rest:
        key, _, value = item.partition("=")
        if item == "double":
            facts["double_quant"] = True
        elif key == "block" and value.isdigit() and int(value) in BLOCK_SIZES:
            facts["block_size"] = int(value)
        elif key in ("storage", "compute") and value in FROM_TORCH_NAMES:
            facts[f"{key}_dtype"] = FROM_TORCH_NAMES[value]
        elif key == "skip" and value:
            skip.append(value)
        else:
            raise ValueError(f"{item!r} is no part of a training quantisation, as in nf4,block=64,double,skip=lm_head")
    roundings = (facts.get("compute_dtype", "BF16"),)
    return TrainingQuantization(**facts, weight_roundings=roundings, skip=tuple(skip))
