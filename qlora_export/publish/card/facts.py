"""What a model card is made from, and what follows from it without looking at any weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_export.artifact import Artifact
from qlora_export.catalog import ARTIFACTS, FormatInfo
from qlora_export.drift.results import MAY_LACK, Drift
from qlora_export.errors import UsageError
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.recipe.config import CardRecipe, parse_training
from qlora_export.report.calibration import calibration_lines
from qlora_export.report.recorded import recorded_entry
from qlora_export.sources.model_config import is_classifier

LABEL_GRAPH = ("onnxruntime", "tokenizers", "huggingface_hub")
VLLM = ("vllm",)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CardItem:
    """One artifact of the repository: its drift as measured, and its folder as a prefix, `""` or `"onnx-int4/"`."""

    artifact: Artifact
    drift: Drift
    prefix: str

    @property
    def info(self) -> FormatInfo:
        """What the catalog tells of its format; raises UsageError for one that it does not know."""
        form = self.artifact.format
        if form not in ARTIFACTS:
            raise UsageError(f"no model card can be written for the format {form!r}", f"known: {', '.join(ARTIFACTS)}")
        return ARTIFACTS[form]

    @property
    def packages(self) -> tuple[str, ...]:
        """What must be installed to load it; with zero points transformers does not."""
        if self.info.library == "onnx" and self.is_classifier:
            return LABEL_GRAPH
        return VLLM if self.has_zero_points else self.info.packages

    @property
    def subfolder(self) -> str:
        """Its folder in the repository, without a slash at the end."""
        return self.prefix.rstrip("/")

    @property
    def adapter_folder(self) -> str:
        """Where an adapter lies that is kept beside the weights."""
        return f"{self.prefix}{ADAPTER_FOLDER}/"

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Its manifest."""
        return self.artifact.manifest

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in it; without one it is the base in another form."""
        return self.manifest["sources"]["adapter"] is not None

    @property
    def files(self) -> Mapping[str, Any]:
        """Its files by name."""
        files: Mapping[str, Any] = self.manifest["files"]
        return files

    @cached_property
    def is_classifier(self) -> bool:
        """Whether it is a sequence classifier, by its config or its adapter's."""
        task = self._json("adapter_config.json").get("task_type")
        return is_classifier(self._json("config.json")) or task == "SEQ_CLS"

    @property
    def model_class(self) -> str:
        """The class of transformers that opens it."""
        return "AutoModelForSequenceClassification" if self.is_classifier else "AutoModelForCausalLM"

    @property
    def graph(self) -> str:
        """The name of its ONNX graph."""
        return next((name for name in sorted(self.files) if name.endswith(".onnx")), "model.onnx")

    @property
    def quantised_training(self) -> Mapping[str, Any]:
        """How the base was quantised while it was loaded for training; empty where it was not."""
        found: Mapping[str, Any] = self.manifest.get("training_quantization") or {}
        return found if found.get("quant_type") in ("nf4", "fp4") and found.get("provenance") != "base" else {}

    @cached_property
    def has_zero_points(self) -> bool:
        """Whether groups of compressed-tensors have zero points, which vLLM reads and transformers does not."""
        stated = self._json("config.json").get("quantization_config")
        groups = stated.get("config_groups") if isinstance(stated, dict) else None
        found = groups.values() if isinstance(groups, dict) else ()
        return any(group.get("weights", {}).get("symmetric") is False for group in found if isinstance(group, dict))

    @cached_property
    def chats(self) -> bool:
        """Whether a chat template is shipped with it."""
        return "chat_template.jinja" in self.files or "chat_template" in self._json("tokenizer_config.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.artifact.path / name
        data = json.loads(path.read_bytes()) if name in self.files else {}
        return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card tells: `report` is report.json, `recipe` the recipe's facts, `license` as settled."""

    repository: str
    items: tuple[CardItem, ...]
    base_id: str
    license: str
    settings: CardRecipe
    report: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return Path(self.repository).name

    @property
    def main(self) -> CardItem:
        """The artifact that decides library and relation: the first that is no ONNX, which has a folder of its own."""
        return next((item for item in self.items if item.info.library != "onnx"), self.items[0])

    @property
    def base_commit(self) -> str | None:
        """The commit of the base on the Hub, where the run knows it."""
        stated = (str(self.recipe.get("base", "")), str(self.items[0].manifest["sources"]["base"]["id"]))
        for text in stated:
            repository, _, revision = text.partition("@")
            if repository == self.base_id and COMMIT.fullmatch(revision):
                return revision
        return None

    def entry(self, item: CardItem) -> Mapping[str, Any]:
        """What the report says of this very artifact; empty where it does not know these bytes."""
        entry = recorded_entry(self.report, item.artifact.name) or {}
        return entry if entry.get("manifest_sha256") in (None, item.artifact.manifest_sha256) else {}

    def entries(self, key: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What the report says of artifacts under a key, by their names, where it says anything."""
        found = ((item.artifact.name, self.entry(item).get(key)) for item in self.items)
        return [(name, value) for name, value in found if value is not None]

    @property
    def calibration(self) -> list[tuple[str, str]]:
        """On which text artifacts were rounded by calibration, and how many layers were not, in words by name."""
        return [(item.artifact.name, line) for item in self.items for line in calibration_lines(item.manifest)]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was assumed for any of the artifacts, each once."""
        return tuple(dict.fromkeys(str(text) for item in self.items for text in item.manifest.get("assumptions", ())))

    def skipped_modules(self, training: Mapping[str, Any]) -> tuple[str, ...]:
        """The modules that training left as they are, where the recipe states them."""
        stated = self.recipe.get("training_quantization") if training["provenance"] == "stated" else None
        return parse_training(stated).skip if stated else ()

    def drift(self, item: CardItem) -> Drift:
        """The published report's numbers, so that card and report agree; else those of the item."""
        recorded = self.entry(item).get("drift")
        return drift_from(recorded) if recorded else item.drift


def drift_from(recorded: Mapping[str, Any]) -> Drift:
    """A drift read back from the report, where a number that was not finite is null."""
    numbers: dict[str, Any] = {
        name: float("nan") if value is None and name not in MAY_LACK else value for name, value in recorded.items()
    }
    return Drift(**numbers)
