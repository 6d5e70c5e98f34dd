"""The GenAI model builder as `python -m`, with its own command line, run so that weights stay in files.

What is changed is where bytes are kept on their way, never what they are: weights are mapped instead of copied, what is
stacked goes to a file, tensors are converted and rounded while they are written. So its memory does not grow with the
model. Where a release of transformers or of the builder has other hooks it runs as it is, with more memory.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

from qlora_export.exporters.onnx.mapped_weights import map_weights, stack_in_files
from qlora_export.exporters.onnx.stated_architecture import follow_config
from qlora_export.exporters.onnx.streamed_rounding import stream_rounding
from qlora_export.exporters.onnx.streamed_tensors import stream_matrices

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    """Run the builder."""
    # Its folder of modules joins the path while its package is imported.
    import_module("onnxruntime_genai.models")
    follow_config(import_module("builders"))
    keep_in_files(Path(sys.argv[sys.argv.index("-c") + 1]))
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


def keep_in_files(folder: Path) -> None:
    """Have the builder of this process keep weights in files, those without a name in a folder."""
    # Its folder of modules joins the path while its package is imported.
    import_module("onnxruntime_genai.models")
    model_class = import_module("builders.base").Model
    map_weights()
    stack_in_files(folder)
    stream_matrices(model_class)
    stream_rounding(model_class)


if __name__ == "__main__":
    main()
