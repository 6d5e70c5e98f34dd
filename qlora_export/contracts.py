"""The four doors and the values that pass through them.

A door is a Protocol; what stands behind it is named in `catalog.py`. Values are frozen and hold facts, not behaviour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import GateFailed

Float32 = NDArray[np.float32]
Consumes = Literal["merged", "base"]
# What an exporter starts from: a dense artifact, the adapter, or an artifact of one format.
Takes = Literal["dense", "adapter", "w4a16", "w8a16", "gptq", "awq", "nf4-adapter"]
Onto = Literal["as-trained", "original"]
OntoChoice = Literal["as-trained", "original", "auto"]
# Which values of the base a delta is added to: two that an artifact can be merged onto, and two for dithering: rows as
# training loaded them, and the 4-bit codes of a base that is stored as such.
MergeBase = Literal["as-trained", "original", "stored", "codes"]
Rounding = Literal["nearest", "dithered", "search", "calibrated", "tuned"]
StoredScale = Literal["nested", "F32", "BF16", "F16", "F8_E4M3", "F8_E8M0"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FROM_TORCH_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}
Provenance = Literal["sidecar", "base", "stated", "assumed"]
# Told how much is done and how much there is in all, and what opens one for a named stage.
Progress = Callable[[int, int], None]
Track = Callable[[str], AbstractContextManager[Progress]]
Options = Mapping[str, str | int | float | bool]
Outcome = Literal["pass", "fail", "inconclusive", "not-measured"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor; rows are all leading dimensions together."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """Name of the module whose weight this is."""
        return self.name.removesuffix(".weight")

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension of a matrix, 1 for vectors and scalars."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TrainedModule:
    """What the sidecar recorded of one quantised module: sha256 of codes and of the absmax state, absmax mean."""

    codes_sha256: str
    absmax_sha256: str
    nested_offset: float | None


@dataclass(frozen=True)
class TrainingQuantization:
    """How the base was quantised while the adapter was trained, and where that knowledge comes from.

    `storage_dtype` is the dtype the base was loaded in (bitsandbytes' `quant_state.dtype`); `weight_roundings` are the
    dtypes that a de-quantised weight is rounded to, in order, before it is multiplied. `exact_nested` says that the
    nearest absmax code was searched exactly (CUDA) instead of by bitsandbytes' CPU table. `quant_type` is `nf4`, `fp4`,
    `int8`, or `none` for an adapter that was trained on 16-bit weights; `skip` names modules that stayed dense.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    storage_dtype: str = "BF16"
    compute_dtype: str = "BF16"
    weight_roundings: tuple[str, ...] = ("BF16",)
    exact_nested: bool = False
    base_sha256: str | None = None
    modules: Mapping[str, TrainedModule] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = "assumed"
    skip: tuple[str, ...] = ()

    @property
    def recorded(self) -> bool:
        """Whether training itself wrote this down."""
        return self.provenance == "sidecar"


@dataclass(frozen=True)
class Part:
    """One tensor of an output file: full name, safetensors dtype, shape; `file` where it is not one of the model's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""


class Piece(NamedTuple):
    """Bytes of a part that are ready to be written at an offset inside it."""

    part: str
    offset: int
    data: NDArray[np.uint8]


class TensorEncoder(Protocol):
    """Encodes one tensor, row block by row block in any order, from several threads at once."""

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Encode whole rows, given flat; `first_row` is a multiple of the format's `row_multiple`."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


class Format(Protocol):
    """A safetensors format: which parts a weight becomes, and the maths both ways."""

    name: str
    consumes: Consumes
    quantises: bool
    keeps_adapter: bool
    beside_experts: bool  # whether a folder loads in which experts stay dense
    dense_dtype: str

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Why a layer of this shape [out, in] cannot be encoded; an `input_major` module stores [in, out]."""
        ...

    def row_multiple(self, spec: TensorSpec) -> int:
        """Fewest rows that hold whole blocks."""
        ...

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The exact parts that `spec` becomes, known from its header alone."""
        ...

    def open(self, spec: TensorSpec) -> TensorEncoder:
        """Start encoding a tensor."""
        ...

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows, from the raw bytes of the whole parts."""
        ...

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; `kept` names the linear modules that stay dense."""
        ...


@runtime_checkable
class RoundingFormat(Format, Protocol):
    """A format that knows more than rounding to the nearest level of an absmax, without data."""

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """What it knows beside nearest."""
        ...

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Format:
        """The format with one of them; `seed` is that of random numbers."""
        ...


@dataclass(frozen=True)
class StoredScales:
    """The scales of a weight stored in 4 bits, float32 a block; of nested ones also codes, second level and offset."""

    scales: Float32
    codes: NDArray[np.uint8] | None = None
    nested_absmax: Float32 | None = None
    offset: float = 0.0


class DitheringEncoder(Protocol):
    """Adds deltas to a weight that is stored in 4 bits, row block by row block in any order."""

    def dither(self, codes: NDArray[np.uint8], delta: Float32, first_row: int) -> Iterable[Piece]:
        """Whole rows: their packed codes, and the flat delta in the weight's own units."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


@runtime_checkable
class DitheringFormat(Format, Protocol):
    """A format that can add a delta to the codes of a stored weight."""

    def open_on(self, spec: TensorSpec, stored: StoredScales) -> DitheringEncoder:
        """Start on a weight with these scales."""
        ...


@dataclass(frozen=True)
class LevelGrid:
    """What a format can hold of a weight: ascending `levels` times a scale for each `group` of consecutive columns.

    A scale is stored in the dtype `scales`, or `nested`: as an 8-bit code of bitsandbytes' double quantisation. It is
    shared by `height` consecutive rows, the last of which may be fewer; one in e4m3 is divided by `global_scale`.
    """

    levels: tuple[float, ...]
    group: int
    scales: StoredScale
    height: int = 1
    global_scale: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """What rounding chose for a weight: numbers of levels, uint8 [rows, columns], and scales float32 [blocks, groups].

    A block is the rows that share a scale, most often one. The scales are such as can be stored; nested ones with their
    `offset` and `nested_absmax`, float32, one for each 256.
    """

    codes: NDArray[np.uint8]
    scales: Float32
    offset: float = 0.0
    nested_absmax: Float32 | None = None


@runtime_checkable
class GridFormat(Format, Protocol):
    """A format on whose grid levels and scales can be chosen by other rules than the nearest level of an absmax."""

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The grid of a layer [out, in]; None when its groups run over row ends."""
        ...

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Every part of the layer, whole, from what was chosen."""
        ...

    def chosen(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]]) -> Chosen:
        """What was chosen, from the raw bytes of the whole parts."""
        ...


