"""Runs of several real processes on one machine: the numbers of one process, and what a cluster does to them."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lumamba_jax.run_log import read_metrics
from lumamba_jax.train_checkpoints import steps_in

REPOSITORY = Path(__file__).resolve().parents[2]
STOPPED = 75
MIXED = ("--task.objective", "mixed", "--task.sigreg-count", "8")


def environment(**more: str) -> dict[str, str]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {**os.environ, **flags, "PYTHONPATH": str(REPOSITORY), **more}


def words(store: Path, run_dir: Path, *more: object) -> list[str]:
    options = ["--data.train", store, "--trainer.run-dir", run_dir, "--data.test-fraction", "0.25"]
    return [str(word) for word in ("train.py", "debug", *options, "--trainer.resume", "true", *more)]


class Process(subprocess.Popen):
    """What it prints goes to a file: a pipe that nobody reads would fill up and stop it."""

    def __init__(self, command: list[str], **more: str):
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        super().__init__(
            command, cwd=REPOSITORY, env=environment(**more), stdout=self._file, stderr=subprocess.STDOUT, text=True
        )

    def output(self, timeout: float = 900) -> str:
        """Everything it printed, when it has ended."""
        self.wait(timeout)
        self._file.seek(0)
        return self._file.read()


@contextlib.contextmanager
def processes(count: int, commands: list[list[str]], **more: str) -> Iterator[list[Process]]:
    """`count` processes of one run; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        hosts = ["--hosts.coordinator", address, "--hosts.count", str(count), "--hosts.index", str(index)]
        command = [sys.executable, *commands[index % len(commands)], *(hosts if count > 1 else [])]
        started.append(Process(command, **more))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(count: int, command: list[str], *, status: int = 0, **more: str) -> list[str]:
    """Output of each process, all of which must end with `status`."""
    with processes(count, [command], **more) as started:
        outputs = [process.output() for process in started]
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
            noise = 1e-3 * tolerance  # gradients that are zero by construction (a bias before a norm)
            assert np.abs(second[name] - expected).max() <= tolerance * scale + noise, name
        else:
            np.testing.assert_array_equal(second[name], expected)


# An Adam eps of 1e-3: the usual 1e-8 makes full steps of the rounding noise of gradients that are zero. Wide enough for
# kernels that `fsdp` divides; the two montages are mixed in every batch.
WIDE = ("--model.embed-dim", "32", "--model.num-queries", "4", "--optimizer.eps", "1e-3", *MIXED)
STEPS = ("--trainer.steps", "20", "--trainer.validate-every", "10", *WIDE)
PRECISION = {"float32": ({}, 1e-5), "float64": ({"JAX_ENABLE_X64": "true"}, 1e-10)}


