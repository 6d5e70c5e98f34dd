"""Our perplexity by each named protocol is the one of the tool that the protocol is named after.

The references are written from the tools' definitions: perplexity.cpp of llama.cpp, the page on perplexity of the
documentation of transformers, the evaluation of GPTQ, loglikelihood_rolling of lm-evaluation-harness. The harness
itself is asked where QLORA_EXPORT_LM_EVAL_PYTHON names its environment; docs/drift.md tells how to make one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qlora_export.drift.batches import batched_rows
from qlora_export.drift.documents import document_perplexity
from qlora_export.drift.protocols import token_set
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.window_sizes import sized
from qlora_export.recipe.protocols import choose_protocol
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.session import ModelSession
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import DriftText, read_text
from qlora_export.sources.text_entries import Entry
from tests.helpers.files import edit_json
from tests.helpers.pico import DEMO, TOKENIZER_FILES, save_base

TOLERANCE = 1e-4
READER = Path(__file__).parent / "harness_reader.py"
CONTEXT = 512


@dataclass(frozen=True)
class Case:
    """A model folder, and the same text for it and for the references."""

    folder: Path
    documents: list[str]

    @property
    def text(self) -> DriftText:
        return DriftText(tuple(Entry(text, f"line {number}") for number, text in enumerate(self.documents, 1)))

    @property
    def joined(self) -> str:
        return "\n\n".join(self.documents)

    def tokens(self, name: str, **sizes: int) -> TokenSet:
        return token_set(self.text, FolderTokenizer(self.folder), sized(choose_protocol(name, **sizes), CONTEXT), None)

    def ids(self) -> list[int]:
        """As the tools encode: with what the tokenizer adds by itself."""
        found: list[int] = transformers.AutoTokenizer.from_pretrained(self.folder)(self.joined)["input_ids"]
        return found

    def model(self) -> Any:
        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def losses(self, tokens: TokenSet) -> list[float]:
        """As the drift check measures them."""
        session = ModelSession(load_model(self.folder, dtype=torch.float32))
        found: list[float] = []
        for window, rows in zip(tokens.windows, batched_rows(session, tokens.windows), strict=True):
            targets = np.array(window.tokens)[list(window.scored)]
            found += (-rows[np.arange(len(targets)), targets].astype(np.float64)).tolist()
        return found

    def perplexity(self, name: str, **sizes: int) -> float:
        return math.exp(float(np.mean(self.losses(self.tokens(name, **sizes)))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A pico model that has seen the text for a few steps: what it predicts hangs on what stands before."""
    folder = save_base(tmp_path_factory.mktemp("agreement") / "base", 1, torch.float32, max_position_embeddings=CONTEXT)
    chats = read_text(DEMO / "holdout.jsonl").chats
    turns = [message["content"] for chat in chats for message in chat]
    documents = [turns[0], "", " ".join(turns[1:20]), f" {turns[20]}\n", *turns[21:27], " ".join(turns[27:39])]
    case = Case(folder, documents)
    ids, model = torch.tensor(case.ids()), case.model().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        starts = torch.randint(len(ids) - 64, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 64] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return case


