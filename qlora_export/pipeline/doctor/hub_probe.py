"""The child process that asks the Hub: one question on stdin, facts on stdout, both JSON; never a token.

It alone imports huggingface_hub, so that the environment it was given is the one it reads, and a client that hangs can
be ended. The facts: where the token comes from, whether the endpoint answers, whose token it is and what it may do, and
for each repository whether it is there and what the endpoint says to an upload by xet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.utils import build_hf_headers


def facts(question: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was asked, as far as it got."""
    found: dict[str, Any] = {"offline": constants.HF_HUB_OFFLINE, "endpoint": HfApi().endpoint}
    try:
        token = get_token()
    except Exception as error:  # noqa: BLE001  a trusted publisher that cannot get its token; said by its message
        return {**found, "token_error": _words(error, None)}
    found["has_token"] = token is not None
    if constants.HF_HUB_OFFLINE:
        return found
    found["whoami"] = _asked(f"{found['endpoint']}/api/whoami-v2", token)
    found["repositories"] = {
        name: {
            "info": _asked(f"{found['endpoint']}/api/models/{name}", token),
            "xet": _asked(f"{found['endpoint']}/api/models/{name}/xet-write-token/{quote('main', safe='')}", token),
        }
        for name in question["repositories"]
    }
    return found


def _asked(address: str, token: str | None) -> dict[str, Any]:
    """Status, error code and the few facts of an answer that matter; or why there is none."""
    try:
        answer = get_session().get(address, headers=build_hf_headers(token=token or False), timeout=20)
    except Exception as error:  # noqa: BLE001  whatever kept it from answering is the finding
        return {"status": None, "why": _words(error, token)}
    try:
        body = answer.json()
    except ValueError:
        body = {}
    known = body if isinstance(body, dict) else {}
    access = (known.get("auth") or {}).get("accessToken") or {}
    return {
        "status": answer.status_code,
        "code": answer.headers.get("X-Error-Code"),
        "name": known.get("name"),
        "organisations": [item.get("name") for item in known.get("orgs") or ()],
        "private": known.get("private"),
        "role": access.get("role"),
        "scopes": access.get("fineGrained"),
        "xet": "x-xet-cas-url" in {name.lower() for name in answer.headers},
    }


def _words(error: Exception, token: str | None) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return text.replace(token, "[redacted]") if token else text


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts(json.load(sys.stdin))))
