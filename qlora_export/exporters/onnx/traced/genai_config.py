"""`genai_config.json` of a traced decoder, as the model builder writes it for its own graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.exporters.onnx.graph import GRAPH_NAME

# ONNX Runtime GenAI runs every decoder of its list of names by the same class; what it does not list it refuses.
DECODER_TYPE = "llama"
USUAL_CONTEXT_TOKENS = 2048
SEARCHED = {
    "do_sample": False, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
    "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def genai_config(config: Any, folder: Path, cache: tuple[int, int], inputs: list[str]) -> dict[str, Any]:
    """What a runtime must know of a graph, from the model's configuration; `cache` is heads and head size."""
    stated = _generation(folder)
    context = getattr(config, "max_position_embeddings", None) or USUAL_CONTEXT_TOKENS
    tokens = {name: stated.get(name, getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id")}
    padding = stated.get("pad_token_id", getattr(config, "pad_token_id", None))
    end = tokens["eos_token_id"]
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "pad_token_id": padding if padding is not None else end[0] if isinstance(end, list) else end or 0,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH_NAME,
                "head_size": cache[1],
                "hidden_size": config.hidden_size,
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": cache[0],
            },
            "type": DECODER_TYPE,
            "vocab_size": config.vocab_size,
        },
        "search": {
            **{name: _known(stated.get(name), usual) for name, usual in SEARCHED.items()},
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "past_present_share_buffer": False,
        },
    }


def _generation(folder: Path) -> Mapping[str, Any]:
    """What generation_config.json states, if it is there."""
    import transformers

    if not (folder / "generation_config.json").is_file():
        return {}
    stated = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True).to_diff_dict()
    return {name: value for name, value in stated.items() if value is not None}


def _known(value: Any, usual: Any) -> Any:
    return usual if value is None else value
