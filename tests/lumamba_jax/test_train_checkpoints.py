"""Train states on disk: background writes, commit, retention, other meshes, killed and failing writers, processes."""

import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lumamba_jax import train_checkpoints
from lumamba_jax.manifest import leaf_records, named_leaves
from lumamba_jax.train_checkpoints import TrainCheckpoints

REPOSITORY = Path(__file__).resolve().parents[2]


def make_state(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {
        "step": jnp.asarray(np.int32(step)),
        "kernel": jnp.asarray(rng.standard_normal((32, 48), np.float32)),
        "bias": jnp.asarray(rng.standard_normal(48, np.float32)),
    }


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def assert_same_bits(found, expected):
    found, expected = named_leaves(found), named_leaves(expected)
    assert list(found) == list(expected)
    for name in expected:
        assert np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes(), name


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes that do not end before `go.set()`."""
    go = threading.Event()
    original = train_checkpoints.file_records

    def waiting(directory):
        assert go.wait(60)
        return original(directory)

    monkeypatch.setattr(train_checkpoints, "file_records", waiting)
    yield go
    go.set()


def full_disk(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_save_returns_before_the_disk_is_done_and_its_buffers_may_be_reused(tmp_path, slow_disk):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    with TrainCheckpoints(tmp_path) as saved:
        state = make_state(3)
        saved.save(3, state, {"best": 1})
        jax.block_until_ready(overwrite(state))
        assert train_checkpoints.steps_in(tmp_path) == []
        assert [path.name for path in tmp_path.iterdir()] == [".3.writing"]
        slow_disk.set()
        restored, progress = saved.restore(ABSTRACT)
        assert_same_bits(restored, make_state(3))
        assert progress == {"best": 1}


def test_an_error_of_the_background_write_surfaces_at_the_next_call(tmp_path, monkeypatch):
    with TrainCheckpoints(tmp_path) as saved:
        saved.save(1, make_state(1), {})
        saved.wait()
        with monkeypatch.context() as patch:
            patch.setattr(train_checkpoints, "file_records", full_disk)
            saved.save(2, make_state(2), {})
            with pytest.raises(OSError, match=r"could not be saved: the disk is full; earlier ones.* newest is 1$"):
                saved.save(3, make_state(3), {})
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        saved.save(3, make_state(3), {})
        assert saved.latest_step == 3


def test_a_failed_save_can_be_asked_for_and_saved_again(tmp_path, slow_disk, monkeypatch):
    with TrainCheckpoints(tmp_path) as saved:
        assert saved.failure() is None
        with monkeypatch.context() as patch:
            slow_disk.set()
            patch.setattr(train_checkpoints, "file_records", full_disk)
            saved.save(1, make_state(1), {})
            deadline = time.monotonic() + 60
            while (sentence := saved.failure()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert sentence == f"{tmp_path / '1'} could not be saved: the disk is full; no earlier one exists"
        assert list(tmp_path.iterdir()) == []
        assert saved.failure() is None  # told once
        slow_disk.clear()
        saved.save(2, make_state(2), {})
        assert saved.failure() is None  # in progress: not waited for
        assert train_checkpoints.steps_in(tmp_path) == []
        slow_disk.set()
        assert saved.steps == [2]
        assert saved.failure() is None


def test_an_error_surfaces_at_the_end_unless_there_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_checkpoints, "file_records", full_disk)
    with pytest.raises(OSError, match="1 could not be saved: the disk is full; no earlier one exists"):  # noqa: SIM117
        with TrainCheckpoints(tmp_path) as saved:
            saved.save(1, make_state(1), {})
    notes = []
    with pytest.raises(FloatingPointError):  # noqa: PT012, SIM117
        with TrainCheckpoints(tmp_path, say=notes.append) as saved:
            saved.save(1, make_state(1), {})
            raise FloatingPointError("the loss is not finite")
    assert "the disk is full" in notes[0]


def test_progress_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with TrainCheckpoints(tmp_path) as saved:
        with pytest.raises(ValueError, match="JSON"):
            saved.save(1, make_state(1), {"best": float("inf")})
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="keep 0"):
        TrainCheckpoints(tmp_path, keep=0)


def test_retention_keeps_the_newest_and_every_nth(tmp_path):
    with TrainCheckpoints(tmp_path, keep=2, keep_every=4) as saved:
        for step in (1, 2, 4, 5, 6, 8, 9, 11):
            saved.save(step, make_state(step), {})
        assert saved.steps == [4, 8, 9, 11]
        saved.save(3, make_state(3), {})  # what was just saved stays, whatever its number
        assert saved.steps == [3, 4, 8, 9, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11", "3", "4", "8", "9"]


def test_a_step_saved_again_replaces_the_earlier_one(tmp_path):
    for value in (1, 2):
        with TrainCheckpoints(tmp_path) as saved:
            saved.save(5, make_state(value), {"value": value})
    with TrainCheckpoints(tmp_path) as saved:
        state, progress = saved.restore(ABSTRACT)
    assert progress == {"value": 2}
    assert_same_bits(state, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_what_a_killed_process_left_is_finished_or_undone(tmp_path):
    with TrainCheckpoints(tmp_path) as saved:
        saved.save(5, make_state(5), {})
    (tmp_path / "5").rename(tmp_path / ".5.replaced")
    for name in (".6.writing", ".4.deleting"):
        (tmp_path / name / "state").mkdir(parents=True)
    with TrainCheckpoints(tmp_path) as saved:
        assert_same_bits(saved.restore(ABSTRACT)[0], make_state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_a_state_moves_between_meshes(tmp_path):
    def place(state, grid, spec):
        mesh = jax.make_mesh(grid, ("data", "fsdp"), devices=jax.devices()[: grid[0] * grid[1]])
        specs = {"step": PartitionSpec(), "kernel": spec, "bias": PartitionSpec("fsdp")}
        shardings = {name: NamedSharding(mesh, part) for name, part in specs.items()}
        return jax.device_put(state, shardings), {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name]) for name, leaf in state.items()
        }

    layouts = [
        ((4, 2), PartitionSpec("fsdp")),
        ((1, 1), PartitionSpec()),
        ((2, 4), PartitionSpec("fsdp", "data")),
        ((8, 1), PartitionSpec(("data", "fsdp"))),
    ]
    original, records = make_state(1), leaf_records(make_state(1))
    for number, (grid, spec) in enumerate(layouts):
        directory = tmp_path / str(number)
        with TrainCheckpoints(directory) as saved:
            saved.save(1, place(original, grid, spec)[0], {})
        for other_grid, other_spec in layouts:
            _, abstract = place(original, other_grid, other_spec)
            with TrainCheckpoints(directory, say=pytest.fail) as saved:
                restored, _ = saved.restore(abstract)
            assert_same_bits(restored, original)
            assert leaf_records(restored) == records
            assert all(restored[name].sharding == abstract[name].sharding for name in restored)


# A process that may write no file above 20,000 bytes, as one that meets a full disk: `ulimit -f` fails Orbax's own
# writes in the background, far below the code under test.
FULL_DISK = """
import resource, sys
import jax, numpy as np
from lumamba_jax.train_checkpoints import TrainCheckpoints
state = lambda n: {"w": np.random.default_rng(n).standard_normal(n)}
with TrainCheckpoints(sys.argv[1], keep=3) as saved:
    saved.save(1, state(500), {})
    saved.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    saved.save(2, state(100_000), {})
    try:
        saved.save(3, state(500), {})
    except OSError as error:
        print(error)
    assert saved.steps == [1], saved.steps
    saved.save(4, state(500), {})
"""


def test_a_full_disk_costs_the_step_and_nothing_else(tmp_path):
    done = run_python(FULL_DISK, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{tmp_path / '2'} could not be saved: a file would be larger than allowed; "
        "earlier ones are untouched, the newest is 1\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
    assert [verdict.damage for verdict in train_checkpoints.verify(tmp_path)] == [None, None]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def run_python(code: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=os.environ | environment, timeout=300
    )


# A parent that imports once and forks before JAX starts its threads; each child restores, verifies and saves step after
# step until it is killed, at a random moment of its start, its restore or its saves.
KILLED = """
import os, random, signal, sys, time
import jax, numpy as np
from lumamba_jax.train_checkpoints import TrainCheckpoints, steps_in, verify
directory, kills = sys.argv[1], int(sys.argv[2])

def state(step):
    rng = np.random.default_rng(step)
    return {"step": np.int32(step), **{f"w/{i}": rng.standard_normal((64, 64), np.float32) for i in range(8)}}

def work(ready):
    with TrainCheckpoints(directory, keep=2, keep_every=50) as saved:
        step = saved.latest_step or 0
        if step:
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state(0))
            found, progress = saved.restore(abstract)
            step = progress["step"]
            for name, leaf in state(step).items():
                assert np.asarray(found[name]).tobytes() == leaf.tobytes(), (step, name)
        os.write(ready, b"r")
        while True:
            step += 1
            saved.save(step, jax.device_put(state(step)), {"step": step})

