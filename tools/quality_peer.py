"""Quantise a 16-bit folder with llm-compressor's GPTQ: the peer of the quality benchmark, in an environment of its own.

    PEER_PYTHON tools/quality_peer.py --model FOLDER --sequences FILE.json --out FOLDER

llm-compressor pins an exact transformers, so it cannot live beside us: `python -m venv ENV`, then in it torch and
`llmcompressor`. FILE holds a list of token id lists, whole sequences that are neither shuffled, cut nor padded, so both
sides calibrate on the same tokens. The settings are the library's defaults for W4A16, groups of 128, except that every
sequence is used; the last matrix stays dense. Prints the versions in use as JSON. It imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def quantise(model_folder: Path, sequences: list[list[int]], out: Path) -> None:
    """One GPTQ pass over the sequences, saved as compressed-tensors."""
    import torch
    import transformers
    from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor import oneshot  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found, unused-ignore]

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=max(len(ids) for ids in sequences),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sequences", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    sequences = json.loads(options.sequences.read_text())
    quantise(options.model, sequences, options.out)
    sys.stdout.flush()
    print(json.dumps({name: version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main()
