"""What the Hub says of a card."""

from __future__ import annotations

import pytest

from qlora_export.testing.card import card_problems, front_matter


def card(*lines: str) -> str:
    return "\n".join(["---", *lines, "---", "# Title", "text", "---", "more"])


@pytest.mark.parametrize(
    "lines",
    [
        ["license: apache-2.0", "base_model: acme/base"],
        ["base_model: [gpt2, meta-llama/Llama-3.1-8B]", "base_model_relation: merge"],
        ["license: other", "license_name: our-licence-1.0", "license_link: LICENSE", "tags: [a, b]", "language: en"],
        ["quantized_by: acme", "date: 2024-01-02"],
        ["model-index:", "- name: m", "  results: [{task: {type: a}, dataset: {name: b}, metrics: [{value: 1}]}]"],
    ],
)
def test_good_cards(lines: list[str]) -> None:
    assert card_problems(card(*lines)) == ([], [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("base_model: /models/base", '"base_model" with value "/models/base" is not valid'),
        ("base_model: ./base", '"base_model" with value "./base" is not valid'),
        ("base_model: a/b/c", '"base_model" with value "a/b/c" is not valid'),
        ("base_model: [acme/base, 7]", '"base_model" with value "7" is not valid'),
        ("base_model_relation: quantised", '"base_model_relation" must be one of [adapter, finetune, merge'),
        ("license: Apache 2", '"license" with value "Apache 2" must be one of [afl-3.0, agpl-3.0'),
        ("license: [mit, {a: b}]", "\"license\" with value \"{'a': 'b'}\" must be one of"),
        ("license: other", '"license_name" is required when "license" is "other"'),
        ("{license: other, license_name: Our Licence}", '"license_name" with value "Our Licence" must consist of'),
        ("tags: [1]", '"tags" must be a string or a list of strings'),
        ("library_name: [transformers]", '"library_name" must be a string'),
        ("model-index: {}", '"model-index" must be a list of mappings with a "name"'),
        ("model-index: [{name: m, results: [{task: {type: a}}]}]", '"model-index[0].results[0].dataset" is required'),
        ("- license", "YAML metadata must be a mapping"),
        ("license: [mit", "YAML metadata error: while parsing a flow sequence"),
    ],
)
def test_bad_cards(line: str, says: str) -> None:
    errors, warnings = card_problems(card(line))
    assert errors[0].startswith(says)
    assert warnings == []


@pytest.mark.parametrize("content", ["# Title", "", "---\nno end", "text\n---\nlicense: mit\n---\n"])
def test_a_card_without_metadata_is_only_warned_of(content: str) -> None:
    assert card_problems(content) == ([], ["empty or missing yaml metadata in repo card"])


def test_metadata_ends_at_its_own_line() -> None:
    assert front_matter("---\r\na: b---c\r\n---\r\nbody\r\n---\r\n") == ({"a": "b---c"}, None)
