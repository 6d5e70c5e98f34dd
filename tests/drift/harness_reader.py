"""Run by the Python of an environment of lm-evaluation-harness: what it makes of documents, as JSON on the last line.

The harness' own model class, its rolling log-likelihood, its counts of words and bytes, and its aggregations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM


def read(folder: str, documents: list[str], window_tokens: int) -> dict[str, float]:
    """Log-likelihoods of the documents, and what the harness calls their perplexities."""
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1, max_length=window_tokens)
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(documents)]
    found = model.loglikelihood_rolling(asked, disable_tqdm=True)
    words = [(value, Task.count_words(text)) for value, text in zip(found, documents, strict=True)]
    lengths = [(value, Task.count_bytes(text)) for value, text in zip(found, documents, strict=True)]
    return {
        "loglikelihood": sum(found),
        "word_perplexity": weighted_perplexity(words),
        "byte_perplexity": weighted_perplexity(lengths),
        "bits_per_byte": bits_per_byte(lengths),
    }


if __name__ == "__main__":
    folder, documents, window_tokens = sys.argv[1:]
    sys.stdout.write(json.dumps(read(folder, json.loads(Path(documents).read_text()), int(window_tokens))) + "\n")
