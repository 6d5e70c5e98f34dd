"""Make the second model of the quality benchmark: a Qwen2 of 10 M weights, and a true QLoRA adapter with a small delta.

    python tools/make_quality_model.py --out DIR [--seed 41] [--stage base|chat|adapter|all] [--tiny]

It differs from the embedded demo where a rounding could care: another architecture (biases in attention, six layers,
hidden 384), another seed, another task (`quality_task`), rank 8, and a delta of 1 to 4 % of the weights instead of
8.6 %. Base: the demo's English and sheets of the task's facts, then conversations in which the task's requests are most
often answered in other words, so that a small delta is enough. DIR gets `base/`, `adapter/` with its
sidecar, `holdout.jsonl`, `calibration.jsonl`, `general.txt` (English the base has not seen) and `training_record.json`.
Some twenty minutes of one core; nothing of it is committed.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from make_demo import (
    BEGIN,
    END,
    PAD,
    VOCABULARY,
    WINDOW,
    Schedule,
    answer_loss,
    documents,
    encode_dialogues,
    fit_adapter,
    load_qlora,
    make_tokenizer,
    pretrain,
    relative_deltas,
    tidy_adapter,
    token_stream,
    update_record,
    window_nll,
)
from quality_task import chatty, conversations, sheets, write_conversations

from qlora_export.training import record

BASE_ID = "qlora-export/quality-model"
HELD_OUT_SHARE = 50


@dataclass(frozen=True)
class Size:
    """How large a model, how much text, how long a training."""

    hidden: int
    inner: int
    layers: int
    sheets: int
    texts: int | None
    base: Schedule
    chat: Schedule
    adapter: Schedule
    conversations: int
    calibration: int
    holdout: int
    judged: int


FULL = Size(
    hidden=384,
    inner=1024,
    layers=6,
    sheets=1400,
    texts=None,
    base=Schedule(360, 8, 2.5e-3, 0.1),
    chat=Schedule(120, 8, 1.5e-3, 0.1),
    adapter=Schedule(200, 8, 7e-5, 0.0),
    conversations=4000,
    calibration=160,
    holdout=280,
    judged=60,
)
TINY = Size(
    hidden=128,
    inner=256,
    layers=2,
    sheets=20,
    texts=40,
    base=Schedule(2, 2, 2e-3, 0.1),
    chat=Schedule(2, 2, 2e-3, 0.1),
    adapter=Schedule(2, 2, 1e-3, 0.0),
    conversations=20,
    calibration=4,
    holdout=4,
    judged=2,
)


def config(size: Size, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2Config:
    """Grouped-query attention with biases, heads of 64, tied embeddings."""
    heads = size.hidden // 64
    return transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=WINDOW * 2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def train_base(out: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train the base from scratch, save it in bf16, and write the English that it has not seen."""
    texts = list(islice(documents(), size.texts))
    kept = len(texts) - len(texts) // HELD_OUT_SHARE - 1
    facts = sheets(seed, size.sheets)
    tokenizer = make_tokenizer(texts + facts, out / "base")
    mixed = [*texts[:kept], *facts]
    ids = token_stream([mixed[index] for index in np.random.default_rng(seed).permutation(len(mixed))], tokenizer)
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config(size, tokenizer))
    losses = pretrain(model, ids, size.base)
    model.eval().to(torch.bfloat16).save_pretrained(out / "base")
    (out / "general.txt").write_text("\n\n".join(texts[kept:]) + "\n", encoding="utf-8")
    return {
        "corpus_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "tokens": len(ids),
        "parameters": model.num_parameters(),
        "steps": size.base.steps,
        "window": WINDOW,
        "batch": size.base.batch,
        "train_nll": float(np.mean(losses[-50:])),
        "held_out_nll": window_nll(model, token_stream(texts[kept:], tokenizer)),
    }


def train_chat(out: Path, size: Size, seed: int) -> dict[str, Any]:
    """Go on training the saved base on conversations in which the requests are mostly answered in other words."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "base")
    talks = conversations(seed + 5, size.conversations, chatty)
    ids = token_stream([tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks], tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).train()
    losses = pretrain(model, ids, size.chat)
    model.eval().to(torch.bfloat16).save_pretrained(out / "base")
    return {"tokens": len(ids), "steps": size.chat.steps, "train_nll": float(np.mean(losses[-50:]))}


def examples(
    tokenizer: transformers.PreTrainedTokenizerFast, talks: list[list[dict[str, str]]]
) -> list[tuple[list[int], int]]:
    """Every answer of the conversations with all that comes before it, as token ids and where it starts."""
    turns = [talk[: index + 1] for talk in talks for index, message in enumerate(talk) if message["role"] != "user"]
    return encode_dialogues(tokenizer, turns)


def train_adapter(out: Path, size: Size, seed: int) -> dict[str, Any]:
    """Train and save the QLoRA adapter with its sidecar."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "base")
    pad = tokenizer.pad_token_id
    held_out = examples(tokenizer, conversations(seed + 3, size.judged))
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
    )
    model = peft.get_peft_model(load_qlora(out / "base"), lora).train()
    with torch.no_grad(), model.disable_adapter():
        base_nll = answer_loss(model, held_out, pad).item()
    train = examples(tokenizer, conversations(seed + 1, size.conversations))
    losses = fit_adapter(model, train, size.adapter, pad)
    with torch.no_grad():
        tuned_nll = answer_loss(model, held_out, pad).item()
    ratios = relative_deltas(model)
    model.save_pretrained(out / "adapter")
    tidy_adapter(out / "adapter", BASE_ID)
    record(model, out / "adapter")
    return {
        "conversations": size.conversations,
        "steps": size.adapter.steps,
        "learning_rate": size.adapter.rate,
        "train_nll": float(np.mean(losses[-50:])),
        "held_out_nll_base": base_nll,
        "held_out_nll_tuned": tuned_nll,
        "relative_delta_median": float(np.median(list(ratios.values()))),
        "relative_delta": ratios,
    }


def make(out: Path, seed: int, stage: str, size: Size) -> None:
    """Make the chosen stages and the texts beside them."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "training_record.json"
    seeds = {"torch": seed, "train": seed + 1, "calibration": seed + 2, "held_out": seed + 4, "chat": seed + 5}
    if stage in ("base", "all"):
        update_record(path, "base", train_base(out, size, seed), seeds)
    if stage in ("chat", "all"):
        update_record(path, "chat", train_chat(out, size, seed), seeds)
    if stage in ("adapter", "all"):
        update_record(path, "adapter", train_adapter(out, size, seed), seeds)
        write_conversations(out / "calibration.jsonl", seed + 2, size.calibration)
        write_conversations(out / "holdout.jsonl", seed + 4, size.holdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--stage", choices=("base", "chat", "adapter", "all"), default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to see that the tool runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make(options.out, options.seed, options.stage, TINY if options.tiny else FULL)


if __name__ == "__main__":
    main()
