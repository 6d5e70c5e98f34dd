"""Release tool for QLoRA fine-tunes: merge, re-quantise, measure, publish."""

__version__ = "0.1.0"
