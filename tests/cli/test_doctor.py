from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from qlora_export.pipeline.doctor.checks import Check, exit_code
from qlora_export.pipeline.doctor.hub import token_source
from qlora_export.pipeline.doctor.libraries import library_checks
from qlora_export.pipeline.doctor.machine import Needs, disk_check, memory_check, threads_check
from qlora_export.pipeline.doctor.recipe_checks import extras_of, recipe_checks
from qlora_export.recipe.load import make_recipe
from qlora_export.testing import HubServer
from tests.cli.inside import inside
from tests.cli.test_cli import recipe, started

__all__ = ["recipe"]

TOKEN = "hf_rehearsalrehearsalrehearsal"
SIGNED = ".".join(base64.urlsafe_b64encode(part).decode() for part in (b"{}", b'{"sub": "ci"}', b"x"))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def by_id(found: list[Check]) -> dict[str, Check]:
    return {check.id: check for check in found}


def environment(hub: HubServer, home: Path, **changes: str) -> dict[str, str]:
    """A process that knows this Hub, and no token but the one given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **changes}


def diagnosed(*words: Any, env: dict[str, str] | None = None) -> tuple[int, dict[str, dict[str, str]]]:
    return checks_of(inside("doctor", *words, "--json", env=env))


def checks_of(found: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, dict[str, str]]]:
    assert "Traceback" not in found.stderr, found.stderr
    assert TOKEN not in found.stdout + found.stderr
    data = json.loads(found.stdout)
    assert data["exit_code"] == found.returncode
    return found.returncode, {check["id"]: check for check in data["checks"]}


def test_a_sound_machine_and_every_failure_has_a_fix(tmp_path: Path) -> None:
    code, found = checks_of(started("doctor", "--out", tmp_path, "--json"))
    assert code == 0, found
    assert {"python", "library.torch", "disk", "memory", "threads", "device", "cache"} <= set(found)
    assert "token" not in found, "the Hub is asked where it is needed only"
    shown = inside("doctor", "--out", "/proc/none")
    assert shown.returncode == 6
    assert "FAIL  disk" in shown.stdout
    assert "fix: choose another --out" in shown.stdout


def test_versions_against_the_ranges() -> None:
    requirements = [
        "numpy>=1000",
        "pydantic>=2",
        "surely-not-there>=1",
        'onnx>=1000; extra == "onnx"',
        'pytest>=1000; extra == "dev"',
        'pydantic>=1000; python_version < "3.0"',
    ]
    found = by_id(library_checks((), requirements))
    assert {name: check.status for name, check in found.items()} == {
        "python": "ok", "library.numpy": "fail", "library.pydantic": "ok", "library.surely-not-there": "fail",
        "library.onnx": "warn",
    }  # fmt: skip
    assert found["library.numpy"].fix == "pip install 'numpy>=1000'"
    assert found["library.surely-not-there"].value == "not installed"
    needed = by_id(library_checks({"onnx"}, requirements))["library.onnx"]
    assert (needed.status, needed.fix) == ("fail", "pip install 'qlora-export[onnx]'")


def test_disk_against_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage(10**12, 0, 3 * 10**9))
    out = tmp_path / "not/yet"
    assert disk_check(out, Needs()).status == "warn"
    assert disk_check(out, Needs(disk_bytes=2 * 10**9)).status == "ok"
    found = disk_check(out, Needs(disk_bytes=4 * 10**9))
    assert (found.status, found.value) == ("fail", f"3.0 GB free at {tmp_path}, the release takes 4.0 GB")


@pytest.mark.parametrize(
    ("files", "status", "says"),
    [
        ({}, "ok", "16.4 GB available"),
        ({"memory.max": "max", "memory.current": "5"}, "ok", "16.4 GB available"),
        ({"memory.max": "9000000000", "memory.current": "1000000000"}, "ok", "8.0 GB available, the container's"),
        ({"memory.max": "1500000000", "memory.current": "1000000000"}, "fail", "500 MB available, the container's"),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "0"}, "fail", "the container's"),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "0"}, "ok", "16.4 GB"),
    ],
)
def test_memory_is_what_the_container_allows(tmp_path: Path, files: dict[str, str], status: str, says: str) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable:   16000000 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    found = memory_check(Needs(memory_bytes=10**9), tmp_path / "meminfo", tmp_path)
    assert found.status == status
    assert says in found.value
    assert memory_check(Needs(), tmp_path / "none", tmp_path / "none").status == "warn"


def test_threads_against_the_share_of_processors(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    found = threads_check(tmp_path)
    assert (found.status, found.fix) == ("warn", "--workers 1")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads_check(tmp_path).status == "ok"


def test_which_failure_decides_the_exit_code() -> None:
    fine, disk, token = Check("a", "warn", ""), Check("disk", "fail", ""), Check("token", "fail", "")
    assert [exit_code(found) for found in ([fine], [fine, disk], [disk, token])] == [0, 6, 9]
    assert exit_code([Check("access.acme/bot", "fail", "")]) == 9


def test_where_the_token_comes_from(tmp_path: Path) -> None:
    assert token_source({"HF_HOME": str(tmp_path)}) is None
    (tmp_path / "token").write_text(TOKEN)
    known = {"HF_HOME": str(tmp_path)}
    assert token_source(known) == f"the file {tmp_path / 'token'}"
    assert token_source({**known, "HF_TOKEN": TOKEN}) == "the environment (HF_TOKEN)"
    assert "acme/bot" in str(token_source({**known, "HF_TOKEN": TOKEN, "HF_OIDC_RESOURCE": "acme/bot"}))


def test_a_recipe_says_what_it_takes(recipe: Path, tmp_path: Path) -> None:
    code, found = diagnosed(recipe, "--out", tmp_path / "out")
    assert code == 0, found
    assert "the release takes" in found["disk"]["value"]
    assert "the build takes about" in found["memory"]["value"]
    assert found["sources"]["value"] == "the plan holds: bf16, nf4, nf4-adapter"
    data = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**data, "base": "../gone", "drift": {"text": "gone.jsonl"}}))
    code, found = diagnosed(recipe, "--out", tmp_path / "out")
    assert code == 6
    assert "gone.jsonl is not there" in found["drift.text"]["value"]
    assert found["sources"]["status"] == "fail"
    assert found["sources"]["fix"]


@pytest.mark.parametrize(
    ("token", "code", "identity", "access"),
    [
        (TOKEN, 0, "rehearsal, role write", "the endpoint has no xet: weights go by classic LFS"),
        (f"read:{TOKEN}", 9, "may not write", None),
        ("hf_wrongwrongwrongwrongwrong", 9, "refuses the token (401)", None),
        (None, 9, None, None),
    ],
)
def test_tokens(
    recipe: Path, tmp_path: Path, token: str | None, code: int, identity: str | None, access: str | None
) -> None:
    to_the_hub(recipe, "hub:acme/{name}")
    with HubServer(token=TOKEN) as hub:
        hub.add_repository("acme/bf16", recipe.parent)
        given = {"HF_TOKEN": token} if token else {}
        found_code, found = diagnosed(recipe, "--out", tmp_path, env=environment(hub, tmp_path / "home", **given))
        assert not any("commit" in record.path for record in hub.requests)
    assert found_code == code, found
    assert found["endpoint"]["status"] == "ok"
    assert found["token"]["status"] == ("ok" if token else "fail")
    if identity is None:
        assert "token.identity" not in found
    else:
        assert identity in found["token.identity"]["value"]
    if access is not None:
        assert found["access.acme/bf16"]["value"] == access
        assert "will be created" in found["repository.acme/nf4"]["value"]


def test_an_endpoint_with_xet_and_one_that_tells_nothing(recipe: Path, tmp_path: Path) -> None:
    to_the_hub(recipe, "hub:acme/bot")
    with HubServer(token=TOKEN, xet=True) as hub:
        hub.add_repository("acme/bot", recipe.parent)
        env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
        _, found = diagnosed(recipe, "--out", tmp_path, env=env)
        assert found["access.acme/bot"]["value"] == "may write, by xet"
        env["HF_ENDPOINT"] = f"{hub.endpoint}/artifactory"
        code, found = diagnosed("--hub", "--out", tmp_path, env=env)
    assert code == 0, "an endpoint need not say who a token belongs to"
    assert found["token.identity"]["status"] == "warn"
    code, found = diagnosed("--hub", "--out", tmp_path, env=env)
    assert code == 6
    assert "does not answer" in found["endpoint"]["value"]


def test_offline_mode_stops_a_publication(tmp_path: Path) -> None:
    with HubServer(token=TOKEN) as hub:
        env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
        code, found = diagnosed("--hub", "--out", tmp_path, env=env)
        assert hub.requests == []
    assert code == 6
    assert found["offline"]["fix"] == "unset HF_HUB_OFFLINE"


def test_a_trusted_publisher(recipe: Path, tmp_path: Path) -> None:
    to_the_hub(recipe, "hub:acme/bot")
    with HubServer(token=TOKEN) as hub:
        env = environment(hub, tmp_path / "home", HF_OIDC_RESOURCE="acme/bot", HF_OIDC_ID_TOKEN=SIGNED)
        code, found = diagnosed(recipe, "--out", tmp_path, env=env)
        assert code == 9, "the repository is not there, so nobody trusts this job yet"
        assert "acme/bot (HF_OIDC_RESOURCE)" in found["token"]["value"]
        hub.add_repository("acme/bot", recipe.parent)
        code, found = diagnosed(recipe, "--out", tmp_path, env=env)
        assert code == 0, found
        assert found["access.acme/bot"]["status"] == "ok"
        del env["HF_OIDC_ID_TOKEN"]
        code, found = diagnosed("--hub", "--out", tmp_path, env=env)
    assert code == 9
    assert "id-token: write" in found["token"]["fix"]


def to_the_hub(path: Path, to: str) -> None:
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**data, "publish": {"to": to}}))


def test_what_the_texts_of_a_recipe_need(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").touch()
    hub = f"hub:acme/talks@{'0' * 40}#train"
    parts = [{"text": "task.jsonl", "share": 0.5}, {"text": "gone.txt", "share": 0.25}, {"text": hub, "share": 0.25}]
    facts = {"base": "none", "artifacts": ["bf16"], "drift": {"text": "task.jsonl"}, "calibration": parts}
    wanted = make_recipe(facts, tmp_path, "test")
    checks, _ = recipe_checks(wanted, tmp_path, 1)
    found = [(check.id, check.status, check.value) for check in checks[:4]]
    assert found == [
        ("drift.text", "ok", str(tmp_path / "task.jsonl")),
        ("calibration.text", "ok", str(tmp_path / "task.jsonl")),
        ("calibration.text", "fail", f"{tmp_path / 'gone.txt'} is not there"),
        ("calibration.text", "ok", hub),
    ]
    assert extras_of(wanted) == {"data"}
    assert extras_of(make_recipe({**facts, "calibration": {"text": "task.jsonl"}}, tmp_path, "test")) == set()
    parquet = make_recipe({**facts, "drift": {"text": "a.parquet"}, "calibration": None}, tmp_path, "test")
    assert extras_of(parquet) == {"data"}
