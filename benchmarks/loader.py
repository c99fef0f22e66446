"""Does the loader outrun the step? Windows/s of both on real recordings, in turns, and the input of a v5e-256.

`python -m benchmarks.loader DATA [--json FILE]` prepares the recordings of the folder DATA (kept in `--cache`),
converts them to ArrayRecord, and times the loader over both formats and 0, 2 and 4 reader threads, and the real
training step of `pretrain_lumamba_tiny` at the same batch, in short turns of random order.
Then a training loop measures how long it waits for its batches. The files lie in the page cache after the first turn
(nothing here can empty it); a cold disk or a bucket delivers what it delivers.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import configs
from data_pipeline.convert_store import convert
from data_pipeline.formats import open_store
from data_pipeline.loader import Batches, LoaderConfig, make_dataset
from data_pipeline.prepare import PrepareConfig, prepare
from lumamba_jax.checkpoint import abstract_params
from lumamba_jax.compilation import enable_compilation_cache
from lumamba_jax.optimizer import make_optimizer
from lumamba_jax.sharding import make_mesh, to_global
from lumamba_jax.tasks import make_task
from lumamba_jax.training import init_state, make_train_step

RESULTS = Path(__file__).resolve().parent / "results"
PLANS = {
    "LuMamba tiny": RESULTS / "pod_plan_lumamba_tiny_v5e_16x16.json",
    "LUNA huge": RESULTS / "pod_plan_luna_huge_v5e_16x16.json",
}
CHIPS_PER_HOST = 4  # of v5e in slices of several hosts
THREADS = (0, 2, 4)


def stores(data: Path, cache: Path, exclude: tuple[str, ...]) -> dict[str, Path]:
    """Paths of the windows of `data` in both formats, made on the first call."""
    hdf5, shards = cache / "windows.h5", cache / "windows.arrayrecord"
    if not hdf5.exists():
        prepare(PrepareConfig(data, hdf5, exclude=exclude))
    if not shards.exists():
        convert([hdf5], shards, shard_windows=256)
    return {"HDF5": hdf5, "ArrayRecord": shards}


def loader_turn(data: Batches, steps: int) -> Callable[[], float]:
    """Windows/s of `steps` batches from a random place."""

    def turn() -> float:
        first = random.randrange(len(data))
        start = time.perf_counter()
        windows = sum(len(batch["window_id"]) for batch in data.iterate(first, first + steps))
        return windows / (time.perf_counter() - start)

    return turn


class Step:
    """The training step of a preset with its state, one device with all cores, as `train.py` runs it."""

    def __init__(self, batch_size: int, steps_per_epoch: int) -> None:
        config = configs.load("pretrain_lumamba_tiny")
        self.mesh = make_mesh(config.mesh)
        task, seed = make_task(config.task, config.model, None), config.trainer.seed
        total = config.trainer.epochs * steps_per_epoch
        schedule = {"total_steps": total, "max_epochs": config.trainer.epochs, "stage": "pretrain"}
        optimizer = make_optimizer(config.optimizer, abstract_params(config.model), **schedule)
        self.patch_size, self.batch_size = config.model.patch_size, batch_size
        self._step = make_train_step(config.model, task, optimizer, self.mesh, seed=seed)
        self._state = init_state(config.model, optimizer, self.mesh, seed=seed)

    def __call__(self, batch: dict[str, np.ndarray]) -> None:
        """One step, to its end."""
        self._state, metrics = self._step(self._state, to_global(batch, self.mesh))
        jax.block_until_ready(metrics)

    def turn(self, batch: dict[str, np.ndarray]) -> Callable[[], float]:
        """Windows/s of one step on a batch that is there."""

        def turn() -> float:
            start = time.perf_counter()
            self(batch)
            return self.batch_size / (time.perf_counter() - start)

        return turn


def in_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and range of each variant's windows/s over `rounds` turns in random order, after one for warming up."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            rate = variants[name]()
            if number:
                found[name].append(rate)
    return {n: {"median": statistics.median(r), "least": min(r), "most": max(r)} for n, r in found.items()}


def together(step: Step, data: Batches, steps: int) -> dict[str, float]:
    """A training loop: windows/s, and the share of its time in which it waits for a batch (the first one excepted)."""
    batches: Iterator = data.iterate(0, steps + 1)
    step(next(batches))
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    wall = time.perf_counter() - start
    return {"windows_per_second": steps * step.batch_size / wall, "waiting": waited / wall}


def pod(plan: dict, bytes_per_core: float, prefetch: int) -> dict[str, float]:
    """What each host must read for the step that a pod plan predicts, at the measured bytes/s of a core."""
    window = plan["window"]["channels"] * plan["window"]["samples"] * 4
    hosts = plan["chips"] // CHIPS_PER_HOST
    rate = plan["windows_per_second"] / hosts
    batch = plan["config"]["loader"]["batch_size"] // hosts
    return {
        "window_bytes": window,
        "hosts": hosts,
        "windows_per_second": plan["windows_per_second"],
        "host_windows_per_second": rate,
        "host_bytes_per_second": rate * window,
        "all_bytes_per_second": rate * window * hosts,
        "host_cores": rate * window / bytes_per_core,
        "host_batch_windows": batch,
        "prefetch_bytes": (prefetch + 1) * batch * window,
    }


def measure(data: Path, cache: Path, exclude: tuple[str, ...], batch_size: int, rounds: int, steps: int) -> dict:
    """All figures, as JSON."""
    paths = stores(data, cache, exclude)
    opened = {name: open_store(path) for name, path in paths.items()}
    loaders = {
        (name, threads): make_dataset(store, None, LoaderConfig(batch_size=batch_size, reader_threads=threads))
        for name, store in opened.items()
        for threads in THREADS
    }
    first = loaders["HDF5", 0]
    step = Step(batch_size, len(first))
    variants = {f"{name}, {threads} threads": loader_turn(own, steps) for (name, threads), own in loaders.items()}
    rates = in_turns({**variants, "step": step.turn(first.batch(0))}, rounds)
    window_bytes = int(np.prod(first.shapes[0][1:])) * 4
    waits = {name: together(step, loaders[name, 2], rounds) for name in opened}
    # without reader threads everything is done by one core
    bytes_per_core = window_bytes * min(rates[f"{name}, 0 threads"]["median"] for name in opened)
    plans = {n: pod(json.loads(f.read_text()), bytes_per_core, first.config.prefetch) for n, f in PLANS.items()
             if f.is_file()}  # fmt: skip
    return {
        "windows": len(opened["HDF5"]),
        "shape": list(first.shapes[0]),
        "window_bytes": window_bytes,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "rates": rates,
        "together": waits,
        "bytes_per_second_per_core": bytes_per_core,
        "v5e:16x16": plans,
    }


def show(found: dict) -> None:
    """Tables of `measure`."""
    console = Console(width=120)
    step = found["rates"]["step"]["median"]
    title = f"{found['windows']} windows, batches of {tuple(found['shape'])}, {found['cores']} cores"
    table = Table("loader", "windows/s", "least to most", "times the step", title=title)
    for name, rate in found["rates"].items():
        ratio = "" if name == "step" else f"{rate['median'] / step:,.0f}"
        table.add_row(name, f"{rate['median']:,.0f}", f"{rate['least']:,.0f} to {rate['most']:,.0f}", ratio)
    console.print(table)
    for name, both in found["together"].items():
        console.print(
            f"training on {name}, 2 reader threads: {both['windows_per_second']:,.1f} windows/s, "
            f"{both['waiting']:.2%} of the time waiting for a batch"
        )
    table = Table("v5e:16x16", *found["v5e:16x16"], title="what the predicted steps ask of the input")
    rows = {
        "bytes per window": ("window_bytes", 1, ",.0f"),
        "windows/s, all": ("windows_per_second", 1, ",.0f"),
        "hosts": ("hosts", 1, ",.0f"),
        "windows/s per host": ("host_windows_per_second", 1, ",.0f"),
        "GB/s per host": ("host_bytes_per_second", 1e-9, ",.2f"),
        "GB/s, all": ("all_bytes_per_second", 1e-9, ",.1f"),
        "windows of a batch per host": ("host_batch_windows", 1, ",.0f"),
        "MB of batches held ready per host": ("prefetch_bytes", 1e-6, ",.0f"),
        "cores per host, at the rate measured here": ("host_cores", 1, ",.1f"),
    }
    for what, (key, scale, spec) in rows.items():
        table.add_row(what, *(format(plan[key] * scale, spec) for plan in found["v5e:16x16"].values()))
    console.print(table)
    console.print(f"one core delivers {found['bytes_per_second_per_core'] / 1e6:,.0f} MB/s (the slower format)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with recordings")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lumamba-loader-benchmark")
    parser.add_argument("--exclude", nargs="*", default=["full_length/*"], help="recordings left out")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=12, help="batches in a turn of the loader")
    options = parser.parse_args()
    enable_compilation_cache()
    try:
        found = measure(
            options.data, options.cache, tuple(options.exclude), options.batch_size, options.rounds, options.steps
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks.loader: {error}", file=sys.stderr)
        return 2
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
