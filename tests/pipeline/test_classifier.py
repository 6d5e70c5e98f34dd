"""A sequence classifier from adapter to release: its labels are measured, and a text without them is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import peft
import pytest
import torch
import transformers

from qlora_export.drift.classification import labelled_tokens
from qlora_export.drift.protocols import token_set
from qlora_export.drift.window_sizes import SizedProtocol, recorded_protocol
from qlora_export.errors import ExportError, InputError, Refused, UsageError
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.compare import compare
from qlora_export.pipeline.measure import texts_of
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.pipeline.release import check as run_check
from qlora_export.pipeline.release import release as run_release
from qlora_export.planning.make import make_plan
from qlora_export.publish.hub.job import REPORT_PATH
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.comparison import print_comparison
from qlora_export.report.data import write_report
from qlora_export.report.junit import junit
from qlora_export.report.run import Run
from qlora_export.report.schemas import report_schema
from qlora_export.report.terminal import print_ledger, print_publication
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.runtimes.classifier import ClassifierSession
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.model_config import label_names
from qlora_export.sources.text import read_text
from qlora_export.testing import HubServer
from qlora_export.training import record
from tests.helpers.pico import save_base

WORDS = ["order", "broken", "money", "back", "sorry", "late", "parcel", "refund", "thanks", "great"]
LABELS = ("bad", "fine", "good")
COUNT = 100  # the fewest that limits judge
FREE = {"gain_kept": 0.9, "same_top1": 0.5, "mean_kl": 0.05, "perplexity_ratio": 1.2}
QLORA = transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A base in 16 bits that names its labels, an adapter with a head, and texts with labels."""

    base: Path
    adapter: Path
    text: Path

    def recipe(self, *artifacts: Any, **drift: Any) -> Recipe:
        data = {
            "base": str(self.base),
            "base_id": "acme/base",
            "adapter": str(self.adapter),
            "artifacts": list(artifacts),
        }
        stated = {"text": str(self.text), "limits": FREE, "trace": "never", **drift}
        return make_recipe({**data, "drift": stated}, Path(), "test")


def lines_of(count: int) -> Lines:
    """Texts of unequal lengths, labelled by number and by name."""
    chance = random.Random(0)
    texts = (" ".join(chance.choices(WORDS, k=chance.randint(2, 12))) for _ in range(count))
    return [{"text": text, "label": chance.choice((0, 1, 2, *LABELS))} for text in texts]