@pytest.fixture(scope="module", params=PRECISION)
def single(request, store, tmp_path_factory) -> tuple[str, Path]:
    """Twenty steps of the mixed objective in one process on one device."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    run(1, words(store, run_dir, *STEPS, "--model.compute-dtype", request.param), **PRECISION[request.param][0])
    return request.param, run_dir


def assert_same_run(single: tuple[str, Path], run_dir: Path) -> None:
    dtype, expected = single
    tolerance = PRECISION[dtype][1]
    assert_close(final_state(expected), final_state(run_dir), tolerance)
    for one, many in zip(read_metrics(expected), read_metrics(run_dir), strict=True):
        assert one.keys() == many.keys()
        names = [name for name in one if name != "split"]
        # Norms and small terms are sums over many numbers that nearly cancel.
        np.testing.assert_allclose([many[k] for k in names], [one[k] for k in names], rtol=10 * tolerance, atol=1e-7)
        assert many.get("loss") == pytest.approx(one.get("loss"), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_numbers_of_one(store, single, tmp_path, count):
    words_of_run = words(store, tmp_path / "run", *STEPS, "--model.compute-dtype", single[0])
    outputs = run(count, words_of_run, **PRECISION[single[0]][0])
    assert "finished after 20 steps" in outputs[0]
    assert "finished" not in "".join(outputs[1:])
    assert_same_run(single, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_eight_devices_give_the_numbers_of_one(store, single, tmp_path, fsdp):
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    mesh = ("--mesh.devices", "8", "--mesh.fsdp", fsdp, "--model.compute-dtype", single[0])
    run(1, words(store, tmp_path / "run", *STEPS, *mesh), **PRECISION[single[0]][0], XLA_FLAGS=flags)
    assert_same_run(single, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes_and_devices(store, single, tmp_path):
    variables, more = PRECISION[single[0]][0], ("--model.compute-dtype", single[0])
    run(2, words(store, tmp_path / "run", *STEPS, *more, "--trainer.stop-after", "7"), **variables)
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"
    mesh = ("--mesh.fsdp", "2", "--trainer.stop-after", "6")
    run(1, words(store, tmp_path / "run", *STEPS, *more, *mesh), **variables, XLA_FLAGS=flags)
    run(1, words(store, tmp_path / "run", *STEPS, *more), **variables)
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics if line["split"] == "train"] == list(range(1, 21))
    assert_close(final_state(single[1]), final_state(tmp_path / "run"), PRECISION[single[0]][1])


def test_the_process_with_another_configuration_is_named(store, tmp_path):
    same = words(store, tmp_path / "run", *STEPS)
    with processes(3, [same, same, [*same, "--optimizer.lr", "0.5"]]) as started:
        outputs = [process.output() for process in started]
        assert [process.returncode for process in started] == [2, 2, 2], outputs
    for output in outputs:
        assert f"another configuration of process 2 ({socket.gethostname()})" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(store, tmp_path):
    command = words(store, tmp_path / "run", "--trainer.steps", "100000", "--trainer.validate-every", "100000")
    with processes(2, [command]) as started:
        wait_for_steps(tmp_path / "run", 2)
        started[1].send_signal(signal.SIGTERM)
        outputs = [process.output() for process in started]
        assert [process.returncode for process in started] == [STOPPED, STOPPED], outputs
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert saved == read_metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_host_that_stands_still_ends_the_run_with_stacks_and_it_goes_on(store, tmp_path, stopped):
    steps = ("--trainer.steps", "100000", "--trainer.validate-every", "5", "--trainer.hang-seconds", "4")
    command = words(store, tmp_path / "run", *steps, "--hosts.heartbeat-seconds", "12")
    with processes(2, [command]) as started:
        wait_for_steps(tmp_path / "run", 6)
        started[stopped].send_signal(signal.SIGSTOP)
        output = started[1 - stopped].output()
        assert started[1 - stopped].returncode not in (0, STOPPED)
        assert "Timeout (0:00:04)!" in output  # the watchdog's stacks: it waits for the other in a collective
    done = max(steps_in(tmp_path / "run" / "checkpoints"))
    run(2, words(store, tmp_path / "run", *steps, "--trainer.stop-after", "3"))
    assert max(steps_in(tmp_path / "run" / "checkpoints")) == done + 3


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_sentence_and_it_goes_on(store, tmp_path):
    steps = ("--trainer.steps", "4", "--trainer.validate-every", "2", *WIDE)
    command = [sys.executable, *words(store, tmp_path / "run", *steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    limited = ["bash", "-c", 'ulimit -f 600; exec "$@"', "bash", *command]  # no file may grow beyond 600 KiB
    done = subprocess.run(limited, cwd=REPOSITORY, env=environment(), **pipes)
    assert done.returncode == STOPPED, done.stderr
    said = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("train.py: ") for line in said) == 1, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert steps_in(checkpoints) == []
    run(1, words(store, tmp_path / "run", *steps))
    assert steps_in(checkpoints)[-1] == 4
    assert [path.name for path in checkpoints.iterdir() if not path.name.isdigit()] == []


def wait_for_steps(run_dir: Path, steps: int) -> None:
    """Until the run's log has a line of a step that late."""
    deadline, metrics = time.monotonic() + 600, run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.is_file() and any(line["step"] >= steps for line in complete_lines(metrics)):
            return
        time.sleep(0.2)
    raise AssertionError(f"{run_dir} never came to step {steps}")


def complete_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for_a_save(run_dir: Path, process: subprocess.Popen, seconds: float) -> bool:
    """Whether a checkpoint began to be written in that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if any((run_dir / "checkpoints").glob(".*.writing")):
            return True
        time.sleep(0.001)
    return False


def survive(store: Path, run_dir: Path, draw: random.Random, kills: int, options: tuple[str, ...]) -> Counter[str]:
    """Start a run of two processes again and again until it is finished; kill -9 one or both, at most `kills` times.

    The moments are random; one in three lies in a save. Returns what was counted.
    """
    counts: Counter[str] = Counter()
    command = words(store, run_dir, *options)
    while True:
        counts["starts"] += 1
        with processes(2, [command]) as started:
            if counts["kills"] < kills:
                if draw.random() < 1 / 3 and wait_for_a_save(run_dir, started[0], 60):
                    time.sleep(draw.uniform(0, 0.05))
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        started[0].wait(timeout=draw.uniform(0.5, 16.0))
            if counts["kills"] < kills and started[0].poll() is None:
                for victim in draw.choice(([0], [1], [0, 1])):
                    started[victim].kill()
                    started[victim].wait()
                counts["kills"] += 1
                counts["kills in a save"] += any((run_dir / "checkpoints").glob(".*.writing"))
                continue  # a cluster ends the others when one is lost; so does leaving this block
            outputs = [process.output() for process in started]
            assert [process.returncode for process in started] == [0, 0], outputs
            return counts


KILLED = (*MIXED, "--trainer.steps", "60", "--trainer.validate-every", "5", "--trainer.keep-checkpoints", "2")


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    run(2, words(store, run_dir, *KILLED))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 100])
def test_killed_processes_leave_no_trace(store, unbroken, tmp_path, kills):
    draw, total, runs = random.Random(kills), Counter(), 0
    while total["kills"] < kills:
        run_dir = tmp_path / f"run{runs}"
        total += survive(store, run_dir, draw, kills - total["kills"], KILLED)
        runs += 1
        assert_close(final_state(unbroken), final_state(run_dir), 0.0)
        assert read_metrics(run_dir) == read_metrics(unbroken)  # a line for each step: each batch counted once
    print(json.dumps({"runs": runs, **total}))
