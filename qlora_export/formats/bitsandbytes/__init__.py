"""Formats of bitsandbytes: 4-bit codes of two levels of scales, and LLM.int8."""
