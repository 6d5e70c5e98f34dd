"""What lies beside the weights of a release: card, report, provenance, bill of materials, checksums."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.artifact import Artifact, file_facts
from qlora_export.drift.gate import recall
from qlora_export.errors import ExportError
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.options import RunOptions
from qlora_export.publish.base import Account
from qlora_export.publish.card import CardFacts, CardItem, licence_of, make_card
from qlora_export.publish.hub.destination import places_of
from qlora_export.publish.hub.job import (
    BOM_PATH,
    CHECKSUMS_PATH,
    PROVENANCE_PATH,
    REPORT_PATH,
    PublishedRevision,
    TargetState,
)
from qlora_export.publish.provenance import invocation_of
from qlora_export.publish.stage import Publication, _link_artifacts, stage
from qlora_export.publish.staged_folder import Staged
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import report, write_report
from qlora_export.report.recorded import read_report, recorded_entry
from tests.helpers.files import edit_json

LIMITS = {"perplexity_ratio": 1.5, "mean_kl": 1.0, "same_top1": 0.1, "gain_kept": None, "survival_min": None}


@pytest.fixture(scope="module")
def publication(
    pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Publication]:
    """What a measured pico release publishes of one of its artifacts."""
    out = tmp_path_factory.mktemp("documents") / "out"
    adapter = Path(shutil.copytree(pico_adapter, out.parent / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="acme/base")
    data = {
        "base": str(pico_base),
        "base_id": "acme/base",
        "adapter": str(adapter),
        "artifacts": ["bf16", "nf4-adapter", "adapter"],
        "drift": {"text": str(pico_text), "limits": LIMITS},
        "publish": {"to": "hub:acme/bot-{name}", "card": {"license": "apache-2.0", "tags": ["support"]}},
    }
    recipe = make_recipe(data, Path(), "test")
    run = pipeline.check(recipe, RunOptions(out, workers=2))
    write_report(run, out)
    recorded = read_report(out / "report.json")
    assert recorded == json.loads(json.dumps(report(run)))

    def make(name: str) -> Publication:
        place = next(place for place in places_of(recipe.publish, recipe.artifacts) if name in place.prefixes)  # type: ignore[arg-type]
        artifact: Artifact = next(artifact for artifact in run.artifacts if artifact.name == name)
        verified = recall(artifact, recorded_entry(recorded, name) or {})
        return Publication(place, TargetState(place.target, None), [verified], recipe, Account(recorded, "acme/base"))

    return make


@pytest.fixture(params=["bf16", "nf4-adapter", "adapter"])
def staged(request: pytest.FixtureRequest, publication: Callable[[str], Publication], tmp_path: Path) -> Staged:
    return stage(publication(request.param), tmp_path)


def test_the_allow_list_is_what_lies_there(staged: Staged) -> None:
    there = {path.relative_to(staged.folder).as_posix() for path in staged.folder.rglob("*") if path.is_file()}
    assert there == set(staged.files)
    assert all(file_facts(staged.folder / name) == dict(facts) for name, facts in staged.files.items())


def test_data_of_a_graph_keeps_one_name(tmp_path: Path) -> None:
    """ONNX Runtime refuses a file that has several, and a run that failed leaves what it staged."""
    folder = tmp_path / "onnx-fp32"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        (folder / name).write_bytes(b"0")
    files = {name: file_facts(folder / name) for name in ("model.onnx", "model.onnx.data")}
    _link_artifacts(tmp_path / "staged", {"": Artifact("onnx-fp32", "onnx-fp32", folder, {"files": files}, "")})
    assert (tmp_path / "staged/model.onnx.data").read_bytes() == b"0"
    assert [(folder / name).stat().st_nlink for name in ("model.onnx", "model.onnx.data")] == [2, 1]


def test_no_path_and_no_time_of_this_machine(staged: Staged, publication: Callable[[str], Publication]) -> None:
    folders = {str(Path.home()), "/tmp", str(staged.folder)}
    for name in ("README.md", REPORT_PATH, PROVENANCE_PATH, BOM_PATH, CHECKSUMS_PATH):
        text = (staged.folder / name).read_text()
        assert not [folder for folder in folders if folder in text], name
        assert "startedOn" not in text
    (name,) = (artifact.name for artifact in staged.artifacts.values())
    again = stage(publication(name), staged.folder.parent.parent.parent / "again")
    assert {name: dict(facts) for name, facts in again.files.items()} == {
        name: dict(facts) for name, facts in staged.files.items()
    }


def test_the_checksums_are_those_of_coreutils(staged: Staged) -> None:
    found = subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS_PATH], cwd=staged.folder, capture_output=True)
    assert found.returncode == 0, found.stdout
    assert len(found.stdout.splitlines()) == len(staged.files) - 2, "all but the card and the list itself"
    (staged.folder / "manifest.json").unlink()
    (staged.folder / "manifest.json").write_text("{}")
    found = subprocess.run(["sha256sum", "-c", CHECKSUMS_PATH], cwd=staged.folder, capture_output=True)
    assert found.returncode == 1


def test_the_bill_of_materials_is_valid(staged: Staged) -> None:
    content = (staged.folder / BOM_PATH).read_text()
    error = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str(content)
    assert error is None, error
    model = json.loads(content)["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    names = {ancestor["name"] for ancestor in model["pedigree"]["ancestors"]}
    assert any("base" in name for name in names)
    assert len(names) == 2


def test_the_provenance_names_every_file_and_source(staged: Staged) -> None:
    statement = json.loads((staged.folder / PROVENANCE_PATH).read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert subjects == {
        name: facts["sha256"]
        for name, facts in staged.files.items()
        if not name.startswith("qlora-export/") and name not in ("README.md", CHECKSUMS_PATH)
    }
    definition = statement["predicate"]["buildDefinition"]
    (artifact,) = staged.artifacts.values()
    text = json.dumps(definition["resolvedDependencies"])
    assert artifact.manifest["sources"]["adapter"]["sha256"] in text
    for facts in artifact.manifest["sources"]["base"]["files"].values():
        assert facts["sha256"] in text
    assert invocation_of((staged.folder / PROVENANCE_PATH).read_bytes())


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"predicate": {"runDetails": 3}}'])
def test_what_is_no_provenance_of_ours(content: bytes) -> None:
    assert invocation_of(content) is None


def test_what_the_hub_holds_is_kept(publication: Callable[[str], Publication], tmp_path: Path) -> None:
    """The report on the Hub stands, whatever was measured since."""
    first = publication("bf16")
    lies = stage(first, tmp_path / "first")
    texts = {name: (lies.folder / name).read_text() for name in ("README.md", PROVENANCE_PATH, REPORT_PATH)}
    measured = json.loads(json.dumps(first.account.report))
    measured["artifacts"][0]["drift"]["mean_kl"] += 1e-9
    seen = TargetState(first.place.target, "0" * 40, (PublishedRevision("main", "0" * 40, texts),))
    again = replace(first, seen=seen, account=replace(first.account, report=measured))
    assert dict(stage(again, tmp_path / "again").files) == dict(lies.files)
    other = replace(again, account=replace(again.account, base_license="apache-2.0"))
    assert other.held() is not None
    changed = replace(again, recipe=again.recipe.model_copy(update={"base_id": "acme/other"}))
    assert changed.held() is None


EXPECTED = {
    "bf16": ("finetune", "transformers"),
    "nf4-adapter": ("quantized", "peft"),
    "adapter": ("adapter", "peft"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_front_matter(publication: Callable[[str], Publication], tmp_path: Path, name: str) -> None:
    lies = stage(publication(name), tmp_path)
    card = ModelCard((lies.folder / "README.md").read_text())
    data = card.data.to_dict()
    assert data["base_model"] == "acme/base"
    assert (data["base_model_relation"], data["library_name"]) == EXPECTED[name]
    assert data["license"] == "apache-2.0"
    assert {"qlora", "support"} <= set(data["tags"])
    assert next(result.metric_type for result in card.data.eval_results) == "perplexity"


def card_facts(publication: Publication) -> CardFacts:
    items = tuple(CardItem(item.artifact, item.drift, "") for item in publication.verified)
    settings = publication.settings
    told = publication.told
    return CardFacts("acme/bot", items, "acme/base", "apache-2.0", settings, publication.account.report, told)


@given(prose=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), max_size=300))
def test_prose_survives_and_twice_is_once(publication: Callable[[str], Publication], prose: str) -> None:
    facts = card_facts(publication("bf16"))
    try:
        first = make_card(facts, prose)
    except ExportError:
        assert prose.lstrip("\ufeff \n\t").startswith("---") or "qlora-export:" in prose
        return
    assert make_card(facts, first) == first
    if not prose.lstrip("\ufeff \n\t").startswith("---"):
        assert prose.strip("\ufeff\n") in first


def test_what_people_wrote_into_the_front_matter(publication: Callable[[str], Publication]) -> None:
    facts = card_facts(publication("bf16"))
    head = "---\nthumbnail: x.png   # ours\nlicense: mit\ntags: [mine]\n---\n# Title\n\nProse  \n"
    made = make_card(facts, head)
    front = yaml.safe_load(made.split("---\n")[1])
    assert "thumbnail: x.png   # ours\n" in made
    assert front["license"] == "apache-2.0"
    assert {"mine", "qlora"} <= set(front["tags"])
    assert "# Title\n\nProse  \n" in made


@pytest.mark.parametrize(
    "broken",
    [
        "---\na: [\n---\ntext",
        "a\n<!-- qlora-export:begin -->\nno end",
        "<!-- qlora-export:begin -->\n<!-- qlora-export:end -->\n" * 2,
    ],
)
def test_a_card_that_cannot_be_edited_safely(publication: Callable[[str], Publication], broken: str) -> None:
    with pytest.raises(ExportError, match=r"README\.md"):
        make_card(card_facts(publication("bf16")), broken)


def test_the_licence_of_a_base(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    for content, expected in {
        "---\nlicense: llama3.1\n---\n": "llama3.1",
        "no front matter": None,
        "---\nlicense: [\n---\n": None,
    }.items():
        (tmp_path / "README.md").write_text(content)
        assert licence_of(tmp_path) == expected
