"""A long window part by part equals the whole at once, values and gradients, and takes memory by its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import lumamba
from lumamba_jax.layers import Dtypes
from lumamba_jax.long_windows import block_in_parts, pad_to_parts, part_size
from lumamba_jax.lumamba import LuMamba, LuMambaBlock, LuMambaConfig
from lumamba_jax.mamba import MambaConfig

PATCHES, WIDTH = 37, 12


def _block(strategy, implementation="auto", dtype="float32"):
    config = MambaConfig(WIDTH, d_state=3, scan_implementation=implementation)
    return LuMambaBlock(config, strategy, dtypes=Dtypes.from_name(dtype), rngs=nnx.Rngs(0))


def _windows(dtype, *, padded):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, PATCHES, WIDTH)), dtype)
    lengths = np.array([[PATCHES], [PATCHES - 11]])
    return x, jnp.arange(PATCHES)[None] < lengths if padded else None


def _value_and_gradients(block, x, valid, part):
    """Output where it counts, and the gradients of parameters and input of a function of it."""
    graphdef, params = nnx.split(block)

    def loss(params, x):
        block = nnx.merge(graphdef, params)
        if part is None:
            out = block(x, valid)
        else:
            out = block_in_parts(block.norm, block.mamba, *pad_to_parts(x, valid, part), part=part)[:, :PATCHES]
        out = out if valid is None else jnp.where(valid[:, :, None], out, 0)
        return jnp.sin(3 * out).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


def _assert_equal(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("strategy", ["add", "ew_multiply", "none"])
def test_parts_equal_the_whole_in_float64(x64, strategy, padded):
    block = _block(strategy, dtype="float64")
    expected = _value_and_gradients(block, *_windows(jnp.float64, padded=padded), None)
    for part in (3, 8) if strategy == "add" else (8,):
        _assert_equal(_value_and_gradients(block, *_windows(jnp.float64, padded=padded), part), expected, 1e-12)


@pytest.mark.parametrize("implementation", ["auto", "associative", "sequential", "chunked", "pallas"])
def test_parts_equal_the_whole_with_every_scan(implementation):
    block, windows = _block("add", implementation), _windows(jnp.float32, padded=True)
    _assert_equal(_value_and_gradients(block, *windows, 8), _value_and_gradients(block, *windows, None), 1e-5)


def test_bfloat16_runs_in_parts():
    block, (x, valid) = _block("add", dtype="bfloat16"), _windows(jnp.bfloat16, padded=True)
    out = jax.jit(lambda x: block_in_parts(block.norm, block.mamba, *pad_to_parts(x, valid, 8), part=8))(x)
    assert out.dtype == jnp.bfloat16
    expected = jnp.where(valid[:, :, None], block(x, valid), 0)
    _assert_equal(jnp.where(valid[:, :, None], out[:, :PATCHES], 0), expected, 0.02)


def test_only_a_long_window_goes_part_by_part(monkeypatch):
    model = LuMamba(LuMambaConfig(embed_dim=16, num_queries=1, d_state=2, head="none"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    signal = jnp.asarray(rng.normal(size=(2, 3, PATCHES * 40)), jnp.float32)
    locations = jnp.asarray(rng.normal(0, 0.1, (2, 3, 3)), jnp.float32)
    mask = jnp.arange(PATCHES)[None] < np.array([[PATCHES], [20]])
    taken = []

    def watched(*args, part):
        taken.append(part)
        return block_in_parts(*args, part=part)

    monkeypatch.setattr(lumamba, "block_in_parts", watched)
    monkeypatch.setattr(lumamba, "part_size", lambda _: 16)

    def encode(stages=None):
        return jax.jit(lambda: model.encode(signal, locations, patch_mask=mask, stages=stages).latent)()

    monkeypatch.setattr(lumamba, "LONG", PATCHES)
    whole = encode()
    monkeypatch.setattr(lumamba, "LONG", PATCHES - 1)
    encode(stages := {})
    assert not taken
    assert "block1.mamba_rev_raw" in stages
    parts = encode()
    assert taken == [16, 16]
    _assert_equal(jnp.where(mask[:, :, None], parts, 0), jnp.where(mask[:, :, None], whole, 0), 1e-5)


def test_parts_are_even():
    assert part_size(4096) == part_size(20480) == 256
    assert part_size(1025) == 205  # five parts with no padding, where 256 would leave most of the last one empty


@pytest.mark.parametrize("strategy", ["add", "ew_multiply"])
def test_memory_per_patch_is_that_of_a_few_latents(strategy):
    """Temporaries of the gradient grow by a few arrays of the latents' size, whatever happens inside a part."""
    block = _block(strategy)
    graphdef, params = nnx.split(block)

    def loss(params, x):
        block = nnx.merge(graphdef, params)
        for _ in range(2):
            x = block_in_parts(block.norm, block.mamba, x, None, part=64)
        return jnp.square(x).sum()

    def temporaries(patches):
        x = jax.ShapeDtypeStruct((1, patches, WIDTH), jnp.float32)
        analysis = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    latents = (temporaries(4096) - temporaries(2048)) / (2048 * WIDTH * 4)
    assert latents < 8
