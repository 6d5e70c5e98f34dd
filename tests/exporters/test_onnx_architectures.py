"""Architectures with windows, norms and rotary embeddings of their own, by the real builder, against torch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qlora_export.drift.onnx.artifacts import validated
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.exporters.onnx.graphs import is_built
from qlora_export.exporters.onnx.stated_architecture import follow_config, lacking
from qlora_export.pipeline.options import untracked
from tests.exporters.test_onnx_integers import decoded, in_graph, make
from tests.helpers.pico import DEMO, TOKENIZER_FILES

IDS = tuple(np.random.default_rng(3).integers(5, 2000, 101).tolist())
TOKENS = TokenSet((Window(IDS, tuple(range(1, 101)), "", 0),), Protocol("test", "as the test says", 101))
SHAPES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 24,
}  # fmt: skip
ROTARY = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
Make = Callable[[], transformers.PreTrainedModel]


def gemma3() -> transformers.PreTrainedModel:
    config = {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ROTARY}
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SHAPES, **config, query_pre_attn_scalar=16, tie_word_embeddings=True)
    )


def smollm3() -> transformers.PreTrainedModel:
    shapes = {key: value for key, value in SHAPES.items() if key != "head_dim"}
    return transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**shapes, no_rope_layers=[1, 0], use_sliding_window=True)
    )


def phi3() -> transformers.PreTrainedModel:
    shapes = {key: value for key, value in SHAPES.items() if key != "head_dim"}
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**shapes, original_max_position_embeddings=512, tie_word_embeddings=False)
    )


def save(model: Make, folder: Path) -> Path:
    """A base in bf16 with weights that matter, norms too, and a tokenizer."""
    torch.manual_seed(7)
    made = model()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(5)
    made.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("model", "form", "most"), [(gemma3, "onnx-fp16", 1e-5), (smollm3, "onnx-fp32", 1e-9)], ids=["gemma3", "smollm3"]
)
def test_the_graph_computes_what_torch_computes(tmp_path: Path, model: Make, form: str, most: float) -> None:
    """In every way, on windows of text that are longer than those of attention."""
    _, made = make(save(model, tmp_path / "base"), tmp_path / "out", {"format": "bf16"}, {"format": form})
    found = validated(made, TOKENS, untracked)
    assert found is not None
    assert found.breaches == ()
    assert all(way.from_source is not None and way.from_source.mean_kl < most for way in found.ways)


def test_rows_of_fused_weights_reach_the_graph_unchanged(tmp_path: Path) -> None:
    """q, k, v and gate, up are one weight each in Phi-3, and are cut apart by the builder."""
    packed = {"format": "w4a16", "rounding": "nearest", "options": {"group_size": 32}}
    exported = {"format": "onnx-int4", "rounding": "nearest", "options": {"accuracy_level": 1}}
    source, made = make(save(phi3, tmp_path / "base"), tmp_path / "out", packed, exported)
    stored = Counter(row.tobytes() for weight in decoded(source, packed).values() for row in weight)
    assert stored == Counter(row.tobytes() for weight in in_graph(made.path).values() for row in weight)
    found = validated(made, TOKENS, untracked)
    assert found is not None
    assert found.breaches == ()
    assert found.ways[0].from_source is not None
    assert found.ways[0].from_source.mean_kl < 1e-4


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "llama3"}}, None),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic"}}, "of the kind dynamic"),
        ("Qwen3ForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of the kind yarn"),
        ("GptOssForCausalLM", {"rope_parameters": {"rope_type": "yarn"}}, None),
        ("Gemma3ForCausalLM", {"rope_parameters": ROTARY}, None),
        ("Gemma3ForConditionalGeneration", {"text_config": {"rope_scaling": {"type": "su"}}}, "of the kind su"),
        ("OlmoForCausalLM", {"clip_qkv": None}, None),
        ("OlmoForCausalLM", {"clip_qkv": 8.0}, "clips q, k and v"),
        ("Lfm2ForCausalLM", {}, "keeps states of its own"),
        ("PhiMoEForCausalLM", {}, "for CUDA and in 4 bits"),
    ],
)
def test_what_the_builder_gets_wrong_is_told_and_not_built(architecture: str, config: Any, says: str | None) -> None:
    found = lacking(architecture, config)
    assert found is None if says is None else says in str(found)
    assert is_built({"architectures": [architecture], **config}) is (says is None)


def test_windows_of_all_layers_and_epsilons_of_other_names_are_read() -> None:
    """What a configuration says of layers stays; what it leaves open is what transformers does."""

    class Model:
        def make_config_init(self, config: Any) -> None:
            assert config is not None

        def load_weights(self, path: str) -> Any: ...
        def make_rope_init(self, config: Any) -> None: ...
        def make_rotary_embedding_caches(self, **options: Any) -> None: ...
        def make_attention_qk_rope(self, layer: int) -> None: ...
        def make_layernorm(self, *options: Any) -> None: ...

    class Other(Model): ...

    follow_config(SimpleNamespace(Model=Model, LlamaModel=Other, SmolLM3Model=Other, OLMoModel=Other))  # type: ignore[arg-type]
    config = SimpleNamespace(sliding_window=4, num_hidden_layers=2, norm_eps=1e-3)
    Model().make_config_init(config)
    assert config.layer_types == ["sliding_attention"] * 2
    assert config.rms_norm_eps == 1e-3
    stated = SimpleNamespace(sliding_window=4, layer_types=["full_attention"], rms_norm_eps=1e-6, norm_eps=1e-3)
    Model().make_config_init(stated)
    assert (stated.layer_types, stated.rms_norm_eps) == (["full_attention"], 1e-6)
