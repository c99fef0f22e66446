"""Checkpoints: what is written comes back bit for bit, completely or not at all, and another architecture is named."""

import dataclasses
import importlib.metadata
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import checkpoint
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.manifest import seal

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)


def micro_params(seed: int = 0) -> nnx.State:
    return nnx.split(LuMamba(MICRO, rngs=nnx.Rngs(seed)))[1]


def assert_same_bits(found, expected):
    found, expected = checkpoint.named_leaves(found), checkpoint.named_leaves(expected)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), err_msg=name)


def test_pretrained_round_trip_is_exact(tmp_path):
    params = micro_params()
    checkpoint.save_pretrained(tmp_path / "model", MICRO, params, {"source": "test", "class_names": ["a", "b", "c"]})
    config, loaded, metadata = checkpoint.load_pretrained(tmp_path / "model")
    assert config == MICRO
    assert metadata["provenance"]["class_names"] == ["a", "b", "c"]
    assert metadata["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert_same_bits(loaded, params)
    graphdef = nnx.split(nnx.eval_shape(lambda: LuMamba(config, rngs=nnx.Rngs(0))))[0]
    signal = jax.random.normal(jax.random.key(1), (2, 3, 80))
    locations = jax.random.normal(jax.random.key(2), (2, 3, 3)) * 0.1
    expected = nnx.merge(graphdef, params)(signal, locations).logits
    np.testing.assert_array_equal(nnx.merge(graphdef, loaded)(signal, locations).logits, expected)


def test_versions_name_what_decides_numbers_and_order_and_miss_no_package_that_is_absent(monkeypatch):
    found = checkpoint.package_versions()
    assert {"jax", "numpy", "grain"} <= found.keys()
    assert found["numpy"] == np.__version__
    installed = importlib.metadata.version

    def without_grain(name):
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(checkpoint.importlib.metadata, "version", without_grain)
    assert checkpoint.package_versions() == {name: version for name, version in found.items() if name != "grain"}


def test_export_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path):
    for seed in (0, 1):
        checkpoint.save_pretrained(tmp_path / "model", MICRO, micro_params(seed), {})
    assert_same_bits(checkpoint.load_pretrained(tmp_path / "model")[1], micro_params(1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    checkpoint.save_pretrained(tmp_path / "model", MICRO, micro_params(0), {})

    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_pretrained(tmp_path / "model", MICRO, micro_params(1), {})
    assert_same_bits(checkpoint.load_pretrained(tmp_path / "model")[1], micro_params(0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parameters_of_another_configuration_are_refused_with_every_difference(tmp_path):
    other = dataclasses.replace(MICRO, num_blocks=2, num_outputs=5)
    with pytest.raises(ValueError, match=r"missing .*has shape") as error:
        checkpoint.save_pretrained(tmp_path / "model", other, micro_params(), {})
    assert "blocks/1" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_encoder_difference_lists_sizes_but_not_heads():
    other = dataclasses.replace(MICRO, num_blocks=2, embed_dim=32, head="reconstruction", num_outputs=None)
    with pytest.raises(ValueError, match=r"embed_dim 32 .expected 16.*num_blocks 2 .expected 1") as error:
        checkpoint.require_same_encoder(other, MICRO, "somewhere")
    assert "head" not in str(error.value)
    checkpoint.require_same_encoder(dataclasses.replace(MICRO, head="attention", dropout=0.5), MICRO, "somewhere")


@pytest.mark.parametrize("damage", ["absent", "json", "format", "weights", "config"])
def test_damaged_exports_say_what_is_wrong(tmp_path, damage):
    path = checkpoint.save_pretrained(tmp_path / "model", MICRO, micro_params(), {})
    metadata = json.loads((path / "metadata.json").read_text())
    if damage == "absent":
        shutil.rmtree(path)
        with pytest.raises(FileNotFoundError, match="not an exported model"):
            checkpoint.load_pretrained(path)
        return
    if damage == "json":
        (path / "metadata.json").write_text("{")
    elif damage == "weights":
        shutil.rmtree(path / "weights")
    else:
        metadata.update(
            {"format_version": 99} if damage == "format" else {"config": {**metadata["config"], "depth": 3}}
        )
        del metadata["sha256"]
        (path / "metadata.json").write_text(seal(metadata))
    with pytest.raises(
        ValueError, match={"json": "JSON", "format": "99", "weights": "missing", "config": "depth"}[damage]
    ):
        checkpoint.load_pretrained(path)


def test_train_states_keep_the_newest_and_restore_exactly(tmp_path):
    state = {"params": micro_params(), "step": jnp.int32(7), "moments": (jnp.arange(3.0), jnp.zeros(()))}
    with checkpoint.TrainCheckpoints(tmp_path / "checkpoints", keep=2) as saved:
        assert saved.latest_step is None
        for step in (1, 2, 7):
            saved.save(step, state, {"best": 0.5, "none": None})
    with checkpoint.TrainCheckpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest_step == 7
        restored, progress = saved.restore(jax.eval_shape(lambda: state))
        assert progress == {"best": 0.5, "none": None}
        assert_same_bits(restored, state)
        with pytest.raises(ValueError, match=r"another architecture.*moments/1 has shape"):
            saved.restore(jax.eval_shape(lambda: {**state, "moments": (jnp.arange(3.0), jnp.zeros((2,)))}))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "7"]
