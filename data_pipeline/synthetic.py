"""Synthetic EEG recordings as EDF files, for the demo and for tests: `python -m data_pipeline.synthetic OUT_DIR`.

Each recording holds blocks of two conditions, "rest" and "task". Rest has a strong posterior alpha rhythm and little
frontal midline theta; task the reverse. Nothing else depends on the condition. Around that effect lies what real
recordings have: a 1/f background that neighbouring electrodes share, subjects that differ (alpha frequency and
amplitude, spectral slope, skull), rhythms that wax and wane, blinks, muscle bursts, 50 Hz line noise and drift. Half of
the subjects are recorded with one amplifier (19 channels, old names, 256 Hz), half with another (22 channels and an
ECG, `EEG FP1-REF` style, 250 Hz).
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.montages import electrode_positions

CONDITIONS = ("rest", "task")
ALPHA_SITES = ("O1", "O2", "PZ")  # centres of the posterior alpha rhythm
THETA_SITES = ("FZ",)  # centre of the frontal midline theta rhythm
_LIMIT_UV = 1000.0  # physical range of the EEG channels
_SPREAD_M = 0.045  # how far a rhythm spreads over the scalp


@dataclass(frozen=True)
class Amplifier:
    """A recording system: electrode names, how it labels them, its rate in hertz, and whether it records an ECG."""

    ch_names: tuple[str, ...]
    label: str
    sfreq: int
    ecg: bool


_SITES_A = ("FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "T3", "C3", "CZ", "C4", "T4", "T5", "P3", "PZ", "P4", "T6")
_SITES_B = ("FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "FC1", "FC2", "T7", "C3", "CZ", "C4", "T8", "CP1", "CP2")

AMPLIFIERS = (
    Amplifier((*_SITES_A, "O1", "O2"), label="{}", sfreq=256, ecg=False),
    Amplifier((*_SITES_B, "P3", "PZ", "P4", "O1", "OZ", "O2"), label="EEG {}-REF", sfreq=250, ecg=True),
)


@dataclass(frozen=True)
class _Subject:
    """What stays the same within a subject: amplitudes in microvolts (rms), frequencies in hertz."""

    background_uv: float
    slope: float
    alpha_hz: float
    alpha_uv: dict[str, float]  # by condition
    theta_hz: float
    theta_uv: dict[str, float]
    blinks_per_s: float
    bursts_per_s: float
    line_uv: float
    drift_uv: float


def write_recordings(
    out_dir: str | Path, *, subjects: int = 10, seconds: int = 50, seed: int = 0, effect: float = 1.0
) -> list[Path]:
    """Write one EDF file for each subject and `labels.csv` (file, start, stop, label, subject); returns the EDF paths.

    A file holds one block of `seconds` for each condition, in alternating order from subject to subject. `effect`
    scales the difference between the conditions (0 = none). The bytes depend on the arguments alone; files of the
    same names are replaced, and only when all are written. Raises ValueError for arguments that make no recording.
    """
    if subjects < 1 or seconds < 5:
        raise ValueError(f"at least 1 subject and 5 seconds are needed, found {subjects} and {seconds}")
    out_dir = Path(out_dir)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows = [row for i in range(subjects) for row in _write_subject(partial, i, seconds, seed, effect)]
        with (partial / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "start", "stop", "label", "subject"), *rows])
        out_dir.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            (partial / name).replace(out_dir / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out_dir / name for name in names if name.endswith(".edf")]


def simulate_subject(
    ch_names: Sequence[str], sfreq: int, blocks: Sequence[str], seconds: int, rng: np.random.Generator, effect: float
) -> np.ndarray:
    """One subject's EEG, (C, len(blocks) * seconds * sfreq) float64 microvolts, one block for each condition named."""
    subject = _draw_subject(rng, effect)
    xyz = electrode_positions(ch_names)
    n = seconds * sfreq
    brain = [_brain(subject, condition, xyz, n, sfreq, rng) for condition in blocks]
    eeg = np.concatenate(brain, axis=1)
    eeg += _blinks(subject, xyz, eeg.shape[1], sfreq, rng)
    eeg += _muscle(subject, xyz, eeg.shape[1], sfreq, rng)
    eeg += _line_and_drift(subject, eeg.shape, sfreq, rng)
    return eeg


