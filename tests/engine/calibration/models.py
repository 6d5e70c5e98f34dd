"""Two-layer models of many families whose rows hold whole groups, and adapters on them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.load import make_recipe

VOCABULARY = 96
LENGTHS = (13, 9, 9, 8, 5, 2, 1)
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {
    **DECODER,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
GPT2 = {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": True}
MOE = {"num_experts_per_tok": 2, "head_dim": 16}
GATED = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[Any, list[str]]] = {
    "llama": (transformers.LlamaConfig(**DECODER), GATED),
    "mistral": (transformers.MistralConfig(**DECODER, sliding_window=4), GATED),
    "qwen2": (transformers.Qwen2Config(**DECODER), GATED),
    "qwen3": (transformers.Qwen3Config(**{**DECODER, "tie_word_embeddings": True}, head_dim=16), GATED),
    "gemma2": (transformers.Gemma2Config(**GEMMA), GATED),
    "gemma3_text": (transformers.Gemma3TextConfig(**GEMMA), GATED),
    "phi3": (transformers.Phi3Config(**DECODER), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": (transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2), ["c_attn", "c_fc", "c_proj"]),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**{key: DECODER[key] for key in DECODER if key != "num_key_value_heads"}),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "opt": (
        transformers.OPTConfig(
            **{key: DECODER[key] for key in DECODER if key not in ("num_key_value_heads", "intermediate_size")}, **OPT
        ),
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "mixtral": (transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2), GATED[:3]),
    "qwen3_moe": (transformers.Qwen3MoeConfig(**DECODER, **MOE, moe_intermediate_size=64, num_experts=4), GATED[:3]),
}


def save_family(name: str, folder: Path) -> tuple[Path, Path]:
    """A bf16 base of a family and a LoRA adapter on it: random weights, biases, norms and deltas."""
    config, targets = FAMILIES[name]
    base, adapter = folder / "base", folder / "adapter"
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(len(name))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(5)
        model.to(torch.bfloat16).save_pretrained(base)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
        adapted.save_pretrained(adapter)
    return base, adapter


def live_model(base: Path, adapter: Path) -> Any:
    """The merged model as PEFT makes it, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).eval()


def plan_of(base: Path, adapter: Path | None, out: Path, /, *artifacts: Any, **changes: Any) -> Plan:
    """The plan of a recipe, trained on 16-bit weights where nothing else is said."""
    training = None if adapter is None else "none"
    data = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "training_quantization": training,
        "artifacts": list(artifacts),
        "calibration": {"text": "calibration.txt"},
        **changes,
    }
    return make_plan(make_recipe({key: value for key, value in data.items() if value is not None}, Path(), "test"), out)


def windows_of(count: int, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> CalibrationTokens:
    """Windows of random tokens and many lengths."""
    generator = np.random.default_rng(seed)
    windows = [tuple(generator.integers(3, VOCABULARY, lengths[row % len(lengths)]).tolist()) for row in range(count)]
    return CalibrationTokens(tuple(windows), (), ())
