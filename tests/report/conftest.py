from __future__ import annotations

from tests.compared import compared, compared_recipe

__all__ = ["compared", "compared_recipe"]
