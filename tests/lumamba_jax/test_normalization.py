"""Normalisers against NumPy, and padding; against reference tensors: tests/parity/test_training_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax.masking import valid_samples
from lumamba_jax.normalization import channel_zscore, fixed_affine, iqr


def _padded_batch(rng):
    """Two windows, the second with 3 of 5 channels and 2 of 4 patches (of 25 samples) real; the padding is garbage."""
    signal = rng.normal(0, 30, (2, 5, 100)).astype(np.float32)
    channel_mask = np.ones((2, 5), bool)
    channel_mask[1, 3:] = False
    patch_mask = np.ones((2, 4), bool)
    patch_mask[1, 2:] = False
    return signal, channel_mask, patch_mask


@pytest.mark.parametrize("level", [0.0, 31.7, -1e4])
def test_flat_channel_gives_zero_in_float32(level):
    signal = np.random.default_rng(0).normal(0, 20, (1, 2, 1280)).astype(np.float32)
    signal[0, 1] = level
    assert np.abs(channel_zscore(jnp.asarray(signal))[0, 1]).max() < 1e-3


def test_iqr_equals_numpy_quantiles():
    signal = np.random.default_rng(1).normal(5, 30, (2, 3, 101)).astype(np.float32)
    q25, q75 = np.quantile(signal.astype(np.float64), [0.25, 0.75], axis=2, keepdims=True)
    np.testing.assert_allclose(iqr(jnp.asarray(signal)), (signal - q25) / (q75 - q25), atol=2e-6)


@pytest.mark.parametrize("normalise", [channel_zscore, fixed_affine, iqr])
def test_padded_window_equals_the_window_alone(normalise):
    signal, channel_mask, patch_mask = _padded_batch(np.random.default_rng(2))
    padded = np.asarray(jax.jit(normalise)(signal, channel_mask, patch_mask))
    alone = np.asarray(normalise(jnp.asarray(signal[1:, :3, :50])))
    np.testing.assert_allclose(padded[1:, :3, :50], alone, atol=1e-6)
    assert np.all(padded[1, 3:] == 0)
    assert np.all(padded[1, :, 50:] == 0)
    assert np.isfinite(padded).all()


def test_window_of_padding_only_is_zero_and_finite():
    signal = jnp.full((1, 2, 80), 7.0)
    for normalise in (channel_zscore, fixed_affine, iqr):
        assert np.all(np.asarray(normalise(signal, jnp.zeros((1, 2), bool), jnp.zeros((1, 2), bool))) == 0)


def test_patch_mask_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="cannot have 3 patches"):
        valid_samples(jnp.zeros((1, 1, 80)), patch_mask=jnp.ones((1, 3), bool))
