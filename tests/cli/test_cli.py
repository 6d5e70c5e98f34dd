"""The command as a user runs it: real processes, stdout, stderr and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from qlora_export.cli import main
from qlora_export.errors import ExitCode
from tests import sampling
from tests.helpers.files import edit_json, edit_tensors
from tests.processes import forked, fresh


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return forked("-m", "qlora_export", *arguments, **options)


# Verbs that spend seconds on importing libraries.
HEAVY = ("build", "check", "compare", "inspect", "plan", "publish", "rehearse", "release", "verify")
FORKED = set(HEAVY) - set(sampling.some(HEAVY, 3, "verbs"))


def started(verb: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same in an interpreter that has imported nothing yet: for every verb with all cases, else for some."""
    return (forked if verb in FORKED else fresh)("-m", "qlora_export", verb, *arguments, **options)


@pytest.fixture
def recipe(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    nearest = {"format": "nf4", "rounding": "nearest", "name": "nf4", "expect": "fail"}
    artifacts = [{"format": "bf16"}, nearest, {"format": "nf4-adapter"}]
    data = {
        "base": str(pico_base),
        "adapter": str(pico_adapter),
        "artifacts": artifacts,
        "drift": {"text": str(pico_text), "limits": {"gain_kept": None}},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\nsys.argv = ['qlora-export', '--help']\n"
        "from qlora_export.cli.main import _run\ncode = _run()\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'numba', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "print(code, heavy, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stderr.strip() == "0 set()"
    for verb in ("demo", "plan", "build", "check", "publish", "verify", "rehearse", "init", "doctor", "explain"):
        assert verb in found.stdout


def test_the_script_is_the_module() -> None:
    script = Path(sys.executable).parent / "qlora-export"
    found = subprocess.run([script, "--version"], check=True, capture_output=True, text=True)
    assert found.stdout == started("--version").stdout


def test_plan_in_words_and_as_json(recipe: Path) -> None:
    found = started("plan", recipe)
    assert found.returncode == 0, found.stderr
    assert "nf4-adapter" in found.stdout
    assert found.stderr == ""
    data = json.loads(command("plan", recipe, "--json").stdout)
    assert [artifact["name"] for artifact in data["artifacts"]] == ["bf16", "nf4", "nf4-adapter"]


def test_flags_do_what_a_recipe_does(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    flags = [
        "--base",
        pico_base,
        "--adapter",
        pico_adapter,
        "--format",
        "bf16",
        "--format",
        "nf4",
        "--onto",
        "original",
    ]
    found = started("build", *flags, "--out", tmp_path / "out", "--json")
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    assert [artifact["verdict"] for artifact in data["artifacts"]] == ["not-measured"] * 2
    assert data == json.loads((tmp_path / "out/report.json").read_text())
    assert json.loads((tmp_path / "out/nf4/manifest.json").read_text())["onto"] == "original"


def test_check_reports_every_key_of_schema_1(recipe: Path, tmp_path: Path) -> None:
    found = started("check", recipe, "--out", tmp_path / "out", "--json")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    data = json.loads(found.stdout)
    assert data == json.loads((tmp_path / "out/report.json").read_text())
    assert {"schema", "recipe_digest", "tokens", "reference", "artifacts", "published", "exit_code"} <= set(data)
    assert set(data["tokens"]) == {
        "sha256", "count", "windows", "name", "protocol", "window_tokens", "stride_tokens", "begin", "documents",
        "limit",
    }  # fmt: skip
    verdicts = {artifact["name"]: artifact["verdict"] for artifact in data["artifacts"]}
    assert verdicts == {"bf16": "pass", "nf4": "fail", "nf4-adapter": "pass"}
    keys = {
        "perplexity", "perplexity_reference", "ln_ppl_ratio", "ln_ppl_ratio_stderr", "mean_kl", "mean_kl_stderr",
        "same_top1", "gain_kept", "survival_median", "survival_min",
    }  # fmt: skip
    for artifact in data["artifacts"]:
        assert {"name", "format", "path", "bytes", "runtime", "verdict", "reasons", "drift"} <= set(artifact)
        assert keys <= set(artifact["drift"])
    adapter = data["artifacts"][2]["drift"]
    assert adapter["mean_kl"] == 0
    assert adapter["same_top1"] == 1
    assert command("build", recipe, "--out", tmp_path / "out").returncode == 0
    assert data == json.loads((tmp_path / "out/report.json").read_text()), "a build that built nothing keeps the report"
    again = command("check", recipe, "--out", tmp_path / "out")
    assert again.returncode == 0
    assert "fail, as expected" in again.stdout


def test_an_artifact_beyond_its_limits_is_exit_3(recipe: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(recipe.read_text())
    data["artifacts"][1]["expect"] = "pass"
    recipe.write_text(yaml.safe_dump(data))
    found = command("check", recipe, "--out", tmp_path / "out", "--json")
    assert found.returncode == 3
    assert json.loads(found.stdout)["exit_code"] == 3
    data["artifacts"] = [{"format": "bf16", "expect": "fail"}]
    recipe.write_text(yaml.safe_dump(data))
    assert command("check", recipe, "--out", tmp_path / "out").returncode == 3


def broken(place: Path, case: str) -> None:
    if case == "pickles":
        (place / "base/model.safetensors").rename(place / "base/pytorch_model.bin")
    elif case == "truncated":
        path = place / "base/model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "variant":
        edit_json(place / "adapter/adapter_config.json", kasa_config={"beta": 1})
    elif case == "nan":
        edit_tensors(
            place / "adapter/adapter_model.safetensors",
            lambda tensors: next(iter(tensors.values())).fill_(float("nan")),
        )


@pytest.mark.parametrize(
    ("case", "code", "says"),
    [
        ("pickles", 4, "its only weights are pickles"),
        ("truncated", 5, "model.safetensors"),
        ("variant", 4, "KaSA cannot be merged"),
        ("nan", 5, "NaN or infinite"),
        ("none", 0, ""),
    ],
)
def test_bad_input(pico_base: Path, pico_adapter: Path, tmp_path: Path, case: str, code: int, says: str) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    shutil.copytree(pico_adapter, tmp_path / "adapter")
    broken(tmp_path, case)
    flags = ["--base", "base", "--adapter", "adapter", "--format", "bf16", "--out", "out"]
    found = command("build", *flags, cwd=tmp_path)
    assert found.returncode == code, found.stderr
    if code:
        assert says in found.stderr
        assert found.stderr.startswith("error: ")
        assert "\nhint: " in found.stderr
        assert "Traceback" not in found.stderr
        assert found.stdout == ""
        assert not (tmp_path / "out/bf16").exists()
        as_json = json.loads(command("build", *flags, "--json", cwd=tmp_path).stdout)
        assert as_json["exit_code"] == code
        assert says in as_json["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan"], "no recipe"),
        (["plan", "--base", "x"], "no recipe"),
        (["plan", "r.yaml", "--base", "x"], "a recipe and --base"),
        (["plan", "--base", "b", "--adapter", "a", "--format", "nf5"], "did you mean nf4"),
        (["plan", "--base", "b", "--adapter", "a", "--format", "nf4", "--onto", "base"], "merge.onto"),
        (["build", "--workers", "0"], "--workers"),
        (["paln"], "paln"),
        (["check", "--base", "b", "--adapter", "a", "--format", "nf4"], "no drift.text"),
    ],
)
def test_usage_errors_are_exit_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    found = command(*arguments, cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert says in found.stderr
    assert "Traceback" not in found.stderr


def test_a_folder_that_cannot_be_written_is_exit_6(pico_base: Path, pico_adapter: Path) -> None:
    flags = ["--base", pico_base, "--adapter", pico_adapter, "--format", "bf16", "--out", "/proc/none"]
    found = command("build", *flags)
    assert found.returncode == 6
    assert "Traceback" not in found.stderr


def test_set_changes_a_key_and_output_keeps_the_json(recipe: Path, tmp_path: Path) -> None:
    words = ["--set", "artifacts.0.name=dense", "--set", "merge.onto=original", "-o", tmp_path / "plan.json"]
    found = command("plan", recipe, *words, "--json")
    assert found.returncode == 0, found.stderr
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data == json.loads(found.stdout)
    assert data["artifacts"][0]["name"] == "dense"
    assert data["artifacts"][0]["onto"] == "original"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("merge", "no KEY=VALUE"),
        ("artifacts.9.name=x", "no such place"),
        ("artifacts.first.name=x", "no such place"),
        ("base.deep=x", "no such place"),
        ("artefact.0=x", "unknown key artefact"),
        ("drift.limits.mean_kl=[", "no such place"),
    ],
)
def test_a_setting_that_fits_nowhere_is_named(recipe: Path, setting: str, says: str) -> None:
    found = command("plan", recipe, "--set", setting)
    assert found.returncode == 2, found.stderr
    assert says in found.stderr


def test_clean_names_and_removes_what_killed_runs_left(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "bf16.partial").mkdir(parents=True)
    (out / "bf16.partial/.journal").write_text(json.dumps({"plan": "0" * 64}) + "\n")
    (out / "thesis.partial").mkdir()
    (out / "thesis.partial/.journal").write_text("dear diary")
    found = started("clean", out)
    assert "left behind: " in found.stdout
    assert (out / "bf16.partial").exists()
    found = command("clean", out, "--yes", "--json")
    assert [Path(item["path"]).name for item in json.loads(found.stdout)["leftovers"]] == ["bf16.partial"]
    assert {path.name for path in out.iterdir()} == {"thesis.partial"}
    assert "nothing was left behind" in command("clean", out).stdout
    assert command("clean", tmp_path / "nowhere").returncode == 2


def test_release_publishes_and_says_where(recipe: Path, tmp_path: Path) -> None:
    found = started("release", recipe, "--out", tmp_path / "out", "--set", "publish.to=folder:registry")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"published bf16 to {tmp_path / 'registry/bf16'}" in found.stdout
    assert "| `bf16` |" in (tmp_path / "out/report.md").read_text()
    assert command("release", recipe, "--out", tmp_path / "out").returncode == 2


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_who_stops_reading_changes_no_exit_code(recipe: Path, flags: list[str]) -> None:
    words = [sys.executable, "-m", "qlora_export", "plan", str(recipe), *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_several_adapters_and_a_stated_training(pico_base: Path, adapter_copy: Path, tmp_path: Path) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    other = shutil.copytree(adapter_copy, tmp_path / "other")
    flags = ["--base", pico_base, "--adapter", f"{adapter_copy}=0.25", "--adapter", other, "--format", "bf16"]
    found = command(
        "build", *flags, "--training-quantization", "nf4,double,skip=q_proj", "--out", tmp_path / "out", "--json"
    )
    assert found.returncode == 0, found.stderr
    assumptions = json.loads(found.stdout)["assumptions"]
    assert f"adapters combined by sum: {adapter_copy.name} x 0.25, other x 1" in assumptions
    assert any(text.startswith("no sidecar: stated nf4 in blocks of 64 with double") for text in assumptions)
    wrong = command("build", *flags, "--training-quantization", "nf4,block=7", "--out", tmp_path / "out")
    assert wrong.returncode == 2
    assert "'block=7' is no part of a training quantisation" in wrong.stderr


def test_inspect_in_words_and_as_json(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    found = started("inspect", pico_adapter, "--base", pico_base, "--weights")
    assert found.returncode == 0, found.stderr
    assert "model.layers.0.mlp.up_proj.weight" in found.stdout
    data = json.loads(command("inspect", pico_adapter, "--json").stdout)
    assert (data["kind"], data["variant"], data["mergeable"]) == ("adapter", "LoRA", True)
    assert command("inspect", tmp_path).returncode == 5


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command()(interrupted)
    monkeypatch.setattr(main, "app", app)
    monkeypatch.setattr(sys, "argv", ["qlora-export"])
    assert main._run() == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted: run the same command again to go on where it stopped\n"
