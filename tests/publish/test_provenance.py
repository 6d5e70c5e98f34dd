from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL

from qlora_export.artifact import Artifact, FileFacts, file_facts
from qlora_export.drift.gate import Z_95
from qlora_export.drift.results import Drift
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.publish.cyclonedx import SPDX_IDS, bill_of_materials
from qlora_export.publish.provenance import invocation_of, provenance
from qlora_export.publish.public_report import public_recipe, public_report
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from tests.drift.test_gate import PERFECT
from tests.helpers.pico import save_adapter

COMMIT = "4e20de362430cd3b72f300e6b0f18e50e7166e08"
INVOCATION = "f" * 64
DRIFT = Drift(**{**PERFECT, "perplexity": 1.75, "perplexity_stderr": 0.01, "mean_kl": 0.002, "mean_kl_stderr": 0.0001})


@pytest.fixture(scope="module")
def recipe(pico_base: Path, pico_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two adapters on a base in the Hub's cache, with every kind of path in it."""
    place = tmp_path_factory.mktemp("secret-place")
    base = place / "models--acme--pico" / "snapshots" / COMMIT
    shutil.copytree(pico_base, base)
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shutil.copytree(pico_adapter, place / "first")
    save_adapter(pico_base, place / "second", seed=7)
    (place / "holdout.jsonl").write_text('{"text": "once"}')
    data = {
        "base": str(base),
        "adapter": [str(place / "first"), {"path": "second", "weight": 0.5}],
        "artifacts": ["bf16", {"format": "nf4-adapter", "limits": {"perplexity_ratio": float("inf")}}],
        "drift": {"text": str(place / "holdout.jsonl")},
        "publish": {"to": f"folder:{place}/registry", "sign": f"key:{place}/key.pem", "as": "pull-request"},
    }
    return make_recipe(data, place, "test")


@pytest.fixture(scope="module")
def artifacts(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, ...]:
    out = tmp_path_factory.mktemp("out")
    return tuple(build(make_plan(recipe, out), out, BuildOptions()))


@pytest.fixture(scope="module")
def manifests(artifacts: tuple[Artifact, ...]) -> list[Mapping[str, Any]]:
    return [artifact.manifest for artifact in artifacts]


@pytest.fixture(scope="module")
def files(artifacts: tuple[Artifact, ...]) -> FileFacts:
    """One artifact at the root, the other in a folder."""
    found: FileFacts = {}
    for prefix, artifact in zip(("", "nf4-adapter/"), artifacts, strict=True):
        found |= {f"{prefix}{name}": facts for name, facts in artifact.manifest["files"].items()}
        found[f"{prefix}manifest.json"] = file_facts(artifact.path / "manifest.json")
    return found


@pytest.fixture
def report(artifacts: tuple[Artifact, ...]) -> dict[str, Any]:
    """A report as it is written: the first artifact measured, the second not."""
    first, second = (
        {"name": item.name, "format": item.format, "path": str(item.path), "reused": True, "drift": drift}
        for item, drift in zip(artifacts, (asdict(DRIFT), None), strict=True)
    )
    tokens = {"sha256": "ab" * 32, "count": 9}
    return {"schema": 1, "tokens": tokens, "artifacts": [first, second], "published": [{}], "exit_code": 0}


Made = dict[str, bytes]


@pytest.fixture
def made(recipe: Recipe, files: FileFacts, manifests: list[Mapping[str, Any]], report: dict[str, Any]) -> Made:
    """Both documents."""
    return {
        "provenance": provenance(files, manifests, public_recipe(recipe), INVOCATION),
        "bom": bill_of_materials("acme/bot", "v1", files, manifests, "apache-2.0", public_report(report)),
    }


def model_of(bom: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bom)["metadata"]["component"]
    return found


def digest(content: bytes) -> str:
    """What is compared in place of long documents, whose differences take minutes to print."""
    return hashlib.sha256(content).hexdigest()


def dependencies(content: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(content)["predicate"]["buildDefinition"]["resolvedDependencies"]
    return found


def test_in_toto_and_slsa_read_the_statement(made: Made, files: FileFacts) -> None:
    parsed = json_format.Parse(made["provenance"], statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"
    assert {item.name: item.digest["sha256"] for item in parsed.subject} == {
        name: facts["sha256"] for name, facts in files.items()
    }
    predicate = json_format.ParseDict(json_format.MessageToDict(parsed.predicate), provenance_pb2.Provenance())
    assert predicate.build_definition.build_type.startswith("pkg:pypi/qlora-export")
    assert predicate.run_details.builder.id
    assert predicate.run_details.metadata.invocation_id == INVOCATION
    for item in predicate.build_definition.resolved_dependencies:
        assert item.uri or item.digest, "in-toto wants an address or a digest"


def test_what_it_was_made_from_is_pinned(made: Made, manifests: list[Mapping[str, Any]]) -> None:
    base, weights, first, second = dependencies(made["provenance"])
    sources = manifests[0]["sources"]
    assert PackageURL.from_string(base["uri"]) == PackageURL("huggingface", "acme", "pico", COMMIT)
    assert base["digest"] == {"gitCommit": COMMIT}
    assert weights["digest"] == {"sha256": sources["base"]["files"]["model.safetensors"]["sha256"]}
    assert weights["downloadLocation"] == f"https://huggingface.co/acme/pico/resolve/{COMMIT}/model.safetensors"
    assert PackageURL.from_string(weights["uri"]).subpath == "model.safetensors"
    assert [first["name"], second["name"]] == ["first", "second"]
    assert [item["digest"]["sha256"] for item in (first, second)] == [x["sha256"] for x in sources["combined_from"]]
    assert second["annotations"]["weight"] == 0.5


def with_base_id(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(manifest))
    copy["sources"]["base"]["id"] = name
    return copy


@pytest.mark.parametrize(
    ("name", "uri"), [("acme/bot", "pkg:huggingface/acme/bot"), ("acme/bot@main", "pkg:huggingface/acme/bot")]
)
def test_a_base_without_commit_has_no_download_address(
    manifests: list[Mapping[str, Any]], files: FileFacts, name: str, uri: str
) -> None:
    base, weights, *_ = dependencies(provenance(files, [with_base_id(manifests[0], name)], {}, INVOCATION))
    assert base["uri"] == uri
    assert "digest" not in base
    assert "downloadLocation" not in weights


def test_a_base_in_a_folder_is_its_files(manifests: list[Mapping[str, Any]], files: FileFacts) -> None:
    found = dependencies(provenance(files, [with_base_id(manifests[0], "folder")], {}, INVOCATION))
    assert [item["name"] for item in found] == ["model.safetensors", "first", "second"]
    assert "uri" not in found[0]
    assert found[0]["annotations"] == {"role": "base", "of": "folder"}


def test_one_adapter_and_none(manifests: list[Mapping[str, Any]], files: FileFacts) -> None:
    manifest = with_base_id(manifests[0], "folder")
    manifest["sources"]["combined_from"] = []
    manifest["sources"]["adapter"]["id"] = f"acme/lora@{COMMIT}"
    *_, adapter = dependencies(provenance(files, [manifest], {}, INVOCATION))
    assert adapter["uri"] == f"pkg:huggingface/acme/lora@{COMMIT}"
    assert adapter["digest"] == {"sha256": manifest["sources"]["adapter"]["sha256"]}
    manifest["sources"]["adapter"] = None
    assert len(dependencies(provenance(files, [manifest], {}, INVOCATION))) == 1


def test_what_the_tool_decided_is_told(made: Made, manifests: list[Mapping[str, Any]]) -> None:
    definition = json.loads(made["provenance"])["predicate"]["buildDefinition"]
    bf16, adapter = definition["internalParameters"]["artifacts"]
    assert bf16["versions"] == manifests[0]["versions"]
    assert bf16["assumptions"] == manifests[0]["assumptions"]
    assert adapter["name"] == "nf4-adapter"
    assert definition["externalParameters"]["base"] == f"acme/pico@{COMMIT}"


def test_no_path_of_the_machine_is_published(made: Made, recipe: Recipe, artifacts: tuple[Artifact, ...]) -> None:
    for content in made.values():
        text = content.decode()
        assert "secret-place" not in text
        assert str(artifacts[0].path.parent) not in text
        assert str(Path.home()) not in text
        assert "key.pem" not in text


def test_the_same_release_gives_the_same_bytes(
    made: Made, recipe: Recipe, files: FileFacts, manifests: list[Mapping[str, Any]], report: dict[str, Any]
) -> None:
    shuffled = dict(reversed(files.items()))
    assert digest(provenance(shuffled, manifests, public_recipe(recipe), INVOCATION)) == digest(made["provenance"])
    report = public_report(report)
    again = bill_of_materials("acme/bot", "v1", shuffled, manifests, "apache-2.0", report)
    assert digest(again) == digest(made["bom"])
    other = bill_of_materials("acme/bot", "v2", files, manifests, "apache-2.0", report)
    assert json.loads(other)["serialNumber"] != json.loads(made["bom"])["serialNumber"]


def test_the_invocation_comes_back(made: Made) -> None:
    assert invocation_of(made["provenance"]) == INVOCATION


@pytest.mark.parametrize("key", ["_type", "predicateType"])
def test_a_statement_of_others_has_no_invocation(made: Made, key: str) -> None:
    statement = json.loads(made["provenance"])
    assert invocation_of(json.dumps({**statement, key: "https://example.org/v1"}).encode()) is None
    statement["predicate"]["buildDefinition"]["buildType"] = "https://actions.github.io/buildtypes/workflow/v1"
    assert invocation_of(json.dumps(statement).encode()) is None


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda item: st.lists(item) | st.dictionaries(st.text(), item)
)


@given(st.binary() | JSON.map(lambda value: json.dumps({"_type": value, "predicate": value}).encode()))
def test_anything_else_has_no_invocation(content: bytes) -> None:
    assert invocation_of(content) is None


def test_depth_without_end_has_no_invocation() -> None:
    assert invocation_of(b"[" * 200_000) is None


def test_the_bill_of_materials_is_cyclonedx(made: Made) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(made["bom"].decode()) is None
    assert validator.validate_str(made["bom"].decode().replace("machine-learning-model", "model")) is not None


def test_every_reference_in_the_bill_is_of_one_thing(made: Made) -> None:
    found: list[str] = []

    def collect(item: dict[str, Any]) -> dict[str, Any]:
        found.extend(value for key, value in item.items() if key == "bom-ref")
        return item

    json.loads(made["bom"], object_hook=collect)
    assert len(found) == len(set(found)) > len(model_of(made["bom"])["components"])


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        ("apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
        ("llama3.2", [{"license": {"name": "llama3.2"}}]),
        ("other", [{"license": {"name": "other"}}]),
        ("", None),
    ],
)
def test_a_licence_is_an_spdx_id_where_it_is_one(
    files: FileFacts, manifests: list[Mapping[str, Any]], license_id: str, expected: list[dict[str, Any]] | None
) -> None:
    bom = bill_of_materials("acme/bot", "v1", files, manifests, license_id, {})
    assert model_of(bom).get("licenses") == expected
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode()) is None


