"""The page of a report: whole with every key and with none, the same bytes again, and nothing of a file runs in it."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import re
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError, nodes
from markupsafe import Markup

from qlora_export.drift.comparison.rows import Comparison
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build
from qlora_export.report.comparison import comparison_data
from qlora_export.report.data import report, write_report
from qlora_export.report.html.assets import script, style
from qlora_export.report.html.comparison_page import comparison_page, write_comparison_page
from qlora_export.report.html.figures import fixed, share, significant
from qlora_export.report.html.page import PAGE_NAME, page, write_page
from qlora_export.report.html.rendering import environment
from qlora_export.report.html.scale import Scale
from qlora_export.report.html.visible import SHAPELESS, visible, visible_edges
from qlora_export.report.run import Run
from qlora_export.report.schemas import report_schema
from tests.helpers.pico import RecipeMaker
from tests.report.full_report import HOSTILE, full_report

VOID = {"meta", "br", "hr", "link", "input", "img"}
SECTIONS = ["ledger", "distribution", "layers", "size", "worst", "choices", "generation", "trace", "provenance"]
OPTIONAL = ("distribution", "beside", "worst", "generation", "choices", "trace", "limits", "layers", "calibration")
TEXT = st.text(st.characters(codec=None), max_size=40)
WAYS_IN = (
    "<p>{{ said }}</p>",
    '<p title="{{ said }}"></p>',
    "<p>{{ ui.quoted(said) }}</p>",
    "<p>{{ ui.code(said) }}</p>",
    "<p>{{ said|visible_edges }}</p>",
    "<p>{{ '{}s of {}'.format(said, ui.code('a')) }}</p>",
    "<p>{% set kept %}{{ said }}{% endset %}{{ kept }}</p>",
    "<p>{{ [said] }}</p>",
)


class Outline(HTMLParser):
    """What a page is made of; raises where elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data:
            self.text.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of this name."""
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def said(self) -> str:
        """The text a reader sees."""
        return "".join(data for tag, data in self.text if tag not in ("style", "script"))


def reports() -> dict[str, dict[str, Any]]:
    """Reports of every kind: whole, each key missing, nothing measured, nothing at all, keys of a wrong kind."""
    found = {"full": full_report(), "empty": {}}
    for key in OPTIONAL:
        found[f"without {key}"] = without(of_few_layers(), key)
    for key in ("tokens", "reference", "published", "exit_code", "artifacts"):
        found[f"without {key}"] = {name: value for name, value in of_few_layers().items() if name != key}
    built = of_few_layers()
    built |= {"tokens": None, "reference": None, "published": [], "exit_code": 0}
    names = ("name", "format", "path", "bytes", "runtime", "manifest_sha256", "reused")
    built["artifacts"] = [
        {key: item[key] for key in names} | {"verdict": "not-measured"} for item in built["artifacts"]
    ]
    return found | {"built": built, "wrong kinds": spoiled(of_few_layers())}


def of_few_layers() -> dict[str, Any]:
    """A full report of a model with five matrices."""
    report = full_report()
    for artifact in report["artifacts"]:
        if "layers" in artifact:
            artifact["layers"] = artifact["layers"][:5]
    return report


def without(report: dict[str, Any], key: str) -> dict[str, Any]:
    for artifact in report["artifacts"]:
        artifact.pop(key, None)
    return report


def spoiled(value: Any) -> Any:
    """The same keys with values that no reader can use."""
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [*map(spoiled, value), None, "text", 3, {}]
    return {"a": 1} if isinstance(value, str) else HOSTILE


REPORTS = reports()


@functools.cache
def outline_of(name: str) -> Outline:
    return Outline(page(REPORTS[name]))


def tags_of_a_full_report() -> set[str]:
    return {tag for tag, _, _ in outline_of("full").elements}


@pytest.fixture(params=REPORTS)
def outline(request: pytest.FixtureRequest) -> Outline:
    return outline_of(request.param)


def test_elements_are_nested_and_ids_unique(outline: Outline) -> None:
    ids = [attributes["id"] for _, attributes, _ in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("href", "aria-labelledby"):
        targets = [attributes[name] or "" for _, attributes, _ in outline.elements if name in attributes]
        assert {target.lstrip("#") for whole in targets for target in whole.split()} <= set(ids)


def test_headings_are_in_order(outline: Outline) -> None:
    levels = [int(tag[1]) for tag, _, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_landmarks_tables_and_drawings_have_names(outline: Outline) -> None:
    assert [len(outline.of(tag)) for tag in ("header", "nav", "main", "footer", "html")] == [1] * 5
    assert outline.of("html")[0]["lang"] == "en"
    assert all("aria-labelledby" in attributes for attributes in outline.of("section"))
    assert len(outline.of("caption")) == len(outline.of("table"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.of("th"))
    for attributes in outline.of("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes["role"] == "img"
    drawings = [attributes for attributes in outline.of("svg") if "role" in attributes]
    named = [path for tag, attributes, path in outline.elements if tag in ("title", "desc") and "id" in attributes]
    assert len(named) == 2 * len(drawings)
    assert all(path[-1] == "svg" for path in named)


def test_nothing_is_loaded_and_only_our_script_may_run(outline: Outline) -> None:
    assert len(outline.of("script")) == len(outline.of("style")) == 1
    assert {"src", "srcset", "style", "action", "data", "poster"}.isdisjoint(
        name for _, attributes, _ in outline.elements for name in attributes
    )
    assert not [name for _, attributes, _ in outline.elements for name in attributes if name.startswith("on")]
    assert all((attributes["href"] or "").startswith("#") for attributes in outline.of("a"))
    policies = [meta["content"] or "" for meta in outline.of("meta") if "http-equiv" in meta]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; ")
    assert "unsafe" not in policies[0]
    for tag in ("style", "script"):
        content = "".join(data for name, data in outline.text if name == tag)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policies[0]
    assert "url(" not in style() and "@import" not in style()
    assert "</" not in style() + script()


def test_what_is_said_has_no_character_that_hides(outline: Outline) -> None:
    hidden = {character for character in outline.said() if unicodedata.category(character) in SHAPELESS}
    assert hidden <= {" ", "\n"}


def test_a_full_report_has_every_section_and_says_what_is_in_it() -> None:
    outline = outline_of("full")
    assert [attributes["id"] for attributes in outline.of("section")] == SECTIONS
    assert [attributes["href"] for attributes in outline.of("a")][-len(SECTIONS) :] == [f"#{name}" for name in SECTIONS]
    said = outline.said()
    for words in (
        "Release report: 3 pass; 1 fail; 1 fail, as expected; 1 inconclusive; 1 not measured",
        "7 artifacts, compared with the model that was trained (4-bit base with live adapter), on 16,384 tokens",
        "\u2717fail, as expected",
        "Exit code 3",
        "99.3% in outputs",
        "bf16, int8, nf4-calibrated keep 99% to 101% of it in the weights of every matrix.",
        "nf4-dithered may be no worse than nf4-calibrated: mean KL further \u2264 0.001, ratio to it \u2264 1.002",
        "You get the money",
        "\u2423back",
        "broke here",
        "model.layers.7.mlp.down_proj is off by 0.25; 0.0078 is usual.",
        "mean KL 3.1\u00d710\u207b\u2075, same top-1 99.8%: the reference in bfloat16 against itself, on 16,384 tokens",
        "none: a folder was checked that no recipe made",
        "Perplexity of whole documents",
        "Layers were not compared: its runtime has none.",
        "82 layers rounded by 128 sequences, 65,536 tokens, sha256",
        "2 left to the format because its inputs are all zero",
        "\u27e8U+202E\u27e9",
    ):
        assert words in said, words
    assert "Read the reasons in report.md. Try another rounding, ship" in said


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("without distribution", "distribution"), ("without worst", "worst"), ("without generation", "generation"),
        ("without choices", "choices"), ("without trace", "trace"), ("built", "size"),
    ],
)  # fmt: skip
def test_a_section_without_its_keys_is_left_out(name: str, missing: str) -> None:
    found = [attributes["id"] for attributes in outline_of(name).of("section")]
    assert missing not in found
    assert {"ledger", "layers", "provenance"} <= set(found)


def test_what_was_not_measured_is_said_to_be_so() -> None:
    said = outline_of("built").said()
    assert "7 artifacts; nothing was measured." in said
    assert "these artifacts were built, and not checked" in said
    assert "No artifact has weights that an adapter's change could be read from." in said


def test_the_report_of_these_tests_is_one_that_could_be() -> None:
    validator = jsonschema.Draft202012Validator(report_schema())
    errors = [f"{list(error.path)}: {error.message[:200]}" for error in validator.iter_errors(full_report())]
    assert errors[:5] == []


def test_the_bytes_are_a_function_of_the_report(tmp_path: Path) -> None:
    data = full_report()
    before = copy.deepcopy(data)
    path = write_page(data, tmp_path)
    assert data == before
    stored = json.loads(json.dumps(data))
    assert path.read_bytes() == page(stored).encode() == page(full_report()).encode()
    assert path == tmp_path / PAGE_NAME
    assert [item.name for item in tmp_path.iterdir()] == [PAGE_NAME]


def test_tens_of_thousands_of_experts_do_not_make_a_page_that_no_browser_opens() -> None:
    layers = [
        {"tensor": f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "survival": 0.5 + expert / 1000}
        for layer in range(48)
        for expert in range(128)
    ]
    layers.append({"tensor": "lm_head.weight", "survival": 0.25})
    outline = Outline(page({"artifacts": [{"name": "moe", "verdict": "pass", "layers": layers}]}))
    said = outline.said()
    assert "The 1,000 of 6,145 matrices of moe that kept least" in said
    assert "experts.up_proj" in said
    assert "lm_head.weight: 25.0%" in said
    assert len(outline.of("circle")) + len(outline.of("path")) < 120


def test_numbers_to_sort_by_are_beside_those_to_read() -> None:
    values = [attributes["data-value"] for attributes in outline_of("full").of("td") if "data-value" in attributes]
    assert len(values) > 500
    assert all(value is not None and repr(float(value)) == value for value in values)


@given(TEXT, st.sampled_from(WAYS_IN))
def test_text_of_files_stays_text(text: str, template: str) -> None:
    made = filled(template, said=text)
    outline = Outline(made)
    assert {tag for tag, _, _ in outline.elements} <= {"p", "bdi", "code"}
    read = outline.said() + (outline.elements[0][1].get("title") or "")
    assert not {character for character in read if unicodedata.category(character) in SHAPELESS} - {" ", "\n"}
    made.encode("utf-8")


def filled(template: str, **facts: Any) -> str:
    """A template of a test in the environment of the page."""
    return environment().from_string(f'{{% import "macros.html" as ui %}}{template}').render(facts)


@pytest.mark.parametrize("name", environment().list_templates(extensions=["html"]))
def test_no_template_has_a_way_around(name: str) -> None:
    """Text that is added to markup is escaped without being made visible, and unquoted attributes end at a space."""
    loader = environment().loader
    assert loader is not None
    source, _, _ = loader.get_source(environment(), name)
    parsed = environment().parse(source)
    ways_around = (nodes.Concat, nodes.Add, nodes.Mod, nodes.MarkSafe, nodes.ScopedEvalContextModifier)
    assert not list(parsed.find_all(ways_around))
    assert not re.search(r"[a-z]=\{[{%]", re.sub(r"\{%.*?%\}|\{\{.*?\}\}", lambda found: found[0][:2], source))
    assert {found.name for found in parsed.find_all(nodes.Filter)} <= set(environment().filters)
    assert {"safe", "escape", "e", "join", "xmlattr", "tojson", "format", "replace"}.isdisjoint(environment().filters)


@given(TEXT, st.sampled_from(["name", "format", "token", "before", "reason", "tensor", "place", "file"]))
def test_no_text_of_a_report_becomes_an_element(text: str, place: str) -> None:
    found = Outline(page(small_report({place: text})))
    tags = [tag for tag, _, _ in found.elements]
    assert set(tags) <= tags_of_a_full_report()
    assert tags.count("script") == 1


def small_report(texts: dict[str, str]) -> dict[str, Any]:
    """A report of one artifact with these texts in it."""
    said = dict.fromkeys(("name", "format", "token", "before", "reason", "tensor", "place", "file"), "usual") | texts
    token = {"place": said["place"], "token": said["token"], "before": said["before"], "kl": 1.0}
    artifact = {
        "name": said["name"],
        "format": said["format"],
        "verdict": "fail",
        "reasons": [said["reason"]],
        "layers": [{"tensor": said["tensor"], "survival": 0.5}],
        "worst": {"tokens": [{**token, "reference_says": said["token"]}], "windows": []},
    }
    return {"artifacts": [artifact], "published": [{"artifact": said["name"], "files": {said["file"]: said["file"]}}]}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_can_be_read(value: float) -> None:
    for shown in (significant(value), fixed(value), share(value)):
        assert 1 <= len(shown) < 14
        assert "e" not in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (1e-5, "10\u207b\u2075"), (3.14159e-7, "3.14\u00d710\u207b\u2077"), (-0.25, "\u22120.25"),
        (1234.0, "1,230"), (2e9, "2\u00d710\u2079"), (None, "\u2013"),
    ],
)  # fmt: skip
def test_numbers_by_their_first_digits(value: float | None, shown: str) -> None:
    assert significant(value) == shown


def test_tokens_show_their_spaces() -> None:
    assert visible_edges(" a b  ") == "\u2423a b\u2423\u2423"
    assert visible_edges("  ") == "\u2423\u2423"
    assert visible("\u0301a\tb\r\n") == "\u25cc\u0301a\u21e5b\u27e8U+000D\u27e9\u21b5"
    assert visible("\u200d\u2066\u3164\ufe0f") == "".join(
        f"\u27e8U+{code}\u27e9" for code in ("200D", "2066", "3164", "FE0F")
    )


def test_markup_is_not_escaped_again_and_all_else_is() -> None:
    assert filled("{{ ours }}{{ theirs }}", ours=Markup("<b>&amp;</b>"), theirs="<i>\u202e") == (
        "<b>&amp;</b>&lt;i&gt;\u27e8U+202E\u27e9"
    )
    assert filled("{{ said }}", said="\"'&<>") == "&#34;&#39;&amp;&lt;&gt;"
    numbers = "{% for number in numbers %}{{ number }} {% endfor %}"
    assert filled(numbers, numbers=(None, 46.0, 0.256, 3)) == " 46 0.26 3 "
    with pytest.raises(UndefinedError, match="'mistyped' is undefined"):
        filled("{{ mistyped }}")


@given(
    st.floats(1e-9, 1e9), st.floats(1.01, 1e6), st.booleans(), st.integers(3, 9)
)  # fmt: skip
def test_ticks_lie_within_the_axis(low: float, factor: float, logarithmic: bool, most: int) -> None:
    scale = Scale(low, low * factor, 10.0, 110.0, logarithmic)
    ticks = scale.ticks(most)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= most
    assert not logarithmic or factor < 10 or ticks
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)
    assert all(10 <= scale.place(tick) <= 110 for tick in ticks)
    assert scale.place(low) == 10
    assert scale.place(low * factor) == pytest.approx(110)


def test_a_run_writes_its_page(checked: Run, tmp_path: Path) -> None:
    write_report(checked, tmp_path)
    written = (tmp_path / PAGE_NAME).read_text(encoding="utf-8")
    assert written == page(json.loads((tmp_path / "report.json").read_text()))
    said = Outline(written).said()
    assert "1 pass; 1 fail, as expected" in said
    assert report(checked)["tokens"]["sha256"] in said


def test_a_comparison_has_a_page(compared: Comparison, tmp_path: Path) -> None:
    data = comparison_data(compared)
    path = write_comparison_page(data, tmp_path / "rows.html")
    outline = Outline(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == comparison_page(json.loads(json.dumps(data)))
    found = [attributes["id"] for attributes in outline.of("section")]
    assert found == ["ledger", "size", "costs", "not-made", "provenance"]
    said = outline.said()
    assert f"Take {data['recommended']}: the smallest" in said or "No artifact keeps the recipe's limits." in said
    for row in data["rows"]:
        assert row["name"] in said
        assert row["reason"] is None or row["reason"] in said


@pytest.mark.parametrize("comparison", [{}, {"rows": [{}]}, {"rows": [{"name": HOSTILE, "drift": {"mean_kl": 1}}]}])
def test_a_comparison_that_lacks_keys_has_a_page_too(comparison: dict[str, Any]) -> None:
    outline = Outline(comparison_page(comparison))
    assert {tag for tag, _, _ in outline.elements} <= tags_of_a_full_report()


def test_a_build_writes_a_page_that_says_so(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    write_report(build(pico_recipe("bf16"), RunOptions(tmp_path)), tmp_path)
    assert "1 artifact; nothing was measured." in Outline((tmp_path / PAGE_NAME).read_text(encoding="utf-8")).said()
