"""Publishers by the kind of their destination, loaded only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from qlora_export.catalog import PUBLISHERS, load
from qlora_export.publish.base import Publisher


def load_publisher(to: str) -> Callable[..., Publisher]:
    """What opens a destination `KIND:PLACE`, given the recipe, the run folder and the environment to publish in."""
    kind, _, _ = to.partition(":")
    return cast(Callable[..., Publisher], load(PUBLISHERS, "publisher", kind))
