"""`python -m qlora_export.testing`: serve a Hub until interrupted; its address is the first line on stdout."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qlora_export.testing import FAULTS, HubServer


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted."""
    options = _parser().parse_args(arguments)
    try:
        hub = HubServer(options.root, token=options.token, faults=options.fault, port=options.port)
        for owner_and_name, folder in options.repository:
            if not Path(folder).is_dir():
                raise ValueError(f"{owner_and_name}: {folder} is no folder")
        with hub, suppress(KeyboardInterrupt):
            for owner_and_name, folder in options.repository:
                hub.add_repository(owner_and_name, Path(folder))
            sys.stdout.write(f"{hub.endpoint}\n")
            sys.stdout.flush()
            threading.Event().wait()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_export.testing",
        description="A Hub on this machine. Point HF_ENDPOINT at it and set HF_HUB_DISABLE_XET=1.",
        epilog="faults: " + "; ".join(f"{name}: {meaning}" for name, meaning in FAULTS.items()),
    )
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--root", type=Path, help="where contents are kept; a temporary folder otherwise")
    parser.add_argument("--token", help="the only token that may write")
    parser.add_argument("--fault", action="append", default=[], help="something that goes wrong on purpose")
    parser.add_argument(
        *["--repository"], nargs=2, action="append", default=[], metavar=("ID", "FOLDER"), help="a folder to serve"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(serve())
