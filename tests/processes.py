"""Processes of our interpreter that find the libraries imported: forked from one that has imported them.

An interpreter spends five seconds on PyTorch, transformers, peft and bitsandbytes before its first word of ours. Here
one process imports them once and then forks a child for each command: a process of its own, with its own environment,
folder, output and end, that still imports all of `qlora_export` by itself. What is about the start of a process, or
about variables that the libraries read when they are imported, runs in a fresh interpreter instead.
"""

from __future__ import annotations

import atexit
import functools
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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "torch",
    "bitsandbytes",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.auto",
    "numba",
    "numpy.typing",
    "safetensors.torch",
    "jinja2",
    "jinja2.sandbox",
    "pydantic",
    "rich.progress",
    "rich.table",
    "typer",
    "yaml",
)
STREAMS = 3


def fresh(*words: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """Run a new interpreter with these words: `-m qlora_export ...` or `-c script ...`."""
    asked = [sys.executable, *map(str, words)]
    return subprocess.run(asked, check=False, capture_output=True, text=True, cwd=cwd, env=env)


def forked(*words: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """What `fresh` does, from a process that has the libraries."""
    asked = [str(word) for word in words]
    job = {"words": asked, "cwd": str(cwd or Path.cwd()), "environment": dict(os.environ if env is None else env)}
    with (
        socket.socket(socket.AF_UNIX) as connection,
        Path(os.devnull).open("rb") as nothing,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as complaints,
    ):
        connection.connect(_server())
        socket.send_fds(connection, [b"s"], [file.fileno() for file in (nothing, output, complaints)])
        connection.sendall(json.dumps(job).encode() + b"\n")
        with connection.makefile() as answer:
            code = int(answer.readline())
        told = []
        for file in (output, complaints):
            file.seek(0)
            told.append(file.read().decode())
    return subprocess.CompletedProcess(asked, code, *told)


Finished = subprocess.CompletedProcess[str]


@functools.cache
def _server() -> str:
    """Address of the process that forks; it ends with this one."""
    folder = tempfile.TemporaryDirectory(prefix="processes-")
    address = str(Path(folder.name) / "socket")
    words = [sys.executable, __file__, address]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def close() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(close)
    return address


def serve(address: str) -> Mapping[str, Any]:
    """In the server: never returns. In each child: its job."""
    for name in LIBRARIES:
        importlib.import_module(name)
    # The first function that numba compiles and the first model that pydantic sees load most of the two.
    sys.modules["numba"].njit(lambda value: value + 1)(1)
    sys.modules["pydantic"].create_model("First", number=(int, 1))
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *children], [], [])
        for ended in children.keys() & set(ready):
            _report(ended, *children.pop(ended))
        if sys.stdin in ready:
            os._exit(0)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        streams, job = _received(connection)
        if child := os.fork():
            for stream in streams:
                os.close(stream)
            children[os.pidfd_open(child)] = child, connection
            continue
        for opened in (listener, connection, *(other for _, other in children.values())):
            opened.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for descriptor in (*streams, *children):
            os.close(descriptor)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["environment"])
        return job


def _received(connection: socket.socket) -> tuple[list[int], Mapping[str, Any]]:
    _, streams, _, _ = socket.recv_fds(connection, 1, STREAMS)
    with connection.makefile() as lines:
        return streams, json.loads(lines.readline())


def _report(ended: int, child: int, connection: socket.socket) -> None:
    os.close(ended)
    _, status = os.waitpid(child, 0)
    with connection, suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def obey(words: list[str], cwd: str) -> None:
    """What the interpreter does with its words."""
    kind, what, *arguments = words
    sys.path[0] = cwd
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
