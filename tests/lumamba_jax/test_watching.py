"""What is said of a run's time and health: input waits, goodput over restarts, stacks, compilations, effective rank."""

import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import representation, run_clock
from lumamba_jax.accelerators import documented
from lumamba_jax.architectures import build
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.run_log import RunLog
from lumamba_jax.training import PerShape


class Result:
    """An output of a step that is done when the test says so."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        self.done.wait(10)


def slow_batches(count: int, seconds: float):
    for number in range(count):
        time.sleep(seconds)
        yield number


def run_steps(loading: float, computing: float, count: int = 4) -> dict:
    """The line of a session whose batches take `loading` and whose steps take `computing` seconds."""
    with run_clock.RunClock(start_step=0, peak_flops=1e9) as clock:
        results = []
        for _ in clock.batches(slow_batches(count, loading)):
            results.append(Result())
            threading.Timer(computing, results[-1].done.set).start()
            clock.dispatched(results[-1], windows=2, flops=1e6)
        for result in results:
            result.block_until_ready()
        return clock.line(count)


def test_waiting_for_a_slow_loader_is_seen():
    line = run_steps(loading=0.1, computing=0.0)
    assert line["input_share"] > 0.5
    assert line["seconds"]["input"] >= 0.35


def test_a_wait_behind_a_running_step_is_none():
    line = run_steps(loading=0.02, computing=0.4)
    assert line["seconds"]["input"] < 0.1  # the first batch only
    assert line["mfu"] == pytest.approx(4e6 / (line["seconds"]["step"] + line["seconds"]["input"]) / 1e9)
    assert line["windows_per_second"] == pytest.approx(8 / (4 * line["step_seconds"]))


def steps_line(at: float, begin: int, end: int, step: float, **other: float) -> dict:
    seconds = {"input": 0.0, "validation": 0.0, "checkpoint": 0.0, "compile": 0.0, "step": step} | other
    line = {"event": "steps", "time": at, "from": begin, "step": end, "seconds": seconds}
    return line | {"step_seconds": step / (end - begin), "windows_per_second": 5.0, "mfu": None}


def test_goodput_counts_each_step_once_and_all_of_the_time():
    lines = [
        {"event": "start", "time": 100.0, "step": 0, "setup_seconds": 5.0},
        steps_line(125.0, 0, 10, 10.0, compile=10.0),
        steps_line(135.0, 10, 20, 10.0),
        {"event": "start", "time": 160.0, "step": 15, "setup_seconds": 4.0},  # killed: steps 16 to 20 are lost
        steps_line(174.0, 15, 25, 10.0),
        {"event": "rollback", "step": 20},
        steps_line(179.0, 20, 25, 5.0),
        {"event": "end", "time": 181.0},
    ]
    found = run_clock.summary(lines)
    assert (found.sessions, found.steps, found.wall) == (2, 25, 81.0)
    assert found.productive == 10 + 5 + 5 + 5
    assert found.repeated == 5 + 5
    assert (found.setup, found.down, found.phases["compile"]) == (9.0, 25.0, 10.0)
    assert found.goodput == pytest.approx(25 / 81)
    assert found.other == pytest.approx(2)
    parts = found.productive + found.repeated + found.setup + found.down + found.other + sum(found.phases.values())
    assert parts == pytest.approx(found.wall)


def test_a_program_that_compiles_beside_running_steps_hides_their_speed():
    result = Result()
    result.done.set()

    def interval(clock: run_clock.RunClock, step: int, compiles: int) -> dict:
        for number in clock.batches(slow_batches(2, 0.01)):
            clock.dispatched(result, windows=1, flops=1.0)
            if number < compiles:
                clock.add_compile(0.0)
        return clock.line(step)

    with run_clock.RunClock(start_step=0) as clock:
        lines = [interval(clock, 2, 1), interval(clock, 4, 1), interval(clock, 6, 0)]
    assert [line["step_seconds"] is None for line in lines] == [False, True, False]


def test_a_half_written_line_does_not_swallow_the_next_session(tmp_path):
    path = tmp_path / "performance.jsonl"
    start = {"event": "start", "time": 1.0, "step": 0, "setup_seconds": 1.0}
    path.write_text(json.dumps(start) + "\n" + '{"event": "steps", "fro')
    with RunLog(tmp_path, total_steps=4, start_step=2) as log:
        log.write_performance(start | {"time": 9.0})
    assert [line["time"] for line in run_clock.read_lines(tmp_path)] == [1.0, 9.0]


def test_without_a_terminal_metrics_are_lines(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=40) as log:
        for step in (1, 2, 3):
            log.advance(step, f"loss {step}", line=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert said == ["step 1/40  loss 1"]  # not one for each step


def test_the_command_reads_what_a_killed_process_left(tmp_path):
    lines = [{"event": "start", "time": 1.0, "step": 0, "setup_seconds": 1.0}, steps_line(6.0, 0, 4, 4.0)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "steps", "ti'
    (tmp_path / "performance.jsonl").write_text(text)
    command = [sys.executable, "-m", "lumamba_jax.run_clock"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "4 steps in 1 session(s), 5.0 s in all: goodput 80.0%" in done.stdout
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_watchdog_shows_where_a_thread_hangs():
    code = (
        "import time; from lumamba_jax.watchdog import Watchdog\n"
        "def waits_for_a_lost_process(): time.sleep(1)\n"
        "with Watchdog(0.3) as dog:\n"
        "    for _ in range(4): time.sleep(0.1); dog.alive()\n"
        "    print('alive', flush=True); waits_for_a_lost_process()\n"
        "time.sleep(0.5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("waits_for_a_lost_process") >= 1
    assert done.stderr.count("Timeout") <= 3  # none while it was alive, none after the end


def test_the_watchdog_ends_a_process_that_stands_still():
    code = (
        "import time; from lumamba_jax.watchdog import Watchdog\n"
        "with Watchdog(None, 3.0) as dog:\n"
        "    for _ in dog.each(range(8)): time.sleep(0.1)\n"
        "    print('alive', flush=True); time.sleep(300)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (70, "alive\n")
    assert "nothing moved for 3 s" in done.stderr


def test_each_shape_is_reported_once():
    reports = []
    program = PerShape(
        jax.jit(lambda first, batch: batch["signal"].sum() + first), lambda *found: reports.append(found)
    )
    for rows in (2, 3, 2, 3, 3):
        assert program(1.0, {"signal": jnp.ones((rows, 1, 4))}) == 1 + 4 * rows
    assert [shape for shape, _ in reports] == [(2, 1, 4), (3, 1, 4)]


def test_effective_rank_and_isotropy():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((2000, 8)).astype(np.float32)
    assert representation.effective_rank(normal) == pytest.approx(8, rel=0.01)
    line = normal[:, :1] * np.arange(1, 9, dtype=np.float32)
    assert representation.effective_rank(line + 3) == pytest.approx(1, abs=1e-3)
    assert representation.effective_rank(np.ones((5, 8), np.float32)) == 0
    two = normal @ np.diag([1, 1, 0, 0, 0, 0, 0, 0]).astype(np.float32)
    assert representation.effective_rank(two) == pytest.approx(2, rel=0.01)
    values = [representation.isotropy(x) for x in (normal, 3 * normal, line, np.zeros_like(normal))]
    assert values[0] < 0.01
    assert min(values[1:]) > 0.3
    assert values[3] == pytest.approx(0.4089, abs=1e-3)  # integral of (1 - exp(-t^2 / 2))^2 exp(-t^2 / 2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v7x", None),
    ],
)
def test_accelerators_by_what_jax_calls_them(kind, name):
    found = documented(kind)
    assert (found and found.name) == name


MODELS = {
    "LuMamba": LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=2, d_state=4, dropout=0.1),
    "LUNA": LunaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=2, dropout=0.1, drop_path=0.1),
    "FEMBA": FembaConfig(num_channels=3, num_samples=160, patch_stride=16, embed_dim=4, num_blocks=2, d_state=4),
}


@pytest.mark.parametrize("name", ["LuMamba", pytest.param("LUNA", marks=pytest.mark.slow), "FEMBA"])
def test_rematerialisation_changes_what_is_kept_but_no_number(name):
    config = MODELS[name]
    rng = np.random.default_rng(0)
    signal = jnp.asarray(rng.standard_normal((2, 3, 160)), jnp.float32)
    locations = jnp.asarray(0.1 * rng.standard_normal((2, 3, 3)), jnp.float32)

    def program(remat):
        graphdef, params = nnx.split(build(config.replace(remat=remat, head="none"), seed=0))

        def loss(params):
            model = nnx.merge(graphdef, params)
            return jnp.sum(jnp.sin(model.encode(signal, locations, rngs=nnx.Rngs(dropout=1)).latent))

        return loss, params

    loss, params = program("none")
    expected, kept = jax.jit(jax.value_and_grad(loss))(params), residuals(loss, params)
    for remat in ("blocks", "products"):
        loss, params = program(remat)
        found = jax.jit(jax.value_and_grad(loss))(params)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        fewer = residuals(loss, params)
        assert fewer < kept, remat


def residuals(loss, params) -> int:
    """Bytes that the backward pass keeps of the forward pass."""
    _, pull_back = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
