"""Dropout keeps the share and the mean that it promises; stochastic depth drops whole windows."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax.layers import drop_path, dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate):
    dropped = np.asarray(dropout(jnp.ones((400, 500)), rate, nnx.Rngs(dropout=0)))
    error = 4 * np.sqrt(rate * (1 - rate) / dropped.size)
    assert abs((dropped == 0).mean() - rate) < error
    np.testing.assert_allclose(dropped[dropped > 0], 1 / (1 - rate), rtol=2e-4)
    assert abs(dropped.mean() - 1) < 2 * error / (1 - rate)


def test_no_stream_and_rate_0_change_nothing():
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, nnx.Rngs(dropout=0)), x)


def test_drop_path_drops_windows_as_a_whole():
    kept = np.asarray(drop_path(jnp.ones((1000, 3, 2)), 0.25, nnx.Rngs(dropout=0))).reshape(1000, -1)
    assert (kept == kept[:, :1]).all()
    assert 0.2 < (kept[:, 0] == 0).mean() < 0.3
