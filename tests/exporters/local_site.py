"""A server for a page and what it loads: a few names, each a file or a folder, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Handler(SimpleHTTPRequestHandler):
    """Serves what lies under the first part of a path."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".jinja": "text/plain",
    }

    def __init__(self, places: Mapping[str, Path], *words: object) -> None:
        self.places = places
        super().__init__(*words)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Where a path lies on the disk; a name that is not served lies nowhere."""
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        place = self.places.get(first)
        if place is None or ".." in rest.split("/"):
            return "/nowhere"
        return str(place / rest if rest else place)

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def served(places: Mapping[str, Path]) -> Iterator[str]:
    """The address of a server of these places, for as long as it is asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, places))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
