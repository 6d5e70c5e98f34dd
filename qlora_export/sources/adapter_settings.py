"""The settings of adapter_config.json that the maths and the matching read, checked before they are used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from qlora_export.errors import InputError

LARGEST_RANK = 1 << 20
Whole = Annotated[int, Field(strict=True)]
Rank = Annotated[int, Field(strict=True, ge=1, le=LARGEST_RANK)]


class _Blocks(BaseModel):
    """The settings of a block-diagonal LoRA."""

    nblocks: Rank = 1
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None


class _Settings(BaseModel):
    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[Whole] | Whole | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[Whole] | dict[str, list[Whole]] | None = None
    use_bdlora: _Blocks | None = None


def require_settings(path: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a LoRA setting of the wrong kind, or a pattern that is no regular expression."""
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", "save the adapter again with peft") from None
    patterns = [rf"(.*\.)?({key})$" for key in (*(settings.rank_pattern or ()), *(settings.alpha_pattern or ()))]
    patterns += [text for text in (settings.target_modules, settings.exclude_modules) if isinstance(text, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            shown = pattern.removeprefix(r"(.*\.)?(").removesuffix(")$")
            raise InputError(f"{path}: {shown!r} is no regular expression ({error})") from None
