"""Modules that the adapter's config targets without tensors: half an adapter must not pass for a whole one."""

from __future__ import annotations

import re
from typing import Any

from qlora_export.errors import ExitCode, Problem
from qlora_export.merge.adapter_keys import AdapterTensors, factor_modules
from qlora_export.merge.names import Names
from qlora_export.sources.adapter import Adapter

LAYER_NUMBER = re.compile(r"\.(\d+)\.")
CLASSIFIER_HEADS = ("score", "classifier")
EXPERT = re.compile(r"\.experts\.")


def untouched_problems(adapter: Adapter, names: Names, found: AdapterTensors) -> list[Problem]:
    """Targets without tensors, the first of each kind."""
    adapted = {names.live_module(item.module) for item in factor_modules(found)}
    modules = [module for module in names.live_matrices if not EXPERT.search(module)]
    missing = []
    targets = adapter.config.get("target_modules") or []
    if isinstance(targets, str) and targets != "all-linear":
        missing += [module for module in modules if _matches(targets, module) and module not in adapted]
    elif not isinstance(targets, str):
        missing += [
            module
            for module in modules
            if module not in adapted and any(f".{module}".endswith(f".{target}") for target in targets)
        ]
    missing = [module for module in missing if _chosen(adapter.config, module)]
    missing += _unsaved(adapter, names, found)
    if not missing:
        return []
    message = f"{adapter.weights}: {len(missing)} targeted modules have no tensors, the first is {missing[0]}"
    hint = "the adapter is incomplete, or was trained on another base: save it again"
    return [Problem(ExitCode.BAD_INPUT, message, hint)]


def _unsaved(adapter: Adapter, names: Names, found: AdapterTensors) -> list[str]:
    """Modules of the base that modules_to_save names, and a classifier's head, that were not saved."""
    there = [name.rpartition(".")[0] for name in found.whole] + [item.module for item in found.modules]
    missing = []
    for module in adapter.config.get("modules_to_save") or []:
        in_base = any(f".{name}.".find(f".{module}.") >= 0 for name in names.live_matrices)
        if in_base and not any(f".{name}.".find(f".{module}.") >= 0 for name in there):
            missing.append(f"{module} (modules_to_save)")
    heads = [name for name in (*there, *names.live_matrices) if name.split(".")[-1] in CLASSIFIER_HEADS]
    if adapter.classifier and not heads:
        missing.append("the classifier's head")
    return missing


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        return False


def _chosen(config: Any, module: str) -> bool:
    """Whether exclude_modules and layers_to_transform leave this module in."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str) and _matches(excluded, module):
        return False
    if not isinstance(excluded, str) and any(f".{module}".endswith(f".{name}") for name in excluded):
        return False
    layers = config.get("layers_to_transform")
    if layers is None:
        return True
    number = LAYER_NUMBER.search(module)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)
