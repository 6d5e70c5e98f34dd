"""Every adapter tensor finds its home in the base, or is listed as a problem; nothing is dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qlora_export.errors import ExitCode, ExportError, Problem
from qlora_export.merge.adapter_keys import NESTED, PREFIX, AdapterTensors, ModuleTensors, factor_modules, sort_tensors
from qlora_export.merge.changes import AddedVector, Change, Experts, LowRank, Magnitude, ReplacedRows
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.names import Names, names_of
from qlora_export.merge.targets import CLASSIFIER_HEADS, untouched_problems
from qlora_export.merge.tying import settle_model
from qlora_export.sources.adapter import CONFIG_NAME, Adapter
from qlora_export.sources.architecture import Home
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor

OTHER_BASE = "was the adapter trained on another base?"
SAVE_AGAIN = "save the adapter again"


@dataclass(frozen=True)
class Match:
    """The merged model, the names it was found by, and everything that does not fit."""

    model: MergedModel
    names: Names
    problems: tuple[Problem, ...]


@dataclass
class Draft:
    """What has found its home so far, by the live name of the parameter."""

    adapter: Adapter
    names: Names
    changes: dict[str, list[Change]] = field(default_factory=dict)
    stored_changes: dict[str, list[Change]] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, hint: str = OTHER_BASE) -> None:
        """Note what does not fit."""
        self.problems.append(Problem(ExitCode.BAD_INPUT, f"{self.adapter.weights}: {message}", hint))

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape [out, in] of a parameter that is stored in one tensor, or of its replacement."""
        if parameter in self.replaced:
            return self.replaced[parameter].spec.shape
        homes = self.names.parameter(parameter)
        if len(homes) != 1 or homes[0].window is not None:
            return None
        shape = self.names.checkpoint.weights[homes[0].tensor].spec.shape
        return shape[::-1] if homes[0].tensor in self.names.input_major else shape


def match_adapter(adapter: Adapter, checkpoint: Checkpoint) -> Match:
    """Match an adapter with its base by names and headers; raises InputError or Refused for an unknown model."""
    found = sort_tensors(adapter.tensors)
    modules = [item.module for item in found.modules] + list(adapter.training.modules)
    names = names_of(checkpoint, adapter.classifier, [*(f"{module}.weight" for module in modules), *found.whole])
    draft = Draft(adapter, names)
    try:
        _match_all(draft, found)
        if not draft.problems:
            model = settle_model(draft.names, adapter, draft.changes, draft.stored_changes, draft.replaced)
            return Match(model, names, ())
    except ExportError as error:
        draft.problems.append(Problem.of(error))
    return Match(MergedModel({}), names, tuple(draft.problems))


def _match_all(draft: Draft, found: AdapterTensors) -> None:
    for tensor in found.doubled:
        draft.problem(f"tensor {tensor.spec.name} is there twice under two spellings", SAVE_AGAIN)
    for tensor in draft.adapter.tensors.values():
        if tensor.spec.dtype not in FLOATS:
            draft.problem(f"tensor {tensor.spec.name} has dtype {tensor.spec.dtype}", "16 and 32-bit floats are merged")
    if draft.problems:
        return
    _match_whole(draft, found)
    for item in found.modules:
        for part in ("base_layer.weight", "base_layer.bias"):
            if (copy := item.part(part)) is not None:
                _replace(draft, f"{item.module}.{part.removeprefix('base_layer.')}", copy)
    parameters = _parameter_names(draft, found)
    for item in found.modules:
        if item.part("lora_embedding_A") is not None or item.part("lora_embedding_B") is not None:
            _match_embedding(draft, item)
        elif (item.module, item.depth) in parameters:
            _match_parameter(draft, item, parameters[item.module, item.depth])
        elif any(part.startswith("lora_") for part in item.parts):
            _match_linear(draft, item)
        if (rows := item.part("token_adapter.trainable_tokens_delta")) is not None:
            _match_tokens(draft, item.module, rows)
    if not found.modules and not found.whole:
        draft.problem("no tensor at all", SAVE_AGAIN)
    if not draft.problems:
        draft.problems += untouched_problems(draft.adapter, draft.names, found)


def _match_whole(draft: Draft, found: AdapterTensors) -> None:
    for name, tensor in found.whole.items():
        _replace(draft, name, tensor)


