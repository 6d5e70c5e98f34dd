"""The model that everything is compared with: as a plan's training left it, or as it lies in a folder.

Whose tokenizer, how many rows, which context, what decides its numbers, how it is opened and measured: release, check
of a folder and compare take the same answers from here. It is measured once and its distributions are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.artifact import Artifact
from qlora_export.drift.batches import BATCH_TOKENS
from qlora_export.drift.ledger import References
from qlora_export.drift.measure import keep_reference, measure, measure_reference
from qlora_export.drift.probes import Probes, ProbeTexts, ask_reference
from qlora_export.drift.protocols import token_set
from qlora_export.drift.reference_store import (
    Columns,
    Reference,
    ReferenceProbabilities,
    columns_of,
    measurement_in,
)
from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.window_sizes import SizedProtocol, protocol_for
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.errors import InputError
from qlora_export.pipeline.options import RunOptions
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import DriftRecipe
from qlora_export.runtimes.base import NarrowableSession, Session
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.model_config import context_tokens
from qlora_export.sources.text import DriftText
from qlora_export.types import Track

if TYPE_CHECKING:
    from qlora_export.runtimes.as_trained import AsTrained
    from qlora_export.runtimes.tokenizer import FolderTokenizer

# What the noise floor is measured in, on about so many tokens.
NOISE_DTYPE = "bfloat16"
NOISE_TOKENS = 512
RESIZED_HINT = "the adapter's tokenizer has more tokens than the base: was the vocabulary resized in training?"


@dataclass(frozen=True)
class ReferenceModel:
    """A checkpoint, with the adapter and the training of a plan where there is one."""

    checkpoint: Checkpoint
    plan: Plan | None = None

    @property
    def trained(self) -> Plan | None:
        """The plan where it has an adapter; without one the checkpoint is the model itself."""
        return self.plan if self.plan is not None and self.plan.adapter is not None else None

    @property
    def dense_folder(self) -> Path | None:
        """Where the very weights lie that an artifact should have; None where they are quantised, or an adapter's."""
        quantised = self.checkpoint.config.get("quantization_config")
        return None if self.trained is not None or quantised else self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as the finished model has it."""
        return self.plan.config if self.plan else self.checkpoint.config

    def tokenizer(self, artifacts: Sequence[Artifact] = ()) -> FolderTokenizer:
        """That of the first artifact that ships one, else what came with the adapter, else the base's."""
        from qlora_export.runtimes.tokenizer import FolderTokenizer

        folders = [artifact.path for artifact in artifacts]
        if self.plan is not None and self.plan.adapter is not None:
            folders.append(self.plan.adapter.folder)
        having = (folder for folder in folders if (folder / "tokenizer_config.json").is_file())
        return FolderTokenizer(next(having, self.checkpoint.folder))

    def protocol(self, drift: DriftRecipe | None) -> SizedProtocol:
        """The protocol that was asked for, on this model's context; raises UsageError where they do not fit."""
        return protocol_for(drift or DriftRecipe(text=""), self.config, context_tokens(self.checkpoint.text_config))

    def tokens(self, text: DriftText, tokenizer: FolderTokenizer, drift: DriftRecipe | None) -> TokenSet:
        """The tokens of the text by the protocol that was asked for."""
        found = token_set(text, tokenizer, self.protocol(drift), drift.tokens if drift else None)
        self.require_row(found.highest_token)
        return found

    def probes(self, texts: ProbeTexts, tokenizer: FolderTokenizer) -> Probes:
        """Questions and prompts in tokens; raises InputError for what the model's context does not hold."""
        found = texts.tokens(tokenizer, context_tokens(self.checkpoint.text_config))
        self.require_row(found.highest_token)
        return found

    def require_row(self, highest: int) -> None:
        """Raise InputError when the tokenizer knows tokens that the embedding has no row for."""
        rows = self.checkpoint.text_config.get("vocab_size")
        if self.plan is not None:
            rows = self.plan.model.settings.get("vocab_size", rows)
        require_row(highest, rows, self.checkpoint.folder)

    def key(self, options: RunOptions) -> dict[str, Any]:
        """Everything that decides its numbers, but for the tokens. Cost: reading the base once."""
        digests = SourceDigests(self.checkpoint.files)
        digests.hash_all([path.name for path in digests.paths], options.workers)
        # The second says which tokens end what the model writes.
        configs = [self.checkpoint.folder / name for name in ("config.json", "generation_config.json")]
        found = {
            "base": {name: facts["sha256"] for name, facts in digests.sorted().items()},
            "config": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in configs if path.is_file()},
            **_computing(options.device),
        }
        if self.plan is None or self.plan.adapter is None:
            return found
        return {
            **found,
            "adapter": self.plan.adapter.sha256,
            "training": hashlib.sha256(repr(self.plan.live_training).encode()).hexdigest(),
            "vocabulary": self.plan.model.settings.get("vocab_size"),
        }

    def measure(self, kept: Reference, probes: Probes, options: RunOptions) -> References:
        """With the adapter, without it, and merged, or as it lies in its folder; nothing that was kept before."""
        if not kept.known and self.trained is not None:
            kept.keep(_with_adapter(_live(self.trained, options.device), kept.rows, options.track, probes))
        elif not kept.known:
            with self.open(options.device) as session:
                found = columns_of(measure_model("the model", session, kept.rows, options.track))
                kept.keep({**found, **ask_reference(session, probes, options.track)})
        measured = {key: measurement_in(kept.columns, key) for key in ("tuned", "base", "merged", "noise")}
        tuned = measured.pop("tuned")
        if tuned is None:
            raise InputError(f"{kept.rows.name}: holds no reference", "remove its folder, and run again")
        return References(tuned, **measured)

    @contextmanager
    def open(self, device: str = "cpu") -> Iterator[Session]:
        """Load it, on a device."""
        if self.trained is not None:
            yield _live(self.trained, device).tuned()
        else:
            with load_runtime("transformers").open(self.checkpoint.folder, device) as session:
                yield session


