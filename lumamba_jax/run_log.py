"""A run as its user sees it: metrics as JSON lines and TensorBoard events, a progress bar with ETA, a way to stop."""

import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Metrics of one run under `run_dir`; a context manager.

    `metrics.jsonl` holds one object per line: `step`, `split` ("train", "validation") and the metrics. A resumed
    run drops the lines after the step it continues from (and one that a killed process left half written), so that its
    file is that of the unbroken run. With `silent` (every process of a run but the first) nothing is written or shown.
    """

    def __init__(self, run_dir: Path, *, total_steps: int, start_step: int = 0, silent: bool = False):
        self._path = run_dir / METRICS_FILE
        self._writer: SummaryWriter | None = None
        if not silent:
            run_dir.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._lines() if _step_of(line) <= start_step] if start_step else []
            _replace(self._path, "".join(f"{line}\n" for line in kept))
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step or None)
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

    def advance(self, step: int, loss: float | None = None) -> None:
        """Move the bar; `loss`, when known, is shown beside it."""
        description = None if loss is None else f"loss {loss:.4f}"
        self._progress.update(self._bar, completed=step, description=description)

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

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.is_file() else []


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
