"""Formats by name, made only when they are asked for."""

from __future__ import annotations

from inspect import signature
from types import MappingProxyType
from typing import cast

from qlora_export.catalog import FORMATS, load
from qlora_export.errors import UsageError
from qlora_export.formats.base import Format
from qlora_export.types import Options, TrainingQuantization

NO_OPTIONS: Options = MappingProxyType({})


def load_format(name: str, training: TrainingQuantization, options: Options = NO_OPTIONS) -> Format:
    """The format of that name, told how the base was quantised in training; its options are keywords of its maker.

    Raises UsageError for options that it does not have.
    """
    make = load(FORMATS, "format", name)
    known = [item.name for item in signature(make).parameters.values() if item.kind is item.KEYWORD_ONLY]
    for option in options:
        if not known:
            raise UsageError(f"{name} has no options")
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}; known: {', '.join(known)}")
    return cast(Format, make(training, **options))
