"""EEGNet: the published number of parameters, learning, its constraints, and independence of batch mates."""

import jax
import numpy as np
import pytest
from flax import nnx

from lumamba_jax.eegnet import EEGNet, EEGNetClassifier, EEGNetConfig, _filtered, _limited, _mixed

SFREQ = 64.0


def windows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of 4 channels, with an 8 Hz rhythm on channel 1 or 2: the class is where it is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count).astype(np.int32)
    signal = 10 * rng.standard_normal((count, 4, 128))
    phase = rng.uniform(0, 2 * np.pi, (count, 1))
    signal[np.arange(count), 1 + labels] += 20 * np.sin(2 * np.pi * 8 * np.arange(128) / SFREQ + phase)
    return signal.astype(np.float32), labels


def test_parameters_are_those_of_the_paper():
    # Table 2 for C channels, F1 8, D 2, F2 16, kernel 64: 8*64 + 2*8 + 16*C + 2*16 + 16*16 + 16*16 + 2*16 + classifier
    model = EEGNet(EEGNetConfig(), 22, 512, 128.0, 4, nnx.Rngs(0))
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in nnx.state(model, nnx.Param).items()
    }
    assert counts["temporal"] == 8 * 64
    assert counts["spatial"] == 2 * 8 * 22
    assert counts["separable"] + counts["pointwise"] == 16 * 16 + 16 * 16
    assert counts["classifier"] == 16 * (512 // 32) * 4 + 4


def test_learns_where_a_rhythm_is_and_keeps_its_constraints():
    train, validation, test = windows(128, 0), windows(32, 1), windows(64, 2)
    network = EEGNetClassifier(2, SFREQ, EEGNetConfig(max_epochs=12, lr=5e-3)).fit(*train, validation)
    found = network.predict_proba(test[0])
    assert (found.argmax(1) == test[1]).mean() > 0.9
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(network.predict_proba(test[0][:5]), found[:5], atol=1e-6)  # no batch statistics
    _, params, _ = network._model
    spatial = np.asarray(jax.tree.leaves(params["spatial"]["kernel"])[0])
    classifier = np.asarray(jax.tree.leaves(params["classifier"]["kernel"])[0])
    assert np.sqrt((spatial**2).sum((0, 1, 2))).max() <= 1 + 1e-5
    assert np.sqrt((classifier**2).sum(0)).max() <= 0.25 + 1e-5


def test_a_rare_class_weighs_as_much_as_a_frequent_one():
    signal, labels = windows(400, 0)
    rare = (labels == 0) | (np.cumsum(labels == 1) % 10 == 0)
    config = EEGNetConfig(max_epochs=8, dropout=0.0)
    network = EEGNetClassifier(2, SFREQ, config).fit(signal[rare], labels[rare], windows(80, 1))
    test, truth = windows(200, 2)
    right = network.predict_proba(test).argmax(1) == truth
    assert min(right[truth == 0].mean(), right[truth == 1].mean()) > 0.6


def test_the_seed_decides():
    config = EEGNetConfig(max_epochs=1, batch_size=8)
    found = [EEGNetClassifier(2, SFREQ, config).fit(*windows(16, 0), windows(8, 1)).predict_proba(windows(4, 2)[0])
             for _ in range(2)]  # fmt: skip
    np.testing.assert_array_equal(*found)


def test_limits_leave_small_filters_alone():
    model = EEGNet(EEGNetConfig(), 4, 128, SFREQ, 2, nnx.Rngs(0))
    params = jax.tree.map(lambda leaf: 1e-4 * leaf, nnx.state(model, nnx.Param))
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(_limited(params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_bad_use_is_said():
    with pytest.raises(ValueError, match="pools over 32 samples, the windows have 20"):
        EEGNet(EEGNetConfig(), 4, 20, SFREQ, 2, nnx.Rngs(0))
    with pytest.raises(ValueError, match="not fitted"):
        EEGNetClassifier(2, SFREQ).predict_proba(np.zeros((1, 4, 128), np.float32))


def test_products_are_the_convolutions_of_the_paper():
    model = EEGNet(EEGNetConfig(), 5, 96, SFREQ, 2, nnx.Rngs(0))
    signal = np.random.default_rng(0).standard_normal((3, 5, 96)).astype(np.float32)
    filtered = _filtered(signal, model.temporal.kernel[...])
    np.testing.assert_allclose(filtered, model.temporal(signal[..., None]), atol=1e-5)
    np.testing.assert_allclose(_mixed(filtered, model.spatial.kernel[...]), model.spatial(filtered), atol=1e-5)
