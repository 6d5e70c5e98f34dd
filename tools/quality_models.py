"""What the quality benchmark measures on: a folder with base, adapter and texts, copies with scaled deltas, sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "qlora_export" / "demo"
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class QualityModel:
    """One model: where its parts and its texts lie."""

    name: str
    base: Path
    adapter: Path
    holdout: Path
    calibration: Path


def find_model(word: str, text: Path | None = None) -> QualityModel:
    """`demo`, or a folder that `make_quality_model` filled; `text` to measure on instead of its own."""
    folder = DEMO if word == "demo" else Path(word).resolve()
    holdout = text.resolve() if text is not None else folder / "holdout.jsonl"
    return QualityModel(folder.name, folder / "base", folder / "adapter", holdout, folder / "calibration.jsonl")


def calibration_ids(model: QualityModel, sequences: int) -> list[list[int]]:
    """Token ids of the sequences that a calibrated row looks at, in its order."""
    from qlora_export.engine.calibration.text import calibration_tokens, read_calibration
    from qlora_export.recipe.calibration import CalibrationRecipe
    from qlora_export.runtimes.tokenizer import FolderTokenizer

    recipe = CalibrationRecipe(text=str(model.calibration), sequences=sequences)
    drawn = calibration_tokens(recipe, read_calibration(recipe, Path()), FolderTokenizer(model.base))
    return [list(window) for window in drawn.windows]


def scaled_adapter(adapter: Path, factor: float, out: Path) -> Path:
    """A copy of an adapter whose delta is `factor` times as large, by its B factors."""
    from safetensors.torch import load_file, save_file

    if out.is_dir():
        shutil.rmtree(out)
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    tensors = {name: tensor * (factor if ".lora_B." in name else 1) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return out


@dataclass(frozen=True)
class Size:
    """Bytes of all weight files, and bits a weight of the linear layers' matrices takes with all that belongs to it."""

    bytes: int
    bits_per_weight: float


def size_of(folder: Path, base: Path) -> Size:
    """The size of a folder's weights, adapter included, from the headers of its files."""
    matrices = {
        name.removesuffix(".weight"): entry["shape"][0] * entry["shape"][1]
        for name, entry in _headers(base)
        if name.endswith("proj.weight") and len(entry["shape"]) == 2
    }
    held = 0
    for name, entry in _headers(folder):
        first, last = entry["data_offsets"]
        if not name.endswith(".bias") and any(f"{module}." in name for module in matrices):
            held += last - first
    total = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return Size(total, 8 * held / sum(matrices.values()))


def _headers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")
