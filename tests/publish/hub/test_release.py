"""A release of the pico model to a Hub on this machine, from the recipe to what its users load."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session

from qlora_export.artifact import file_facts
from qlora_export.errors import (
    ExitCode,
    ExportError,
    GateFailed,
    Refused,
    RemoteConflict,
    UsageError,
    VerifyMismatch,
)
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.options import RunOptions
from qlora_export.publish.base import Account
from qlora_export.publish.checksums import checksums
from qlora_export.publish.hub.process import Client
from qlora_export.publish.hub.publisher import open_hub
from qlora_export.publish.verify import Wanted, verify
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import write_report
from qlora_export.testing import HubServer
from tests.processes import Forked, forked, fresh

EASY = {"perplexity_ratio": 1.5, "mean_kl": 1.0, "same_top1": 0.1, "gain_kept": None, "survival_min": None}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def measured(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which everything is built and checked, to be copied by each test."""
    out = tmp_path_factory.mktemp("measured") / "out"
    write_report(pipeline.check(the_recipe(pico_base, pico_adapter, pico_text), RunOptions(out, workers=2)), out)
    return out


def the_recipe(
    base: Path, adapter: Path, text: Path, artifacts: tuple[str, ...] = ("bf16", "nf4-adapter"), **publish: Any
) -> Recipe:
    place = {"to": "hub:acme/bot-{name}", "card": {"license": "apache-2.0"}, "timeout_seconds": 20, **publish}
    data = {
        "base": str(base),
        "base_id": "acme/base",
        "adapter": str(adapter),
        "artifacts": list(artifacts),
        "drift": {"text": str(text), "limits": EASY},
        "publish": place,
    }
    return make_recipe(data, Path(), "test")


@pytest.fixture
def recipe(pico_base: Path, pico_adapter: Path, pico_text: Path) -> Callable[..., Recipe]:
    return lambda **publish: the_recipe(pico_base, pico_adapter, pico_text, **publish)


