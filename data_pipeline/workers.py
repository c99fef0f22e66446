"""One function, many tasks, results as they come: on processes of this machine, or on the workers of a Dask scheduler.

A task whose worker dies (it was killed, or took all memory) is tried again alone; when it takes down a second worker,
its outcome is a "rejected" entry and the others go on.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

Task = TypeVar("Task")
Work = Callable[[Task], dict]

KILLED = {
    "status": "rejected",
    "reason": "its worker process was killed twice, probably for lack of memory: split the file or use more memory",
    "transient": True,
}
_CONNECT_SECONDS = 30
_LOOK_SECONDS = 60.0  # between two looks at whether a cluster still has workers
_IN_FLIGHT = 2000  # tasks a Dask scheduler holds at a time: it must not grow with the number of files


def completed(
    work: Work, tasks: Sequence[Task], *, jobs: int = 1, scheduler: str | None = None, shared: Path | None = None
) -> Iterator[tuple[int, dict]]:
    """(index of the task, `work(task)`) in order of completion; tasks start in their order.

    `jobs` processes here, or the workers of a Dask `scheduler` (tcp://HOST:PORT), each of which must see the folder
    `shared`. What `work` raises, this raises. Raises ValueError, one sentence, when the cluster cannot be used.
    """
    if scheduler is not None:
        yield from _on_cluster(work, tasks, scheduler, shared)
    elif min(jobs, len(tasks)) <= 1:
        for index, task in enumerate(tasks):
            yield index, work(task)
    else:
        yield from _on_processes(work, tasks, min(jobs, len(tasks)))


def with_progress(outcomes: Iterable[tuple[int, dict]], total: int, what: str) -> Iterator[tuple[int, dict]]:
    """The same, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("files", total=total)
        for outcome in outcomes:
            progress.advance(bar)
            yield outcome


def _on_processes(work: Work, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, dict]]:
    waiting, suspects = deque(range(len(tasks))), deque()
    while waiting or suspects:
        lost: list[int] = []
        if suspects:  # alone, to learn who takes the process down
            index = suspects.popleft()
            yield from _one_pool(work, tasks, deque([index]), 1, lost)
            if lost:
                yield index, dict(KILLED)
        else:
            yield from _one_pool(work, tasks, waiting, jobs, lost)
            suspects.extend(sorted(lost))


def _one_pool(
    work: Work, tasks: Sequence[Task], waiting: deque[int], jobs: int, lost: list[int]
) -> Iterator[tuple[int, dict]]:
    """Work through `waiting` until it is empty or a process dies; then `lost` names the tasks that were in flight."""
    # spawn: a forked child may inherit locks held by threads of the parent
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
    )
    running: dict[concurrent.futures.Future, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * jobs:
                running[pool.submit(work, tasks[waiting[0]])] = waiting[0]
                waiting.popleft()
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                outcome = future.result()
                yield running.pop(future), outcome
    except BrokenProcessPool:
        finished = {future for future in running if future.done() and future.exception() is None}
        for future in finished:
            yield running.pop(future), future.result()
        lost.extend(running.values())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """A worker's first act. Ctrl-C stops the parent; files in work are finished, and kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: its workers would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _on_cluster(work: Work, tasks: Sequence[Task], scheduler: str, shared: Path | None) -> Iterator[tuple[int, dict]]:
    try:
        from distributed import Client, KilledWorker, as_completed
        from distributed.comm.core import CommClosedError
    except ImportError:
        raise ValueError(
            "--scheduler needs Dask's distributed scheduler: install it with `pip install 'dask[distributed]'` "
            "(the extra `cluster`), here and on the workers"
        ) from None
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(f"no Dask scheduler answers at {scheduler}: start one with `dask scheduler`") from error
    with client, _watched(client, scheduler):
        _check_workers(client, scheduler, shared)
        waiting, suspects = deque(range(len(tasks))), []
        running: dict[Any, int] = {}
        results = as_completed()

        def submit(index: int) -> None:
            future = client.submit(work, tasks[index], pure=False)
            running[future] = index
            results.add(future)

        try:
            while waiting and len(running) < _IN_FLIGHT:
                submit(waiting.popleft())
            for future in results:
                index = running.pop(future)
                try:
                    yield index, future.result()
                except KilledWorker:
                    suspects.append(index)
                if waiting:
                    submit(waiting.popleft())
            for index in sorted(suspects):  # one at a time: an innocent neighbour of the killer survives here
                try:
                    yield index, client.submit(work, tasks[index], pure=False).result()
                except KilledWorker:
                    yield index, dict(KILLED)
        except (CommClosedError, concurrent.futures.CancelledError, TimeoutError) as error:
            raise ValueError(
                f"the Dask scheduler at {scheduler} was lost: start it again and run the same command; finished files "
                "are kept"
            ) from error


@contextlib.contextmanager
def _watched(client: Any, scheduler: str) -> Iterator[None]:
    """Say on stderr when the last worker is gone: the scheduler waits for another, and tells nobody."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # a scheduler that is gone is named by whoever waits for results
                if not client.nthreads():
                    print(f"no worker is connected to {scheduler}: waiting for one; start some with `dask worker "
                          f"{scheduler} --nthreads 1`, or stop this command: finished files are kept",
                          file=sys.stderr, flush=True)  # fmt: skip

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _check_workers(client: Any, scheduler: str, shared: Path | None) -> None:
    try:
        client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"the Dask scheduler at {scheduler} has no worker: start some with `dask worker {scheduler} --nthreads 1`"
        ) from error
    if shared is None:
        return
    blind = sorted(worker for worker, seen in client.run(_sees, str(shared)).items() if not seen)
    if blind:
        raise ValueError(
            f"{len(blind)} Dask workers do not see the folder {shared} ({', '.join(blind[:3])}): --raw and --out must "
            "be on storage that all workers share, under the same path"
        )


def _sees(folder: str) -> bool:
    return Path(folder).is_dir()
