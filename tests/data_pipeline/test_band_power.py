"""The baseline: spectra against SciPy and against sines, the number published with the real data, mixed montages."""

import numpy as np
import pytest
from scipy.signal import welch

from data_pipeline.band_power import (
    BANDS,
    band_power_baseline,
    classify,
    common_channels,
    log_band_power,
    power_spectrum,
    regress,
    window_features,
)
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store

LEFT = montage_of(("F3", "C3", "O1"), name="left")
WIDE = montage_of(("O1", "CZ", "C3", "F3", "F4"), name="wide")


@pytest.mark.parametrize(("samples", "rate"), [(1280, 256.0), (640, 128.0), (301, 200.0), (500, 125.0)])
def test_spectrum_equals_scipy(samples, rate):
    signal = np.random.default_rng(0).standard_normal((3, 2, samples)) + 5.0
    hertz, density = power_spectrum(signal, rate)
    expected = welch(signal, rate, window="hann", nperseg=min(samples, round(2 * rate)), detrend="constant")
    np.testing.assert_allclose(hertz, expected[0])
    np.testing.assert_allclose(density, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("hertz", "band"), [(2.5, "delta"), (6.0, "theta"), (10.0, "alpha"), (25.0, "high beta")])
def test_a_sine_is_found_in_its_band_with_its_power(hertz, band):
    time = np.arange(1280) / 256.0
    features = log_band_power(20.0 * np.sin(2 * np.pi * hertz * time), 256.0)
    place = list(BANDS).index(band)
    assert features.argmax() == place
    low, high = BANDS[band]
    # the whole power, amplitude^2 / 2, lies in the band; bins are 0.5 Hz wide
    np.testing.assert_allclose(np.exp(features[place]) * (high - low), 200.0, rtol=0.02)


def test_a_flat_window_is_finite_and_a_short_one_refused():
    assert np.isfinite(log_band_power(np.zeros((2, 1280)), 256.0)).all()
    with pytest.raises(ValueError, match="do not resolve the bands"):
        log_band_power(np.zeros((2, 30)), 256.0)
    with pytest.raises(ValueError, match="gamma"):
        log_band_power(np.zeros((2, 300)), 50.0)


def test_common_channels():
    assert common_channels([("A", "B", "C"), ("C", "X", "A")]) == ["A", "C"]
    with pytest.raises(ValueError, match="no channel in common"):
        common_channels([("A",), ("B",)])


def test_classes_missing_in_training_get_no_probability_and_a_single_class_is_refused():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2], 20)
    features = rng.standard_normal((40, 3)) + 3.0 * labels[:, None]
    probabilities = classify(features, labels, features, 3)
    assert (probabilities.argmax(1) == labels).all()
    assert not probabilities[:, 1].any()
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    with pytest.raises(ValueError, match="two classes"):
        classify(features, np.zeros(40, int), features, 2)


def test_the_penalty_is_settled_by_subject():
    """Features that tell subjects apart but not classes: tuned by subject, the answer for a new subject is 'unsure'."""
    rng = np.random.default_rng(1)
    subjects = np.repeat(np.arange(12), 20)
    labels = np.tile([0, 1], 120)
    noise = rng.standard_normal((240, 60))
    tuned = classify(noise[:200], labels[:200], noise[200:], 2, train_subjects=subjects[:200])
    untuned = classify(noise[:200], labels[:200], noise[200:], 2)
    assert np.abs(tuned - 0.5).max() < 0.5 * np.abs(untuned - 0.5).max()


def test_regression_recovers_a_linear_target():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 6))
    targets = features @ rng.standard_normal((6, 2)) + 4.0
    predicted = regress(features[:200], targets[:200], features[200:], train_subjects=np.repeat(np.arange(10), 20))
    assert predicted.shape == (100, 2)
    assert np.abs(predicted - targets[200:]).max() < 0.2


@pytest.fixture
def mixed(tmp_path):
    """Two montages; class 1 has three times the alpha amplitude at C3, everything else is noise."""
    rng = np.random.default_rng(0)
    time = np.arange(512) / 256.0
    with create_store(tmp_path / "m.h5", StoreInfo(256.0, 512, 2.0, class_names=["low", "high"])) as writer:
        for subject in range(8):
            montage = (LEFT, WIDE)[subject % 2]
            labels = np.tile([0, 1], 10)
            signal = rng.normal(0, 10, (20, len(montage), 512))
            amplitude = np.where(labels, 9.0, 3.0)[:, None]
            signal[:, montage.ch_names.index("C3")] += amplitude * np.sin(2 * np.pi * 10.0 * time)
            writer.add(
                f"g{subject}",
                signal,
                montage,
                subject=f"s{subject}",
                recording=f"r{subject}",
                start_samples=np.arange(20) * 512,
                labels=labels,
            )
    return WindowStore(tmp_path / "m.h5")


def test_features_of_mixed_montages_are_aligned_by_name(mixed):
    ch_names = common_channels([LEFT.ch_names, WIDE.ch_names])
    assert ch_names == ["F3", "C3", "O1"]
    rows = np.array([25, 3, 47, 0])
    features = window_features(mixed, rows, ch_names).reshape(4, 3, 6)
    for row, found in zip(rows, features, strict=True):
        names = mixed.montages[mixed.montage_names[row]].ch_names
        expected = log_band_power(mixed[row]["signal"][[names.index(c) for c in ch_names]], 256.0)
        np.testing.assert_allclose(found, expected)


def test_baseline_over_mixed_montages_finds_the_effect_and_not_in_permuted_labels(mixed):
    train = np.flatnonzero(mixed.subjects < "s6")
    test = np.flatnonzero(mixed.subjects >= "s6")
    probabilities = band_power_baseline([(mixed, train)], [(mixed, test[::-1])])
    assert probabilities.shape == (40, 2)
    assert (probabilities.argmax(1) == mixed.labels[test[::-1]]).mean() > 0.9
    truth = mixed.labels
    mixed.labels = np.random.default_rng(0).permutation(truth)
    permuted = band_power_baseline([(mixed, train)], [(mixed, test)]).argmax(1)
    assert 0.25 < (permuted == truth[test]).mean() < 0.75


def test_baseline_needs_labels_and_common_channels(mixed, tmp_path):
    other = montage_of(("T7", "T8"), name="other")
    with create_store(tmp_path / "o.h5", StoreInfo(256.0, 512, 2.0, class_names=["low", "high"])) as writer:
        signal = np.random.default_rng(0).normal(size=(2, 2, 512))
        writer.add("g", signal, other, subject="x", recording="x", start_samples=np.arange(2), labels=np.array([0, 1]))
    store = WindowStore(tmp_path / "o.h5")
    with pytest.raises(ValueError, match="no channel in common"):
        band_power_baseline([(mixed, np.arange(40))], [(store, np.arange(2))])
    store.labels = None
    with pytest.raises(ValueError, match="labelled"):
        band_power_baseline([(mixed, np.arange(40))], [(store, np.arange(2))])
