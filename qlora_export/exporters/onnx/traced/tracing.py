"""The process that traces: `python -m qlora_export.exporters.onnx.traced.tracing FOLDER DTYPE`.

transformers makes the model of FOLDER's config.json. Its weights have no memory of their own, one zero stands for all
values of each, and `torch.onnx.export(dynamo=True)` follows what is computed with them, batch, tokens and cached tokens
left open. Weights must not be seen by what folds constants, which would take the zeros for values: until the graph is
optimised they are inputs of it, and inputs they are when it is written.

    FOLDER/traced.onnx    the graph: token ids, mask, perhaps positions, pasts and weights; logits and presents
    FOLDER/traced.json    the weights by name and whether they are declared [in, out], and what ONNX Runtime GenAI is to
                          know of a decoder

Cost: no memory for weights, seconds for each layer.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_export.exporters.onnx.traced.genai_config import genai_config
from qlora_export.exporters.onnx.traced.tidying import tidy
from qlora_export.exporters.onnx.traced.tracer import FACTS_NAME, GRAPH_NAME
from qlora_export.sources.model_config import is_classifier

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Of the example that is traced; none is 1 or another's, so that none is taken for a constant or for another.
BATCH, TOKENS, PAST = 2, 3, 5
INPUTS = ["input_ids", "attention_mask", "position_ids"]
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class NotTraceable(Exception):
    """What this architecture has that a graph of this kind has not."""


class Decoder(torch.nn.Module):  # type: ignore[misc]
    """A model as its graph takes it: plain tensors in, logits and the grown cache out."""

    def __init__(self, model: Any, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = takes_positions

    def forward(self, tokens: Any, mask: Any, positions: Any, past: Sequence[tuple[Any, Any]]) -> tuple[Any, ...]:
        """Logits, and key and value of each layer."""
        cache = transformers.DynamicCache()
        for number, (key, value) in enumerate(past):
            cache.update(key, value, number)
        stated = {"position_ids": positions} if self._takes_positions else {}
        found = self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **stated)
        return found.logits, *(kept for layer in found.past_key_values.layers for kept in (layer.keys, layer.values))


class Classifier(torch.nn.Module):  # type: ignore[misc]
    """A sequence classifier: the logits of each text's labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Any, mask: Any) -> Any:
        """Logits [batch, labels]."""
        stated = {"use_cache": False} if "use_cache" in _parameters(self.model) else {}
        return self.model(input_ids=tokens, attention_mask=mask, **stated).logits


def main(folder: Path, dtype: str) -> None:
    """Write the graph and its facts; ends with a line of what stands in the way."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        _require_no_experts(config)
        model = _without_weights(config, DTYPES[dtype])
        if is_classifier({"architectures": config.architectures}):
            program, caches = _classifier(model), []
        else:
            caches = _caches(config)
            program = _decoder(model, caches, DTYPES[dtype])
    except NotTraceable as error:
        sys.exit(str(error))
    except Exception as error:  # noqa: BLE001 - torch raises whatever the model's own code does
        sys.exit(f"torch.onnx.export cannot follow it: {_root(error)}")
    weights = tidy(program, [f"model.{name}" for name in model.state_dict()])
    program.save(folder / GRAPH_NAME)
    inputs = [name for name in INPUTS if any(value.name == name for value in program.model.graph.inputs)]
    settings = genai_config(config, folder, caches[0], inputs) if caches else None
    facts = {"weights": weights, "genai_config": settings}
    (folder / FACTS_NAME).write_text(json.dumps(facts), encoding="utf-8")


def _require_no_experts(config: Any) -> None:
    """Raise for experts, which transformers multiplies in one grouped product that ONNX has not."""
    text = config.get_text_config()
    for name in EXPERTS:
        if (getattr(text, name, None) or 0) > 1:
            raise NotTraceable(f"its {getattr(text, name)} experts have no product in ONNX")


def _build(config: Any, dtype: torch.dtype) -> Any:
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is None:
        raise NotTraceable(f"transformers has no {config.architectures[0]}")
    return model_class._from_config(config, dtype=dtype).eval()


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model with one zero for the values of each parameter; its buffers are computed."""
    import accelerate

    with accelerate.init_empty_weights(include_buffers=False):
        model = _build(config, dtype)
    stand_ins: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            known = stand_ins.setdefault(id(parameter), torch.nn.Parameter(zero, requires_grad=False))
            module.register_parameter(name, known)
    model.tie_weights()
    return model


def _caches(config: Any) -> list[tuple[int, int]]:
    """Heads and head size of each layer's keys and values."""
    with FakeTensorMode(), torch.no_grad():
        model = _build(config, torch.float32)
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", None) or []
    shapes = [_cache(layer) for layer in layers]
    if not shapes or None in shapes:
        raise NotTraceable("its cache is not a key and a value for each token of every layer")
    if len(set(shapes)) > 1:
        raise NotTraceable(f"its layers have caches of different sizes, {sorted(set(shapes), key=str)}")
    return [shape for shape in shapes if shape is not None]


def _cache(layer: Any) -> tuple[int, int] | None:
    keys, values = (tuple(getattr(getattr(layer, name, None), "shape", ())) for name in ("keys", "values"))
    if keys != values or len(keys) != 4 or keys[2] != TOKENS:
        return None
    return keys[1], keys[3]


def _decoder(model: Any, caches: Sequence[tuple[int, int]], dtype: torch.dtype) -> Any:
    takes_positions = "position_ids" in _parameters(model)
    tokens = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64)
    positions = torch.arange(PAST, PAST + TOKENS).expand(BATCH, -1) if takes_positions else None
    past = [tuple(torch.zeros(BATCH, heads, PAST, size, dtype=dtype) for _ in range(2)) for heads, size in caches]
    places = [f"{number}.{kind}" for number in range(len(caches)) for kind in ("key", "value")]
    names = INPUTS if takes_positions else INPUTS[:2]
    cached = {0: "batch_size", 2: "past_sequence_length"}
    sizes = {
        "tokens": {0: "batch_size", 1: "sequence_length"},
        "mask": {0: "batch_size", 1: "total_sequence_length"},
        "positions": {0: "batch_size", 1: "sequence_length"} if takes_positions else None,
        "past": [(cached, cached) for _ in caches],
    }
    return _exported(
        Decoder(model, takes_positions),
        (tokens, mask, positions, past),
        sizes,
        [*names, *(f"past_key_values.{place}" for place in places)],
        ["logits", *(f"present.{place}" for place in places)],
    )


def _classifier(model: Any) -> Any:
    if model.config.pad_token_id is None:
        raise NotTraceable(
            "config.json states no pad_token_id, by which a classifier finds where a text ends: add that of training"
        )
    tokens, mask = torch.ones(BATCH, TOKENS, dtype=torch.int64), torch.ones(BATCH, TOKENS, dtype=torch.int64)
    text = {0: "batch_size", 1: "sequence_length"}
    sizes = {"tokens": text, "mask": text}
    return _exported(Classifier(model), (tokens, mask), sizes, INPUTS[:2], ["logits"])


def _exported(
    model: Any, example: tuple[Any, ...], sizes: Mapping[str, Any], inputs: list[str], outputs: list[str]
) -> Any:
    # What torch says of its own parts is nobody's here.
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=sizes,
            input_names=inputs,
            output_names=outputs,
        )


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def _root(error: BaseException) -> str:
    """The first line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
