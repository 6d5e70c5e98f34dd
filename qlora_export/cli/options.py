"""The flags that all verbs on a recipe share, and the recipe that they or a file make."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_export.errors import ExportError, UsageError

if TYPE_CHECKING:
    from qlora_export.engine import Engine
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe

RecipePath = Annotated[
    Path | None,
    typer.Argument(help="A recipe, or a plan kept by `plan -o`; or use the flags instead.", metavar="[RECIPE]"),
]
Base = Annotated[str | None, typer.Option("--base", help="Folder of the base model, or its Hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="Folder or Hub id of the adapter; repeat to combine, PATH=WEIGHT to weight."),
]
Training = Annotated[
    str | None,
    typer.Option("--training-quantization", help="Where no sidecar tells: nf4,block=64,double,skip=lm_head, or none."),
]
Formats = Annotated[list[str] | None, typer.Option("--format", help="A format to make; repeat for several.")]
OntoName = Annotated[str | None, typer.Option("--onto", help="Merge base: as-trained (default), original or auto.")]
Text = Annotated[str | None, typer.Option("--text", help="Text to measure drift on: .jsonl or .txt.")]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="How --text is cut and scored: windows (default), disjoint-2048, strided, llama.cpp-512, lm-eval-rolling; "
        "of a classifier: labels.",
    ),
]
ChoicesFile = Annotated[
    str | None, typer.Option("--choices", help="Questions to choose answers to: .jsonl with question, choices, answer.")
]
PromptsFile = Annotated[
    str | None, typer.Option("--prompts", help="Prompts that every model goes on with: chats or running text.")
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Text to calibrate rounding on, another one than --text.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, a recipe key by its path, as in drift.limits.mean_kl=0.1; repeat."),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Check the folder ARTIFACT, given in place of a recipe, against this model: MODEL or BASE+ADAPTER.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder [default: out/RECIPE or out].")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Threads [default: all cores].")]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="threads (default), or ray: as many processes on the cluster of RAY_ADDRESS."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="What builds and measures: cpu (default), cuda, cuda:1; a build has the same bytes."),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option("--memory-limit", help="Memory that a build may take, as in 800MB; fewer threads run to keep it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
JunitXml = Annotated[Path | None, typer.Option("--junit-xml", help="Also write a JUnit report to this file.")]
Prove = Annotated[
    bool | None, typer.Option("--prove/--no-prove", help="Read back what was published and open it [default: --prove].")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON object to this file.")]

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN")

# Flags that are keys of a recipe's drift, beside its text.
DRIFT_FLAGS = ("protocol", "choices", "prompts")
# Flags that stand in for a recipe.
RECIPE_FLAGS = ("base", "adapter", "format", "onto", "training_quantization", "text", *DRIFT_FLAGS, "calibration")

# What a verb makes of a recipe: the JSON object, how it prints for people, and its exit code.
Outcome = tuple[dict[str, Any], Callable[[], None], int]
Verb = Callable[["Recipe", "RunOptions"], Outcome]
# A verb on a folder that no recipe made: the folder, the model, the other flags, the settings.
VerbAgainst = Callable[[Path, str, dict[str, Any], list[str], "RunOptions"], Outcome]


@dataclass(frozen=True)
class Flags:
    """What a verb on a recipe is told, in the order of its help."""

    recipe: RecipePath = None
    base: Base = None
    adapter: Adapters = None
    format: Formats = None
    onto: OntoName = None
    training_quantization: Training = None
    text: Text = None
    protocol: ProtocolName = None
    choices: ChoicesFile = None
    prompts: PromptsFile = None
    calibration: Calibration = None
    settings: Settings = None
    out: Out = None
    workers: Workers = None
    engine: EngineName = None
    device: Device = None
    memory_limit: MemoryLimit = None
    as_json: Json = False
    output: Output = None
    junit_xml: JunitXml = None
    prove: Prove = None
    against: Against = None

    @property
    def of_recipe(self) -> dict[str, Any]:
        """Those that stand in for a recipe, by their words."""
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in RECIPE_FLAGS}

    @property
    def all_settings(self) -> list[str]:
        """The keys that are set, --prove among them."""
        proves = [] if self.prove is None else [f"publish.prove={str(self.prove).lower()}"]
        return [*(self.settings or []), *proves]

    def options(self) -> RunOptions:
        """Where and how the verb runs."""
        return replace(
            run_options(self.recipe, self.out, self.workers),
            memory_limit_bytes=byte_count(self.memory_limit) if self.memory_limit else None,
            keeps_plan=self.output is not None,
            engine=engine_name(self.engine),
            accelerator=accelerator_name(self.device),
        )


def command_of(
    verb: Verb, announces: bool = True, publishes: bool = False, against_verb: VerbAgainst | None = None
) -> Callable[..., None]:
    """A typer command with the shared flags, which runs `verb`, prints what it came to, and tells a CI job.

    Where it `publishes`, the proof can be left out. With --against it runs `against_verb`.
    """

    def command(**given: Any) -> None:
        flags = Flags(**given)
        require_folders(flags.output, flags.junit_xml)
        run, out = _prepared(flags, verb, against_verb)
        try:
            outcome = run()
        except ExportError as error:
            tell_ci(failure_data(error), out, flags.junit_xml)
            raise
        if announces:
            tell_ci(outcome[0], out, flags.junit_xml)
        finish(outcome, flags.as_json, flags.output)

    command.__doc__ = verb.__doc__
    unused = {"prove": not publishes, "against": against_verb is None}
    words = inspect.signature(Flags, eval_str=True).parameters.values()
    used = [word for word in words if not unused.get(word.name)]
    command.__signature__ = inspect.Signature(used)  # type: ignore[attr-defined]
    return command


def _prepared(flags: Flags, verb: Verb, against_verb: VerbAgainst | None) -> tuple[Callable[[], Outcome], Path]:
    """What runs the verb on what the flags name, and its run folder."""
    options, stated, settings = flags.options(), flags.of_recipe, flags.all_settings
    if flags.against is not None and against_verb is not None:
        folder = _artifact(flags.recipe)
        options = options if flags.out else replace(options, out=Path("out") / f"check-{folder.resolve().name}")
        return partial(against_verb, folder, flags.against, stated, settings, options), options.out
    if flags.recipe is not None and flags.recipe.suffix == ".json":
        facts, options = _kept_plan(flags.recipe, stated, settings, options)
        return partial(verb, facts, options), options.out
    return partial(verb, recipe_from(flags.recipe, stated, settings), options), options.out


def _artifact(path: Path | None) -> Path:
    """The folder that --against is about."""
    if path is None:
        raise UsageError("--against without an artifact", "as in check ARTIFACT --against MODEL --text FILE")
    return path


def require_folders(*files: Path | None) -> None:
    """Raise UsageError for a file to write whose folder does not exist, before any work."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist", "make the folder, or choose another file")


