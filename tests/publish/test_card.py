from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import nodes

from qlora_export.artifact import Artifact
from qlora_export.catalog import ARTIFACTS
from qlora_export.errors import InputError, RemoteConflict, UsageError
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import check as run_check
from qlora_export.publish.card import CardFacts, CardItem, licence_of, make_card
from qlora_export.publish.card.block import BEGIN, END, MARKER
from qlora_export.publish.card.body import body
from qlora_export.publish.card.escaping import code, escape, literal, public_value, recipe_yaml
from qlora_export.publish.card.front_matter import split_readme
from qlora_export.publish.card.rendering import environment
from qlora_export.publish.card.snippets import served, snippet
from qlora_export.recipe.config import CardRecipe, Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import report
from qlora_export.testing.card import card_problems
from tests.helpers.pico import save_adapter, save_base

REPOSITORY = "acme/bot-nf4"
BASE = "acme/base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_LIMITS = {"perplexity_ratio": None, "mean_kl": 0.25, "same_top1": None, "gain_kept": None, "survival_min": None}
FORMS = ("bf16", "nf4", "nf4-adapter", "fp8", "adapter", "onnx-int4")


class Release:
    """Artifacts of the pico model, measured, and their report."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        run = run_check(recipe, RunOptions(out))
        self.recipe = recipe.model_dump(mode="json")
        self.report = report(run)
        assert run.ledger is not None
        self.items = {entry.artifact.name: CardItem(entry.artifact, entry.drift, "") for entry in run.ledger.entries}

    def facts(self, *names: str, **changes: Any) -> CardFacts:
        """Facts of a repository that holds one artifact at its root, or several in folders of their own."""
        items = [self.items[name] for name in names]
        if len(items) > 1:
            items = [replace(item, prefix=f"{item.artifact.name}/") for item in items]
        found = CardFacts(REPOSITORY, tuple(items), BASE, "apache-2.0", CardRecipe(), self.report, self.recipe)
        return replace(found, **changes)

    def item(self, name: str, **manifest: Any) -> CardItem:
        """An artifact whose manifest says something else."""
        item = self.items[name]
        return replace(item, artifact=replace(item.artifact, manifest={**item.manifest, **manifest}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico base whose matrices bitsandbytes' kernels for CPUs take."""
    return save_base(tmp_path_factory.mktemp("card") / "base", seed=3, intermediate_size=128)


@pytest.fixture(scope="module")
def release(base: Path, pico_text: Path) -> Release:
    data = {
        "base": str(base),
        "base_id": BASE,
        "adapter": str(save_adapter(base, base.parent / "adapter", seed=4)),
        "artifacts": [{"format": form, "on_failure": "withhold"} for form in FORMS],
        "drift": {"text": str(pico_text), "limits": NO_LIMITS},
    }
    return Release(make_recipe(data, Path(), "test"), base.parent / "out")


def metadata_of(card: str) -> dict[str, Any]:
    found = yaml.safe_load(split_readme(card).metadata)
    assert isinstance(found, dict)
    return found


def block_of(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END) + len(END)]


# What the front matter says


def test_the_front_matter_is_what_the_hub_and_its_client_read(release: Release) -> None:
    settings = CardRecipe(datasets=("acme/sft",), language=("no",), tags=("support",))
    card = make_card(release.facts("nf4", settings=settings), None)
    assert card_problems(card) == ([], [])
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == (BASE, "quantized")
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.datasets, data.language) == (["acme/sft"], ["no"])
    assert data.tags == ["support", "qlora-export", "bitsandbytes", "4-bit", "qlora"]


def test_a_folder_for_transformers_js_says_how_to_load_it_there(release: Release) -> None:
    exporter = {"options": {"layout": "transformers.js"}}
    item = release.item("onnx-int4", exporter=exporter)
    card = make_card(release.facts("onnx-int4", items=(item,)), None)
    assert card_problems(card) == ([], [])
    assert "transformers.js" in metadata_of(card)["tags"]
    assert f"AutoModelForCausalLM.from_pretrained('{REPOSITORY}')" in card
    assert "import onnxruntime_genai" in card
    for items in ((replace(item, prefix="onnx-int4/"),), (release.items["onnx-int4"],)):
        card = make_card(release.facts("onnx-int4", items=items), None)
        assert "transformers.js" not in metadata_of(card)["tags"]
        assert "npm install" not in card