def test_every_licence_in_the_table_is_on_the_list_of_spdx(made: Made) -> None:
    bom = json.loads(made["bom"])
    bom["metadata"]["component"]["licenses"] = [{"license": {"id": name}} for name in SPDX_IDS]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None


def test_the_bill_lists_every_file_with_its_hash(made: Made, files: FileFacts) -> None:
    model = model_of(made["bom"])
    assert {item["name"]: item["hashes"][0]["content"] for item in model["components"]} == {
        name: facts["sha256"] for name, facts in files.items()
    }
    assert [item["content"] for item in model["hashes"]] == [
        files[name]["sha256"] for name in ("manifest.json", "nf4-adapter/manifest.json")
    ]


def test_the_bill_names_base_and_adapters_as_ancestors(made: Made, manifests: list[Mapping[str, Any]]) -> None:
    base, first, second = model_of(made["bom"])["pedigree"]["ancestors"]
    assert (base["name"], base["version"]) == ("acme/pico", COMMIT)
    assert base["purl"] == f"pkg:huggingface/acme/pico@{COMMIT}"
    recorded = manifests[0]["sources"]
    weights = recorded["base"]["files"]["model.safetensors"]["sha256"]
    assert base["components"][0]["hashes"] == [{"alg": "SHA-256", "content": weights}]
    assert [item["hashes"][0]["content"] for item in (first, second)] == [
        item["sha256"] for item in recorded["combined_from"]
    ]


