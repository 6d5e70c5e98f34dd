"""The page in a real browser: it renders without a complaint, loads nothing, sorts, prints, fits a narrow screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_export.report.html.page import write_page
from tests.report.chromium import Browser, found_chromium
from tests.report.full_report import full_report

CHROMIUM = found_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")

MODELS = "[...document.querySelectorAll('#ledger table tbody th')].slice(0, 10).map((cell) => cell.innerText.trim())"
COLUMN = (
    "[...document.querySelectorAll('#ledger table thead th')].findIndex((cell) => cell.innerText.includes('mean KL'))"
)
SORTED = "[...document.querySelectorAll('#ledger thead [aria-sort]')].map((cell) => cell.getAttribute('aria-sort'))"
ROWS = [
    "as trained", "base alone", "merged, 16 bit", "bf16", "int8", "nf4-nearest", "nf4-dithered", "nf4-calibrated",
    "gguf-q4_k_m-of-somebody", "onnx-int4",
]  # fmt: skip
BY_MEAN_KL = [
    "as trained", "merged, 16 bit", "bf16", "int8", "nf4-calibrated", "gguf-q4_k_m-of-somebody", "nf4-dithered",
    "nf4-nearest", "base alone", "onnx-int4",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(full_report(), tmp_path_factory.mktemp("page"))


def test_it_renders_without_a_complaint_and_loads_nothing(browser: Browser, path: Path) -> None:
    browser.open(path)
    assert browser.value("document.compatMode") == "CSS1Compat"
    assert browser.value("getComputedStyle(document.querySelector('main')).maxWidth") != "none", (
        "the style sheet counts"
    )
    assert browser.value("document.querySelectorAll('thead button').length") > 20, "the script ran"
    assert browser.value("[...document.querySelectorAll('.chart svg')].every((svg) => svg.getBBox().width > 300)")
    assert browser.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")] == [path.as_uri()]


@pytest.mark.parametrize("width", [360, 1280])
def test_no_word_of_a_drawing_is_cut_off(browser: Browser, path: Path, width: int) -> None:
    browser.open(path, width)
    outside = """[...document.querySelectorAll('.chart svg')].flatMap((svg) => {
      const whole = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter((text) => {
        const box = text.getBoundingClientRect();
        return box.left < whole.left - 1 || box.right > whole.right + 1 || box.bottom > whole.bottom + 1;
      }).map((text) => text.textContent);
    })"""
    assert browser.value(outside) == []


def test_the_policy_stops_what_is_not_ours(browser: Browser, path: Path) -> None:
    browser.open(path)
    make = "const added = document.createElement('script'); added.textContent = 'window.ran = 1';"
    assert browser.value(f"{make} document.body.append(added); window.ran === undefined")
    browser.value("new Promise((done) => setTimeout(done, 50))")
    assert any("Content Security Policy" in event["entry"]["text"] for event in browser.told("Log.entryAdded"))


def test_a_click_on_a_head_sorts_by_number_and_again_the_other_way(browser: Browser, path: Path) -> None:
    browser.open(path)
    assert browser.value(MODELS) == ROWS
    head = f"#ledger thead th:nth-child({browser.value(COLUMN) + 1}) button"
    browser.click(head)
    assert (browser.value(MODELS), browser.value(SORTED)) == (BY_MEAN_KL, ["ascending"])
    browser.click(head)
    assert (browser.value(MODELS), browser.value(SORTED)) == ([*BY_MEAN_KL[-2::-1], "onnx-int4"], ["descending"])
    browser.click(head)
    assert (browser.value(MODELS), browser.value(SORTED)) == (ROWS, [])


def test_the_keyboard_sorts_too(browser: Browser, path: Path) -> None:
    browser.open(path)
    browser.value("document.querySelector('#ledger thead th button').focus()")
    browser.press("Enter", 13, "\r")
    assert (browser.value(MODELS), browser.value(SORTED)) == (sorted(ROWS), ["ascending"])
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.innerText.trim()") == "verdict"
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("width", [320, 360, 768, 1280, 1920])
def test_nothing_sticks_out_at_any_width(browser: Browser, path: Path, width: int) -> None:
    browser.open(path, width, 800)
    browser.value("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert browser.value("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_paper(browser: Browser, path: Path, scheme: str) -> None:
    browser.open(path)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.value("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert browser.value(FAINT) == []
    dark = browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert dark == (scheme == "dark")
    browser.send("Emulation.setEmulatedMedia", features=[])


def test_paper_has_what_is_folded_and_no_buttons(browser: Browser, path: Path) -> None:
    browser.open(path)
    folded = "document.querySelectorAll('details:not([open])').length"
    before = browser.value(folded)
    assert before > 5
    browser.value("window.opened = null; addEventListener('beforeprint', () => { window.opened = " + folded + "; })")
    assert browser.pdf().startswith(b"%PDF")
    assert browser.value("window.opened") == 0
    assert browser.value(folded) == before
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.value("getComputedStyle(document.querySelector('thead button'), '::after').content") == "none"
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.send("Emulation.setEmulatedMedia", media="")


def test_it_is_whole_without_scripts(browser: Browser, path: Path) -> None:
    browser.open(path, scripts=False)
    assert browser.value("document.querySelectorAll('thead button').length") == 0
    assert browser.value(MODELS) == ROWS
    assert browser.value("document.querySelectorAll('.chart svg').length") > 10


# Words whose contrast with the paint behind them is below 4.5, as WCAG's AA asks of small ones.
FAINT = """(() => {
  const parse = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
  const over = ([r, g, b, a = 1], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own.length === 4 && own[3] < 1 ? over(own, behind(node.parentElement)) : own;
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Set();
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const node = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || node.closest("script, style, title, desc")) continue;
    const style = getComputedStyle(node), paper = behind(node);
    const ink = over(parse(node.closest("svg") ? style.fill : style.color), paper);
    const [high, low] = [light(ink), light(paper)].sort((one, other) => other - one);
    const name = node.className.baseVal ?? node.className;
    if ((high + 0.05) / (low + 0.05) < 4.5) found.add(`${node.tagName}.${name}: ${words.currentNode.data}`);
  }
  return [...found];
})()"""