def test_vllm_serves_compressed_tensors_as_they_are(release: Release) -> None:
    card = make_card(release.facts("fp8"), None)
    assert card_problems(card) == ([], [])
    assert "vllm serve acme/bot-nf4" in card
    assert "pip install transformers accelerate compressed-tensors" in card
    assert "rounded to FP8 (e4m3), activations too while it runs" in card
    assert {"compressed-tensors", "fp8"} <= set(metadata_of(card)["tags"])


def test_evaluation_results_are_our_numbers(release: Release) -> None:
    facts = release.facts("bf16", "onnx-int4")
    card = make_card(facts, None)
    assert not re.search(r"[&*]id\d", split_readme(card).metadata)
    found = ModelCard(card).data
    tokens, drift = release.report["tokens"], release.items["onnx-int4"].drift
    assert found.model_name == "bot-nf4"
    results = {result.metric_name: result for result in found.eval_results}
    onnx = results["Perplexity (onnx-int4)"]
    assert onnx.metric_value == pytest.approx(drift.perplexity, rel=1e-5)
    assert onnx.metric_args == {
        "artifact": "onnx-int4",
        "runtime": "onnxruntime",
        "protocol": f"protocol windows: {tokens['protocol']} ({tokens['windows']} windows)",
        "tokens": tokens["count"],
        "tokens_sha256": tokens["sha256"],
    }
    assert (onnx.dataset_type, onnx.dataset_name) == ("text", f"held-out text (sha256 {tokens['sha256'][:12]})")
    assert results["Perplexity (the model as trained)"].metric_value == pytest.approx(
        drift.perplexity_reference, rel=1e-5
    )
    kl = results["Mean KL divergence from the model as trained, in nats (onnx-int4)"]
    assert kl.metric_value == pytest.approx(drift.mean_kl, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "library", "relation"),
    [
        (("bf16",), "transformers", "finetune"),
        (("nf4",), "transformers", "quantized"),
        (("fp8",), "transformers", "quantized"),
        (("nf4-adapter",), "peft", "quantized"),
        (("adapter",), "peft", "adapter"),
        (("onnx-int4",), "onnx", "quantized"),
        (("onnx-int4", "bf16"), "transformers", "finetune"),
    ],
)
def test_library_and_relation(release: Release, names: tuple[str, ...], library: str, relation: str) -> None:
    found = metadata_of(make_card(release.facts(*names), None))
    assert (found["library_name"], found["base_model_relation"]) == (library, relation)


def test_dense_weights_without_an_adapter_state_no_relation(release: Release) -> None:
    sources = {**release.items["bf16"].manifest["sources"], "adapter": None}
    facts = release.facts(items=(release.item("bf16", sources=sources, training_quantization=None),))
    card = make_card(facts, None)
    assert "base_model_relation" not in metadata_of(card)
    assert "no adapter was merged into it" in card
    assert "Drift from the base" in card
    theirs = make_card(facts, "---\nbase_model_relation: merge\n---\n")
    assert metadata_of(theirs)["base_model_relation"] == "merge"


def test_every_format_has_a_card(release: Release) -> None:
    for form in ARTIFACTS:
        item = release.item("bf16")
        card = make_card(
            release.facts("bf16", items=(replace(item, artifact=replace(item.artifact, format=form)),)), None
        )
        assert card_problems(card) == ([], []), form
        assert f"pip install {' '.join(ARTIFACTS[form].packages)}" in card
    item = replace(item, artifact=replace(item.artifact, format="gguf"))
    with pytest.raises(UsageError, match="no model card can be written for the format 'gguf'"):
        make_card(release.facts("bf16", items=(item,)), None)


@pytest.mark.parametrize("base_id", ["", "runs/7/base/x", "/home/x/base", f"acme/base@{COMMIT}"])
def test_a_base_must_be_a_hub_id(release: Release, base_id: str) -> None:
    with pytest.raises(UsageError, match="is no Hub id"):
        make_card(release.facts("bf16", base_id=base_id), None)


