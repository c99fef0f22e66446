"""Covariances of the channels on their own manifold: the classical classifier of EEG (Barachant et al., IEEE TBME
59:920, 2012), by pyRiemann.
"""

from typing import Any

import numpy as np

from data_pipeline.band_power import classify

BANDS = ((1.0, 4.0), (4.0, 8.0), (8.0, 13.0), (13.0, 30.0), (30.0, 45.0))
"""Hertz; one covariance for each."""


def tangent_space_features(train_uv: np.ndarray, test_uv: np.ndarray, sfreq: float) -> tuple[np.ndarray, np.ndarray]:
    """Tangent vectors `(n, bands * C (C + 1) / 2)` of band-limited covariances, at the training windows' mean.

    Args:
        train_uv, test_uv: windows `(n, C, T)`, microvolts.
        sfreq: hertz.

    Covariances are shrunk (oracle approximating shrinkage). A window without power has no covariance that could be
    inverted: it counts as the mean (0), so that one of them does not end it all. Raises ValueError when a band needs a
    higher rate, and when no training window has power.
    """
    from pyriemann.estimation import Covariances
    from pyriemann.tangentspace import TangentSpace

    parts = []
    for low, high in BANDS:
        covariances = [Covariances("oas").transform(_filtered(x, sfreq, low, high)) for x in (train_uv, test_uv)]
        powers = [np.trace(c, axis1=1, axis2=2) for c in covariances]
        least = 1e-12 * powers[0].max()
        if not least:
            raise ValueError(f"no training window has power between {low:g} and {high:g} Hz")
        space = TangentSpace(metric="riemann").fit(covariances[0][powers[0] > least])
        parts.append([_tangents(space, c, power > least) for c, power in zip(covariances, powers, strict=True)])
    train, test = (np.concatenate(found, axis=1) for found in zip(*parts, strict=True))
    return train, test


def _tangents(space: Any, covariances: np.ndarray, usable: np.ndarray) -> np.ndarray:
    channels = covariances.shape[1]
    found = np.zeros((len(covariances), channels * (channels + 1) // 2))
    if usable.any():
        found[usable] = space.transform(covariances[usable])
    return found


def tangent_space_classifier(
    train_uv: np.ndarray,
    train_labels: np.ndarray,
    test_uv: np.ndarray,
    num_classes: int,
    *,
    sfreq: float,
    train_subjects: np.ndarray,
) -> np.ndarray:
    """Class probabilities `(m, K)`: logistic regression on `tangent_space_features`, its penalty chosen by subject."""
    train, test = tangent_space_features(train_uv, test_uv, sfreq)
    return classify(train, train_labels, test, num_classes, train_subjects=train_subjects)


def _filtered(signal: np.ndarray, sfreq: float, low: float, high: float) -> np.ndarray:
    from scipy.signal import butter, sosfiltfilt

    if high >= sfreq / 2:
        raise ValueError(f"covariances between {low:g} and {high:g} Hz need more than {2 * high:g} Hz, not {sfreq:g}")
    sections = butter(4, (low, high), btype="bandpass", fs=sfreq, output="sos")
    centred = signal.astype(np.float64) - signal.mean(-1, keepdims=True)
    return sosfiltfilt(sections, centred, axis=-1)
