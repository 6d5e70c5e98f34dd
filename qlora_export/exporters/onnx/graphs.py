"""Where graphs come from: the GenAI model builder or, for what it lacks or gets wrong, `torch.onnx.export`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, Refused
from qlora_export.exporters.onnx.builder import Order, known_architectures, run_builder
from qlora_export.exporters.onnx.stated_architecture import lacking
from qlora_export.exporters.onnx.traced.tracer import outline, trace
from qlora_export.sources.checkpoint import read_json
from qlora_export.sources.model_config import is_classifier

CONFIG_NAME = "config.json"


def make_graph(name: str, order: Order, source: Path, destination: Path) -> None:
    """Fill `destination` with a graph of a dense folder and its data; raises what the one or the other does."""
    if is_built(read_json(source / CONFIG_NAME)):
        run_builder(name, order, source, destination)
    else:
        trace(name, order.precision, source, destination)


def is_built(config: Mapping[str, Any]) -> bool:
    """Whether the installed builder makes a right graph of the architecture; it has none of sequence classifiers."""
    return not is_classifier(config) and _unbuilt(config) is None


def _unbuilt(config: Mapping[str, Any]) -> str | None:
    name, known = str(_architecture(config)), known_architectures()
    return lacking(name, config) if not known or name in known else "is not known to the model builder"


def obstacle(name: str, config: Mapping[str, Any]) -> str | None:
    """Why there is no graph of a model with this config.json; None where nothing stands in the way.

    What the builder lacks is traced, with as few layers as there are kinds of them: seconds.
    """
    if _architecture(config) is None:
        return f"{name} needs `architectures` in config.json, stated as transformers does"
    if is_built(config):
        return None
    found = _untraceable(json.dumps(config, sort_keys=True))
    return f"{name}: {_architecture(config)} {_unbuilt(config)}, and {found}" if found else None


@lru_cache(maxsize=4)
def _untraceable(config: str) -> str | None:
    try:
        outline(json.loads(config))
    except (Refused, EnvironmentProblem) as error:
        return str(error)
    return None


def _architecture(config: Mapping[str, Any]) -> str | None:
    stated = config.get("architectures")
    return str(stated[0]) if isinstance(stated, list) and stated else None
