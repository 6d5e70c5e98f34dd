"""The JSON documents of schema 1 as models: what is written and what its JSON Schema says come from one definition.

A document takes its values from the attributes of what was measured or planned: by the key's own name, or from the
place that `of` states. Numbers that are not finite become null. Keys may be added within schema 1 and none change
their meaning: readers ignore what they do not know, while the schemas list everything that this version writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_serializer
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema, to_jsonable_python

from qlora_export.catalog import EXPORTERS, FORMATS, RUNTIMES
from qlora_export.drift.comparison.costs import Arithmetic, LowRankCost
from qlora_export.drift.distribution import Distribution
from qlora_export.drift.documents import DocumentPerplexity, Documents
from qlora_export.drift.generation import Generation
from qlora_export.drift.layers import KeptLayer
from qlora_export.drift.ledger import Noise
from qlora_export.drift.multiple_choice import Choices
from qlora_export.drift.onnx.variants import GraphFindings
from qlora_export.drift.results import Drift, Outcome, Sample
from qlora_export.drift.statistics import Beside
from qlora_export.drift.trace import Broken, LayerError
from qlora_export.drift.worst_tokens import Worst
from qlora_export.planning.survival_estimate import Predicted
from qlora_export.recipe.config import Limits
from qlora_export.report.calibration import calibration_of
from qlora_export.report.run import Receipt
from qlora_export.types import Onto, Provenance, Rounding

DRAFT = "https://json-schema.org/draft/2020-12/schema"
T = TypeVar("T")
# A key that is left out while it is None.
_LEFT_OUT = "left out"
MayLack = Annotated[T | None, _LEFT_OUT]
# What is empty counts as None.
NONE_IF_EMPTY = BeforeValidator(lambda value: value or None)
Count = Annotated[int, Field(ge=0)]
# The number of what there is.
Size = Annotated[Count, BeforeValidator(lambda value: value if isinstance(value, int) else len(value))]
Digest = Annotated[str, WithJsonSchema({"type": "string", "pattern": "^[0-9a-f]{64}$"})]
ExitStatus = Annotated[int, Field(ge=0, le=255)]
Runtime = Annotated[str, WithJsonSchema({"enum": sorted({*RUNTIMES, "as-trained"})})]
Texts = tuple[str, ...]
Judged = Literal["pass", "fail", "inconclusive"]


def of(*path: str, default: Any = ...) -> Any:
    """The attributes that lead to a key's value; a `default` is for what ends on the way."""
    return Field(default, validation_alias=AliasPath(*path))


class WrittenSchema(GenerateJsonSchema):
    """Every key is written and no other, and every number may be null."""

    def float_schema(self, schema: core_schema.FloatSchema) -> dict[str, Any]:
        """A number that is not finite is null."""
        return {**super().float_schema(schema), "type": ["number", "null"]}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        """A number may be null as it is."""
        inner = self.generate_inner(schema["schema"])
        return inner if "null" in inner.get("type", ()) else super().nullable_schema(schema)

    def field_is_required(self, field: Any, total: bool) -> bool:
        """Those of dataclasses with a default are written, too."""
        return True

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> dict[str, Any]:
        """Nothing else stands in a dataclass, as in a document."""
        return {**super().dataclass_schema(schema), "additionalProperties": False}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Keys need no other name."""
        return False

    def ser_schema(self, schema: Any) -> dict[str, Any] | None:
        """Leaving keys out does not change the others."""
        return None if schema["type"] == "function-wrap" else super().ser_schema(schema)


class Document(BaseModel):
    """An object of a document, whose keys are its fields in their order."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", from_attributes=True, populate_by_name=True, defer_build=True
    )

    def data(self) -> dict[str, Any]:
        """It as plain data."""
        found: dict[str, Any] = to_jsonable_python(self.model_dump(by_alias=True), inf_nan_mode="null")
        return found

    @classmethod
    def written_schema(cls, title: str) -> dict[str, Any]:
        """Its JSON Schema, draft 2020-12."""
        schema = cls.model_json_schema(mode="serialization", schema_generator=WrittenSchema)
        return {"$schema": DRAFT, **schema, "title": title}

    @classmethod
    def _may_lack(cls) -> list[str]:
        return [name for name, field in cls.model_fields.items() if _LEFT_OUT in field.metadata]

    @model_serializer(mode="wrap")
    def _without_gaps(self, dump: Any) -> dict[str, Any]:
        gaps = [name for name in self._may_lack() if getattr(self, name) is None]
        return {key: value for key, value in dump(self).items() if key not in gaps}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """Keys that may be missing are never null."""
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        for name in cls._may_lack():
            schema["required"].remove(name)
            schema["properties"][name] = schema["properties"][name]["anyOf"][0]
        return schema


class Tokens(Document):
    """What was measured on, and what makes it again from the same text; `protocol` is a sentence, `name` its name."""

    sha256: Digest
    count: Count
    windows: Size
    name: str = of("protocol", "name")
    protocol: str = of("protocol", "sentence")
    window_tokens: Count = of("protocol", "window_tokens")
    stride_tokens: Count | None = of("protocol", "stride_tokens")
    begin: str | None = of("protocol", "begin")
    documents: Documents | None
    labels: Annotated[MayLack[Texts], NONE_IF_EMPTY] = None


