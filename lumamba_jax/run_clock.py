"""Where a run's time goes: step time, throughput, MFU, waiting for input, goodput over restarts.

`RunClock` watches one session of a run and says, at each line of metrics, what happened since the last; the lines are
kept in `performance.jsonl`, which grows over restarts and is never rewritten. `summary` adds them up:

    goodput = time in steps that the run kept / time from its first start to its last sign of life

Steps that a killed session did and a later one had to repeat are lost, and so is everything else: set-up, compiling,
waiting for input, validation, checkpoints, restoring after a rollback, and the time in which nothing ran.

`python -m lumamba_jax.run_clock RUN` prints it.
"""

import argparse
import json
import queue
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np

from lumamba_jax.accelerators import documented
from lumamba_jax.run_log import PERFORMANCE_FILE

Phase = Literal["input", "validation", "checkpoint", "compile"]
PHASES: tuple[Phase, ...] = ("input", "validation", "checkpoint", "compile")


class _Dispatched(NamedTuple):
    asked: float  # when the batch was asked for
    ready: float  # when it was there
    result: jax.Array


@dataclass
class _Interval:
    """What was seen since the last line; all times on the monotonic clock, seconds."""

    begin: float
    from_step: int
    windows: int = 0
    flops: float = 0.0
    blurred: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


class RunClock:
    """The clock of one session; a context manager. Every process of a run may have one, the first one's is kept.

    A step is dispatched long before it is done, so a thread of its own notes when each result is there. The wait for a
    batch counts as far as no step was running meanwhile.
    """

    def __init__(self, *, start_step: int, started: float | None = None, peak_flops: float | None = None):
        """
        Args:
            start_step: steps done before this session.
            started: `time.time()` at which the process began to set up; None = now.
            peak_flops: FLOP/s of all devices of the run together, for MFU; None = unknown.
        """
        self._peak_flops = peak_flops
        self._start_step = start_step
        self._started = time.time() if started is None else started
        self._interval = _Interval(time.perf_counter(), start_step)
        self._queue: queue.SimpleQueue[_Dispatched | None] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, name="run clock", daemon=True)
        self._asked = self._ready = 0.0
        self._exposed_input = 0.0
        self._seen = self._dispatched = 0
        self._moved = threading.Condition()

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._watcher.join()

    def start_line(self) -> dict[str, Any]:
        """The line that begins a session."""
        device = jax.devices()[0]
        return {
            "event": "start",
            "time": self._started,
            "step": self._start_step,
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "device_kind": device.device_kind,
            "peak_tflops": None if self._peak_flops is None else self._peak_flops / 1e12,
            "setup_seconds": time.time() - self._started,
        }

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the wait for each is timed."""
        iterator = iter(batches)
        while True:
            self._asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._ready = time.perf_counter()
            yield batch

    def add_compile(self, seconds: float) -> None:
        """Count time that was spent compiling. Steps may have run meanwhile: then the interval's speed is unknown."""
        self._interval.seconds["compile"] += seconds
        self._interval.blurred |= self._dispatched > 1

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time spent here is not time of steps."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._interval.seconds[name] += time.perf_counter() - begin

    def dispatched(self, result: jax.Array, *, windows: int, flops: float) -> None:
        """A step was handed to the devices: `result` is one of its outputs, `flops` those of the model."""
        self._interval.windows += windows
        self._interval.flops += flops
        self._dispatched += 1
        self._queue.put(_Dispatched(self._asked, self._ready, result))

    def line(self, step: int) -> dict[str, Any]:
        """Sum up the interval that ends with `step`, whose results must have been fetched, and begin the next one."""
        with self._moved:
            self._moved.wait_for(lambda: self._seen == self._dispatched, timeout=60)
            exposed, self._exposed_input = self._exposed_input, 0.0
        now, interval = time.perf_counter(), self._interval
        self._interval = _Interval(now, step)
        steps = step - interval.from_step
        seconds = interval.seconds | {"input": exposed}
        wall = now - interval.begin
        seconds["step"] = max(0.0, wall - sum(seconds.values()))
        running = seconds["step"] + seconds["input"]
        known = running > 0 and steps > 0 and not interval.blurred
        rate = interval.flops / running if known else None
        return {
            "event": "steps",
            "time": time.time(),
            "from": interval.from_step,
            "step": step,
            "seconds": seconds,
            "step_seconds": running / steps if known else None,
            "windows_per_second": interval.windows / running if known else None,
            "tflops": None if rate is None else rate / 1e12,
            "mfu": rate / self._peak_flops if rate is not None and self._peak_flops else None,
            "input_share": exposed / running if known else None,
            "peak_bytes_per_device": peak_bytes(),
        }

    def end_line(self) -> dict[str, Any]:
        """The line that ends a session, when it can still write one."""
        return {"event": "end", "time": time.time()}

    def rewind(self, step: int) -> None:
        """The run went back to `step`: what was done since the last line is dropped."""
        self._interval = _Interval(time.perf_counter(), step)
        with self._moved:
            self._exposed_input = 0.0

    def _watch(self) -> None:
        finished = 0.0
        while (item := self._queue.get()) is not None:
            idle_since = max(item.asked, finished)
            try:
                item.result.block_until_ready()
            except Exception:  # the loop meets the same error when it fetches the result
                return
            finally:
                finished = time.perf_counter()
                with self._moved:
                    self._exposed_input += max(0.0, item.ready - idle_since)
                    self._seen += 1
                    self._moved.notify_all()


