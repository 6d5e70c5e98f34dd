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
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes
import peft
import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from qlora_export.errors import ExportError, InputError
from qlora_export.runtimes.base import Give, See, TracedLayer
from qlora_export.runtimes.tracing import run_traced, traced_layers
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.model_config import holds_classifier
from qlora_export.types import Float32

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PAIR_HINT = "give lines without text_pair; models with token types are measured on single texts"


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
            f"{folder}: transformers cannot load it: {_first_line(error)}", "is the folder complete?"
        ) from error


def _first_line(error: Exception) -> str:
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
            f"{folder}: peft cannot load it: {_first_line(error)}", "does it belong to this base?"
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


class _Rounding(TorchFunctionMode):
    """Linear layers whose inputs, weights and outputs are rounded to a dtype, computed in float32.

    What differs from a server in that dtype is the order of its sums. A processor without units for bfloat16 would take
    some twenty times as long for the real thing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.linear:
            return func(*args, **kwargs)
        rounded = [self._round(value) for value in args]
        return self._round(func(*rounded, **{name: self._round(value) for name, value in kwargs.items()}))

    def _round(self, value: Any) -> Any:
        return value.to(self._dtype).to(value.dtype) if isinstance(value, torch.Tensor) else value


def computing(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Within it linear layers round to this dtype, if one is stated."""
    return nullcontext() if dtype is None else _Rounding(dtype)


class ModelSession:
    """A loaded causal language model; with a `dtype`, linear layers round to that one."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, in nats."""
        return self.rows_at([tokens], [range(len(tokens))])[0]

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        """Of each window the log-probabilities [places, vocabulary] of the token that follows each of these places."""
        inputs = filled(windows, self._model.device)
        with torch.no_grad(), out_of_memory(), computing(self._dtype):
            logits = self._model(**inputs, use_cache=False).logits
            chosen = [logits[row, _index(at, logits.device)] for row, at in enumerate(places)]
            del logits
            return [torch.log_softmax(rows.float(), dim=-1).cpu().numpy() for rows in chosen]

    def narrowed(self, dtype: str) -> ModelSession:
        """The same model with linear layers that round to this dtype."""
        return ModelSession(self._model, getattr(torch, dtype))

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text, by the model's generation_config.json."""
        stated = getattr(self._model, "generation_config", None) or self._model.config
        ends = stated.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def greedy(self, tokens: Sequence[int], count: int, ends: Collection[int] = ()) -> list[int]:
        """The most likely next tokens, one after the other with a cache, up to and with the first one of `ends`."""
        cache, found, inputs = None, list[int](), torch.tensor([list(tokens)], device=self._model.device)
        with torch.no_grad(), out_of_memory(), computing(self._dtype):
            while len(found) < count and not (found and found[-1] in ends):
                output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache, inputs = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
                found.append(int(inputs))
        return found

    def layers(self) -> tuple[TracedLayer, ...]:
        """The decoder blocks, and every innermost module with values of its own."""
        return traced_layers(self._model)

    def trace(self, tokens: Sequence[int], names: Sequence[str], see: See, give: Give | None = None) -> None:
        """Run a window, and `see` what these layers get and give, on the inputs that `give` has for them, if any."""
        with out_of_memory(), computing(self._dtype):
            run_traced(self._model, tokens, names, see, give)


def _index(places: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Places in a row; where they follow each other, without a copy of what stands there."""
    if len(places) and places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(list(places), device=device)


def filled(windows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> dict[str, torch.Tensor]:
    """Windows side by side, short ones filled up at their end, where no token looks."""
    longest = max(map(len, windows))
    tokens = torch.tensor([[*window, *[pad] * (longest - len(window))] for window in windows], device=device)
    if all(len(window) == longest for window in windows):
        return {"input_ids": tokens}
    lengths = torch.tensor([len(window) for window in windows], device=device)
    mask = torch.arange(longest, device=device)[None] < lengths[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long()}


@contextmanager
def out_of_memory() -> Iterator[None]:
    """What torch says where memory is short becomes a MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(_first_line(error)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryError(_first_line(error)) from None


class FolderTokenizer:
    """The tokenizer of a model folder, opened by transformers without remote code."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise what they meet, of any class
            raise InputError(
                f"{folder}: no tokenizer can be loaded: {_first_line(error)}",
                "are the tokenizer's files and config.json there, and whole?",
            ) from error
        self._folder = folder

    @property
    def begin(self) -> int | None:
        """The token that starts a text, if the model has one."""
        token: int | None = self._tokenizer.bos_token_id
        return token

    @property
    def end(self) -> int | None:
        """The token that ends a text, if the model has one."""
        token: int | None = self._tokenizer.eos_token_id
        return token

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one by itself."""
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, added ones included."""
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    def served(self, text: str) -> list[int]:
        """Token ids of a text as a server makes them, with the tokenizer's own special tokens."""
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def encode_within(self, text: str, pair: str | None, limit: int) -> tuple[list[int], bool]:
        """Token ids of a text, or of two together, as a classifier reads them, at most so many; whether they are whole.

        Raises InputError for two that the model tells apart by token types, which are not handed on.
        """
        found = self._tokenizer(text, pair, verbose=False)
        if any(found.get("token_type_ids") or ()):
            raise InputError(f"{self._folder}: its tokenizer marks the second of two texts by token types", PAIR_HINT)
        ids: list[int] = found["input_ids"]
        if len(ids) <= limit:
            return ids, True
        return self._tokenizer(text, pair, truncation=True, max_length=limit, verbose=False)["input_ids"], False

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        """A conversation by the chat template; raises InputError when there is no template."""
        if self._tokenizer.chat_template is None:
            raise InputError(f"{self._folder}: no chat template", "give plain text for drift, or add the template")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answering
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{self._folder}: the chat template refuses a chat: {error}", "see the text") from error
        return text
