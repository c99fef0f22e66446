"""Steps that are not finite, through real processes: the windows are named, and the run stops, skips or rolls back."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from lumamba_jax.run_clock import read_lines
from lumamba_jax.run_log import read_metrics
from lumamba_jax.train_checkpoints import steps_in

REPOSITORY = Path(__file__).resolve().parents[2]


def call(*words: object, status: int = 0) -> str:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **flags}, timeout=600, **pipes)
    assert done.returncode == status, done.stdout[-3000:]
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Windows of three subjects; one of the first subject's is finite, but its squares are not."""
    folder = tmp_path_factory.mktemp("non_finite")
    call("-m", "data_pipeline.synthetic", folder / "recordings", "--subjects", "3", "--seconds", "10")
    options = ("--window", "2.5", "--jobs", "1")
    call("-m", "data_pipeline.prepare", folder / "recordings", folder / "windows.h5", *options)
    return folder / "windows.h5"


@pytest.fixture(scope="module")
def overflowing(store) -> tuple[Path, str]:
    """The store with such a window in the training part, and how messages name it."""
    call("train.py", *options(store, store.parent / "first"), "--trainer.steps", "1")
    validation = (store.parent / "first" / "split.json").read_text()
    path = store.with_name("overflowing.h5")
    path.write_bytes(store.read_bytes())
    row = 0
    with h5py.File(path, "r+") as file:
        for group in file.values():
            if f'"{group.attrs["subject_id"]}"' in validation.split('"train"')[1].split("]")[0]:
                group["X"][1] = 3e38 * np.sign(np.sin(np.arange(group["X"].shape[-1])))
                break
            row += len(group["X"])
    return path, f"window {row + 1} of overflowing.h5"


def options(store: Path, run_dir: Path) -> list[object]:
    words = ["debug", "--data.train", store, "--trainer.run-dir", run_dir, "--task.normalization", "none"]
    words += ["--loader.batch-size", "4", "--data.validation-fraction", "0.34", "--optimizer.lr", "1e-5"]
    return [*words, "--trainer.steps", "6", "--trainer.validate-every", "1"]


def test_the_run_stops_and_names_the_window(overflowing, tmp_path):
    path, name = overflowing
    said = call("train.py", *options(path, tmp_path / "run"), status=1)
    assert f"is not finite: {name};" in " ".join(said.split())


@pytest.mark.slow
def test_skipped_steps_change_nothing_and_are_counted(overflowing, tmp_path):
    path, name = overflowing
    said = call("train.py", *options(path, tmp_path / "run"), "--trainer.non-finite", "skip")
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    skipped = [line for line in lines if line["loss"] is None]
    assert skipped
    assert len(skipped) < len(lines)
    assert lines[-1]["skipped_steps"] == len(skipped)
    assert f"{name}: skipped ({len(skipped)} so far)" in " ".join(said.split())
    both = read_metrics(tmp_path / "run")
    validations = {line["step"]: line["loss"] for line in both if line["split"] == "validation"}
    for line in skipped[-1:]:  # the first one is the first step
        assert validations[line["step"]] == validations[line["step"] - 1]
    assert len(set(validations.values())) > 1
    assert all(name in line["windows"] for line in read_lines(tmp_path / "run") if line["event"] == "non_finite")


@pytest.mark.slow
def test_a_rollback_passes_over_the_batches_up_to_the_bad_one(overflowing, tmp_path):
    path, name = overflowing
    # With this seed the window is in the batches of steps 4 and 8; the run goes on with those of steps 5, 6 and 7.
    words = [*options(path, tmp_path / "run"), "--loader.seed", "6", "--trainer.non-finite", "rollback"]
    said = call("train.py", *words)
    assert f"{name}: rolling back (1 so far)" in " ".join(said.split())
    assert max(steps_in(tmp_path / "run" / "checkpoints")) == 6
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line["loss"] is not None for line in lines)
    assert [line["step"] for line in read_lines(tmp_path / "run") if line["event"] == "rollback"] == [3]


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run(overflowing, tmp_path):
    words = ("--trainer.non-finite", "skip", "--trainer.non-finite-limit", "1", "--trainer.steps", "12")
    said = call("train.py", *options(overflowing[0], tmp_path / "run"), *words, status=1)
    assert "more than trainer.non_finite_limit (1) allows" in " ".join(said.split())