def test_an_other_licence_has_a_name(release: Release) -> None:
    with pytest.raises(UsageError, match="the licence is 'other'"):
        make_card(release.facts("bf16", license="other"), None)
    card = make_card(
        release.facts("bf16", license="other", settings=CardRecipe(license_name="acme-1", license_link="LICENSE")), None
    )
    assert card_problems(card) == ([], [])
    assert make_card(release.facts("bf16", license="other"), card) == card
    changed = metadata_of(make_card(release.facts("bf16", license="mit"), card))
    assert changed["license"] == "mit"
    assert not {"license_name", "license_link"} & set(changed)


# What people wrote


def test_keys_of_people_survive_with_their_comments_and_order(release: Release) -> None:
    existing = (
        "---\n# about us\nzeta:   {b: 1,  a: 2}   # odd\nlicense: mit  # was once\n"
        "widget:\n- text: |\n    # no comment\n    hi\n\n# above the tags\n"
        "tags:\n- friendly # ours\n- nf4\n# of the release\nrelease: 2024-13-45\n# the end\n---\nHello.\n"
    )
    card = make_card(release.facts("nf4"), existing)
    assert card.startswith(
        "---\n# about us\nzeta:   {b: 1,  a: 2}   # odd\nlicense: apache-2.0\n"
        "widget:\n- text: |\n    # no comment\n    hi\n\n# above the tags\n"
        "tags:\n- friendly # ours\n- nf4\n- qlora-export\n- bitsandbytes\n- 4-bit\n- qlora\n"
        "# of the release\nrelease: 2024-13-45\n# the end\nbase_model: acme/base\n"
    )
    assert "\n---\nHello.\n\n<!-- qlora-export:begin -->\n" in card


def test_a_value_that_is_right_keeps_its_form(release: Release) -> None:
    existing = (
        "---\nbase_model:   ['acme/base'] # ours\nlicense: \"apache-2.0\"   # inherited\n"
        "tags: [x, qlora-export, qlora]\n---\n"
    )
    card = make_card(release.facts("bf16"), existing)
    assert card.startswith(existing.removesuffix("---\n"))


@pytest.mark.parametrize("tags", ["tags: friendly\n", "tags: [friendly]\n", "tags:\n  - friendly\n"])
def test_tags_of_people_stay(release: Release, tags: str) -> None:
    card = make_card(release.facts("bf16"), f"---\n{tags}---\n")
    assert metadata_of(card)["tags"] == ["friendly", "qlora-export", "qlora"]


def test_evaluation_results_of_people_stay(release: Release) -> None:
    theirs = {
        "task": {"type": "x"},
        "dataset": {"name": "GLUE", "type": "glue"},
        "metrics": [{"type": "f1", "value": 1}],
    }
    index = [{"name": "bot-nf4", "results": [theirs]}, {"name": "old", "results": [theirs]}]
    existing = f"---\n{yaml.safe_dump({'model-index': index})}---\n"
    card = make_card(release.facts("bf16"), existing)
    found = metadata_of(card)["model-index"]
    assert [model["name"] for model in found] == ["bot-nf4", "old"]
    assert found[0]["results"][0] == theirs
    assert [len(model["results"]) for model in found] == [2, 1]
    again = metadata_of(make_card(release.facts("nf4"), card))["model-index"]
    assert [len(model["results"]) for model in again] == [2, 1]
    assert "Perplexity (bf16)" not in str(again)


def test_windows_lines_and_a_byte_order_mark_survive(release: Release) -> None:
    existing = "\ufeff---\r\nlicense: mit\r\nx: 1\r\n---\r\n# Bot\r\n\r\nProse.\r\n"
    card = make_card(release.facts("bf16"), existing)
    assert card.startswith("\ufeff---\r\nlicense: apache-2.0\r\nx: 1\r\n")
    assert "---\r\n# Bot\r\n\r\nProse.\r\n\r\n<!-- qlora-export:begin -->\r\n" in card
    assert not re.search(r"(?<!\r)\n", card)


def test_a_rule_below_the_front_matter_is_prose(release: Release) -> None:
    prose = "Above\n\n---\nlicense: mit\n---\nBelow\n"
    card = make_card(release.facts("bf16"), f"---\nlicense: mit\n---\n{prose}")
    assert split_readme(card).prose.startswith(prose)
    assert metadata_of(card)["license"] == "apache-2.0"
    assert split_readme(make_card(release.facts("bf16"), prose)).prose.startswith(prose)


