"""The GenAI model builder as `python -m`, with its own command line, made to follow what configurations state."""

from __future__ import annotations

import runpy
from importlib import import_module

from qlora_export.exporters.onnx.stated_architecture import follow_config

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    """Run the builder."""
    # Its folder of modules joins the path while its package is imported.
    import_module("onnxruntime_genai.models")
    follow_config(import_module("builders"))
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
