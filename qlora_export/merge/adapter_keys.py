"""What the tensors of an adapter are, by their names: the factors of a module, or a tensor saved whole.

    base_model.model.MODULE.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector
    base_model.model.MODULE.lora_embedding_A, .lora_embedding_B
    base_model.model.MODULE.token_adapter.trainable_tokens_delta
    base_model.model.MODULE.base_layer.weight           a saved copy of the weight under the factors
    base_model.model.MODULE[.base_layer ...].lora_A.weight   nested, for parameters of one module (target_parameters)
    base_model.model.NAME                               trained biases, modules_to_save, resized embeddings

Older spellings carry the adapter's name (`lora_A.default.weight`), a wrapper's (`modules_to_save.default`,
`_fsdp_wrapped_module`, `_orig_mod`), or `.weight` after the magnitude. Source: PEFT's checkpoint format document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qlora_export.tensors.header import StoredTensor

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)\.default(?=\.|$)"
)
# What peft saves for training alone: samplers of MonteCLoRA, the buffer of VeLoRA, the original beside a saved module.
TRAINING_ONLY = re.compile(r".+\.(lora_monteclora_sampler\..+|lora_velora_embed(\..+)?|original_module\..+)")
SAVED_MODULE = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|base_layer\.weight|base_layer\.bias)"
)
NESTED = ".base_layer"
TOKENS = ".token_adapter"


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module by part; `depth` counts the wrappers between it and the outermost."""

    module: str
    depth: int
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)

    def part(self, name: str) -> StoredTensor | None:
        """A part, or None."""
        return self.parts.get(name)


@dataclass(frozen=True)
class AdapterTensors:
    """All tensors of an adapter: by module, saved whole by their name in the model, and pairs of one name."""

    modules: tuple[ModuleTensors, ...]
    whole: Mapping[str, StoredTensor]
    doubled: tuple[tuple[StoredTensor, StoredTensor], ...]


def sort_tensors(tensors: Mapping[str, StoredTensor]) -> AdapterTensors:
    """Sort an adapter's tensors by what their names say."""
    modules: dict[tuple[str, int], dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    doubled = []
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if TRAINING_ONLY.fullmatch(plain):
            continue
        found = PART.fullmatch(plain)
        if found is None:
            place, key = whole, plain
        else:
            module, depth = _unnested(found["module"])
            place, key = modules.setdefault((module.removesuffix(TOKENS), depth), {}), found["part"]
        if key in place:
            doubled.append((place[key], tensor))
        place[key] = tensor
    sorted_modules = tuple(ModuleTensors(module, depth, parts) for (module, depth), parts in modules.items())
    return AdapterTensors(sorted_modules, whole, tuple(doubled))


def plain_name(name: str) -> str:
    """A tensor's name as PEFT writes it today, without its prefix."""
    name = WRAPPERS.sub("", name).removeprefix(PREFIX)
    name = ADAPTER_NAME.sub(r".\1", name)
    name = SAVED_MODULE.sub("", name)
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _unnested(module: str) -> tuple[str, int]:
    depth = 0
    while module.endswith(NESTED):
        module, depth = module.removesuffix(NESTED), depth + 1
    return module, depth


def factor_modules(found: AdapterTensors) -> Iterator[ModuleTensors]:
    """The modules that have low-rank factors, or only one of them."""
    for item in found.modules:
        if any(part.startswith("lora_") for part in item.parts):
            yield item
