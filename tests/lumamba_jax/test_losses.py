"""Losses by hand, against PyTorch, and under padding; against the reference: tests/parity/test_training_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax import losses


def test_reconstruction_with_nothing_hidden_is_the_visible_part():
    rng = np.random.default_rng(9)
    original, reconstructed = (jnp.asarray(rng.normal(size=(2, 3, 40)), jnp.float32) for _ in range(2))
    terms = losses.masked_reconstruction(reconstructed, original, jnp.zeros(original.shape, bool), kind="l2")
    assert terms.masked == 0
    np.testing.assert_allclose(terms.unmasked, np.mean((np.asarray(reconstructed) - original) ** 2), rtol=1e-6)
    np.testing.assert_allclose(terms.total, 0.05 * terms.unmasked, rtol=1e-6)


def test_a_total_needs_a_term():
    with pytest.raises(ValueError, match="at least one"):
        losses.pretraining_total()


def test_sigreg_equals_a_direct_quadrature_and_scales_with_its_count():
    rng = np.random.default_rng(0)
    x, directions = rng.normal(size=(30, 8)), rng.normal(size=(8, 5))
    unit = directions / np.linalg.norm(directions, axis=0)
    t = np.linspace(-5, 5, 17)
    ecf = np.exp(1j * t[:, None, None] * (x @ unit)[None]).mean(1)
    gauss = np.exp(-(t**2) / 2)[:, None]
    expected = np.trapezoid(np.abs(ecf - gauss) ** 2 * gauss, t, axis=0).mean()
    x32, directions32 = jnp.asarray(x, jnp.float32), jnp.asarray(directions, jnp.float32)
    np.testing.assert_allclose(losses.sigreg_statistic(x32, directions32), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.sigreg(x32, directions32), 30 * expected, rtol=1e-4)
    np.testing.assert_allclose(losses.sigreg(x32, directions32, 4.0), 4 * expected, rtol=1e-4)


def test_sigreg_count_changes_the_gradient_and_both_values_are_reported():
    rng = np.random.default_rng(1)
    local = jnp.asarray(rng.normal(size=(2, 8, 3, 4)), jnp.float32)
    global_ = jnp.asarray(rng.normal(size=(2, 8, 5, 4)), jnp.float32)
    directions = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    whole = losses.lejepa(local, global_, directions)
    quarter = losses.lejepa(local, global_, directions, sigreg_count=2.0)
    np.testing.assert_allclose(quarter.sigreg, whole.sigreg / 4, rtol=1e-6)
    np.testing.assert_allclose(quarter.sigreg_global, whole.sigreg, rtol=1e-6)


def _padded(rng, shape, real, fill=np.nan):
    """An array of `shape` whose leading corner `real` is data and whose rest is `fill`; and the corner alone."""
    array = np.full(shape, fill, np.float32)
    corner = tuple(slice(0, n) for n in real)
    array[corner] = rng.normal(size=real)
    return jnp.asarray(array), jnp.asarray(array[corner])


def test_padding_and_filler_windows_change_neither_losses_nor_gradients():
    rng = np.random.default_rng(3)
    shape, real = (3, 4, 60), (2, 3, 40)  # 3 patches of 20 samples, 2 of them real; 1 filler window; 1 padded channel
    target, target_alone = _padded(rng, shape, real)
    guess, guess_alone = _padded(rng, shape, real)
    mask = jnp.asarray(rng.random(shape) < 0.5)
    valid = jnp.zeros(shape, bool).at[:, :3, :40].set(True)
    windows = jnp.array([True, True, False])

    def padded(guess):
        return losses.masked_reconstruction(guess, target, mask, valid=valid, window_mask=windows).total

    def alone(guess):
        return losses.masked_reconstruction(guess, target_alone, mask[:2, :3, :40]).total

    value, gradient = jax.value_and_grad(jax.jit(padded))(guess)
    value_alone, gradient_alone = jax.value_and_grad(alone)(guess_alone)
    np.testing.assert_allclose(value, value_alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[:2, :3, :40], gradient_alone, atol=1e-8)
    assert np.count_nonzero(np.asarray(gradient)) == np.count_nonzero(np.asarray(gradient_alone))


def test_query_specialization_ignores_padding():
    rng = np.random.default_rng(4)
    scores, scores_alone = _padded(rng, (3, 4, 5, 6), (2, 3, 5, 4))
    patches = jnp.array([[True] * 3 + [False]] * 3)
    channels = jnp.array([[True] * 4 + [False] * 2] * 3)
    windows = jnp.array([True, True, False])

    def padded(scores):
        return losses.query_specialization(scores, channel_mask=channels, patch_mask=patches, window_mask=windows)

    value, gradient = jax.value_and_grad(padded)(scores)
    np.testing.assert_allclose(value, losses.query_specialization(scores_alone), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_lejepa_ignores_filler_windows_and_padded_patches():
    rng = np.random.default_rng(5)
    local, local_alone = _padded(rng, (4, 6, 4, 8), (4, 5, 4, 8), fill=3.0)
    global_, global_alone = _padded(rng, (2, 6, 7, 8), (2, 5, 5, 8), fill=-9.0)
    patches = jnp.arange(7)[None, None, :] < jnp.full((2, 6, 1), 5)
    directions = jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)
    windows = jnp.array([True] * 5 + [False])
    padded = losses.lejepa(local, global_, directions, global_patch_mask=patches, window_mask=windows)
    alone = losses.lejepa(local_alone, global_alone, directions)
    np.testing.assert_allclose(padded, alone, rtol=2e-5)


def test_everything_masked_out_gives_zero_not_nan():
    nothing = jnp.zeros(2, bool)
    ones = jnp.ones((2, 3))
    assert losses.cross_entropy(ones, jnp.zeros(2, jnp.int32), window_mask=nothing) == 0
    assert losses.binary_cross_entropy(ones, ones, window_mask=nothing) == 0
    assert losses.mean_squared_error(ones, 2 * ones, window_mask=nothing) == 0
    signal = jnp.ones((2, 3, 4))
    assert losses.masked_reconstruction(signal, 0 * signal, signal > 0, window_mask=nothing).total == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torch(x64, weighted, smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    logits, labels = rng.normal(0, 3, (9, 5)), rng.integers(0, 5, 9)
    labels[4] = -1
    weights = rng.uniform(0.2, 3, 5) if weighted else None
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=smoothing,
        ignore_index=-1,
    )
    ours = losses.cross_entropy(
        jnp.asarray(logits),
        jnp.asarray(labels),
        class_weights=None if weights is None else jnp.asarray(weights),
        label_smoothing=smoothing,
    )
    np.testing.assert_allclose(ours, float(expected), rtol=1e-12)


def test_cross_entropy_by_hand_per_channel_and_with_filler():
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]], [[0.9, 0.1], [0.1, 0.9]]]))
    labels = jnp.array([[1, 0], [0, 0]], jnp.int32)
    expected = -np.log([0.75, 0.5]).mean()
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels, window_mask=jnp.array([True, False])), expected, rtol=1e-6
    )


def test_binary_cross_entropy_equals_torch(x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    logits, labels = rng.normal(0, 30, (6, 4)), rng.integers(0, 2, (6, 4)).astype(np.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
    ours = losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(ours, float(expected), rtol=1e-12)
    padded = jnp.concatenate([jnp.asarray(logits), jnp.full((6, 2), jnp.nan)], axis=1)
    valid = jnp.arange(6)[None] < jnp.full((6, 1), 4)
    with_padding = losses.binary_cross_entropy(padded, jnp.pad(labels, ((0, 0), (0, 2))), valid=valid)
    np.testing.assert_allclose(with_padding, float(expected), rtol=1e-12)


def test_mean_squared_error_by_hand():
    prediction, target = jnp.array([[1.0, 2.0], [9.0, 9.0]]), jnp.array([[0.0, 4.0], [0.0, 0.0]])
    assert losses.mean_squared_error(prediction, target, window_mask=jnp.array([True, False])) == 2.5


def test_losses_run_in_float32_under_bfloat16_inputs():
    rng = np.random.default_rng(8)
    guess = jnp.asarray(rng.normal(size=(2, 4, 400)), jnp.bfloat16)
    target = jnp.asarray(rng.normal(size=(2, 4, 400)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 4, 400)) < 0.5)
    low = losses.masked_reconstruction(guess, target, mask).total
    full = losses.masked_reconstruction(guess.astype(jnp.float32), target, mask).total
    assert low.dtype == jnp.float32
    assert low == full


def test_unknown_penalty_is_an_error():
    with pytest.raises((ValueError, TypeError), match="smooth_l1"):  # TypeError: from the annotation, when checked
        losses.penalty(jnp.zeros(3), "huber")
