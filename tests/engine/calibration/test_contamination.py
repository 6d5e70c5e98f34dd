from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.engine.calibration.contamination import FORM_ENTRIES, Contamination, contamination_of, require_apart
from qlora_export.engine.calibration.passages import RUN_WORDS, passages_of, runs_of, words_of
from qlora_export.engine.calibration.text import CalibrationText
from qlora_export.errors import Refused
from qlora_export.sources.text_entries import Entry

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 30}
WORDS = [f"word{number}" for number in range(5000)]


def prose(seed: int, words: int, paragraph: int = 100) -> str:
    """Words that no other seed has in this order."""
    drawn = random.Random(seed).choices(WORDS, k=words)
    return "\n\n".join(" ".join(drawn[start : start + paragraph]) for start in range(0, words, paragraph))


def chat(*contents: str, system: bool = False, place: str = "line 1") -> Entry:
    turns = ({"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents))
    return Entry((SYSTEM, *turns) if system else tuple(turns), place)


def shared(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Contamination | None:
    return contamination_of(CalibrationText("ours", 1.0, tuple(ours)), theirs)


def file(text: str) -> tuple[Entry]:
    return (Entry(text, "line 1", is_file=True),)


def test_the_same_chat_however_it_is_laid_out() -> None:
    theirs = [chat("a", "b"), chat("My  kettle\nis cold", "Buy a new ONE", place="line 7")]
    ours = [chat("x", "y"), chat("my kettle is cold", "buy a new one ", system=True, place="line 2"), chat("z", "b")]
    found = shared(ours, theirs)
    assert found == Contamination("ours", "chats", 1, 3, "line 2", "line 7", "my kettle is cold")
    assert shared([chat("my kettle is cold", "buy a new two")], theirs) is None


def test_a_longer_exchange_within_a_conversation() -> None:
    question, answer = "where does the river end and what is there", "at the sea, beside a lighthouse"
    theirs = [chat("hi", "hello", question, answer)]
    found = shared([chat(question, answer, "thanks", "you are welcome")], theirs)
    assert found is not None
    assert found.shared == 1
    assert shared([chat("hi", "hello", "and now", "nothing")], theirs) is None, "a short exchange is said by many"
    assert shared([chat(question, "nobody knows")], theirs) is None, "an answer of its own"
    assert shared([chat("which way do the ships of the king go", answer)], theirs) is None, "another question"


def test_a_system_prompt_is_no_overlap() -> None:
    assert shared([chat("a", "b", system=True)], [chat("c", "d", system=True)]) is None
    assert shared([Entry((SYSTEM,), "line 1")], [Entry((SYSTEM,), "line 1")]) is None
    assert shared([chat("a", "b", system=True)], file(SYSTEM["content"])) is None


def test_words_in_a_row_of_running_text() -> None:
    inner = prose(1, RUN_WORDS)
    theirs = file(prose(2, 300) + "\n\n" + inner)
    ours = f"{prose(3, 250)}\nand {inner.upper().replace(' ', ' - ')} {prose(4, 30)}\n\n{prose(5, 100)}"
    found = shared(file(ours), theirs)
    assert found is not None
    assert (found.kind, found.shared, found.count) == ("paragraphs", 1, 4)
    assert (found.place, found.drift_place) == ("line 5", "line 7")
    one_less = " ".join(inner.split()[1:])
    assert shared(file(f"{prose(3, 250)} and {one_less} {prose(4, 30)}"), theirs) is None
    assert shared(file(prose(6, 2000)), file(prose(7, 2000))) is None


def test_a_run_may_cross_paragraphs_and_pieces_of_running_text() -> None:
    lines = [Entry(part, f"line {number}") for number, part in enumerate(prose(1, 60, 20).split("\n\n"), 1)]
    found = shared(lines, file(prose(1, 60, 30)))
    assert found is not None
    assert (found.place, found.drift_place) == ("line 1", "line 1")


@pytest.mark.parametrize("words", [12, 39, 200])
def test_chats_and_the_text_they_were_rendered_to(words: int) -> None:
    answer = prose(1, words, 1000)
    rendered = f"### User:\n\nwhat now\n\n### Answer:\n\n{answer}\n\n### End"
    found = shared([chat("why", "so"), chat("what now", answer, place="line 4")], file(rendered))
    assert found is not None
    assert (found.kind, found.shared, found.place, found.drift_place) == ("messages", 1, "line 4", "line 7")
    back = shared(file(rendered), [chat("what now", answer, place="line 4")])
    assert back is not None
    assert (back.kind, back.place, back.drift_place) == ("paragraphs", "line 7", "line 4")
    assert shared([chat(answer[:60], answer[60:100])], file(rendered)) is None


def test_messages_are_not_run_together() -> None:
    first, second = prose(1, 25), prose(2, 25)
    assert shared([chat(first, second)], file(f"{first} {second} {prose(3, 50)}")) is None


def test_a_form_that_many_entries_share_is_no_overlap() -> None:
    form = prose(1, 80)
    for count, found in ((FORM_ENTRIES, False), (FORM_ENTRIES - 1, True)):
        theirs = [Entry(f"{form}\n\n{prose(10 + number, 50)}", f"line {number}") for number in range(count)]
        theirs += [Entry(prose(50, 90), "line 9")]
        ours = [Entry(f"{form}\n\n{prose(99, 50)}", "line 1")]
        assert (shared(ours, theirs) is not None) is found
        assert (shared([Entry(prose(50, 90) + form, "line 1")], theirs)) is not None


def test_text_without_spaces() -> None:
    letters = "".join(chr(0x4E00 + number) for number in range(RUN_WORDS))
    assert shared(file(f"一{letters}二"), file(f"三{letters}四")) is not None
    assert shared(file(f"一{letters[1:]}二"), file(f"三{letters[1:]}四")) is None


@pytest.mark.parametrize("text", ["", "...", "\n \n\n"])
def test_texts_without_words(text: str) -> None:
    for empty in (file(text), (), [chat(text, text)]):
        for other in ((), file("!"), file(prose(1, 100)), [chat("a", "b")]):
            assert shared(empty, other) is None
            assert shared(other, empty) is None


def test_the_refusal_names_every_text_and_its_first_find() -> None:
    theirs = [chat("one two three four five six seven eight nine ten eleven", "b", place="line 3")]
    task = CalibrationText("task.jsonl", 0.5, (*theirs, chat("c", "d")))
    apart = CalibrationText("general.txt", 0.5, file(prose(1, 90)))
    with pytest.raises(Refused) as caught:
        require_apart([apart, task], theirs, "holdout.jsonl")
    assert caught.value.exit_code == 4
    assert caught.value.message == (
        "calibration on the text that drift is measured on: 1 of 2 chats of task.jsonl stand in holdout.jsonl too, "
        "the first at line 3 (line 3 there): 'one two three four five six seven eight nine ten ...'"
    )
    require_apart([apart], theirs, "holdout.jsonl")


paragraphs = st.lists(st.sampled_from("abcd").map(lambda letter: letter * 3), min_size=25, max_size=50).map(" ".join)


@given(first=paragraphs, second=paragraphs, across=st.booleans())
def test_equal_runs_are_equal_words(first: str, second: str, across: bool) -> None:
    """Against the words themselves, on texts with many repeats."""
    passages = passages_of(file(f"{first}\n\n{second}"))
    found = runs_of(passages, across)
    parts = [(number, word) for number, passage in enumerate(passages) for word in passage.words]
    windows = [parts[start : start + RUN_WORDS] for start in range(len(parts) - RUN_WORDS + 1)]
    windows = [window for window in windows if across or window[0][0] == window[-1][0]]
    assert found.passages.tolist() == [window[0][0] for window in windows]
    words = [tuple(word for _, word in window) for window in windows]
    numbers = found.numbers.tolist()
    assert [numbers.index(number) for number in numbers] == [words.index(window) for window in words]


@given(text=st.text(alphabet="ab \n\r\t.", max_size=60))
def test_passages_hold_all_words_and_know_their_lines(text: str) -> None:
    found = passages_of(file(text))
    assert tuple(word for passage in found for word in passage.words) == words_of(text)
    lines = text.split("\n")
    for passage in found:
        line = lines[int(passage.place.removeprefix("line ")) - 1]
        assert passage.text.split("\n")[0].strip() in line
