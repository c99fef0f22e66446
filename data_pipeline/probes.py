"""Classifiers of feature vectors: what frozen embeddings hold, found by the simplest means.

Features are rows `(n, D)` of windows, whatever they come from. A subject's windows are always together: what is chosen
is chosen in folds by subject. All give class probabilities `(m, K)` float64.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax

from data_pipeline.band_power import classify

_SIMILARITIES = 16_000_000  # held at a time: all pairs of a corpus would not fit a memory

linear_probe = classify
"""Standardised features, logistic regression, its penalty chosen by subject (`band_power.classify`)."""


def nearest_neighbours(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    train_subjects: np.ndarray,
    neighbours: Sequence[int] = (5, 15, 45),
) -> np.ndarray:
    """Classes of the nearest training windows by cosine of standardised features, weighted by nearness.

    Of `neighbours` the number with the least log loss is taken, each training subject being classified by the others.
    """
    centre, scale = train_features.mean(0), train_features.std(0) + 1e-9
    train, test = (_unit((x - centre) / scale) for x in (train_features, test_features))
    best = neighbours[0]
    if len(np.unique(train_subjects)) > 1:
        votes = {k: np.empty((len(train), num_classes)) for k in neighbours}
        for rows in _blocks(len(train), len(train)):
            similarity = train[rows] @ train.T
            similarity[np.equal.outer(train_subjects[rows], train_subjects)] = -np.inf
            for k in neighbours:
                votes[k][rows] = _votes(similarity, train_labels, k, num_classes)
        best = min(neighbours, key=lambda k: _log_loss(votes[k], train_labels))
    blocks = _blocks(len(test), len(train))
    return np.concatenate([_votes(test[rows] @ train.T, train_labels, best, num_classes) for rows in blocks])


def _blocks(rows: int, columns: int) -> list[slice]:
    """`rows` in pieces whose similarities with `columns` windows take about 128 MB."""
    size = max(1, _SIMILARITIES // columns)
    return [slice(first, first + size) for first in range(0, rows, size)]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _votes(similarity: np.ndarray, labels: np.ndarray, neighbours: int, num_classes: int) -> np.ndarray:
    """Probabilities from similarities `(m, n)`; one vote is spread over all classes, so that none is impossible."""
    count = min(neighbours, similarity.shape[1])
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    near = np.take_along_axis(similarity, nearest, axis=1)
    weights = np.where(np.isfinite(near), np.exp(near / 0.1), 0.0)
    votes = np.full((len(similarity), num_classes), 1.0 / num_classes)
    total = np.maximum(weights.sum(1, keepdims=True), 1e-300)
    for label in range(num_classes):
        votes[:, label] += count * (weights * (labels[nearest] == label) / total).sum(1)
    return votes / votes.sum(1, keepdims=True)


def _log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return -float(np.log(probabilities[np.arange(len(labels)), labels]).mean())


def class_prototypes(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    train_subjects: np.ndarray | None = None,  # noqa: ARG001  (one signature for all probes)
) -> np.ndarray:
    """Distance to each class's mean under a common covariance, shrunk as Ledoit and Wolf say (linear discriminant).

    Every class has the same prior, as the balanced accuracy beside other methods asks for: how many windows or subjects
    of a class happen to be in the training does not decide.

    Raises: ValueError when the training windows hold one class only.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    if len(np.unique(train_labels)) < 2:
        raise ValueError("class prototypes need training windows of at least two classes")
    centre, scale = train_features.mean(0), train_features.std(0) + 1e-9
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=None)
    model.fit((train_features - centre) / scale, train_labels)
    probabilities = np.zeros((len(test_features), num_classes))
    logits = model.decision_function((test_features - centre) / scale).reshape(len(test_features), -1)
    if len(model.classes_) == 2:  # one column then: the second against the first
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    logits = logits - np.log(model.priors_)  # those of the training, in which the covariances stay pooled
    probabilities[:, model.classes_] = softmax(logits, axis=1)
    return probabilities


Probe = Callable[..., np.ndarray]
PROBES: dict[str, Probe] = {
    "linear": linear_probe,
    "nearest neighbours": nearest_neighbours,
    "class prototypes": class_prototypes,
}
