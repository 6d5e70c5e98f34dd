"""What the config says was trained against what the file holds: no half of an adapter passes for a whole one.

Every target must have its tensors, and tensors of what is no target are refused: PEFT would ignore them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from qlora_export.errors import ExitCode, Problem
from qlora_export.merge.adapter_keys import AdapterTensors, ModuleTensors, factor_modules
from qlora_export.merge.match_state import MatchState
from qlora_export.merge.module_names import EXPERT

LAYER_NUMBER = r".*?\.[^.]*\.(\d+)\."
ROUTER = "gate.weight"
INCOMPLETE = "the adapter is incomplete, or was trained on another base: save it again"
IGNORED = "peft ignores it: adapter_config.json and tensors do not agree"


def match_config(state: MatchState, found: AdapterTensors, parameters: Mapping[tuple[str, int], str]) -> None:
    """Note what was targeted and has no tensors, and what has tensors and was not targeted.

    `parameters` are those of `parameter_names`.
    """
    linear = [item for item in factor_modules(found) if (item.module, item.depth) not in parameters]
    for item in linear:
        names = {item.module, state.names.live_module(item.module)}
        if state.adapter.config.get("ensure_weight_tying") and state.names.tied:
            # PEFT gives the other side of a tied pair factors of its own.
            names |= {str(state.names.embedding)} if state.names.head in names else set()
            names |= {str(state.names.head)} if state.names.embedding in names else set()
        if state.adapter.config.get("target_modules") and not any(_targeted(state, name) for name in names):
            state.problem(f"tensor {_first(item)} belongs to no module that the config targets", IGNORED)
    missing = [*_without_factors(state, linear), *_without_parameters(state, found)]
    missing += [*_unsaved(state, found), *_without_biases(state, linear, found), *_without_tokens(state, found)]
    if missing:
        message = f"{state.adapter.weights}: {len(missing)} targeted modules have no tensors, the first is {missing[0]}"
        state.problems.append(Problem(ExitCode.BAD_INPUT, message, INCOMPLETE))


def parameter_names(state: MatchState, found: AdapterTensors) -> dict[tuple[str, int], str]:
    """The parameter of every module wrapped by target_parameters; PEFT nests them in the module's own order."""
    targets = state.adapter.config.get("target_parameters") or []
    names: dict[tuple[str, int], str] = {}
    for item in factor_modules(found) if targets else ():
        matched = _matched_parameters(state, state.names.architecture.module(item.module))
        if item.depth < len(matched):
            names[item.module, item.depth] = matched[len(matched) - 1 - item.depth]
    return names


def _matched_parameters(state: MatchState, live: str) -> list[str]:
    """The parameters of a module that target_parameters names."""
    targets = state.adapter.config.get("target_parameters") or []
    order = state.names.architecture.order.get(live, ())
    return [last for last in order if any(f".{live}.{last}".endswith(f".{target}") for target in targets)]


def _first(item: ModuleTensors) -> str:
    return next(iter(item.parts.values())).spec.name


def _targeted(state: MatchState, module: str) -> bool:
    """PEFT's rule: target_modules without exclude_modules, in the layers of layers_to_transform."""
    config = state.adapter.config
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    if (targets != "all-linear" and not _named(targets, module)) or _named(excluded, module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or module in targets:
        return True
    stated = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([stated] if isinstance(stated, str) else stated)]
    found = [match for pattern in patterns or [LAYER_NUMBER] if (match := re.match(pattern, module)) is not None]
    return bool(found) and int(found[0][1]) in ([layers] if isinstance(layers, int) else layers)


