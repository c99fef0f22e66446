"""The baseline beside every supervised result: log band power of each channel, standardised, with a linear model.

Six bands with fixed edges; power is the mean of a Hann-tapered periodogram (Welch, segments of two seconds with half
overlap). Windows of several montages are described by the channels they have in common.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# hertz, lower edge included, upper excluded
BANDS: dict[str, tuple[float, float]] = {
    "delta": (1.0, 4.0),
    "theta": (4.0, 8.0),
    "alpha": (8.0, 13.0),
    "low beta": (13.0, 20.0),
    "high beta": (20.0, 30.0),
    "gamma": (30.0, 45.0),
}
_SEGMENT_SECONDS = 2.0
_FLOOR_UV2 = 1e-6  # uV^2/Hz, far below any amplifier's noise: keeps the logarithm of a flat channel finite
_CHUNK = 256  # windows read at once


def power_spectrum(signal: np.ndarray, sfreq: float) -> tuple[np.ndarray, np.ndarray]:
    """Power spectral density by Welch's method: (...,T) microvolts -> frequencies (F,) hertz, (...,F) uV^2/Hz.

    Hann taper, mean of each segment removed, one-sided; segments of two seconds (or T) that overlap by half.
    """
    signal = np.asarray(signal, dtype=np.float64)
    length = min(signal.shape[-1], round(_SEGMENT_SECONDS * sfreq))
    starts = range(0, signal.shape[-1] - length + 1, max(1, length // 2))
    taper = np.hanning(length + 1)[:-1]
    density = np.zeros((*signal.shape[:-1], length // 2 + 1))
    for start in starts:
        segment = signal[..., start : start + length]
        spectrum = np.fft.rfft((segment - segment.mean(-1, keepdims=True)) * taper)
        density += np.abs(spectrum) ** 2
    density *= 2.0 / (len(starts) * sfreq * (taper**2).sum())
    density[..., 0] /= 2.0
    if length % 2 == 0:
        density[..., -1] /= 2.0
    return np.fft.rfftfreq(length, 1.0 / sfreq), density


def log_band_power(signal: np.ndarray, sfreq: float) -> np.ndarray:
    """Natural logarithm of the mean density in each band: (...,T) microvolts -> (...,6), bands in the order of BANDS.

    Raises ValueError when a window is too short to resolve a band, or the rate too low to hold one.
    """
    frequencies, density = power_spectrum(signal, sfreq)
    inside = [(frequencies >= low) & (frequencies < high) for low, high in BANDS.values()]
    lost = [band for band, mask in zip(BANDS, inside, strict=True) if not mask.any()]
    if lost:
        raise ValueError(
            f"windows of {np.shape(signal)[-1]} samples at {sfreq:g} Hz do not resolve the bands {', '.join(lost)}"
        )
    power = np.stack([density[..., mask].mean(-1) for mask in inside], axis=-1)
    return np.log(np.maximum(power, _FLOOR_UV2))


def common_channels(montages: Sequence[Sequence[str]]) -> list[str]:
    """Channel names that every montage has, in the order of the first. Raises ValueError when there are none."""
    shared = set(montages[0]).intersection(*montages)
    if not shared:
        raise ValueError("the windows have no channel in common: the band-power baseline needs at least one")
    return [name for name in montages[0] if name in shared]


def window_features(store: Any, rows: np.ndarray, ch_names: Sequence[str]) -> np.ndarray:
    """Log band power of windows `rows` at channels `ch_names`: (len(rows), channels * 6) float64, channel by channel.

    `store` has the reading interface of `data_pipeline.store.WindowStore`.
    """
    rows = np.asarray(rows)
    features = np.empty((len(rows), len(ch_names) * len(BANDS)))
    for where, signal, names in _read_by_montage(store, rows):
        picks = [names.index(name) for name in ch_names]
        features[where] = log_band_power(signal[:, picks], store.sfreq).reshape(len(where), -1)
    return features


def classify(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    train_subjects: np.ndarray | None = None,
) -> np.ndarray:
    """Class probabilities of the test windows by logistic regression: (n_test, num_classes) float64.

    Features (n, D) are standardised with the training windows' mean and deviation; classes are weighted to balance.
    The inverse L2 penalty is the best of 0.001, 0.01, 0.1, 1 by log loss in a cross-validation over the
    `train_subjects` (n,); 0.1 without them or with fewer than three. A class without training windows gets 0.
    Raises ValueError when the training windows hold one class only.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train_labels)) < 2:
        raise ValueError("the baseline needs training windows of at least two classes")
    model = _tuned(
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000),
        {"C": [0.001, 0.01, 0.1, 1.0]},
        "neg_log_loss",
        (train_features, train_labels, train_subjects),
    )
    probabilities = np.zeros((len(test_features), num_classes))
    probabilities[:, model.classes_] = model.predict_proba(test_features)
    return probabilities


