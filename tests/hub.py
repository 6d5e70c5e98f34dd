"""A read-only Hub on this machine: what huggingface_hub asks for when it downloads models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(/(?P<kind>revision|tree)/(?P<revision>[^/?]+))?")


class Hub:
    """Repositories by name, each a folder at one commit; `requests` is what was asked for."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        self.endpoint = ""

    def commit(self, repository: str) -> str:
        """The only commit."""
        return hashlib.sha1(repository.encode(), usedforsecurity=False).hexdigest()

    def downloaded(self) -> list[str]:
        """Weight files that were fetched whole."""
        return [
            path.rsplit("/", 1)[-1]
            for method, path, span in self.requests
            if method == "GET" and path.endswith(".safetensors") and span is None
        ]


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve repositories until the block ends."""
    served = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(served: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
            """Nothing on stderr."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            served.requests.append((self.command, path, self.headers.get("Range")))
            if (found := API.fullmatch(path)) is not None:
                self._describe(found, body)
            elif (found := RESOLVE.fullmatch(path)) is not None:
                self._file(found, body)
            else:
                self._refuse("EntryNotFound", body)

        def _known(self, found: re.Match[str], body: bool) -> bool:
            repository, revision = found["repository"], found["revision"]
            if repository not in served.repositories:
                self._refuse("RepoNotFound", body)
                return False
            if revision not in (None, "main", served.commit(repository)):
                self._refuse("RevisionNotFound", body)
                return False
            return True

        def _describe(self, found: re.Match[str], body: bool) -> None:
            if not self._known(found, body):
                return
            folder, commit = served.repositories[found["repository"]], served.commit(found["repository"])
            files = [(path.name, path.stat().st_size, _oid(path)) for path in sorted(folder.iterdir())]
            data: Any = {
                "id": found["repository"],
                "sha": commit,
                "siblings": [{"rfilename": file[0]} for file in files],
            }
            if found["kind"] == "tree":
                data = [{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in files]
            self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)

        def _file(self, found: re.Match[str], body: bool) -> None:
            if not self._known(found, body):
                return
            path = served.repositories[found["repository"]] / found["file"]
            if not path.is_file():
                self._refuse("EntryNotFound", body)
                return
            data, status = path.read_bytes(), 200
            headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": served.commit(found["repository"])}
            if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) is not None:
                last = min(int(span[2] or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {span[1]}-{last}/{len(data)}"
                data, status = data[int(span[1]) : last + 1], 206
            self._send(status, data, headers, body)

        def _refuse(self, code: str, body: bool) -> None:
            self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Handler


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
