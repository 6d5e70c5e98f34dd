"""A Hub on this machine, to rehearse a release with: the real client talks to it, nothing leaves the machine.

    from qlora_export.testing import HubServer

    with HubServer(faults=["commit-applied-then-closed"]) as hub:
        hub.add_repository("acme/base", Path("base"))
        ...  # run anything with HF_ENDPOINT=hub.endpoint and HF_HUB_DISABLE_XET=1
        hub.repositories["acme/model"].files("main")

It speaks the Hub's protocol (repositories, classic large files, commits, pull requests, tags, cards, downloads by
range) with the standard library and PyYAML alone, and fails on purpose where `FAULTS` says. Contents go to disk, so
releases of many gigabytes need no memory. `python -m qlora_export.testing --port 8765 --root hub` serves until
interrupted; after that the contents stay in the folder, the repositories do not.
"""

from __future__ import annotations

from qlora_export.testing.faults import FAULTS
from qlora_export.testing.messages import Record, Refusal
from qlora_export.testing.repository import Commit, Discussion, Repository
from qlora_export.testing.server import HubServer
from qlora_export.testing.service import Limits
from qlora_export.testing.storage import FileEntry

__all__ = [
    "FAULTS",
    "Commit",
    "Discussion",
    "FileEntry",
    "HubServer",
    "Limits",
    "Record",
    "Refusal",
    "Repository",
]