def _replace(draft: Draft, parameter: str, tensor: StoredTensor) -> None:
    """A tensor that was saved whole takes the place of the base's; a classifier's head may be new."""
    module = parameter.rpartition(".")[0]
    new_head = draft.adapter.classifier and module.split(".")[-1] in CLASSIFIER_HEADS
    untied_head = draft.names.tied and module == draft.names.head and parameter.endswith(".weight")
    if parameter in draft.replaced:
        draft.problem(f"tensor {tensor.spec.name} is there twice under two spellings", SAVE_AGAIN)
        return
    homes = draft.names.parameter(parameter)
    if not (homes or new_head or untied_head):
        why = "it is no LoRA tensor of a known module, and the base has no tensor of this name"
        draft.problem(f"tensor {tensor.spec.name} has no home", why)
        return
    expected = draft.shape(parameter)
    if untied_head and not homes:
        expected = draft.shape(f"{draft.names.embedding}.weight")
    vocabulary = module in (draft.names.embedding, draft.names.head)
    found = tensor.spec.shape
    if expected is not None and (found[1:] if vocabulary else found) != (expected[1:] if vocabulary else expected):
        draft.problem(f"tensor {tensor.spec.name} is {list(found)}, the base has {list(expected)}")
        return
    draft.replaced[parameter] = tensor


def _parameter_names(draft: Draft, found: AdapterTensors) -> dict[tuple[str, int], str]:
    """The parameter of every module wrapped by target_parameters; PEFT nests them in the module's own order."""
    targets = draft.adapter.config.get("target_parameters") or []
    names: dict[tuple[str, int], str] = {}
    if not targets:
        return names
    architecture = draft.names.architecture
    for item in factor_modules(found):
        live = architecture.module(item.module)
        matched = [
            last
            for last in architecture.order.get(live, ())
            if any(f".{live}.{last}".endswith(f".{target}") for target in targets)
        ]
        if item.depth < len(matched):
            names[item.module, item.depth] = matched[len(matched) - 1 - item.depth]
    return names


def _pair(draft: Draft, item: ModuleTensors, kind: str) -> tuple[StoredTensor, StoredTensor] | None:
    """Both factors, or None when one is missing, which is noted."""
    suffix = "" if kind == "lora_embedding_" else ".weight"
    a, b = item.part(f"{kind}A{suffix}"), item.part(f"{kind}B{suffix}")
    name = f"{PREFIX}{item.module}{NESTED * item.depth}"
    if a is None or b is None:
        missing = "A" if a is None else "B"
        draft.problem(f"tensor {name}.{kind}{missing}{suffix} is missing, its partner is there", SAVE_AGAIN)
        return None
    scale = draft.adapter.scale(item.module)
    if scale == 0 or not math.isfinite(scale):
        draft.problem(
            f"the scale of {item.module} is {scale:g}, so the delta is lost", "see lora_alpha in adapter_config.json"
        )
        return None
    return a, b


def _fits(draft: Draft, tensor: StoredTensor, needed: tuple[int, ...]) -> bool:
    if tensor.spec.shape != needed:
        draft.problem(f"tensor {tensor.spec.name} is {list(tensor.spec.shape)}, the base and r need {list(needed)}")
        return False
    return True


