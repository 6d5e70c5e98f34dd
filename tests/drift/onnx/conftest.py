from __future__ import annotations

from tests.helpers.graphs import copied, graphs, spoiled

__all__ = ["copied", "graphs", "spoiled"]
