"""One session of a run as it is watched: log, clock, watchdog, trace and stop request, behind what a loop tells it.

The loop hands in each step's metrics as they lie on the devices and fetches them at its lines of metrics; everything
that is written, shown or timed happens here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from lumamba_jax.run_clock import RunClock, peak_flops
from lumamba_jax.run_log import RunLog, StopRequest
from lumamba_jax.watchdog import Watchdog

PROFILE_DIRECTORY = "profile"
_UNTRACED_STEPS = 2  # compiling and warming up would fill the trace


class Session:
    """A context manager. Attributes: log, clock, stop (a `StopRequest`), step_seconds (at the last line of metrics)."""

    def __init__(
        self,
        directory: Path,
        watchdog: Watchdog,
        *,
        start_step: int,
        total_steps: int,
        mesh: jax.sharding.Mesh,
        compute_dtype: str,
        started: float | None = None,
        profile: int | None = None,
        silent: bool = False,
    ):
        """
        Args:
            directory: of the run.
            watchdog: told of each step; entered by the caller.
            start_step, total_steps: steps done before, and of the whole run.
            mesh, compute_dtype: decide the peak that MFU is a share of.
            started: `time.time()` at which the process began to set up.
            profile: trace so many steps into `directory/profile`, for TensorBoard or XProf; None = none. The first
                process traces: those of one node would write the same file.
            silent: write and show nothing (all processes of a run but the first).
        """
        self.log = RunLog(directory, total_steps=total_steps, start_step=start_step, silent=silent)
        peak = peak_flops(compute_dtype, list(mesh.devices.flat))
        self.clock = RunClock(start_step=start_step, started=started, peak_flops=peak)
        self.stop = StopRequest()
        self.step_seconds = 0.0
        self._watchdog = watchdog
        wanted = None if silent else profile
        self._trace = _Trace(directory / PROFILE_DIRECTORY, start_step + _UNTRACED_STEPS, wanted)
        self._pending: dict[int, dict[str, jax.Array]] = {}
        self._groups: dict[int, str] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for part in (self.log, self.stop, self.clock, self._trace):
            self._open.enter_context(part)
        self.log.write_performance(self.clock.start_line())
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.write_performance(self.clock.end_line())
        self._open.close()

    def alive(self) -> None:
        """Nothing hangs: called after each step, and where something else takes long."""
        self._watchdog.alive()

    def each(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; each is a sign of life."""
        return self._watchdog.each(batches)

    def steps(self, batches: Iterable[Any], first_step: int) -> Iterator[tuple[int, Any]]:
        """(step, batch) from `first_step` on."""
        for step, batch in enumerate(self.clock.batches(batches), first_step):
            self.alive()
            self._trace.before(step)
            yield step, batch

    def dispatched(self, step: int, metrics: dict[str, jax.Array], *, windows: int, flops: float, group: str) -> None:
        """A step was handed to the devices.

        Args:
            step: its number, from 1.
            metrics: as `training.make_train_step` returns them.
            windows: of the global batch.
            flops: model FLOPs of all of them.
            group: the montage that all windows share; "" when they share none.
        """
        self._pending[step] = metrics
        self._groups[step] = group
        self.clock.dispatched(metrics["loss"], windows=windows, flops=flops)
        self._trace.after(step, metrics["loss"])
        self.log.advance(step)

    def fetch(self) -> tuple[dict[int, dict[str, np.ndarray]], dict[int, str]]:
        """Metrics and groups of all steps since the last call; waits for the devices."""
        fetched, groups = jax.device_get(self._pending), self._groups
        self._pending, self._groups = {}, {}
        self.alive()
        return fetched, groups

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics and one of performance, after `fetch`."""
        self.log.write(step, "train", metrics)
        line = self.clock.line(step)
        self.step_seconds = line["step_seconds"] or self.step_seconds
        self.log.write_performance(line)
        shown = [f"loss {metrics['loss']:.4f}"]
        if line["windows_per_second"]:
            shown.append(f"{line['windows_per_second']:,.0f} windows/s")
            shown += [] if line["mfu"] is None else [f"MFU {line['mfu']:.1%}"]
            shown += [f"waiting for input {line['input_share']:.0%}"] if line["input_share"] > 0.05 else []
        self.log.advance(step, "  ".join(shown), line=True)

    def compiled(self, what: str, expected: int, *, timed: bool) -> Callable[[tuple, float], None]:
        """A report for `training.PerShape`; `timed` when the time is not part of another phase of the clock."""
        count = 0

        def report(shape: tuple, seconds: float) -> None:
            nonlocal count
            count += 1
            sizes = " x ".join(map(str, shape))
            self.log.say(f"{what} for batches of {sizes}: ready in {seconds:.1f} s (program {count} of {expected})")
            self.log.write_performance({"event": "compile", "what": what, "shape": list(shape), "seconds": seconds})
            if timed:
                self.clock.add_compile(seconds)
            self.alive()

        return report

    def rewind(self, step: int) -> None:
        """The run went back to `step`: nothing after it counts."""
        self._pending, self._groups = {}, {}
        self.log.rewind(step)
        self.clock.rewind(step)
        self.log.write_performance({"event": "rollback", "step": step})


class _Trace:
    """A profile of `steps` steps after `after`; of fewer when the session ends before."""

    def __init__(self, directory: Path, after: int, steps: int | None):
        self._directory, self._first = directory, after + 1
        self._last = None if steps is None else after + steps
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if self._last is not None and self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        if self._running and step == self._last:
            result.block_until_ready()
            self.__exit__()
