"""Processes of our interpreter that find the libraries imported: forked from one that has imported them.

An interpreter spends five seconds on PyTorch, transformers, peft and bitsandbytes before its first word of ours. Here
one process for each kind of command imports them once and then forks a child for each: a process of its own, with its
own environment, folder, files and end, that still imports all of `qlora_export` by itself. `forked` asks for such a
child; where a test uses `Warm` as `subprocess.Popen`, so do the modules that the product runs in processes of their
own. What is about the start of a process, or about variables that the libraries read when they are imported, runs in
a fresh interpreter instead, whose children are fresh, too.

A root process, started by `serving`, listens for every kind and starts the process of one when it is first asked for;
all workers of a test run share them. A request is the files of the child and a line of JSON; the answers are a line
with its number, and one with its wait status when it has ended.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

ADDRESS = "TESTS_PROCESSES"
FIRST_FREE = 500
STREAMS = 3


@dataclass(frozen=True)
class Kind:
    """What is imported beforehand, with which variables set, for which modules of `python -P -m`."""

    libraries: Sequence[str]
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


MODELS = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
    "numpy.typing",
    "pydantic",
    "yaml",
)
KINDS = {
    "models": Kind(
        (
            *MODELS,
            "bitsandbytes",
            "peft",
            "transformers.quantizers.auto",
            "numba",
            "jinja2",
            "jinja2.sandbox",
            "rich.progress",
            "rich.table",
            "typer",
        )
    ),
    "graphs": Kind(
        (
            *MODELS,
            "torch.export",
            "torch.onnx",
            "torch._dynamo",
            "torch._inductor.decomposition",
            "accelerate",
            "numba",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "onnxruntime",
            "onnxruntime.quantization.matmul_nbits_quantizer",
            "onnxruntime_genai",
            # Its folder joins the path while it is imported, for the next.
            "onnxruntime_genai.models",
            "builders",
        ),
        ("qlora_export.exporters.onnx.", "qlora_export.runtimes.", "tests.exporters."),
        {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    ),
    # Not the client itself: it reads its variables when it is imported, and there are two versions of it.
    "client": Kind(
        ("httpx2", "httpcore2", "filelock", "yaml", "tqdm.auto", "packaging.version", "email.message", "fsspec"),
        ("qlora_export.publish.hub.", "qlora_export.pipeline.doctor."),
    ),
}


def fresh(*words: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """Run a new interpreter with these words: `-m qlora_export ...`, `-c script ...` or `script.py ...`."""
    asked = [sys.executable, *map(str, words)]
    return subprocess.run(asked, check=False, capture_output=True, text=True, cwd=cwd, env=env)


def forked(
    *words: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Finished:
    """What `fresh` does, from a process that has the libraries; it is killed after so many seconds."""
    asked = [sys.executable, *map(str, words)]
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with Forked(asked, stdin=nothing, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env) as process:
        try:
            output, complaints = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(asked, process.returncode, output, complaints)


Finished = subprocess.CompletedProcess[str]


class Warm(subprocess.Popen[Any]):
    """`subprocess.Popen` whose child is forked from a process that has the libraries, if it is of one of the kinds."""

    folder: ClassVar[str] = ""
    connection: socket.socket | None = None

    def kind(self, words: Sequence[str]) -> str | None:
        """Whom to ask; None for a process as ever."""
        if list(words[:3]) != [sys.executable, "-P", "-m"]:
            return None
        return next((name for name, kind in KINDS.items() if words[3].startswith(kind.modules or " ")), None)

    def _execute_child(self, args: Any, *options: Any) -> None:
        words = [os.fsdecode(word) for word in ([args] if isinstance(args, str | bytes | os.PathLike) else args)]
        kind = self.kind(words)
        if kind is None:
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        _, _, close_others, kept, cwd, environment, _, _, _, *pipes = options
        streams = pipes[0], pipes[3], pipes[5]
        files = {number: number if stream == -1 else stream for number, stream in enumerate(streams)}
        others = kept if close_others else _inheritable(set(pipes[:6]))
        files |= {number: number for number in others if number >= STREAMS}
        self.connection, self.pid = request(self.folder, kind, words[1:], files, cwd, environment)
        self._child_created = True
        self._close_pipe_fds(*pipes[:6])  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self.connection is None:
            return super()._try_wait(flags)  # type: ignore[misc]
        if not select.select([self.connection], [], [], 0 if flags & os.WNOHANG else None)[0]:
            return 0, 0
        with self.connection, self.connection.makefile() as lines:
            return self.pid, int(lines.readline())

    def _internal_poll(self, *state: Any, **options: Any) -> int | None:
        if self.connection is None:
            return super()._internal_poll(*state, **options)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                found, status = (0, 0) if self.returncode is not None else self._try_wait(os.WNOHANG)
                if found:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


class Forked(Warm):
    """A command of ours, which otherwise is started as ever."""

    def kind(self, words: Sequence[str]) -> str | None:
        return super().kind(words) or ("models" if words[0] == sys.executable else None)


def _inheritable(but: set[int]) -> list[int]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.get_inheritable(int(path.name)) and int(path.name) not in but:
                found.append(int(path.name))
    return found


def request(
    folder: str, kind: str, words: Sequence[str], files: Mapping[int, int], cwd: Any, environment: Any
) -> tuple[socket.socket, int]:
    """The connection that tells the child's end, and its number."""
    variables = dict(os.environ if environment is None else environment)
    place = str(Path.cwd() if cwd is None else Path(cwd).absolute())
    job = {"words": list(words), "cwd": place, "environment": variables, "numbers": list(files)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{folder}/{kind}")
    socket.send_fds(connection, [b"s"], list(files.values()))
    connection.sendall(json.dumps(job).encode() + b"\n")
    number = b""
    while not number.endswith(b"\n"):
        received = connection.recv(1)
        if not received:
            raise ChildProcessError(f"the process that imports libraries for {kind} ended")
        number += received
    return connection, int(number)


@contextmanager
def serving() -> Iterator[None]:
    """Processes to fork from, for this process and those that inherit its environment."""
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        words = [sys.executable, "-P", __file__, folder]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.environ[ADDRESS] = folder
            use(folder)
            yield
            del os.environ[ADDRESS]
            process.communicate()


def use(folder: str) -> None:
    """Ask the processes that listen there."""
    Warm.folder = folder


def serve(folder: str) -> Mapping[str, Any]:
    """In the root process: never returns. In each process that is forked in the end: its job."""
    listeners = {name: _listening(f"{folder}/{name}") for name in KINDS}
    ended, held = os.pipe()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([0, *(item.fileno() for item in listeners.values())], [], [])
        if 0 in ready:
            os._exit(0)
        for name in [name for name, listener in listeners.items() if listener.fileno() in ready]:
            listener = listeners.pop(name)
            if os.fork() == 0:
                for other in (held, *(item.detach() for item in listeners.values())):
                    os.close(other)
                use(folder)
                return _serve_kind(KINDS[name], listener, ended)
            listener.close()


def _listening(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    return listener


def _serve_kind(kind: Kind, listener: socket.socket, ended: int) -> Mapping[str, Any]:
    os.environ.update(kind.environment)
    for name in kind.libraries:
        importlib.import_module(name)
    # The first function that numba compiles and the first model that pydantic sees load most of the two.
    if "numba" in sys.modules:
        sys.modules["numba"].njit(lambda value: value + 1)(1)
    if "pydantic" in sys.modules:
        sys.modules["pydantic"].create_model("First", number=(int, 1))
    gc.freeze()
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([listener.fileno(), ended, *children], [], [])
        if ended in ready:
            os._exit(0)
        for child in children.keys() & set(ready):
            _report(child, *children.pop(child))
        if listener.fileno() not in ready:
            continue
        connection, _ = listener.accept()
        files, job = _received(connection)
        if number := os.fork():
            for file in files:
                os.close(file)
            with suppress(BrokenPipeError):
                connection.sendall(f"{number}\n".encode())
            children[os.pidfd_open(number)] = number, connection
            continue
        for opened in (listener, connection, *(other for _, other in children.values())):
            opened.detach()
        _take(files, job["numbers"])
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["environment"])
        return job


def _received(connection: socket.socket) -> tuple[list[int], Mapping[str, Any]]:
    _, files, _, _ = socket.recv_fds(connection, 1, FIRST_FREE // 2)
    with connection.makefile() as lines:
        return files, json.loads(lines.readline())


def _report(ended: int, child: int, connection: socket.socket) -> None:
    os.close(ended)
    _, status = os.waitpid(child, 0)
    with connection, suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())


def _take(files: Sequence[int], numbers: Sequence[int]) -> None:
    """Have these files under these numbers, and no other file."""
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, FIRST_FREE) for file in files]
    os.closerange(STREAMS, FIRST_FREE)
    for place, number in zip(moved, numbers, strict=True):
        os.dup2(place, number)
        os.close(place)


def obey(words: list[str], cwd: str) -> None:
    """What the interpreter does with its words and with PYTHONPATH."""
    subprocess.Popen = Warm  # type: ignore[misc]
    sys.path[:] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place] + sys.path
    with suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")
    if words[0] == "-P":
        words = words[1:]
    else:
        sys.path.insert(0, cwd if words[0].startswith("-") else str(Path(words[0]).parent))
    kind, *arguments = words
    if not kind.startswith("-"):
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")
        return
    what = arguments.pop(0)
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)


def end(error: BaseException | None) -> NoReturn:
    """End as the interpreter does, but for taking every library apart, which copies them."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            sys.stderr.write(f"{error.code}\n")
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    asked = serve(sys.argv[1])
    try:
        obey(asked["words"], asked["cwd"])
    except BaseException as error:  # noqa: BLE001  whatever ends a process
        end(error)
    end(None)
