"""Who am I, may I, and tokens for trusted publishers."""

from __future__ import annotations

import base64
import binascii
import json

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import USER, Service, readable, writable

PUBLISHER_SECONDS = 3600


def whoami(service: Service, request: Request) -> Answer:
    """The user of the token."""
    if request.caller.role == "anonymous":
        raise Refusal(401, "Invalid username or password.")
    organisations = [
        {"type": "org", "id": name, "name": name, "fullname": name, "isEnterprise": False, "roleInOrg": "admin"}
        for name in service.organisations
    ]
    access = {"displayName": USER, "role": request.caller.role}
    user = {"type": "user", "id": USER, "name": USER, "fullname": "Rehearsal", "isPro": False, "canPay": False}
    return json_answer({**user, "orgs": organisations, "auth": {"type": "access_token", "accessToken": access}})


def check_access(service: Service, request: Request) -> Answer:
    """Whether the caller may read the repository, or write to it when the path says so."""
    writing = request.words.get("access") == "write"
    (writable if writing else readable)(service, request)
    return json_answer({})


def exchange_token(service: Service, request: Request) -> Answer:
    """A short-lived token for one repository, in exchange for the identity token of a CI job."""
    asked = request.json()
    if asked.get("grant_type") != "urn:ietf:params:oauth:grant-type:token-exchange":
        raise Refusal(400, "unsupported_grant_type")
    resource = str(asked.get("resource", ""))
    if not _is_identity_token(str(asked.get("subject_token", ""))) or resource not in service.repositories:
        raise Refusal(400, "invalid_grant")
    token = service.new_publisher(resource)
    return json_answer({"access_token": token, "token_type": "bearer", "expires_in": PUBLISHER_SECONDS})


def _is_identity_token(token: str) -> bool:
    parts = token.split(".")
    if len(parts) != 3:
        return False
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(claims, dict)