@runtime_checkable
class CorrectedFormat(GridFormat, Protocol):
    """A format that ships an adapter beside its weights, which makes up for some of what rounding them left wrong.

    What serving multiplies with is the weight that `stored` decodes, and B A [out, in] added to it in float32.
    """

    rank: int

    @property
    def stored(self) -> GridFormat:
        """The format of the weights without their correction."""
        ...

    def corrected(self, layers: Mapping[str, TensorSpec]) -> Format:
        """The format for layers [out, in] by their live modules; raises UsageError where no rank fits the budget."""
        ...

    def corrects(self, spec: TensorSpec) -> bool:
        """Whether a layer has a correction."""
        ...

    def factors(self, spec: TensorSpec, b: Float32, a: Float32) -> Iterable[Piece]:
        """The parts of B [out, rank] and A [rank, in], whose values can be stored."""
        ...

    def product(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of B A for some rows."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """The `adapter_config.json` of the correction."""
        ...


@runtime_checkable
class MixedFormat(Format, Protocol):
    """A format that is another one for some layers."""

    def of(self, spec: TensorSpec) -> Format:
        """The format of a layer."""
        ...


@runtime_checkable
class HoldingFormat(Protocol):
    """A format whose encoders keep parts of a tensor until the seal, more than a scale for each block."""

    def held_bytes(self, spec: TensorSpec) -> int:
        """What an encoder of this tensor holds."""
        ...


@dataclass(frozen=True)
class Artifact:
    """A finished folder: its manifest has been written and its bytes agree with it."""

    name: str
    format: str
    path: Path
    manifest: Mapping[str, Any]
    manifest_sha256: str
    reused: bool = False

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


class Tokenizer(Protocol):
    """Turns text and chat into token ids, as the released model's users will."""

    @property
    def begin(self) -> int | None:
        """The token that starts a text, if the model has one."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a text, if the model has one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        ...

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one by itself."""
        ...

    def encode_within(self, text: str, pair: str | None, limit: int) -> tuple[list[int], bool]:
        """Token ids of a text, or of two together, as a classifier reads them: with special tokens, at most so many.

        Also whether they are whole.
        """
        ...

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        """A conversation by the chat template; `answering` adds the start of the assistant's turn."""
        ...


class ServedTokenizer(Tokenizer, Protocol):
    """A tokenizer that can be compared with another."""

    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, added ones included."""
        ...

    def served(self, text: str) -> list[int]:
        """Token ids of a text as a server makes them, with the tokenizer's own special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...


class Session(Protocol):
    """A model opened in a runtime; that of a classifier has one row for a text, its log-probabilities of labels."""

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, or [1, labels], in nats."""
        ...


@runtime_checkable
class BatchedSession(Session, Protocol):
    """A model that can run several windows at once."""

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        """Of each window the log-probabilities [places, vocabulary] of the token that follows each of these places.

        Raises MemoryError where so many windows do not fit.
        """
        ...


@runtime_checkable
class NarrowableSession(Session, Protocol):
    """A model that can also round as another dtype does."""

    def narrowed(self, dtype: str) -> Session:
        """The same model with linear layers whose inputs, weights and outputs are rounded to this dtype."""
        ...


@runtime_checkable
class GreedySession(Session, Protocol):
    """A model that goes on with a text."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text, as the model's own settings for generation say."""
        ...

    def greedy(self, tokens: Sequence[int], count: int, ends: Collection[int] = ()) -> list[int]:
        """The most likely next tokens, one after the other with a cache, up to and with the first one of `ends`."""
        ...


@dataclass(frozen=True)
class TracedLayer:
    """A layer of a live model, and its class; `block` is the decoder block that it is, or is part of."""

    name: str
    kind: str
    block: str | None = None


# Told a layer, its inputs [rows, columns] where they are floating-point, and its outputs [rows, width]; and what knows
# inputs to put in their place.
See = Callable[[str, Float32 | None, Float32], None]
Give = Callable[[str], Float32 | None]


@runtime_checkable
class TracedSession(Session, Protocol):
    """A model whose layers can be looked at."""

    def layers(self) -> tuple[TracedLayer, ...]:
        """The decoder blocks, and every innermost module with values of its own."""
        ...

    def trace(self, tokens: Sequence[int], names: Sequence[str], see: See, give: Give | None = None) -> None:
        """Run a window, and `see` what these layers get and give, on the inputs that `give` has for them, if any."""
        ...


class Runtime(Protocol):
    """Opens a finished folder as a consumer would."""

    name: str

    def open(self, folder: Path, device: str = "cpu") -> AbstractContextManager[Session]:
        """Load the folder onto a device of torch, where the runtime knows such; raises InputError when it does not."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One model on the scored tokens: NLL and KL(reference || model) [tokens] in nats, top-1 token ids [tokens].

    `confidence` is the probability [tokens] that the model gives its top-1 token. `nonfinite` counts tokens whose
    distribution held NaN or infinity; such a measurement is never averaged.
    """

    name: str
    runtime: str
    nll: NDArray[np.float64]
    top1: NDArray[np.int64]
    kl: NDArray[np.float64]
    confidence: Float32
    nonfinite: int = 0


@dataclass(frozen=True)
class Drift:
    """How far one artifact is from the model that was trained; errors are standard errors, logarithms natural.

    Survival is that of the adapted matrices, median and lowest with its tensor, and so is what calibration measured of
    it in the layers' outputs. `codes_changed_median` is of the shares of 4-bit codes that training did not have.
    """

    perplexity: float
    perplexity_stderr: float
    perplexity_reference: float
    perplexity_reference_stderr: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float
    mean_kl: float
    mean_kl_stderr: float
    median_kl: float
    kl_99: float
    same_top1: float
    same_top1_stderr: float
    gain_kept: float | None
    gain_kept_stderr: float | None
    survival_median: float | None = None
    survival_min: float | None = None
    survival_min_tensor: str | None = None
    codes_changed_median: float | None = None
    weighted_survival_median: float | None = None
    weighted_survival_min: float | None = None
    weighted_survival_min_tensor: str | None = None


# What a drift may lack for reasons of its own; any other number is missing only where it was not finite.
MAY_LACK = frozenset(item.name for item in fields(Drift) if str(item.type).endswith("| None"))


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one artifact and its reasons."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """An artifact with a passing verdict on these very bytes; made by the gate alone, the only thing published."""

    artifact: Artifact
    verdict: Verdict
    drift: Drift

    def __post_init__(self) -> None:
        if self.verdict.outcome != "pass":
            raise GateFailed(
                f"{self.artifact.name}: the verdict is {self.verdict.outcome}", "only a passing artifact is published"
            )


@dataclass(frozen=True)
class Sample:
    """Mean NLL in nats of an artifact over the first scored tokens, as measured: what reading it again must give."""

    tokens: int
    nll: float
    nll_reference: float


@dataclass(frozen=True)
class Account:
    """What a publication tells beside its artifacts: the report, and the base's Hub id and licence where known."""

    report: Mapping[str, Any]
    base_id: str | None = None
    base_license: str | None = None


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


class Exporter(Protocol):
    """Makes an artifact of another kind from a finished folder, or from the adapter's folder."""

    name: str
    takes: Takes
    runtime: str
    bytes_per_weight: float

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """Disk that it takes beside the artifact while it works, for a model of this config.json."""
        ...

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """Why no model of this config.json can be exported; None where nothing stands in the way."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes."""
        ...

    def export(self, source: Path, destination: Path) -> None:
        """Fill the destination folder; the caller adds tokenizer and manifest and gives it its name."""
        ...


@runtime_checkable
class FinishingExporter(Exporter, Protocol):
    """An exporter that has the last word on a folder, when its tokenizer is there."""

    def finish(self, source: Path, destination: Path) -> None:
        """Change what it must; the caller adds the manifest."""
        ...


@runtime_checkable
class RoundedExporter(Exporter, Protocol):
    """An exporter that takes over the integers of an artifact with this rounding; `sources` may be asked for them."""

    rounding: Rounding
    sources: tuple[Takes, ...]

    def accepts(self, options: Options) -> bool:
        """Whether the integers of an artifact with these options are those that it was asked for."""
        ...
