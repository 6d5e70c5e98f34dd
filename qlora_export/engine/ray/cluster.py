"""The engine `ray`: the batches of a plan made by processes on a cluster, over a file system that its nodes share.

`RAY_ADDRESS` names the cluster, as ray has it; without one a local cluster of as many CPUs as there are workers lives
as long as the pass does. Nothing but the cluster is contacted.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qlora_export.artifact import FileFacts
from qlora_export.engine.options import BuildOptions
from qlora_export.engine.partial_folder import PartialFolder
from qlora_export.engine.ray.batch_worker import assign
from qlora_export.engine.ray.batches import Batch, cut
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.engine.work_items import WorkItem
from qlora_export.errors import EnvironmentProblem
from qlora_export.planning.plan import Plan

ADDRESS = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 256 << 20
ANSWER_SECONDS = 5.0
# No statistics to ray's makers, and nothing of ray's on stderr; ray reads the latter when it is imported.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}


def require_ray() -> None:
    """Raise EnvironmentProblem unless ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise EnvironmentProblem("--engine ray: ray is not installed", "pip install 'qlora-export[ray]'")


def run_on_ray(
    plan: Plan,
    subjects: Sequence[WorkItem],
    folders: Sequence[PartialFolder],
    options: BuildOptions,
    digests: SourceDigests,
    finished: Callable[[int], None],
) -> None:
    """Have all subjects made on the cluster; `finished` is called in this thread with the number of each."""
    mark = uuid.uuid4().hex
    for folder in folders:
        folder.journal.mark(mark)
        # No page of this machine may be written back later, over what a worker has written by then.
        folder.writer.sync()
    assignment = assign(plan, subjects, {folder.item.name: folder.path for folder in folders}, mark)
    batches = cut(subjects, options.checkpoint_bytes, options.workers)

    def made(batch: Batch, facts: FileFacts) -> None:
        digests.facts |= facts
        for number in batch:
            finished(number)

    with connected(options.workers):
        from qlora_export.engine.ray.workers import Crew

        with Crew(assignment, batches, options.workers) as crew:
            crew.run(made)


@contextmanager
def connected(workers: int) -> Iterator[None]:
    """A connection to the cluster: the caller's where there is one, else for this context."""
    with environment(QUIET):
        import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get(ADDRESS)
    local = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        require_answer(address)
        with own_signals(), environment(QUIET):
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else local),
            )
    except (OSError, RuntimeError, ValueError) as error:
        place = f"{ADDRESS}={address}: no cluster answers there" if address else "ray starts no cluster here"
        raise EnvironmentProblem(
            f"{place}: {str(error).strip().splitlines()[0]}",
            "`ray status` tells of a running one, RAY_AUTH_MODE=token is for one that asks for its token; "
            f"without {ADDRESS} a cluster is started on this machine",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def require_answer(address: str | None) -> None:
    """Raise OSError where nobody listens at HOST:PORT: ray itself would ask for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which ray replaces where it may by one that exits in its own way."""
    handler = signal.getsignal(signal.SIGTERM)
    terminated = False
    try:
        yield
    except SystemExit:
        terminated = True
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables are set for processes that start here, unless they are already."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
