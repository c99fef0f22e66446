"""Protocols without training: nothing of a test subject leaks in, adaptation and few shots gain what they should."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline import protocols
from data_pipeline.leakage import Times
from data_pipeline.protocols import Labelled
from data_pipeline.splits import subject_folds

SUBJECTS, WINDOWS, WIDTH, SFREQ, SAMPLES = 6, 24, 5, 100.0, 100


def problem(*, shift: float, diagnosis: bool = False, seed: int = 0) -> tuple[Labelled, np.ndarray]:
    """(windows, embeddings): two classes two apart along one direction, every subject elsewhere by `shift`."""
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(SUBJECTS), WINDOWS)
    labels = number % 2 if diagnosis else np.tile(np.arange(WINDOWS) // (WINDOWS // 2), SUBJECTS)
    features = rng.standard_normal((len(labels), WIDTH)) + shift * rng.standard_normal((SUBJECTS, WIDTH))[number]
    features[:, 0] += 2.0 * labels
    starts = np.tile(np.arange(WINDOWS) * SAMPLES, SUBJECTS)
    subjects = np.array([f"s{i}" for i in number])
    signal = rng.normal(0, 10, (len(labels), 3, SAMPLES)).astype(np.float32)
    signal[:, 1] *= 1 + labels[:, None]
    times = Times.of_samples(starts, SAMPLES, SFREQ)
    return Labelled(signal, labels, subjects, subjects, times, SFREQ, ("a", "b")), features


def methods_of(data, features):
    def network(data, signal, split):  # stands in for a network: the mean power decides
        power = (signal[split.test, 1] ** 2).mean(-1)
        second = (power > np.median(power)).astype(float)
        return np.stack([1 - second, second], axis=1)

    every = protocols.embedding_methods(data, features, name="model")
    return {method.name: method for method in every + protocols.baseline_methods(data, features, network)}


def accuracy(data, rows, probabilities):
    return float((probabilities.argmax(1) == data.labels[rows]).mean())


def test_every_method_predicts_every_window_once_and_better_than_chance():
    data, features = problem(shift=0.3)
    folds = subject_folds(data.subjects, data.labels, 3)
    for name, method in methods_of(data, features).items():
        rows, found = protocols.out_of_fold(folds, method.fit)
        assert sorted(rows) == list(range(len(data.labels))), name
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6, err_msg=name)
        assert accuracy(data, rows, found) > 0.65, name


def test_a_method_that_knows_nothing_is_not_moved_by_other_test_windows():
    """Labels and the other windows of the tested subjects change; the prediction of one window must not."""
    data, features = problem(shift=1.0)
    split = subject_folds(data.subjects, data.labels, 3)[0]
    kept = split.test[0]
    others = split.test[1:]
    rng = np.random.default_rng(1)
    signal, labels, changed = data.signal_uv.copy(), data.labels.copy(), features.copy()
    signal[others] = 50 * rng.standard_normal(signal[others].shape)
    changed[others] += 30
    labels[split.test] = 1 - labels[split.test]
    twin = Labelled(signal, labels, data.subjects, data.recordings, data.times, data.sfreq, data.class_names)
    before, after = methods_of(data, features), methods_of(twin, changed)
    assert features[kept].tolist() == changed[kept].tolist()
    for name, method in before.items():
        if name.startswith("EEGNet"):
            continue
        first, second = method.fit(split)[0], after[name].fit(split)[0]
        if method.knows == "nothing":
            np.testing.assert_allclose(first, second, atol=1e-9, err_msg=name)
        else:
            assert np.abs(first - second).max() > 1e-6, f"{name} says it uses the subject's other windows"


def test_what_would_remove_the_answer_is_refused_for_diagnoses():
    data, features = problem(shift=0.0, diagnosis=True)
    methods = methods_of(data, features)
    assert {name for name, method in methods.items() if method.fit is None} == {
        "model, linear, re-centred",
        "model, linear, whitened",
        "band power, re-centred",
    }
    with pytest.raises(ValueError, match="one class"):
        protocols.calibration_splits(data, 2)


def test_few_shots_gain_where_subjects_differ():
    data, features = problem(shift=4.0)
    splits = protocols.calibration_splits(data, 4)
    scores = {}
    for method in protocols.few_shot_methods(data, features, name="model"):
        rows, found = protocols.out_of_fold(splits, method.fit)
        assert not set(rows) & set(np.concatenate([np.intersect1d(s.train, _own(data, s)) for s in splits]))
        scores[method.name.removeprefix("model, linear, ")] = accuracy(data, rows, found)
    assert scores["shots added and centred on"] > scores["shots not used"] + 0.1
    assert scores["shots added and centred on"] > 0.75


def test_shots_keep_their_distance_from_the_next_piece_of_the_same_recording():
    data, _ = problem(shift=0.0)
    pieces = np.array([f"{name}#{i}" for name, i in zip(data.recordings, np.arange(len(data.labels)), strict=True)])
    for split in protocols.calibration_splits(replace(data, recordings=pieces), 3):
        shots = np.intersect1d(split.train, _own(data, split))
        apart = np.abs(data.times.starts[split.test][:, None] - data.times.starts[shots])
        assert apart.min() >= 2 * SAMPLES / SFREQ - 1e-9  # a window between them


def _own(data, split):
    return np.flatnonzero(data.subjects == data.subjects[split.test[0]])
