"""Stacks of all threads when a run stands still, as when it waits for a lost process or for a file system."""

import faulthandler
import sys
from types import TracebackType
from typing import Self, TextIO


class Watchdog:
    """Dumps the stack of every thread when `alive` was not called for a while; a context manager.

    The timer runs outside Python, so that it works while a thread holds the interpreter. It dumps again after each
    further period, and ends nothing: whether to wait is for the cluster's operator (or the heartbeat of
    `hosts.HostsConfig`) to say.
    """

    def __init__(self, seconds: float | None, file: TextIO | None = None):
        """`seconds` without a sign of life before a dump, None = never; `file` (a real one) is standard error."""
        self._seconds = seconds
        self._file = file or sys.__stderr__ or 2

    def alive(self) -> None:
        """Something moved: start to count again."""
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> Self:
        self.alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
