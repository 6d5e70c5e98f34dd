"""How long the windows of a protocol are for a model: as named, as the recipe says, or as long as its context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_export.errors import UsageError
from qlora_export.recipe.config import DriftRecipe
from qlora_export.recipe.protocols import LABELS, USUAL, Kind, ProtocolChoice, choose_protocol, protocol_of_name
from qlora_export.sources.model_config import is_classifier, label_names

USUAL_WINDOW_TOKENS = 1024
# What transformers' page on perplexity takes, and lm-evaluation-harness for a model that states no context.
USUAL_STRIDE_TOKENS = 512
UNSTATED_CONTEXT_TOKENS = 2048
LABELS_HINT = "leave drift.protocol out: a classifier is measured on the labels of texts"


@dataclass(frozen=True)
class SizedProtocol:
    """A protocol whose sizes are settled."""

    name: str
    kind: Kind
    window_tokens: int
    stride_tokens: int | None = None
    labels: tuple[str, ...] = ()


def protocol_for(drift: DriftRecipe, config: Mapping[str, Any], context: int | None) -> SizedProtocol:
    """The protocol for the model of a config.json: `labels` for a classifier, and for it alone.

    Raises UsageError where another one is stated.
    """
    classifier = is_classifier(config)
    if classifier and drift.protocol not in (None, LABELS):
        raise UsageError(f"protocol {drift.protocol} is for language models, and this is a classifier", LABELS_HINT)
    if not classifier and drift.protocol == LABELS:
        raise UsageError("protocol labels is for classifiers, and this is a language model", "leave drift.protocol out")
    name = LABELS if classifier else drift.protocol or USUAL
    choice = choose_protocol(name, drift.window_tokens, drift.stride_tokens)
    return replace(sized(choice, context), labels=label_names(config) if classifier else ())


def sized(choice: ProtocolChoice, context: int | None) -> SizedProtocol:
    """A chosen protocol for a model of this context; raises UsageError where its windows exceed that."""
    window = choice.window_tokens or _usual_window(choice, context)
    if context is not None and window > context:
        raise UsageError(
            f"protocol {choice.name}: windows of {window} tokens, and the model's context is {context}",
            f"take {choice.kind}-{context} or less"
            if choice.kind in ("disjoint", "llama.cpp")
            else f"set drift.window_tokens to at most {context}",
        )
    if choice.kind != "strided":
        return SizedProtocol(choice.name, choice.kind, window)
    stride = choice.stride_tokens or USUAL_STRIDE_TOKENS
    if stride > window:
        raise UsageError(
            f"protocol strided: a stride of {stride} tokens skips some after every window of {window}",
            f"set drift.stride_tokens to at most {window}",
        )
    return SizedProtocol(choice.name, choice.kind, window, stride)


def recorded_protocol(tokens: Mapping[str, Any]) -> SizedProtocol:
    """The protocol that a report's `tokens` were made by; those without a name were by the usual one."""
    name = str(tokens.get("name", USUAL))
    return SizedProtocol(
        name,
        protocol_of_name(name)[0],
        int(tokens["window_tokens"]),
        tokens.get("stride_tokens"),
        tuple(tokens.get("labels") or ()),
    )


def _usual_window(choice: ProtocolChoice, context: int | None) -> int:
    if choice.kind == "windows":
        return min(USUAL_WINDOW_TOKENS, context or USUAL_WINDOW_TOKENS)
    if choice.kind == "strided" and context is None:
        raise UsageError(
            "protocol strided: config.json does not state the model's context", "state it as drift.window_tokens"
        )
    return context or UNSTATED_CONTEXT_TOKENS
