"""The HTTP side: one thread per connection, bodies streamed, every request recorded before it is answered."""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

from qlora_export.testing.attributes import DEFAULT_ATTRIBUTES, is_large
from qlora_export.testing.messages import Answer, Body, FileSpan, HangUp, Record, Request
from qlora_export.testing.repository import Repository
from qlora_export.testing.routes import answer
from qlora_export.testing.service import Rules, Service
from qlora_export.testing.storage import BlobStore, FileEntry, read_chunks


class HubServer:
    """A Hub on this machine, serving while its `with` block runs; the keywords after `port` are those of `Rules`.

    Without a `token` everybody may write; with one, requests without it may only read what is public and
    `read:TOKEN` may read everything. Contents lie under `root`, by default in a folder that goes when the block ends.
    Artifact servers that stand in for the Hub have an address with a path, `prefix`, and answer 404 to requests that
    they do not know: those with one of the words of `without` in their path, as in `/whoami-v2` or `/commits/`.
    """

    def __init__(self, root: Path | None = None, *, faults: Sequence[str] = (), port: int = 0, **rules: Any) -> None:
        self.collections: dict[str, list[dict[str, Any]]] = {}
        self.endpoint = ""
        self._root, self._port, self._faults = root, port, tuple(faults)
        self._rules = Rules(**rules)
        self._records: list[Record] = []
        self._service: Service | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            root = self._root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hub-")))
            service = Service(self._rules, BlobStore(root, self._rules.xet), self._faults, self.collections)
            server = stack.enter_context(_Server(self._port, service, self._records))
            self.endpoint = service.endpoint = f"http://127.0.0.1:{server.server_port}{self._rules.prefix}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            self._service, self._stack = service, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def repositories(self) -> Mapping[str, Repository]:
        """All repositories by name."""
        return MappingProxyType(self._running.repositories)

    @property
    def requests(self) -> list[Record]:
        """What was asked so far."""
        return list(self._records)

    def add_repository(self, name: str, folder: Path, private: bool = False) -> str:
        """Serve a folder, subfolders too, as the first commit of a new repository; the commit's id."""
        repository = self._running.new_repository(name, private)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return repository.begin({path.relative_to(folder).as_posix(): self._entry(path) for path in paths}).oid

    def _entry(self, path: Path) -> FileEntry:
        store, size = self._running.store, path.stat().st_size
        if size and (is_large(DEFAULT_ATTRIBUTES, path.name) or size > self._rules.limits.regular_bytes):
            return store.refer(path)
        return store.keep(path.read_bytes())

    @property
    def _running(self) -> Service:
        if self._service is None:
            raise RuntimeError("the Hub is not serving yet: use it inside its `with` block")
        return self._service


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, port: int, service: Service, records: list[Record]) -> None:
        self.service, self.records = service, records
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Close the door and all open connections, then wait for their threads."""
        self.service.closing.set()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Nothing on stderr."""

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        body = Body(self.rfile, int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, path, dict(parse_qsl(query)), self.headers, body)
        try:
            reply = answer(self.server.service, request)
            body.drain()
        except HangUp:
            body.drain()
            self._note(path, query, 0)
            self.close_connection = True
            return
        self._note(path, query, reply.status)
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _note(self, path: str, query: str, status: int) -> None:
        self.server.records.append(Record(self.command, path, query, self.headers.get("Range"), status))

    def _send(self, reply: Answer) -> None:
        content = reply.content
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(content.count if isinstance(content, FileSpan) else len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(content, bytes):
            self.wfile.write(content)
            return
        with content.path.open("rb") as file:
            file.seek(content.start)
            for chunk in read_chunks(file, content.count):
                self.wfile.write(chunk)
