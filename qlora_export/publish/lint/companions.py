"""What a model cannot do without: its configuration, and tokenizer files that belong together.

The carried files (templates, licence, generation settings) are in the manifest, so that leaving one out is found there;
here is what every model of the kind has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from qlora_export.errors import Problem
from qlora_export.publish.lint.contents import Contents, base_of
from qlora_export.publish.lint.rules import finding
from qlora_export.sources.model_config import is_classifier

VOCABULARY = re.compile(
    r"tokenizer\.json|tokenizer\.model|vocab\.(json|txt)|spiece\.model|sentencepiece.*\.model|.*\.tiktoken"
)
# These classes have nothing else to be made from; the named fast ones can convert a slow vocabulary.
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
COPY = "copy the file from the base, and build again"


def companion_problems(contents: Contents, prefix: str) -> Iterator[Problem]:
    """What the model of a directory lacks."""
    names = {base_of(name) for name in contents.beside(prefix)}
    inner = any(base_of(name).endswith(".onnx") for name in contents.beside(f"{prefix}onnx/"))
    graph = inner or any(name.endswith(".onnx") for name in names)
    classifies = is_classifier(contents.table(f"{prefix}config.json") or {})
    configs = ["genai_config.json"] if graph and not classifies else []
    for config in (*configs, *(["config.json"] if inner or classifies or not graph else [])):
        if config not in names:
            yield finding("companion", prefix + config, "is missing, nothing can load the weights", COPY)
    if not any(VOCABULARY.fullmatch(name) for name in names):
        yield finding("companion", f"{prefix}tokenizer.json", "is missing, and no other vocabulary is there", COPY)
    yield from _tokenizer(contents, prefix, names)
    if graph and not classifies:
        yield from _graph_settings(contents, prefix)


def _tokenizer(contents: Contents, prefix: str, names: set[str]) -> Iterator[Problem]:
    """The files that tokenizer_config.json cannot do without."""
    path = f"{prefix}tokenizer_config.json"
    stated = (contents.table(path, "companion") or {}).get("tokenizer_class")
    if stated in GENERIC_CLASSES and "tokenizer.json" not in names:
        what = f"tokenizer_class {stated} reads tokenizer.json, which is missing"
        yield finding("companion", path, what, COPY)


def _graph_settings(contents: Contents, prefix: str) -> Iterator[Problem]:
    path = f"{prefix}genai_config.json"
    table = contents.table(path, "companion") or {}
    for key, value in _leaves(table):
        if key == "filename" and isinstance(value, str) and prefix + value not in contents.names:
            yield finding("companion", path, f"names {value!r}, which does not lie beside it", COPY)
        if key.startswith("custom_ops_library") and value:
            yield finding("code", path, "names a library of operators to load", "leave custom_ops_library out")


def _leaves(table: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every setting of nested tables with its own key."""
    if isinstance(table, Mapping):
        for name, value in table.items():
            yield from _leaves(value, str(name))
    elif isinstance(table, list):
        for value in table:
            yield from _leaves(value, key)
    else:
        yield key, table
