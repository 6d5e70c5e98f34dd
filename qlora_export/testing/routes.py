"""Which request goes to which function: the Hub's addresses, one line each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import unquote

from qlora_export.testing import collection, committing, discussions, identity, reading, transfer, writing
from qlora_export.testing.card import check_card
from qlora_export.testing.messages import Answer, Refusal, Request
from qlora_export.testing.service import Service, identify

Work = Callable[[Service, Request], Answer]


@dataclass(frozen=True)
class Route:
    """A method, the form of an address, and who answers."""

    method: str
    address: re.Pattern[str]
    work: Work


_WORDS = {
    "ID": r"(?P<owner>[^/]+)/(?P<name>[^/]+)",
    "API": r"/api/(?P<kind>models|datasets|spaces)/(?P<owner>[^/]+)/(?P<name>[^/]+)",
    "FILES": r"/(?P<kind>datasets/|spaces/)?(?P<owner>[^/]+)/(?P<name>[^/]+)",
    "REV": r"(?P<revision>refs/pr/\d+|[^/]+)",
    "PATH": r"(?P<path>.+)",
    "TICKET": r"/uploads/(?P<ticket>[0-9a-f]+)",
    "NUMBER": r"(?P<number>\d+)",
}


def _route(method: str, form: str, work: Work) -> Route:
    return Route(method, re.compile(re.sub(r"\b[A-Z]{2,}\b", lambda word: _WORDS[word[0]], form)), work)


ROUTES = (
    _route("GET", "/api/whoami-v2", identity.whoami),
    _route("POST", "/oauth/token", identity.exchange_token),
    _route("POST", "/api/validate-yaml", check_card),
    _route("POST", "/api/repos/create", writing.create_repository),
    _route("DELETE", "/api/repos/delete", writing.delete_repository),
    _route("POST", "/api/collections", collection.create_collection),
    _route("GET", "/api/collections/ID", collection.describe_collection),
    _route("POST", "/api/collections/ID/items?", collection.add_item),
    _route("DELETE", "/api/collections/ID/items/(?P<item>[^/]+)", collection.remove_item),
    _route("GET", "API", reading.describe),
    _route("GET", "API/auth-check(/(?P<access>write))?", identity.check_access),
    _route("PUT", "API/settings", writing.change_settings),
    _route("GET", "API/revision/REV", reading.describe),
    _route("GET", "API/tree/REV(/PATH)?", reading.list_tree),
    _route("POST", "API/paths-info/REV", reading.list_paths),
    _route("GET", "API/commits/REV", reading.list_commits),
    _route("GET", "API/refs", reading.list_references),
    _route("POST", "API/preupload/REV", writing.announce_files),
    _route("POST", "API/commit/REV", committing.receive_commit),
    _route("POST", "API/tag/REV", writing.put_tag),
    _route("DELETE", "API/tag/REV", writing.delete_tag),
    _route("POST", "API/branch/REV", writing.put_branch),
    _route("DELETE", "API/branch/REV", writing.delete_branch),
    _route("GET", "API/xet-(?P<access>read|write)-token/REV", transfer.xet_token),
    _route("POST", "/xet/v1/xorbs/default/[0-9a-f]+", transfer.receive_xorb),
    _route("POST", "/xet/v1/shards", transfer.receive_shard),
    _route("POST", "API/discussions", discussions.start_discussion),
    _route("GET", "API/discussions", discussions.list_discussions),
    _route("GET", "API/discussions/NUMBER", discussions.describe_discussion),
    _route("POST", "API/discussions/NUMBER/merge", discussions.merge_pull_request),
    _route("POST", "API/discussions/NUMBER/status", discussions.change_status),
    _route("POST", r"FILES\.git/info/lfs/objects/batch", transfer.announce_large_files),
    _route("PUT", "TICKET", transfer.receive_file),
    _route("PUT", r"TICKET/part/(?P<part>\d+)", transfer.receive_part),
    _route("POST", "TICKET/complete", transfer.complete_parts),
    _route("POST", "TICKET/verify", transfer.verify_file),
    _route("GET", "FILES/resolve/REV/PATH", reading.resolve),
)


def answer(service: Service, request: Request) -> Answer:
    """The Hub's answer; raises HangUp when it closes the connection instead."""
    try:
        known = identify(service, request)
        method = "GET" if request.method == "HEAD" else request.method
        path = _below(service, request.path)
        for route in ROUTES:
            if route.method == method and (found := route.address.fullmatch(path)) is not None:
                words = {name: unquote(word) for name, word in found.groupdict().items() if word is not None}
                return route.work(service, replace(known, path=path, words=words))
        raise Refusal(404, f"This Hub has no {request.method} {request.path}")
    except Refusal as refusal:
        if service.faults.strikes("refusals-tell-token"):
            refusal.message = f"{refusal.message} (Authorization: {request.headers.get('Authorization', 'none')})"
        return refusal.answer()
    except (KeyError, TypeError, ValueError) as error:
        return Refusal(400, f"The request is not understood: {error!r}").answer()


def _below(service: Service, path: str) -> str:
    """The path without the prefix of this Hub's addresses; empty for what it does not know."""
    prefix, without = service.rules.prefix, service.rules.without
    known = path.startswith(f"{prefix}/") and not any(word in path for word in without)
    return path.removeprefix(prefix) if known else ""
