"""Measure what every kind of 4 and 8 bits keeps of a fine-tune, on the same tokens, against the model that was trained.

    python tools/bench_quality.py [--models demo,/path] [--sweep] [--peer-python ENV/bin/python] [--json] [--tiny]

A model is `demo` or a folder of `make_quality_model.py`. Every row is built and checked by the public API with the same
held-out conversations, and calibrated, where it is, with the same 128 others. A combination that is refused, or fails,
is a row with its error; a rounding that gives the bytes of an earlier row is named as that and counts for nothing.
`mean_kl` is KL(as trained || row) in nats; `seconds` are those of the build. The peer is llm-compressor's GPTQ
(`quality_peer.py`) of the as-trained merge in bf16, on the token ids of the same 128 conversations, measured by our
code. Ratios, each a mean over the models that have both sides:

    nf4_calibrated_to_better_plain    mean KL over that of the better of the two plain roundings (goal 1/3)
    nf4_tuned_to_better_plain         the same (1/4)      nf4_dithered_to_better_plain  the same (1.1)
    gain_kept_calibrated              share of the fine-tuning gain that is kept (0.98)
    w4a16_calibrated_to_llm_compressor  mean KL over the peer's (0.6)
    nf4_adapter_kl, int8_kl, w8a16_kl mean KL itself

`--formats` measures these by every rounding, in place of the rows.

`--text` measures on another text, such as a model's `general.txt`: what calibration on one kind of text does to others.

`--sweep` scales the adapter's delta by 0, 0.1, 0.3, 1 and 2 and compares the plain and the dithered rounding at each
size, `nf4_dithered_to_better_plain_worst` being the largest ratio; KLs below 1e-5 count as 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quality_foreign import measure_folder, peer_folder
from quality_models import WINDOW_TOKENS, QualityModel, find_model, scaled_adapter, size_of
from quality_rows import PEER, PLAIN, Row, Table, print_table, ratios_of

from qlora_export import Recipe, Run, RunOptions, build, check, make_recipe
from qlora_export.artifact import Artifact
from qlora_export.drift.ledger import Entry
from qlora_export.drift.results import Drift
from qlora_export.errors import ExportError

ROWS: dict[str, dict[str, Any]] = {
    "bf16": {"format": "bf16"},
    "nf4 nearest": {"format": "nf4", "rounding": "nearest"},
    "nf4 nearest, original": {"format": "nf4", "rounding": "nearest", "onto": "original"},
    "nf4 dithered": {"format": "nf4", "rounding": "dithered"},
    "nf4 search": {"format": "nf4", "rounding": "search"},
    "nf4 search, original": {"format": "nf4", "rounding": "search", "onto": "original"},
    "nf4 calibrated": {"format": "nf4", "rounding": "calibrated"},
    "nf4 tuned": {"format": "nf4", "rounding": "tuned"},
    "nf4-adapter": {"format": "nf4-adapter"},
    "nf4-lowrank": {"format": "nf4-lowrank"},
    "int8": {"format": "int8"},
    "w8a16": {"format": "w8a16"},
    "fp8": {"format": "fp8"},
    "w4a16 nearest": {"format": "w4a16", "rounding": "nearest"},
    "w4a16 search": {"format": "w4a16", "rounding": "search"},
    "w4a16 calibrated": {"format": "w4a16", "rounding": "calibrated"},
    "gptq nearest": {"format": "gptq", "rounding": "nearest"},
    "gptq calibrated": {"format": "gptq", "rounding": "calibrated"},
}
ROUNDINGS = ("nearest", "search", "calibrated", "tuned")
SWEEP_ROWS = (*PLAIN, "nf4 dithered")
SWEEP_FACTORS = (0.0, 0.1, 0.3, 1.0, 2.0)
TINY_FACTORS = (0.0, 2.0)
CALIBRATED = ("calibrated", "tuned")
NEEDS_CALIBRATION = ("nf4-lowrank",)


@dataclass(frozen=True)
class Setting:
    """What to measure, and with how much text."""

    work: Path
    rows: tuple[str, ...]
    tokens: int | None
    sequences: int
    peer_python: Path | None


def recipe_of(model: QualityModel, rows: Sequence[str], setting: Setting) -> Recipe:
    """The recipe that makes these rows; it speaks of calibration only where a row needs it."""
    artifacts = [{"name": folder_name(row), **ROWS[row]} for row in rows]
    data: dict[str, Any] = {
        "base": str(model.base),
        "adapter": str(model.adapter),
        "merge": {"zero_delta": "keep"},
        "artifacts": artifacts,
        "drift": {"text": str(model.holdout), "window_tokens": WINDOW_TOKENS, "tokens": setting.tokens},
    }
    if any(item.get("rounding") in CALIBRATED or item["format"] in NEEDS_CALIBRATION for item in artifacts):
        data["calibration"] = {"text": str(model.calibration), "sequences": setting.sequences}
    return make_recipe(data, Path(), "bench_quality")


def folder_name(row: str) -> str:
    """The folder of a row."""
    return row.replace(", ", "-").replace(" ", "-")


def say(text: str) -> None:
    """Progress, for the terminal."""
    print(text, file=sys.stderr, flush=True)


def attempt(action: Callable[[], Run]) -> tuple[Run | None, str]:
    """What an action came to, or the text of its error, whatever it is."""
    try:
        return action(), ""
    except ExportError as error:
        return None, f"{error.message} ({error.hint})" if error.hint else error.message
    except Exception as error:  # noqa: BLE001  a row that breaks is a result too
        return None, f"{type(error).__name__}: {error}"


def measure_model(model: QualityModel, setting: Setting) -> Table:
    """Build row by row, then check everything that could be built in one run, on one reference."""
    options = RunOptions(out=setting.work / model.name / "out", workers=1)
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for row in setting.rows:
        started = time.perf_counter()
        run, refusal = attempt(lambda row=row: build(recipe_of(model, [row], setting), options))  # type: ignore[misc]
        if run is None:
            refused[row] = refusal
        else:
            seconds[row] = time.perf_counter() - started
        say(f"{model.name}: {row}: {refusal or f'built in {seconds[row]:.1f} s'}")
    run = check_all(model, seconds, refused, setting, options)
    rows: dict[str, Row] = {}
    weights: dict[frozenset[str], str] = {}
    for row in seconds:
        entry = entry_of(run, row)
        same = weights.setdefault(weights_sha256(entry.artifact), row)
        found = as_row(entry.drift, entry.artifact.path, seconds[row], model)
        rows[row] = replace(found, same_bytes_as=None if same == row else same)
    if setting.peer_python is not None:
        measure_peer(run, model, setting, rows, refused)
    if run.ledger is None:
        raise SystemExit(f"{model.name}: nothing was measured")
    return Table(run.ledger.tokens.count, run.ledger.tokens.sha256, rows, refused)


def check_all(
    model: QualityModel, seconds: dict[str, float], refused: dict[str, str], setting: Setting, options: RunOptions
) -> Run:
    """Check every row that was built; where that fails, drop the rows that cannot be checked alone."""
    run, refusal = attempt(lambda: check(recipe_of(model, list(seconds), setting), options))
    if run is not None:
        return run
    say(f"{model.name}: {refusal}")
    for row in list(seconds):
        alone, refusal = attempt(lambda row=row: check(recipe_of(model, [row], setting), options))  # type: ignore[misc]
        if alone is None:
            refused[row] = refusal
            del seconds[row]
    return check(recipe_of(model, list(seconds), setting), options)


def entry_of(run: Run, row: str) -> Entry:
    """The line of a row in the ledger of a run."""
    entries = run.ledger.entries if run.ledger else ()
    return next(entry for entry in entries if entry.artifact.name == folder_name(row))


def weights_sha256(artifact: Artifact) -> frozenset[str]:
    """The digests of an artifact's weight files."""
    files = artifact.manifest["files"]
    return frozenset(str(facts["sha256"]) for name, facts in files.items() if name.endswith(".safetensors"))


