"""A first recipe for a base and an adapter: YAML with a word on every key worth knowing.

What the files tell is filled in: the base's Hub id from `adapter_config.json`, the dense format from the base's dtype,
how the base was quantised in training from the sidecar. Paths are written as seen from the recipe's own folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_export.catalog import DENSE_FORMATS
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.load import make_recipe
from qlora_export.sources.adapter import CONFIG_NAME, Adapter, open_adapter
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.sources.locate import CACHE_FOLDER, COMMIT, HUB_ID, hub_id, identity, local_folder
from qlora_export.types import TORCH_NAMES, TrainingQuantization

PLACEHOLDER = "REPLACE-ME.jsonl"


@dataclass(frozen=True)
class Start:
    """What is known before there is a recipe; paths as seen from the working folder, `folder` is the recipe's."""

    folder: Path
    base: str | None = None
    adapter: str | None = None
    to: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class _Known:
    base: str
    base_id: str | None
    adapter: str | None
    dense: str
    training: TrainingQuantization | None


def first_recipe(start: Start) -> str:
    """The text of a recipe that loads; raises UsageError when no base is known, InputError when one is not there."""
    adapter = _opened_adapter(start.adapter)
    base = start.base or _trained_on(adapter)
    if base is None:
        raise UsageError("no base", "give --base, a folder or a Hub id, or an adapter that names its base")
    checkpoint = _opened_base(base)
    known = _Known(
        base=_pinned(_place(base, start.folder), adapter),
        base_id=_base_id(base, checkpoint, adapter),
        adapter=_place(start.adapter, start.folder) if start.adapter else None,
        dense=_dense_format(checkpoint),
        training=adapter.training if adapter else None,
    )
    text = "\n".join([*_sources(known), "", *_artifacts(known), "", *_drift(start), "", *_publish(start.to), ""])
    make_recipe(yaml.safe_load(text), start.folder, "the new recipe")
    return text


def _opened_adapter(text: str | None) -> Adapter | None:
    """The adapter of a folder; None for a Hub id, which is looked at by `plan`."""
    if text is None or hub_id(text, Path()) is not None:
        return None
    return open_adapter(local_folder(text, Path()))


def _opened_base(text: str) -> Checkpoint | None:
    if hub_id(text, Path()) is not None:
        return None
    return open_checkpoint(local_folder(text, Path()))


def _trained_on(adapter: Adapter | None) -> str | None:
    """The base that an adapter names: a folder that is there, or a Hub id."""
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    if not isinstance(named, str) or adapter is None:
        return None
    if Path(named).is_dir() or HUB_ID.fullmatch(named):
        return named
    raise InputError(
        f"{adapter.folder / CONFIG_NAME}: the base {named!r} is no folder here and no Hub id", "give --base"
    )


def _base_id(base: str, checkpoint: Checkpoint | None, adapter: Adapter | None) -> str | None:
    """The base's Hub id for the card, where anything tells it; None where `base` says it already."""
    if checkpoint is None:
        return None
    if CACHE_FOLDER.fullmatch(Path(base).expanduser().name) or "@" in identity(checkpoint.folder):
        return identity(checkpoint.folder).partition("@")[0]
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    if isinstance(named, str) and HUB_ID.fullmatch(named) and not Path(named).exists():
        return named
    return None


def _pinned(base: str, adapter: Adapter | None) -> str:
    """A Hub id with the commit that the adapter was trained on, where both are known."""
    config = adapter.config if adapter else {}
    revision = config.get("revision")
    known = config.get("base_model_name_or_path") == base and isinstance(revision, str) and COMMIT.fullmatch(revision)
    return f"{base}@{revision}" if known else base


def _place(text: str, folder: Path) -> str:
    """A source as the recipe names it: Hub ids as they are, paths as seen from the recipe's folder."""
    return text if hub_id(text, Path()) is not None else _relative(text, folder)


def _relative(text: str, folder: Path) -> str:
    """A path from a folder; absolute where nothing but the root is shared."""
    place, home = Path(text).expanduser().absolute(), folder.absolute()
    if len(Path(os.path.commonpath([place, home])).parts) == 1:
        return str(place)
    return os.path.relpath(place, home)


def _dense_format(checkpoint: Checkpoint | None) -> str:
    config: dict[str, Any] = dict(checkpoint.text_config) if checkpoint else {}
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = next((dtype for dtype, name in TORCH_NAMES.items() if name == named), "BF16")
    return DENSE_FORMATS[dtype] if dtype == "F16" else "bf16"


