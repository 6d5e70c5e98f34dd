"""Sources to break: sound pairs, ways to break one file of a copy, and what holds when the command is handed it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.cli.inside import inside
from tests.helpers import zoo
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.pico import load_qlora
from tests.processes import Finished

REFUSED, BAD_INPUT, USAGE = 4, 5, 2
CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
BASE_WEIGHTS, BASE_INDEX, SIDECAR = "model.safetensors", "model.safetensors.index.json", "qlora_export.json"
STORED_Q = "model.layers.0.self_attn.q_proj"
Q = f"base_model.model.{STORED_Q}"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"

# Architecture and variant of the pairs that are not made of the pico base.
ZOO_PAIRS = {
    "mixtral": ("mixtral", "parameters"),
    "classifier": ("llama_classifier", "lora"),
    "multimodal": ("gemma3_multimodal", "lora"),
    "qwen2": ("qwen2", "lora"),
    "gpt2": ("gpt2", "lora"),
    "tied-embedding": ("qwen3", "embedding_tied"),
}
PAIRS = ("pico", "four-bit", *ZOO_PAIRS)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
Pairs = Callable[[str], tuple[Path, Path]]


@dataclass(frozen=True)
class Place:
    """A base and an adapter that a case may break, and where the command is told to write."""

    base: Path
    adapter: Path
    out: Path

    @classmethod
    def below(cls, folder: Path) -> Place:
        """All of them below one folder, none made yet."""
        return cls(folder / "base", folder / "adapter", folder / "out")

    @property
    def weights(self) -> Path:
        """The adapter's weights."""
        return self.adapter / WEIGHTS

    @property
    def base_weights(self) -> Path:
        """The base's weights."""
        return self.base / BASE_WEIGHTS

    @property
    def mark(self) -> Path:
        """A file that only code of a source would write."""
        return self.out.parent / "executed"


Breaker = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """What is broken in which pair, the exit code, and what the message must hold; `late` means while reading."""

    breaks: Breaker
    code: int
    says: tuple[str, ...]
    pair: str = "pico"
    recorded: bool = False
    late: bool = False


def sound_pairs(folder: Path, pico_base: Path, pico_adapter: Path) -> Pairs:
    """A sound base and a sound adapter by name, each made when it is first asked for."""

    @functools.cache
    def pair(name: str) -> tuple[Path, Path]:
        if name == "pico":
            return pico_base, pico_adapter
        base = folder / name / "base"
        if name == "four-bit":
            load_qlora(pico_base).save_pretrained(base)
            return base, pico_adapter
        architecture, variant = ZOO_PAIRS[name]
        zoo.save_architecture(architecture, base, seed=3)
        return base, zoo.save_variant(base, architecture, variant, folder / name / "adapter", seed=4)

    return pair


def lay_out_pair(place: Place, pair: tuple[Path, Path], recorded: bool) -> None:
    """Copy a sound pair; without its record the base may be broken and the sidecar does not notice."""
    for source, target in zip(pair, (place.base, place.adapter), strict=True):
        shutil.copytree(source, target)
    if not recorded:
        (place.adapter / SIDECAR).unlink(missing_ok=True)


def build(place: Place, form: str = "bf16") -> Finished:
    """`qlora-export build`, run in this process."""
    sources = ["--base", place.base, "--adapter", place.adapter]
    return inside("build", *sources, "--format", form, "--onto", "original", "--out", place.out)


def assert_refused(case: Case, pairs: Pairs, place: Place) -> None:
    """The broken pair is refused with its exit code and by name; the sources stay as they are, nothing is written."""
    lay_out_pair(place, pairs(case.pair), case.recorded)
    case.breaks(place)
    before = [folder_bytes(folder) for folder in (place.base, place.adapter)]
    found = build(place)
    assert found.returncode == case.code, found.stderr
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    for words in case.says:
        assert words in found.stderr
    assert [folder_bytes(folder) for folder in (place.base, place.adapter)] == before
    assert not place.mark.exists()
    if case.late:
        assert not (place.out / "bf16").exists()
        assert not list(place.out.rglob("manifest.json"))
    elif not place.out.is_symlink():
        assert not place.out.exists()


def several(*breakers: Breaker) -> Breaker:
    """All of these, in order."""
    return lambda place: [breaks(place) for breaks in breakers]


def settings(**changes: Any) -> Breaker:
    """Change keys of adapter_config.json."""
    return lambda place: edit_json(place.adapter / CONFIG, **changes)


def base_settings(**changes: Any) -> Breaker:
    """Change keys of config.json."""
    return lambda place: edit_json(place.base / "config.json", **changes)


def tensors(change: Change) -> Breaker:
    """Change the adapter's tensors."""
    return lambda place: edit_tensors(place.weights, lambda found: _discard(change(found)))


def base_tensors(change: Change) -> Breaker:
    """Change the base's tensors."""
    return lambda place: edit_tensors(place.base_weights, lambda found: _discard(change(found)))


def text(name: str, content: str) -> Breaker:
    """Write a file of the adapter."""
    return lambda place: (place.adapter / name).write_text(content)


def base_text(name: str, content: str) -> Breaker:
    """Write a file of the base."""
    return lambda place: (place.base / name).write_text(content)


def remove(name: str) -> Breaker:
    """Remove a file of the adapter."""
    return lambda place: (place.adapter / name).unlink()


def base_remove(name: str) -> Breaker:
    """Remove a file of the base."""
    return lambda place: (place.base / name).unlink()


def linked_out(name: str, of_base: bool = False) -> Breaker:
    """Move a file out of its folder and leave a link to it."""

    def breaks(place: Place) -> None:
        path = (place.base if of_base else place.adapter) / name
        outside = place.out.parent / f"outside-{name}"
        shutil.move(path, outside)
        path.symlink_to(outside)

    return breaks


def emptied(of_base: bool) -> Breaker:
    """Leave nothing in a folder."""

    def breaks(place: Place) -> None:
        folder = place.base if of_base else place.adapter
        shutil.rmtree(folder)
        folder.mkdir()

    return breaks


def file_instead(of_base: bool) -> Breaker:
    """Put a file where a folder was."""

    def breaks(place: Place) -> None:
        folder = place.base if of_base else place.adapter
        shutil.rmtree(folder)
        folder.write_text("{}")

    return breaks


def put(name: str, tensor: torch.Tensor) -> Change:
    """Put a tensor in, or another in its place."""
    return lambda found: found.update({name: tensor})


def drop(*parts: str) -> Change:
    """Leave out the tensors whose name holds one of these."""
    return lambda found: [found.pop(name) for name in list(found) if any(part in name for part in parts)]


def map_one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace a tensor by what a function makes of it."""
    return lambda found: found.update({name: change(found[name]).contiguous()})


def several_changes(*changes: Change) -> Change:
    """All of these, in order."""
    return lambda found: [change(found) for change in changes]


def nan_row(tensor: torch.Tensor) -> torch.Tensor:
    """A value in row 3, column 5 is no number."""
    tensor[3, 5] = float("nan")
    return tensor


def _discard(_: object) -> None:
    """Nothing, so that a change may be any expression."""
