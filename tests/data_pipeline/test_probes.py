"""Probes, adaptation without gradients, tangent space: that they learn, and what they must not depend on."""

import numpy as np
import pytest

from data_pipeline import adaptation, probes, riemann

SUBJECTS, WINDOWS, WIDTH = 8, 40, 6


def embeddings(*, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two classes two apart along one direction; every subject lies elsewhere by `shift`."""
    rng = np.random.default_rng(seed)
    subjects = np.repeat(np.arange(SUBJECTS), WINDOWS)
    labels = np.tile(np.arange(WINDOWS) % 2, SUBJECTS)
    features = rng.standard_normal((len(labels), WIDTH))
    features[:, 0] += 2.0 * labels
    return features + shift * rng.standard_normal((SUBJECTS, WIDTH))[subjects], labels, subjects


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found.argmax(1) == labels).mean())


@pytest.mark.parametrize("name", probes.PROBES)
def test_probes_find_classes_of_new_subjects(name):
    features, labels, subjects = embeddings(shift=0.3)
    train = subjects < 6
    found = probes.PROBES[name](features[train], labels[train], features[~train], 2, train_subjects=subjects[train])
    assert accuracy(found, labels[~train]) > 0.75
    np.testing.assert_allclose(found.sum(1), 1)
    order = np.random.default_rng(1).permutation(int(train.sum()))
    again = probes.PROBES[name](
        features[train][order], labels[train][order], features[~train], 2, train_subjects=subjects[train][order]
    )
    np.testing.assert_allclose(found, again, atol=1e-3)  # the order of windows does not matter
    scaled = features * np.array([1, 10, 100, 1, 0.1, 1])  # nor do units
    same = probes.PROBES[name](scaled[train], labels[train], scaled[~train], 2, train_subjects=subjects[train])
    np.testing.assert_allclose(found, same, atol=1e-3)


def test_neighbours_found_block_by_block_are_the_same(monkeypatch):
    features, labels, subjects = embeddings(shift=0.3)
    train = subjects < 6
    arguments = (features[train], labels[train], features[~train], 2)
    whole = probes.nearest_neighbours(*arguments, train_subjects=subjects[train])
    monkeypatch.setattr(probes, "_SIMILARITIES", 7 * int(train.sum()))
    blocks = probes.nearest_neighbours(*arguments, train_subjects=subjects[train])
    np.testing.assert_allclose(blocks, whole, atol=1e-12)


def test_recentring_undoes_what_subjects_differ_by():
    near, labels, subjects = embeddings(shift=0.0)
    far = near + 50 * np.random.default_rng(3).standard_normal((SUBJECTS, WIDTH))[subjects]
    np.testing.assert_allclose(adaptation.recentred(far, subjects), adaptation.recentred(near, subjects), atol=1e-10)
    train = subjects < 6
    plain = probes.linear_probe(far[train], labels[train], far[~train], 2, train_subjects=subjects[train])
    centred = adaptation.recentred(far, subjects)
    found = probes.linear_probe(centred[train], labels[train], centred[~train], 2, train_subjects=subjects[train])
    assert accuracy(found, labels[~train]) > max(0.75, accuracy(plain, labels[~train]))


def test_whitening_undoes_the_scale_of_each_subject():
    features, labels, subjects = embeddings(shift=1.0)
    train = subjects < 6
    stretched = features * np.array([0.2, 1, 3, 1, 0.5, 2, 0.1, 5])[subjects][:, None]
    out = adaptation.whitened(stretched, subjects, train=train, components=WIDTH)
    for subject in range(SUBJECTS):
        own = out[subjects == subject]
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-10)
        np.testing.assert_allclose(own.std(0), 1, atol=0.35)  # shrunk
    found = probes.linear_probe(out[train], labels[train], out[~train], 2, train_subjects=subjects[train])
    assert accuracy(found, labels[~train]) > 0.7


def test_alignment_makes_the_mean_covariance_of_a_subject_the_identity():
    rng = np.random.default_rng(0)
    subjects = np.repeat([0, 1], 12)
    mixing = rng.standard_normal((2, 4, 4))
    signal = np.einsum("nij,njt->nit", mixing[subjects], rng.standard_normal((24, 4, 200)))
    out = adaptation.aligned(signal, subjects)
    for subject in (0, 1):
        own = out[subjects == subject]
        np.testing.assert_allclose(np.einsum("nct,ndt->cd", own, own) / (12 * 200), np.eye(4), atol=1e-8)
    flat = signal.copy()
    flat[:, 2] = 7.0
    assert np.isfinite(adaptation.aligned(flat, subjects)).all()


def test_prototypes_follow_a_subject_that_lies_elsewhere():
    features, labels, subjects = embeddings(shift=0.0)
    train = subjects < 6
    moved = features.copy()
    moved[~train, 0] += 2.0  # nearly all windows look like class 1
    arguments = features[train], labels[train], moved[~train]
    plain = probes.class_prototypes(*arguments, 2, train_subjects=subjects[train])
    found = adaptation.adapted_prototypes(
        *arguments, subjects[~train], 2, probes.class_prototypes, train_subjects=subjects[train]
    )
    assert accuracy(found, labels[~train]) > accuracy(plain, labels[~train])
    np.testing.assert_allclose(found.sum(1), 1)


def test_tangent_space_finds_a_rhythm_whatever_the_gain_of_the_amplifier():
    rng = np.random.default_rng(0)
    sfreq, labels, subjects = 128.0, np.tile([0, 1], 40), np.repeat(np.arange(8), 10)
    signal = 10 * rng.standard_normal((80, 3, 256))
    wave = np.sin(2 * np.pi * 10 * np.arange(256) / sfreq + rng.uniform(0, 6, (80, 1)))
    signal[:, 0] += 12 * labels[:, None] * wave
    train = subjects < 6
    found = riemann.tangent_space_classifier(
        signal[train], labels[train], signal[~train], 2, sfreq=sfreq, train_subjects=subjects[train]
    )
    assert accuracy(found, labels[~train]) > 0.9
    # A gain and a rotation of the channels; the shrinkage is invariant to nothing else.
    mixing = 100 * np.linalg.qr(rng.standard_normal((3, 3)))[0]
    one = riemann.tangent_space_features(signal[train], signal[~train], sfreq)[1]
    other = riemann.tangent_space_features(mixing @ signal[train], mixing @ signal[~train], sfreq)[1]
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (one, other)]
    np.testing.assert_allclose(distances[1], distances[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="need more than 90 Hz"):
        riemann.tangent_space_features(signal[train], signal[~train], 80.0)


def test_prototypes_do_not_count_how_many_windows_a_class_has():
    features, labels, subjects = embeddings(shift=0.0)
    train = (subjects < 6) & ((labels == 0) | (np.arange(len(labels)) % 20 == 1))  # ten of class 0 for one of class 1
    found = probes.class_prototypes(features[train], labels[train], features[subjects >= 6], 2)
    truth = labels[subjects >= 6]
    recall = [float((found.argmax(1) == truth)[truth == k].mean()) for k in (0, 1)]
    assert min(recall) > 0.65
    np.testing.assert_allclose(found.sum(1), 1)


def test_prototypes_of_one_window_each_are_moved():
    test = np.array([[0.1, 0.0], [0.9, 1.1]])
    found = adaptation.adapted_prototypes(
        np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0, 1]), test, np.array(["t", "t"]), 2, probes.nearest_neighbours,
        train_subjects=np.array(["a", "b"]),
    )  # fmt: skip
    assert np.isfinite(found).all()
    assert found.argmax(1).tolist() == [0, 1]


def test_a_window_without_power_does_not_end_the_tangent_space():
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 3, 200)) for n in (12, 5))
    whole = riemann.tangent_space_features(train, test, 100.0)
    flat = np.concatenate([train, np.full((1, 3, 200), 7.0)]), np.concatenate([np.zeros((1, 3, 200)), test])
    found = riemann.tangent_space_features(*flat, 100.0)
    np.testing.assert_allclose(found[0][:-1], whole[0], atol=1e-9)
    np.testing.assert_allclose(found[1][1:], whole[1], atol=1e-9)
    assert not found[0][-1].any()
    assert not found[1][0].any()
    with pytest.raises(ValueError, match="no training window has power"):
        riemann.tangent_space_features(0 * train, test, 100.0)