def trained_model(plan: Plan) -> ReferenceModel:
    """The model that every artifact of a plan is compared with."""
    return ReferenceModel(plan.checkpoint, plan)


def require_row(highest: int, rows: Any, folder: Path, hint: str = RESIZED_HINT) -> None:
    """Raise InputError when an embedding with so many rows has none for a token of the text."""
    if isinstance(rows, int) and highest >= rows:
        raise InputError(f"{folder}: token {highest} of the text has no row in an embedding of {rows}", hint)


def measure_model(name: str, session: Session, rows: ReferenceProbabilities, track: Track) -> dict[str, Measurement]:
    """Fill the rows with a model of transformers, and measure it against itself in the dtype of 16-bit serving."""
    with track(f"measure {name}") as progress:
        keep_reference(session, rows, progress)
    found = {"tuned": measure_reference(name, "transformers", rows)}
    if isinstance(session, NarrowableSession):
        with track("measure noise") as progress:
            narrowed = session.narrowed(NOISE_DTYPE)
            found["noise"] = measure(NOISE_DTYPE, "transformers", narrowed, rows, progress, NOISE_TOKENS)
    return found


def _computing(device: str) -> dict[str, Any]:
    """What a number depends on beside models and tokens: dtype, device, threads, batches, versions."""
    import torch

    versions = {name: version(name) for name in ("qlora-export", "torch", "transformers", "peft", "bitsandbytes")}
    return {
        "dtype": "float32",
        "device": device if device == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}",
        "threads": torch.get_num_threads(),
        "batch_tokens": BATCH_TOKENS,
        "versions": versions,
    }


def _live(plan: Plan, device: str) -> AsTrained:
    from qlora_export.runtimes.as_trained import open_as_trained

    if plan.adapter is None:
        raise ValueError("no adapter")
    rows = plan.model.settings.get("vocab_size")
    return open_as_trained(plan.checkpoint, plan.adapter, plan.live_training, rows, device)


def _with_adapter(live: AsTrained, rows: ReferenceProbabilities, track: Track, probes: Probes) -> Columns:
    found = measure_model("as trained", live.tuned(), rows, track)
    asked = ask_reference(live.tuned(), probes, track)
    # A classifier's head is new: without training there is nothing that it says.
    if not rows.tokens.labels:
        with live.base() as session, track("measure the base") as progress:
            found["base"] = measure("base", "transformers", session, rows, progress)
    with live.merged() as session, track("measure merged") as progress:
        found["merged"] = measure("merged", "transformers", session, rows, progress)
    return {**columns_of(found), **asked}
