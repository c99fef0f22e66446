"""What the processes of a run say: one text from each to all of them, and notes to the user."""

import contextlib
import json
import socket
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_LEAST_BYTES = 256
_KINDS: tuple[type[Exception], ...] = (FileNotFoundError, PermissionError, ConnectionError, OSError, ValueError)


class OtherProcessError(ConnectionError):
    """Another process of the run has crashed: starting again may help, nothing here is wrong."""


def from_all_processes(text: str) -> list[str]:
    """The text of every process, in their order, on every process; all must call it at the same point."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(data.size, np.int32)))
    padded = np.zeros(_padded_size(int(sizes.max())), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _padded_size(size: int) -> int:
    """A power of two: each size is compiled once, and texts have any length."""
    return max(_LEAST_BYTES, 1 << (size - 1).bit_length())


def first_text(text: str | None) -> str | None:
    """The first text that any process has (an error's sentence, say), None when none has one; all must call it."""
    return next((found for found in from_all_processes(text or "") if found), None)


@contextlib.contextmanager
def on_first() -> Iterator[bool]:
    """`with on_first() as first: if first: ...` is what process 0 does for all; what it refuses is refused by all.

    All processes must come by; nobody goes on before process 0 is through. Raises as `gathered_errors`, in the words of
    process 0.
    """
    with _shared_errors(""):
        yield jax.process_index() == 0


@contextlib.contextmanager
def gathered_errors(where: str) -> Iterator[None]:
    """`with gathered_errors("opening the data"): ...` is what each process does by itself before all meet again.

    What goes wrong on one process ends all of them, instead of leaving the others in the next collective until they
    give it up. Nothing collective may happen inside; all processes must come by.

    Raises: ValueError, FileNotFoundError, PermissionError, ConnectionError or else OSError, the same on every process,
        with `where`, number and host of the process in its sentence unless all met it. Any other exception is a bug or
        a lack of memory: it leaves its own process as it is, with its stack, and the others with an OtherProcessError.
        One process alone raises what it met, unchanged.
    """
    with _shared_errors(where):
        yield


@contextlib.contextmanager
def _shared_errors(where: str) -> Iterator[None]:
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        own = error
    found = [json.loads(text) for text in from_all_processes(_described(own)) if text]
    if not found:
        return
    kind, sentence, process = found[0]
    if own is not None and _kind_of(own) is None:
        raise own
    if kind is None or (where and len(found) < jax.process_count()):  # one sentence for what all of them met
        sentence = f"{where + ' failed on ' if where else ''}{process}: {sentence}"
    raise OtherProcessError(sentence) if kind is None else _KINDS[kind](sentence) from own


def _described(error: Exception | None) -> str:
    """JSON of [number in _KINDS or None, sentence, process]; "" for no error."""
    if error is None:
        return ""
    kind, text = _kind_of(error), str(error)
    sentence = text if kind is not None and text else f"{type(error).__name__}: {' '.join(text.split())[:300]}"
    return json.dumps([kind, sentence, f"process {jax.process_index()} ({socket.gethostname()})"])


def _kind_of(error: Exception) -> int | None:
    return next((number for number, kind in enumerate(_KINDS) if isinstance(error, kind)), None)


def say_on_stderr(text: str) -> None:
    """Where notes go unless the caller has a better place."""
    print(text, file=sys.stderr)
