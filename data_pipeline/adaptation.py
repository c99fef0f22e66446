"""Adapting to a new subject without gradients: what unlabelled windows of the test subject allow.

All of these look at the test subject's windows, without labels: a result that used them is another task than one that
did not, and must say so (`transductive`). They undo what differs between subjects while the classes stay: place
(`recentred`), place and spread (`whitened`), spread of the channels (`aligned`), and the classes' own places
(`adapted_prototypes`).
"""

from collections.abc import Callable

import numpy as np


def recentred(features: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Features `(n, D)` minus the mean of their subject's windows; what is the same for a whole subject is gone.

    It assumes that subjects have the classes in about the same proportion.
    """
    centred = np.empty_like(features, dtype=np.float64)
    for subject in np.unique(subjects):
        own = subjects == subject
        centred[own] = features[own] - features[own].mean(0)
    return centred


def whitened(features: np.ndarray, subjects: np.ndarray, *, train: np.ndarray, components: int = 16) -> np.ndarray:
    """Features `(n, k)`, every subject's with mean 0 and unit covariance (shrunk as Ledoit and Wolf say).

    Args:
        features: `(n, D)`.
        subjects: `(n,)`.
        train: `(n,)` bool; principal components are those of these windows, re-centred by subject.
        components: k, at most; few, since a subject has few windows.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    centred = recentred(features, subjects)
    count = min(components, centred.shape[1], max(1, int(train.sum()) - 1))
    reduced = PCA(count, svd_solver="full").fit(centred[train]).transform(centred)
    out = np.empty_like(reduced)
    for subject in np.unique(subjects):
        own = subjects == subject
        rows = reduced[own] - reduced[own].mean(0)
        covariance = LedoitWolf(assume_centered=True).fit(rows).covariance_ if len(rows) > 1 else np.eye(count)
        out[own] = rows @ _inverse_root(covariance)
    return out


def aligned(signal: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Euclidean alignment (He and Wu, IEEE TBME 67:399, 2020).

    Windows `(n, C, T)` in microvolts times the inverse square root of their subject's mean covariance over time, which
    becomes the identity; without a unit.
    """
    out = np.empty_like(signal)
    for subject in np.unique(subjects):
        own = subjects == subject
        windows = signal[own].astype(np.float64)
        windows = windows - windows.mean(-1, keepdims=True)
        covariance = np.einsum("nct,ndt->cd", windows, windows) / (windows.shape[0] * windows.shape[2])
        out[own] = np.einsum("cd,ndt->nct", _inverse_root(covariance), windows)
    return out


def adapted_prototypes(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_subjects: np.ndarray,
    num_classes: int,
    probe: Callable[..., np.ndarray],
    *,
    train_subjects: np.ndarray,
    confident: float = 0.5,
    rounds: int = 3,
) -> np.ndarray:
    """Prototypes moved towards the test subject's surest windows (after T3A, Iwasawa and Matsuo, NeurIPS 2021).

    `probe` gives the first probabilities `(m, K)`; the surest share `confident` of each class's windows of a subject
    then count as that class's prototype, beside the training windows' own, with equal weight; windows are classified by
    distance to the prototypes. Features are standardised with the training windows' mean and deviation.
    """
    centre, scale = train_features.mean(0), train_features.std(0) + 1e-9
    train, test = (train_features - centre) / scale, (test_features - centre) / scale
    probabilities = probe(train_features, train_labels, test_features, num_classes, train_subjects=train_subjects)
    known = np.unique(train_labels)  # a class without training windows keeps probability 0
    prototypes = np.stack([train[train_labels == k].mean(0) for k in known])
    spread = np.mean(
        [((train[train_labels == k] - own) ** 2).sum(1).mean() for k, own in zip(known, prototypes, strict=True)]
    )
    spread = spread or 1.0  # one window of each class: only which prototype is nearer is left to say
    for subject in np.unique(test_subjects):
        own = np.flatnonzero(test_subjects == subject)
        for _ in range(rounds):
            moved = _moved(prototypes, test[own], probabilities[np.ix_(own, known)], confident)
            distance = ((test[own][:, None] - moved[None]) ** 2).sum(-1)
            logits = -distance / (2 * spread / np.sqrt(test.shape[1]))
            logits -= logits.max(1, keepdims=True)
            probabilities[np.ix_(own, known)] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities


def _moved(prototypes: np.ndarray, features: np.ndarray, probabilities: np.ndarray, confident: float) -> np.ndarray:
    moved = prototypes.copy()
    decided = probabilities.argmax(1)
    for label in range(len(prototypes)):
        rows = np.flatnonzero(decided == label)
        surest = rows[np.argsort(-probabilities[rows, label], kind="stable")][: int(np.ceil(confident * len(rows)))]
        if len(surest):
            moved[label] = 0.5 * prototypes[label] + 0.5 * features[surest].mean(0)
    return moved


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric inverse square root; directions without variance (a flat channel) are left as they are."""
    values, vectors = np.linalg.eigh(covariance)
    floor = 1e-10 * max(values.max(), 1e-300)
    scale = np.where(values > floor, 1.0 / np.sqrt(np.maximum(values, floor)), 1.0)
    return (vectors * scale) @ vectors.T
