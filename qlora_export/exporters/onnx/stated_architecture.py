"""What config.json states and the model builder 0.18 leaves out of its graphs, put in while it makes them.

    sliding windows     Mistral's and Phi-3's, whose configurations name no layers: the window is that of all
    rotary embeddings   Gemma 3's, which transformers 5 states by kinds of layers, the scaling that of whole ones alone;
                        SmolLM3's layers without any; linear scaling of Llamas
    norms               epsilons that have another name; weights stored one too low (Gemma, Nemotron), to which one is
                        added in float32, as transformers does; means, in OLMo's
    caches              of windows, as long as those of other layers, as every consumer of a graph can feed them
    q and k norms       as nodes of their own, which run everywhere; attention with norms inside does not run on a CPU

What is beyond it is told by `lacking`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

WINDOW, WHOLE = "sliding_attention", "full_attention"
EPSILONS = ("norm_eps", "layer_norm_eps")
OLMO_EPSILON = 1e-5
ROTARY = ("default", "linear")
ROTARY_OF = {
    "LlamaForCausalLM": ("llama3",),
    "SmolLM3ForCausalLM": ("llama3",),
    "Phi3ForCausalLM": ("longrope",),
    "HunYuanDenseV1ForCausalLM": ("dynamic",),
    "GptOssForCausalLM": ("yarn",),
}
STATEFUL = ("Lfm2", "Qwen3_5")


def lacking(architecture: str, config: Mapping[str, Any]) -> str | None:
    """What of a config.json the builder gets wrong for an architecture that it knows; None where it is right."""
    text = config.get("text_config") or config
    for kind in _rotary_kinds(text):
        if kind not in (*ROTARY, *ROTARY_OF.get(architecture, ())):
            return f"has rotary embeddings of the kind {kind}, which the model builder does not make"
    if text.get("clip_qkv") is not None:
        return "clips q, k and v, which the model builder leaves out"
    if architecture.startswith(STATEFUL):
        return "keeps states of its own beside keys and values, which no graph is fed here"
    if architecture == "PhiMoEForCausalLM":
        return "is made by the model builder for CUDA and in 4 bits alone"
    return None


def _rotary_kinds(text: Mapping[str, Any]) -> set[str]:
    stated = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = [item for item in stated.values() if isinstance(item, dict)] or [stated]
    return {str(item.get("rope_type") or item.get("type") or "default") for item in found}


def follow_config(builders: ModuleType) -> None:
    """Have the builder's classes do what configurations state; call it before any is made."""
    model_class = builders.Model
    model_class.uses_windowed_kv_cache = lambda model: False
    model_class.is_fused_qk_norm_gqa_supported = lambda model: False
    _read_config(model_class)
    _add_in_float32(model_class)
    _rotate_windows_unscaled(model_class)
    _scale_llamas(builders.LlamaModel, model_class.make_rope_init)
    _leave_unrotated(builders.SmolLM3Model)
    _subtract_means(builders.OLMoModel)


def _read_config(model_class: Any) -> None:
    usual = model_class.make_config_init

    def make_config_init(model: Any, config: Any) -> None:
        text = getattr(config, "text_config", config)
        if getattr(text, "sliding_window", None) and getattr(text, "layer_types", None) is None:
            text.layer_types = [WINDOW] * text.num_hidden_layers
        _flatten_rotary(text, config)
        usual(model, config)
        if not hasattr(config, "rms_norm_eps"):
            config.rms_norm_eps = next((getattr(text, name) for name in EPSILONS if hasattr(text, name)), OLMO_EPSILON)

    model_class.make_config_init = make_config_init


def _flatten_rotary(text: Any, config: Any) -> None:
    """Those of whole layers where they are stated by kinds, and the base of windows beside them."""
    stated = getattr(text, "rope_parameters", None)
    if isinstance(stated, dict) and stated.keys() >= {WHOLE, WINDOW}:
        config.rope_local_base_freq = stated[WINDOW]["rope_theta"]
        text.rope_parameters = dict(stated[WHOLE])


def _add_in_float32(model_class: Any) -> None:
    usual = model_class.load_weights

    def load_weights(model: Any, path: str) -> Any:
        loaded = usual(model, path)
        if model.layernorm_attrs["add_offset"]:
            for weight in loaded.parameters():
                weight.data = weight.data.float() if weight.ndim == 1 else weight.data
        return loaded

    model_class.load_weights = load_weights


def _rotate_windows_unscaled(model_class: Any) -> None:
    usual = model_class.make_rotary_embedding_caches

    def make_rotary_embedding_caches(model: Any, **options: Any) -> Any:
        if options.get("cos_cache_name") == "cos_cache_local":
            model.rope_attrs["rescale_factors"] = 1
        return usual(model, **options)

    model_class.make_rotary_embedding_caches = make_rotary_embedding_caches


def _scale_llamas(llama_class: Any, of_all: Any) -> None:
    usual = llama_class.make_rope_init

    def make_rope_init(model: Any, config: Any) -> None:
        (usual if config.rope_parameters["rope_type"] == "llama3" else of_all)(model, config)

    llama_class.make_rope_init = make_rope_init


def _leave_unrotated(smol_class: Any) -> None:
    usual = smol_class.make_attention_qk_rope

    def make_attention_qk_rope(model: Any, layer: int, **options: Any) -> tuple[str, str]:
        if not model.attention_attrs["use_rope_in_attn"]:
            return "", ""
        names: tuple[str, str] = usual(model, layer, **options)
        return names

    smol_class.make_attention_qk_rope = make_attention_qk_rope


def _subtract_means(olmo_class: Any) -> None:
    usual = olmo_class.make_layernorm

    def make_layernorm(model: Any, layer: int, norm: Any, skip: bool, simple: bool, location: str) -> None:
        del simple
        usual(model, layer, norm, skip, False, location)

    olmo_class.make_layernorm = make_layernorm