def regress(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    *,
    train_subjects: np.ndarray | None = None,
) -> np.ndarray:
    """Targets of the test windows by ridge regression on standardised features: (n_test, K) for targets (n, K).

    The L2 penalty is the best of 1, 10, 100, 1000 by squared error in a cross-validation over the `train_subjects`
    (n,); 10 without them or with fewer than three.
    """
    from sklearn.linear_model import Ridge

    penalties = {"alpha": [1.0, 10.0, 100.0, 1000.0]}
    data = (train_features, train_targets, train_subjects)
    model = _tuned(Ridge(alpha=10.0), penalties, "neg_mean_squared_error", data)
    return model.predict(test_features).reshape(len(test_features), -1)


def _tuned(estimator: Any, grid: dict[str, list[float]], scoring: str, data: tuple) -> Any:
    """Standardisation and `estimator`, fitted to (features, labels, subjects); penalty chosen by subject if given."""
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels, subjects = data
    model = Pipeline([("scale", StandardScaler()), ("model", estimator)])
    inner = [] if subjects is None else list(_inner_folds(GroupKFold, labels, subjects))
    if not inner:
        return model.fit(features, labels)
    grid = {f"model__{name}": values for name, values in grid.items()}
    return GridSearchCV(model, grid, scoring=scoring, cv=inner).fit(features, labels)


def _inner_folds(splitter: Any, labels: np.ndarray, subjects: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Up to five folds by subject; none where a fold's training or validation windows would lack a class."""
    n_subjects = len(np.unique(subjects))
    if n_subjects < 3:
        return
    folds = list(splitter(min(5, n_subjects)).split(labels, labels, subjects))
    classes = None if labels.dtype.kind == "f" else set(labels.tolist())
    if classes is None or all(set(labels[part].tolist()) == classes for fold in folds for part in fold):
        yield from folds


def band_power_baseline(train: Sequence[tuple[Any, np.ndarray]], test: Sequence[tuple[Any, np.ndarray]]) -> np.ndarray:
    """Predictions of the baseline for the test windows, in their order.

    `train` and `test` are (store, rows) pairs, labelled. Class labels (n,) give probabilities (n_test, classes),
    targets (n,K) float give predictions (n_test, K). Raises ValueError for missing labels, labels for each channel,
    stores of different rates, or no common channel.
    """
    stores = [store for store, _ in (*train, *test)]
    if any(store.labels is None for store in stores):
        raise ValueError("the baseline needs labelled windows")
    if len({store.sfreq for store in stores}) > 1:
        raise ValueError("the baseline needs stores of one sampling rate")
    used = [store.montages[str(n)].ch_names for store, rows in (*train, *test) for n in _montages_at(store, rows)]
    ch_names = common_channels(used)
    x_train, x_test = (
        np.concatenate([window_features(store, rows, ch_names) for store, rows in part]) for part in (train, test)
    )
    y_train = np.concatenate([store.labels[rows] for store, rows in train])
    who = np.concatenate([store.subjects[rows] for store, rows in train])
    if y_train.dtype.kind == "f":
        return regress(x_train, y_train, x_test, train_subjects=who)
    if y_train.ndim != 1:
        raise ValueError("the baseline knows one label for each window, not one for each channel")
    names = next((store.class_names for store in stores if store.class_names), None)
    num_classes = len(names) if names else 1 + max(int(store.labels.max()) for store in stores)
    return classify(x_train, y_train, x_test, num_classes, train_subjects=who)


def _montages_at(store: Any, rows: np.ndarray) -> list[str]:
    return list(dict.fromkeys(store.montage_names[rows].tolist()))


def _read_by_montage(store: Any, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """(positions in `rows`, signal (m,C,T), channel names) in pieces of one montage."""
    for montage in _montages_at(store, rows):
        at = np.flatnonzero(store.montage_names[rows] == montage)
        for start in range(0, len(at), _CHUNK):
            where = at[start : start + _CHUNK]
            yield where, store.read(rows[where]), list(store.montages[montage].ch_names)
