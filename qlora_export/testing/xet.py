"""The requests of an upload by xet, answered as if all went well; the bytes are not kept.

It is enough to try how a publisher behaves where the endpoint speaks xet: its commit names large files by sha256, and
the listing shows them. What was sent cannot be downloaded again.
"""

from __future__ import annotations

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import Service


def receive_xorb(service: Service, request: Request) -> Answer:
    """A block of chunks."""
    _require_xet(service, request)
    return json_answer({"was_inserted": True})


def receive_shard(service: Service, request: Request) -> Answer:
    """The list of what files consist of."""
    _require_xet(service, request)
    return json_answer({"result": 1})


def _require_xet(service: Service, request: Request) -> None:
    request.body.drain()
    if not service.rules.xet:
        raise Refusal(404, "This Hub has no xet")