def test_an_empty_front_matter_is_filled(release: Release) -> None:
    card = make_card(release.facts("bf16"), "---\n---\nProse\n\n---\n")
    assert metadata_of(card)["license"] == "apache-2.0"
    assert split_readme(card).prose.startswith("Prose\n\n---\n\n<!-- qlora-export:begin -->")


@pytest.mark.parametrize("existing", [None, "", "\n", "---\nx: 1\n---", "---\nx: 1\n---\n\n"])
def test_a_readme_without_prose_gets_a_title(release: Release, existing: str | None) -> None:
    card = make_card(release.facts("bf16"), existing)
    assert f"\n---\n\n# bot-nf4\n\n{BEGIN}\n" in card or f"\n---\n\n\n# bot-nf4\n\n{BEGIN}\n" in card
    assert card.endswith(f"\n{END}\n")


@pytest.mark.parametrize(
    ("existing", "message"),
    [
        ("---\nx: 1\nlicense: [mit\n---\n", r"README\.md: line 3: not valid YAML"),
        ("---\nx: 1\ny: a: b\n---\n", r"README\.md: line 3: not valid YAML"),
        ("---\njust words\n---\n", r"README\.md: line 2: the front matter is a str, not a mapping"),
        ("---\n- a\n---\n", r"README\.md: line 2: the front matter is a list, not a mapping"),
        ("---\nx: 1\nlicense: a\nlicense: b\n---\n", r"README\.md: line 4: a second key 'license'"),
        ("---\nx: \x00\n---\n", r"README\.md: line 2: not valid YAML"),
        ("---\nlicense: &l mit\nx: *l\n---\n", r"README\.md: its front matter cannot be edited"),
        ("---\n{license: mit, x: 1}\n---\n", r"README\.md: its front matter cannot be edited"),
        ("---\nx: 1\n? license\n: mit\n---\n", r"README\.md: its front matter cannot be edited"),
        (f"---\nx: {'[' * 600}\n---\n", r"README\.md: line 2"),
    ],
)
def test_front_matter_that_cannot_be_edited_is_refused(release: Release, existing: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_card(release.facts("bf16"), existing)
    assert caught.value.hint


# The block


def test_only_the_text_between_the_markers_is_replaced(release: Release) -> None:
    first = make_card(release.facts("bf16"), None)
    edited = first.replace("# bot-nf4", "# Our bot  \n\nOurs \\ `x` | {{}}").replace("## How to load it", "## Hacked")
    edited += "Afterwards\r\n\tand tabs  "
    card = make_card(release.facts("bf16"), edited)
    assert "# Our bot  \n\nOurs \\ `x` | {{}}\n\n<!-- qlora-export:begin -->" in card
    assert card.endswith(f"{END}\nAfterwards\r\n\tand tabs  ")
    assert block_of(card) == block_of(first)


@pytest.mark.parametrize(
    ("prose", "message"),
    [
        (f"{BEGIN}\nx\n", "line 2: .*begin.* has no end below it"),
        (f"a\n{END}\n", "line 3: .*end.* has no begin above it"),
        (f"{END}\n{BEGIN}\n", "line 2: .*end.* has no begin above it"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", "line 3: .*begin.* is the second one"),
        (f"{BEGIN}\n{END}\n\n{BEGIN}\n{END}\n", "line 5: .*begin.* is the second one"),
        (f"{BEGIN}\n{END}\n  {END}", "line 4: .*end.* is the second one"),
    ],
)
def test_a_block_that_was_torn_apart_is_refused(release: Release, prose: str, message: str) -> None:
    with pytest.raises(RemoteConflict, match=message):
        make_card(release.facts("bf16"), f"\n{prose}")


def test_markers_inside_a_sentence_are_prose(release: Release) -> None:
    prose = f"Leave `{BEGIN}` and {END} alone.\n"
    card = make_card(release.facts("bf16"), prose)
    assert split_readme(card).prose.startswith(prose)
    assert make_card(release.facts("bf16"), card) == card


PIECES = st.sampled_from(
    [
        "---",
        "--- ",
        "\n",
        "\r\n",
        "\r",
        "\ufeff",
        " ",
        "license: mit",
        "tags: [a]",
        "x: |",
        "  y",
        "# T",
        BEGIN,
        END,
        "a",
    ]
)


@settings(suppress_health_check=[HealthCheck.filter_too_much], max_examples=100)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join)))
@example("---\nlicense: mit\n---\nx")
@example("---\n---")
@example("\ufeff# T")
def test_prose_survives_and_a_second_time_changes_nothing(release: Release, existing: str) -> None:
    facts = release.facts("bf16")
    try:
        card = make_card(facts, existing)
    except (InputError, RemoteConflict):
        assume(False)
    assert make_card(facts, card) == card
    before, after = split_readme(existing).prose, split_readme(card).prose
    old, new = list(MARKER.finditer(before)), list(MARKER.finditer(after))
    start, end = (old[0].start(1), old[1].end(1)) if old else (len(before), len(before))
    assert after[: new[0].start(1)].startswith(before[:start])
    assert after[new[1].end(1) :].startswith(before[end:])


