"""Make the embedded demo model: a small Llama, trained for real on a CPU, and a true QLoRA adapter on top of it.

    python tools/make_demo.py --out qlora_export/demo [--stage base|adapter|texts|all] [--general general.txt] [--tiny]

Base: byte-level BPE tokenizer and a 3.3 M parameter Llama, trained on the English that every Python carries
(docstrings of the standard library, `pydoc_data.topics`), saved in bf16. Adapter: the base loaded in NF4 with double
quantisation and bf16 compute, rank-16 LoRA on all linear layers, trained on the dialogues of `demo_dialogues`.
Texts: dialogues of two more seeds, to measure on and to calibrate on. Prose for a mixture is written where `--general`
says and is not part of the demo, since it is Python's documentation and stays under Python's licence.
`training_record.json` beside them holds seeds, losses, versions and |delta|/|W| of every layer. Less than an hour on
two cores; the result is committed, so nobody needs to run this but to change the demo.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import tokenizers
import torch
import transformers
from demo_dialogues import dialogues
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from qlora_export.training import record

SEED = 20
VOCABULARY = 2048
WINDOW = 256
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>")
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
TRAIN_SEED, HOLDOUT_SEED, CALIBRATION_SEED = 7, 1_000_007, 2_000_007
HOLDOUT_DIALOGUES, CALIBRATION_DIALOGUES = 240, 128
GENERAL_LETTERS = 60_000
BASE_ID = "qlora-export/demo"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; `batch` counts windows or dialogues."""

    steps: int
    batch: int
    rate: float
    decay: float
    seed: int = SEED


@dataclass(frozen=True)
class Size:
    """How large a model, how many texts it learns from, how long a training; `held_out` dialogues tell how well."""

    hidden: int
    inner: int
    texts: int | None
    base: Schedule
    adapter: Schedule
    dialogues: int
    held_out: int


FULL = Size(
    hidden=256,
    inner=640,
    texts=None,
    base=Schedule(1600, 24, 3e-3, 0.1),
    adapter=Schedule(2000, 16, 2e-4, 10.0),
    dialogues=6000,
    held_out=HOLDOUT_DIALOGUES,
)
TINY = Size(
    hidden=64,
    inner=128,
    texts=40,
    base=Schedule(2, 2, 3e-3, 0.1),
    adapter=Schedule(2, 2, 2e-4, 10.0),
    dialogues=20,
    held_out=4,
)


