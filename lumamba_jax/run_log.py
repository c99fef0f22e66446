"""What a run shows while it trains: metrics as JSON lines and TensorBoard events, and a progress bar with its ETA."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Metrics of one run under `run_dir`; a context manager.

    `metrics.jsonl` holds one object per line: `step`, `split` ("train", "validation", "test") and the metrics. A resumed
    run drops the lines after the step it continues from, so that its file is that of the unbroken run.
    """

    def __init__(self, run_dir: Path, *, total_steps: int, start_step: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start_step] if start_step else []
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step or None)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), console=self.console, transient=True
        )
        self._bar = self._progress.add_task("train", total=total_steps, completed=start_step)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Record scalars measured after `step` optimizer steps; one that is not finite is stored as null."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def advance(self, step: int, loss: float | None = None) -> None:
        """Move the bar; `loss`, when known, is shown beside it."""
        description = {} if loss is None else {"description": f"loss {loss:.4f}"}
        self._progress.update(self._bar, completed=step, **description)

    def say(self, text: str) -> None:
        """Print a line above the bar (standard error)."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._writer.close()

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.is_file() else []


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, in the order they were written."""
    return [json.loads(line) for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines()]
