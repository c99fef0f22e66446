"""Every way to judge an encoder without training it, and the baselines beside it, on the same splits.

Windows lie in memory, `(n, ...)` arrays in one order. A method is a function of a split, `Split -> (m, K)`
probabilities of its test windows. What it knows of a test subject is part of its name in every table: "nothing", "its
unlabelled windows" (transductive), or "labelled windows" (few-shot). Results of different knowledge are different
tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_pipeline import adaptation, probes, riemann
from data_pipeline.band_power import classify
from data_pipeline.leakage import Times
from data_pipeline.splits import Split, few_shot

Knows = Literal["nothing", "pre-training windows", "unlabelled windows", "labelled windows"]
"""Of a test subject; "pre-training windows" = the encoder was pre-trained on unlabelled windows of test subjects."""
Fit = Callable[[Split], np.ndarray]


@dataclass(frozen=True)
class Labelled:
    """Labelled windows.

    Attributes:
        signal_uv: `(n, C, T)` float32, microvolts; one montage.
        labels: `(n,)` int, classes 0..K-1.
        subjects, recordings: `(n,)` str.
        times: when each window was recorded.
        sfreq: hertz.
        class_names: K names.
    """

    signal_uv: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray
    recordings: np.ndarray
    times: Times
    sfreq: float
    class_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def whole_recordings(self) -> np.ndarray:
        """What pieces of recordings (`recording#piece`: trials, parts of a file) were cut from, `(n,)` str."""
        return np.array([str(name).partition("#")[0] for name in self.recordings])

    @property
    def has_subjects_of_one_class(self) -> bool:
        """Whether some subject has windows of one class only, as where the class is a diagnosis."""
        return any(len(np.unique(self.labels[self.subjects == subject])) < 2 for subject in np.unique(self.subjects))


@dataclass(frozen=True)
class Method:
    """One row of a table: what is fitted, what it knows of a test subject, or why it cannot be used here."""

    name: str
    knows: Knows
    fit: Fit | None
    because: str = ""


SUBJECT_IS_CLASS = "a subject has one class: what makes its windows differ from others' is the answer itself"
"""Why re-centring by subject and few-shot calibration are refused for diagnoses."""


def fitted_rows(split: Split) -> np.ndarray:
    """Training and validation windows: methods that choose something do it by subject, inside them."""
    return np.sort(np.concatenate([split.train, split.val]))


def embedding_methods(data: Labelled, features: np.ndarray, *, name: str, knows: Knows = "nothing") -> list[Method]:
    """Probes of features `(n, D)`, as they are and adapted to the test subject by its unlabelled windows.

    `knows` says what the encoder was trained on of test subjects; of labels every row then knows.
    """
    found = [
        Method(f"{name}, {probe}", knows, _probe_fit(data, lambda _: features, fit))
        for probe, fit in probes.PROBES.items()
    ]
    changed: dict[str, Callable[[Split], np.ndarray]] = {
        "re-centred": lambda _: adaptation.recentred(features, data.subjects),
        "whitened": lambda split: adaptation.whitened(features, data.subjects, train=_is_fitted(data, split)),
    }
    for how, change in changed.items():
        fit = None if data.has_subjects_of_one_class else _probe_fit(data, change, probes.linear_probe)
        found.append(Method(f"{name}, linear, {how}", "unlabelled windows", fit, SUBJECT_IS_CLASS))
    found.append(Method(f"{name}, prototypes moved", "unlabelled windows", _moved_fit(data, features)))
    return [replace(method, knows=knows) for method in found] if knows == "labelled windows" else found


def baseline_methods(
    data: Labelled, band_power: np.ndarray, network: Callable[[Labelled, np.ndarray, Split], np.ndarray]
) -> list[Method]:
    """Band power `(n, D)` with logistic regression, tangent space, and a small network trained from scratch.

    `network(data, signal (n, C, T), split)` gives the probabilities of the split's test windows.
    """
    mixed = data.has_subjects_of_one_class

    def recentred(_: Split) -> np.ndarray:
        return adaptation.recentred(band_power, data.subjects)

    def tangent(signal: Callable[[], np.ndarray]) -> Fit:
        def fit(split: Split) -> np.ndarray:
            rows, values = fitted_rows(split), signal()
            train, test = riemann.tangent_space_features(values[rows], values[split.test], data.sfreq)
            who = data.subjects[rows]
            return classify(train, data.labels[rows], test, data.num_classes, train_subjects=who)

        return fit

    def plain() -> np.ndarray:
        return data.signal_uv

    def aligned() -> np.ndarray:
        return adaptation.aligned(data.signal_uv, data.subjects)

    recentred_fit = None if mixed else _probe_fit(data, recentred, probes.linear_probe)
    return [
        Method("band power", "nothing", _probe_fit(data, lambda _: band_power, probes.linear_probe)),
        Method("band power, re-centred", "unlabelled windows", recentred_fit, SUBJECT_IS_CLASS),
        Method("tangent space", "nothing", tangent(plain)),
        Method("tangent space, aligned", "unlabelled windows", tangent(aligned)),
        Method("EEGNet", "nothing", lambda split: network(data, plain(), split)),
        Method("EEGNet, aligned", "unlabelled windows", lambda split: network(data, aligned(), split)),
    ]


def out_of_fold(folds: Sequence[Split], fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """(rows, probabilities `(len(rows), K)`) of every window that some fold tests."""
    rows = np.concatenate([fold.test for fold in folds])
    return rows, np.concatenate([fit(fold) for fold in folds])


# --- few labelled windows of the test subject -------------------------------------------------------------------------


def calibration_splits(data: Labelled, shots: int, *, seed: int = 0) -> list[Split]:
    """For every subject: `shots` of its windows of each class join the training, its others are tested (`few_shot`).

    Raises: ValueError when a subject has one class or too few windows.
    """
    if data.has_subjects_of_one_class:
        raise ValueError(f"few-shot calibration is not possible here: {SUBJECT_IS_CLASS}")
    recordings = data.whole_recordings  # a shot at the end of one piece may touch a window of the next
    return [
        few_shot(data.subjects, data.labels, recordings, data.times, subject=subject, shots=shots, seed=seed)
        for subject in np.unique(data.subjects).tolist()
    ]


def few_shot_methods(data: Labelled, features: np.ndarray, *, name: str, knows: Knows = "nothing") -> list[Method]:
    """Linear probes for `calibration_splits`: the shots not used, added to the training, and used for the centre too.

    All are scored on the same windows, so that the first says what the other two gain.
    """

    def without(split: Split) -> np.ndarray:
        rows = fitted_rows(split)
        rows = rows[data.subjects[rows] != _tested(data, split)]
        return _classified(data, features, rows, split.test)

    def added(split: Split) -> np.ndarray:
        return _classified(data, features, fitted_rows(split), split.test)

    def centred(split: Split) -> np.ndarray:
        rows = fitted_rows(split)
        values = np.asarray(features, np.float64).copy()
        for subject in np.unique(data.subjects):
            own = data.subjects == subject
            values[own] -= _centre_of_classes(features, data.labels, rows[own[rows]])
        return _classified(data, values, rows, split.test)

    return [
        Method(f"{name}, linear, shots not used", knows, without),
        Method(f"{name}, linear, shots added", "labelled windows", added),
        Method(f"{name}, linear, shots added and centred on", "labelled windows", centred),
    ]


def _centre_of_classes(features: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of the class means, which does not depend on how many windows of each class there are."""
    return np.mean([features[rows[labels[rows] == label]].mean(0) for label in np.unique(labels[rows])], axis=0)


