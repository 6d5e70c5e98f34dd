"""Folders that are not what they seem: what each is refused with, before anything of them is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from qlora_export.errors import ExportError, InputError, Refused
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.options import RunOptions
from qlora_export.runtimes.onnx.folder import open_graph
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.checkpoint import read_json
from tests.helpers.files import edit_json
from tests.helpers.graphs import Spoil


def located(location: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        next(entry for entry in model.graph.initializer[3].external_data if entry.key == "location").value = location

    return edit


def cut_short(folder: Path) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)


def linked(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "model.onnx.data").rename(elsewhere)
    (folder / "model.onnx.data").symlink_to(elsewhere)


def no_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no graph")


def without_data(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def named(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        model = read_json(folder / "genai_config.json")["model"]
        edit_json(folder / "genai_config.json", model={**model, "decoder": {**model["decoder"], "filename": text}})

    return edit


def one_input_more(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1]))


def no_past(model: Any) -> None:
    kept = [value for value in model.graph.input if not value.name.startswith("past")]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def another_head(model: Any) -> None:
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_value = 3


def no_present(model: Any) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize("location", ["../secret.onnx.data", "/etc/passwd", "onnx/../../model.onnx.data", ".."])
def test_data_elsewhere_is_refused(spoiled: Spoil, location: str) -> None:
    folder = spoiled(located(location))
    with pytest.raises(Refused, match="tensor 'cos_cache' lies in .*, which is no plain name of a data file"):
        open_graph(folder)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (cut_short, InputError, r"tensor '.+' ends at byte \d+, model.onnx.data has 1000"),
        (without_data, InputError, r"lies in model.onnx.data, which is not there"),
        (linked, Refused, r"model.onnx.data: leads out of the folder, to .*elsewhere"),
        (no_graph, InputError, r"model.onnx: is no ONNX graph"),
        (named("../copied/model.onnx"), Refused, "names '../copied/model.onnx', which leads out of the folder"),
        (named("/etc/passwd"), Refused, "which leads out of the folder"),
        (named("other.onnx"), InputError, r"other.onnx: missing"),
        (named(""), InputError, "names no graph"),
    ],
)
def test_files_that_are_wrong(copied: Path, edit: Callable[[Path], None], error: type[Exception], says: str) -> None:
    edit(copied)
    with pytest.raises(error, match=says):
        open_graph(copied)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (one_input_more, "has the input 'pixel_values', which no decoder with a cache has"),
        (no_past, "has no cache: no input begins with past_key_values"),
        (another_head, r"another past_key_values.0.key than floating-point .* with 2 heads of 16 values"),
        (no_present, r"has no output present.1.value for its input past_key_values.1.value"),
    ],
)
def test_a_graph_that_is_not_ours(spoiled: Spoil, edit: Callable[[Any], None], says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_graph(spoiled(edit))


@pytest.mark.parametrize(("edit", "code"), [(cut_short, 5), (linked, 4), (no_graph, 5)])
def test_a_check_ends_before_anything_is_measured(
    graphs: Path, copied: Path, pico_text: Path, tmp_path: Path, edit: Callable[[Path], None], code: int
) -> None:
    edit(copied)
    question = CheckRequest(str(copied), str(graphs / "bf16"))
    with pytest.raises(ExportError) as caught:
        check_against(question, {"text": str(pico_text)}, (), RunOptions(tmp_path / "out"))
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_the_runtime_itself_looks_first(copied: Path) -> None:
    linked(copied)
    with pytest.raises(Refused, match="leads out of the folder"), load_runtime("onnxruntime").open(copied):
        pass
