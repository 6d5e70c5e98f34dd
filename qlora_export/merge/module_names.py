"""Which stored tensors a module of the live model has, by their names, or by transformers where names do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from qlora_export.errors import ExportError
from qlora_export.sources.architecture import CLASSIFIER_HEADS, Architecture, StoredPlace, read_architecture
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.reading import same_values

INPUT_EMBEDDINGS = "embed_tokens|wte|embed_in|word_embeddings|tok_embeddings"
EMBEDDINGS = f"{INPUT_EMBEDDINGS}|embed_positions|wpe|embeddings?"
HEADS = "lm_head|embed_out"
EMBEDDING = re.compile(rf"(^|\.)({INPUT_EMBEDDINGS})$")
EMBEDDING_LIKE = re.compile(rf"(^|\.)({EMBEDDINGS})$")
HEAD = re.compile(rf"(^|\.)({HEADS})$")
# Modules whose two-dimensional weight is no linear layer, or the output head, which bitsandbytes leaves dense.
DENSE_BY_DEFAULT = re.compile(rf"(^|\.)({EMBEDDINGS}|{HEADS}|{'|'.join(CLASSIFIER_HEADS)})$")
EXPERT = re.compile(r"\.experts\.(\d+\.)?")
# The names that decoders usually have, from the root of the model on.
STEM = r"((model|transformer|gpt_neox|decoder|language_model)\.)*"
LAYER = re.compile(rf"{STEM}(layers|h|blocks)\.(?P<number>\d+)\..+")
BESIDE_LAYERS = re.compile(
    rf"{STEM}({EMBEDDINGS}|{HEADS}|{'|'.join(CLASSIFIER_HEADS)}|norm|ln_f|final_layer_norm|project_in|project_out)"
)
# Models whose layers are transformers' Conv1D: weights stored [in, out].
INPUT_MAJOR_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
INPUT_MAJOR_MODULE = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
# Families whose every other matrix is a plain nn.Linear or Conv1D; transformers is asked about the rest.
PLAIN_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Names of a checkpoint; `parameters` are those that an adapter or a sidecar speaks of."""

    checkpoint: Checkpoint
    classifier: bool
    parameters: tuple[str, ...]

    @cached_property
    def architecture(self) -> Architecture:
        """What transformers knows; costs an import. Raises InputError or Refused when it does not know the model."""
        modules = [name.rpartition(".")[0] for name in self.parameters]
        return read_architecture(self.checkpoint, self.classifier, modules)

    @property
    def asked_transformers(self) -> bool:
        """Whether transformers was asked, and is in memory now."""
        return "architecture" in self.__dict__

    @cached_property
    def direct(self) -> bool:
        """Whether every parameter is stored under its own name."""
        return all(name in self.checkpoint.weights for name in self.parameters)

    def parameter(self, name: str) -> tuple[StoredPlace, ...]:
        """Where a parameter of the live model is stored; empty when nowhere."""
        if self.direct:
            return (StoredPlace(name),) if name in self.checkpoint.weights else ()
        module, _, last = name.rpartition(".")
        live = self.architecture.module(module)
        return self.architecture.places.get(f"{live}.{last}", ())

    def stored_module(self, module: str) -> str | None:
        """The stored name of a module that has one weight of its own."""
        places = self.parameter(f"{module}.weight")
        if len(places) != 1 or places[0].window is not None:
            return None
        return places[0].tensor.removesuffix(".weight")

    def live_module(self, module: str) -> str:
        """The name of a module in the live model of today's transformers."""
        return module if self.direct else self.architecture.module(module)

    def both_names(self, stored: Iterable[str]) -> set[str]:
        """Stored modules under their own names and under those of the live model, where they differ."""
        modules = set(stored)
        if self.direct and not self._renames:
            return modules
        places = self.architecture.places.items()
        return modules | {
            name.removesuffix(".weight")
            for name, found in places
            if len(found) == 1 and found[0].tensor.removesuffix(".weight") in modules
        }

    def live_modules(self, stored: Iterable[str]) -> dict[str, str]:
        """The stored modules that are one module of the live model each, by its name there; asks transformers."""
        modules = set(stored)
        found = {
            name.removesuffix(".weight"): places[0].tensor.removesuffix(".weight")
            for name, places in self.architecture.places.items()
            if name.endswith(".weight") and len(places) == 1 and places[0].window is None
        }
        return {live: module for live, module in found.items() if module in modules}

    @property
    def _renames(self) -> bool:
        """Whether names lie where decoders usually have none, so that the live model may have others."""
        return not all(self._usual(weight.spec.module) for weight in self.checkpoint.weights.values())

    @cached_property
    def live_parameters(self) -> tuple[str, ...]:
        """Parameters of the live model that are stored, under their own names."""
        return tuple(self.checkpoint.weights if self.direct else self.architecture.places)

    @cached_property
    def linear(self) -> frozenset[str]:
        """Stored modules that bitsandbytes quantises: linear layers but the output head, not packed experts."""
        if self.direct and self.checkpoint.config.get("model_type") in PLAIN_FAMILIES:
            return frozenset(
                weight.spec.module
                for name, weight in self.checkpoint.weights.items()
                if name.endswith(".weight")
                and len(weight.spec.shape) == 2
                and not DENSE_BY_DEFAULT.search(weight.spec.module)
                and name not in self.carried
            )
        places = self.architecture.places
        found = [places.get(f"{module}.weight", ()) for module in self.architecture.linear]
        return frozenset(
            one[0].tensor.removesuffix(".weight") for one in found if len(one) == 1 and one[0].window is None
        )

    @cached_property
    def live_linear(self) -> frozenset[str]:
        """The same under the names of the live model."""
        plain = self.direct and self.checkpoint.config.get("model_type") in PLAIN_FAMILIES
        return self.linear if plain else frozenset(self.architecture.linear)

    @cached_property
    def live_matrices(self) -> tuple[str, ...]:
        """Modules of the live model whose weight is one stored matrix."""
        weights = self.checkpoint.weights
        if self.direct:
            named = {name: name for name in weights}
        else:
            places = self.architecture.places.items()
            named = {name: found[0].tensor for name, found in places if len(found) == 1 and found[0].window is None}
        return tuple(
            name.removesuffix(".weight")
            for name, stored in named.items()
            if name.endswith(".weight") and len(weights[stored].spec.shape) == 2
        )

    @cached_property
    def carried(self) -> frozenset[str]:
        """Stored tensors that the model does not have, such as heads that predict several tokens (`mtp.*`).

        Names tell for layers and what is usual around them; transformers is asked about anything else, and where it
        does not know the model either, what is unusual is taken for carried.
        """
        odd = frozenset(name for name, weight in self.checkpoint.weights.items() if not self._usual(weight.spec.module))
        if not odd:
            return odd
        try:
            known = {place.tensor for places in self.architecture.places.values() for place in places}
            rearranged = bool(self.architecture.rearranged)
        except ExportError:
            return odd
        live = {*self.architecture.places} & {*self.architecture.parameters}
        used = {place.tensor for name in live for place in self.architecture.places[name]}
        return frozenset() if rearranged or not known else odd - used

    def _usual(self, module: str) -> bool:
        stem = module.removesuffix(".bias")
        if (layer := LAYER.fullmatch(stem)) is not None:
            count = self.checkpoint.text_config.get("num_hidden_layers") or self.checkpoint.config.get("n_layer")
            return isinstance(count, int) and int(layer["number"]) < count
        return BESIDE_LAYERS.fullmatch(stem) is not None

    @cached_property
    def input_major(self) -> frozenset[str]:
        """Stored weights of Conv1D layers, [in, out]."""
        if self.checkpoint.config.get("model_type") not in INPUT_MAJOR_MODELS:
            return frozenset()
        return frozenset(
            name
            for name, weight in self.checkpoint.weights.items()
            if len(weight.spec.shape) == 2 and INPUT_MAJOR_MODULE.search(weight.spec.module)
        )

    @cached_property
    def embedding(self) -> str | None:
        """The live name of the input embedding."""
        return self._one(EMBEDDING) or self.architecture.embedding

    @cached_property
    def head(self) -> str | None:
        """The live name of the output head; a classifier has none."""
        if self.classifier:
            return None
        if self.direct and self.tied and self._one(HEAD) is None:
            return "lm_head"
        return self._one(HEAD) or self.architecture.head

    @cached_property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight: no head is stored, or config.json says so."""
        if self.classifier:
            return False
        if not any(HEAD.search(weight.spec.module) for weight in self.checkpoint.weights.values()):
            return True
        stated = self.checkpoint.states_tying
        return (bool(self.architecture.tied) if stated is None else stated) and not self.tie_contradicts_bytes

    @cached_property
    def tie_contradicts_bytes(self) -> bool:
        """Whether config.json ties a stored head to an embedding of other values: loaders do not agree on such a base.

        transformers 5 then leaves them untied. Both are read, where both are stored and the tie is stated.
        """
        if not self.checkpoint.states_tying or self.classifier:
            return False
        weights = self.checkpoint.weights.values()
        sides = [
            [
                weight
                for weight in weights
                if pattern.search(weight.spec.module) and weight.spec.name.endswith(".weight")
            ]
            for pattern in (EMBEDDING, HEAD)
        ]
        if [len(side) for side in sides] != [1, 1] or not all(side[0].stored[0].path.is_file() for side in sides):
            return False
        embedding, head = (side[0] for side in sides)
        floats = embedding.spec.dtype in FLOATS and head.spec.dtype in FLOATS
        plain = embedding.storage == head.storage == "plain"
        return plain and floats and not same_values(embedding.stored[0], head.stored[0])

    def _one(self, pattern: re.Pattern[str]) -> str | None:
        """The only stored module of that name, where live and stored names are the same."""
        if not self.direct:
            return None
        found = [
            weight.spec.module for weight in self.checkpoint.weights.values() if pattern.search(weight.spec.module)
        ]
        return found[0] if len(found) == 1 else None


def names_of(checkpoint: Checkpoint, classifier: bool, parameters: Iterable[str]) -> Names:
    """The names of a checkpoint, as far as these live parameters are concerned."""
    return Names(checkpoint, classifier, tuple(dict.fromkeys(parameters)))