# The text


def test_the_card_tells_what_it_is_and_how_far_it_drifted(release: Release) -> None:
    card = make_card(release.facts("nf4"), None)
    assert (
        "`acme/base` with the adapter `adapter` merged into its weights, rounded to bitsandbytes NF4 (4 bits). " in card
    )
    assert "The delta was added to the base as training saw it" in card
    assert "mean KL at most 0.25" in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 1
    assert f"{release.items['nf4'].drift.perplexity:.4f}" in rows[-1]
    assert f"qlora-export verify {REPOSITORY}@COMMIT" in card
    assert "[qlora-export/report.json](qlora-export/report.json)" in card


def test_the_delta_on_the_original_weights_is_told(release: Release) -> None:
    card = make_card(release.facts(items=(release.item("bf16", onto="original"),)), None)
    assert "the base's original weights, not to the nf4 weights that training saw" in card


def test_numbers_are_those_of_the_published_report(release: Release) -> None:
    item = release.items["bf16"]
    other = replace(item, drift=replace(item.drift, perplexity=12345.0))
    assert make_card(release.facts(items=(other,)), None) == make_card(release.facts("bf16"), None)
    unknown = {**release.report, "artifacts": []}
    assert "12345.0000" in make_card(release.facts(items=(other,), report=unknown), None)


def test_numbers_that_are_not_finite_do_not_break_the_card(release: Release) -> None:
    reference = {**release.report["reference"], "merged": {**release.report["reference"]["merged"], "mean_kl": None}}
    card = make_card(release.facts("bf16", report={**release.report, "reference": reference}), None)
    assert "| merged, 16 bit |" in card


def test_no_machine_path_is_shown(release: Release, base: Path) -> None:
    card = make_card(release.facts(*FORMS), None)
    assert str(base.parent) not in card
    shown = yaml.safe_load(re.findall("```yaml\n(.*?)```", card, re.DOTALL)[0])
    assert (shown["base"], shown["drift"]["text"]) == ("base", "text.jsonl")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/x/runs/7/", "7"),
        ("~/runs/7", "7"),
        ("C:\\Users\\x\\7", "7"),
        ("key:/etc/keys/release.pem", "key:release.pem"),
        ("folder:/home/x/registry", "folder:registry"),
        ("file:///home/x/base", "base"),
        ("runs/7", "runs/7"),
        ("acme/base@main", "acme/base@main"),
        ("https://example.org/a", "https://example.org/a"),
        ("*.down_proj", "*.down_proj"),
        ({"a": None, "b": [], "c": 0, "d": False, "e": {"f": "/x/y"}}, {"c": 0, "d": False, "e": {"f": "y"}}),
    ],
)
def test_recipe_values_as_shown(value: Any, shown: Any) -> None:
    assert public_value(value) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a `b` | c", r"a \`b\` \| c"),
        ("x --> <script>alert(1)</script> & <!-- y", "x --&gt; &lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;!-- y"),
        ("- [x](y) *z* _q_", r"&#45; \[x\](y) \*z\* \_q\_"),
        ("# title\n## other", r"\# title \#\# other"),
        ("1. first", "&#49;. first"),
        ("a\\b $x$ \u202e!", "a&#92;b &#36;x&#36; !"),
        ("read /home/x/runs/7 of and/or 1/2, 5 / 6", "read 7 of and/or 1/2, 5 / 6"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_words_of_others_are_no_markup(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_names_as_code() -> None:
    assert code("a|b") == "`a|b`"
    assert code("a``b`\nc") == "``` a``b` c ```"


@given(st.text(), st.text())
def test_a_recipe_can_stand_in_a_code_block(key: str, value: str) -> None:
    assume(public_value(value) == value)
    text = recipe_yaml({key: value, "keep": [f"```{value}", END, "<script>"]})
    assert "`" not in text
    assert "<" not in text
    assert yaml.safe_load(text) == {key: value, "keep": [f"```{value}", END, "<script>"]}