random.seed(11)
newest = 0
for kill in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(write)
        except BaseException as error:
            print("child:", repr(error), flush=True)
        os._exit(3)
    os.close(write)
    if kill % 3:
        os.read(read, 1)  # restored: what follows falls into saves
    time.sleep(random.uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    assert os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
    steps = steps_in(directory)
    assert not steps or steps[-1] >= newest, (newest, steps)
    newest = steps[-1] if steps else 0
assert all(verdict.damage is None for verdict in verify(directory))
print(newest)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_whole_steps_only(tmp_path, kills):
    (tmp_path / "checkpoints").mkdir()
    done = run_python(KILLED, tmp_path / "checkpoints", kills)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > kills / 4


TWO_PROCESSES = """
import json, os, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
from lumamba_jax import checkpoint, manifest, train_checkpoints
from lumamba_jax.lumamba import LuMambaConfig
mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
specs = {"step": PartitionSpec(), "kernel": PartitionSpec("fsdp", "data"), "bias": PartitionSpec("fsdp")}

def state(step):
    rng = np.random.default_rng(step)
    values = {"step": np.int32(step), "kernel": rng.standard_normal((32, 48), np.float32),
              "bias": rng.standard_normal(48, np.float32)}
    return {name: jax.make_array_from_callback(np.shape(value), NamedSharding(mesh, specs[name]),
                                               lambda part, value=value: np.asarray(value)[part])
            for name, value in values.items()}

abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
with train_checkpoints.TrainCheckpoints(directory + "/checkpoints", keep=2) as saved:
    for step in (1, 2, 3):
        saved.save(step, state(step), {"step": step})
    assert saved.steps == [2, 3], saved.steps
    if index == 0:
        os.remove(directory + "/checkpoints/3/state/_CHECKPOINT_METADATA")
    restored, progress = saved.restore(abstract)
    assert progress == {"step": 2} and saved.latest_step == 2
    assert manifest.leaf_damage(manifest.leaf_records(state(2)), restored) is None

    def broken(*_):
        raise OSError(28, "No space left on device")
    if index == 0:
        train_checkpoints.file_records, original = broken, train_checkpoints.file_records
    saved.save(4, state(4), {})
    try:
        saved.wait()
    except OSError as error:
        print(error)
    if index == 0:
        train_checkpoints.file_records = original
    def breaking(function):  # after what Orbax does on all processes together
        def then_broken(*arguments):
            function(*arguments)
            broken()
        return then_broken

    finish = saved._finish
    if index == 1:  # process 0 commits meanwhile
        saved._finish = breaking(finish)
    saved.save(5, state(5), {"step": 5})
    while (sentence := saved.failure()) is None:
        pass
    print("told:", sentence)
    saved._finish = finish
    saved.save(5, state(5), {"step": 5})
    load = train_checkpoints._load
    if index == 1:
        train_checkpoints._load = breaking(load)
    try:
        saved.restore(abstract)
    except OSError as error:
        print("restore:", error)
    train_checkpoints._load = load

config = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)
shape = checkpoint.abstract_params(config)
split = lambda leaf: NamedSharding(mesh, PartitionSpec("data" if leaf.ndim and leaf.shape[0] % 2 == 0 else None))
params = jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, split(leaf), lambda part:
    np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)[part]), shape)
for _ in range(2):  # the second replaces the first
    checkpoint.save_pretrained(directory + "/best", config, params, {})
assert os.listdir(directory) == ["best", "checkpoints"] or os.listdir(directory) == ["checkpoints", "best"]
if index == 1:  # each process reads an export for itself
    loaded = checkpoint.load_pretrained(directory)[1]
    for leaf in jax.tree.leaves(loaded):
        assert np.array_equal(np.ravel(leaf), np.arange(leaf.size, dtype=leaf.dtype))
print("done")
"""


def test_two_processes_write_one_checkpoint_that_one_process_reads(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, str(tmp_path), str(port), str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=600))
        finally:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err[-3000:]
        assert "4 could not be saved: the disk is full; earlier ones are untouched, the newest is 2\n" in out
        assert "told: " in out
        assert "5 could not be saved: the disk is full; " in out
        host = socket.gethostname()
        assert f"restore: restoring failed on process 1 ({host}): [Errno 28] No space left on device\n" in out
        assert out.splitlines()[-1] == "done"
    assert "3 is damaged: state/_CHECKPOINT_METADATA is missing" in outputs[0][1]
    assert "damaged" not in outputs[1][1]
    with TrainCheckpoints(tmp_path / "checkpoints", keep=2, say=pytest.fail) as saved:
        assert saved.steps == [2, 5]
        state, progress = saved.restore(ABSTRACT)
    assert progress == {"step": 5}
    assert_same_bits(state, make_state(5))
