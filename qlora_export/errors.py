"""Every error a user can meet: what is wrong, what to do about it, and the exit code of the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command; stable, documented, in order of number."""

    OK = 0
    BUG = 1
    USAGE = 2
    GATE_FAILED = 3
    REFUSED = 4
    BAD_INPUT = 5
    ENVIRONMENT = 6
    REMOTE = 7
    REMOTE_CONFLICT = 8
    NOT_AUTHORISED = 9
    VERIFY_MISMATCH = 10
    GATE_INCONCLUSIVE = 11
    INTERRUPTED = 130
    TERMINATED = 143


class ExportError(Exception):
    """An error with a hint; subclasses fix the exit code."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ExportError):
    """The recipe, the flags or the output folder cannot be what the user meant."""

    exit_code = ExitCode.USAGE


class GateFailed(ExportError):
    """An artifact drifted beyond its limits."""

    exit_code = ExitCode.GATE_FAILED


class Refused(ExportError):
    """The input is understood and unsafe or unsupported to process."""

    exit_code = ExitCode.REFUSED


class InputError(ExportError):
    """An input is missing, corrupt, or does not belong to the others."""

    exit_code = ExitCode.BAD_INPUT


class EnvironmentProblem(ExportError):
    """The machine lacks something: disk, memory, a dependency, a device."""

    exit_code = ExitCode.ENVIRONMENT


class RemoteProblem(ExportError):
    """A remote did not answer, or not as it should; running the same command again is safe."""

    exit_code = ExitCode.REMOTE


class NotAuthorised(ExportError):
    """A remote does not let this user in."""

    exit_code = ExitCode.NOT_AUTHORISED


class RemoteConflict(ExportError):
    """The destination holds something else than we may replace."""

    exit_code = ExitCode.REMOTE_CONFLICT


class VerifyMismatch(ExportError):
    """A finished artifact no longer has the bytes its manifest records."""

    exit_code = ExitCode.VERIFY_MISMATCH


@dataclass(frozen=True)
class Problem:
    """One thing a plan found wrong; a plan lists all of them at once."""

    exit_code: ExitCode
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: ExportError) -> Problem:
        """The problem that an error reports."""
        return cls(error.exit_code, error.message, error.hint)


class PlanRefused(ExportError):
    """A plan with problems: all of them, with the exit code of the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join(problem.message for problem in self.problems),
            "\n".join(dict.fromkeys(problem.hint for problem in self.problems if problem.hint)),
        )
        self.exit_code = self.problems[0].exit_code
