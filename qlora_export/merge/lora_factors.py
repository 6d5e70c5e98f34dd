"""The tensors of one module become changes of the tensors that its weight is stored in, if they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_export.merge.adapter_keys import NESTED, PREFIX, ModuleTensors
from qlora_export.merge.changes import AddedVector, Change, Experts, LowRank, Magnitude, ReplacedRows
from qlora_export.merge.match_state import DISAGREE, OTHER_BASE, SAVE_AGAIN, MatchState
from qlora_export.merge.module_names import EMBEDDING_LIKE
from qlora_export.sources.adapter import CONFIG_NAME
from qlora_export.sources.architecture import StoredPlace
from qlora_export.tensors.header import StoredTensor

Pair = tuple[StoredTensor, StoredTensor]


def match_linear(state: MatchState, item: ModuleTensors) -> None:
    """Factors of a linear layer, with magnitude and bias."""
    pair = _pair(state, item, "lora_", item.module)
    if pair is None:
        return
    a, b = pair
    parameter, name = f"{item.module}.weight", f"{PREFIX}{item.module}{NESTED * item.depth}"
    shape = state.shape(parameter)
    if shape is None:
        _unmatched(state, a, parameter)
        return
    if len(shape) != 2 or item.depth or EMBEDDING_LIKE.search(item.module):
        state.problem(f"tensor {name}.lora_A.weight meets {list(shape)}, expected the matrix of a linear layer")
        return
    rank, blocks = state.adapter.rank(item.module), state.adapter.diagonal_blocks(item.module)
    if rank % max(blocks) or shape[1] % blocks[0] or shape[0] % blocks[1]:
        state.problem(f"{max(blocks)} blocks do not divide rank {rank} and {list(shape)} of {item.module}")
        return
    if not (state.fits(a, (rank, shape[1] // blocks[0])) and state.fits(b, (shape[0], rank // blocks[1]))):
        return
    changes: list[Change] = [LowRank(a, b, state.adapter.scale(item.module), blocks)]
    if (magnitude := item.part("lora_magnitude_vector")) is not None and state.fits(magnitude, (shape[0],)):
        changes.append(Magnitude(magnitude))
    _require_magnitude(state, item)
    state.changes.setdefault(parameter, []).extend(changes)
    if (bias := item.part("lora_B.bias")) is not None:
        _match_bias(state, item, bias, shape[0])


def _match_bias(state: MatchState, item: ModuleTensors, bias: StoredTensor, rows: int) -> None:
    if state.shape(f"{item.module}.bias") is None:
        state.problem(
            f"tensor {bias.spec.name} is a trained bias, the base has no {item.module}.bias to add it to",
            "train without lora_bias on layers that have no bias",
        )
    elif state.fits(bias, (rows,)):
        change = AddedVector(bias, state.adapter.scale(item.module))
        state.changes.setdefault(f"{item.module}.bias", []).append(change)


def _require_magnitude(state: MatchState, item: ModuleTensors) -> None:
    stated, there = bool(state.adapter.config.get("use_dora")), item.part("lora_magnitude_vector") is not None
    if stated != there:
        what = "is missing, use_dora is set" if stated else "is there, use_dora is not set"
        state.problem(f"tensor {PREFIX}{item.module}.lora_magnitude_vector {what}", DISAGREE)


def match_embedding(state: MatchState, item: ModuleTensors) -> None:
    """Factors of an embedding, with magnitude."""
    pair = _pair(state, item, "lora_embedding_", item.module)
    if pair is None:
        return
    a, b = pair
    shape = state.shape(f"{item.module}.weight")
    if shape is None or len(shape) != 2 or not EMBEDDING_LIKE.search(item.module):
        _unmatched(state, a, f"{item.module}.weight, as an embedding")
        return
    rank = state.adapter.rank(item.module)
    if not (state.fits(a, (rank, shape[0])) and state.fits(b, (shape[1], rank))):
        return
    changes: list[Change] = [LowRank(a, b, state.adapter.scale(item.module), transposed=True)]
    if (magnitude := item.part("lora_magnitude_vector")) is not None and state.fits(magnitude, (shape[1],)):
        changes.append(Magnitude(magnitude, columns=True))
    _require_magnitude(state, item)
    state.changes.setdefault(f"{item.module}.weight", []).extend(changes)


def match_tokens(state: MatchState, module: str, rows: StoredTensor) -> None:
    """Rows of an embedding that were trained whole."""
    if state.names.tie_contradicts_bytes:
        message = f"tensor {rows.spec.name} was trained on a pair that config.json ties and the bytes do not"
        state.problem(message, "peft and transformers do not agree on that base: put tie_word_embeddings right in it")
        return
    indices = _token_indices(state, module)
    shape = state.shape(f"{module}.weight")
    if shape is None or len(shape) != 2:
        _unmatched(state, rows, f"{module}.weight")
        return
    if not state.fits(rows, (len(indices), shape[1])):
        return
    if wrong := [index for index in indices if not 0 <= index < shape[0]]:
        state.problem(f"tensor {rows.spec.name} changes row {wrong[0]}, the embedding has {shape[0]}")
        return
    state.changes.setdefault(f"{module}.weight", []).append(ReplacedRows(rows, tuple(indices)))


def _token_indices(state: MatchState, module: str) -> Sequence[int]:
    """The indices that the config states for a module; for a tied head that it does not name, the embedding's."""
    stated = state.adapter.config.get("trainable_token_indices") or []
    if not isinstance(stated, dict):
        return list(stated)
    names = [module, str(state.names.embedding)] if module == state.names.head and state.names.tied else [module]
    found = [indices for name in names for key, indices in stated.items() if f".{name}".endswith(f".{key}")]
    return found[0] if found else []