def peak_bytes() -> int | None:
    """Most memory in use so far: of the fullest local device, or of the process where devices are a CPU's."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [int(count) for count in found if count]
    if known:
        return max(known)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(compute_dtype: str, devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s that `devices` reach together at best: documented, or on a CPU what a product of matrices reaches now.

    None for an accelerator that `accelerators` does not know.
    """
    if devices[0].platform == "cpu":  # simulated devices share the cores of their process
        return _cpu_product_flops() * len({device.process_index for device in devices})
    chip = documented(devices[0].device_kind)
    if chip is None:
        return None
    return len(devices) * (chip.bfloat16_flops if compute_dtype == "bfloat16" else chip.float32_flops)


def _cpu_product_flops(size: int = 1024, tries: int = 5) -> float:
    matrix = np.ones((size, size), np.float32)
    matrix @ matrix
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


# ---- over restarts --------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Seconds of a run by what they were spent on; `goodput = productive / wall`."""

    sessions: int
    steps: int
    wall: float
    productive: float
    repeated: float
    setup: float
    down: float
    other: float
    phases: dict[str, float]
    goodput: float
    step_seconds: float | None
    windows_per_second: float | None
    mfu: float | None


def read_lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of `performance.jsonl`, without one that a killed process left half-written; [] when there are none."""
    path = Path(run_dir) / PERFORMANCE_FILE
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> Summary:
    """Add up the lines of all sessions. Raises ValueError when there is no session."""
    if not any(line["event"] == "start" for line in lines):
        raise ValueError(f"no session is recorded: {PERFORMANCE_FILE} is absent or empty")
    kept: list[tuple[int, int, float]] = []  # (from, to, seconds of steps)
    total = {"step": 0.0, "setup": 0.0, "down": 0.0, **dict.fromkeys(PHASES, 0.0)}
    sessions, last_time = 0, None
    for line in lines:
        if line["event"] == "start":
            sessions += 1
            total["setup"] += line["setup_seconds"]
            if last_time is not None:  # since the last sign of the session before: lost work, and nobody at work
                total["down"] += max(0.0, line["time"] - last_time)
            last_time = line["time"] + line["setup_seconds"]
        if line["event"] in ("start", "rollback"):
            kept = [_cut(part, line["step"]) for part in kept if part[0] < line["step"]]
        elif line["event"] == "end":
            last_time = line["time"]
        elif line["event"] == "steps":
            kept.append((line["from"], line["step"], line["seconds"]["step"]))
            last_time = line["time"]
            for name, seconds in line["seconds"].items():
                total[name] += seconds
    first = next(line["time"] for line in lines if line["event"] == "start")
    wall = max(last_time - first if last_time else 0.0, 1e-9)
    productive = sum(seconds for *_, seconds in kept)
    counted = total["step"] + total["setup"] + total["down"] + sum(total[name] for name in PHASES)
    measured = [line for line in lines if line["event"] == "steps" and line["step_seconds"]]
    return Summary(
        sessions=sessions,
        steps=max((to for _, to, _ in kept), default=0),
        wall=wall,
        productive=productive,
        repeated=total["step"] - productive,
        setup=total["setup"],
        down=total["down"],
        other=max(0.0, wall - counted),
        phases={name: total[name] for name in PHASES},
        goodput=productive / wall,
        step_seconds=_median(measured, "step_seconds"),
        windows_per_second=_median(measured, "windows_per_second"),
        mfu=_median(measured, "mfu"),
    )


def _cut(part: tuple[int, int, float], step: int) -> tuple[int, int, float]:
    """The share of an interval that lies before `step`."""
    begin, end, seconds = part
    return (begin, min(end, step), seconds * (min(end, step) - begin) / max(1, end - begin))


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return float(np.median(values)) if values else None


def report(found: Summary) -> str:
    """A few lines for people."""

    def share(seconds: float) -> str:
        return f"{seconds:10.1f} s  {seconds / found.wall:6.1%}"

    rows = {"steps that count": found.productive, "steps done again after a restart": found.repeated}
    rows |= {f"{name}": seconds for name, seconds in found.phases.items()}
    rows |= {"set-up of sessions": found.setup, "lost or idle between sessions": found.down, "other": found.other}
    head = f"{found.steps} steps in {found.sessions} session(s), {found.wall:.1f} s in all"
    lines = [f"{head}: goodput {found.goodput:.1%}"]
    lines += [f"  {name:34s}{share(seconds)}" for name, seconds in rows.items()]
    if found.step_seconds:
        lines.append(f"  median step {found.step_seconds:.3f} s, {found.windows_per_second:,.1f} windows/s"
                     + (f", MFU {found.mfu:.1%}" if found.mfu is not None else ""))  # fmt: skip
    return "\n".join(lines)


def goodput_line(run_dir: str | Path) -> str:
    """One line about a run; "" when nothing is recorded."""
    lines = read_lines(run_dir)
    if not any(line["event"] == "steps" for line in lines):
        return ""
    found = summary(lines)
    parts = [f"goodput {found.goodput:.1%} of {found.wall:.0f} s in {found.sessions} session(s)"]
    if found.windows_per_second:
        parts.append(f"{found.windows_per_second:,.1f} windows/s")
    if found.mfu is not None:
        parts.append(f"MFU {found.mfu:.1%}")
    return f"{', '.join(parts)} (python -m lumamba_jax.run_clock {run_dir})"


def main() -> int:
    """Print the summary of a run; status 2 when there is none."""
    parser = argparse.ArgumentParser(
        prog="lumamba_jax.run_clock", description="Where the time of a run went, over all its restarts."
    )
    parser.add_argument("run", type=Path, help="directory of a run")
    try:
        print(report(summary(read_lines(parser.parse_args().run))))
    except (ValueError, OSError) as error:
        print(f"run_clock: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