def as_row(drift: Drift, folder: Path, seconds: float, model: QualityModel) -> Row:
    """Drift and size of one folder."""
    size = size_of(folder, model.base)
    return Row(
        bytes=size.bytes,
        bits_per_weight=size.bits_per_weight,
        seconds=seconds,
        mean_kl=drift.mean_kl,
        mean_kl_stderr=drift.mean_kl_stderr,
        perplexity_ratio=drift.perplexity / drift.perplexity_reference,
        gain_kept=drift.gain_kept,
        same_top1=drift.same_top1,
        survival_min=drift.survival_min,
        survival_median=drift.survival_median,
    )


def measure_peer(
    run: Run, model: QualityModel, setting: Setting, rows: dict[str, Row], refused: dict[str, str]
) -> None:
    """Add the row of the peer, or the error why there is none."""
    assert setting.peer_python is not None
    merged = next((artifact.path for artifact in run.artifacts if artifact.name == "bf16"), None)
    if merged is None:
        refused[PEER] = "needs the row bf16"
        return
    started = time.perf_counter()
    try:
        folder = peer_folder(setting.peer_python, merged, model, setting.sequences, setting.work / model.name / "peer")
        seconds = time.perf_counter() - started
        rows[PEER] = as_row(measure_folder(folder, run), folder, seconds, model)
    except Exception as error:  # noqa: BLE001  a row that breaks is a result too
        refused[PEER] = f"{type(error).__name__}: {error}"
    say(f"{model.name}: {PEER}: {refused.get(PEER, 'measured')}")