def accelerator_name(device: str | None) -> str | None:
    """What --device names beside the processor."""
    return None if device in (None, "cpu") else device


def engine_name(text: str | None) -> Engine:
    """The engine that a build runs on; raises UsageError for one that there is not."""
    if text not in (None, "threads", "ray"):
        raise UsageError(f"--engine {text!r} is no engine", "threads or ray")
    return "ray" if text == "ray" else "threads"


def byte_count(text: str) -> int:
    """A number of bytes as people write it: 800MB, 1.5 GiB, 2e9; raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([kMGT]i?)?B?", text.strip())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise UsageError(f"--memory-limit {text!r} is no number of bytes", "write it as in 800MB or 1GiB")
    unit = found[2] or ""
    return int(number * (1024 if unit.endswith("i") else 1000) ** " kMGT".index(unit[:1] or " "))


def failure_data(error: ExportError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "schema": 1,
        "exit_code": int(error.exit_code),
        "error": {"message": public(error.message), "hint": public(error.hint)},
    }


def public(text: str) -> str:
    """A text without any token, before it reaches a log, a report or a page."""
    from qlora_export.publish.redaction import redact

    return redact(text, [os.environ[name] for name in SECRET_VARIABLES if os.environ.get(name)])


def tell_ci(data: dict[str, Any], out: Path, junit_xml: Path | None) -> None:
    """Write the JUnit report, and what the job's runner shows of a release where one is at work."""
    from qlora_export.report.data import REPORT_NAME
    from qlora_export.report.github import announce
    from qlora_export.report.junit import junit
    from qlora_export.report.markdown import MARKDOWN_NAME

    if junit_xml is not None:
        junit_xml.write_text(junit(data), encoding="utf-8")
    markdown = out / MARKDOWN_NAME
    text = markdown.read_text(encoding="utf-8") if markdown.is_file() else ""
    for line in announce(data, text, out / REPORT_NAME):
        print(line, file=sys.stderr)