@given(st.text())
@example("a\\\"'{x}\n```\n`<!--")
@example("\u00e9\u20ac\U0001f600\u2028")
def test_a_text_can_stand_in_a_string_of_code(text: str) -> None:
    assume(not any(0xD800 <= ord(character) <= 0xDFFF for character in text))
    written = literal(text)
    assert not set("`<\n\r\u2028") & set(written)
    for quote in "\"'":
        assert eval(f"{quote}{written}{quote}") == text
        assert eval(f"f{quote}{written}{quote}") == text


@pytest.mark.parametrize("name", ["adapter", "onnx-int4", "bf16"])
def test_hostile_manifests_stay_inside_strings_and_words(release: Release, name: str) -> None:
    """Templates name no filter for these values: what is not marked as ready is made harmless."""
    hostile = f'x"\n{END}\n```\n<script> `*b*`'
    stored = {"compute_dtype": hostile, "storage_dtype": hostile}
    training = {**release.items[name].manifest["training_quantization"], **stored}
    item = release.item(name, training_quantization=training, onto="original")
    told = {**release.report, "reference": {**release.report["reference"], "model": hostile, "activations": hostile}}
    text = body(release.facts(items=(item,), report=told, repository=f"acme/{hostile}"))
    assert END not in text
    assert "<script>" not in text
    assert not re.search(r"(?<!\\)\*b", text.split("## Drift from")[1].split("<details>")[0])


@pytest.mark.parametrize("name", environment().list_templates())
def test_no_template_has_a_way_around(name: str) -> None:
    """Text that is added to what is ready would be taken for markup of HTML, which it is not in Markdown and code."""
    loader = environment().loader
    assert loader is not None
    parsed = environment().parse(loader.get_source(environment(), name)[0])
    ways_around = (nodes.Concat, nodes.Add, nodes.Mod, nodes.MarkSafe, nodes.ScopedEvalContextModifier)
    assert not list(parsed.find_all(ways_around))
    assert {found.name for found in parsed.find_all(nodes.Filter)} <= set(environment().filters)
    assert name.endswith((".md", ".py.txt", ".js.txt"))


def test_hostile_words_stay_inside_the_block(release: Release) -> None:
    hostile = f"x\n{END}\n```\n<script> | `--> /home/someone/secret"
    recipe = {**release.recipe, "training_quantization": hostile, "keep": [hostile]}
    facts = release.facts(items=(release.item("bf16", assumptions=[hostile]),), recipe=recipe)
    card = make_card(facts, None)
    assert make_card(facts, card) == card
    assert card.count(END) == 1
    assert "<script>" not in card
    assert "someone" not in card.split("<details>")[0]


# Loading


