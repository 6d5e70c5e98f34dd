from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_export.drift.generation import Prompt, agreements, compare_generation, generate, prompts_of
from qlora_export.errors import ExitCode, InputError, UsageError
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.options import RunOptions
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.base import GreedySession, Session
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.registry import load_runtime
from qlora_export.runtimes.session import ModelSession
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import read_entries
from qlora_export.sources.text_entries import Entry
from qlora_export.types import Float32
from tests.helpers.files import edit_json
from tests.helpers.pico import DEMO

COUNT = 12
ASKED = [{"role": "user", "content": "Order 512 came broken."}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "We are sorry."}]


def quiet(done: int, total: int) -> None:
    """No progress."""


@contextmanager
def opened(folder: Path) -> Iterator[ModelSession]:
    with load_runtime("transformers").open(folder) as session:
        assert isinstance(session, ModelSession)
        yield session


@pytest.fixture(scope="module")
def tokenizer() -> FolderTokenizer:
    return FolderTokenizer(DEMO / "base")


@pytest.fixture(scope="module")
def prompts(tokenizer: FolderTokenizer) -> tuple[Prompt, ...]:
    entries = read_entries("holdout.jsonl", DEMO)[:9]
    return prompts_of(entries, tokenizer, COUNT, 512, "holdout.jsonl")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base in 4 bits."""
    out = tmp_path_factory.mktemp("generation")
    data = {"base": str(DEMO / "base"), "training_quantization": "none", "artifacts": ["nf4"]}
    pipeline.build(make_recipe(data, Path(), "test"), RunOptions(out, workers=1))
    return out / "nf4"


def common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def test_agreement_is_that_of_real_greedy_decoding(
    prompts: tuple[Prompt, ...], rounded: Path, tokenizer: FolderTokenizer
) -> None:
    with opened(DEMO / "base") as session:
        written = generate(session, prompts, COUNT, quiet)
    with opened(rounded) as session:
        found = agreements(session, prompts, written, quiet).tolist()
        own = [session.greedy(prompt.tokens, COUNT) for prompt in prompts]
        whole = compare_generation(session, prompts, written, COUNT, tokenizer.decode, quiet)
    expected = [common(tokens, other) for tokens, other in zip(written, own, strict=True)]
    assert found == expected
    assert len(set(expected)) > 3, "a test in which all agree shows nothing"
    assert whole.agreement_mean == pytest.approx(sum(expected) / len(expected))
    assert whole.whole == sum(place == len(tokens) for place, tokens in zip(expected, written, strict=True))
    assert [item.agreed for item in whole.worst] == sorted(place for place in expected if place < COUNT)[:5]
    worst = whole.worst[0]
    number = next(place for place, prompt in enumerate(prompts) if prompt.place == worst.place)
    assert worst.prompt == tokenizer.decode(prompts[number].tokens)
    assert worst.reference == tokenizer.decode(written[number])
    assert worst.candidate == tokenizer.decode(own[number])


def test_the_reference_is_what_transformers_generates(prompts: tuple[Prompt, ...]) -> None:
    with opened(DEMO / "base") as session:
        written = generate(session, prompts[:3], COUNT, quiet)
    model = load_model(DEMO / "base", dtype=torch.float32)
    for prompt, tokens in zip(prompts, written, strict=False):
        inputs = torch.tensor([prompt.tokens])
        mask = torch.ones_like(inputs)
        found = model.generate(inputs, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, pad_token_id=4)
        assert tuple(found[0, len(prompt.tokens) :].tolist()) == tokens


def test_an_end_of_text_ends_it(prompts: tuple[Prompt, ...], base_copy: Path) -> None:
    with opened(base_copy) as session:
        free = session.greedy(prompts[0].tokens, COUNT)
    end = free[5]
    edit_json(base_copy / "generation_config.json", eos_token_id=[2047, end])
    with opened(base_copy) as session:
        assert session.ends == {2047, end}
        (found,) = generate(session, prompts[:1], COUNT, quiet)
        assert list(found) == free[: free.index(end) + 1]
        assert agreements(session, prompts[:1], [found], quiet).tolist() == [len(found)]
        compared = compare_generation(session, prompts[:1], [found], COUNT, str, quiet)
    assert (compared.whole, compared.worst) == (1, ())


class Reading:
    """A session that can do no more than every session can."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        return self._session.log_probabilities(tokens)


def test_a_runtime_that_cannot_generate_agrees_or_not_all_the_same(prompts: tuple[Prompt, ...], rounded: Path) -> None:
    with opened(DEMO / "base") as session:
        written = generate(session, prompts[:3], COUNT, quiet)
    with opened(rounded) as session:
        reading = Reading(session)
        assert not isinstance(reading, GreedySession)
        found = compare_generation(reading, prompts[:3], written, COUNT, str, quiet)
        able = compare_generation(session, prompts[:3], written, COUNT, str, quiet)
    assert found.agreement_mean == able.agreement_mean
    assert found.worst
    assert all(item.candidate is None for item in found.worst)
    with pytest.raises(UsageError, match="cannot generate"):
        generate(reading, prompts, COUNT, quiet)


def test_prompts_end_where_the_answer_begins(tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in (ASKED, ANSWERED)))
    asked, answered = prompts_of(read_entries(str(path), Path()), tokenizer, 8, None, "prompts.jsonl")
    assert asked.tokens == answered.tokens
    assert tokenizer.decode(asked.tokens).endswith("Order 512 came broken.<|end|>\n<|assistant|>\n")
    assert (asked.place, answered.place) == ("line 1", "line 2")


def test_the_lines_of_a_text_are_prompts(tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("My order\n\nThe parcel\n")
    found = prompts_of(read_entries(str(path), Path()), tokenizer, 8, None, "prompts.txt")
    assert [prompt.place for prompt in found] == ["line 1", "line 3"]
    assert found[1].tokens == tuple(tokenizer.encode_whole("The parcel"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "prompts.jsonl: holds no prompt"),
        ([Entry(tuple(ANSWERED[1:]), "line 1")], "prompts.jsonl: line 1: only the assistant speaks"),
        ([Entry("short", "line 1"), Entry("word " * 40, "line 2")], r"line 2: \d+ tokens and 8 to generate, .* is 30"),
    ],
)
def test_a_wrong_prompt_is_named(entries: list[Any], message: str, tokenizer: FolderTokenizer) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prompts_of(entries, tokenizer, 8, 30, "prompts.jsonl")
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.BAD_INPUT
