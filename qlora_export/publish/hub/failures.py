"""What the Hub's client raises, as errors of ours with an exit code.

The client's own errors carry a response; those of the transport and of xet do not, and their classes belong to httpx or
httpx2, whichever the client came with, so they are told by the names in their family.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qlora_export.errors import (
    EnvironmentProblem,
    ExportError,
    NotAuthorised,
    Refused,
    RemoteConflict,
    RemoteProblem,
)

AGAIN = "run the same command again: what was uploaded is not sent twice"
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
# What an endpoint answers that does not know a request; not every one that speaks the protocol speaks all of it.
NOT_SPOKEN = (404, 405, 501)
TOKEN_HINT = "set HF_TOKEN to a token that may write there, or HF_OIDC_RESOURCE for a trusted publisher"  # noqa: S105
TRUST_HINT = "name this repository and workflow among the trusted publishers in the settings of the model"
NAMES_OF_LOST_CONNECTIONS = {"TransportError", "ConnectionError", "TimeoutError"}


def translated(error: Exception, place: str) -> ExportError:
    """The error of ours for whatever went wrong at `place`, a repository; never raises."""
    if isinstance(error, ExportError):
        return error
    family = {kind.__name__ for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in family:
        return EnvironmentProblem(f"{place}: the Hub's client is offline", "unset HF_HUB_OFFLINE")
    status = status_of(error)
    if status is not None:
        if str(getattr(response_of(error), "url", "")).endswith("/oauth/token"):
            return NotAuthorised(f"{place}: the Hub does not trust this publisher: {said(error)}", TRUST_HINT)
        return _answered(status, said(error), place)
    if isinstance(error, OSError) and error.errno is not None and not is_lost_connection(error):
        return EnvironmentProblem(f"{place}: {error}", "check the disk and its permissions, then run again")
    if is_lost_connection(error):
        return RemoteProblem(f"{place}: no answer from the Hub ({type(error).__name__}: {error})", AGAIN)
    if family & {"OIDCError", "LocalTokenNotFoundError"}:
        return NotAuthorised(f"{place}: {error}", TOKEN_HINT)
    return RemoteProblem(f"{place}: {type(error).__name__}: {error}", AGAIN)


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    return status in TRANSIENT_STATUS if status is not None else is_lost_connection(error)


def is_lost_connection(error: Exception) -> bool:
    """Whether nobody knows what the server made of the request."""
    cause: BaseException | None = error
    family: set[str] = set()
    while cause is not None:
        family |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__
    return bool(family & NAMES_OF_LOST_CONNECTIONS) and "OfflineModeIsEnabled" not in family


def status_of(error: Exception) -> int | None:
    """The HTTP status that the error reports, if the Hub answered at all."""
    response = response_of(error)
    return int(response.status_code) if response is not None else None


def response_of(error: BaseException | None) -> Any:
    """The Hub's answer, which the client may have wrapped in an error of its own (uploads of large files)."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response
        error = error.__cause__
    return None


def said(error: Exception) -> str:
    """What the server wrote, in one line."""
    response = response_of(error)
    try:
        body = json.loads(response.content) if response is not None else {}
        lines = [str(body.get("error") or ""), *(str(item["message"]) for item in body.get("errors", ()))]
        told = ": ".join(line for line in lines if line)
    except (ValueError, AttributeError, TypeError, KeyError, RuntimeError):
        told = ""
    text = str(told or getattr(error, "server_message", None) or str(error).strip().splitlines()[:1] or "")
    return re.sub(r"\s+", " ", text)[:300]


def _answered(status: int, text: str, place: str) -> ExportError:
    message = f"{place}: the Hub answers {status}: {text}"
    if status in TRANSIENT_STATUS:
        return RemoteProblem(message, AGAIN)
    if status in (401, 402, 403):
        return NotAuthorised(message, TOKEN_HINT)
    if status == 404:
        return NotAuthorised(message, f"it is not there, or this token may not see it; {TOKEN_HINT}")
    if status in (409, 412):
        return RemoteConflict(message, "somebody else published there: look at it, then run again")
    return Refused(message, "the Hub does not take this; its words say why")
