"""Several formats of compressed-tensors in one folder: each linear layer has its own, and config.json a group for each.

Every tensor goes to the format of its module (`of`), so parts and bytes are those of the formats by themselves. Groups
before the last name their modules in full: the library sorts patterns by their spelling, names it takes first, and it
warns of names that come after `Linear`. Source: compressed-tensors `quantization/quant_config.py` (`mixed-precision`),
`utils/match.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_export.catalog import FORMATS
from qlora_export.errors import UsageError
from qlora_export.formats.base import Format, Stored, TensorEncoder
from qlora_export.types import Float32, Part, Rounding, TensorSpec

METHOD = "compressed-tensors"


@dataclass(frozen=True, kw_only=True)
class Mixed(Format):
    """A format for most layers, `others` by stored module, and the names that the live model may know those by."""

    main: Format
    others: Mapping[str, Format]
    names: Mapping[str, tuple[str, ...]]

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """None: its formats are rounded before they are mixed."""
        return ()

    def of(self, spec: TensorSpec) -> Format:
        """The format of a layer."""
        return self.others.get(spec.module, self.main)

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Why the layer's format cannot encode it."""
        return self.of(spec).obstacle(spec, input_major)

    def row_multiple(self, spec: TensorSpec) -> int:
        """Fewest rows that hold whole blocks."""
        return self.of(spec).row_multiple(spec)

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The parts that the layer becomes."""
        return self.of(spec).parts(spec)

    def open(self, spec: TensorSpec) -> TensorEncoder:
        """Start encoding a tensor."""
        return self.of(spec).open(spec)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows."""
        return self.of(spec).decode(spec, parts, rows)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of the main format with a group for each other one."""
        stated = self.main.quantization_config(kept)
        if stated is None:
            return None
        groups: dict[str, Any] = {}
        for form, modules in self._by_form():
            other = form.quantization_config(())
            if other is not None:
                targets = sorted({name for module in modules for name in self.names.get(module, (module,))})
                groups[f"group_{len(groups)}"] = {**other["config_groups"]["group_0"], "targets": targets}
        groups[f"group_{len(groups)}"] = stated["config_groups"]["group_0"]
        layouts = {group["format"] for group in groups.values()}
        layout = stated["format"] if len(layouts) == 1 else "mixed-precision"
        return {**stated, "format": layout, "config_groups": groups}

    def _by_form(self) -> list[tuple[Format, list[str]]]:
        """Each other format with its modules, in the order of the first."""
        found: list[tuple[Format, list[str]]] = []
        for module, form in sorted(self.others.items()):
            for known, modules in found:
                if known == form:
                    modules.append(module)
                    break
            else:
                found.append((form, [module]))
        return found


def mix(main: Format, others: Mapping[str, Format], names: Mapping[str, tuple[str, ...]]) -> Format:
    """The formats in one folder; raises UsageError for those that do not go together."""
    for form in (main, *others.values()):
        stated = form.quantization_config(())
        if others and stated is not None and _has_zero_points(stated):
            raise UsageError(
                f"{form.name} with zero points does not mix with other formats in one folder",
                "transformers opens no such folder, and what is decoded here is of one kind; leave out `symmetric`",
            )
        if stated is None or stated.get("quant_method") != METHOD:
            mixing = [name for name, info in FORMATS.items() if METHOD in info.packages]
            raise UsageError(
                f"{form.name} does not mix with other formats in one folder",
                f"{', '.join(mixing[:-1])} and {mixing[-1]} do; `keep` leaves modules dense",
            )
    if not others:
        return main
    beside = all(form.beside_experts for form in (main, *others.values()))
    dtype = main.dense_dtype
    return Mixed(name=main.name, dense_dtype=dtype, beside_experts=beside, main=main, others=others, names=names)


def _has_zero_points(stated: Mapping[str, Any]) -> bool:
    groups = stated.get("config_groups") or {}
    return any(group["weights"]["symmetric"] is False for group in groups.values())
