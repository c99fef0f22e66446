"""Every scan implementation against the float64 recurrence, in value and gradient, with carries and both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax.scan import selective_scan, selective_scan_oracle

IMPLEMENTATIONS = ("associative", "sequential")


def _inputs(length, batch=2, width=6, states=4, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "u": rng.normal(size=(batch, length, width)).astype(dtype),
        "delta": rng.uniform(1e-3, 0.5, (batch, length, width)).astype(dtype),
        "A": -np.exp(rng.normal(size=(width, states))).astype(dtype),
        "B": rng.normal(size=(batch, length, states)).astype(dtype),
        "C": rng.normal(size=(batch, length, states)).astype(dtype),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 2, 31, 128])
def test_equals_the_oracle_in_both_directions(implementation, length):
    x = _inputs(length)
    h0 = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    expected, expected_state = selective_scan_oracle(**x, h0=h0)
    y, h_last = selective_scan(**x, h0=jnp.asarray(h0), implementation=implementation)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(h_last, expected_state, atol=1e-5 * np.abs(expected_state).max())

    flipped = {k: v if k == "A" else v[:, ::-1] for k, v in x.items()}
    expected, expected_state = selective_scan_oracle(**flipped, h0=h0)
    y, h_last = selective_scan(**x, h0=jnp.asarray(h0), implementation=implementation, reverse=True)
    np.testing.assert_allclose(y, expected[:, ::-1], atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(h_last, expected_state, atol=1e-5 * np.abs(expected_state).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_with_a_carried_state_equal_the_whole(implementation, reverse):
    x = _inputs(47)
    whole, last = selective_scan(**x, implementation=implementation, reverse=reverse)
    pieces, h = {}, None
    cuts = [(0, 7), (7, 8), (8, 40), (40, 47)]
    for start, stop in reversed(cuts) if reverse else cuts:
        part = {k: v if k == "A" else v[:, start:stop] for k, v in x.items()}
        pieces[start], h = selective_scan(**part, h0=h, implementation=implementation, reverse=reverse)
    joined = np.concatenate([pieces[start] for start, _ in cuts], axis=1)
    np.testing.assert_allclose(joined, whole, atol=2e-6)
    np.testing.assert_allclose(h, last, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_agree_between_implementations_in_float64(x64, reverse):
    x = _inputs(33, dtype=np.float64)
    h0 = np.random.default_rng(2).normal(size=(2, 6, 4))
    rng = np.random.default_rng(3)
    w_y, w_h = rng.normal(size=(2, 33, 6)), rng.normal(size=(2, 6, 4))

    def loss(arrays, h0, implementation):
        y, h = selective_scan(**arrays, h0=h0, implementation=implementation, reverse=reverse)
        return (y * w_y).sum() + (h * w_h).sum()

    grads = {i: jax.grad(loss, argnums=(0, 1))(x, jnp.asarray(h0), i) for i in IMPLEMENTATIONS}
    for name in x:
        scale = np.abs(grads["sequential"][0][name]).max()
        np.testing.assert_allclose(grads["associative"][0][name], grads["sequential"][0][name], atol=1e-11 * scale)
    np.testing.assert_allclose(grads["associative"][1], grads["sequential"][1], atol=1e-11)
    # One directional derivative against central differences keeps both honest.
    direction = rng.normal(size=x["delta"].shape)
    shifted = [loss({**x, "delta": x["delta"] + s * 1e-5 * direction}, jnp.asarray(h0), "sequential") for s in (1, -1)]
    numeric = (shifted[0] - shifted[1]) / 2e-5
    np.testing.assert_allclose((grads["sequential"][0]["delta"] * direction).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_leaves_state_and_valid_outputs_untouched(implementation, reverse):
    x = _inputs(20)
    alone, last = selective_scan(
        **{k: v if k == "A" else v[:, :13] for k, v in x.items()}, implementation=implementation, reverse=reverse
    )
    valid = jnp.asarray(np.arange(20) < 13)[None].repeat(2, 0)
    padded, padded_last = selective_scan(**x, valid=valid, implementation=implementation, reverse=reverse)
    np.testing.assert_allclose(padded[:, :13], alone, atol=1e-6)
    np.testing.assert_allclose(padded_last, last, atol=1e-6)


def test_bfloat16_inputs_keep_a_float32_state():
    x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in _inputs(256).items()}
    expected, _ = selective_scan_oracle(**{k: np.asarray(v, np.float64) for k, v in x.items()})
    for implementation in IMPLEMENTATIONS:
        y, h_last = selective_scan(**x, implementation=implementation)
        assert (y.dtype, h_last.dtype) == (jnp.bfloat16, jnp.float32)
        # Only the final rounding to bfloat16 (2^-9 relative) may separate the two.
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=2e-4)


def test_mistakes_are_named():
    x = _inputs(5)
    with pytest.raises(ValueError, match="'fast' is unknown"):
        selective_scan(**x, implementation="fast")
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(**{**x, "B": x["B"][:, :3]})
    with pytest.raises(ValueError, match="L = 0"):
        selective_scan(**{k: v if k == "A" else v[:, :0] for k, v in x.items()})
