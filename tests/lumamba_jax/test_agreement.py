"""What processes say to each other: errors of one reach all, texts share programs. Threads stand for the processes."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from lumamba_jax import agreement
from lumamba_jax.agreement import OtherProcessError, from_all_processes, gathered_errors, on_first
from lumamba_jax.run_lock import DirectoryInUseError, RunLock


class FakeProcesses:
    """Runs a function once for each process of a run; records the shapes that were gathered."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch):
        self.count, self.gathered = count, []
        self._own = threading.local()
        self._barrier = threading.Barrier(count)
        self._slots: list[Any] = [None] * count
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self._own.index)
        monkeypatch.setattr(agreement.multihost_utils, "process_allgather", self._gather)

    def _gather(self, value: np.ndarray) -> np.ndarray:
        index = self._own.index
        self._slots[index] = value
        self._barrier.wait(60)
        rows = np.stack(self._slots)
        self._barrier.wait(60)
        if index == 0:
            self.gathered.append(value.shape)
        return rows

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What each process returns, or the exception that it ends with."""

        def one(index: int) -> Any:
            self._own.index = index
            try:
                return function(index)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.fixture
def three(monkeypatch) -> FakeProcesses:
    return FakeProcesses(3, monkeypatch)


def test_texts_of_any_length_share_few_programs(three):
    def say(length: int) -> Callable[[int], list[str]]:
        return lambda index: from_all_processes(str(index) * length if index else "ä")

    for length in (0, 1, 7, 255, 256, 257, 300, 511, 1000, 1024):
        assert three.run(say(length)) == [["ä", "1" * length, "2" * length]] * 3
    shapes = {shape for shape in three.gathered if shape}
    assert shapes == {(256,), (512,), (1024,)}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("two  montages"), ValueError),
        (FileNotFoundError("no store"), FileNotFoundError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no text"), ValueError),
        (BlockingIOError("busy"), OSError),
    ],
)
def test_what_process_0_refuses_is_refused_by_all(three, error, kind):
    def work(_: int) -> None:
        with on_first() as first:
            if first:
                raise error

    found = three.run(work)
    assert [(type(e), str(e)) for e in found] == [(kind, str(error))] * 3


@pytest.mark.parametrize("error", [KeyError("step"), RuntimeError("out of\n memory"), TypeError()])
def test_a_crash_of_process_0_keeps_its_stack_and_does_not_leave_the_others_waiting(three, error):
    def work(_: int) -> None:
        with on_first() as first:
            if first:
                raise error

    first, *others = three.run(work)
    assert first is error
    for other in others:
        assert isinstance(other, OtherProcessError)
        assert isinstance(other, OSError)
        assert str(other).startswith(f"process 0 ({socket.gethostname()}): {type(error).__name__}: ")
        assert "\n" not in str(other)


def test_an_error_of_any_process_names_process_and_host_on_all(three):
    def work(index: int) -> str:
        with gathered_errors("opening the data"):
            if index == 1:
                raise OSError("Stale file handle")
        return "went on"

    sentence = f"opening the data failed on process 1 ({socket.gethostname()}): Stale file handle"
    assert [(type(e), str(e)) for e in three.run(work)] == [(OSError, sentence)] * 3


def test_an_error_of_all_processes_is_one_sentence_without_names(three):
    def work(_: int) -> None:
        with gathered_errors("opening the data"):
            raise ValueError("there is no such store")

    assert [(type(e), str(e)) for e in three.run(work)] == [(ValueError, "there is no such store")] * 3


def test_without_errors_all_go_on(three):
    def work(index: int) -> int:
        with gathered_errors("opening the data"), on_first():
            pass
        return index

    assert three.run(work) == [0, 1, 2]


def test_one_process_alone_raises_what_it_met():
    for context in (on_first(), gathered_errors("opening the data")):
        error = KeyError("step")
        with pytest.raises(KeyError) as raised, context:
            raise error
        assert raised.value is error


def test_all_processes_learn_that_the_directory_is_in_use(three, tmp_path):
    (tmp_path / "run.lock").write_text("{")

    def look(note: str) -> None:
        assert "waiting up to" in note
        later = (tmp_path / "run.lock").stat().st_mtime + 1
        os.utime(tmp_path / "run.lock", (later, later))  # a sign of life

    found = three.run(lambda _: RunLock(tmp_path, say=look, heartbeat_s=0.6).__enter__())
    assert {type(error) for error in found} == {DirectoryInUseError}
    assert len({str(error) for error in found}) == 1