def _named(targets: str | list[str], module: str) -> bool:
    """A regular expression that matches all of the name, or a list of endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _without_factors(state: MatchState, linear: list[ModuleTensors]) -> Iterator[str]:
    """Targeted matrices without factors; experts that are packed in the live model are targeted as parameters."""
    targets = state.adapter.config.get("target_modules") or []
    adapted = {state.names.live_module(item.module) for item in linear}
    candidates = state.names.live_linear if targets == "all-linear" else state.names.live_matrices
    unpacked = any(EXPERT.search(module) for module in adapted)
    saved = state.adapter.config.get("modules_to_save") or []
    for module in candidates if targets else ():
        skipped = module in adapted or any(_is_in(module, name) for name in saved)
        if not skipped and (unpacked or not EXPERT.search(module)) and _targeted(state, module):
            yield module


def _without_parameters(state: MatchState, found: AdapterTensors) -> Iterator[str]:
    """Parameters that target_parameters names without factors."""
    targets = state.adapter.config.get("target_parameters") or []
    if not targets:
        return
    depths: dict[str, set[int]] = {}
    for item in factor_modules(found):
        depths.setdefault(state.names.architecture.module(item.module), set()).add(item.depth)
    named = [f"{live}.{last}" for live in state.names.architecture.order for last in _matched_parameters(state, live)]
    for target in targets:
        # peft itself writes the router in for `all-linear`, whether the model has one of that name or not.
        if target != ROUTER and not any(f".{name}".endswith(f".{target}") for name in named):
            yield f"{target} (target_parameters)"
    for live in dict.fromkeys(name.rpartition(".")[0] for name in named):
        matched = _matched_parameters(state, live)
        for depth in range(len(matched)):
            if depth not in depths.get(live, set()):
                yield f"{live}.{matched[len(matched) - 1 - depth]} (target_parameters)"


def _unsaved(state: MatchState, found: AdapterTensors) -> Iterator[str]:
    """Parameters of modules that modules_to_save names, and a classifier's head, that were not saved."""
    there = {*found.whole, *(f"{item.module}.weight" for item in found.modules if "base_layer.weight" in item.parts)}
    there = {_live(state, name) for name in there}
    saved = state.adapter.config.get("modules_to_save") or []
    for name in state.names.live_parameters if saved else ():
        module = name.rpartition(".")[0]
        if name not in there and any(_is_in(module, target) for target in saved):
            yield f"{module} (modules_to_save)"
    if state.adapter.classifier:
        head = {name for name in state.names.architecture.parameters if name not in state.names.architecture.places}
        untied = {name for name in head if name not in state.names.architecture.tied}
        yield from (f"{name}, the classifier's head" for name in sorted(untied - there))


def _live(state: MatchState, parameter: str) -> str:
    module, _, last = parameter.rpartition(".")
    return f"{state.names.live_module(module)}.{last}"


def _is_in(module: str, target: str) -> bool:
    """Whether a module is the target, or lies in a module whose name ends with it."""
    return f".{module}.".find(f".{target}.") >= 0


def _without_biases(state: MatchState, linear: list[ModuleTensors], found: AdapterTensors) -> Iterator[str]:
    """Biases that `bias` and `lora_bias` say were trained."""
    config = state.adapter.config
    if config.get("lora_bias"):
        yield from (f"{item.module} (lora_B.bias)" for item in linear if "lora_B.bias" not in item.parts)
    trained = {_live(state, name) for name in found.whole if name.endswith(".bias")}
    trained |= {_live(state, f"{item.module}.bias") for item in found.modules if "base_layer.bias" in item.parts}
    expected: list[str] = []
    if config.get("bias") == "all":
        expected = [name for name in state.names.live_parameters if name.endswith(".bias") and _is_vector(state, name)]
    elif config.get("bias") == "lora_only":
        adapted = {f"{state.names.live_module(item.module)}.bias" for item in linear}
        expected = [name for name in state.names.live_parameters if name in adapted]
    yield from (f"{name} (bias)" for name in expected if name not in trained)


def _is_vector(state: MatchState, parameter: str) -> bool:
    """Whether a stored `bias` is one; the attention masks that old checkpoints hold are called so too."""
    shape = state.stored_shape(parameter)
    return shape is not None and len(shape) == 1


def _without_tokens(state: MatchState, found: AdapterTensors) -> Iterator[str]:
    """Modules whose rows trainable_token_indices says were trained; a tied head has those of its embedding."""
    stated = state.adapter.config.get("trainable_token_indices")
    there = [item.module for item in found.modules if "token_adapter.trainable_tokens_delta" in item.parts]
    if stated and not there:
        yield f"{state.names.embedding} (trainable_token_indices)"
    for key in stated if isinstance(stated, dict) else ():
        head = state.names.tied and f".{state.names.head}".endswith(f".{key}")
        if not head and not any(f".{module}".endswith(f".{key}") for module in there):
            yield f"{key} (trainable_token_indices)"
