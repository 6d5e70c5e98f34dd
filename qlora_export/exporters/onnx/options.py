"""The options of ONNX artifacts: checked once, then facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from qlora_export.errors import UsageError
from qlora_export.exporters.transformers_js import LAYOUTS
from qlora_export.types import Options

BLOCK_SIZES = (16, 32, 64, 128, 256)
ALGORITHMS = ("default", "rtn", "k_quant")
ACCURACY_LEVELS = (1, 2, 3, 4)
PROVIDERS = ("cpu", "cuda", "webgpu")
SOURCES_OF_INT4: tuple[str, ...] = ("w4a16", "gptq", "awq")
BITS = {"int4": 4, "int8": 8}
Chosen = TypeVar("Chosen")


def choice(default: object, *known: object) -> Any:
    """A field that is one of some values."""
    return field(default=default, metadata={"known": known or (default,)})


@dataclass(frozen=True)
class Float32Options:
    """The layout of the folder; a float32 graph for CUDA could not be measured on a CPU."""

    layout: str = choice("genai", *LAYOUTS)


@dataclass(frozen=True)
class Float16Options:
    """The execution provider that the graph is laid out for, and the layout of the folder."""

    provider: str = choice("cpu", *PROVIDERS)
    layout: str = choice("genai", *LAYOUTS)


@dataclass(frozen=True)
class IntegerOptions:
    """What decides integers that the builder rounds: values in a block, rounding, grid, and where 8 bits stand in.

    `accuracy_level` 4 rounds activations to int8 (the builder's default on a CPU), 1 keeps float32. `sensitive_layers`
    are those that llama.cpp gives more bits: the first and last eighth and every third between, their inputs of
    attention and the outputs of their MLP. `exclude` are names of nodes that stay dense, with commas between.
    """

    block_size: int = choice(32, *BLOCK_SIZES)
    symmetric: bool = choice(True, True, False)
    algorithm: str = choice("default", *ALGORITHMS)
    last_matrix: str = choice("int8", "int4", "int8")
    sensitive_layers: str = choice("int4", "int4", "int8")
    exclude: str = ""
    accuracy_level: int = choice(4, *ACCURACY_LEVELS)
    provider: str = choice("cpu", *PROVIDERS)
    layout: str = choice("genai", *LAYOUTS)

    def words(self) -> tuple[str, ...]:
        """The builder's key=value words."""
        # Each group of bits that is named takes all products that are left (0.18.0), so 4, the usual, is not named.
        mixed = ["last_matmul:int8"] if self.last_matrix == "int8" else []
        mixed += ["mixed_layers:int8"] if self.sensitive_layers == "int8" else []
        return _words(self, self.last_matrix == "int8", mixed)


@dataclass(frozen=True)
class Int8Options:
    """The same for integers of 8 bits, where no matrix has fewer."""

    block_size: int = choice(32, *BLOCK_SIZES)
    symmetric: bool = choice(True, True, False)
    algorithm: str = choice("default", *ALGORITHMS)
    exclude: str = ""
    accuracy_level: int = choice(4, *ACCURACY_LEVELS)
    provider: str = choice("cpu", *PROVIDERS)
    layout: str = choice("genai", *LAYOUTS)

    def words(self) -> tuple[str, ...]:
        """The builder's key=value words."""
        return _words(self, True, [])


def _words(options: IntegerOptions | Int8Options, last_is_int8: bool, mixed: list[str]) -> tuple[str, ...]:
    stated = {
        # The builder shares a tied embedding with the last matrix, and loses it when that one is int8 (0.18.0).
        "shared_embeddings": "false" if last_is_int8 else "",
        "is_symmetric": "" if options.symmetric else "false",
        "block_size": options.block_size,
        "algo_config": options.algorithm,
        "accuracy_level": options.accuracy_level,
        "matmul_mixed_precision": ",".join(mixed),
        "nodes_to_exclude": options.exclude,
    }
    return tuple(f"{key}={value}" for key, value in stated.items() if value != "")


@dataclass(frozen=True)
class SameIntegerOptions:
    """Of integers that another artifact has: its block and grid where several could be meant, and what is around them.

    `last_matrix` is the output head, float32 as the source has it, or rounded to nearest.
    """

    block_size: int | None = choice(None, None, *BLOCK_SIZES)
    symmetric: bool | None = choice(None, None, True, False)
    last_matrix: str = choice("float32", "float32", "int8", "int4")
    accuracy_level: int = choice(4, *ACCURACY_LEVELS)
    layout: str = choice("genai", *LAYOUTS)


@dataclass(frozen=True)
class SameInteger4Options(SameIntegerOptions):
    """The same for 4 bits, which three formats store; `integers` names the one that is meant."""

    integers: str = choice("w4a16", *SOURCES_OF_INT4)


@dataclass(frozen=True)
class Nf4Options:
    """What multiplies: `kernel`, with 4-bit weights, or weights `as-trained`, decoded and rounded as in training.

    The adapter's factors are constants, or inputs of which they are the defaults.
    """

    decode: str = choice("kernel", "kernel", "as-trained")
    adapter: str = choice("constant", "constant", "inputs")
    layout: str = choice("genai", *LAYOUTS)


def chosen(name: str, kind: type[Chosen], options: Options) -> Chosen:
    """The options of an artifact; raises UsageError for one that it has not, or that cannot have this value."""
    table: Mapping[str, Any] = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in table:
            hint = f"its options: {', '.join(sorted(table))}" if table else "it has none"
            raise UsageError(f"{name} has no option {option!r}", hint)
        known = table[option].metadata.get("known")
        if known is None and not isinstance(value, str):
            raise UsageError(f"{name}: {option} is {value!r}", "give text")
        if known is not None and not any(value == item and type(value) is type(item) for item in known):
            raise UsageError(f"{name}: {option} is {value!r}", f"choose one of {', '.join(map(str, known))}")
    return kind(**options)