def _match_linear(draft: Draft, item: ModuleTensors) -> None:
    pair = _pair(draft, item, "lora_")
    if pair is None:
        return
    a, b = pair
    parameter, name = f"{item.module}.weight", f"{PREFIX}{item.module}{NESTED * item.depth}"
    shape = draft.shape(parameter)
    if shape is None and item.module == draft.names.head and draft.names.tied:
        shape = draft.shape(f"{draft.names.embedding}.weight")
    if shape is None:
        _no_home(draft, a, parameter)
        return
    if len(shape) != 2 or len(a.spec.shape) != 2 or len(b.spec.shape) != 2 or item.depth:
        draft.problem(f"tensor {name}.lora_A.weight meets {list(shape)}, expected matrices")
        return
    rank, blocks = draft.adapter.rank(item.module), draft.adapter.diagonal_blocks(item.module)
    if rank % max(blocks) or shape[1] % blocks[0] or shape[0] % blocks[1]:
        draft.problem(f"{max(blocks)} blocks do not divide rank {rank} and {list(shape)} of {item.module}")
        return
    if not (_fits(draft, a, (rank, shape[1] // blocks[0])) and _fits(draft, b, (shape[0], rank // blocks[1]))):
        return
    changes: list[Change] = [LowRank(a, b, draft.adapter.scale(item.module), blocks)]
    if (magnitude := item.part("lora_magnitude_vector")) is not None and _fits(draft, magnitude, (shape[0],)):
        changes.append(Magnitude(magnitude))
    _require_magnitude(draft, item)
    draft.changes.setdefault(parameter, []).extend(changes)
    if (bias := item.part("lora_B.bias")) is not None:
        _match_bias(draft, item, bias, shape[0])


def _match_bias(draft: Draft, item: ModuleTensors, bias: StoredTensor, rows: int) -> None:
    if draft.shape(f"{item.module}.bias") is None:
        draft.problem(
            f"tensor {bias.spec.name} is a trained bias, the base has no {item.module}.bias to add it to",
            "train without lora_bias on layers that have no bias",
        )
    elif _fits(draft, bias, (rows,)):
        change = AddedVector(bias, draft.adapter.scale(item.module))
        draft.changes.setdefault(f"{item.module}.bias", []).append(change)


def _require_magnitude(draft: Draft, item: ModuleTensors) -> None:
    stated, there = bool(draft.adapter.config.get("use_dora")), item.part("lora_magnitude_vector") is not None
    if stated != there:
        what = "is missing, use_dora is set" if stated else "is there, use_dora is not set"
        draft.problem(
            f"tensor {PREFIX}{item.module}.lora_magnitude_vector {what}", f"{CONFIG_NAME} and tensors do not agree"
        )


def _match_embedding(draft: Draft, item: ModuleTensors) -> None:
    pair = _pair(draft, item, "lora_embedding_")
    if pair is None:
        return
    a, b = pair
    shape = draft.shape(f"{item.module}.weight")
    if shape is None or len(shape) != 2:
        _no_home(draft, a, f"{item.module}.weight")
        return
    rank = draft.adapter.rank(item.module)
    if not (_fits(draft, a, (rank, shape[0])) and _fits(draft, b, (shape[1], rank))):
        return
    changes: list[Change] = [LowRank(a, b, draft.adapter.scale(item.module), embedding=True)]
    if (magnitude := item.part("lora_magnitude_vector")) is not None and _fits(draft, magnitude, (shape[1],)):
        changes.append(Magnitude(magnitude, columns=True))
    _require_magnitude(draft, item)
    draft.changes.setdefault(f"{item.module}.weight", []).extend(changes)


def _match_tokens(draft: Draft, module: str, rows: StoredTensor) -> None:
    stated = draft.adapter.config.get("trainable_token_indices") or []
    indices: Sequence[int] = (
        next((found for key, found in stated.items() if f".{module}".endswith(f".{key}")), [])
        if isinstance(stated, dict)
        else stated
    )
    shape = draft.shape(f"{module}.weight")
    if shape is None and draft.names.tied and module == draft.names.head:
        shape = draft.shape(f"{draft.names.embedding}.weight")
    if shape is None or len(shape) != 2:
        _no_home(draft, rows, f"{module}.weight")
        return
    if not _fits(draft, rows, (len(indices), shape[1])):
        return
    if any(not 0 <= index < shape[0] for index in indices):
        draft.problem(f"tensor {rows.spec.name} changes row {max(indices)}, the embedding has {shape[0]}")
        return
    draft.changes.setdefault(f"{module}.weight", []).append(ReplacedRows(rows, tuple(indices)))


def _match_parameter(draft: Draft, item: ModuleTensors, last: str) -> None:
    """Factors of a parameter [experts, out, in], packed in the file or unpacked, or of a matrix."""
    live = draft.names.architecture.module(item.module)
    parameter = f"{live}.{last}"
    homes = draft.names.parameter(parameter)
    pair = _pair(draft, item, "lora_")
    if pair is None:
        return
    if not homes:
        _no_home(draft, pair[0], parameter)
        return
    rank, scale = draft.adapter.rank(parameter), draft.adapter.scale(parameter)
    input_major = live in draft.names.architecture.input_major
    shape = _packed_shape(draft, homes)
    experts, (rows, columns) = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
    if input_major and len(shape) == 3:
        rows, columns = columns, rows
    if not (_fits(draft, pair[0], (rank * experts, columns)) and _fits(draft, pair[1], (rows, rank * experts))):
        return
    for home in homes:
        lay = Experts(experts, input_major and len(shape) == 3, home.window)
        draft.stored_changes.setdefault(home.tensor, []).append(LowRank(*pair, scale, experts=lay))


def _packed_shape(draft: Draft, homes: Iterable[Home]) -> tuple[int, ...]:
    """The shape of a parameter, [experts, out, in] where it is stored expert by expert."""
    listed = list(homes)
    shape = draft.names.checkpoint.weights[listed[0].tensor].spec.shape
    windows = [home.window for home in listed if home.window is not None]
    if not windows:
        return shape
    return (
        max(window.expert for window in windows) + 1,
        max(window.first + window.count for window in windows),
        shape[-1],
    )


def _no_home(draft: Draft, tensor: StoredTensor, parameter: str) -> None:
    name, hint = tensor.spec.name, OTHER_BASE
    if not draft.names.direct:
        module, _, last = parameter.rpartition(".")
        live = f"{draft.names.architecture.module(module)}.{last}"
        if (operation := draft.names.architecture.rearranged.get(live)) is not None:
            hint = f"transformers makes it by {operation} while it loads, which cannot be merged through yet"
        elif len(draft.names.parameter(parameter)) > 1:
            hint = "it is stored in several tensors; adapt it through target_parameters"
    draft.problem(f"tensor {name} has no home: the base has no {parameter}", hint)
