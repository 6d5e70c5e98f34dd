"""Whether the Hub can be reached, as whom, and what this token may do there; asked by a child that is given a deadline.

Endpoints that stand in for the Hub need not tell who a token belongs to, so only a refusal fails. The question whether
an upload by xet is welcome is one that only a token with write permission gets an answer to: it is the proof of access.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_export.pipeline.doctor.checks import Check
from qlora_export.publish.hub.failures import NOT_SPOKEN

PROBE = "qlora_export.pipeline.doctor.hub_probe"
PROBE_SECONDS = 90
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
REFUSED = (401, 403)
NEW_TOKEN = "set HF_TOKEN to a valid token: https://huggingface.co/settings/tokens"  # noqa: S105
WRITE_TOKEN = "set HF_TOKEN to a token with write permission for it, or HF_OIDC_RESOURCE for a trusted publisher"  # noqa: S105
Facts = Mapping[str, Any]


def hub_checks(repositories: Sequence[str]) -> list[Check]:
    """Offline mode, token, endpoint, identity, and for each repository existence, access and transport."""
    facts = _probe(repositories)
    if "failure" in facts:
        return [Check("endpoint", "fail", str(facts["failure"]), "check the network, the proxy and HF_ENDPOINT")]
    return [*_of_facts(facts)]


def _of_facts(facts: Facts) -> Iterator[Check]:
    yield _offline(facts)
    yield _token(facts)
    if facts["offline"] or "whoami" not in facts:
        return
    yield _endpoint(facts)
    if facts["whoami"]["status"] is None:
        return
    if facts.get("has_token"):
        yield _identity(facts["whoami"])
    for name, told in facts["repositories"].items():
        yield from _repository(name, told, facts)


def token_source(environment: Mapping[str, str] = os.environ) -> str | None:
    """Where the Hub's client takes its token from, in its order; None when there is none."""
    if environment.get("HF_OIDC_RESOURCE"):
        return f"a trusted publisher for {environment['HF_OIDC_RESOURCE']} (HF_OIDC_RESOURCE)"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name, "").strip():
            return f"the environment ({name})"
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    path = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
    return f"the file {path}" if path.is_file() else None


def _probe(repositories: Sequence[str]) -> Facts:
    words = [sys.executable, "-P", "-m", PROBE]
    try:
        answer = subprocess.run(
            words,
            input=json.dumps({"repositories": list(repositories)}),
            env={**os.environ, **QUIET},
            check=False,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
        found: Facts = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {PROBE_SECONDS} seconds"}
    except ValueError:
        return {"failure": "the Hub's client ended without an answer"}
    return found


def _offline(facts: Facts) -> Check:
    if facts["offline"]:
        return Check("offline", "fail", "HF_HUB_OFFLINE is set: nothing can be published", "unset HF_HUB_OFFLINE")
    return Check("offline", "ok", "HF_HUB_OFFLINE is not set")


def _token(facts: Facts) -> Check:
    source = token_source()
    if (error := facts.get("token_error")) is not None:
        fix = "in GitHub Actions give the job `permissions: id-token: write`; elsewhere set HF_OIDC_ID_TOKEN"
        return Check("token", "fail", f"{source}: {error}", fix)
    if facts.get("has_token"):
        return Check("token", "ok", f"from {source or 'the client'}")
    return Check("token", "fail", "there is none", f"{NEW_TOKEN}; or HF_OIDC_RESOURCE for a trusted publisher")


def _endpoint(facts: Facts) -> Check:
    asked = facts["whoami"]
    if asked["status"] is None:
        fix = "check the network, the proxy and HF_ENDPOINT"
        return Check("endpoint", "fail", f"{facts['endpoint']} does not answer: {asked['why']}", fix)
    if asked["status"] >= 500 or asked["status"] == 429:
        return Check("endpoint", "warn", f"{facts['endpoint']} answers {asked['status']}", "try again later")
    return Check("endpoint", "ok", str(facts["endpoint"]))


def _identity(asked: Facts) -> Check:
    """Whom the token belongs to; a trusted publisher's belongs to nobody."""
    status = asked["status"]
    trusted = bool(os.environ.get("HF_OIDC_RESOURCE"))
    if status in REFUSED and not trusted:
        return Check("token.identity", "fail", f"the endpoint refuses the token ({status})", NEW_TOKEN)
    if status != 200:
        why = "a trusted publisher has none" if trusted else f"the endpoint does not tell ({status})"
        return Check("token.identity", "ok" if trusted else "warn", why)
    role = asked.get("role")
    who = f"{asked.get('name')}, role {role or 'unknown'}{_scopes(asked.get('scopes'))}"
    if role == "read":
        return Check("token.identity", "fail", f"{who}: may not write", WRITE_TOKEN)
    return Check("token.identity", "ok", who)


def _scopes(scopes: Any) -> str:
    """What a fine-grained token may do, entity by entity."""
    if not isinstance(scopes, dict):
        return ""
    scoped = [item for item in scopes.get("scoped") or () if isinstance(item, dict)]
    told = [f"{(item.get('entity') or {}).get('name')}: {', '.join(item.get('permissions') or ())}" for item in scoped]
    told += [str(item) for item in scopes.get("global") or ()]
    return f" ({'; '.join(told)})" if told else ""


def _repository(name: str, told: Facts, facts: Facts) -> Iterator[Check]:
    info, xet = told["info"], told["xet"]
    if info["status"] == 404 or info.get("code") == "RepoNotFound":
        yield _absent(name, facts)
        return
    if info["status"] == 200:
        visibility = {True: "private", False: "public"}.get(info.get("private"), "of unknown visibility")
        yield Check(f"repository.{name}", "ok", f"is there, {visibility}")
    else:
        what = f"answers {info['status']}" if info["status"] else f"does not answer: {info['why']}"
        yield Check(f"repository.{name}", "warn", what, "try again later")
    yield _access(name, xet)


def _absent(name: str, facts: Facts) -> Check:
    """A repository that is to be created, by a token that may."""
    check = f"repository.{name}"
    if os.environ.get("HF_OIDC_RESOURCE"):
        return Check(check, "fail", "is not there, and a trusted publisher creates none", "create it on the Hub first")
    who = facts["whoami"]
    owner = name.partition("/")[0]
    known = [who.get("name"), *who.get("organisations", ())]
    if who["status"] == 200 and owner not in known:
        fix = f"join {owner} with write permission, or publish to {who.get('name')}/..."
        return Check(check, "warn", f"is not there, and {owner} is none of {', '.join(map(str, known))}", fix)
    return Check(check, "ok", "is not there yet: it will be created")


def _access(name: str, xet: Facts) -> Check:
    check, status = f"access.{name}", xet["status"]
    if status == 200 and xet["xet"]:
        return Check(check, "ok", "may write, by xet")
    if status in NOT_SPOKEN or status == 200:
        return Check(check, "ok", "the endpoint has no xet: weights go by classic LFS")
    if status in REFUSED:
        return Check(check, "fail", f"this token may not write there ({status})", WRITE_TOKEN)
    what = f"answers {status}" if status else f"does not answer: {xet['why']}"
    return Check(check, "warn", what, "try again later")
