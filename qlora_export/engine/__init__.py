"""Building artifacts: one pass over the base, row block by row block, into folders that are whole or not there."""

from qlora_export.engine.build import build
from qlora_export.engine.export import export
from qlora_export.engine.finished_artifacts import finished
from qlora_export.engine.options import BuildOptions, Engine

__all__ = ["BuildOptions", "Engine", "build", "export", "finished"]
