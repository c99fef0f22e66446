"""Files that are read again and again, by many threads: few are open at a time, the least recently used is closed."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    handle: T
    users: int = 0


class OpenFiles(Generic[T]):
    """Handles by key; at most `capacity` of them stay open, besides those in use.

    A handle is never closed under a thread that reads from it. A process made by fork starts without any: positions
    and locks inside a handle are not safe to share (HDF5's library least of all).
    """

    def __init__(self, capacity: int, close: Callable[[T], None]) -> None:
        self.capacity = capacity
        self._close = close
        self._start_empty()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_empty)

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def use(self, key: Hashable, open_file: Callable[[], T]) -> Iterator[T]:
        """The handle of `key`, opened by `open_file()` if it is not open; whatever that raises is passed on."""
        entry = self._taken(key)
        if entry is None:
            fresh = open_file()  # outside the lock: opening may take long, and others need not wait for it
            entry = self._added(key, fresh)
        try:
            yield entry.handle
        finally:
            with self._lock:
                entry.users -= 1
            self._shrink(self.capacity)

    def close_all(self) -> None:
        """Close every handle that is not in use."""
        self._shrink(0)

    def _start_empty(self) -> None:
        self._abandoned = getattr(self, "_entries", None)  # referenced, so that nothing of the parent's is closed here
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._lock = threading.Lock()

    def _taken(self, key: Hashable) -> _Entry[T] | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.users += 1
                self._entries.move_to_end(key)
            return entry

    def _added(self, key: Hashable, fresh: T) -> _Entry[T]:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(fresh)
            entry.users += 1
        if entry.handle is not fresh:  # another thread opened the same file meanwhile
            self._close(fresh)
        return entry

    def _shrink(self, size: int) -> None:
        if len(self._entries) <= size:
            return
        closing = []
        with self._lock:
            for key in list(self._entries):
                if len(self._entries) <= size:
                    break
                if not self._entries[key].users:
                    closing.append(self._entries.pop(key).handle)
        for handle in closing:
            self._close(handle)
