"""The mesh and its rules: who is split, who is replicated, and what does not divide is said."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from lumamba_jax.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh, place, state_shardings, to_global

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class FakeDevice:
    """What the order of a mesh depends on."""

    id: int
    process_index: int
    platform: str = "fake"
    device_kind: str = "fake"


def slice_of(counts: list[int]) -> list[FakeDevice]:
    """So many devices of each process, the numbers of a process far apart and the whole shuffled."""
    owners = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return [FakeDevice(number, int(owner)) for number, owner in enumerate(owners)]


def rows_of_processes(mesh: Mesh, rows: int) -> list[list[int]]:
    """The rows of a batch of so many that lie on the devices of each process, in the order of its devices."""
    found: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((rows,)).items():
        found.setdefault(device.process_index, set()).update(range(rows)[part])
    return [sorted(found[process]) for process in sorted(found)]


def test_mesh_has_both_axes_and_uses_the_devices_asked_for():
    mesh = make_mesh(MeshConfig(fsdp=2, devices=8))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert make_mesh(MeshConfig(devices=1)).size == 1


@pytest.mark.parametrize(("fsdp", "devices"), [(3, 8), (0, None), (1, 99)])
def test_impossible_meshes_are_refused(fsdp, devices):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(MeshConfig(fsdp=fsdp, devices=devices))


def test_only_large_kernels_are_split_on_their_input_axis_and_moments_follow():
    mesh = make_mesh(MeshConfig(fsdp=2, devices=8))
    leaves = {
        "blocks": {"kernel": (512, 256), "A_log": (512, 512), "bias": (512,)},
        "small": {"kernel": (16, 16)},
        "odd": {"kernel": (513, 256)},
        "conv": {"kernel": (4, 512, 64)},
    }
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), leaves, is_leaf=lambda x: isinstance(x, tuple)
    )
    found = jax.tree.map(lambda s: s.spec, state_shardings({"params": abstract, "mu": abstract}, mesh))
    for part in ("params", "mu"):
        specs = jax.tree_util.tree_leaves_with_path(found[part], is_leaf=lambda x: isinstance(x, PartitionSpec))
        names = {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in specs}
        split = {name for name, spec in names.items() if spec == jax.P("fsdp")}
        assert split == {"blocks/kernel"}


def test_global_batches_keep_rows_and_order():
    mesh = make_mesh(MeshConfig(fsdp=2, devices=8))
    batch = {"signal": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "window_mask": np.arange(16) < 15}
    placed = to_global(batch, mesh)
    for key, value in batch.items():
        np.testing.assert_array_equal(np.asarray(placed[key]), value)
        assert placed[key].sharding == batch_sharding(mesh)
    assert placed["signal"].addressable_shards[0].data.shape == (2, 3)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch size \[12\].*8 local devices"):
        to_global({"signal": np.zeros((12, 3))}, make_mesh(MeshConfig(devices=8)))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_rows_of_a_process_are_its_block_of_the_batch_whatever_the_order_of_devices(fsdp):
    mesh = make_mesh(MeshConfig(fsdp=fsdp), devices=slice_of([4] * 6))
    assert mesh.shape["fsdp"] == fsdp
    assert rows_of_processes(mesh, 48) == [list(range(8 * h, 8 * h + 8)) for h in range(6)]
    for copy in mesh.devices:
        assert len({device.process_index for device in copy}) == 1  # parameters are gathered within a host


@pytest.mark.parametrize(("counts", "devices"), [([4, 4], 4), ([4, 4], 6), ([4, 2], None), ([2, 4], None)])
def test_a_mesh_with_unequal_numbers_of_devices_per_process_is_refused(counts, devices):
    with pytest.raises(ValueError, match=r"^mesh: \d devices would be \d of one process and 4 of .*mesh.devices"):
        make_mesh(MeshConfig(devices=devices), devices=slice_of(counts))


def test_a_mesh_in_another_order_is_refused_before_rows_change_places(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    shuffled = Mesh(np.array(slice_of([2] * 4)).reshape(8, 1), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"ordered by process.*sharding.make_mesh"):
        to_global({"signal": np.zeros((16, 3))}, shuffled)
    without_the_third = make_mesh(MeshConfig(), devices=slice_of([2] * 3))
    with pytest.raises(ValueError, match="ordered by process"):
        to_global({"signal": np.zeros((12, 3))}, without_the_third)


# In a process of its own: libtpu reads the environment once and stays loaded.
ON_A_SLICE = """
import sys
from lumamba_jax.pod_plan import parse_topology, topology_devices
from lumamba_jax.sharding import MeshConfig, make_mesh
for name, fsdp in (word.split("/") for word in sys.argv[1:]):
    mesh = make_mesh(MeshConfig(fsdp=int(fsdp)), devices=topology_devices(parse_topology(name)))
    owners = [device.process_index for device in mesh.devices.flat]
    assert owners == [i // 4 for i in range(len(owners))], (name, owners)
    assert mesh.shape["fsdp"] == int(fsdp)
print("ordered")
"""


def test_real_slices_are_ordered_by_process():
    pytest.importorskip("libtpu", reason="describing a TPU slice needs the libtpu package")
    slices = ["v5e:16x16/1", "v6e:8x8/4"]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_SLICE, *slices], capture_output=True, text=True, cwd=REPOSITORY, timeout=600
    )
    assert done.stdout == "ordered\n", done.stderr[-2000:]


def test_host_values_are_placed_as_a_split_program_wants_them():
    mesh = make_mesh(MeshConfig(fsdp=2, devices=8))
    params = {
        "kernel": np.arange(512 * 256, dtype=np.float32).reshape(512, 256),
        "bias": np.arange(256, dtype=jax.numpy.bfloat16),
        "count": np.int32(7),
    }
    shardings = state_shardings(jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, params)), mesh)
    assert shardings["kernel"].spec == PartitionSpec("fsdp")
    placed = place(params, shardings)
    for name, value in params.items():
        assert placed[name].sharding == shardings[name]
        assert placed[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(placed[name]), value)
    assert {shard.data.shape for shard in placed["kernel"].addressable_shards} == {(256, 256)}
    step = jax.jit(lambda tree: tree["kernel"][:, 0] + tree["count"], in_shardings=(shardings,))
    np.testing.assert_array_equal(step(placed), params["kernel"][:, 0] + 7)


# What a jit that splits its parameters over processes refuses as NumPy.
PLACED_BY_TWO = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from lumamba_jax.sharding import MeshConfig, make_mesh, place, replicated, state_shardings, to_global
mesh = make_mesh(MeshConfig(fsdp=4))
params = {"kernel": np.arange(512 * 256, dtype=np.float32).reshape(512, 256)}
shardings = state_shardings(params, mesh)
total = jax.jit(lambda tree: tree["kernel"].max(), in_shardings=(shardings,), out_shardings=replicated(mesh))
try:
    total(params)
    raise SystemExit("NumPy was taken: place is not needed any more")
except ValueError as error:
    assert "numpy" in str(error), error
assert float(total(place(params, shardings))) == 512 * 256 - 1
index = jax.process_index()
rows = to_global({"row": np.arange(4 * index, 4 * index + 4)}, mesh)["row"]
whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(rows)
assert np.asarray(whole).tolist() == list(range(8)), whole
print("done")
"""


def test_two_processes_place_parameters_and_keep_the_order_of_rows(free_port):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", PLACED_BY_TWO, str(free_port), str(index)], **pipes)
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(out.endswith("done\n") for out, _ in outputs), outputs
