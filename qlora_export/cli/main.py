"""The command: its verbs, and how every error becomes a message, a hint and an exit code."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qlora_export._version import __version__
from qlora_export.cli import (
    build,
    check,
    clean,
    compare,
    demo,
    doctor,
    explain,
    formats,
    init,
    inspect,
    plan,
    publish,
    rehearse,
    release,
    schema,
    verify,
)
from qlora_export.cli.options import command_of, public
from qlora_export.errors import ExitCode, ExportError, PlanRefused

app = typer.Typer(
    name="qlora-export",
    help="Release a QLoRA fine-tune: merge, re-quantise, measure the drift from the model that was trained.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("release")(command_of(release.release, publishes=True))
app.command("plan")(command_of(plan.plan, announces=False))
app.command("build")(command_of(build.build))
app.command("check")(command_of(check.check, against_verb=check.check_against))
app.command("publish")(command_of(publish.publish, publishes=True))
app.command("compare")(compare.compare)
app.command("verify")(verify.verify)
app.command("rehearse")(rehearse.rehearse)
app.command("inspect")(inspect.inspect)
app.command("clean")(clean.clean)
app.command("init")(init.init)
app.command("doctor")(doctor.doctor)
app.command("formats")(formats.formats)
app.command("explain")(explain.explain)
app.command("schema")(schema.schema)


RESUME = "run the same command again to go on where it stopped"


class Terminated(BaseException):
    """SIGTERM arrived."""


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Release a QLoRA fine-tune: merge, re-quantise, measure the drift from the model that was trained."""
    if version:
        print(__version__)
        raise typer.Exit


def run() -> NoReturn:
    """Run the command and end the process with its exit code."""
    # Imports make some hundred thousand objects that stay: to look for cycles among them costs a tenth of the start-up.
    gc.set_threshold(100_000, 20, 20)
    signal.signal(signal.SIGTERM, _terminate)
    # bitsandbytes warns at import that an optional package of kernels is not there; none of it is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except ExportError as error:
        _print_error(error.message, error.hint, error.exit_code, isinstance(error, PlanRefused))
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except Terminated:
        print(f"terminated: {RESUME}", file=sys.stderr)
        return int(ExitCode.TERMINATED)
    except OSError as error:
        _print_error(str(error), "check the path, its permissions and the disk", ExitCode.ENVIRONMENT)
        return int(ExitCode.ENVIRONMENT)
    except Exception as error:  # noqa: BLE001  the last resort: whatever is left is a bug of ours
        if (usage := _usage_message(error)) is not None:
            _print_error(usage, "see --help", ExitCode.USAGE)
            return int(ExitCode.USAGE)
        if "no locator available" in str(error):
            hint = "set NUMBA_CACHE_DIR to a folder that can be written"
            _print_error("numba has no place to keep its compiled kernels", hint, ExitCode.ENVIRONMENT)
            return int(ExitCode.ENVIRONMENT)
        print(public(traceback.format_exc()), file=sys.stderr)
        _print_error(f"{type(error).__name__}: {error}", "this is a bug: please report it", ExitCode.BUG)
        return int(ExitCode.BUG)
    # typer itself makes this code of Ctrl-C, and says nothing.
    if code == ExitCode.INTERRUPTED:
        print(f"interrupted: {RESUME}", file=sys.stderr)
    return int(code or 0)


def _usage_message(error: Exception) -> str | None:
    """The message of typer's own errors; their base class is click's, which typer may or may not have within."""
    kinds = [kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"]
    return str(error.format_message()) if isinstance(error, tuple(kinds)) else None  # type: ignore[attr-defined]


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _print_error(message: str, hint: str, code: ExitCode, several: bool = False) -> None:
    message, hint = public(message), public(hint)
    lines = message.splitlines() if several else [message]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    for line in hint.splitlines():
        print(f"hint: {line}", file=sys.stderr)
    if "--json" in sys.argv:
        data = {"schema": 1, "exit_code": int(code), "error": {"message": message, "hint": hint}}
        print(json.dumps(data, indent=2))
