"""Loading models with transformers, quietly, and computing with exactly the weights that were meant.

bitsandbytes' Linear4bit computes in its compute dtype, and on CPUs with AVX512-BF16 it repacks the weights in eval mode
and computes with bf16 absmax, which shifts logits by some 1e-3. `pin_weights` makes every Linear4bit multiply in
float32 with the very values that a model sees: decoded in float32, then rounded as stated.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes
import peft
import torch
import transformers
from safetensors import SafetensorError

from qlora_export.errors import ExportError, InputError
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.model_config import holds_classifier

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(folder: Path, new_labels: int | None = None, **options: Any) -> Any:
    """`from_pretrained` of the folder's kind on the CPU, without output; raises InputError when it does not load.

    With `new_labels` it is a classifier of so many, whose head an adapter will bring.
    """
    auto = auto_class(folder)
    if new_labels is not None:
        auto = transformers.AutoModelForSequenceClassification
        options["num_labels"] = new_labels
    # What is turned aside are bars of compressed-tensors, which nothing else turns off.
    with quietly_loading(folder), redirect_stderr(io.StringIO()):
        model, loaded = auto.from_pretrained(
            folder,
            device_map={"": "cpu"},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    require_stored(folder, model, loaded, CLASSIFIER_HEADS if new_labels is not None else ())
    return model.eval()


def auto_class(folder: Path) -> Any:
    """The class of transformers that opens a folder: a classifier's, or a language model's."""
    if holds_classifier(folder):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def require_stored(folder: Path, model: Any, loaded: Mapping[str, Any], to_come: Collection[str] = ()) -> None:
    """Raise InputError for weights that the folder lacks, in whose place transformers puts random numbers.

    Modules of the names `to_come` are brought by others.
    """
    missing = {name for name, _ in model.named_parameters()} & set(loaded["missing_keys"])
    missing = {name for name in missing if name.split(".")[-2] not in to_come}
    if missing:
        first = min(missing)
        raise InputError(f"{folder}: has no {first}, {len(missing)} weights are missing", "is the folder complete?")


@contextmanager
def quietly_loading(folder: Path) -> Iterator[None]:
    """Without bars and warnings of transformers; whatever it says of the folder becomes an InputError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (ExportError, MemoryError):
        raise
    except Exception as error:  # what a damaged config.json or weight file raises has no class in common
        raise InputError(
            f"{folder}: transformers cannot load it: {first_line(error)}", "is the folder complete?"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says in a line; a first line that ends in a colon goes on with the next."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]


def decompress(model: Any) -> None:
    """Decode what compressed-tensors holds now, in the model's dtype, as its first call would; others stay as they are.

    Layers go on to round their activations, where the folder says so.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        with redirect_stderr(io.StringIO()):
            compressor.decompress_model(model)


def placed(model: Any, device: str) -> Any:
    """The loaded model on a device of torch; on `cuda` with several GPUs its blocks are spread over them."""
    if device == "cpu":
        return model
    if device != "cuda" or torch.cuda.device_count() < 2:
        return model.to(device)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = list(whole._no_split_modules or ())
    memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=blocks)
    devices = accelerate.infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    return accelerate.dispatch_model(model, devices)


def attach_adapter(model: Any, folder: Path) -> Any:
    """The model with a live peft adapter; raises InputError when peft cannot load it."""
    try:
        with warnings.catch_warnings():
            # transformers 5.23 deprecates a property that peft 0.21 still asks for.
            warnings.simplefilter("ignore", FutureWarning)
            # peft 0.21 rewrites the patterns of packed experts, and no longer knows them when it loads them.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            return peft.PeftModel.from_pretrained(model, folder, local_files_only=True).eval()
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: peft cannot load it: {first_line(error)}", "does it belong to this base?"
        ) from error


def widen_dense(model: Any) -> None:
    """Cast every parameter that is not quantised to float32, in place; no value changes."""
    for parameter in model.parameters():
        if not isinstance(parameter, bitsandbytes.nn.Params4bit) and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def decoded_weight(layer: Any, roundings: Sequence[torch.dtype]) -> torch.Tensor:
    """The float32 weight of a linear layer, decoded from 4 or 8 bits if need be and rounded to each dtype in turn."""
    weight = layer.weight.data
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight, scales)
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        # Decoded as one row: bitsandbytes 0.50 on AVX512 takes the wrong absmax when a row ends inside a block.
        flat = copy.copy(state)
        flat.dtype, flat.shape = torch.float32, torch.Size((1, state.shape.numel()))
        weight = bitsandbytes.functional.dequantize_4bit(weight, flat).reshape(state.shape)
        for dtype in roundings:
            weight = weight.to(dtype)
    return weight.float()


def pin_weights(model: Any, roundings: Sequence[torch.dtype] | None = None) -> None:
    """Make quantised layers multiply in float32 with decoded weights; 4-bit ones rounded to their compute dtype."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.forward = partial(_forward, module, ())
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            chosen = roundings if roundings is not None else [module.compute_dtype or torch.float32]
            module.forward = partial(_forward, module, tuple(chosen))


def _forward(layer: Any, roundings: Sequence[torch.dtype], inputs: torch.Tensor) -> torch.Tensor:
    bias = layer.bias.float() if layer.bias is not None else None
    return torch.nn.functional.linear(inputs.float(), decoded_weight(layer, roundings), bias)