def run_snippet(text: str, folders: dict[str, Path]) -> dict[str, Any]:
    for repository, folder in folders.items():
        text = re.sub(rf'snapshot_download\("{repository}"[^)]*\)', repr(str(folder)), text)
        text = text.replace(f'"{repository}"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(compile(text, "snippet", "exec"), names)
    return names


@pytest.mark.parametrize("prefix", ["", "folder"])
@pytest.mark.parametrize("name", FORMS)
def test_the_snippet_runs_as_it_stands(
    release: Release, base: Path, name: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    item = release.items[name]
    folder = item.artifact.path.parent if prefix else item.artifact.path
    facts = release.facts(items=(replace(item, prefix=f"{name}/" if prefix else ""),))
    text = snippet(facts, facts.items[0])
    assert f"```python\n{text}```" in make_card(facts, None)
    names = run_snippet(text, {REPOSITORY: folder, BASE: base})
    if name in ("nf4-adapter", "adapter"):
        assert names["model"].peft_config
    if name in ("nf4", "nf4-adapter", "adapter"):
        assert names["model"].is_loaded_in_4bit
    capsys.readouterr()


def test_a_correction_must_be_loaded_and_is_not_the_adapter(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is that of nf4-adapter, which is loaded in the same way."""
    item = release.items["nf4-adapter"]
    facts = release.facts(items=(replace(item, artifact=replace(item.artifact, format="nf4-lowrank")),))
    card = make_card(facts, None)
    assert card_problems(card) == ([], [])
    assert (metadata_of(card)["library_name"], metadata_of(card)["base_model_relation"]) == ("peft", "quantized")
    assert "merged into its weights, rounded to bitsandbytes NF4 (4 bits)" in card
    assert "The LoRA adapter in `adapter/` was not trained: it corrects what rounding these weights left wrong" in card
    names = run_snippet(snippet(facts, facts.items[0]), {REPOSITORY: item.artifact.path})
    assert names["model"].peft_config
    capsys.readouterr()


def test_the_adapter_names_the_pinned_base_and_its_training(release: Release) -> None:
    recipe = {**release.recipe, "base": f"{BASE}@{COMMIT}"}
    training = {
        **release.items["adapter"].manifest["training_quantization"],
        "double_quant": False,
        "block_size": 128,
        "provenance": "stated",
    }
    recipe["training_quantization"] = "nf4,block=128,skip=lm_head,skip=router"
    facts = release.facts(items=(release.item("adapter", training_quantization=training),), recipe=recipe)
    card = make_card(facts, None)
    assert f'    "{BASE}", revision="{COMMIT}",\n    quantization_config=quantization,' in card
    assert "bnb_4bit_use_double_quant=False" in card
    assert 'llm_int8_skip_modules=["lm_head", "router"]' in card
    assert "Training quantised in blocks of 128 values" in card
    other = replace(facts, base_id="acme/other")
    assert "revision=" not in make_card(other, None)


def test_an_adapter_of_16_bit_training_loads_a_16_bit_base(release: Release) -> None:
    training = {**release.items["adapter"].manifest["training_quantization"], "quant_type": "none"}
    facts = release.facts(items=(release.item("adapter", training_quantization=training),))
    assert "BitsAndBytesConfig" not in make_card(facts, None)


def test_vllm_is_told_only_where_it_opens_the_folder(release: Release) -> None:
    told = {name: served(release.facts(name), release.items[name]) for name in FORMS}
    assert {name for name, command in told.items() if command} == {"bf16", "fp8"}
    assert told["bf16"] == f"vllm serve {REPOSITORY}"
    assert "vllm serve" not in make_card(release.facts("bf16", "nf4"), None)


def test_a_classifier_is_loaded_as_one(release: Release, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    item = release.items["bf16"]
    facts = release.facts(items=(CardItem(replace(item.artifact, path=tmp_path), item.drift, ""),))
    files = {"config.json": {"bytes": 1, "sha256": ""}}
    facts = replace(facts, items=(replace(facts.items[0], artifact=_with_files(facts.items[0].artifact, files)),))
    card = make_card(facts, None)
    assert metadata_of(card)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "vllm" not in card


@pytest.mark.parametrize("prefix", ["", "w4a16/"])
def test_groups_with_zero_points_are_for_vllm(release: Release, tmp_path: Path, prefix: str) -> None:
    """vLLM is not here to run it: that it is Python, and what it opens, can still be told."""
    groups = {"group_0": {"weights": {"symmetric": False}}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = {"config.json": {"bytes": 1, "sha256": ""}}
    artifact = _with_files(replace(release.items["fp8"].artifact, path=tmp_path), files)
    item = replace(release.items["fp8"], artifact=artifact, prefix=prefix)
    assert item.packages == ("vllm",)
    text = snippet(release.facts("fp8"), item)
    compile(text, "snippet", "exec")
    assert "transformers" not in text
    assert (f'LLM("{REPOSITORY}")' in text) == (not prefix)
    assert ('LLM(f"{folder}/w4a16")' in text) == bool(prefix)
    assert not release.items["fp8"].has_zero_points


def _with_files(artifact: Artifact, files: dict[str, Any]) -> Artifact:
    return replace(artifact, manifest={**artifact.manifest, "files": files})


# The base's licence


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: llama3.1\n---\n", "llama3.1"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: ''\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_of_a_base(tmp_path: Path, readme: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert licence_of(tmp_path) == licence


def test_a_base_without_a_readable_readme_states_no_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\nx: \xff\n---\n")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) is None
