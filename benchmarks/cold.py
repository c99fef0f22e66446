"""Cases of whole processes: the first result of a cold one, and a night as one window."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"load": "load", "saved evaluation": "saved"}


def first_result(*, rounds: int, limit: float, environment: Mapping[str, str]) -> dict:
    """Seconds from starting Python to one window's prediction, with a warm and a cold store of compiled programs.

    The store is the library's own default, in a cache folder of the case's own. Parts: import, load, first prediction
    (tracing and compiling included); the rest of the wall time is Python itself.
    """
    variants = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run("make", folder, folder / "warm", limit, environment)
        for way, mode in WAYS.items():
            for state in ("warm", "cold"):
                if state == "warm":
                    _run(mode, folder, folder / "warm", limit, environment)
                caches = [folder / "warm" if state == "warm" else folder / f"{mode}-{i}" for i in range(rounds)]
                runs = [_run(mode, folder, cache, limit, environment) for cache in caches]
                variants[f"{way}, {state} cache"] = _summary(runs)
    return {"name": "first result", "kind": "process", "variants": variants}


def _run(mode: str, folder: Path, cache: Path, limit: float, environment: Mapping[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.workers.first_result", mode, str(folder)]
    start = time.perf_counter()
    result = subprocess.run(
        command,
        env={**os.environ, **environment, "XDG_CACHE_HOME": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    wall = time.perf_counter() - start
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return {"wall": wall, **(json.loads(result.stdout) if result.stdout else {})}


def _summary(runs: list[dict[str, float]]) -> dict:
    walls = [1e3 * run["wall"] for run in runs]
    quartiles = statistics.quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else walls * 3
    parts = {
        f"{part}_s": round(statistics.median(run[part] for run in runs), 2) for part in ("import", "load", "first")
    }
    return {"median_ms": statistics.median(walls), "quartiles_ms": quartiles[::2], "turns": len(walls), **parts}


def night(*, hours: float, limit: float, environment: Mapping[str, str]) -> dict:
    """`benchmarks.night` in a process of its own: times real time, and peak memory."""
    command = [sys.executable, "-m", "benchmarks.night", "--hours", str(hours)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
    )
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    name = "night" if hours == 8 else f"night of {hours:g} h"  # the table asks for eight
    return {"name": name, "kind": "process", "values": read_night(result.stdout)}


def read_night(text: str) -> dict[str, float]:
    """The figures of the line that `benchmarks.night` prints."""
    patterns = {
        "seconds": r"([\d.]+) s",
        "times real time": r"([\d,]+) times real time",
        "peak GB": r"peak memory ([\d.]+) GB",
    }
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match}
