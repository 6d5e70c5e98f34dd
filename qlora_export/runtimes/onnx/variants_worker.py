"""The process that runs a graph in several ways: `python -m qlora_export.runtimes.onnx.variants_worker FOLDER`.

Checks the graph by onnx's own checker first, on the file with its data. Then reads a JSON object a line, windows and
a way, and answers with an array for each window: log-probabilities, or the inner value that was asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import defs
from onnx.defs import OpSchema

from qlora_export.runtimes.onnx.answering import answers, put
from qlora_export.runtimes.onnx.cached_graph import LOGITS, CachedGraph, Rows, log_softmax
from qlora_export.runtimes.onnx.described import ADAPTER_FILE
from qlora_export.runtimes.onnx.graph_copy import add_output, cache_grows, set_accuracy_level
from qlora_export.runtimes.onnx.label_graph import LabelGraph
from qlora_export.runtimes.onnx.running_graph import WithAdapter, graph_path, running_graph

LOG_ERRORS_ONLY = 3
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
SESSION_KEYS = ("optimised", "accuracy_level", "output", "adapter")
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


class GraphVariants:
    """A graph, and the session that was asked for last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = graph_path(folder)
        self._opened: tuple[dict[str, Any], CachedGraph | LabelGraph] | None = None

    def check(self) -> None:
        """Ask onnx's checker; ends the process with what it finds."""
        know_runtime_operators()
        try:
            onnx.checker.check_model(self._path)
        except onnx.checker.ValidationError as error:
            sys.exit(f"the ONNX checker: {' '.join(str(error).split())}")

    def run(self, variant: dict[str, Any]) -> list[Rows]:
        """An array for each window."""
        key = {name: variant[name] for name in SESSION_KEYS}
        if self._opened is None or self._opened[0] != key:
            self._opened = None
            self._opened = key, self._open(**key)
        windows, output = variant["windows"], variant["output"]
        batches = [windows] if variant["batched"] else [[window] for window in windows]
        found = [rows for batch in batches for rows in self._opened[1].rows(batch, variant["decoded"], output)]
        return [log_softmax(rows) for rows in found] if output == LOGITS else found

    def _open(
        self, optimised: bool, accuracy_level: int | None, output: str, adapter: bool
    ) -> CachedGraph | LabelGraph:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = LOG_ERRORS_ONLY
        options.add_session_config_entry(DATA_FOLDER, str(self._path.parent))
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        source: str | bytes = str(self._path)
        model = onnx.load(self._path, load_external_data=False)
        grows = cache_grows(model)
        if accuracy_level is not None or output != LOGITS:
            if accuracy_level is not None:
                set_accuracy_level(model, accuracy_level)
            add_output(model, output)
            source = model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        runs = WithAdapter(session, self._folder / ADAPTER_FILE) if adapter else session
        return running_graph(runs, self._folder, grows)


def main() -> None:
    """Answer until stdin ends."""
    stream = answers()
    graph = GraphVariants(Path(sys.argv[1]))
    graph.check()
    for line in sys.stdin:
        for rows in graph.run(json.loads(line)):
            put(stream, rows)


def know_runtime_operators() -> None:
    """Register the norm that the GenAI model builder uses: RMS norm before the standard had one."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    kinds = {"axis": OpSchema.AttrType.INT, "epsilon": OpSchema.AttrType.FLOAT, "stash_type": OpSchema.AttrType.INT}
    defs.register_schema(
        OpSchema(
            "SimplifiedLayerNormalization",
            "",
            1,
            inputs=[parameter("X", "T"), parameter("scale", "V")],
            outputs=[parameter("Y", "V"), parameter("inv_std_var", "U", param_option=optional)],
            type_constraints=[(name, FLOATS, "") for name in ("T", "U", "V")],
            attributes=[OpSchema.Attribute(name, kind, "", required=False) for name, kind in kinds.items()],
        )
    )


if __name__ == "__main__":
    main()
