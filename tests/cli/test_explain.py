from __future__ import annotations

import json

import pytest

from qlora_export.errors import ExitCode, UsageError
from qlora_export.publish.lint import RULES
from qlora_export.report.exit_codes import CODES, explanation
from tests.cli.inside import inside
from tests.cli.test_cli import started


def test_every_exit_code_has_an_explanation_of_its_own() -> None:
    assert [item.number for item in CODES] == [int(code) for code in ExitCode]
    for field in ("meaning", "causes", "action"):
        texts = [getattr(item, field) for item in CODES]
        assert len(set(texts)) == len(texts)
        assert all(text.endswith(".") for text in texts)
    retried = [item.number for item in CODES if "should retry" in item.again]
    assert retried == [ExitCode.REMOTE]


@pytest.mark.parametrize("word", ["7", "remote", "REMOTE"])
def test_by_number_and_by_name(word: str) -> None:
    assert explanation(word, dict).number == 7


def test_every_rule_of_the_linter_is_explained_by_its_line() -> None:
    assert RULES
    for name, line in RULES.items():
        assert line in explanation(name, lambda: RULES).meaning


def test_the_command() -> None:
    found = started("explain", "143")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("143 terminated\n")
    assert "Run it again?" in found.stdout
    data = json.loads(inside("explain", "not-authorised", "--json").stdout)
    assert (data["number"], data["schema"]) == (9, 1)


@pytest.mark.parametrize(("word", "near"), [("gate-faild", "gate-failed"), ("12", "known: 0, 1, 2"), ("zzz", "rules")])
def test_an_unknown_code_is_exit_2_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        explanation(word, lambda: RULES)
    assert near in caught.value.hint
    assert inside("explain", word).returncode == 2
