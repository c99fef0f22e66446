"""FEMBA: its grid, its decoder against a plain loop, its refusals, and that it trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import FembaConfig
from lumamba_jax.architectures import build
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import step_keys

_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MICRO = FembaConfig(num_channels=5, num_samples=100, embed_dim=3, num_blocks=1, expand=2, decoder_kernel=(3, 5))
OVERLAP = MICRO.replace(channel_stride=1, patch_stride=12)


def _signal(config, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, config.num_channels, config.num_samples)).astype(np.float32)


@pytest.mark.parametrize("config", [MICRO, OVERLAP], ids=["apart", "overlapping"])
def test_patches_and_decoder_are_convolutions_over_the_grid(config):
    """Against loops over patches in NumPy: feature order e*G + g, overlaps added up, the remainder left out."""
    model = build(config, seed=1)
    signal = _signal(config)
    stages = {}
    out = model(jnp.asarray(signal), stages=stages)
    (grid, steps), (height, width) = config.grid, (config.channel_patch_size, config.patch_size)
    kernel, bias = np.asarray(model.patch_embed.kernel[...]), np.asarray(model.patch_embed.bias[...])
    for g in range(grid):
        for s in range(steps):
            c, t = g * config.channel_stride, s * config.patch_stride
            patch = signal[:, c : c + height, t : t + width]
            expected = np.einsum("bct,cte->be", patch, kernel) + bias
            np.testing.assert_allclose(np.asarray(stages["patch_embed"])[:, s, g::grid], expected, atol=1e-5)

    plane = np.asarray(stages["decoder.dec_conv"])  # (B, S, E*G)
    kernel = np.asarray(model.head.kernel[...])
    expected = np.full((2, (grid - 1) * config.channel_stride + height, (steps - 1) * config.patch_stride + width), 0.0)
    for g in range(grid):
        for s in range(steps):
            c, t = g * config.channel_stride, s * config.patch_stride
            expected[:, c : c + height, t : t + width] += np.einsum("be,cte->bct", plane[:, s, g::grid], kernel)
    np.testing.assert_allclose(out.reconstruction, expected + np.asarray(model.head.bias[...]), atol=1e-5)
    assert out.attention_scores is None


def test_hidden_samples_are_zeroed_and_no_mask_hides_nothing():
    model, signal = build(MICRO), _signal(MICRO)
    mask = np.random.default_rng(1).random(signal.shape) < 0.5
    run = _jit(lambda x, m: model(x, mask=m).latent)
    np.testing.assert_array_equal(run(signal, mask), run(np.where(mask, 0, signal), np.zeros_like(mask)))
    np.testing.assert_allclose(model(signal).latent, run(signal, np.zeros_like(mask)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": np.zeros((2, 4, 100), np.float32)}, "fixed grid: windows must be 5 channels x 100 samples"),
        ({"signal": np.zeros((2, 5, 96), np.float32)}, "not 5 x 96"),
        ({"signal": np.zeros((5, 100), np.float32)}, r"must be \(batch, channels, samples\)"),
        ({"channel_mask": np.arange(10).reshape(2, 5) < 9}, "channel_mask marks padding"),
        ({"patch_mask": np.arange(12).reshape(2, 6) < 9}, "patch_mask marks padding"),
    ],
)
def test_a_fixed_grid_says_so(change, message):
    with pytest.raises(ValueError, match=message):
        build(MICRO)(**{"signal": _signal(MICRO), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "attention", "num_outputs": 2}, "not attention"),
        ({"decoder_kernel": (4, 5)}, "two odd sizes"),
        ({"num_channels": 1}, "holds no patch"),
        ({"patch_stride": 0}, "patch_stride must be at least 1"),
    ],
)
def test_contradictory_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MICRO.replace(**change)


def test_pre_training_lowers_the_masked_error_and_needs_the_reconstruction_objective():
    config = MICRO.replace(num_samples=96)
    task_config = TaskConfig(objective="reconstruction", normalization="fixed_affine", mask_patch=(1, 4))
    with pytest.raises(ValueError, match=r"needs task\.objective reconstruction"):
        make_task(TaskConfig(objective="mixed"), config)
    task = make_task(task_config, config)
    graphdef, params = nnx.split(build(config))
    time = np.arange(96) / 20
    signal = 40 * np.sin(time + np.arange(8)[:, None, None] + np.arange(5)[:, None]).astype(np.float32)
    batch = {
        "signal": signal,
        "locations": np.zeros((8, 5, 3), np.float32),
        "channel_mask": np.ones((8, 5), bool),
        "patch_mask": np.ones((8, 6), bool),
        "window_mask": np.ones(8, bool),
    }

    @_jit
    def step(params, k):
        loss = lambda p: task.loss(nnx.merge(graphdef, p), batch, step_keys(0, k))[0]  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    values = []
    for k in range(50):
        value, params = step(params, k)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])