def _write_subject(folder: Path, index: int, seconds: int, seed: int, effect: float) -> list[tuple]:
    """Write the EDF file of subject number `index`; returns its rows of labels.csv."""
    amplifier = AMPLIFIERS[index % len(AMPLIFIERS)]
    rng = np.random.default_rng((seed, index))
    blocks = CONDITIONS if index // len(AMPLIFIERS) % 2 == 0 else CONDITIONS[::-1]
    eeg = simulate_subject(amplifier.ch_names, amplifier.sfreq, blocks, seconds, rng, effect)
    name = f"subject-{index + 1:02d}"
    _write_edf(folder / f"{name}.edf", eeg, amplifier, name, rng)
    return [(f"{name}.edf", i * seconds, (i + 1) * seconds, block, name) for i, block in enumerate(blocks)]


def _write_edf(path: Path, eeg: np.ndarray, amplifier: Amplifier, subject: str, rng: np.random.Generator) -> None:
    import edfio

    def channel(data: np.ndarray, label: str, limit: float) -> "edfio.EdfSignal":
        return edfio.EdfSignal(
            np.clip(data, -limit, limit),
            amplifier.sfreq,
            label=label,
            physical_dimension="uV",
            physical_range=(-limit, limit),
        )

    rows = zip(eeg, amplifier.ch_names, strict=True)
    signals = [channel(row, amplifier.label.format(name), _LIMIT_UV) for row, name in rows]
    if amplifier.ecg:
        signals.append(channel(_ecg(eeg.shape[1], amplifier.sfreq, rng), "ECG", 3200.0))
    edfio.Edf(signals, patient=edfio.Patient(code=subject)).write(path)


def _draw_subject(rng: np.random.Generator, effect: float) -> _Subject:
    def around(centre: float, spread: float) -> float:
        return float(centre * np.exp(spread * rng.standard_normal()))

    alpha, theta = around(9.0, 0.30), around(4.5, 0.25)
    drop, rise = effect * around(0.55, 0.35), effect * around(0.5, 0.35)  # in log amplitude
    return _Subject(
        background_uv=around(11.0, 0.2),
        slope=float(rng.normal(1.1, 0.12)),
        alpha_hz=float(np.clip(rng.normal(10.0, 0.6), 8.8, 11.5)),
        alpha_uv={"rest": alpha, "task": float(alpha * np.exp(-drop))},
        theta_hz=float(rng.uniform(5.2, 6.8)),
        theta_uv={"rest": theta, "task": float(theta * np.exp(rise))},
        blinks_per_s=around(0.2, 0.4),
        bursts_per_s=around(0.05, 0.5),
        line_uv=around(3.0, 0.3),
        drift_uv=around(12.0, 0.3),
    )


def _brain(
    subject: _Subject, condition: str, xyz: np.ndarray, n: int, sfreq: int, rng: np.random.Generator
) -> np.ndarray:
    """Background and rhythms of one block, (C,n) microvolts."""
    background = _shared_over_scalp(_colored(len(xyz), n, sfreq, subject.slope, rng), xyz)
    alpha = _rhythm(subject.alpha_hz, n, sfreq, rng) * subject.alpha_uv[condition]
    theta = _rhythm(subject.theta_hz, n, sfreq, rng) * subject.theta_uv[condition]
    return (
        subject.background_uv * background
        + np.outer(_topography(ALPHA_SITES, xyz), alpha)
        + np.outer(_topography(THETA_SITES, xyz), theta)
    )