class LimitedTokens(Tokens):
    """Tokens, and the most that the recipe wanted."""

    limit: Count | None


class Reference(Document):
    """What drift is measured from, seen from the run."""

    model: str = of("facts", "reference")
    runtime: Literal["transformers"] = "transformers"
    activations: Literal["float32"] = "float32"
    training_quantization: Provenance | None = of("facts", "training")
    perplexity: float = of("ledger", "reference", "perplexity")
    perplexity_stderr: float = of("ledger", "reference", "perplexity_stderr")
    base: Drift | None = of("ledger", "base")
    merged: Drift | None = of("ledger", "merged")
    noise_floor: Noise | None = of("ledger", "noise")
    device: str = of("ledger", "device")


class DocumentPerplexities(Document):
    """Perplexity by word and by byte of every model."""

    reference: DocumentPerplexity
    artifacts: dict[str, DocumentPerplexity]


class Calibration(Document):
    """The tokens that rounding looked at, the layers, and how many were left to the format, by reason."""

    sequences: Count
    tokens: Count
    tokens_sha256: Digest
    layers: Count
    fallbacks: dict[str, Count]
    notes: Texts


class Layers(Document):
    """Layers that were compared one by one."""

    layers: tuple[LayerError, ...]
    broken: Broken | None
    note: Annotated[MayLack[str], NONE_IF_EMPTY]


class ReportedArtifact(Document):
    """An artifact, and its entry in the ledger where it was measured."""

    name: str = of("artifact", "name")
    format: str = of("artifact", "format")
    path: Path = of("artifact", "path")
    bytes: Count = of("artifact", "bytes")
    runtime: Runtime = of("artifact", "runtime")
    manifest_sha256: Annotated[Digest | None, NONE_IF_EMPTY] = of("artifact", "manifest_sha256")
    reused: bool = of("artifact", "reused")
    calibration: Annotated[MayLack[Calibration], BeforeValidator(calibration_of)] = of("artifact", "manifest")
    verdict: Outcome = of("entry", "verdict", "outcome", default="not-measured")
    expected: MayLack[Literal["pass", "fail"]] = of("entry", "recipe", "expect", default=None)
    reasons: Texts = of("entry", "verdict", "reasons", default=())
    limits: MayLack[Limits] = of("entry", "limits", default=None)
    drift: Drift | None = of("entry", "drift", default=None)
    survival: MayLack[dict[str, float]] = of("entry", "survival", default=None)
    layers: MayLack[tuple[KeptLayer, ...]] = of("entry", "layers", default=None)
    sample: MayLack[Sample] = of("entry", "sample", default=None)
    distribution: MayLack[Distribution] = of("entry", "findings", "distribution", default=None)
    beside: MayLack[Beside] = of("entry", "findings", "beside", default=None)
    steps: Annotated[MayLack[tuple[Beside, ...]], NONE_IF_EMPTY] = of("entry", "findings", "steps", default=None)
    worst: MayLack[Worst] = of("entry", "findings", "worst", default=None)
    choices: MayLack[Choices] = of("entry", "findings", "choices", default=None)
    labels: MayLack[Choices] = of("entry", "findings", "labels", default=None)
    generation: MayLack[Generation] = of("entry", "findings", "generation", default=None)
    trace: MayLack[Layers] = of("entry", "findings", "trace", default=None)
    onnx: MayLack[GraphFindings] = of("entry", "findings", "onnx", default=None)


class Report(Document):
    """report.json, and what release, check and build print with `--json` when they end well."""

    schema_version: Literal[1] = Field(1, serialization_alias="schema")
    recipe_digest: Digest | None
    tokens: LimitedTokens | None
    reference: Reference | None
    document_perplexity: DocumentPerplexities | None
    assumptions: Texts
    artifacts: tuple[ReportedArtifact, ...]
    published: tuple[Receipt, ...]
    exit_code: ExitStatus


class Source(Document):
    """A base by the headers of its files."""

    path: Path = of("folder")
    headers_sha256: Digest


class AdapterSource(Document):
    """An adapter by its bytes."""

    path: Path = of("folder")
    sha256: Digest


class ChosenRounding(Document):
    """How an artifact is rounded, and what the recipe says of it."""

    stated: Rounding | None
    chosen: Rounding
    seed: int | None


class PredictedSurvival(Document):
    """The median over tensors, and the tensor that keeps least."""

    median: float
    lowest: float
    lowest_stderr: float
    lowest_tensor: str


def _predicted(found: Predicted | None) -> dict[str, Any] | None:
    if found is None:
        return None
    name = found.lowest
    lowest = {"lowest": found.survival[name], "lowest_stderr": found.stderr[name], "lowest_tensor": name}
    return {"median": found.median, **lowest}


