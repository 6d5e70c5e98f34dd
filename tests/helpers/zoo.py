"""Pico models of many architectures, adapters of many kinds on them, and what PEFT itself makes of each pair."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file

TOKENS = [3, 41, 17, 9, 5, 62, 23, 17, 88, 5]
TRAINED_TOKENS = [3, 5, 17]
LABELS = 3

Logits = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A maker of a pico base, and the names that adapters need on it.

    A block-diagonal adapter splits LoRA A of the targets in ``outputs`` and LoRA B of the other targets.
    """

    make: Callable[[], transformers.PreTrainedModel]
    targets: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    tied: bool = False
    biased: tuple[str, ...] = ()
    task: str = "CAUSAL_LM"
    auto: Any = transformers.AutoModelForCausalLM


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a kind of adapter changes in a plain LoRA configuration, and what it needs an architecture to have."""

    changes: Callable[[Architecture], dict[str, Any]]
    needs: str = "targets"
    save_embedding_layers: bool = False

    def config(self, architecture: Architecture) -> peft.LoraConfig:
        """The configuration for one architecture."""
        settings: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": list(architecture.targets),
            "task_type": architecture.task,
        }
        return peft.LoraConfig(**{**settings, **self.changes(architecture)})


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Logits of the live adapter, and the checkpoint that PEFT merges it into."""

    logits: Logits
    tensors: dict[str, torch.Tensor]


DECODER: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {
    **DECODER,
    "hidden_size": 48,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {**DECODER, "hidden_size": 48, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**DECODER, hidden_size=48, vocab_size=211, tie_word_embeddings=False)
    )


def _mistral() -> transformers.PreTrainedModel:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**DECODER, hidden_size=40, vocab_size=131, tie_word_embeddings=False)
    )


def _qwen2() -> transformers.PreTrainedModel:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**DECODER, hidden_size=56, vocab_size=151, tie_word_embeddings=False)
    )


def _qwen3() -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**DECODER, hidden_size=48, head_dim=16, vocab_size=173, tie_word_embeddings=True)
    )


def _gemma2() -> transformers.PreTrainedModel:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GEMMA, vocab_size=199))


def _gemma3() -> transformers.PreTrainedModel:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA, vocab_size=199))


def _gemma3_multimodal() -> transformers.PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config={**GEMMA, "vocab_size": 199},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=195,
        eoi_token_index=196,
        image_token_index=197,
        tie_word_embeddings=True,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _phi3() -> transformers.PreTrainedModel:
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**DECODER, hidden_size=48, vocab_size=157, tie_word_embeddings=False)
    )


def _gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=48, n_inner=88, n_layer=2, n_head=4, n_positions=64, vocab_size=139, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _gpt_neox() -> transformers.PreTrainedModel:
    settings = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**settings, hidden_size=48, vocab_size=149, tie_word_embeddings=False)
    )


def _falcon() -> transformers.PreTrainedModel:
    config = transformers.FalconConfig(
        hidden_size=48,
        ffn_hidden_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        bias=True,
        vocab_size=163,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.FalconForCausalLM(config)


def _opt() -> transformers.PreTrainedModel:
    config = transformers.OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        vocab_size=167,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.OPTForCausalLM(config)


def _mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4, vocab_size=181))


def _qwen3_moe() -> transformers.PreTrainedModel:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**MOE, head_dim=16, moe_intermediate_size=40, num_experts=4, vocab_size=193)
    )


