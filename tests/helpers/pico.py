"""A pico model made from a config, and a real QLoRA adapter on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import qlora_export.demo
from qlora_export.recipe.config import Recipe
from qlora_export.training import record

DEMO = Path(qlora_export.demo.__file__).parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DIALOGUE = [
    {"role": "user", "content": "Order 512 came broken."},
    {"role": "assistant", "content": "We are sorry. You get the money back."},
]
RecipeMaker = Callable[..., Recipe]


def pico_config(**changes: Any) -> transformers.LlamaConfig:
    """A Llama of 0.2 M parameters whose columns are no multiple of the NF4 block."""
    settings: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


def save_base(
    folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, shard: str = "50GB", **changes: Any
) -> Path:
    """A pico base with a tokenizer."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(pico_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, folder / name)
    return folder


def load_qlora(base: Path, storage: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The base as QLoRA training loads it, quantised with one thread."""
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = transformers.BitsAndBytesConfig(**{**settings, **changes})
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=storage, device_map={"": "cpu"}
        )
    finally:
        torch.set_num_threads(threads)


def save_adapter(base: Path, folder: Path, seed: int, size: float = 0.05, **changes: Any) -> Path:
    """A LoRA adapter of random deltas on a 4-bit base, with its sidecar."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_qlora(base), peft.LoraConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=size)
    # The card of a model takes longer to write than the model, and nobody reads it.
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(folder)
    record(model, folder)
    return folder
