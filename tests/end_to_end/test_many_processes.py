"""Runs of several real processes on one machine: the numbers of one process, and what a cluster does to them."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lumamba_jax.run_log import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
STOPPED = 75
MIXED = ("--task.objective", "mixed", "--task.sigreg-count", "8")


def environment(**more: str) -> dict[str, str]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {**os.environ, **flags, "PYTHONPATH": str(REPOSITORY), **more}


def words(store: Path, run_dir: Path, *more: object) -> list[str]:
    options = ["--data.train", store, "--trainer.run-dir", run_dir, "--data.test-fraction", "0.25"]
    return [str(word) for word in ("train.py", "debug", *options, "--trainer.resume", "true", *more)]


@contextlib.contextmanager
def processes(count: int, commands: list[list[str]], **more: str) -> Iterator[list[subprocess.Popen]]:
    """`count` processes of one run; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        hosts = ["--hosts.coordinator", address, "--hosts.count", str(count), "--hosts.index", str(index)]
        command = [sys.executable, *commands[index % len(commands)], *(hosts if count > 1 else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment(**more), **pipes))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(count: int, command: list[str], *, status: int = 0, **more: str) -> list[str]:
    """Output of each process, all of which must end with `status`."""
    with processes(count, [command], **more) as started:
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [status] * count, outputs[0][-3000:]
    return outputs


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Windows of four subjects in two montages."""
    folder = tmp_path_factory.mktemp("processes")
    for command in (
        ("data_pipeline.synthetic", folder / "recordings", "--subjects", "4", "--seconds", "10"),
        ("data_pipeline.prepare", folder / "recordings", folder / "windows.h5", "--window", "2.5", "--jobs", "1"),
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=REPOSITORY, env=environment(), check=True)
    return folder / "windows.h5"


def final_state(run_dir: Path) -> dict[str, np.ndarray]:
    newest = max((run_dir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not where the processes of the run had them
    shapes = ocp.metadata(newest).metadata
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in shapes.items()}
    return {name: np.asarray(value) for name, value in ocp.load(newest, wanted).items()}


def assert_close(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, expected in first.items():
        if np.issubdtype(expected.dtype, np.floating):
            scale = max(np.abs(expected).max(), 1e-30)
            noise = 1e-8 if tolerance else 0.0  # gradients that are zero by construction (a bias before a norm)
            assert np.abs(second[name] - expected).max() <= tolerance * scale + noise, name
        else:
            np.testing.assert_array_equal(second[name], expected)


# An Adam eps of 1e-3: the usual 1e-8 makes full steps of the rounding noise of gradients that are zero.
STEPS = ("--trainer.steps", "6", "--trainer.validate-every", "3", "--optimizer.eps", "1e-3", *MIXED)


@pytest.fixture(scope="module")
def single(store, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("single") / "run"
    run(1, words(store, run_dir, *STEPS))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_numbers_of_one(store, single, tmp_path, count):
    outputs = run(count, words(store, tmp_path / "run", *STEPS))
    assert "finished after 6 steps" in outputs[0]
    assert "finished" not in "".join(outputs[1:])
    assert_close(final_state(single), final_state(tmp_path / "run"), 1e-5)
    for one, many in zip(read_metrics(single), read_metrics(tmp_path / "run"), strict=True):
        assert one.keys() == many.keys()
        np.testing.assert_allclose([many[k] for k in one if k != "split"], [one[k] for k in one if k != "split"], 1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(store, single, tmp_path):
    run(2, words(store, tmp_path / "run", *STEPS, "--trainer.stop-after", "3"))
    run(1, words(store, tmp_path / "run", *STEPS))
    assert_close(final_state(single), final_state(tmp_path / "run"), 1e-5)


def test_the_process_with_another_configuration_is_named(store, tmp_path):
    same = words(store, tmp_path / "run", *STEPS)
    with processes(3, [same, same, [*same, "--optimizer.lr", "0.5"]]) as started:
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [2, 2, 2], outputs
    for output in outputs:
        assert f"another configuration of process 2 ({socket.gethostname()})" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(store, tmp_path):
    command = words(store, tmp_path / "run", "--trainer.steps", "100000", "--trainer.validate-every", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with processes(2, [command]) as started:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=200)[0] for process in started]
        assert [process.returncode for process in started] == [STOPPED, STOPPED], outputs
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert saved == read_metrics(tmp_path / "run")[-1]["step"]


def survive(store: Path, run_dir: Path, kills: int, *, seed: int, options: tuple[str, ...]) -> dict:
    """Start a run of two processes again and again, kill -9 one or both at random moments, and let the last one end."""
    draw, counts = random.Random(seed), {"restarts": 0, "kills": 0}
    command = words(store, run_dir, *options)
    while True:
        with processes(2, [command]) as started:
            if counts["kills"] < kills:
                victims = draw.choice(([0], [1], [0, 1]))
                try:
                    started[0].wait(timeout=draw.uniform(0.5, 14.0))
                except subprocess.TimeoutExpired:
                    counts["kills"] += 1
                    for victim in victims:
                        started[victim].kill()
                counts["restarts"] += 1
                if any(process.poll() is not None for process in started):
                    continue  # a cluster ends the others when one is lost; so does leaving this block
            outputs = [process.communicate(timeout=300)[0] for process in started]
            codes = [process.returncode for process in started]
            if codes == [0, 0]:
                return counts
            assert counts["kills"] < kills, outputs


KILLED = (*MIXED, "--trainer.steps", "60", "--trainer.validate-every", "5", "--trainer.keep-checkpoints", "2")


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    run(2, words(store, run_dir, *KILLED))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 100])
def test_killed_processes_leave_no_trace(store, unbroken, tmp_path, kills):
    counts = survive(store, tmp_path / "run", kills, seed=kills, options=KILLED)
    print(json.dumps(counts))
    assert_close(final_state(unbroken), final_state(tmp_path / "run"), 0.0)
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)
