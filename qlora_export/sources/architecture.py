"""What transformers makes of a checkpoint: which parameter of the live model holds which stored tensor.

The model is built from config.json without memory for its weights, and the stored names go through transformers' own
conversion mapping. Packed experts are stored one tensor each in most checkpoints; a window says which rows of which
expert a stored tensor is. Cost: importing transformers, seconds; so it is asked only when names alone do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from qlora_export.errors import InputError, Refused
from qlora_export.sources.checkpoint import Checkpoint

CLASSIFIER_HEADS = ("score", "classifier")
EXPERT_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Window:
    """Rows `first` to `first + count` of one expert of a packed parameter [experts, out, in]."""

    expert: int
    first: int
    count: int


@dataclass(frozen=True)
class StoredPlace:
    """A stored tensor that holds a parameter, or the window of it."""

    tensor: str
    window: Window | None = None


@dataclass(frozen=True)
class Architecture:
    """A live model's names; modules and parameters carry the names that adapters know them by.

    `places` has an entry for each parameter whose values lie in stored tensors, `rearranged` names the operation for
    those that transformers computes from them. `linear` are the modules that bitsandbytes quantises, `tied` maps a
    parameter to the one whose values it shares, `order` lists the parameters of a module itself.
    """

    parameters: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[StoredPlace, ...]]
    rearranged: Mapping[str, str]
    modules: AbstractSet[str]
    linear: AbstractSet[str]
    order: Mapping[str, tuple[str, ...]]
    input_major: AbstractSet[str]
    embedding: str | None
    head: str | None
    tied: Mapping[str, str]
    renamings: Any

    def module(self, name: str) -> str:
        """The live name of a module that an adapter of an older transformers may call otherwise."""
        if name in self.modules:
            return name
        renamed = str(self.renamings(f"{name}.weight")).removesuffix(".weight")
        return renamed if renamed in self.modules else name


def read_architecture(checkpoint: Checkpoint, classifier: bool, modules: Iterable[str] = ()) -> Architecture:
    """The architecture in the class that knows the most of these modules; raises InputError or Refused."""
    wanted = tuple(modules)
    config = live_config(checkpoint)
    found = [_read(checkpoint, config, name) for name in _class_names(checkpoint, classifier)]
    return max(found, key=lambda one: sum(one.module(name) in one.modules for name in wanted))


def _class_names(checkpoint: Checkpoint, classifier: bool) -> list[str]:
    """The classes that an adapter may have been trained in, the likeliest first."""
    if classifier:
        return ["AutoModelForSequenceClassification"]
    stated = checkpoint.config.get("architectures") or []
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: architectures is {stated!r}, expected names", "restore config.json"
        )
    return [*stated[:1], "AutoModelForCausalLM"]


def live_config(checkpoint: Checkpoint) -> Any:
    """A checkpoint's configuration in transformers, without its quantisation; raises InputError for unknown models."""
    import transformers

    folder = checkpoint.folder
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{folder}/config.json: transformers does not know this model: {first}",
            "is the folder complete, and the model one that transformers has without remote code?",
        ) from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _read(checkpoint: Checkpoint, config: Any, class_name: str) -> Architecture:
    import torch
    from transformers.pytorch_utils import Conv1D

    model = _empty_model(checkpoint, config, class_name)
    places, rearranged, rename = _places(checkpoint, model)
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    dense = {name.removesuffix(".weight") for pair in tied.items() for name in pair} | {names.get(id(head))}
    return Architecture(
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        places=places,
        rearranged=rearranged,
        modules=frozenset(modules),
        linear=frozenset(
            name
            for name, module in modules.items()
            if type(module) in (torch.nn.Linear, Conv1D)
            and name not in dense
            and name.split(".")[-1] not in CLASSIFIER_HEADS
        ),
        order={
            name: tuple(key for key, _ in module.named_parameters(recurse=False)) for name, module in modules.items()
        },
        input_major=frozenset(name for name, module in modules.items() if getattr(module, "is_transposed", False)),
        embedding=names.get(id(embedding)),
        head=names.get(id(head)) if head is not None else None,
        tied=tied,
        renamings=rename,
    )


def _empty_model(checkpoint: Checkpoint, config: Any, class_name: str) -> Any:
    """The model without memory for its weights; raises Refused when transformers cannot build it."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name, None) or transformers.AutoModelForCausalLM
    build = getattr(model_class, "from_config", None) or model_class
    try:
        with torch.device("meta"):
            return build(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(
            f"{checkpoint.folder}: transformers cannot build {class_name} from its config.json: {first}",
            "only models that transformers knows as a causal language model or a classifier can be merged",
        ) from None


def _places(checkpoint: Checkpoint, model: Any) -> tuple[Any, dict[str, str], Any]:
    """Homes and rearranged parameters by transformers' own conversion, and its renaming of a single name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> str:
        return str(rename_source_key(name, renamings, [], prefix, parameters)[0])

    single: dict[str, tuple[StoredPlace, ...]] = {}
    gathered: dict[str, dict[str, list[str]]] = {}
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    for name in sorted(checkpoint.weights, key=dot_natural_key):
        live, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if live not in parameters and name in parameters:
            live, pattern = rename_source_key(name, [], [], prefix, parameters)
        if pattern is None:
            single[live] = (StoredPlace(name),)
        else:
            gathered.setdefault(live, {}).setdefault(pattern, []).append(name)
    rearranged = {}
    for live, sources in gathered.items():
        entry = by_pattern[next(iter(sources))]
        operations = [type(operation).__name__ for operation in entry.operations]
        packed = operations == ["MergeModulelist"] or (
            operations == ["MergeModulelist", "Concatenate"] and entry.operations[1].dim == 1
        )
        if packed and live in parameters:
            patterns = [sources.get(key, []) for key in entry.source_patterns]
            single[live] = tuple(_expert_places(checkpoint, live, parameters[live].shape[0], patterns))
        else:
            rearranged[live] = " and ".join(operations)
    return single, rearranged, rename


def _expert_places(checkpoint: Checkpoint, live: str, experts: int, patterns: list[list[str]]) -> Iterable[StoredPlace]:
    """Homes of a packed parameter: experts in order, the patterns one below the other in each expert."""
    first = 0
    for names in patterns:
        numbers = [int(EXPERT_NUMBER.findall(name)[-1]) for name in names if EXPERT_NUMBER.search(name)]
        if numbers != list(range(experts)):
            raise InputError(
                f"{checkpoint.folder}: {live} has {experts} experts, the stored ones are {numbers}",
                "the base is incomplete: fetch it again",
            )
        rows = checkpoint.weights[names[0]].spec.shape[0]
        for expert, name in enumerate(names):
            yield StoredPlace(name, Window(expert, first, rows))
        first += rows
