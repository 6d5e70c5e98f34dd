"""What every exit code means, in words for the person whose release job stopped; rules of the linter by their line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qlora_export.errors import ExitCode, UsageError


@dataclass(frozen=True)
class Explanation:
    """One code: its id and number, what it means, what usually causes it, what to do, and whether to run it again."""

    id: str
    number: int | None
    meaning: str
    causes: str
    action: str
    again: str


def _explained(code: ExitCode, meaning: str, causes: str, action: str, again: str) -> Explanation:
    return Explanation(code.name.lower().replace("_", "-"), int(code), meaning, causes, action, again)


CODES = (
    _explained(
        ExitCode.OK,
        "Everything that was asked for is done, and every verdict is the one that the recipe expects.",
        "An artifact may still have failed its limits, where the recipe says `expect: fail` or `on_failure: withhold`.",
        "Nothing. The report says which artifacts were published, where, and with which numbers.",
        "Safe: finished artifacts are verified and kept, and publishing the same bytes again changes nothing.",
    ),
    _explained(
        ExitCode.BUG,
        "The tool met something that it has no answer for: a mistake of ours, not of the recipe.",
        "A model or a library behaves in a way nobody thought of; the traceback on stderr names the place.",
        "Report it with the traceback, the versions (`qlora-export doctor --json`) and the recipe.",
        "Safe, since nothing unfinished is left looking finished, but it will most likely stop at the same place.",
    ),
    _explained(
        ExitCode.USAGE,
        "The recipe, the flags or the output folder cannot be what was meant. Nothing was built.",
        "A key that does not exist, two artifacts of one name, flags beside a recipe, or a folder that was made by "
        "another plan.",
        "Correct what the message names; the hint has the nearest known word. `qlora-export schema recipe` lets an "
        "editor check the file.",
        "Pointless until the recipe or the command is changed.",
    ),
    _explained(
        ExitCode.GATE_FAILED,
        "An artifact drifted further from the trained model than its limits allow, or passed where failure is "
        "expected. Nothing was published.",
        "Rounding to few bits that erases a small delta, limits that are too narrow for the format, or text to measure "
        "on that is unlike the training data.",
        "Read the reasons in report.md. Try another `rounding`, ship nf4-adapter or bf16 instead, keep sensitive "
        "modules dense, let others go on with `on_failure: withhold`, or move a limit that you can argue for.",
        "Pointless: the same inputs give the same numbers. Do not retry in CI.",
    ),
    _explained(
        ExitCode.REFUSED,
        "The input is understood, and it is unsafe or impossible to make a release of it.",
        "Pickles as the only weights, an adapter variant that no weight can express, a path that leaves its folder, a "
        "secret in a file to be published, or a licence that is missing.",
        "Follow the hint. There is no flag that turns refusals off as a whole, and that is meant.",
        "Pointless until the input is changed.",
    ),
    _explained(
        ExitCode.BAD_INPUT,
        "A source is missing, damaged, or does not belong to the others.",
        "A download that was cut short, an adapter of another base, NaN in a diverged adapter, a tokenizer with more "
        "tokens than the embedding has rows, or a text that is not there.",
        "Fetch the file again, or name the right one. `qlora-export inspect ADAPTER --base BASE` says what fits.",
        "Pointless until the input is there and whole.",
    ),
    _explained(
        ExitCode.ENVIRONMENT,
        "This machine lacks something: disk, memory, a dependency, a permission, or a device.",
        "A full disk, an extra that is not installed (`onnx`, `sign`), a read-only folder, or HF_HUB_OFFLINE.",
        "Run `qlora-export doctor RECIPE`: it checks each of these and says how to put it right.",
        "Safe once it is put right: the run goes on where it stopped, with identical bytes.",
    ),
    _explained(
        ExitCode.REMOTE,
        "The Hub, or whatever stands in for it, did not answer, or answered that it cannot right now.",
        "Rate limits (429), overload (502, 503, 504), a lost connection, or a deadline that passed.",
        "Run the same command again. What was uploaded is not sent twice, and a commit whose answer got lost is found "
        "and not made twice.",
        "Safe, and the only code that a CI job should retry by itself.",
    ),
    _explained(
        ExitCode.REMOTE_CONFLICT,
        "The destination holds something else than we may replace. It was left as it is.",
        "Somebody committed meanwhile, the version's tag names another commit, or the repository is public where "
        "private was asked for.",
        "Look at the destination. Publish under another version, or set `publish.visibility` to what is meant.",
        "Safe but seldom of use: look first. A version never changes.",
    ),
    _explained(
        ExitCode.NOT_AUTHORISED,
        "A remote does not let this user in, or not that far.",
        "No token, an expired one, one without write permission for this repository, a trusted publisher that does not "
        "match the workflow, or a gated model whose terms were not accepted.",
        "Run `qlora-export doctor --hub RECIPE`. Set HF_TOKEN to a token that may write there, or HF_OIDC_RESOURCE "
        "for a trusted publisher; such a publisher cannot create the repository.",
        "Pointless until access is given.",
    ),
    _explained(
        ExitCode.VERIFY_MISMATCH,
        "A finished artifact no longer has the bytes that its manifest records, or what was read back is not what was "
        "sent.",
        "A file that was edited after it was built, a damaged disk or cache, or a publication that was changed later.",
        "Find out who changed it. Remove the folder and build again; the bytes come out the same.",
        "Pointless for a local folder; for a publication, `qlora-export verify` tells the file.",
    ),
    _explained(
        ExitCode.GATE_INCONCLUSIVE,
        "The measurement is not exact enough to tell whether a limit is kept. Nothing was published.",
        "Too little text to measure on, or a number that lies within its error of the limit.",
        "Add text: the reasons say about how many more tokens are needed. The extra tokens must be new ones.",
        "Pointless on the same text.",
    ),
    _explained(
        ExitCode.INTERRUPTED,
        "Ctrl-C, or SIGINT from elsewhere.",
        "A person, or a runner that cancels its job.",
        "Run the same command again; `qlora-export clean OUT` shows what was left behind.",
        "Safe: it goes on where it stopped, with identical bytes.",
    ),
    _explained(
        ExitCode.TERMINATED,
        "SIGTERM: something ended the job.",
        "A time limit of the CI, a machine that was taken back, or a cancelled pipeline.",
        "Run the same command again, with more time. Keep the run folder between attempts to keep the work.",
        "Safe: it goes on where it stopped, with identical bytes.",
    ),
)


def explanation(code: str, load_rules: Callable[[], Mapping[str, str]]) -> Explanation:
    """The explanation of an exit code, by number or name, or of a rule; raises UsageError with the nearest one.

    The rules, id and line of each, are only loaded for what is no exit code.
    """
    wanted = code.strip().lower().replace("_", "-")
    for item in CODES:
        if wanted in (item.id, str(item.number)):
            return item
    rules = load_rules()
    by_name = {name.lower().replace("_", "-"): name for name in rules}
    if wanted in by_name:
        return _of_rule(by_name[wanted], rules[by_name[wanted]])
    known = {item.id: item.id for item in CODES} | by_name
    near = difflib.get_close_matches(wanted, known, n=1)
    numbers = ", ".join(str(item.number) for item in CODES)
    raise UsageError(
        f"unknown code {code!r}", f"did you mean {known[near[0]]}?" if near else f"known: {numbers}, rules"
    )


def _of_rule(name: str, line: str) -> Explanation:
    return Explanation(
        name,
        None,
        line,
        "A file that is about to be published, or its place, breaks this rule; the message names it.",
        "Change what is named and run again. Everything is looked at before anything is sent.",
        "Pointless until it is changed: the process ends with exit code 4, refused.",
    )


def as_data(found: Explanation) -> dict[str, Any]:
    """An explanation as JSON."""
    return {"schema": 1, **asdict(found)}


def in_words(found: Explanation) -> str:
    """An explanation for people."""
    title = found.id if found.number is None else f"{found.number} {found.id}"
    return "\n".join(
        [
            title,
            "",
            found.meaning,
            "",
            f"Usual causes: {found.causes}",
            f"What to do: {found.action}",
            f"Run it again? {found.again}",
        ]
    )