def test_the_bill_holds_what_was_measured(made: Made) -> None:
    metrics = model_of(made["bom"])["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {item["slice"] for item in metrics} == {"bf16"}, "the other one was not measured"
    found = {item["type"]: item for item in metrics}
    assert float(found["perplexity"]["value"]) == DRIFT.perplexity
    assert float(found["mean_kl"]["value"]) == DRIFT.mean_kl
    bounds = found["perplexity"]["confidenceInterval"]
    assert float(bounds["upperBound"]) - float(bounds["lowerBound"]) == pytest.approx(2 * Z_95 * 0.01)


def test_the_bill_tracks_the_chat_template(made: Made, files: FileFacts) -> None:
    properties = {item["name"]: item["value"] for item in model_of(made["bom"])["properties"]}
    for path in ("chat_template.jinja", "nf4-adapter/chat_template.jinja"):
        assert properties[f"qlora-export:chat-template.sha256:{path}"] == files[path]["sha256"]
    assert properties["qlora-export:drift-tokens.sha256"] == "ab" * 32


def test_a_public_recipe_has_names_for_paths(recipe: Recipe) -> None:
    public = public_recipe(recipe)
    assert public["base"] == f"acme/pico@{COMMIT}"
    assert public["adapter"] == [{"path": "first", "weight": 1.0}, {"path": "second", "weight": 0.5}]
    assert public["drift"]["text"] == "holdout.jsonl"
    assert public["publish"]["to"] == "folder:registry"
    assert public["publish"]["as"] == "pull-request"
    assert not {"sign", "mode"} & set(public["publish"])
    assert "folder" not in public
    assert public["artifacts"][1]["limits"]["perplexity_ratio"] == "inf"
    assert json.loads(json.dumps(public, allow_nan=False)) == public


def test_ids_of_the_hub_stay_in_a_public_recipe(tmp_path: Path) -> None:
    data = {"base": f"acme/pico@{COMMIT}", "adapter": "acme/lora", "artifacts": ["bf16"]}
    public = public_recipe(make_recipe({**data, "publish": {"to": "hub:acme/bot-{name}"}}, tmp_path, "test"))
    assert (public["base"], public["adapter"]) == (data["base"], data["adapter"])
    assert public["publish"]["to"] == "hub:acme/bot-{name}"


def test_options_of_an_artifact_hide_paths_too(tmp_path: Path) -> None:
    artifact = {"format": "onnx-int4", "options": {"plugin": "/home/me/plugin.so", "block_size": 32}}
    public = public_recipe(make_recipe({"base": "~/pico", "artifacts": [artifact]}, tmp_path, "test"))
    assert public["base"] == "pico"
    assert public["adapter"] is None
    assert public["artifacts"][0]["options"] == {"plugin": "plugin.so", "block_size": 32}


def test_a_public_report_is_about_the_artifacts_alone(report: dict[str, Any]) -> None:
    public = public_report(report)
    assert set(public) == {"schema", "tokens", "artifacts"}
    assert [set(item) for item in public["artifacts"]] == [{"name", "format", "drift"}] * 2
    assert public["artifacts"][0]["drift"] == asdict(DRIFT)
    assert "path" in report["artifacts"][0], "the report itself is not changed"