def match_parameter(state: MatchState, item: ModuleTensors, last: str) -> None:
    """Factors of a parameter: a matrix, or [experts, out, in], packed in the file or unpacked."""
    live = state.names.architecture.module(item.module)
    parameter = f"{live}.{last}"
    pair = _pair(state, item, "lora_", parameter)
    if pair is None:
        return
    matrix = state.shape(parameter)
    if matrix is not None and len(matrix) == 2:
        _match_matrix(state, parameter, matrix, pair)
    elif places := state.names.parameter(parameter):
        _match_experts(state, parameter, places, pair)
    else:
        _unmatched(state, pair[0], parameter)


def _match_matrix(state: MatchState, parameter: str, shape: tuple[int, ...], pair: Pair) -> None:
    """A parameter that is a matrix, its product as it is stored; the layer of a Conv1D sees its transpose."""
    turned = any(place.tensor in state.names.input_major for place in state.names.parameter(parameter))
    rank, stored = state.adapter.rank(parameter), shape[::-1] if turned else shape
    if state.fits(pair[0], (rank, stored[1])) and state.fits(pair[1], (stored[0], rank)):
        change = LowRank(*pair, state.adapter.scale(parameter), transposed=turned)
        state.changes.setdefault(parameter, []).append(change)


def _match_experts(state: MatchState, parameter: str, places: Sequence[StoredPlace], pair: Pair) -> None:
    rank, scale = state.adapter.rank(parameter), state.adapter.scale(parameter)
    shape = _packed_shape(state, places)
    if len(shape) != 3:
        state.problem(f"tensor {pair[0].spec.name} meets {list(shape)}, expected [experts, out, in]")
        return
    input_major = parameter.rpartition(".")[0] in state.names.architecture.input_major
    experts, (rows, columns) = shape[0], shape[:0:-1] if input_major else shape[1:]
    if state.fits(pair[0], (rank * experts, columns)) and state.fits(pair[1], (rows, rank * experts)):
        for place in places:
            lay = Experts(experts, input_major, place.window)
            state.stored_changes.setdefault(place.tensor, []).append(LowRank(*pair, scale, experts=lay))


def _packed_shape(state: MatchState, places: Sequence[StoredPlace]) -> tuple[int, ...]:
    """The shape of a parameter, [experts, out, in] where it is stored expert by expert."""
    shape = state.names.checkpoint.weights[places[0].tensor].spec.shape
    windows = [place.window for place in places if place.window is not None]
    if not windows:
        return shape
    return (
        max(window.expert for window in windows) + 1,
        max(window.first + window.count for window in windows),
        shape[-1],
    )


def _unmatched(state: MatchState, tensor: StoredTensor, parameter: str) -> None:
    name, hint = tensor.spec.name, OTHER_BASE
    if not state.names.direct:
        module, _, last = parameter.rpartition(".")
        live = f"{state.names.architecture.module(module)}.{last}"
        if (operation := state.names.architecture.rearranged.get(live)) is not None:
            hint = f"transformers makes it by {operation} while it loads, which cannot be merged through yet"
        elif len(state.names.parameter(parameter)) > 1:
            hint = "it is stored in several tensors; adapt it through target_parameters"
    state.problem(f"tensor {name} has no home: the base has no {parameter}", hint)


def _pair(state: MatchState, item: ModuleTensors, kind: str, scaled: str) -> Pair | None:
    """Both factors, or None when one is missing, which is noted; `scaled` is whose scale they have."""
    suffix = "" if kind == "lora_embedding_" else ".weight"
    a, b = item.part(f"{kind}A{suffix}"), item.part(f"{kind}B{suffix}")
    name = f"{PREFIX}{item.module}{NESTED * item.depth}"
    if a is None or b is None:
        missing = "A" if a is None else "B"
        state.problem(f"tensor {name}.{kind}{missing}{suffix} is missing, its partner is there", SAVE_AGAIN)
        return None
    scale = state.adapter.scale(scaled)
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(scale)
    if rounded == 0 or not np.isfinite(rounded):
        state.problem(f"the scale of {scaled} is {scale:g}, so the delta is lost", f"see lora_alpha in {CONFIG_NAME}")
        return None
    return a, b