def _tested(data: Labelled, split: Split) -> str:
    (subject,) = np.unique(data.subjects[split.test])
    return subject


# --- fitting ----------------------------------------------------------------------------------------------------------


def _probe_fit(data: Labelled, features_of: Callable[[Split], np.ndarray], probe: probes.Probe) -> Fit:
    return lambda split: _classified(data, features_of(split), fitted_rows(split), split.test, probe)


def _classified(
    data: Labelled, features: np.ndarray, rows: np.ndarray, test: np.ndarray, probe: probes.Probe = probes.linear_probe
) -> np.ndarray:
    who = data.subjects[rows]
    return probe(features[rows], data.labels[rows], features[test], data.num_classes, train_subjects=who)


def _moved_fit(data: Labelled, features: np.ndarray) -> Fit:
    def fit(split: Split) -> np.ndarray:
        rows = fitted_rows(split)
        return adaptation.adapted_prototypes(
            features[rows],
            data.labels[rows],
            features[split.test],
            data.subjects[split.test],
            data.num_classes,
            probes.class_prototypes,
            train_subjects=data.subjects[rows],
        )

    return fit


def _is_fitted(data: Labelled, split: Split) -> np.ndarray:
    chosen = np.zeros(len(data.labels), bool)
    chosen[fitted_rows(split)] = True
    return chosen