ATTENTION = ("q_proj", "v_proj", "o_proj")
GATED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
GATED_OUTPUTS = ("o_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, GATED, GATED_OUTPUTS),
    "mistral": Architecture(_mistral, GATED, GATED_OUTPUTS),
    "qwen2": Architecture(_qwen2, GATED, GATED_OUTPUTS, biased=("q_proj", "v_proj")),
    "qwen3": Architecture(_qwen3, GATED, GATED_OUTPUTS, tied=True),
    "gemma2": Architecture(_gemma2, GATED, GATED_OUTPUTS, tied=True),
    "gemma3": Architecture(_gemma3, GATED, GATED_OUTPUTS, tied=True),
    "phi3": Architecture(_phi3, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), GATED_OUTPUTS),
    "gpt2": Architecture(
        _gpt2,
        ("c_attn", "c_fc", "c_proj"),
        ("c_proj",),
        embedding="wte",
        tied=True,
        biased=("c_attn", "c_fc", "c_proj"),
    ),
    "gpt_neox": Architecture(
        _gpt_neox,
        ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        ("dense_4h_to_h",),
        embedding="embed_in",
        biased=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "falcon": Architecture(
        _falcon,
        ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        ("dense_4h_to_h",),
        embedding="word_embeddings",
        tied=True,
        biased=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Architecture(
        _opt,
        ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("out_proj", "fc2"),
        tied=True,
        biased=("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "mixtral": Architecture(_mixtral, ATTENTION, ("o_proj",), parameters=EXPERTS),
    "qwen3_moe": Architecture(_qwen3_moe, ATTENTION, ("o_proj",), parameters=EXPERTS),
    "gemma3_multimodal": Architecture(
        _gemma3_multimodal, GATED, GATED_OUTPUTS, tied=True, auto=transformers.AutoModelForImageTextToText
    ),
    "llama_classifier": Architecture(
        _llama,
        GATED,
        GATED_OUTPUTS,
        head="score",
        task="SEQ_CLS",
        auto=transformers.AutoModelForSequenceClassification,
    ),
}


def _patterns(architecture: Architecture) -> dict[str, Any]:
    first, last = architecture.targets[0], architecture.targets[-1]
    return {"rank_pattern": {first: 6, rf".*\.1\..*{last}": 2}, "alpha_pattern": {last: 3, rf".*\.0\..*{first}": 5}}


def _embedding(architecture: Architecture) -> dict[str, Any]:
    return {"target_modules": [*architecture.targets, architecture.embedding]}


def _block_diagonal(architecture: Architecture) -> dict[str, Any]:
    others = [target for target in architecture.targets if target not in architecture.outputs]
    config = peft.BdLoraConfig(
        target_modules_bd_a=list(architecture.outputs), target_modules_bd_b=others, nblocks=2, match_strict=True
    )
    return {"use_bdlora": config}


VARIANTS: dict[str, Variant] = {
    "lora": Variant(lambda _: {}),
    "rslora": Variant(lambda _: {"use_rslora": True}),
    "patterns": Variant(_patterns),
    "dora": Variant(lambda _: {"use_dora": True}),
    "dora_rslora": Variant(lambda _: {"use_dora": True, "use_rslora": True}),
    "lora_bias": Variant(lambda base: {"lora_bias": True, "target_modules": list(base.biased)}, needs="biased"),
    "bias_all": Variant(lambda _: {"bias": "all"}, needs="biased"),
    "bias_lora_only": Variant(lambda _: {"bias": "lora_only"}, needs="biased"),
    "embedding": Variant(_embedding),
    "embedding_dora": Variant(lambda base: {**_embedding(base), "use_dora": True}),
    "embedding_tied": Variant(lambda base: {**_embedding(base), "ensure_weight_tying": True}, needs="tied"),
    "embedding_layers": Variant(lambda _: {}, save_embedding_layers=True),
    "head": Variant(lambda base: {"target_modules": [*base.targets, base.head]}),
    "modules_to_save": Variant(lambda base: {"modules_to_save": [base.head]}),
    "modules_to_save_embedding": Variant(lambda base: {"modules_to_save": [base.embedding]}),
    "modules_to_save_tied": Variant(
        lambda base: {"modules_to_save": [base.embedding], "ensure_weight_tying": True}, needs="tied"
    ),
    "trainable_tokens": Variant(lambda _: {"trainable_token_indices": TRAINED_TOKENS}),
    "parameters": Variant(
        lambda base: {"target_modules": [], "target_parameters": list(base.parameters)}, needs="parameters"
    ),
    "parameters_rslora": Variant(
        lambda base: {"target_parameters": list(base.parameters), "use_rslora": True}, needs="parameters"
    ),
    "bdlora": Variant(_block_diagonal),
    "all_linear": Variant(lambda _: {"target_modules": "all-linear"}),
    "layers": Variant(lambda _: {"layers_to_transform": [1]}),
    "regex": Variant(lambda base: {"target_modules": rf"(?!.*vision).*\.0\..*\.({'|'.join(base.targets)})"}),
}

TIED = [name for name, architecture in ARCHITECTURES.items() if architecture.tied]
_TOO_FAR = "the merge writes into the tied weight: embedding and head both change, of which live one does"
_TWICE = "embedding and head each merge their delta into the one tied weight (and peft ties only embed_tokens)"
PEFT_IS_WRONG: dict[tuple[str, str], str] = {
    (name, variant): reason
    for variant, reason in {
        "embedding": _TOO_FAR,
        "embedding_dora": _TOO_FAR,
        "head": _TOO_FAR,
        "embedding_tied": _TWICE,
    }.items()
    for name in TIED
}
NO_CELL: dict[tuple[str, str], str] = {
    ("gpt2", "bdlora"): "a block-diagonal adapter asks the base layer for out_features, which Conv1D has not",
    ("llama_classifier", "head"): "a classifier's head is always in modules_to_save, so this is no more than `lora`",
}
CELLS: list[tuple[str, str]] = [
    (name, variant)
    for name, architecture in ARCHITECTURES.items()
    for variant, kind in VARIANTS.items()
    if getattr(architecture, kind.needs) and (name, variant) not in {**PEFT_IS_WRONG, **NO_CELL}
]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, load reports and warnings of the libraries."""
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _load(folder: Path, architecture: str) -> Any:
    entry = ARCHITECTURES[architecture]
    settings = {"num_labels": LABELS, "pad_token_id": 0} if entry.task == "SEQ_CLS" else {}
    return entry.auto.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def _logits(model: Any, tokens: list[int]) -> Logits:
    with torch.no_grad():
        values: Logits = model(input_ids=torch.tensor([tokens])).logits.float().numpy()
    return values


def save_architecture(name: str, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A pico base of random weights, biases and norms, written as transformers writes it."""
    torch.manual_seed(seed)
    with _quiet(), torch.no_grad():
        model = ARCHITECTURES[name].make()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(5)
        model.to(dtype).save_pretrained(folder)
    return folder


def _randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.normal_(std=0.08)
        elif "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        elif "lora_" not in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def save_variant(base: Path, architecture: str, variant: str, folder: Path, seed: int) -> Path:
    """An adapter on a base, none of whose trained tensors is a no-op."""
    entry, kind = ARCHITECTURES[architecture], VARIANTS[variant]
    torch.manual_seed(seed)
    with _quiet(), torch.no_grad():
        model = peft.get_peft_model(_load(base, architecture), kind.config(entry))
        # Its card is a template that is compiled anew each time.
        model.create_or_update_model_card = lambda folder: None
        _randomise(model)
        if kind.save_embedding_layers:
            layers = (model.get_input_embeddings(), model.get_output_embeddings())
            for weight in dict.fromkeys(layer.weight for layer in layers if layer is not None):
                weight.add_(torch.randn_like(weight), alpha=0.1)
        model.save_pretrained(folder, save_embedding_layers=True if kind.save_embedding_layers else "auto")
    return folder


def oracle(base: Path, adapter: Path, architecture: str, tokens: list[int]) -> Oracle:
    """What PEFT computes from a base and an adapter in float32, live and merged."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        model = peft.PeftModel.from_pretrained(_load(base, architecture), adapter).eval()
        logits = _logits(model, tokens)
        model.merge_and_unload(safe_merge=True).save_pretrained(folder)
        tensors: dict[str, torch.Tensor] = {}
        for path in Path(folder).glob("*.safetensors"):
            tensors.update(load_file(path))
    return Oracle(logits, tensors)


def reload_logits(folder: Path, architecture: str, tokens: list[int]) -> Logits:
    """Logits of a merged model as transformers loads it in float32."""
    with _quiet():
        return _logits(_load(folder, architecture), tokens)
