"""A loaded sequence classifier as a session: one row of log-probabilities over its labels for a text.

Texts of a batch are filled up on the right with `pad_token_id`, since transformers' decoders with a classifier's head
look at the last token that is another one; where config.json states none, they take one text at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qlora_export.runtimes.base import Session
from qlora_export.runtimes.session import ModelSession, TorchSession, computing, filled, out_of_memory
from qlora_export.sources.model_config import CLASSIFIER
from qlora_export.types import Float32


def session_of(model: Any) -> Session:
    """A loaded model, with or without a live adapter, as the session of its kind."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ClassifierSession(model) if type(whole).__name__.endswith(CLASSIFIER) else ModelSession(model)


class ClassifierSession(TorchSession):
    """A loaded sequence classifier."""

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [1, labels] of the labels of a text, in nats."""
        return self.rows_at([tokens], [(0,)])[0]

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        """Of each text the log-probabilities [places, labels] in the one row that it has."""
        with torch.no_grad(), out_of_memory(), computing(self._dtype):
            rows = torch.cat([self._model(**inputs).logits for inputs in self._inputs(windows)])
            found = torch.log_softmax(rows.float(), dim=-1).cpu().numpy()
        return [found[number : number + 1][list(at)] for number, at in enumerate(places)]

    def _inputs(self, windows: Sequence[Sequence[int]]) -> Iterator[dict[str, torch.Tensor]]:
        pad = self._model.config.get_text_config().pad_token_id
        if pad is None or pad < 0:
            return (filled([window], self._model.device) for window in windows)
        return iter([filled(windows, self._model.device, pad)])
