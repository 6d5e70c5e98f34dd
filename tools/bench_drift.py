"""What the drift check costs beside the models that it runs, and whether it sees what it says that it sees.

    python tools/bench_drift.py [--hidden 1536] [--vocabulary 64000] [--tokens 2048] [--repeats 3] [--json] [--tiny]

`overhead`: a Llama with random weights is measured against a bf16 copy of itself. Beside it stand the bare forward
passes of both models on the same windows, in the same process, in turn; CPU seconds of all threads, the least of the
repeats, since the machine may be shared. Of the check: log-probabilities, the reference's rows to the disk and back,
KL, NLL, top-1. `overhead_ratio` is check / bare - 1 (goal 0.10). The noise floor, a further pass over 512 tokens, is
not in it.

`resolution`: the embedded demo's adapter with its delta scaled so that the perplexity is 0.5 % higher. From a few of
the windows, drawn by chance, the gate says how many tokens would decide about a limit of no change at all; of as many
others the verdict is taken. `decided` is the share of draws with a verdict there (0.8 is what the gate promises),
`wrong` that of those in which it says that nothing got worse.

`defects`: single things broken in a copy of the demo's merged folder, each checked against the folder it was copied
from, by the public command's own function; what was said of each: the layer that broke, or why nothing was measured.
`resharded` is the same weights in other files: the largest difference of any number, which has to be exactly zero.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_model import Shape, make_base
from quality_models import DEMO, scaled_adapter

from qlora_export.drift.gate import deciding_tokens, judge
from qlora_export.drift.measure import keep_reference, measure, measure_reference
from qlora_export.drift.probes import NO_PROBES
from qlora_export.drift.reference_store import ReferenceStore, open_reference
from qlora_export.drift.results import Drift, Measurement
from qlora_export.drift.statistics import compare
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.errors import ExportError
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.measure import texts_of
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.pipeline.release import build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.config import Limits, Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import report
from qlora_export.report.run import Checked
from qlora_export.runtimes.as_trained import open_as_trained

BLOCKS = 6
WINDOW_TOKENS = 512
CHANGE = 1.005
DRAWS = 100
FIRST_TOKENS = 300
TINY = (64, 200, 512, 1)
HOLDOUT = str(DEMO / "holdout.jsonl")
NO_WORSE = Limits(perplexity_ratio=1.0)


def nothing(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of all threads that a call takes."""
    before = time.process_time()
    run()
    return time.process_time() - before