def finish(outcome: Outcome, as_json: bool, output: Path | None = None) -> None:
    """Print an outcome, keep its JSON, and end with its exit code."""
    data, show, code = outcome
    text = json.dumps(data, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    try:
        if as_json:
            print(text)
        else:
            show()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has read enough; the exit code still says what came of the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(code)


def recipe_from(path: Path | None, flags: dict[str, Any], settings: list[str]) -> Recipe:
    """The recipe of a file, or of the flags; raises UsageError when both or neither are given."""
    from qlora_export.recipe.load import load_recipe, make_recipe

    given = [name for name, value in flags.items() if value is not None and value != []]
    if path is not None:
        if given:
            raise UsageError(f"a recipe and {', '.join(given)}", "use --set to change a recipe, or the flags alone")
        return load_recipe(path, settings)
    if not (flags["--base"] and flags["--format"]):
        raise UsageError("no recipe", "give a recipe file, or --base, --adapter and at least one --format")
    data: dict[str, Any] = {"base": flags["--base"]}
    if flags["--adapter"]:
        data["adapter"] = _adapters(flags["--adapter"])
    if flags["--training-quantization"] is not None:
        data["training_quantization"] = flags["--training-quantization"]
    data["artifacts"] = [{"format": name} for name in flags["--format"]]
    if flags["--onto"]:
        data["merge"] = {"onto": flags["--onto"]}
    if flags["--calibration"]:
        data["calibration"] = {"text": flags["--calibration"]}
    if (drift := drift_from(flags)) is not None:
        data["drift"] = drift
    return make_recipe(data, Path(), "flags", settings)


def drift_from(flags: dict[str, Any]) -> dict[str, Any] | None:
    """A recipe's section on drift; raises UsageError for what goes with a text where there is none."""
    stated = {name: flags[f"--{name}"] for name in DRIFT_FLAGS if flags.get(f"--{name}")}
    if flags["--text"]:
        return {"text": flags["--text"], **stated}
    for name, value in stated.items():
        raise UsageError(f"--{name} {value} without a text to measure on", "add --text FILE")
    return None


def _kept_plan(
    path: Path, flags: dict[str, Any], settings: list[str], options: RunOptions
) -> tuple[Recipe, RunOptions]:
    """The recipe of a kept plan, and options that hold the run to it."""
    from qlora_export.pipeline.lock import pinned_recipe

    if settings or any(value is not None and value != [] for value in flags.values()):
        raise UsageError(f"{path}: a plan is released as it is", "plan again with the changed recipe")
    recipe, pinned = pinned_recipe(path)
    return recipe, replace(options, pinned=pinned)


def _adapters(given: list[str]) -> str | list[dict[str, Any]]:
    """One adapter by its name, or several, each PATH or PATH=WEIGHT."""
    items = [_weighted(text) for text in given]
    return str(items[0]["path"]) if len(items) == 1 and items[0]["weight"] == 1 else items


def _weighted(text: str) -> dict[str, Any]:
    path, equals, weight = text.rpartition("=")
    if Path(text).exists():
        return {"path": text, "weight": 1.0}
    try:
        return {"path": path, "weight": float(weight)} if equals and path else {"path": text, "weight": 1.0}
    except ValueError:
        return {"path": text, "weight": 1.0}


def run_options(recipe: Path | None, out: Path | None, workers: int | None) -> RunOptions:
    """Where and how to run."""
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.report.terminal import show_progress

    folder = out or (Path("out") / recipe.stem if recipe else Path("out"))
    defaults = RunOptions(folder)
    return RunOptions(folder, workers or defaults.workers, track=show_progress)
