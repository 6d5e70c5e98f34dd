"""A format is one file and one row, and so is an exporter: nothing else knows the two that are made and released here.

The files are `tests/helpers/tf32.py` and `tests/helpers/copied_folder.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from qlora_export.catalog import EXPORTERS, FORMATS, FormatInfo
from qlora_export.errors import UsageError
from qlora_export.formats.registry import load_format
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import publish, release
from qlora_export.publish.card.front_matter import split_readme
from qlora_export.recipe.config import Recipe
from qlora_export.report.run import Run
from qlora_export.testing import HubServer
from qlora_export.testing.card import card_problems
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.cli.inside import inside
from tests.formats.test_contract import cuts, encode
from tests.helpers.pico import RecipeMaker
from tests.helpers.tf32 import rounded
from tests.helpers.values import random_values

ROW = FormatInfo(
    "tests.helpers.tf32:tf32",
    "merged, float32 with a mantissa of ten bits",
    "float32 with a mantissa of ten bits",
    library="transformers",
    base_model_relation="quantized",
    packages=("transformers", "accelerate"),
    tags=("tf32",),
)
COPY_ROW = FormatInfo(
    "tests.helpers.copied_folder:copied",
    "tf32 once more",
    "a copy of the tf32 weights",
    library="transformers",
    base_model_relation="quantized",
    packages=("transformers",),
)
NAMES = ("tf32", "tf32-copy")
LIMITS = {"perplexity_ratio": 1.001, "mean_kl": 1e-4, "same_top1": None, "gain_kept": None, "survival_min": 0.9}


@pytest.fixture(scope="module")
def rows() -> Iterator[None]:
    """The two rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "tf32", ROW)
        patch.setitem(EXPORTERS, "tf32-copy", COPY_ROW)
        yield


@dataclass(frozen=True)
class Released:
    """A run into a registry, and the cards of its artifacts on a Hub on this machine, by name."""

    out: Path
    run: Run
    registry: Path
    cards: dict[str, str]


@pytest.fixture(scope="module")
def released(
    rows: None, pico_recipe: RecipeMaker, pico_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Released:
    """Float32 beside the two, built, checked and published to a folder, then to a Hub, which gets a card."""
    folder = tmp_path_factory.mktemp("toy")
    out, registry = folder / "out", folder / "registry"

    def recipe(to: str) -> Recipe:
        place = {"to": to, "card": {"license": "apache-2.0"}}
        drift = {"text": str(pico_text), "limits": LIMITS}
        return pico_recipe("fp32", *NAMES, base_id="acme/base", drift=drift, publish=place)

    run = release(recipe(f"folder:{registry}"), RunOptions(out))
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_rehearsal", "HF_HUB_OFFLINE": "0"}
        publish(recipe("hub:acme/{name}"), RunOptions(out, publisher_environment=environment))
        cards = {name: hub.repositories[f"acme/{name}"].text("main", "README.md") for name in NAMES}
    return Released(out, run, registry, cards)


def test_it_keeps_what_every_format_promises(rows: None) -> None:
    form, spec = load_format("tf32", TrainingQuantization()), TensorSpec("layer.weight", "BF16", (129, 88))
    values = random_values(129, 88).reshape(-1)
    whole = encode(form, spec, values, [0, spec.rows])
    assert {name: raw.tobytes() for name, raw in encode(form, spec, values, cuts(form, spec, 3)).items()} == {
        name: raw.tobytes() for name, raw in whole.items()
    }
    decoded = form.decode(spec, whole, range(spec.rows))
    assert 0 < np.abs(decoded - values).max() <= 2**-11 * np.abs(values).max()


def test_it_is_built(released: Released) -> None:
    dense, toy, copy = (load_file(released.out / name / "model.safetensors") for name in ("fp32", *NAMES))
    assert dense.keys() == toy.keys()
    changed = 0
    for name, values in dense.items():
        np.testing.assert_array_equal(toy[name].reshape(-1), rounded(values.reshape(-1)))
        np.testing.assert_array_equal(toy[name], copy[name])
        changed += int((toy[name] != values).sum())
    assert changed > 10_000


def test_it_is_checked_in_the_runtime_of_transformers(released: Released) -> None:
    assert released.run.ledger is not None
    dense, toy, copy = released.run.ledger.entries
    assert [entry.artifact.format for entry in (toy, copy)] == list(NAMES)
    for entry in (toy, copy):
        assert entry.runtime == "transformers"
        assert entry.verdict.outcome == "pass"
        assert dense.drift.mean_kl < entry.drift.mean_kl < 1e-4
    assert toy.drift.mean_kl == pytest.approx(copy.drift.mean_kl)
    assert min(toy.survival.values()) > 0.9


def test_it_is_published_with_a_card_that_names_it(released: Released) -> None:
    assert {path.parent.name for path in released.registry.glob("*/latest")} == {"fp32", *NAMES}
    for name, row in zip(NAMES, (ROW, COPY_ROW), strict=True):
        card = released.cards[name]
        assert card_problems(card) == ([], [])
        front = yaml.safe_load(split_readme(card).metadata)
        assert (front["library_name"], front["base_model_relation"]) == ("transformers", "quantized")
        assert set(row.tags) <= set(front["tags"])
        assert front["model-index"][0]["results"][0]["metrics"][0]["args"]["artifact"] == name
        assert f"merged into its weights, rounded to {row.weights}." in card
        assert f"pip install {' '.join(row.packages)}\n" in card
        assert f'AutoModelForCausalLM.from_pretrained("acme/{name}"' in card
        assert "vllm serve" not in card


def test_it_is_listed(rows: None) -> None:
    listed = {item["format"]: item for item in json.loads(inside("formats", "--json").stdout)["formats"]}
    assert listed["tf32"] == {
        "format": "tf32",
        "kind": "format",
        "what": ROW.summary,
        "bytes_per_weight": 4.0,
        "runtime": "transformers",
    }
    assert (listed["tf32-copy"]["kind"], listed["tf32-copy"]["what"]) == ("export", COPY_ROW.summary)
    assert ROW.summary in inside("formats", env={"COLUMNS": "200"}).stdout
    schema = json.loads(inside("schema", "recipe").stdout)
    assert set(NAMES) <= set(schema["$defs"]["ArtifactRecipe"]["properties"]["format"]["enum"])


def test_without_its_row_it_is_unknown(pico_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FORMATS, "tf32", raising=False)
    with pytest.raises(UsageError, match="unknown format 'tf32'"):
        pico_recipe("tf32")
