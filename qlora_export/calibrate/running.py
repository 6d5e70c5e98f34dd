"""Calibrated rounding of a whole model, one decoder block after the other.

Two models run side by side: the trained one, and one whose blocks so far hold what will be shipped. In memory are two
copies of one block, the second moments of one layer's inputs and, below a limit, the hidden states of all tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_export.calibrate.activations import Activations, Batch, batches_of
from qlora_export.calibrate.block import Stream, Tokens, advance, round_block
from qlora_export.calibrate.decoder import Call, Decoder, copy_of, empty, give, open_decoder, put, record
from qlora_export.calibrate.layer import Parts, round_layer, served
from qlora_export.calibrate.parameters import LayerValues, Parameters
from qlora_export.calibrate.statistics import InputStatistics
from qlora_export.calibrate.store import SUFFIX, BlockStore, KeptBlock
from qlora_export.calibrate.text import CalibrationTokens
from qlora_export.contracts import GridFormat, Progress
from qlora_export.errors import UsageError
from qlora_export.planning import ArtifactPlan, Made, Plan, Route
from qlora_export.quant.floats import Float32
from qlora_export.quant.rounding.solving import Method
from qlora_export.tensors.reading import SourceFiles

ACTIVATION_BYTES = 2_000_000_000


@dataclass(frozen=True)
class CalibrationOptions:
    """Where and how calibration runs; `activation_bytes` of hidden states stay in memory."""

    out: Path
    device: str = "cpu"
    activation_bytes: int = ACTIVATION_BYTES
    method: Method = field(default_factory=Method)
    progress: Progress = lambda done, total: None


@dataclass(frozen=True)
class Subject:
    """A linear layer to round: its name within the block, its stored name, and its way into the artifact."""

    name: str
    stored: str
    route: Route


def calibrate(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> Made:
    """Decide the layers of an artifact; those outside decoder blocks are left to its format."""
    store = BlockStore(options.out / f"{item.name}{SUFFIX}", _digest(plan, item, tokens, options))
    store.prepare()
    decoder = open_decoder(plan)
    with SourceFiles() as files, torch.no_grad():
        live = [name for _, name in decoder.parameters_of(decoder.model, "")]
        run = _Run(plan, item, decoder, Parameters(plan, live, files), options)
        kept = [run.block(number, store) for number in run.start(tokens)]
    parts = {name: tensor for block in kept for name, tensor in block.parts.items()}
    facts = {name: found for block in kept for name, found in block.facts.items()}
    return Made(parts, {**_summary(tokens, options), "layers": facts})


class _Run:
    """One artifact on its way through the blocks."""

    def __init__(
        self, plan: Plan, item: ArtifactPlan, decoder: Decoder, parameters: Parameters, options: CalibrationOptions
    ) -> None:
        self._plan, self._item, self._options = plan, item, options
        self._decoder, self._parameters = decoder, parameters
        self._device = torch.device(options.device)
        self._batches: Sequence[Batch] = ()
        self._calls: list[list[Call]] = []
        self._hidden: tuple[Activations, Activations] | None = None
        self._subjects = {
            number: self._subjects_of(block, f"{decoder.place}.{number}") for number, block in enumerate(decoder.blocks)
        }
        self._done = 0

    def start(self, tokens: CalibrationTokens) -> range:
        """Run what lies before the first block on all tokens; the numbers of the blocks."""
        self._batches = batches_of(tokens.windows)
        before = _modules_before(self._decoder)
        for name, module in before.items():
            give(module, name, self._decoder, self._parameters, self._device)
        self._decoder.model.to(self._device) if self._device.type != "cpu" else None
        for number, batch in enumerate(self._batches):
            hidden, calls = record(self._decoder, batch.tokens.to(self._device))
            if self._hidden is None:
                self._hidden = (self._activations(hidden), self._activations(hidden))
            self._calls.append(self._shared(number, calls))
            for activations in self._hidden:
                activations[number] = hidden
        for module in before.values():
            empty(module)
        return range(len(self._decoder.blocks))

    def block(self, number: int, store: BlockStore) -> KeptBlock:
        """Decide one block, or take what a killed run decided, and go on to the next."""
        block, prefix = self._decoder.blocks[number], f"{self._decoder.place}.{number}"
        give(block, prefix, self._decoder, self._parameters, self._device)
        if self._hidden is None:
            raise ValueError("start comes first")
        trained, rounded = Stream(block, self._hidden[0]), Stream(copy_of(block), self._hidden[1])
        tokens = Tokens(self._batches, [calls[number] for calls in self._calls], self._device)
        subjects = self._subjects[number]
        kept = store.load(number)
        if kept is None:
            kept = store.save(number, *self._decide(trained, rounded, tokens, subjects))
        else:
            self._take(kept, rounded, subjects)
        for stream in (trained, rounded):
            advance(stream, tokens)
        empty(block)
        return kept

    def _decide(
        self, trained: Stream, rounded: Stream, tokens: Tokens, subjects: Mapping[str, Subject]
    ) -> tuple[Parts, dict[str, dict[str, Any]]]:
        parts: Parts = {}
        facts: dict[str, dict[str, Any]] = {}

        def round_one(name: str, inputs: InputStatistics) -> Tensor | None:
            subject = subjects[name]
            found = self._parameters.layer(subject.stored, self._item.onto)
            form = _form(subject.route)
            made = round_layer(form, found, inputs, self._options.method, self._compute_dtype)
            self._step()
            if isinstance(made, str):
                facts[subject.stored] = {"fallback": made}
                return None
            parts.update(made.parts)
            facts[subject.stored] = made.facts
            return self._as_live(subject, made.values)

        round_block(trained, rounded, tokens, list(subjects), round_one)
        return parts, facts

    def _take(self, kept: KeptBlock, rounded: Stream, subjects: Mapping[str, Subject]) -> None:
        """Give the rounded block what was decided before."""
        with SourceFiles() as files:
            for name, subject in subjects.items():
                self._step()
                form, spec = _form(subject.route), subject.route.spec
                names = [part.name for part in form.parts(spec)]
                if not all(part in kept.parts for part in names):
                    continue
                raw = {part: files.read_bytes(kept.parts[part], 0, kept.parts[part].bytes) for part in names}
                found = LayerValues(spec, np.empty(0, np.float32), np.empty(0, np.float32), None)
                values = self._as_live(subject, served(form, found, raw, self._compute_dtype))
                put(rounded.block, f"{name}.weight", values)

    def _as_live(self, subject: Subject, values: Float32) -> Tensor:
        """The weight [out, in] as the live parameter holds it."""
        turned = values.T if subject.route.output.transposed else values
        return torch.from_numpy(np.ascontiguousarray(turned)).to(self._device)

    def _subjects_of(self, block: Any, prefix: str) -> dict[str, Subject]:
        """The layers of a block that the artifact's grid format encodes."""
        found = {}
        for name, _ in block.named_modules():
            stored = self._parameters.stored(f"{prefix}.{name}.weight")
            route = self._item.routes.get(stored) if stored is not None else None
            if stored is not None and route is not None and isinstance(route.form, GridFormat) and route.form.quantises:
                found[name] = Subject(name, stored, route)
        return found

    def _activations(self, hidden: Tensor) -> Activations:
        return Activations(self._batches, hidden.shape[-1], self._options.out, self._options.activation_bytes // 2)

    def _shared(self, number: int, calls: list[Call]) -> list[Call]:
        """The calls of an earlier batch of the same shape, where they are the same: masks are large."""
        shape = self._batches[number].tokens.shape
        for earlier in range(number - 1, -1, -1):
            if self._batches[earlier].tokens.shape == shape and _same(self._calls[earlier], calls):
                return self._calls[earlier]
        return calls

    def _step(self) -> None:
        self._done += 1
        self._options.progress(self._done, sum(len(subjects) for subjects in self._subjects.values()))

    @property
    def _compute_dtype(self) -> str:
        return self._plan.training.quantization.compute_dtype


def _form(route: Route) -> GridFormat:
    if not isinstance(route.form, GridFormat):
        raise UsageError(f"{route.spec.name}: its format has no grid")
    return route.form


def _modules_before(decoder: Decoder) -> dict[str, Any]:
    """The modules with values of their own outside the blocks, but for the output head."""
    head = decoder.model.get_output_embeddings()
    embedding = decoder.model.get_input_embeddings()
    found = {}
    for name, module in decoder.model.named_modules():
        inside = name == decoder.place or name.startswith(f"{decoder.place}.")
        own = any(True for _ in module.parameters(recurse=False))
        if own and not inside and (module is not head or module is embedding):
            found[name] = module
    return found


def _same(first: Sequence[Call], second: Sequence[Call]) -> bool:
    pairs = zip((_tensors(call) for call in first), (_tensors(call) for call in second), strict=True)
    return all(
        len(a) == len(b)
        and all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(a, b, strict=True))
        for a, b in pairs
    )


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*call.positional, *call.named.values()):
        found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
    return found


def _digest(plan: Plan, item: ArtifactPlan, tokens: CalibrationTokens, options: CalibrationOptions) -> str:
    """What decides the blocks: the plan, the very files of the base, the tokens, the method and what computes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in plan.checkpoint.files]
    facts = [item.digest, stats, tokens.sha256, asdict(options.method), options.device, torch.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _summary(tokens: CalibrationTokens, options: CalibrationOptions) -> dict[str, Any]:
    return {
        "sequences": tokens.sequences,
        "tokens": tokens.tokens,
        "tokens_sha256": tokens.sha256,
        "method": asdict(options.method),
        "device": options.device,
        "torch": torch.__version__,
    }
