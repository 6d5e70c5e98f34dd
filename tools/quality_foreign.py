"""Folders that another tool made: how the benchmark has llm-compressor make one, and measures it with our code."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from quality_models import QualityModel, calibration_ids

from qlora_export import Run
from qlora_export.drift.measure import measure
from qlora_export.drift.probes import NO_PROBES
from qlora_export.drift.reference_store import ReferenceStore, open_reference
from qlora_export.drift.results import Drift
from qlora_export.drift.statistics import compare
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.runtimes.registry import load_runtime

REFERENCE_BYTES = 8_000_000_000


def peer_folder(python: Path, merged: Path, model: QualityModel, sequences: int, out: Path) -> Path:
    """The GPTQ folder of a merged folder, made in the peer's environment; raises RuntimeError with its last line."""
    if (out / "config.json").is_file():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    ids = out / "sequences.json"
    ids.write_text(json.dumps(calibration_ids(model, sequences)))
    tool = Path(__file__).with_name("quality_peer.py")
    words = [str(python), str(tool), "--model", str(merged), "--sequences", str(ids), "--out", str(out)]
    found = subprocess.run(words, check=False, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError((found.stderr.strip() or "it said nothing").splitlines()[-1])
    (out / "versions.json").write_text(found.stdout.strip().splitlines()[-1] + "\n")
    return out


def measure_folder(folder: Path, run: Run) -> Drift:
    """The drift of a folder that we did not make, on the tokens of a run and against the same reference."""
    model, ledger = trained_model(run.plan), run.ledger
    if ledger is None:
        raise ValueError("nothing to compare with")

    def progress(done: int, total: int) -> None:
        del done, total

    store, options = ReferenceStore(folder.parent, REFERENCE_BYTES), RunOptions(folder, workers=2)
    with open_reference(store, model.key(options), ledger.tokens) as reference:
        references = model.measure(reference, NO_PROBES, options)
        with load_runtime("transformers").open(folder) as session:
            measured = measure(folder.name, "transformers", session, reference.rows, progress)
    return compare(measured, references.tuned, references.base or references.tuned, ledger.tokens)