def _colored(channels: int, n: int, sfreq: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Noise with power 1/f^slope above 0.5 Hz and none below, unit variance: (channels,n)."""
    frequencies = np.fft.rfftfreq(n, 1.0 / sfreq)
    gain = np.where(frequencies >= 0.5, np.maximum(frequencies, 0.5) ** (-slope / 2), 0.0)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal((channels, n))) * gain, n)
    return noise / noise.std()


def _shared_over_scalp(noise: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """Mix independent rows so that two channels correlate as exp(-(distance / 10 cm)^2), plus a part of their own."""
    distance = np.linalg.norm(xyz[:, None] - xyz[None], axis=-1)
    covariance = 0.9 * np.exp(-((distance / 0.10) ** 2)) + 0.1 * np.eye(len(xyz))
    return np.linalg.cholesky(covariance) @ noise


def _rhythm(hertz: float, n: int, sfreq: int, rng: np.random.Generator) -> np.ndarray:
    """An oscillation about one hertz wide that waxes and wanes, unit variance on average: (n,)."""
    frequencies = np.fft.rfftfreq(n, 1.0 / sfreq)
    gain = np.exp(-0.5 * ((frequencies - hertz) / 0.5) ** 2)
    wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * gain, n)
    return wave / np.sqrt((gain**2).sum() * 2.0 / n)


def _topography(sites: Sequence[str], xyz: np.ndarray) -> np.ndarray:
    """Weight of each channel by its distance to the nearest centre, zero beyond twice the spread: (C,)."""
    distance = np.linalg.norm(xyz[:, None] - electrode_positions(sites)[None], axis=-1).min(axis=1)
    return np.where(distance < 2 * _SPREAD_M, np.exp(-((distance / _SPREAD_M) ** 2)), 0.0)


def _blinks(subject: _Subject, xyz: np.ndarray, n: int, sfreq: int, rng: np.random.Generator) -> np.ndarray:
    """Half-second positive deflections, strongest at the frontal pole."""
    pole = electrode_positions(("FP1", "FP2"))
    weight = np.exp(-((np.linalg.norm(xyz[:, None] - pole[None], axis=-1).min(axis=1) / 0.05) ** 2))
    length = sfreq // 2
    shape = np.hanning(length) ** 2
    trace = np.zeros(n)
    for start in rng.integers(0, n - length, size=rng.poisson(subject.blinks_per_s * n / sfreq)):
        trace[start : start + length] += rng.uniform(60.0, 160.0) * shape
    return np.outer(weight, trace)


def _muscle(subject: _Subject, xyz: np.ndarray, n: int, sfreq: int, rng: np.random.Generator) -> np.ndarray:
    """Bursts of 20-100 Hz noise around one temporal electrode each."""
    frequencies = np.fft.rfftfreq(n, 1.0 / sfreq)
    band = (frequencies > 20) & (frequencies < 100)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal((len(xyz), n))) * band, n)
    noise /= noise.std()
    envelope = np.zeros((len(xyz), n))
    for start in rng.integers(0, n - 2 * sfreq, size=rng.poisson(subject.bursts_per_s * n / sfreq)):
        length = int(rng.uniform(0.3, 1.5) * sfreq)
        site = electrode_positions([("T7", "T8")[rng.integers(2)]])
        weight = np.exp(-((np.linalg.norm(xyz - site, axis=1) / 0.05) ** 2))
        envelope[:, start : start + length] += np.outer(weight, rng.uniform(5.0, 25.0) * np.hanning(length))
    return envelope * noise


def _line_and_drift(subject: _Subject, shape: tuple[int, int], sfreq: int, rng: np.random.Generator) -> np.ndarray:
    """50 Hz with its own amplitude and phase at each electrode, and drift below 0.3 Hz."""
    channels, n = shape
    time = np.arange(n) / sfreq
    amplitude = subject.line_uv * rng.uniform(0.3, 1.5, (channels, 1))
    line = amplitude * np.sin(2 * np.pi * 50.0 * time + rng.uniform(0, 2 * np.pi, (channels, 1)))
    frequencies = np.fft.rfftfreq(n, 1.0 / sfreq)
    slow = (frequencies > 0) & (frequencies < 0.3)
    drift = np.fft.irfft(np.fft.rfft(rng.standard_normal(shape)) * slow, n)
    return line + subject.drift_uv * drift / drift.std()


def _ecg(n: int, sfreq: int, rng: np.random.Generator) -> np.ndarray:
    """A heartbeat of about 70 per minute as narrow 1 mV peaks, (n,) microvolts."""
    beats = np.cumsum(rng.normal(0.86, 0.04, size=int(n / sfreq / 0.6) + 2))
    time = np.arange(n) / sfreq
    return 1000.0 * np.exp(-(((time[:, None] - beats[None]) / 0.012) ** 2)).sum(axis=1) + rng.normal(0.0, 10.0, n)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.synthetic", description="Write synthetic EEG recordings as EDF files."
    )
    parser.add_argument("out_dir", type=Path, help="folder for the EDF files and labels.csv")
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=50, help="of each of the two conditions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effect", type=float, default=1.0, help="difference between the conditions, 0 = none")
    options = parser.parse_args(arguments)
    try:
        files = write_recordings(
            options.out_dir,
            subjects=options.subjects,
            seconds=options.seconds,
            seed=options.seed,
            effect=options.effect,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} recordings and labels.csv in {options.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
