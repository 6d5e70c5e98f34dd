"""A QLoRA on a pico base whose rows hold whole groups, and texts to calibrate it on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import edit_tensors, save_adapter, save_base


@dataclass(frozen=True)
class Pico:
    """Folders of a base, of an adapter with its sidecar, and of one that learned nothing; a text of 70 chats."""

    base: Path
    adapter: Path
    untrained: Path
    text: Path


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
    text = folder / "calibration.jsonl"
    lines = [
        [
            {"role": "user", "content": f"Where is order {number * 37 % 101}?"},
            {"role": "assistant", "content": "It left our house " + "very " * (number % 7) + "early today."},
        ]
        for number in range(70)
    ]
    text.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return Pico(base, adapter, untrained, text)