def documents() -> Iterator[str]:
    """English prose of this Python: help topics, then docstrings of the standard library in path order."""
    for topic in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[topic]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        texts = [
            ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        if text := "\n\n".join(text for text in texts if len(text) > 40):
            yield text


def make_tokenizer(texts: list[str], folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; digits stay single, so that numbers are copied and not recalled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chat = [message["content"] for talk in dialogues(TRAIN_SEED + 1, 300) for message in talk]
    tokenizer.train_from_iterator(texts + chat, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=WINDOW * 2
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def base_config(size: Size, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaConfig:
    """Four layers, grouped-query attention, tied embeddings."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW * 2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 25)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def token_stream(texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one row of int32 ids, each between the begin and the end token."""
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    rows = [np.array([begin, *tokenizer.encode(text, add_special_tokens=False), end], np.int32) for text in texts]
    return torch.from_numpy(np.concatenate(rows))


def pretrain(model: Any, ids: torch.Tensor, schedule: Schedule) -> list[float]:
    """Train a model from scratch on random windows of a stream and return the loss of every step."""
    train = ids.long()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(schedule.seed)
    steps, losses = schedule.steps, []
    print(f"{len(ids)} tokens, {sum(p.numel() for p in model.parameters())} parameters, {steps} steps", flush=True)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, schedule.rate)
        starts = torch.randint(0, len(train) - WINDOW, (schedule.batch,), generator=generator)
        windows = torch.stack([train[start : start + WINDOW] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"base {step + 1}/{steps} {np.mean(losses[-50:]):.3f} {time.monotonic() - started:.0f}s", flush=True)
    return losses


def window_nll(model: Any, ids: torch.Tensor) -> float:
    """Mean NLL of the first 64 windows of a stream."""
    windows = ids[: len(ids) // WINDOW * WINDOW].long().view(-1, WINDOW)[:64]
    with torch.no_grad():
        return float(model.float()(input_ids=windows, labels=windows).loss)


def train_base(folder: Path, size: Size) -> dict[str, Any]:
    """Train the base from scratch and save it in bf16."""
    texts = list(islice(documents(), size.texts))
    tokenizer = make_tokenizer(texts, folder)
    ids = token_stream(texts, tokenizer)
    split = len(ids) * 98 // 100
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(base_config(size, tokenizer))
    losses = pretrain(model, ids[:split], size.base)
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    return {
        "corpus_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "tokens": len(ids),
        "steps": size.base.steps,
        "window": WINDOW,
        "batch": size.base.batch,
        "train_nll": float(np.mean(losses[-50:])),
        "held_out_nll": window_nll(model, ids[split:]),
    }


def encode_dialogues(
    tokenizer: transformers.PreTrainedTokenizerFast, talks: list[list[dict[str, str]]]
) -> list[tuple[list[int], int]]:
    """Token ids of every dialogue and where the answer starts."""
    encoded = []
    for talk in talks:
        prompt = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer.encode(whole, add_special_tokens=False)
        encoded.append((ids, len(tokenizer.encode(prompt, add_special_tokens=False))))
    return encoded


def answer_loss(model: Any, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Mean NLL of the answers' tokens."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    logits = model(input_ids=tokens, attention_mask=(tokens != pad).long()).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def load_qlora(base: Path) -> Any:
    """The base as QLoRA trains it: NF4, double quantisation, bf16 storage and compute."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def relative_deltas(model: Any) -> dict[str, float]:
    """|delta| / |W| of every adapted layer, W being the de-quantised base."""
    ratios = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = module.base_layer
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            delta = module.get_delta_weight("default").float()
            ratios[name.removeprefix("base_model.model.")] = (delta.norm() / weight.norm()).item()
    return ratios


def fit_adapter(model: Any, train: list[tuple[list[int], int]], schedule: Schedule, pad: int) -> list[float]:
    """Train a model's adapter on the answers of dialogues and return the loss of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=schedule.decay, betas=(0.9, 0.99))
    rng = np.random.default_rng(schedule.seed)
    losses = []
    started = time.monotonic()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule.steps, schedule.rate)
        batch = [train[index] for index in rng.choice(len(train), schedule.batch, replace=False)]
        loss = answer_loss(model, batch, pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            mean = np.mean(losses[-50:])
            ratio = np.median(list(relative_deltas(model).values()))
            print(f"adapter {step + 1} {mean:.3f} delta {ratio:.3f} {time.monotonic() - started:.0f}s", flush=True)
    return losses


def train_adapter(base: Path, folder: Path, size: Size) -> dict[str, Any]:
    """Train and save the QLoRA adapter with its sidecar."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    pad = tokenizer.pad_token_id
    train = encode_dialogues(tokenizer, dialogues(TRAIN_SEED, size.dialogues))
    held_out = encode_dialogues(tokenizer, dialogues(HOLDOUT_SEED, size.held_out))
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
    )
    model = peft.get_peft_model(load_qlora(base), lora)
    with torch.no_grad(), model.disable_adapter():
        base_nll = answer_loss(model.train(), held_out, pad).item()
    losses = fit_adapter(model, train, size.adapter, pad)
    with torch.no_grad():
        tuned_nll = answer_loss(model, held_out, pad).item()
    ratios = relative_deltas(model)
    model.save_pretrained(folder)
    tidy_adapter(folder, BASE_ID)
    record(model, folder)
    return {
        "dialogues": size.dialogues,
        "steps": size.adapter.steps,
        "learning_rate": size.adapter.rate,
        "weight_decay": size.adapter.decay,
        "train_nll": float(np.mean(losses[-50:])),
        "held_out_nll_base": base_nll,
        "held_out_nll_tuned": tuned_nll,
        "relative_delta_median": float(np.median(list(ratios.values()))),
        "relative_delta": ratios,
    }


def tidy_adapter(folder: Path, base_id: str) -> None:
    """Leave nothing of this machine and no order that changes from run to run in what peft saved."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_id
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").unlink()


def write_text(folder: Path, seed: int, count: int, name: str) -> None:
    """Write dialogues as JSON lines with a `messages` list each."""
    lines = (json.dumps({"messages": talk}) for talk in dialogues(seed, count))
    (folder / name).write_text("\n".join(lines) + "\n")


def write_texts(folder: Path, general: Path | None) -> None:
    """Write the text to measure on, the text to calibrate on, and some prose of the base's own kind to `general`."""
    write_text(folder, HOLDOUT_SEED, HOLDOUT_DIALOGUES, "holdout.jsonl")
    write_text(folder, CALIBRATION_SEED, CALIBRATION_DIALOGUES, "calibration.jsonl")
    if general is not None:
        text = ""
        for document in documents():
            if len(text) > GENERAL_LETTERS:
                break
            text += document + "\n\n"
        general.write_text(text[: text.rindex("\n\n", 0, GENERAL_LETTERS)] + "\n")


def update_record(path: Path, part: str, facts: dict[str, Any], seeds: dict[str, int]) -> None:
    """Add one stage's facts, the seeds and the versions in use to the record."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record[part] = facts
    record["versions"] = {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes, tokenizers)},
    }
    record["seeds"] = seeds
    path.write_text(json.dumps(record, indent=2) + "\n")


def asked_size(options: argparse.Namespace) -> Size:
    """The size of the demo, or the tiny one, trained as long and as fast as the command says."""
    size = TINY if options.tiny else FULL
    base = _given(size.base, steps=options.base_steps)
    adapter = _given(size.adapter, steps=options.steps, rate=options.rate, decay=options.decay)
    found: Size = _given(size, base=base, adapter=adapter, dialogues=options.dialogues)
    return found


def _given(facts: Any, **changes: Any) -> Any:
    return replace(facts, **{name: value for name, value in changes.items() if value is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, adapter/, holdout.jsonl")
    parser.add_argument("--stage", choices=("base", "adapter", "texts", "all"), default="all")
    parser.add_argument("--general", type=Path, help="also write prose of the base's own kind to this file")
    parser.add_argument("--base-steps", type=int)
    parser.add_argument("--dialogues", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--decay", type=float)
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to see that the tool runs")
    options = parser.parse_args()
    size = asked_size(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "training_record.json"
    seeds = {
        "torch": SEED,
        "train_dialogues": TRAIN_SEED,
        "held_out_dialogues": HOLDOUT_SEED,
        "calibration_dialogues": CALIBRATION_SEED,
    }
    if options.stage in ("base", "all"):
        update_record(path, "base", train_base(options.out / "base", size), seeds)
    if options.stage in ("adapter", "all"):
        facts = train_adapter(options.out / "base", options.out / "adapter", size)
        update_record(path, "adapter", facts, seeds)
    if options.stage != "base":
        write_texts(options.out, options.general)


if __name__ == "__main__":
    main()
