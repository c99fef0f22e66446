"""What the processes of a run say: one text from each to all of them, and notes to the user."""

import contextlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_all_processes(text: str) -> list[str]:
    """The text of every process, in their order, on every process; all must call it at the same point."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(data.size, np.int32)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def first_text(text: str | None) -> str | None:
    """The first text that any process has (an error's sentence, say), None when none has one; all must call it."""
    return next((found for found in from_all_processes(text or "") if found), None)


@contextlib.contextmanager
def on_first() -> Iterator[bool]:
    """`with on_first() as first: if first: ...` is what process 0 does for all; what it refuses is refused by all
    (ValueError stays one, everything else is an OSError).

    All processes must come by; nobody goes on before process 0 is through.
    """
    refusal = None
    try:
        yield jax.process_index() == 0
    except (OSError, ValueError) as error:
        if jax.process_count() == 1:
            raise
        refusal = f"{'ValueError' if isinstance(error, ValueError) else 'OSError'} {error}"
    if (found := first_text(refusal)) is not None:
        kind, _, sentence = found.partition(" ")
        raise ValueError(sentence) if kind == "ValueError" else OSError(sentence)


def say_on_stderr(text: str) -> None:
    """Where notes go unless the caller has a better place."""
    print(text, file=sys.stderr)