def _scalar(text: str) -> str:
    """A string as YAML reads it back."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _sources(known: _Known) -> list[str]:
    pinned = "@" in known.base or hub_id(known.base, Path()) is None
    lines = [
        "# A release by qlora-export. Paths start at this file's folder; any key can be changed with --set KEY=VALUE.",
        "# Next: qlora-export plan THIS-FILE (reads headers only), then check, then release.",
        "",
        "# The base model: a folder, or a Hub id. Pin a Hub id as owner/name@COMMIT: a branch moves.",
        f"base: {_scalar(known.base)}" + ("" if pinned else "   # not pinned yet"),
    ]
    if known.base_id is not None:
        lines += [f"base_id: {_scalar(known.base_id)}   # the base's Hub id, which the model card names"]
    elif hub_id(known.base, Path()) is None:
        lines += ["# base_id: owner/name   # the base's Hub id, which the model card names; a Hub publication needs it"]
    if known.adapter is None:
        return [*lines, "", "# No adapter: the model itself is released."]
    lines += [
        "",
        "# The adapter's folder. Several are combined first: a list of {path: FOLDER, weight: 0.5}, see merge.combine.",
        f"adapter: {_scalar(known.adapter)}",
        "",
        "# as-trained: onto the de-quantised base that the adapter saw. original: onto the base as it is stored.",
        "# auto: both are measured, the better one is taken.",
        "merge: {onto: as-trained}",
        "",
        *_training(known.training),
    ]
    return lines


def _training(training: TrainingQuantization | None) -> list[str]:
    if training is not None and training.recorded:
        return ["# How the base was quantised in training is recorded beside the adapter: nothing to state here."]
    if training is not None and training.provenance == "base":
        return ["# How the base was quantised in training is known from the base, which is stored that way."]
    return [
        "# Nothing beside the adapter records how the base was quantised in training; NF4 in blocks of 64 with double",
        "# quantisation is assumed. State it where you know it; none for an adapter trained on 16-bit weights.",
        "# training_quantization: nf4,block=64,double,compute=bfloat16",
    ]


def _artifacts(known: _Known) -> list[str]:
    ships_adapter = known.adapter is not None and (known.training is None or known.training.quant_type == "nf4")
    lines = [
        "# What is made, all in one pass over the base; `qlora-export formats` lists what there is. Each entry may",
        "# have a name, onto, keep (modules that stay dense), limits of its own, on_failure: withhold (the others go",
        "# on without it), and expect: fail.",
        "artifacts:",
        f"  - format: {known.dense}   # merged, dense: for serving at full size, and for further quantisation",
    ]
    if ships_adapter:
        lines += ["  - format: nf4-adapter   # the 4-bit base of training with the adapter beside it: loses nothing"]
    return [
        *lines,
        "  # - format: nf4           # merged, in NF4 again: small; dithered, since nearest would erase a small delta",
        "  # - format: fp8           # merged, 8-bit floats for vLLM; w8a8, w8a16 and w4a16 are integers for it",
        "  # - format: onnx-int4     # for ONNX Runtime GenAI; needs the extra qlora-export[onnx]",
    ]


def _drift(start: Start) -> list[str]:
    text = _relative(start.text, start.folder) if start.text else PLACEHOLDER
    note = "" if start.text else "   # <- REPLACE: text that training never saw, in the form the model will meet"
    return [
        "# The gate: every artifact is opened in its own runtime and compared with the model that was trained.",
        "drift:",
        "  # JSON lines with `messages` (chats) or `text`, or a plain .txt file. A few thousand tokens decide well.",
        f"  text: {_scalar(text)}{note}",
        "  # tokens: 20000          # measure on the first so many tokens only",
        "  # window_tokens: 1024    # the longest window",
        "  # protocol: windows      # or disjoint-2048, strided, llama.cpp-512, lm-eval-rolling: see docs/drift.md",
        "  # Limits judge; one that is null is reported only. These are the defaults.",
        "  limits:",
        f"    perplexity_ratio: {DEFAULT_LIMITS.perplexity_ratio}   # at most",
        f"    mean_kl: {DEFAULT_LIMITS.mean_kl}            # at most, nats per token",
        f"    same_top1: {DEFAULT_LIMITS.same_top1}          # at least: share of tokens with the same best answer",
        f"    gain_kept: {DEFAULT_LIMITS.gain_kept}          # at least: share of what fine-tuning gained",
        f"    survival_min: {DEFAULT_LIMITS.survival_min}        # at least: what the lowest layer kept of the delta",
    ]


def _publish(to: str | None) -> list[str]:
    mark = "" if to else "# "
    return [
        "# Where artifacts go that passed; `check` works without. {name} and {format} stand for each artifact's.",
        f"{mark}publish:",
        f"{mark}  to: {_scalar(to or 'hub:owner/model-{name}')}   # or folder:PATH, a registry on this machine",
        f"{mark}  visibility: private    # private | public; an existing repository must have it already",
        f"{mark}  as: commit             # commit | pull-request",
        "#   version: v1            # the tag, which never moves; by default the first digits of the manifest's digest",
        "#   sign: key:release.pem  # or sigstore; needs the extra qlora-export[sign]",
        "#   card: {license: apache-2.0, language: [en], tags: [support], datasets: [owner/dataset]}",
    ]
