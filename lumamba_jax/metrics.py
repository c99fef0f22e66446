"""Scores of classification and regression with subject-bootstrap intervals, exact however the predictions were batched.

Every score is computed from *weighted* windows: with all weights 1 it is the value itself; with the number of times
each subject was drawn it is a bootstrap resample, and all resamples are computed at once. So value and interval can
never come from two definitions. Names ending in `_reference` are what the published code logs where that differs
(recipes 5): its binary AUROC and AUPR rank windows by the raw logit of class 1, ours by the probability; its accuracy
is plain with two classes and the mean recall with more; its Pearson r is a mean of running values.

`ece` is the expected calibration error of the decision's probability in equal bins (Guo et al., ICML 2017). `brier` is
the mean squared error of p(class 1); with more classes, of all probabilities, summed (scikit-learn's convention).

A class without samples is left out of means over classes, and the report says so.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Kind = Literal["classification", "multilabel", "regression"]
_CHUNK = 4_000_000  # elements of one (resamples, windows) block: about 32 MB each
_SHOWN_SUBJECTS = 24
RELIABILITY_BINS = 15
REFERENCE_BATCH = 512
"""Windows of one batch of the published evaluation, which its Pearson r depends on (recipes R12)."""


# --- predictions ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said about windows, and what is true; rows of all fields belong together.

    Attributes:
        logits: `(n, K)` raw outputs, or `(n, channels, K)`.
        labels: `(n,)` class indices (negative = unlabelled), `(n, channels)`, or `(n, K)` floats.
        window_id: `(n,)` row in the window store, unique per window.
        recording: `(n,)` recording ids.
        subject: `(n,)` subject ids.

    Raises:
        ValueError: fields of different lengths, or logits that are not finite.
    """

    logits: Float[np.ndarray, "n ..."]
    labels: Shaped[np.ndarray, "n ..."]
    window_id: Int[np.ndarray, "n"]
    recording: Shaped[np.ndarray, "n"]
    subject: Shaped[np.ndarray, "n"]

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"predictions need one row per window in every field, found {lengths}")
        bad = int(np.sum(~np.isfinite(self.logits).all(axis=tuple(range(1, self.logits.ndim)))))
        if bad:
            raise ValueError(
                f"{bad} of {len(self.logits)} predictions are not finite: the model diverged, or its input holds NaN"
            )

    def __len__(self) -> int:
        return len(self.window_id)

    def select(self, rows: Bool[np.ndarray, "n"] | Int[np.ndarray, "m"]) -> "Predictions":
        """Keep some rows, for example those of real windows (`window_mask`)."""
        return Predictions(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def of_outputs(self, columns: slice) -> "Predictions":
        """Some of the outputs of a regression, with their targets."""
        return dataclasses.replace(self, logits=self.logits[:, columns], labels=self.labels[:, columns])

    @classmethod
    def merge(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Join the predictions of batches or hosts: sorted by window, so the result does not depend on the split.

        A window that occurs twice (a filler row) counts once.

        Raises:
            ValueError: no parts, or two parts disagree on the label or subject of a window.
        """
        if not parts:
            raise ValueError("there are no predictions to merge: the data set gave no batch")
        joined = cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))
        joined = joined.select(np.argsort(joined.window_id, kind="stable"))
        repeated = np.flatnonzero(joined.window_id[1:] == joined.window_id[:-1]) + 1
        for field in ("labels", "subject", "recording"):
            values = getattr(joined, field)
            if np.any(values[repeated] != values[repeated - 1]):
                raise ValueError(
                    f"two predictions of one window disagree on its {field}: window ids are not unique, "
                    "were predictions of several stores merged?"
                )
        keep = np.ones(len(joined), dtype=bool)
        keep[repeated] = False
        return joined.select(keep)


# --- scores of weighted windows ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights `(R, G)` of G groups (subjects) in R resamples, and the group `(n,)` of every row."""

    of_group: np.ndarray
    group: np.ndarray

    @classmethod
    def ones(cls, n: int) -> "_Weights":
        return cls(np.ones((1, 1)), np.zeros(n, dtype=np.int64))

    @classmethod
    def bootstrap(cls, subject: np.ndarray, n_resamples: int, seed: int) -> "_Weights":
        """Draw as many subjects as there are, with replacement."""
        names, group = np.unique(subject, return_inverse=True)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
        return cls(drawn.astype(np.float64), group)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Weighted sums over rows of `values (n, k)`: `(R, k)`."""
        by_group = np.zeros((self.of_group.shape[1], values.shape[1]))
        np.add.at(by_group, self.group, values)
        return self.of_group @ by_group

    def chunks(self) -> list["_Weights"]:
        """Split the resamples so that a `(resamples, rows)` array stays small."""
        size = max(1, _CHUNK // max(len(self.group), 1))
        return [_Weights(self.of_group[i : i + size], self.group) for i in range(0, len(self.of_group), size)]


def _divide(a: np.ndarray, b: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, otherwise), where=b != 0)


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    finite = np.isfinite(values)
    return _divide(np.where(finite, values, 0).sum(-1), finite.sum(-1))


def _ranking(scores: np.ndarray, positive: np.ndarray, weights: _Weights) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (ties count half) and average precision (step-wise, no trapezoid), each `(R,)`; NaN with one class only."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # last row of each group of ties
    positive = positive[order]
    auroc, aupr = [], []
    for chunk in weights.chunks():
        w = chunk.of_group[:, chunk.group[order]]  # (r, n)
        true = np.cumsum(np.where(positive, w, 0), axis=1)[:, ends]
        false = np.cumsum(np.where(positive, 0, w), axis=1)[:, ends]
        true_steps, false_steps = np.diff(true, axis=1, prepend=0), np.diff(false, axis=1, prepend=0)
        n_true, n_false = true[:, -1], false[:, -1]
        area = (false_steps * (true - true_steps / 2)).sum(1)
        auroc.append(_divide(area, n_true * n_false))
        precision = _divide(true, true + false, otherwise=0.0)
        summed = _divide((true_steps * precision).sum(1), n_true)
        aupr.append(np.where(n_false > 0, summed, np.nan))
    return np.concatenate(auroc), np.concatenate(aupr)


def _reliability_sums(probabilities: np.ndarray, labels: np.ndarray, weights: _Weights) -> np.ndarray:
    """Decisions, their summed probability and how many were right, by bin of that probability: `(3, R, bins)`.

    Bins are closed on the right, as in Guo et al.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * RELIABILITY_BINS).astype(np.int64) - 1, 0, RELIABILITY_BINS - 1)
    groups = weights.of_group.shape[1]
    cells = weights.group * RELIABILITY_BINS + bins
    columns = (np.ones(len(labels)), confidence, right.astype(np.float64))
    sums = [np.bincount(cells, column, minlength=groups * RELIABILITY_BINS) for column in columns]
    return np.stack([weights.of_group @ column.reshape(groups, RELIABILITY_BINS) for column in sums])


