"""Numerics without files and models."""

from qlora_export.quant.numba_cache import lock_cache

lock_cache()
