"""`prepare` killed again and again, with or without its workers: the last run writes what an unbroken one writes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import corpus_trees as trees
import numpy as np
import pytest

from data_pipeline.prepare import main

_PER_ROUND = 5  # kills until a run may end
_OPTIONS = (("--seed", "0"), ("--seed", "1"))  # one run replaces the stores of another


def arguments(corpus, raw, out, options):
    return [corpus, "--raw", str(raw), "--out", str(out), *options]


def contents(out):
    """Name -> bytes of what a run leaves; not of its own folder, which has to be gone at the end."""
    places = [path for path in out.iterdir() if path.name != ".prepare"] if out.exists() else []
    return {path.name: path.read_bytes() for path in places}


def fresh(folder, pattern, since):
    """Whether a file was written since a time (ns) below a folder that a run adds to, or clears, meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime_ns >= since for path in folder.glob(pattern))
    return False


_SIGNS = {  # files that tell how far a run has come, the furthest first
    "moving": ("moves.json",),
    "describing": ("stores/manifest.json", "stores/split.json"),
    "assembling": ("stores/*.h5", "stores/.*"),
    "working": ("results/*/*.json",),
}
_STAGES = ("beginning", *reversed(_SIGNS))


def stage(out, since):
    """How far the run has come that began at a time (ns), told by what it has written so far."""
    for name, patterns in _SIGNS.items():
        if any(fresh(out / ".prepare", pattern, since) for pattern in patterns):
            return name
    return "beginning"


def killed(command, out, rng, wanted):
    """Start a run and kill it at the wanted stage, or a moment later, or at any moment; its stage, "" if it ended.

    One time in three the workers are left to themselves: they must end, and write nothing that stays.
    """
    since = time.time_ns() - 20_000_000  # clocks of file systems tick slowly
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        if wanted == "beginning":
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            while run.poll() is None and _STAGES.index(stage(out, since)) < _STAGES.index(wanted):
                time.sleep(0.0003)  # the last stages take milliseconds
            time.sleep(rng.uniform(0.0, 0.3 if wanted == "working" else 0.002))
        if rng.random() < 1 / 3:
            run.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    if run.returncode == -signal.SIGKILL:
        return stage(out, since)
    assert run.returncode == 0
    return ""


def whole(out, *complete):
    """Every file is of one of the complete outputs, and a manifest lies only beside all that belongs to it."""
    found = contents(out)
    assert any(found.items() <= own.items() for own in complete)
    if "manifest.json" in found:
        stores = {name for name in found if name.endswith(".h5")}
        fitting = [own for own in complete if own["manifest.json"] == found["manifest.json"]]
        assert stores == {name for name in fitting[0] if name.endswith(".h5")}


@pytest.mark.parametrize(
    ("corpus", "tree", "kills"),
    [
        ("tuab", trees.tuab_tree, 2),
        pytest.param("tuab", trees.tuab_tree, 32, marks=pytest.mark.slow),
        pytest.param("tuar", trees.tuar_tree, 18, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_the_last_run_ends_with_the_same_bytes(corpus, tree, kills, tmp_path):
    raw, out = tree(tmp_path / "raw"), tmp_path / "out"
    unbroken = []
    for i, options in enumerate(_OPTIONS):
        assert main([*arguments(corpus, raw, tmp_path / f"unbroken{i}", options), "--jobs", "1"]) == 0
        unbroken.append(contents(tmp_path / f"unbroken{i}"))
    assert unbroken[0] != unbroken[1]
    rng, hit, rounds, tries = np.random.default_rng(kills), Counter(), 0, 0
    while hit.total() < kills:
        options, final = _OPTIONS[rounds % 2], unbroken[rounds % 2]
        command = [sys.executable, "-m", "data_pipeline.prepare", *arguments(corpus, raw, out, options), "--jobs", "2"]
        for _ in range(min(_PER_ROUND, kills - hit.total())):
            reached = killed(command, out, rng, _STAGES[1:][tries % 4] if tries % 5 else "beginning")
            tries += 1
            whole(out, *unbroken)
            if not reached:
                break
            hit[reached] += 1
            if reached in ("describing", "moving"):  # little is left to do
                break
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert contents(out) == final
        assert not (out / ".prepare").exists()
        rounds += 1
        assert tries < 3 * kills + 10
    print(f"{corpus}: {hit.total()} kills ({dict(hit)}) in {rounds} rounds, {tries} tries")
    assert kills < 10 or set(hit) >= {"working", "assembling", "moving"}


def test_workers_end_with_their_parent(tmp_path):
    raw, out = trees.tuab_tree(tmp_path / "raw"), tmp_path / "out"
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments("tuab", raw, out, ()), "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        while run.poll() is None and not fresh(out, ".prepare/results/*/*.json", 0):
            time.sleep(0.005)
        assert len(living(run.pid)) >= 3  # itself and two workers
        run.kill()
    until = time.monotonic() + 30
    while living(run.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not living(run.pid)


def living(group):
    """Processes of a process group that run or sleep."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell its processes")
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(own) == group and state != "Z":
            found.append(path.parent.name)
    return found