class PlannedArtifact(Document):
    """An artifact to be built, with the bytes of its files."""

    name: str
    format: Annotated[str, WithJsonSchema({"enum": sorted(FORMATS)})] = of("form", "name")
    onto: Onto
    rounding: ChosenRounding | None = of("rounding", "facts")
    predicted_survival: Annotated[PredictedSurvival | None, BeforeValidator(_predicted)] = of("rounding", "predicted")
    digest: Digest
    bytes: Count
    tensors: Size = of("routes")
    files: dict[str, Count] = of("file_bytes")


class PlannedExport(Document):
    """An artifact that an exporter makes."""

    name: str
    format: Annotated[str, WithJsonSchema({"enum": sorted(EXPORTERS)})] = of("exporter", "name")
    source: str = of("source_name")
    digest: Digest
    bytes_estimated: Count = of("bytes")


class PinnedFile(Document):
    """A file of the base."""

    bytes: Count
    sha256: Digest


class Pins(Document):
    """What a kept plan promises: digests of everything that decides the bytes, the texts included."""

    recipe: Digest
    base: Digest
    adapter: Digest | None
    artifact: dict[str, Digest]
    text: Digest | None
    assumptions: Texts
    base_files: dict[str, PinnedFile]


KEPT = ("version", "folder", "recipe", "pinned")


class PlanSummary(Document):
    """What `plan --json` prints, and `plan -o` keeps with everything that a release is held to."""

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {name: list(KEPT) for name in KEPT}})

    schema_version: Literal[1] = Field(1, serialization_alias="schema")
    recipe_digest: Digest = of("plan", "recipe", "digest")
    base: Source = of("plan", "checkpoint")
    adapter: AdapterSource | None = of("plan", "adapter")
    adapted_tensors: Size = of("plan", "model", "changed")
    quantised_in_training: Size = of("plan", "training", "quantised")
    assumptions: Texts = of("plan", "assumptions")
    warnings: Texts = of("plan", "warnings")
    bytes: Count = of("plan", "bytes")
    peak_memory_bytes: Count
    artifacts: tuple[PlannedArtifact, ...] = of("plan", "artifacts")
    exports: tuple[PlannedExport, ...] = of("plan", "exports")
    version: MayLack[str] = None
    folder: MayLack[str] = None
    recipe: MayLack[dict[str, Any]] = None
    pinned: MayLack[Pins] = None


class ComparedReference(Document):
    """What all rows are compared with, seen from the comparison."""

    perplexity: float = of("reference", "perplexity")
    perplexity_stderr: float = of("reference", "perplexity_stderr")
    base: Drift | None
    merged: Drift | None


class Float32Cost(Document):
    """What the merged model in float32 takes, seen from the comparison."""

    bytes: Count = of("fp32_bytes")
    flops_per_token: Count = of("fp32_cost", "flops_per_token")
    bytes_per_token: Count = of("fp32_cost", "bytes_per_token")


class ComparedRow(Document):
    """A row; one that could not be made has a reason, and null for everything that would have been measured."""

    name: str
    format: Annotated[str, WithJsonSchema({"enum": sorted({*FORMATS, *EXPORTERS})})] = of("candidate", "format")
    reason: str | None
    rounding: Rounding | None = of("measured", "rounding", default=None)
    onto: Onto | None = of("measured", "onto", default=None)
    runtime: Runtime | None = of("measured", "entry", "runtime", default=None)
    bytes: Count | None = of("measured", "bytes", default=None)
    bytes_of_fp32: float | None = None
    weight_bytes: Count | None = of("measured", "cost", "weight_bytes", default=None)
    bits_per_weight: float | None = of("measured", "cost", "bits_per_weight", default=None)
    arithmetic: Arithmetic | None = of("measured", "cost", "arithmetic", default=None)
    flops_per_token: Count | None = of("measured", "cost", "flops_per_token", default=None)
    flops_of_fp32: float | None = None
    bytes_per_token: Count | None = of("measured", "cost", "bytes_per_token", default=None)
    bytes_per_token_of_fp32: float | None = None
    prefill_tokens_per_second: float | None = of("measured", "speed", "prefill", default=None)
    prefill_of_fp32: float | None = of("measured", "prefill_ratio", default=None)
    decode_tokens_per_second: float | None = of("measured", "speed", "decode", default=None)
    decode_of_fp32: float | None = of("measured", "decode_ratio", default=None)
    verdict: Judged | None = of("measured", "entry", "verdict", "outcome", default=None)
    reasons: Texts | None = of("measured", "entry", "verdict", "reasons", default=None)
    drift: Drift | None = of("measured", "entry", "drift", default=None)


class ComparisonReport(Document):
    """What `compare --json` prints."""

    schema_version: Literal[1] = Field(1, serialization_alias="schema")
    recipe_digest: Digest
    tokens: Tokens
    reference: ComparedReference
    limits: Limits
    linear_weights: Count = of("weights")
    fp32: Float32Cost
    low_rank: LowRankCost | None
    rows: tuple[ComparedRow, ...]
    front: Texts
    recommended: str | None
    why: Texts
    notes: Texts
    exit_code: ExitStatus = 0
