from __future__ import annotations

from tests.helpers.compared import compared, compared_recipe

__all__ = ["compared", "compared_recipe"]