@pytest.fixture(scope="module", params=["the tokenizer adds a begin token", "no begin token"])
def case(request: pytest.FixtureRequest, trained: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The model with a tokenizer that begins every text, and with one that does not."""
    folder = Path(shutil.copytree(trained.folder, tmp_path_factory.mktemp("agreement") / "base"))
    adds_begin = request.param != "no begin token"
    if adds_begin:
        edit_json(folder / "tokenizer.json", post_processor=begins_with("<|begin|>", folder))
    assert bool(FolderTokenizer(folder).encode_whole("")) == adds_begin
    return Case(folder, trained.documents)


def begins_with(token: str, folder: Path) -> dict[str, Any]:
    """The part of tokenizer.json that puts a token before every text, as that of Llama does."""
    number = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def log_probabilities(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)


@pytest.mark.parametrize("size", [64, 65])
def test_llama_cpp(case: Case, size: int) -> None:
    model, tokens = case.model(), case.ids()
    begin = transformers.AutoTokenizer.from_pretrained(case.folder).bos_token_id
    adds_begin = tokens[0] == begin
    first, nll, count = size // 2, 0.0, 0
    for chunk in range(len(tokens) // size):
        start = chunk * size
        fed = [begin if adds_begin else tokens[start], *tokens[start + 1 : start + size]]
        found = log_probabilities(model, fed)
        for place in range(first, size - 1):
            nll -= float(found[place, tokens[start + place + 1]])
        count += size - first - 1
    assert case.perplexity(f"llama.cpp-{size}") == pytest.approx(math.exp(nll / count), abs=TOLERANCE)


def test_gptq(case: Case) -> None:
    model, ids, size = case.model(), torch.tensor([case.ids()]), 128
    samples = ids.numel() // size
    nlls = []
    for sample in range(samples):
        batch = ids[:, sample * size : (sample + 1) * size]
        with torch.no_grad():
            logits = model(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:])
        nlls.append(loss * size)
    expected = float(torch.exp(torch.stack(nlls).sum() / (samples * size)))
    assert case.perplexity(f"disjoint-{size}") == pytest.approx(expected, abs=TOLERANCE)


@dataclass(frozen=True)
class Step:
    """One window of the recipe of transformers: its mean loss, how many losses that is of, and what it weighs."""

    loss: float
    count: int
    weight: int


def steps(model: Any, ids: Any, size: int, stride: int) -> Iterator[Step]:
    reached = 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + size, ids.size(1))
        wanted = end - reached
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, :-wanted] = -100
        with torch.no_grad():
            loss = float(model(inputs, labels=labels).loss)
        yield Step(loss, int((labels[:, 1:] != -100).sum()), int((labels != -100).sum()) - inputs.size(0))
        reached = end
        if end == ids.size(1):
            return


@pytest.mark.parametrize(("size", "stride"), [(128, 32), (128, 100), (64, 64)])
def test_transformers(case: Case, size: int, stride: int) -> None:
    found = list(steps(case.model(), torch.tensor([case.ids()]), size, stride))
    tokens = case.tokens("strided", window_tokens=size, stride_tokens=stride)
    losses = case.losses(tokens)
    assert tokens.count == sum(step.count for step in found)
    by_token = sum(step.loss * step.count for step in found) / tokens.count
    assert math.exp(float(np.mean(losses))) == pytest.approx(math.exp(by_token), abs=TOLERANCE)

    # The page weighs each window by one token less than it averages over, but for the first; from ours, the same.
    ends = np.cumsum([len(window.scored) for window in tokens.windows])
    means = [float(part.mean()) for part in np.split(np.array(losses), ends[:-1])]
    weights = [step.weight for step in found]
    of_the_page = math.exp(np.average([step.loss for step in found], weights=weights))
    assert math.exp(np.average(means, weights=weights)) == pytest.approx(of_the_page, abs=TOLERANCE)


def rolled(model: Any, ids: list[int], prefix: int, size: int) -> float:
    """The NLL of a document: each prediction after at most `size` tokens, windows filled to that from the left."""
    led, total, done = [prefix, *ids], 0.0, 0
    while done < len(ids):
        end = min(done + size, len(ids))
        fed = led[max(0, end - size) : end]
        found = log_probabilities(model, fed)
        for target in range(done, end):
            total -= float(found[len(fed) - end + target, ids[target]])
        done = end
    return total


@pytest.mark.parametrize("size", [64, 512])
def test_the_definition_of_the_harness(case: Case, size: int) -> None:
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(case.folder), case.model()
    documents = [tokenizer(text)["input_ids"] for text in case.documents]
    total = sum(rolled(model, ids, tokenizer.bos_token_id, size) for ids in documents)
    tokens = case.tokens("lm-eval-rolling", window_tokens=size)
    assert tokens.count == sum(map(len, documents))
    found = math.exp(float(np.mean(case.losses(tokens))))
    assert found == pytest.approx(math.exp(total / tokens.count), abs=TOLERANCE)


@pytest.mark.lm_eval
@pytest.mark.parametrize("size", [64, 512])
def test_the_harness_itself(case: Case, size: int, tmp_path: Path) -> None:
    documents = tmp_path / "documents.json"
    documents.write_text(json.dumps(case.documents))
    python = os.environ["QLORA_EXPORT_LM_EVAL_PYTHON"]
    command = [python, str(READER), str(case.folder), str(documents), str(size)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(command, env=variables, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-2000:]
    theirs = json.loads(answer.stdout.splitlines()[-1])
    tokens = case.tokens("lm-eval-rolling", window_tokens=size)
    assert tokens.documents is not None
    mean = float(np.mean(case.losses(tokens)))
    ours = document_perplexity(mean, tokens.count, tokens.documents)
    assert math.exp(mean) == pytest.approx(math.exp(-theirs["loglikelihood"] / tokens.count), abs=TOLERANCE)
    # A perplexity by word is a power of that by token, and so is what of it float32 leaves open.
    assert math.log(ours.word_perplexity) == pytest.approx(math.log(theirs["word_perplexity"]), abs=TOLERANCE)
    assert ours.byte_perplexity == pytest.approx(theirs["byte_perplexity"], abs=TOLERANCE)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte"], abs=TOLERANCE)


def test_a_model_is_never_fed_more_than_its_context(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=2048, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, tmp_path)
    case = Case(tmp_path, ["The order came broken and we are sorry for that. " * 20])
    tokens = case.tokens("lm-eval-rolling", window_tokens=32)
    assert max(len(window.tokens) for window in tokens.windows) == 33
    assert np.isfinite(case.losses(tokens)).all()
