"""One check: its id, how it stands, the value that was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_export.errors import ExitCode

Status = Literal["ok", "warn", "fail"]
ACCESS = ("token", "access")


@dataclass(frozen=True)
class Check:
    """How one thing stands; `fix` is empty where nothing has to be done."""

    id: str
    status: Status
    value: str
    fix: str = ""


def exit_code(found: Sequence[Check]) -> ExitCode:
    """OK without failures; NOT_AUTHORISED when the token is one of them, since retrying needs another one."""
    failed = [check.id for check in found if check.status == "fail"]
    if any(name.startswith(ACCESS) for name in failed):
        return ExitCode.NOT_AUTHORISED
    return ExitCode.ENVIRONMENT if failed else ExitCode.OK


def as_data(found: Sequence[Check]) -> dict[str, Any]:
    """The checks as JSON."""
    return {"schema": 1, "exit_code": int(exit_code(found)), "checks": [asdict(check) for check in found]}