def write_lines(path: Path, lines: Lines) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def save_classifier(base: Path, folder: Path, quantised: bool, seed: int = 2) -> Path:
    """An adapter with a head of three labels, trained on 4 bits with a sidecar, or on 16 bits."""
    torch.manual_seed(seed)
    options = {"quantization_config": QLORA} if quantised else {}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, dtype=torch.bfloat16, device_map={"": "cpu"}, **options
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                parameter.normal_(std=0.05)
    live.save_pretrained(folder)
    if quantised:
        record(live, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("classifier")
    base = save_base(folder / "base", 1, num_hidden_layers=1, pad_token_id=0, id2label=dict(enumerate(LABELS)))
    return Trained(
        base, save_classifier(base, folder / "adapter", True), write_lines(folder / "t.jsonl", lines_of(COUNT))
    )


@pytest.fixture(scope="module")
def measured(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A check of a merged folder, a rounded one and the adapter on its own, and its run folder."""
    out = tmp_path_factory.mktemp("run")
    nf4 = {"format": "nf4", "rounding": "nearest", "limits": {"mean_kl": 0}}
    recipe = trained.recipe("bf16", nf4, "adapter", trace="failing")
    run = run_check(recipe, RunOptions(out))
    write_report(run, out)
    return run, out


def said_by(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What transformers and peft make of each text alone, as log-probabilities."""
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits.float() for text in texts]
    found: np.ndarray[Any, np.dtype[np.float32]] = torch.log_softmax(torch.cat(logits), -1).numpy()
    return found


def test_it_says_what_peft_says(trained: Trained, tmp_path: Path) -> None:
    adapter = save_classifier(trained.base, tmp_path / "adapter", False)
    recipe = Trained(trained.base, adapter, trained.text).recipe("bf16", "fp32")
    plan = make_plan(recipe.model_copy(update={"training_quantization": "none"}), tmp_path)
    assert plan.adapter is not None
    reference = trained_model(plan)
    tokens = reference.tokens(texts_of(recipe).drift, reference.tokenizer(), recipe.drift)
    session = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training).tuned()
    auto = transformers.AutoModelForSequenceClassification
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(trained.base, num_labels=3).float(), adapter).eval()
    texts = [json.loads(line)["text"] for line in trained.text.read_text().splitlines()[:40]]
    expected = said_by(model, transformers.AutoTokenizer.from_pretrained(trained.base), texts)
    found = np.concatenate([session.log_probabilities(window.fed) for window in tokens.windows[:40]])
    assert found.shape == (40, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 0.1, "it must not say the same of everything"


@pytest.mark.parametrize("pad", [3, None, -1])
def test_texts_of_a_batch_do_not_see_each_other(measured: tuple[Run, Path], pad: int | None) -> None:
    run, _ = measured
    session = ClassifierSession(load_model(run.artifacts[0].path, dtype=torch.float32))
    session._model.config.pad_token_id = pad
    assert run.ledger is not None
    windows = [window.fed for window in run.ledger.tokens.windows[:9]]
    assert len({len(window) for window in windows}) > 3
    together = session.rows_at(windows, [(0,)] * len(windows))
    for window, rows in zip(windows, together, strict=True):
        np.testing.assert_allclose(rows, session.log_probabilities(window), atol=1e-5)


def test_drift_is_that_of_the_label_distributions(measured: tuple[Run, Path]) -> None:
    ledger = measured[0].ledger
    assert ledger is not None
    assert ledger.base is None
    assert ledger.merged is not None
    assert ledger.merged.mean_kl < 1e-5
    bf16, nf4, adapter = ledger.entries
    assert bf16.drift.mean_kl < 1e-4
    assert bf16.verdict.outcome == "pass", bf16.verdict.reasons
    assert 1e-4 < nf4.drift.mean_kl < 0.2
    assert adapter.drift.mean_kl == 0
    assert all(entry.drift.gain_kept is None and entry.limits.gain_kept is None for entry in ledger.entries)
    assert nf4.drift.survival_min is not None
    assert 0.2 < nf4.drift.survival_min < 1.2
    assert ledger.noise is not None
    assert ledger.noise.tokens == ledger.tokens.count == COUNT
    assert nf4.findings.trace is not None
    assert any(layer.name == "score" for layer in nf4.findings.trace.layers)


def test_accuracy_and_perplexity_are_those_of_the_labels(measured: tuple[Run, Path], trained: Trained) -> None:
    run, _ = measured
    assert run.ledger is not None
    lines = [json.loads(line) for line in trained.text.read_text().splitlines()]
    right = np.array([LABELS.index(line["label"]) if line["label"] in LABELS else line["label"] for line in lines])
    folder = run.artifacts[1].path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = said_by(model, transformers.AutoTokenizer.from_pretrained(folder), [line["text"] for line in lines])
    entry = run.ledger.entries[1]
    assert entry.findings.labels is not None
    # Its layers multiply in bfloat16, ours in float32: a near-tie may fall either way.
    assert abs(entry.findings.labels.accuracy - (found.argmax(-1) == right).mean()) <= 2 / COUNT
    assert entry.drift.perplexity == pytest.approx(np.exp(-found[np.arange(COUNT), right].mean()), rel=0.01)
    flips = [flip for flip in entry.findings.labels.flipped if flip.reference == flip.answer]
    assert len(flips) == entry.findings.labels.lost
    assert 1 - entry.drift.same_top1 == pytest.approx(len(entry.findings.labels.flipped) / COUNT)
    assert {name for flip in entry.findings.labels.flipped for name in (flip.answer, flip.candidate)} <= set(LABELS)
    assert entry.findings.worst is not None
    assert not entry.findings.worst.windows
    worst = entry.findings.worst.tokens
    assert all({item.token, item.reference_says, item.candidate_says} <= set(LABELS) for item in worst)


def test_every_report_speaks_of_labels(measured: tuple[Run, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, out = measured
    print_ledger(run)
    told = capsys.readouterr().out
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    data = json.loads((out / "report.json").read_text())
    jsonschema.validate(data, report_schema())
    assert data["tokens"]["labels"] == list(LABELS)
    assert data["artifacts"][1]["labels"]["items"] == COUNT
    for text in (told, markdown):
        assert f"of {COUNT} labels right" in text
        assert f"{COUNT} labels" in text
        assert "protocol labels: every text for itself" in text
        assert f"{COUNT} tokens" not in text
    for words in (
        f"on {COUNT} labels of held-out text",
        "KL by label",
        "Worst labels",
        "What the models predict",
        f"{COUNT} labels",
    ):
        assert words in page
    assert "| 0 | 100% |  | 100% | reference |" in markdown, "a classifier has no gain"
    assert "single tokens" not in page
    assert "Worst tokens" not in page
    assert "tokens are too few" not in junit(data)


def test_labels_may_be_numbers_names_or_digits(trained: Trained) -> None:
    tokenizer = FolderTokenizer(trained.base)
    protocol = SizedProtocol("labels", "labels", 8, labels=LABELS)

    def sha256(*labels: int | str) -> str:
        lines = [{"text": "order late", "label": label} for label in labels]
        text = read_text(write_lines(trained.base.parent / "spelled.jsonl", lines))
        return labelled_tokens(text, tokenizer, protocol, None).sha256

    assert sha256(2, 0) == sha256("good", "bad") == sha256("2", "0") != sha256(2, 1)


def test_a_cut_and_a_limit_are_told(trained: Trained) -> None:
    tokenizer = FolderTokenizer(trained.base)
    texts = ("late", "order broken money back " * 5, "a")
    lines = [{"text": text, "label": label} for label, text in enumerate(texts)]
    text = read_text(write_lines(trained.base.parent / "long.jsonl", lines))
    tokens = labelled_tokens(text, tokenizer, SizedProtocol("labels", "labels", 8, labels=LABELS), 2)
    assert "at most 8 tokens (1 of 2 cut)" in tokens.protocol.sentence
    expected = transformers.AutoTokenizer.from_pretrained(trained.base)(texts[1], truncation=True, max_length=8)
    assert tokens.windows[1].fed == tuple(expected["input_ids"])
    assert tokens.count == 2


def test_a_pair_is_read_as_the_tokenizer_joins_it(trained: Trained) -> None:
    tokenizer = FolderTokenizer(trained.base)
    lines = [{"text": "late", "text_pair": "parcel", "label": 0}]
    text = read_text(write_lines(trained.base.parent / "pair.jsonl", lines))
    tokens = labelled_tokens(text, tokenizer, SizedProtocol("labels", "labels", 8, labels=LABELS), None)
    expected = transformers.AutoTokenizer.from_pretrained(trained.base)("late", "parcel")["input_ids"]
    assert tokens.windows[0].tokens == (*expected, 0)


GOOD: Lines = [{"text": "late", "label": 0}]
BAD: dict[str, tuple[Lines, dict[str, Any], type[ExportError], str]] = {
    "no-label": ([*GOOD, {"text": "late"}], {}, InputError, r"t\.jsonl: line 2 has no label"),
    "no-name": ([*GOOD, {"text": "late", "label": True}], {}, InputError, r"line 2 has no label that is a number or"),
    "high": (
        [*GOOD, {"text": "late", "label": 3}],
        {},
        InputError,
        r"line 2 has label 3, which the model does",
    ),
    "unknown": ([{"text": "late", "label": "odd"}], {}, InputError, r"line 1 has label 'odd', which the model"),
    "empty": ([*GOOD, {"text": "", "label": 1}], {}, InputError, r"line 2 has no token to read"),
    "chats": ([{"messages": [{"role": "user", "content": "a"}]}], {}, UsageError, "and these are chats"),
    "protocol": (GOOD, {"protocol": "windows"}, UsageError, "protocol windows is for language models"),
    "context": (GOOD, {"window_tokens": 4096}, UsageError, "windows of 4096 tokens, and the model's context is 2048"),
    "prompts": (GOOD, {"prompts": "TEXT"}, UsageError, "drift.prompts is for language models"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(
    trained: Trained, tmp_path: Path, case: str
) -> None:
    lines, drift, kind, message = BAD[case]
    text = write_lines(tmp_path / "t.jsonl", lines)
    drift = {key: str(text) if value == "TEXT" else value for key, value in drift.items()}
    recipe = Trained(trained.base, trained.adapter, text).recipe("bf16", **drift)
    with pytest.raises(kind, match=message) as raised:
        run_check(recipe, RunOptions(tmp_path / "out"))
    assert raised.value.hint
    if case != "empty":
        assert not (tmp_path / "out").exists()


def test_a_language_model_has_no_labels(pico_recipe: Callable[..., Recipe], trained: Trained, tmp_path: Path) -> None:
    recipe = pico_recipe("bf16", drift={"text": str(trained.text), "protocol": "labels"})
    with pytest.raises(UsageError, match="protocol labels is for classifiers"):
        run_check(recipe, RunOptions(tmp_path / "out"))


def test_weights_of_4_bits_beside_a_new_head_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="artifact nf4-adapter: transformers cannot load quantised weights beside"):
        run_check(trained.recipe("bf16", "nf4-adapter"), RunOptions(tmp_path / "out"))


def test_one_label_is_no_classifier() -> None:
    with pytest.raises(Refused, match="one label is a regression"):
        label_names({"id2label": {"0": "score"}})
    with pytest.raises(Refused, match="several labels a text"):
        label_names({"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"})
    with pytest.raises(InputError, match="has no 1"):
        label_names({"id2label": {"0": "a", "2": "b"}})
    assert label_names({}) == ("LABEL_0", "LABEL_1")


def test_a_folder_is_checked_against_the_model_that_it_should_be(
    measured: tuple[Run, Path], trained: Trained, tmp_path: Path
) -> None:
    run, _ = measured
    bf16, nf4, _ = (artifact.path for artifact in run.artifacts)
    assert run.ledger is not None

    def checked(artifact: Path, against: Path | str) -> Any:
        found = check_against(
            CheckRequest(str(artifact), str(against)), {"text": str(trained.text)}, [], RunOptions(tmp_path)
        )
        assert found.ledger is not None
        return found.ledger.entries[0]

    again = checked(nf4, f"{trained.base}+{trained.adapter}")
    assert again.drift.mean_kl == pytest.approx(run.ledger.entries[1].drift.mean_kl, rel=1e-3)
    assert again.findings.labels == run.ledger.entries[1].findings.labels
    assert checked(bf16, bf16).drift.mean_kl == 0
    with pytest.raises(InputError, match="a language model, and the reference is a classifier"):
        checked(trained.base, bf16)
    with pytest.raises(InputError, match="a classifier, and the reference is a language model"):
        checked(bf16, trained.base)


def remade(told: dict[str, Any], trained: Trained) -> str:
    """The tokens of a report, made again from the text and what the report tells."""
    protocol = recorded_protocol(told)
    return token_set(read_text(trained.text), FolderTokenizer(trained.base), protocol, told["limit"]).sha256


def test_what_is_released_is_proven_and_quotes_no_text(
    measured: tuple[Run, Path], trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(measured[1], tmp_path / "out"))
    data = trained.recipe("bf16").model_dump(mode="json", exclude={"publish"})
    publish = {"to": "hub:acme/bot", "card": {"license": "apache-2.0"}}
    recipe = make_recipe({**data, "publish": publish}, Path(), "test")
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_rehearsal", "HF_HUB_OFFLINE": "0"}
        run = run_release(recipe, RunOptions(out, publisher_environment=environment))
        report, card = (hub.repositories["acme/bot"].read("main", name).decode() for name in (REPORT_PATH, "README.md"))
    (receipt,) = run.receipts
    assert run.ledger is not None
    assert receipt.proof is not None
    assert receipt.proof.nll == pytest.approx(receipt.proof.nll_released, abs=1e-6)
    print_publication(run)
    assert f"nats a label over {COUNT} labels as released" in capsys.readouterr().out
    assert remade(json.loads(report)["tokens"], trained) == run.ledger.tokens.sha256
    told = json.loads(report)["artifacts"][0]["labels"]
    assert told["items"] == COUNT
    assert "flipped" not in told
    for words in (f"of {COUNT} labels right", "label by label", "type: accuracy", "AutoModelForSequenceClassification"):
        assert words in card


def test_formats_are_compared(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_export.drift.comparison.speed.LEAST_SECONDS", 0)
    found = compare(trained.recipe("bf16"), RunOptions(tmp_path), ["bf16", "int8", "nf4-adapter"])
    print_comparison(found)
    told = capsys.readouterr().out
    assert f"{COUNT} labels, protocol labels" in told
    rows = {row.name: row for row in found.rows}
    assert rows["int8"].measured is not None
    assert rows["int8"].measured.entry.drift.mean_kl < 0.01
    assert rows["nf4-adapter"].reason is not None
    assert "beside a classifier's head" in rows["nf4-adapter"].reason
