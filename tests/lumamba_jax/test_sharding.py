"""The mesh and its rules: who is split, who is replicated, and what does not divide is said."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lumamba_jax.sharding import MeshConfig, batch_sharding, make_mesh, state_shardings, to_global


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
