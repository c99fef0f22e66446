"""When a run stands still, as when it waits for a lost process or for a file system: show it, then end it."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TextIO, TypeVar

Item = TypeVar("Item")
EXIT_STATUS = 70
"""Of a process that ends itself: it crashed, and the same command goes on."""
_LOOK_SECONDS = 5.0


class Watchdog:
    """Dumps the stack of every thread when `alive` was not called for a while, and ends the process after a longer one.

    A context manager. The dumps come from outside Python, so that they work while a thread holds the interpreter; one
    more after each further period. A process that only stands still keeps its heartbeat (`hosts.HostsConfig`): ending
    it is what lets the others, and whoever starts them again, notice.
    """

    def __init__(self, seconds: float | None, exit_seconds: float | None = None, file: TextIO | None = None):
        """
        Args:
            seconds: without a sign of life before a dump; None = never.
            exit_seconds: before the process ends with `EXIT_STATUS`; None = never.
            file: a real file for the dumps; None = standard error.
        """
        self._seconds, self._exit_seconds = seconds, exit_seconds
        self._file = file or sys.__stderr__ or 2
        self._last = time.monotonic()
        self._over = threading.Event()

    def alive(self) -> None:
        """Something moved: start to count again."""
        self._last = time.monotonic()
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; each is a sign of life."""
        for item in items:
            self.alive()
            yield item

    def __enter__(self) -> Self:
        self.alive()
        if self._exit_seconds is not None:
            threading.Thread(target=self._end_when_still, args=(self._exit_seconds,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _end_when_still(self, seconds: float) -> None:
        while not self._over.wait(min(_LOOK_SECONDS, seconds / 4)):
            if time.monotonic() - self._last > seconds:
                print(f"nothing moved for {seconds:g} s: this process ends", file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)
