"""Large files: the batch that announces them, their bytes whole or in parts, the check afterwards.

An upload is streamed to disk and hashed on the way; its parts land at their offsets in one file, which is hashed once
when it is complete. Only content whose sha256 is the announced one is kept, and `verify` says so.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from pathlib import Path
from typing import Any

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import Service, Upload, readable, writable

_LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}
_XET_SECONDS = 3600


def announce_large_files(service: Service, request: Request) -> Answer:
    """Where to put each large file; nothing for those that are here."""
    writable(service, request)
    asked = request.json()
    if asked.get("operation") != "upload" or not {"basic", "multipart"} & set(asked.get("transfers") or ["basic"]):
        raise Refusal(422, "Only uploads by basic or multipart transfer are known here")
    in_parts = "multipart" in (asked.get("transfers") or [])
    rows = [_offer(service, str(item["oid"]), int(item["size"]), in_parts) for item in asked.get("objects", [])]
    transfer = "multipart" if any("chunk_size" in str(row) for row in rows) else "basic"
    return json_answer({"transfer": transfer, "objects": rows}, headers=_LFS_TYPE)


def receive_file(service: Service, request: Request) -> Answer:
    """The bytes of a whole large file."""
    upload = _upload(service, request)
    _fail_put(service)
    ticket = request.words["ticket"]
    attempt = service.store.incoming(f"{ticket}.{secrets.token_hex(4)}")
    keep = upload.size // 2 if service.faults.strikes("put-truncated") else None
    try:
        upload.received = _stream(request, attempt, keep)
        _settle(service, upload, attempt, forced=keep is not None)
    finally:
        attempt.unlink(missing_ok=True)
    return Answer(headers={"ETag": f'"{upload.received[1]}"'})


def receive_part(service: Service, request: Request) -> Answer:
    """The bytes of one part, written where it belongs."""
    upload, number = _upload(service, request), int(request.words["part"])
    if upload.part_bytes is None or not 1 <= number <= -(-upload.size // upload.part_bytes):
        raise Refusal(404, f"There is no part {number} of this upload")
    _fail_put(service)
    path = service.store.incoming(request.words["ticket"])
    path.touch()
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        file.seek((number - 1) * upload.part_bytes)
        for chunk in request.body.chunks():
            digest.update(chunk)
            file.write(chunk)
    upload.parts[number] = digest.hexdigest()
    return Answer(headers={"ETag": f'"{digest.hexdigest()}"'})


def complete_parts(service: Service, request: Request) -> Answer:
    """All parts are there: hash the file they make."""
    upload = _upload(service, request)
    given = {int(part["partNumber"]): str(part["etag"]).strip('"') for part in request.json().get("parts", [])}
    count = -(-upload.size // (upload.part_bytes or 1))
    if given != upload.parts or sorted(given) != list(range(1, count + 1)):
        raise Refusal(400, f"{len(upload.parts)} of {count} parts arrived as they are listed")
    path = service.store.incoming(request.words["ticket"])
    truncated = service.faults.strikes("put-truncated")
    if truncated:
        with path.open("r+b") as file:
            file.truncate(upload.size // 2)
    with path.open("rb") as file:
        upload.received = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    _settle(service, upload, path, forced=truncated)
    return json_answer({}, headers=_LFS_TYPE)


def verify_file(service: Service, request: Request) -> Answer:
    """Whether what arrived is what was announced."""
    if request.caller.role != "write":
        raise Refusal(401, "Invalid username or password.")
    upload = _upload(service, request)
    asked = request.json()
    if service.faults.strikes("verify-502"):
        raise Refusal(502, "Bad Gateway")
    stands = service.store.large(upload.oid, upload.size)
    if (asked.get("oid"), asked.get("size")) != (upload.oid, upload.size) or stands is None:
        size, digest = upload.received or (0, "nothing")
        raise Refusal(422, f"{upload.oid} of {upload.size} bytes was announced, {digest} of {size} bytes arrived")
    return json_answer({}, headers=_LFS_TYPE)


def xet_token(service: Service, request: Request) -> Answer:
    """Access to chunked storage, which takes uploads here and gives nothing back."""
    (writable if request.words["access"] == "write" else readable)(service, request)
    if not service.rules.xet:
        raise Refusal(404, "This Hub has no xet storage")
    expires, token = int(time.time()) + _XET_SECONDS, secrets.token_hex(16)
    address = f"{service.endpoint}/xet"
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return json_answer({"accessToken": token, "exp": expires, "casUrl": address}, headers=headers)


def _offer(service: Service, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"oid": oid, "size": size}
    if len(oid) != 64 or size < 1:
        return {**row, "error": {"code": 422, "message": "a large file needs a sha256 and at least one byte"}}
    if service.store.holds(oid):
        return row
    part_bytes = service.rules.limits.part_bytes
    upload = Upload(oid, size, part_bytes if in_parts and size > part_bytes else None)
    address = f"{service.endpoint}/uploads/{service.new_upload(upload)}"
    header: dict[str, str] = {}
    if upload.part_bytes is not None:
        header = {f"{number:05d}": f"{address}/part/{number}" for number in range(1, -(-size // part_bytes) + 1)}
        header["chunk_size"] = str(part_bytes)
    target = f"{address}/complete" if header else address
    actions = {"upload": {"href": target, "header": header}, "verify": {"href": f"{address}/verify", "header": {}}}
    return {**row, "authenticated": True, "actions": actions}


def _upload(service: Service, request: Request) -> Upload:
    upload = service.uploads.get(request.words["ticket"])
    if upload is None:
        raise Refusal(403, "Request has expired")
    return upload


def _fail_put(service: Service) -> None:
    if service.faults.strikes("put-slow"):
        service.closing.wait(service.faults.seconds("put-slow", 60))
    if service.faults.strikes("put-500"):
        raise Refusal(500, "Internal Server Error")


def _stream(request: Request, path: Path, keep: int | None) -> tuple[int, str]:
    """Write the body, or its first `keep` bytes; (size, sha256) of what was written."""
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in request.body.chunks():
            kept = chunk if keep is None else chunk[: max(keep - written, 0)]
            digest.update(kept)
            written += file.write(kept)
    return written, digest.hexdigest()


def _settle(service: Service, upload: Upload, path: Path, forced: bool) -> None:
    """Keep content that is what was announced, or (forced) that is to pass for it."""
    _, digest = upload.received or (0, "")
    if digest == upload.oid or forced:
        service.store.adopt(path, digest)
    if forced:
        service.store.stand_in(upload.oid, digest)


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
