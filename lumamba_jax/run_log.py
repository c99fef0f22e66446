"""A run as its user sees it: metrics as JSON lines and TensorBoard events, a progress bar with ETA, a way to stop."""

import json
import math
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

METRICS_FILE = "metrics.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
_QUIET_SECONDS = 10.0
_CHARTS = ("step_seconds", "windows_per_second", "tflops", "mfu", "input_share", "peak_bytes_per_device")


class RunLog:
    """Metrics of one run under `run_dir`; a context manager.

    `metrics.jsonl` holds one object per line: `step`, `split` ("train", "validation") and the metrics. A resumed
    run drops the lines after the step it continues from (and one that a killed process left half written), so that its
    file is that of the unbroken run. `performance.jsonl` (`run_clock`) grows over all sessions. With `silent` (every
    process of a run but the first) nothing is written or shown.
    """

    def __init__(self, run_dir: Path, *, total_steps: int, start_step: int = 0, silent: bool = False):
        self._path = run_dir / METRICS_FILE
        self._writer: Any = None
        if not silent:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._keep_lines(start_step)
            _end_line(run_dir / PERFORMANCE_FILE)
            self._open_charts(start_step)
        self._said, self._total_steps = -math.inf, total_steps
        self.console = Console(stderr=True, quiet=silent)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), console=self.console, transient=True
        )
        self._bar = self._progress.add_task("train", total=total_steps, completed=start_step)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Record scalars measured after `step` optimizer steps; one that is not finite is stored as null."""
        if self._writer is None:
            return
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def write_performance(self, line: Mapping[str, Any]) -> None:
        """Append a line of `run_clock`, and draw its figures."""
        if self._writer is None:
            return
        with (self._path.parent / PERFORMANCE_FILE).open("a") as file:
            file.write(json.dumps(_finite(line)) + "\n")
        for name in _CHARTS:
            if line.get(name) is not None:
                self._writer.add_scalar(f"performance/{name}", line[name], line["step"])

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`: the run went back to it."""
        if self._writer is not None:
            self._keep_lines(step)
            self._writer.close()
            self._open_charts(step)
        self._progress.update(self._bar, completed=step)

    def advance(self, step: int, shown: str | None = None, *, line: bool = False) -> None:
        """Move the bar; `shown` stands beside it until the next one.

        Where there is no terminal, and so no bar, a `line` is printed instead, one in `_QUIET_SECONDS` at most.
        """
        self._progress.update(self._bar, completed=step, description=shown)
        if line and not self.console.is_terminal and time.monotonic() - self._said >= _QUIET_SECONDS:
            self._said = time.monotonic()
            self.say(f"step {step}/{self._total_steps}  {shown}")

    def say(self, text: str) -> None:
        """Print a line above the bar (standard error)."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def _open_charts(self, step: int) -> None:
        """TensorBoard events go on after `step`; what is there of later steps is not shown any more."""
        folder = self._path.parent / "tensorboard"
        self._writer = _chart_writer(str(folder), purge_step=step + 1 if folder.is_dir() else None)

    def _keep_lines(self, step: int) -> None:
        lines = self._path.read_text().splitlines() if self._path.is_file() and step else []
        _replace(self._path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop reads between steps; the second one kills."""

    def __init__(self):
        self.requested = False
        self._previous: dict = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def write_json(value: object, path: Path) -> None:
    """Write nested dicts, lists and scalars; numbers that are not finite become null; complete or not at all."""
    _replace(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _chart_writer(folder: str, purge_step: int | None) -> Any:
    """A `tensorboardX.SummaryWriter`. The library imports PyTorch where there is one, for tensors of its own, which
    takes longer than everything else a run imports: it is hidden meanwhile."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  (this is how an import is refused)
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(folder, purge_step=purge_step)


def _end_line(path: Path) -> None:
    """End a line that a killed process left half written, so that the next one stands alone."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a line that was not written to its end."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, in the order they were written."""
    return [json.loads(line) for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines()]