def sweep(model: QualityModel, setting: Setting, factors: Sequence[float]) -> dict[str, Table]:
    """The plain and the dithered rounding at several sizes of the delta."""
    tables = {}
    for factor in factors:
        name = f"{model.name}-x{factor:g}"
        adapter = scaled_adapter(model.adapter, factor, setting.work / name / "adapter")
        part = replace(setting, rows=SWEEP_ROWS, peer_python=None)
        tables[f"{factor:g}"] = measure_model(replace(model, name=name, adapter=adapter), part)
    return tables


def rows_of(formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of each format by every rounding."""
    return {f"{form} {rounding}": {"format": form, "rounding": rounding} for form in formats for rounding in ROUNDINGS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo", help="`demo` and folders, with commas between them")
    parser.add_argument("--rows", help=f"which rows, with semicolons between them [default: all of {'; '.join(ROWS)}]")
    parser.add_argument("--formats", help="in place of rows: these, with commas between them, by every rounding")
    parser.add_argument("--sweep", action="store_true", help="also scale the adapters' deltas")
    parser.add_argument("--peer-python", type=Path, help="the interpreter of an environment with llm-compressor")
    parser.add_argument("--text", type=Path, help="measure on this text [default: each model's held-out conversations]")
    parser.add_argument("--tokens", type=int, help="measure on so many tokens [default: all]")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--work", type=Path, help="folder for what is built [default: a temporary one]")
    parser.add_argument("--tiny", action="store_true", help="a few tokens and sequences, to see that the tool runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    every = rows_of(options.formats.split(",")) if options.formats else {}
    ROWS.update(every)
    chosen = tuple(options.rows.split(";")) if options.rows else tuple(every or ROWS)
    if unknown := set(chosen) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; known: {'; '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as name:
        sequences, tokens = (4, 200) if options.tiny else (options.sequences, options.tokens)
        setting = Setting(options.work or Path(name), chosen, tokens, sequences, options.peer_python)
        models = [find_model(word, options.text) for word in options.models.split(",")]
        tables = {model.name: measure_model(model, setting) for model in models}
        factors = TINY_FACTORS if options.tiny else SWEEP_FACTORS
        sweeps = {model.name: sweep(model, setting, factors) for model in models} if options.sweep else {}
    ratios = ratios_of(tables, sweeps)
    if options.json:
        parts = {name: {factor: asdict(table) for factor, table in part.items()} for name, part in sweeps.items()}
        models_data = {name: asdict(table) for name, table in tables.items()}
        print(json.dumps({**ratios, "models": models_data, "sweep": parts}, indent=2))
        return
    for label, table in tables.items():
        print_table(label, table)
    for label, part in sweeps.items():
        for factor, table in part.items():
            print_table(f"{label}, delta x {factor}", table)
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
