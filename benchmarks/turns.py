"""Fair turns between processes: workers with a time limit, and `measure`, which times the variants of a case."""

import contextlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.speed_cases import Case

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """A worker did not answer: it crashed, or the limit passed. It is gone; the next request starts another."""


@dataclass
class Worker:
    """A process that prepares variants and times them (`workers/protocol.py`).

    Attributes:
        library: what its variants are filed under: "jax", "torch".
        command: of the process.
        environment: variables besides those of this process.
        limit: seconds that an answer may take.
        prepared: variants that the running process holds.
    """

    library: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: float = 300.0
    prepared: set[str] = field(default_factory=set)
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = None

    def ask(self, **request: Any) -> dict:
        """One request, one answer. Raises WorkerError with a sentence for the table."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], self.limit)[0]:
                raise WorkerError(f"not within {self.limit:g} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except WorkerError:
            self._kill()
            raise
        if not line:
            raise WorkerError(self._crash())
        return json.loads(line)

    def prepare(self, case: Case, variant: str) -> dict:
        """Facts about the variant, or {"problem": sentence}."""
        request = {"kind": case.kind, "size": list(case.size), "model": case.model, "dtype": case.dtype}
        try:
            answer = self.ask(do="prepare", variant=variant, **request)
        except WorkerError as problem:
            answer = {"problem": str(problem)}
        if "problem" not in answer:
            self.prepared.add(variant)
        return answer

    def turn(self, case: Case, variant: str) -> list[float]:
        """Seconds of the calls of one turn; prepared again first where the process had to be restarted.

        Raises: WorkerError.
        """
        if variant not in self.prepared and "problem" in (answer := self.prepare(case, variant)):
            raise WorkerError(answer["problem"])
        answer = self.ask(do="turn", variant=variant, pause=case.pause, fill=case.fill)
        if "problem" in answer:
            raise WorkerError(answer["problem"])
        return answer["seconds"]

    def forget(self) -> None:
        """Drop what was prepared."""
        if self.prepared:
            self.prepared.clear()
            self.ask(do="forget")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            path = f"{ROOT}:{ROOT / 'tests' / 'parity'}"
            environment = {**os.environ, "PYTHONPATH": path, **self.environment}
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # so that the compilers it starts end with it
            )
        return self._process

    def _kill(self) -> None:
        assert self._process is not None
        assert self._errors is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._process = None
        self.prepared.clear()

    def _crash(self) -> str:
        """What is known about a process that ended by itself."""
        assert self._process is not None
        assert self._errors is not None
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        self._kill()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"the process ended ({how}){': ' + lines[-1][:160] if lines else ''}"


def measure(case: Case, workers: Mapping[str, Worker], *, rounds: int | None = None) -> dict:
    """Prepare every variant of a case, then time them in turns.

    Args:
        case: its variants name the worker first: "jax: ours".
        workers: by library.
        rounds: turns of each variant; None = the case's own.

    Returns: JSON of the case: for each variant its facts with "median_ms" and "quartiles_ms" over the turns (each turn
        is the median of its calls), or {"problem": sentence}.
    """
    facts = {variant: _worker(variant, workers).prepare(case, _name(variant)) for variant in case.variants}
    turns: dict[str, list[float]] = {variant: [] for variant, known in facts.items() if "problem" not in known}
    for _ in range(rounds or case.rounds):
        for variant in random.sample(list(turns), len(turns)):
            try:
                seconds = _worker(variant, workers).turn(case, _name(variant))
                turns[variant].append(statistics.median(seconds))
            except WorkerError as problem:
                facts[variant] = {"problem": str(problem)}
                del turns[variant]
    for worker in workers.values():
        worker.forget()
    variants = {variant: {**known, **_summary(turns.get(variant, []))} for variant, known in facts.items()}
    return {"name": case.name, "kind": case.kind, "size": list(case.size), "dtype": case.dtype, "variants": variants}


def _worker(variant: str, workers: Mapping[str, Worker]) -> Worker:
    return workers[variant.split(": ")[0]]


def _name(variant: str) -> str:
    return variant.split(": ", 1)[1]


def _summary(seconds: list[float]) -> dict:
    if not seconds:
        return {}
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "quartiles_ms": [1e3 * quartile for quartile in quartiles[::2]],
        "turns": len(seconds),
    }
