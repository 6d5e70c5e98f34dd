"""Every adapter tensor finds its home in the base, or is listed as a problem; nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.errors import ExportError, Problem
from qlora_export.merge.adapter_keys import AdapterTensors, sort_tensors
from qlora_export.merge.lora_factors import match_embedding, match_linear, match_parameter, match_tokens
from qlora_export.merge.match_state import DISAGREE, SAVE_AGAIN, MatchState
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.module_names import Names, names_of
from qlora_export.merge.target_modules import match_config, parameter_names
from qlora_export.merge.tied_embeddings import finish_model
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import same_values


@dataclass(frozen=True)
class Match:
    """The merged model, the names it was found by, and everything that does not fit."""

    model: MergedModel
    names: Names
    problems: tuple[Problem, ...]


def match_adapter(adapter: Adapter, checkpoint: Checkpoint) -> Match:
    """Match an adapter with its base by names and headers; what is wrong is in the match's problems."""
    found = sort_tensors(adapter.tensors)
    modules = [item.module for item in found.modules] + list(adapter.training.modules)
    names = names_of(checkpoint, adapter.classifier, [*(f"{module}.weight" for module in modules), *found.whole])
    state = MatchState(adapter, names)
    try:
        _match_all(state, found)
        if not state.problems:
            model = finish_model(state)
            _require_all_used(state, found, model)
            if not state.problems:
                return Match(model, names, ())
    except ExportError as error:
        state.problems.append(Problem.of(error))
    return Match(MergedModel({}), names, tuple(state.problems))


def _match_all(state: MatchState, found: AdapterTensors) -> None:
    if not found.modules and not found.whole:
        state.problem("no tensor at all", SAVE_AGAIN)
    for tensor in state.adapter.tensors.values():
        if tensor.spec.dtype not in FLOATS:
            state.problem(f"tensor {tensor.spec.name} has dtype {tensor.spec.dtype}", "16 and 32-bit floats are merged")
    if state.problems:
        return
    _finish_doubles(state, found)
    for name, tensor in found.whole.items():
        _replace(state, name, tensor)
    for item in found.modules:
        for part in ("base_layer.weight", "base_layer.bias"):
            if (copy := item.part(part)) is not None:
                _replace(state, f"{item.module}.{part.removeprefix('base_layer.')}", copy)
    parameters = parameter_names(state, found)
    for item in found.modules:
        if item.part("lora_embedding_A") is not None or item.part("lora_embedding_B") is not None:
            match_embedding(state, item)
        elif (item.module, item.depth) in parameters:
            match_parameter(state, item, parameters[item.module, item.depth])
        elif any(part.startswith("lora_") for part in item.parts):
            match_linear(state, item)
        if (rows := item.part("token_adapter.trainable_tokens_delta")) is not None:
            match_tokens(state, item.module, rows)
    if not state.problems:
        match_config(state, found, parameters)


def _finish_doubles(state: MatchState, found: AdapterTensors) -> None:
    """Two tensors of one name may be copies of each other; two spellings of one module may not be."""
    for first, second in found.doubled:
        if same_values(first, second):
            state.account(first)
        else:
            state.twice(second)
    live: dict[tuple[str, int], str] = {}
    for item in found.modules:
        key = (state.names.live_module(item.module), item.depth)
        if key in live:
            state.problem(f"{live[key]} and {item.module} are two names of one module", SAVE_AGAIN)
        live[key] = item.module


def _require_all_used(state: MatchState, found: AdapterTensors, model: MergedModel) -> None:
    """Note every tensor that has no part in the merged model."""
    used = {id(tensor) for output in model.outputs.values() for change in output.changes for tensor in change.tensors}
    used |= {id(tensor) for output in model.outputs.values() for tensor in output.source.stored}
    for tensor in [*found.whole.values(), *(tensor for item in found.modules for tensor in item.parts.values())]:
        if id(tensor) not in used and tensor.spec.name not in state.accounted:
            state.problem(f"tensor {tensor.spec.name} has no home: nothing in the merged model uses it", DISAGREE)


def _replace(state: MatchState, parameter: str, tensor: StoredTensor) -> None:
    """A tensor that was saved whole takes the place of the base's; a classifier's head may be new."""
    names = state.names
    module = parameter.rpartition(".")[0]
    if parameter in state.replaced:
        if same_values(state.replaced[parameter], tensor):
            state.account(tensor)
        else:
            state.twice(tensor)
        return
    places = names.parameter(parameter)
    expected = state.stored_shape(parameter)
    untied_head = names.tied and parameter == f"{names.head}.weight"
    labels = state.adapter.classifier and module.split(".")[-1] in CLASSIFIER_HEADS
    vocabulary = labels or (module in (names.embedding, names.head) and parameter.endswith(".weight"))
    if len(places) > 1 or (places and places[0].window is not None):
        message = f"tensor {tensor.spec.name} was saved whole, the base stores it in {len(places)} tensors"
        state.problem(message, "experts that were trained whole cannot be merged yet; adapt them by target_parameters")
        return
    if expected is None and untied_head:
        expected = state.stored_shape(f"{names.embedding}.weight")
    if expected is None and names.classifier and module in names.architecture.modules:
        # The number of labels is the adapter's, the width the model's.
        expected, vocabulary = names.architecture.parameters.get(parameter), True
    if expected is None:
        why = "it is no LoRA tensor of a known module, and the base has no tensor of this name"
        state.problem(f"tensor {tensor.spec.name} has no home", why)
        return
    found = tensor.spec.shape
    if len(found) != len(expected) or (found[1:] != expected[1:] if vocabulary else found != expected) or 0 in found:
        state.problem(f"tensor {tensor.spec.name} is {list(found)}, the base has {list(expected)}")
        return
    state.replaced[parameter] = tensor