@pytest.fixture
def dense(recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """One artifact, where nothing depends on there being two: each is some processes and an opened model more."""
    return functools.partial(recipe, artifacts=("bf16",))


@pytest.fixture
def options(measured: Path, tmp_path: Path, hub: HubServer) -> RunOptions:
    out = Path(shutil.copytree(measured, tmp_path / "out"))
    return RunOptions(out, workers=2, publisher_environment=environment(hub))


def environment(hub: HubServer) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_rehearsal", "HF_HUB_OFFLINE": "0"}


def oids(hub: HubServer, name: str = "acme/bot-bf16", reference: str = "main") -> list[str]:
    return [commit.oid for commit in hub.repositories[name].commits(reference)]


def test_what_was_published_is_proven_and_tagged(
    hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions
) -> None:
    hub.collections["acme/bots-1a2b"] = []
    run = pipeline.publish(recipe(version="v1", collection="acme/bots-1a2b"), options)
    assert [item["id"] for item in hub.collections["acme/bots-1a2b"]] == ["acme/bot-bf16", "acme/bot-nf4-adapter"]
    assert [receipt.destination for receipt in run.receipts] == ["acme/bot-bf16", "acme/bot-nf4-adapter"]
    for receipt in run.receipts:
        repository = hub.repositories[receipt.destination]
        assert repository.private
        assert dict(repository.tags) == {"v1": receipt.commit}
        assert oids(hub, receipt.destination)[0] == receipt.commit
        assert receipt.proof is not None
        assert receipt.proof.nll == pytest.approx(receipt.proof.nll_released, abs=1e-6)
        assert receipt.proof.files == len(receipt.files)
        files = set(repository.files("main"))
        assert {"README.md", "SHA256SUMS", "manifest.json", "qlora-export/report.json"} <= files
        assert not {name for name in files if name.startswith(("out", "."))} - {".gitattributes"}
    card = hub.repositories["acme/bot-bf16"].read("main", "README.md").decode()
    assert "base_model: acme/base" in card or "- acme/base" in card
    assert str(options.out) not in card
    assert not list((options.out / ".publication").glob("*/"))


def test_again_makes_no_commit_even_after_another_measurement(
    hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions
) -> None:
    first = pipeline.publish(recipe(version="v1"), options)
    report = json.loads((options.out / "report.json").read_text())
    for entry in report["artifacts"]:
        entry["drift"]["mean_kl"] *= 1.0000001
    (options.out / "report.json").write_text(json.dumps(report))
    before = {name: oids(hub, name) for name in hub.repositories}
    again = pipeline.publish(recipe(version="v1"), options)
    assert {name: oids(hub, name) for name in hub.repositories} == before
    assert [receipt.changed for receipt in again.receipts] == [False, False]
    assert [receipt.commit for receipt in again.receipts] == [receipt.commit for receipt in first.receipts]


def test_again_after_people_edited_the_card(hub: HubServer, dense: Callable[..., Recipe], options: RunOptions) -> None:
    run = pipeline.publish(dense(version="v1"), options)
    card = hub.repositories["acme/bot-bf16"].read("main", "README.md").decode()
    edit(hub, "acme/bot-bf16", "README.md", card + "\nWritten by people.  \n")
    again = pipeline.publish(dense(version="v1"), options)
    assert again.receipts[0].commit == run.receipts[0].commit, "the version is still the tagged commit"
    newer = pipeline.publish(dense(version="v2"), options)
    assert not newer.receipts[0].changed
    assert hub.repositories["acme/bot-bf16"].read("main", "README.md").decode().endswith("Written by people.  \n")
    assert hub.repositories["acme/bot-bf16"].tags["v2"] == oids(hub)[0]


def edit(hub: HubServer, repository: str, path: str, content: str) -> None:
    """A commit by somebody else."""
    other = HfApi(endpoint=hub.endpoint, token="hf_other")
    other.upload_file(repo_id=repository, path_in_repo=path, path_or_fileobj=content.encode())
    close_session()


def test_another_release_under_the_same_version(
    hub: HubServer, dense: Callable[..., Recipe], options: RunOptions
) -> None:
    pipeline.publish(dense(version="v1"), options)
    before = oids(hub)
    changed = dense(version="v1", card={"license": "apache-2.0", "tags": ["other"]})
    with pytest.raises(RemoteConflict, match="the tag v1 names another release"):
        pipeline.publish(changed, options)
    assert oids(hub) == before


def test_a_pull_request_once(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    asked = recipe(**{"as": "pull-request"})
    first = pipeline.publish(asked, options)
    again = pipeline.publish(asked, options)
    assert [receipt.revision for receipt in first.receipts] == ["refs/pr/1", "refs/pr/1"]
    assert [receipt.commit for receipt in again.receipts] == [receipt.commit for receipt in first.receipts]
    assert list(hub.repositories["acme/bot-bf16"].pull_requests) == [1]


def test_several_in_one_repository(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    run = pipeline.publish(recipe(to="hub:acme/bot", subfolder="{name}"), options)
    files = hub.repositories["acme/bot"].files("main")
    assert {"README.md", "SHA256SUMS", "bf16/config.json", "nf4-adapter/adapter/adapter_config.json"} <= set(files)
    assert len(oids(hub, "acme/bot")) == 2
    assert [receipt.prefix for receipt in run.receipts] == ["bf16/", "nf4-adapter/"]


def test_two_artifacts_on_top_of_each_other(recipe: Callable[..., Recipe], options: RunOptions) -> None:
    with pytest.raises(UsageError, match="several artifacts go to acme/bot"):
        pipeline.publish(recipe(to="hub:acme/bot"), options)


@pytest.mark.parametrize(
    ("publish", "error", "text"),
    [
        ({"card": {}}, Refused, "the base states no licence"),
        ({"to": "hub:bot"}, UsageError, "is no name of a repository"),
        ({"to": "hub:acme/bot-{nome}"}, UsageError, "placeholder"),
        ({"sign": "key:nowhere.pem"}, ExportError, "nowhere.pem"),
        ({"collection": "acme/bots-1a2b"}, ExportError, "acme/bots-1a2b"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    hub: HubServer,
    recipe: Callable[..., Recipe],
    options: RunOptions,
    publish: dict[str, Any],
    error: type[ExportError],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        pipeline.publish(recipe(**publish), options)
    assert not hub.repositories


def test_a_base_without_a_hub_id(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    with pytest.raises(UsageError, match="names its base by a Hub id"):
        pipeline.publish(recipe().model_copy(update={"base_id": None}), options)


def test_a_file_that_is_not_ours(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    (options.out / "bf16" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(VerifyMismatch, match="not in the manifest"):
        pipeline.publish(recipe(), options)
    assert not hub.repositories


def test_what_did_not_pass_is_not_published(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    path = options.out / "report.json"
    report = json.loads(path.read_text())
    report["artifacts"][0]["verdict"] = "fail"
    path.write_text(json.dumps(report))
    with pytest.raises(GateFailed, match="the report's verdict is fail"):
        pipeline.publish(recipe(), options)
    assert not hub.repositories


def test_a_public_repository_is_no_place_for_a_private_release(
    hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("# here\n")
    hub.add_repository("acme/bot-bf16", tmp_path / "there")
    with pytest.raises(ExportError, match="the repository is public, the recipe asks for private") as raised:
        pipeline.publish(recipe(), options)
    assert raised.value.exit_code == ExitCode.REMOTE_CONFLICT


def test_prose_of_people_survives(
    hub: HubServer, dense: Callable[..., Recipe], options: RunOptions, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    prose = "# Our bot\n\nPlease be kind to it.\t\n"
    (tmp_path / "there" / "README.md").write_text(prose)
    (tmp_path / "there" / "picture.png").write_bytes(b"picture")
    hub.add_repository("acme/bot-bf16", tmp_path / "there", private=True)
    pipeline.publish(dense(), options)
    repository = hub.repositories["acme/bot-bf16"]
    assert prose.strip("\n") in repository.read("main", "README.md").decode()
    assert repository.read("main", "picture.png") == b"picture"


def test_a_whole_release_through_faults(recipe: Callable[..., Recipe], measured: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(measured, tmp_path / "out"))
    with HubServer(faults=["put-500", "commit-applied-then-closed", "tree-missing-shard"]) as hub:
        run = pipeline.release(recipe(version="v1"), RunOptions(out, 2, publisher_environment=environment(hub)))
        assert len(oids(hub)) == 2
        assert all(receipt.proof for receipt in run.receipts)


def test_a_killed_release_goes_on(dense: Callable[..., Recipe], measured: Path, tmp_path: Path) -> None:
    """SIGTERM while a shard is on its way: exit 143, nothing on the branch; the next run publishes once.

    Until then, a second run in the same folder is told so.
    """
    out = Path(shutil.copytree(measured, tmp_path / "out"))
    facts = dense(version="v1").model_dump(mode="json", by_alias=True, exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(facts))
    words = ["-m", "qlora_export", "publish", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    with HubServer(faults=["put-slow:600"]) as hub:
        variables = {**os.environ, **environment(hub)}
        process = Forked([sys.executable, *words], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not [record for record in hub.requests if "lfs/objects/batch" in record.path]:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        rival = forked(*words, env=variables)
        assert (rival.returncode, "another run is" in rival.stderr) == (ExitCode.USAGE, True), rival.stderr
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == ExitCode.TERMINATED, told
        assert len(oids(hub)) == 1
        result = forked(*words, env=variables)
        assert result.returncode == 0, result.stderr
        assert len(oids(hub)) == 2


LOADING = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    if name.endswith("adapter"):
        model = PeftModel.from_pretrained(model, name, subfolder="adapter")
        assert any("lora_A" in key for key in model.state_dict())
        assert model.base_model.model.config.quantization_config is not None
    print(len(AutoTokenizer.from_pretrained(name)), sum(parameter.numel() for parameter in model.parameters()))
"""


def test_users_load_it_by_its_hub_id(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    run = pipeline.publish(recipe(), options)
    result = fresh(
        "-c",
        LOADING,
        *(receipt.destination for receipt in run.receipts),
        env={**os.environ, **environment(hub), "HF_HOME": str(options.out / "home"), "HF_HUB_DISABLE_XET": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["2048", "2048"]


def test_anybody_verifies_it(
    hub: HubServer, dense: Callable[..., Recipe], options: RunOptions, pico_text: Path, tmp_path: Path
) -> None:
    (receipt,) = pipeline.publish(dense(), options).receipts
    client = Client(environment(hub))
    found = verify(f"acme/bot-bf16@{receipt.commit}", Wanted(text=pico_text), client)
    assert (found.commit, found.files) == (receipt.commit, found.listed)
    assert found.opened["bf16"].nll == pytest.approx(found.opened["bf16"].nll_released, abs=1e-6)
    sampled = verify("acme/bot-bf16", Wanted(share=0.05), client)
    assert 1 <= sampled.files < sampled.listed
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 50)
    with pytest.raises(UsageError, match="the release was measured on"):
        verify("acme/bot-bf16", Wanted(text=other), client)
    edit(hub, "acme/bot-bf16", "config.json", "{}")
    with pytest.raises(VerifyMismatch, match=r"config\.json"):
        verify("acme/bot-bf16", Wanted(), client)
    edit(hub, "acme/bot-bf16", "modeling.py", "print()")
    with pytest.raises(VerifyMismatch, match=r"modeling\.py is not part of the release"):
        verify("acme/bot-bf16", Wanted(), client)


def test_a_signed_release(hub: HubServer, dense: Callable[..., Recipe], options: RunOptions, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    asked = dense(sign=f"key:{private}")
    first = pipeline.publish(asked, options)
    assert [receipt.changed for receipt in pipeline.publish(asked, options).receipts] == [False]
    client = Client(environment(hub))
    found = verify(f"acme/bot-bf16@{first.receipts[0].commit}", Wanted(signer=f"key:{public}"), client)
    assert found.signature.startswith("good")
    (tmp_path / "else").mkdir()
    _, stranger = key_pair(tmp_path / "else")
    with pytest.raises(VerifyMismatch):
        verify("acme/bot-bf16", Wanted(signer=f"key:{stranger}", opens=False), client)


def key_pair(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_a_proof_that_fails_gets_no_version(hub: HubServer, dense: Callable[..., Recipe], options: RunOptions) -> None:
    path = options.out / "report.json"
    report = json.loads(path.read_text())
    report["artifacts"][0]["sample"]["nll"] += 0.1
    path.write_text(json.dumps(report))
    with pytest.raises(VerifyMismatch, match="the release measured"):
        pipeline.publish(dense(version="v1"), options)
    assert not hub.repositories["acme/bot-bf16"].tags


def test_checksums_that_were_rewritten(measured: Path, tmp_path: Path) -> None:
    """A changed file with a checksum that fits it still differs from its manifest."""
    folder = Path(shutil.copytree(measured / "bf16", tmp_path / "bf16"))
    (folder / "config.json").write_text("{}")
    files = {path.name: file_facts(path) for path in folder.iterdir()}
    (folder / "SHA256SUMS").write_bytes(checksums(files))
    with pytest.raises(VerifyMismatch, match=r"SHA256SUMS has another config\.json"):
        verify(str(folder), Wanted(opens=False), Client())


def test_a_release_of_nothing(hub: HubServer, recipe: Callable[..., Recipe], options: RunOptions) -> None:
    publisher = open_hub(recipe(), options.out, environment(hub))
    assert publisher.publish([], Account({})) == []
    publisher.conclude([])
    assert not hub.repositories
