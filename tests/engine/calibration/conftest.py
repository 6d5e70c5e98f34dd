"""A QLoRA on a pico base whose rows hold whole groups, and texts to calibrate it on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from qlora_export.quant.rounding import scale_search
from tests.helpers.files import edit_tensors
from tests.helpers.pico import save_adapter, save_base

WORDS = (
    "order", "parcel", "came", "late", "broken", "early", "today", "yesterday", "we", "you", "they", "it", "sent",
    "paid", "wrote", "asked", "money", "back", "again", "house", "street", "box", "open", "closed", "small",
    "large", "red", "blue", "number", "please", "sorry", "thanks", "soon", "never", "always", "morning", "night",
)  # fmt: skip


@dataclass(frozen=True)
class Pico:
    """Folders of a base, of an adapter with its sidecar, and of one that learned nothing; two texts of one kind."""

    base: Path
    adapter: Path
    untrained: Path
    text: Path
    holdout: Path


@pytest.fixture(scope="package")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Two blocks of 64 and 128 columns."""
    folder = tmp_path_factory.mktemp("calibrate")
    base = save_base(folder / "base", seed=5, intermediate_size=128)
    adapter = save_adapter(base, folder / "adapter", seed=6, size=0.01)
    untrained = Path(shutil.copytree(adapter, folder / "untrained"))
    edit_tensors(
        untrained / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: 0 * item for name, item in tensors.items() if "lora_B" in name}),
    )
    return Pico(
        base, adapter, untrained, save_chats(folder / "text.jsonl", 70, 0), save_chats(folder / "h.jsonl", 20, 1)
    )


@pytest.fixture(scope="module")
def hasty_search() -> Iterator[None]:
    """Two scales are tried for each group instead of all, for tests that ask nothing of how good the search is."""
    with mock.patch.object(scale_search, "FRACTIONS", (0.9, 1.0)):
        yield


def save_chats(path: Path, count: int, seed: int) -> Path:
    """Chats of words in any order."""
    draw = random.Random(seed)
    turns = [(" ".join(draw.choices(WORDS, k=12)), " ".join(draw.choices(WORDS, k=16))) for _ in range(count)]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
            + "\n"
            for asked, told in turns
        )
    )
    return path