def random_tokens(count: int, vocabulary: int) -> TokenSet:
    """Disjoint windows of random tokens."""
    rng = np.random.default_rng(0)
    scored = tuple(range(1, WINDOW_TOKENS))
    windows = [
        Window(tuple(rng.integers(0, vocabulary, WINDOW_TOKENS).tolist()), scored, "random", number)
        for number in range(max(1, count // WINDOW_TOKENS))
    ]
    return TokenSet(tuple(windows), Protocol("random", "random tokens", WINDOW_TOKENS))


def overhead(hidden: int, vocabulary: int, count: int, repeats: int) -> dict[str, float]:
    """CPU seconds of a check and of the forward passes in it."""
    import torch

    from qlora_export.runtimes.loading import load_model
    from qlora_export.runtimes.session import ModelSession

    heads = max(hidden // 64, 4)
    shape = Shape(hidden, hidden * 4, BLOCKS, vocabulary, heads, max(heads // 4, 1))
    tokens = random_tokens(count, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder) / "base", shape)
        reference = load_model(Path(folder) / "base", dtype=torch.float32)
        candidate = load_model(Path(folder) / "base", dtype=torch.float32)
        for parameter in candidate.parameters():
            parameter.data = (parameter.data * 1.001).to(torch.bfloat16).float()

        def bare() -> None:
            with torch.no_grad():
                for model in (reference, candidate):
                    for window in tokens.windows:
                        model(input_ids=torch.tensor([window.fed]), use_cache=False)

        def check() -> None:
            with open_reference(ReferenceStore(Path(folder), 0), {}, tokens) as kept:
                keep_reference(ModelSession(reference), kept.rows, nothing)
                measure_reference("reference", "transformers", kept.rows)
                measure("candidate", "transformers", ModelSession(candidate), kept.rows, nothing)

        seconds = [(cpu_seconds(bare), cpu_seconds(check)) for _ in range(repeats)]
    least_bare, least_check = (min(column) for column in zip(*seconds, strict=True))
    return {
        "weights": shape.weights,
        "tokens": tokens.count,
        "bare_cpu_seconds": least_bare,
        "check_cpu_seconds": least_check,
        "overhead_ratio": least_check / least_bare - 1,
    }


@contextmanager
def demo(folder: Path, count: int | None) -> Iterator[tuple[TokenSet, Measurement, Callable[[float], Measurement]]]:
    """The embedded demo: its tokens, the reference, and what measures its adapter with a delta of another size."""
    recipe = recipe_of(DEMO / "adapter", tokens=count)
    plan = make_plan(recipe, folder)
    model, options = trained_model(plan), RunOptions(folder, workers=2)
    tokens = model.tokens(texts_of(recipe).drift, model.tokenizer(), recipe.drift)
    with open_reference(ReferenceStore(folder, 0), model.key(options), tokens) as kept:
        reference = model.measure(kept, NO_PROBES, options).tuned

        def scaled(scale: float) -> Measurement:
            adapter = scaled_adapter(DEMO / "adapter", scale, folder / f"adapter-{scale:g}")
            other = make_plan(recipe_of(adapter, tokens=count), folder)
            if other.adapter is None:
                raise ValueError("no adapter")
            live = open_as_trained(other.checkpoint, other.adapter, other.live_training)
            return measure(f"{scale:g}", "as-trained", live.tuned(), kept.rows, nothing)

        yield tokens, reference, scaled


def recipe_of(adapter: Path, form: str = "adapter", tokens: int | None = None) -> Recipe:
    """The demo with an adapter in place of its own, and one artifact; on so many tokens of its text, or on all."""
    data = {"base": str(DEMO / "base"), "adapter": str(adapter), "artifacts": [form]}
    return make_recipe({**data, "drift": {"text": HOLDOUT, "tokens": tokens}}, Path(), "benchmark")


def resolution(folder: Path, halvings: int, count: int | None) -> dict[str, float]:
    """How often the number of tokens that the gate asks for decides about a small change."""
    with demo(folder, count) as (tokens, reference, scaled):
        low, high = 0.9, 1.0
        for _ in range(halvings):
            scale = (low + high) / 2
            candidate = scaled(scale)
            too_far = np.exp((candidate.nll - reference.nll).mean()) > CHANGE
            low, high = (scale, high) if too_far else (low, scale)
    draws = [draw(tokens, candidate, reference, seed) for seed in range(DRAWS)]
    verdicts = [outcome for _, outcome in draws if outcome != "inconclusive"]
    return {
        "perplexity_ratio": float(np.exp((candidate.nll - reference.nll).mean())),
        "delta_scale": scale,
        "draws": DRAWS,
        "median_tokens_asked_for": float(np.median([asked for asked, _ in draws])),
        "decided": len(verdicts) / DRAWS,
        "wrong": verdicts.count("pass") / max(len(verdicts), 1),
    }


def draw(tokens: TokenSet, candidate: Measurement, reference: Measurement, seed: int) -> tuple[int, str]:
    """From some windows how many tokens are needed, and the verdict on as many others."""
    order = np.random.default_rng(seed).permutation(len(tokens.windows))
    sizes = np.array([len(window.scored) for window in tokens.windows])
    few = leading(order, sizes, FIRST_TOKENS)
    drift = drift_on(few, candidate, reference, tokens)
    asked = deciding_tokens(int(sizes[few].sum()), drift.ln_ppl_ratio_stderr, abs(drift.ln_ppl_ratio))
    more = leading(order[len(few) :], sizes, asked)
    return asked, judge(drift_on(more, candidate, reference, tokens), NO_WORSE, asked, 0).outcome


def leading(order: np.ndarray, sizes: np.ndarray, count: int) -> list[int]:
    """The first of these windows that hold so many tokens together, or all of them."""
    taken = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1
    return [int(number) for number in order[:taken]]


def drift_on(windows: Sequence[int], candidate: Measurement, reference: Measurement, tokens: TokenSet) -> Drift:
    """The drift on some of the windows alone."""
    ends = np.cumsum([len(window.scored) for window in tokens.windows])
    places = np.concatenate([np.arange(ends[at] - len(tokens.windows[at].scored), ends[at]) for at in windows])
    part = TokenSet(tuple(tokens.windows[number] for number in windows), tokens.protocol)
    ours, theirs = (
        replace(
            item, nll=item.nll[places], top1=item.top1[places], kl=item.kl[places], confidence=item.confidence[places]
        )
        for item in (candidate, reference)
    )
    return compare(ours, theirs, theirs, part)


def defects(folder: Path, tokens: int) -> dict[str, str | float]:
    """What is said of each planted defect."""
    sound = build(recipe_of(DEMO / "adapter", "bf16"), RunOptions(folder / "out")).artifacts[0].path
    settings = [f"drift.tokens={tokens}", "drift.limits={perplexity_ratio: 1.002, mean_kl: 0.001, gain_kept: null}"]

    def said(name: str, change: Callable[[Path], None]) -> str | float:
        copy = shutil.copytree(sound, folder / name)
        (copy / "manifest.json").unlink()
        change(copy)
        question = CheckRequest(str(copy), str(sound))
        try:
            run = check_against(question, {"text": HOLDOUT}, settings, RunOptions(folder / "checks"))
        except ExportError as error:
            return error.message.partition(": ")[2]
        return found_of(run)

    return {name: said(name, change) for name, change in DEFECTS.items()}


def found_of(run: Checked) -> str | float:
    """The layer that broke, by the trace of a failed artifact; of a sound one its largest difference."""
    found = report(run)["artifacts"][0]
    if found["verdict"] == "pass":
        drift, spread = found["drift"], found["distribution"]
        return float(max(drift["mean_kl"], abs(drift["ln_ppl_ratio"]), spread["delta_p_rms"]))
    broken = found.get("trace", {}).get("broken")
    return f"{found['verdict']}, {broken['name'] if broken else 'no layer named'}"


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a folder with one file of weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scale_layer(folder: Path) -> None:
    """One layer's weights times 1.05."""
    edit_weights(folder, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].mul_(1.05))


def swap_heads(folder: Path) -> None:
    """The first two attention heads of one layer in each other's place."""
    config = json.loads((folder / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def swap(tensors: dict[str, Any]) -> None:
        weight = tensors["model.layers.1.self_attn.q_proj.weight"]
        weight[: 2 * size] = weight[: 2 * size].reshape(2, size, -1).flip(0).reshape(2 * size, -1).clone()

    edit_weights(folder, swap)


def edit_template(folder: Path, old: str, new: str) -> None:
    """Change the chat template."""
    path = folder / "chat_template.jinja"
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{path} has no {old!r}")
    path.write_text(text.replace(old, new))


def reshard(folder: Path) -> None:
    """The same weights in many files."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")


DEFECTS: dict[str, Callable[[Path], None]] = {
    "layer 2 down_proj x 1.05": scale_layer,
    "layer 1 heads swapped": swap_heads,
    "begin token dropped": lambda folder: edit_template(folder, "{{ bos_token }}", ""),
    "wrong template": lambda folder: edit_template(folder, "<|assistant|>", "<|user|>"),
    "resharded": reshard,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="so small that it says nothing, for tests")
    arguments = parser.parse_args()
    sizes = (
        (64, 200, 512, 1)
        if arguments.tiny
        else (arguments.hidden, arguments.vocabulary, arguments.tokens, arguments.repeats)
    )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, Any]] = {
            "overhead": overhead(*(TINY if arguments.tiny else sizes)),
            "resolution": resolution(Path(folder), *((1, 800) if arguments.tiny else (8, None))),
            "defects": defects(Path(folder), 200 if arguments.tiny else 3000),
        }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, numbers in found.items():
        print(name)
        for key, value in numbers.items():
            print(f"  {key:<26}{value if isinstance(value, str) else f'{value:.6g}'}")


if __name__ == "__main__":
    main()