def _squared_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The Brier score of each row `(n,)`."""
    wrong = (probabilities - np.eye(probabilities.shape[1])[labels]) ** 2
    return wrong[:, 1] if probabilities.shape[1] == 2 else wrong.sum(1)


def _confusion(decisions: np.ndarray, labels: np.ndarray, n_classes: int, weights: _Weights) -> np.ndarray:
    """Confusion matrices `(R, K, K)`: rows are true classes, columns decisions."""
    pairs = np.eye(n_classes**2)[labels * n_classes + decisions]
    return weights.sums(pairs).reshape(-1, n_classes, n_classes)


def _per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Recall, precision, F1, each `(R, K)`: recall NaN without samples, precision 0 where a class is never chosen."""
    correct = np.diagonal(confusion, axis1=1, axis2=2)
    support, chosen = confusion.sum(2), confusion.sum(1)
    absent = support == 0
    return {
        "support": support,
        "recall": _divide(correct, support),
        "precision": np.where(absent, np.nan, _divide(correct, chosen, otherwise=0.0)),
        "f1": np.where(absent, np.nan, _divide(2 * correct, support + chosen, otherwise=0.0)),
    }


def _classification_scores(
    probabilities: np.ndarray, labels: np.ndarray, weights: _Weights, reference: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """All scores, each `(R,)`. `reference (n,)` is the raw logit of class 1 of a binary task."""
    n_classes = probabilities.shape[1]
    binary = n_classes == 2
    confusion = _confusion(probabilities.argmax(1), labels, n_classes, weights)
    classes = _per_class(confusion)
    total = confusion.sum((1, 2))
    support = classes["support"]
    accuracy = np.trace(confusion, axis1=1, axis2=2) / total
    balanced = _mean_of_finite(classes["recall"])
    by_chance = (support * confusion.sum(1)).sum(1) / total**2
    scores = {"accuracy": accuracy, "balanced_accuracy": balanced, "recall": balanced}
    if binary:
        scores |= {"sensitivity": classes["recall"][:, 1], "specificity": classes["recall"][:, 0]}
    for name in ("precision", "f1"):
        scores[name] = classes[name][:, 1] if binary else _mean_of_finite(classes[name])
    scores["f1_macro"] = _mean_of_finite(classes["f1"])
    scores["f1_weighted"] = np.nansum(classes["f1"] * support, axis=1) / total
    scores["kappa"] = _divide(accuracy - by_chance, 1 - by_chance)
    if binary:
        scores["auroc"], scores["aupr"] = _ranking(probabilities[:, 1], labels == 1, weights)
    else:
        ranked = [_ranking(probabilities[:, k], labels == k, weights) for k in range(n_classes)]
        scores["auroc"], scores["aupr"] = (_mean_of_finite(np.stack(s, axis=1)) for s in zip(*ranked, strict=True))
    _, confident, right = _reliability_sums(probabilities, labels, weights)
    scores["ece"] = np.abs(right - confident).sum(1) / total
    scores["brier"] = weights.sums(_squared_errors(probabilities, labels)[:, None])[:, 0] / total
    scores["accuracy_reference"] = accuracy if binary else balanced
    if binary and reference is not None:
        scores["auroc_reference"], scores["aupr_reference"] = _ranking(reference, labels == 1, weights)
    # A resample that lost a class the data have estimates another quantity: it is degenerate, for every score.
    lost = np.any((support == 0) & np.isin(np.arange(n_classes), labels)[None], axis=1)
    return {name: np.where(lost, np.nan, values) for name, values in scores.items()}


def _multilabel_scores(logits: np.ndarray, labels: np.ndarray, weights: _Weights) -> dict[str, np.ndarray]:
    """Means over outputs of binary scores, decision at probability 0.5; outputs with one class only are left out."""
    columns: list[dict[str, np.ndarray]] = []
    for k in range(logits.shape[1]):
        truth = (labels[:, k] > 0.5).astype(np.int64)
        columns.append(_classification_scores(_probabilities(logits[:, k : k + 1]), truth, weights))
    names = ("accuracy", "balanced_accuracy", "f1", "kappa", "auroc", "aupr", "ece", "brier")
    both = np.array([0 < np.mean(labels[:, k] > 0.5) < 1 for k in range(logits.shape[1])])
    usable = [column for column, keep in zip(columns, both, strict=True) if keep]
    scores = {name: _mean_of_finite(np.stack([c[name] for c in usable or columns], axis=1)) for name in names}
    scores["accuracy"] = _mean_of_finite(np.stack([c["accuracy"] for c in columns], axis=1))
    return scores


def _regression_scores(prediction: np.ndarray, target: np.ndarray, weights: _Weights) -> dict[str, np.ndarray]:
    """R2 (mean over outputs), RMSE (over windows and outputs), Pearson r (mean over outputs), each `(R,)`."""
    by_output = _regression_by_output(prediction, target, weights)
    return {
        "r2": _mean_of_finite(by_output["r2"]),
        "rmse": np.sqrt(np.mean(by_output["rmse"] ** 2, axis=1)),
        "pearson": by_output["pearson"].mean(1),
    }


def _regression_by_output(prediction: np.ndarray, target: np.ndarray, weights: _Weights) -> dict[str, np.ndarray]:
    """R2, RMSE and Pearson r of each output, each `(R, K)`."""
    n, k = target.shape
    # Centred on a value that occurs: the moments keep their digits, and a constant column gives exactly 0.
    y = target - np.sort(target, axis=0)[n // 2]
    p = prediction - np.sort(prediction, axis=0)[n // 2]
    columns = np.concatenate([y, p, y**2, p**2, y * p, (prediction - target) ** 2, np.ones((n, 1))], axis=1)
    sums = weights.sums(columns)
    count = sums[:, -1:]
    sy, sp, syy, spp, syp, residual = (sums[:, i * k : (i + 1) * k] for i in range(6))
    var_y, var_p, cov = syy - sy**2 / count, spp - sp**2 / count, syp - sy * sp / count
    flat_y, flat_p = var_y <= 1e-12 * syy, var_p <= 1e-12 * spp
    r2 = 1 - _divide(residual, np.where(flat_y, 0, var_y))
    pearson = np.where(flat_y | flat_p, 0, _divide(cov, np.sqrt(np.maximum(var_y * var_p, 0)), otherwise=0.0))
    return {"r2": r2, "rmse": np.sqrt(residual / count), "pearson": pearson}


# --- scores of predictions --------------------------------------------------------------------------------------------


def _probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64; one output is the logit of class 1 against 0."""
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _check_labels(labels: np.ndarray, n_classes: int) -> None:
    if len(labels) == 0:
        raise ValueError("there is no labelled window to score")
    if labels.max() >= n_classes:
        raise ValueError(
            f"label {labels.max()} does not exist in a model of {n_classes} classes (0 to {n_classes - 1}): "
            "were the data prepared for another task?"
        )


def classification(logits: Float[np.ndarray, "n *per K"], labels: Int[np.ndarray, "n *per"]) -> dict[str, float]:
    """Score softmax decisions over all windows; negative labels are left out.

    Precision, recall and F1 as in recipes 5: recall is the macro mean (= balanced accuracy); precision and f1 are those
    of class 1 in a binary task and macro means otherwise. AUROC and AUPR are one-vs-rest macro means with more than two
    classes; AUPR is average precision.

    Raises:
        ValueError: no labelled window, or a label outside the classes of the model.
    """
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    probabilities = _probabilities(logits)
    _check_labels(labels, probabilities.shape[1])
    scores = _classification_scores(probabilities, labels, _Weights.ones(len(labels)), logits[:, -1])
    return {name: float(values[0]) for name, values in scores.items()}


def multilabel(logits: Float[np.ndarray, "n K"], labels: Shaped[np.ndarray, "n K"]) -> dict[str, float]:
    """Score K independent yes/no outputs: means over outputs, decision at probability 0.5."""
    scores = _multilabel_scores(logits, labels, _Weights.ones(len(labels)))
    return {name: float(values[0]) for name, values in scores.items()}


def regression(prediction: Float[np.ndarray, "n K"], target: Shaped[np.ndarray, "n K"]) -> dict[str, float]:
    """Score K outputs: `r2` and `pearson` are means over outputs, `rmse` runs over windows and outputs together.

    A constant output or target has Pearson r = 0; a constant target has no R2 and is left out of its mean. Both warn.
    """
    prediction, target = prediction.astype(np.float64), target.astype(np.float64)
    for note in _regression_notes(prediction, target):
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    scores = _regression_scores(prediction, target, _Weights.ones(len(target)))
    return {name: float(values[0]) for name, values in scores.items()}


def pearson_reference(
    prediction: Float[np.ndarray, "n K"], target: Shaped[np.ndarray, "n K"], *, batch_size: int = REFERENCE_BATCH
) -> float:
    """Pearson r as the published code logs it: the mean over batches of r over all windows up to that batch (R12)."""
    prediction, target = prediction.astype(np.float64), target.astype(np.float64)
    batch = np.arange(len(target)) // batch_size
    running = _Weights(np.tri(batch[-1] + 1), batch)
    return float(_regression_scores(prediction, target, running)["pearson"].mean())


def _regression_notes(prediction: np.ndarray, target: np.ndarray) -> list[str]:
    notes = []
    flat_target, flat_output = (np.flatnonzero(np.ptp(values, axis=0) == 0) for values in (target, prediction))
    if len(flat_target):
        notes.append(f"targets {flat_target.tolist()} are constant: Pearson r = 0, left out of R2")
    if len(flat_output):
        notes.append(f"outputs {flat_output.tolist()} are constant: Pearson r = 0")
    return notes


# --- report -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score and its bootstrap interval; NaN limits where there is none."""

    value: float
    low: float = np.nan
    high: float = np.nan


@dataclasses.dataclass(frozen=True)
class LevelReport:
    """Scores of one level ("window", "recording" or "subject").

    Attributes:
        n_units: windows, recordings or subjects scored.
        metrics: by name.
        confusion: `(K, K)` counts, rows true classes, columns decisions; classification only.
        per_class: one row per class: name, support, recall, precision, f1, and auroc and aupr against the rest; of
            independent outputs, or of a regression, one row per output with its scores.
        reliability: one row per bin of the decision's probability that is not empty: low, high, n, confidence (mean
            probability), accuracy; classification only.
        dropped_resamples: bootstrap resamples left out because they lost a class (or all variance).
        notes: what was left out, in sentences.
    """

    n_units: int
    metrics: dict[str, Estimate]
    confusion: Int[np.ndarray, "K K"] | None
    per_class: list[dict[str, Any]]
    reliability: list[dict[str, float]]
    dropped_resamples: int
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything `evaluate` found, by level; `to_dict` is ready for JSON.

    `subjects` has one row per subject: subject, n (windows), recordings, label (where it has one only), decided (the
    class of the highest mean probability) and its own scores over windows.
    """

    kind: Kind
    class_names: list[str]
    n_subjects: int
    n_resamples: int
    confidence: float
    seed: int
    levels: dict[str, LevelReport]
    subjects: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; NaN becomes None."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class _Units:
    """The rows of one level: windows, or means over the windows of a recording or subject."""

    outputs: np.ndarray  # probabilities, or predictions of a regression, or raw logits (multilabel)
    labels: np.ndarray
    subject: np.ndarray
    recording: np.ndarray
    reference: np.ndarray | None = None


def evaluate(
    predictions: Predictions,
    kind: Kind,
    *,
    class_names: Sequence[str] | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Score predictions per window, per recording and per subject, with intervals by subject bootstrap.

    Recordings and subjects are scored by the mean probability (regression: mean prediction) of their windows; a level
    is left out, with a note, where a unit holds more than one label. The interval is the percentile interval of
    `n_resamples` resamples of subjects with replacement; a resample that loses a class is dropped and counted.

    Args:
        predictions: of real windows.
        kind: "classification" (softmax), "multilabel" (sigmoid per output) or "regression".
        class_names: one per class, or per output.
        n_resamples: 0 = no intervals.
        confidence: of the interval.
        seed: of the bootstrap.

    Raises:
        ValueError: no labelled window, labels outside the classes, or a wrong number of class names.
    """
    units, notes = _window_units(predictions, kind)
    n_names = units.outputs.shape[1]
    names = [str(k) for k in range(n_names)] if class_names is None else [str(name) for name in class_names]
    if len(names) != n_names:
        raise ValueError(f"{len(names)} class names for a model of {n_names} outputs: {', '.join(names)}")
    if kind == "classification":
        _check_labels(units.labels, n_names)
    n_subjects = len(np.unique(units.subject))
    if n_subjects < 2 and n_resamples:
        notes.append("no intervals: resampling subjects needs at least two")
        n_resamples = 0
    levels = {"window": units}
    for level in ("recording", "subject") if kind != "multilabel" else ():
        grouped, note = _grouped(units, level)
        if grouped is None:
            notes.append(note)
        else:
            levels[level] = grouped
    reports = {
        level: _level_report(of_level, kind, names, n_resamples, confidence, seed) for level, of_level in levels.items()
    }
    if kind == "regression":  # the order of the windows matters, so it has no interval
        value = pearson_reference(units.outputs, units.labels)
        reports["window"].metrics["pearson_reference"] = Estimate(value)
    subjects = _subject_table(units, kind, names)
    return Report(kind, names, n_subjects, n_resamples, confidence, seed, reports, subjects, notes)


def _window_units(predictions: Predictions, kind: Kind) -> tuple[_Units, list[str]]:
    logits, labels = predictions.logits.astype(np.float64), predictions.labels
    if kind != "classification":
        labels = labels.astype(np.float64).reshape(len(labels), -1)
        return _Units(logits, labels, predictions.subject, predictions.recording), []
    rows = np.repeat(np.arange(len(logits)), int(np.prod(labels.shape[1:])))  # one row per decision
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).astype(np.int64)
    labelled = labels >= 0
    notes = [] if labelled.all() else [f"{int((~labelled).sum())} of {len(labels)} windows have no label: left out"]
    rows, logits, labels = rows[labelled], logits[labelled], labels[labelled]
    subject, recording = predictions.subject[rows], predictions.recording[rows]
    return _Units(_probabilities(logits), labels, subject, recording, logits[:, -1]), notes


def _grouped(units: _Units, level: str) -> tuple[_Units | None, str]:
    """Average the outputs of each recording or subject; None and the reason where labels differ within one."""
    keys = [units.subject] if level == "subject" else [units.subject, units.recording]
    codes = np.stack([np.unique(key, return_inverse=True)[1] for key in keys], axis=1)
    _, first, group = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    mixed = np.unique(group[np.any((units.labels != units.labels[first][group]).reshape(len(group), -1), axis=1)])
    if len(mixed):
        return None, f"no {level} level: {len(mixed)} of {len(first)} {level}s hold more than one label"
    sums = np.zeros((len(first), units.outputs.shape[1]))
    np.add.at(sums, group, units.outputs)
    outputs = sums / np.bincount(group)[:, None]
    return _Units(outputs, units.labels[first], units.subject[first], units.recording[first]), ""


def _level_report(
    units: _Units, kind: Kind, names: list[str], n_resamples: int, confidence: float, seed: int
) -> LevelReport:
    values = _scores(units, kind, _Weights.ones(len(units.labels)))
    metrics = {name: Estimate(float(value[0])) for name, value in values.items()}
    dropped = 0
    if n_resamples:
        resampled = _scores(units, kind, _Weights.bootstrap(units.subject, n_resamples, seed))
        finite = {name: drawn[np.isfinite(drawn)] for name, drawn in resampled.items()}
        defined = [len(finite[name]) for name, estimate in metrics.items() if np.isfinite(estimate.value)]
        dropped = n_resamples - min(defined, default=n_resamples)
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        for name, drawn in finite.items():
            if len(drawn) and np.isfinite(metrics[name].value):
                metrics[name] = Estimate(metrics[name].value, *map(float, np.percentile(drawn, tails)))
    confusion: np.ndarray | None = None
    per_class: list[dict[str, Any]] = []
    reliability: list[dict[str, float]] = []
    notes: list[str] = []
    if kind == "classification":
        confusion, per_class, notes = _class_table(units, names)
        reliability = _reliability_table(units)
    elif kind == "regression":
        per_class = _output_table(units, names)
        notes = _regression_notes(units.outputs, units.labels)
    else:
        per_class = [_of_one_output(units, k, name) for k, name in enumerate(names)]
        notes = _multilabel_notes(units.labels, names)
    return LevelReport(len(units.labels), metrics, confusion, per_class, reliability, dropped, notes)


def _scores(units: _Units, kind: Kind, weights: _Weights) -> dict[str, np.ndarray]:
    if kind == "classification":
        return _classification_scores(units.outputs, units.labels, weights, units.reference)
    score = _multilabel_scores if kind == "multilabel" else _regression_scores
    return score(units.outputs, units.labels, weights)


def _class_table(units: _Units, names: list[str]) -> tuple[np.ndarray, list[dict[str, Any]], list[str]]:
    weights = _Weights.ones(len(units.labels))
    confusion = _confusion(units.outputs.argmax(1), units.labels, len(names), weights)
    table = _per_class(confusion)
    ranked = [_ranking(units.outputs[:, k], units.labels == k, weights) for k in range(len(names))]
    rows = [
        {"name": name, "support": int(table["support"][0, k])}
        | {score: float(table[score][0, k]) for score in ("recall", "precision", "f1")}
        | {"auroc": float(ranked[k][0][0]), "aupr": float(ranked[k][1][0])}
        for k, name in enumerate(names)
    ]
    absent = [name for name, row in zip(names, rows, strict=True) if row["support"] == 0]
    notes = [f"no samples of {', '.join(absent)}: left out of means over classes"] if absent else []
    return confusion[0].astype(np.int64), rows, notes


def _reliability_table(units: _Units) -> list[dict[str, float]]:
    sums = _reliability_sums(units.outputs, units.labels, _Weights.ones(len(units.labels)))[:, 0]
    return [
        {"low": k / RELIABILITY_BINS, "high": (k + 1) / RELIABILITY_BINS}
        | {"n": int(count), "confidence": float(confident / count), "accuracy": float(right / count)}
        for k, (count, confident, right) in enumerate(sums.T)
        if count
    ]


def _output_table(units: _Units, names: list[str]) -> list[dict[str, Any]]:
    scores = _regression_by_output(units.outputs, units.labels, _Weights.ones(len(units.labels)))
    return [
        {"name": name, "support": len(units.labels)} | {key: float(value[0, k]) for key, value in scores.items()}
        for k, name in enumerate(names)
    ]


def _of_one_output(units: _Units, k: int, name: str) -> dict[str, Any]:
    truth = units.labels[:, k : k + 1]
    scores = _multilabel_scores(units.outputs[:, k : k + 1], truth, _Weights.ones(len(truth)))
    shown = ("balanced_accuracy", "f1", "auroc", "aupr")
    return {"name": name, "support": int((truth > 0.5).sum())} | {key: float(scores[key][0]) for key in shown}


def _multilabel_notes(labels: np.ndarray, names: list[str]) -> list[str]:
    """The outputs that `_multilabel_scores` leaves out of its means, in a sentence."""
    share = np.mean(labels > 0.5, axis=0)
    left_out = [name for name, own in zip(names, share, strict=True) if not 0 < own < 1]
    if len(left_out) == len(names):
        return ["no output has both labels: AUROC and AUPR are not defined"]
    return [f"one label only at {', '.join(left_out)}: left out of means, but for accuracy"] if left_out else []


_SUBJECT_SCORES = {
    "classification": ("accuracy", "balanced_accuracy", "auroc", "aupr", "kappa", "f1_macro"),
    "multilabel": ("accuracy", "auroc", "aupr"),
    "regression": ("r2", "rmse", "pearson"),
}


def _subject_table(units: _Units, kind: Kind, names: list[str]) -> list[dict[str, Any]]:
    found, group = np.unique(units.subject, return_inverse=True)
    rows = []
    for g, subject in enumerate(found):
        own = np.flatnonzero(group == g)
        one = _Units(
            units.outputs[own],
            units.labels[own],
            units.subject[own],
            units.recording[own],
            None if units.reference is None else units.reference[own],
        )
        row: dict[str, Any] = {"subject": str(subject), "n": len(own), "recordings": len(np.unique(one.recording))}
        if kind == "classification":
            several = len(np.unique(one.labels)) > 1
            row["label"] = None if several else names[one.labels[0]]
            row["decided"] = names[one.outputs.mean(0).argmax()]
        scores = _scores(one, kind, _Weights.ones(len(own)))
        rows.append(row | {name: float(scores[name][0]) for name in _SUBJECT_SCORES[kind]})
    return rows


# --- several runs -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """One score of several runs; `sd` has n - 1 in the denominator, NaN for one run."""

    mean: float
    sd: float
    values: list[float]


def over_runs(reports: Sequence[Report]) -> dict[str, dict[str, Spread]]:
    """Mean and standard deviation of every score that all runs have, by level."""
    first, levels = reports[0], [set(report.levels) for report in reports]
    found: dict[str, dict[str, Spread]] = {}
    for level in (name for name in first.levels if all(name in own for own in levels)):
        found[level] = {}
        for name in first.levels[level].metrics:
            values = [report.levels[level].metrics[name].value for report in reports]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
            found[level][name] = Spread(float(np.mean(values)), sd, values)
    return found


def require_same_windows(runs: dict[str, Predictions]) -> None:
    """Raise ValueError when two runs, by name, did not predict the same windows with the same labels."""
    (first, expected), *others = runs.items()
    for name, predictions in others:
        for field in ("window_id", "subject", "recording", "labels"):
            if not np.array_equal(getattr(predictions, field), getattr(expected, field)):
                raise ValueError(
                    f"{name} and {first} were not scored on the same windows ({field}): a mean over runs needs one "
                    "test part, so the same split (data.split_seed, data.split_file), and another trainer.seed"
                )


def as_multilabel(predictions: Predictions) -> Predictions:
    """Two logits `(n, outputs, 2)` and a class 0 or 1 per output, as one logit and one float label per output."""
    logits, labels = as_yes_or_no(predictions.logits, predictions.labels)
    return dataclasses.replace(predictions, logits=logits, labels=labels)


def as_yes_or_no(
    logits: Float[np.ndarray, "n K 2"], labels: Int[np.ndarray, "n K"]
) -> tuple[Float[np.ndarray, "n K"], Float[np.ndarray, "n K"]]:
    """The arrays of `as_multilabel`, float64. Raises ValueError when there are no two logits for each output."""
    if logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(f"independent outputs need logits (n, outputs, 2), found {logits.shape}")
    logits = logits.astype(np.float64)
    return logits[..., 1] - logits[..., 0], labels.astype(np.float64)


def decisions(predictions: Predictions) -> tuple[Float[np.ndarray, "m K"], Int[np.ndarray, "m"]]:
    """Probabilities and true classes of all labelled decisions of a classification, one row each."""
    units, _ = _window_units(predictions, "classification")
    return units.outputs, units.labels


def format_table(report: Report) -> str:
    """Format a report for the terminal: one row per score, one column per level, then confusion matrices, classes or
    outputs, subjects where there are few, and notes."""
    header = ["", *(f"{level} (n={of_level.n_units})" for level, of_level in report.levels.items())]
    names = list(next(iter(report.levels.values())).metrics)
    rows = [header]
    for name in names:
        cells = [of_level.metrics.get(name) for of_level in report.levels.values()]
        rows.append([name, *(_cell(cell) for cell in cells)])
    lines = [*align(rows)]
    if report.n_resamples:
        dropped = ", ".join(f"{level} {of_level.dropped_resamples}" for level, of_level in report.levels.items())
        lines += [
            "",
            f"[low, high]: {report.confidence:.0%} intervals, {report.n_resamples} resamples of {report.n_subjects} "
            f"subjects (degenerate, dropped: {dropped})",
        ]
    for level, of_level in report.levels.items():
        if of_level.confusion is not None:
            matrix = [[f"{level}: true \\ decided", *report.class_names]]
            counts = of_level.confusion.tolist()
            matrix += [[name, *map(str, row)] for name, row in zip(report.class_names, counts, strict=True)]
            lines += ["", *align(matrix)]
    lines += ["", *_table_of(report.levels["window"].per_class, "window")]
    if len(report.subjects) <= _SHOWN_SUBJECTS:
        lines += ["", *_table_of(report.subjects, "")]
    else:
        lines += ["", f"{len(report.subjects)} subjects: their scores are in the JSON file"]
    notes = report.notes + [f"{level}: {note}" for level, of_level in report.levels.items() for note in of_level.notes]
    return "\n".join(lines + [f"note: {note}" for note in notes])


def _table_of(rows: list[dict[str, Any]], corner: str) -> list[str]:
    """The table of `rows`, all of the same keys; the first key names them."""
    if not rows:
        return []
    first, *names = rows[0]
    cells = [[str(row[first]), *(_plain_cell(row[name]) for name in names)] for row in rows]
    return align([[corner or first, *names], *cells])


def _plain_cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.3f}"
    return "-" if value is None else str(value)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    text = f"{estimate.value:.3f}"
    return text if np.isnan(estimate.low) else f"{text} [{estimate.low:.3f}, {estimate.high:.3f}]"


def align(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose cells are padded to the widest of their column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
