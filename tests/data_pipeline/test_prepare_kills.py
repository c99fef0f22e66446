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

_PER_ROUND = 6  # kills until a run may end
_OPTIONS = (("--seed", "0"), ("--seed", "1"))  # one run replaces the stores of another


def arguments(corpus, raw, out, options):
    return [corpus, "--raw", str(raw), "--out", str(out), *options]


def contents(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def files(folder, pattern):
    """Files below a folder that a run adds to, or clears, at the same time."""
    with contextlib.suppress(FileNotFoundError):
        return list(folder.glob(pattern))
    return []


def any_file(folder, pattern):
    return bool(files(folder, pattern))


def stage(out):
    """How far the run has come, told by what lies in the folder."""
    work = out / ".prepare"
    if (work / "moves.json").exists():
        return "moving"
    if any_file(work, "stores/manifest.json") or any_file(work, "stores/split.json"):
        return "describing"
    if any_file(work, "stores/*.h5") or any_file(work, "stores/.*"):
        return "assembling"
    if any_file(work, "results/*/*.json"):
        return "working"
    return "beginning"


_STAGES = ("beginning", "working", "assembling", "describing", "moving")


def killed(command, out, rng, wanted):
    """Start a run and kill it when it has come to the wanted stage, or a moment later; its stage, "" if it ended.

    One time in three the workers are left to themselves: they must end, and write nothing that stays.
    """
    results = int(rng.integers(1, 12))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        if wanted == "beginning":
            time.sleep(rng.uniform(0.0, 2.0))
        elif wanted == "working":
            while run.poll() is None and len(files(out, ".prepare/results/*/*.json")) < results:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.1))
        else:
            while run.poll() is None and _STAGES.index(stage(out)) < _STAGES.index(wanted):
                time.sleep(0.0003)  # the last stages take milliseconds
            time.sleep(rng.uniform(0.0, 0.002))
        ended = run.poll()
        if rng.random() < 1 / 3:
            run.kill()
        else:
            try:
                os.killpg(run.pid, signal.SIGKILL)
            except ProcessLookupError:
                assert ended is not None
    if ended is not None:
        assert ended == 0
        return ""
    return stage(out)


def whole(out, *complete):
    """Every file is of one of the complete outputs, and a manifest lies only beside all that belongs to it."""
    found = {name: content for name, content in contents(out).items() if not name.startswith(".prepare/")}
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
            whole(out, *unbroken) if out.exists() else None
            if not reached:
                break
            hit[reached] += 1
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert contents(out) == final
        assert not (out / ".prepare").exists()
        rounds += 1
        assert tries < 3 * kills + 10
    print(f"{corpus}: {hit.total()} kills ({dict(hit)}) in {rounds} rounds, {tries} tries")
    assert kills < 10 or set(hit) == set(_STAGES)


def test_workers_end_with_their_parent(tmp_path):
    raw, out = trees.tuab_tree(tmp_path / "raw"), tmp_path / "out"
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments("tuab", raw, out, ()), "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        while run.poll() is None and not any_file(out, ".prepare/results/*/*.json"):
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
