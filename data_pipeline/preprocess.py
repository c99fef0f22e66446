"""Recording -> Recording: choose the channels, filter, resample, derive, and check that the result can be EEG.

Order, fixed: pick and order channels -> band-pass -> notch -> resample -> reference or bipolar difference. The filters
are MNE's defaults (windowed-sinc FIR, Hamming, one zero-phase pass, reflect_limited padding; transition bands
min(max(0.25 f, 2), f) below and min(max(0.25 f, 2), Nyquist - f) above), the resampler is MNE's FFT method: the chain
the published models were trained on (docs/data.md). They act on the whole recording, before any window is cut.
"""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.montages import (
    CHANNEL_ORDERS,
    Montage,
    bipolar_signal,
    electrode_positions,
    find_name,
    is_ear_reference,
    is_electrode,
    montage_of,
    normalize_name,
    split_pair,
)
from data_pipeline.recording import Recording

FLAT_UV = 0.01  # standard deviation of a channel that is disconnected, or is the reference itself
PLAUSIBLE_UV = (0.5, 500.0)  # robust amplitude of scalp EEG after the high-pass, generous at both ends
_TYPICAL_UV = 15.0
_LARGEST = 1e20  # far above any unit that is read wrongly; the filters must not overflow
_RATES_HZ = (20.0, 1e5)  # below, nothing of the EEG bands is left; above, a header is wrong and the filters too long
_FILTER_CYCLES = 3.3  # length of a Hamming FIR in units of 1 / transition width
_UNIT_FACTORS = {
    1e6: "volts where microvolts were expected",
    1e-6: "microvolts where volts were expected",
    1e3: "millivolts where microvolts were expected",
    1e-3: "nanovolts, or microvolts where millivolts were expected",
    1e9: "a unit a billion times larger",
    1e-9: "nanovolts where volts were expected",
    1e-12: "a factor 1e6 applied twice",
    1e12: "a factor 1e-6 applied twice",
}
_NOT_EEG = re.compile(
    r"(EOG|ECG|EKG|EMG|RESP|TEMP|STATUS|TRIG|^STI|EXG\d|SPO2|SAO2|PULSE|PPG|GSR|EDA\b|ACC|GYRO|EVENT|MARKER|PHOTIC"
    r"|THOR|ABDO|SNORE|FLOW|^HR\b|^REF|_REF|AUX|BATTERY|^BURSTS|^SUPPR|^IBI|COUNTER|QUALITY|^LEG|CHIN|NASAL|PLETH)"
)


@dataclass(frozen=True)
class PreprocessConfig:
    """Settings of the chain; frequencies in hertz.

    montage: "auto" keeps every electrode of the file; a key of `CHANNEL_ORDERS` or a comma-separated list of names asks
    for exactly these, in that order (bipolar names are derived from electrodes when the file has no such pair).
    l_freq, h_freq: band edges, None switches an edge off. notch: 50, 60, or None. sfreq: the output rate.
    reference: "none", "average", or electrode names ("A1,A2") whose mean is subtracted.
    flat: what to do with a channel that is flat over the whole recording: "drop" or "keep".
    rename: label -> name, applied first. scale: factor on the signal (units the file states wrongly).
    accept_units: skip the plausibility check.
    """

    montage: str = "auto"
    l_freq: float | None = 0.1
    h_freq: float | None = 75.0
    notch: float | None = 50.0
    sfreq: float = 256.0
    reference: str = "none"
    flat: str = "drop"
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    accept_units: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sfreq <= _RATES_HZ[1]:
            raise ValueError(f"sfreq must be positive and at most {_RATES_HZ[1]:g} Hz, found {self.sfreq}")
        for name, edge in (("l_freq", self.l_freq), ("h_freq", self.h_freq)):
            if edge is not None and not 0 < edge < np.inf:
                raise ValueError(f"{name} must be a frequency above 0 Hz, or None for no such edge, found {edge}")
        if self.l_freq is not None and self.h_freq is not None and not self.l_freq < self.h_freq:
            raise ValueError(f"the band must satisfy 0 < l_freq < h_freq, found {self.l_freq} and {self.h_freq}")
        if self.flat not in ("drop", "keep"):
            raise ValueError(f"flat must be 'drop' or 'keep', found {self.flat!r}")
        if self.scale == 0 or not np.isfinite(self.scale):
            raise ValueError(f"scale must be a finite factor other than 0, found {self.scale}")
        wanted_names(self.montage)


def preprocess(recording: Recording, config: PreprocessConfig) -> tuple[Recording, Montage]:
    """The whole chain. Returns the recording (float32 microvolts, at `config.sfreq`) and the montage of its rows.

    Raises ValueError, one sentence, when no usable electrode is left, the asked montage cannot be made, or the
    amplitude is not plausible.
    """
    check_rate(recording)
    recording = select_channels(recording, config)
    recording = fill_gaps(recording)
    if config.scale != 1.0:
        recording = dataclasses.replace(recording, signal_uv=recording.signal_uv * config.scale)
        recording = recording.noting(f"signal multiplied by {config.scale:g}")
    recording = drop_flat(recording) if config.flat == "drop" else recording
    recording = band_pass(recording, config.l_freq, config.h_freq)
    recording = notch_filter(recording, config.notch)
    recording = resample(recording, config.sfreq)
    if not config.accept_units:
        check_units(recording)
    recording, montage = derive(recording, config)
    return dataclasses.replace(recording, signal_uv=recording.signal_uv.astype(np.float32)), montage


def check_rate(recording: Recording) -> None:
    """Raise ValueError when the sampling rate is none of an EEG."""
    low, high = _RATES_HZ
    if not low <= recording.sfreq <= high:
        raise ValueError(f"a sampling rate of {recording.sfreq:.4g} Hz is not that of EEG ({low:g} to {high:g} Hz)")


def wanted_names(montage: str) -> tuple[str, ...] | None:
    """The channel names a montage setting asks for; None for "auto". Raises ValueError for a name with no position."""
    if montage == "auto":
        return None
    names = CHANNEL_ORDERS.get(montage) or tuple(normalize_name(name) for name in montage.split(",") if name.strip())
    unknown = [name for name in names if not is_electrode(name)]
    if unknown or not names:
        raise ValueError(
            f"montage {montage!r} is not 'auto', a known order ({', '.join(CHANNEL_ORDERS)}) or a list of electrodes"
            + (f": {', '.join(unknown)} has no standard position" if unknown else "")
        )
    return names


def select_channels(recording: Recording, config: PreprocessConfig) -> Recording:
    """Rename, and keep the electrodes: the named ones, and those the file itself gives a position for.

    What is left out is listed in `dropped`. The names of the result are electrode names.
    Raises ValueError when nothing is left.
    """
    missing = [label for label in config.rename if label not in recording.ch_names]
    names = [normalize_name(config.rename.get(label, label)) for label in recording.ch_names]
    wanted = wanted_names(config.montage)
    needed = {site for name in wanted or () for site in (name, *(split_pair(name) or ()))} | set(_references(config))
    rows, dropped = [], {}
    for i, (label, name) in enumerate(zip(recording.ch_names, names, strict=True)):
        reason = _why_dropped(name, i, recording, needed)
        if not reason and name in [names[j] for j in rows]:
            reason = f"a second channel called {name}"
        if reason:
            dropped[label] = reason
        else:
            rows.append(i)
    if not rows:
        raise ValueError(_nothing_left(recording, dropped))
    kept = recording.pick(rows, dropped=dropped)
    kept = dataclasses.replace(kept, ch_names=tuple(names[i] for i in rows))
    return kept.noting(f"--rename names labels the file lacks: {', '.join(missing)}") if missing else kept


def _why_dropped(name: str, row: int, recording: Recording, needed: set[str]) -> str:
    if is_electrode(name):
        asked = find_name(name, tuple(needed)) is not None
        return "" if asked or not is_ear_reference(name) else "ear or mastoid reference, not a scalp channel"
    if _NOT_EEG.search(name):
        return "not EEG"
    measured = recording.positions is not None and np.isfinite(recording.positions[row]).all()
    return "" if measured else "unknown name and no position in the file"


def _nothing_left(recording: Recording, dropped: dict[str, str]) -> str:
    shown = ", ".join(list(dropped)[:8]) + (", ..." if len(dropped) > 8 else "")
    sentence = (
        f"no channel has a known electrode name or a position in the file ({len(dropped)} left out: {shown}): "
        "give names with --rename LABEL=NAME"
    )
    amplitude = _robust_amplitude(band_pass(fill_gaps(recording), 1.0, None).signal_uv)
    if not PLAUSIBLE_UV[0] <= amplitude <= PLAUSIBLE_UV[1]:
        sentence += f"; nor is their robust amplitude of {amplitude:.3g} uV above 1 Hz that of EEG"
    return sentence


def fill_gaps(recording: Recording) -> Recording:
    """Replace samples that are not finite by a straight line, so that filters stay finite, and list them as gaps.

    Numbers that no unit explains (above 1e20) count as not finite: one of them would spoil the whole recording.
    A window that touches a gap is rejected later. A channel without any finite sample is dropped.
    """
    bad = ~(np.abs(recording.signal_uv) <= _LARGEST)  # also where it is not a number
    if not bad.any():
        return recording
    alive = ~bad.all(axis=1)
    dropped = {recording.ch_names[i]: "no finite sample" for i in np.flatnonzero(~alive)}
    if not alive.any():
        raise ValueError("no channel holds a finite sample")
    recording, bad = recording.pick(np.flatnonzero(alive).tolist(), dropped=dropped), bad[alive]
    signal, time = recording.signal_uv.copy(), np.arange(recording.n_times)
    for row, holes in zip(signal, bad, strict=True):
        if holes.any():
            row[holes] = np.interp(time[holes], time[~holes], row[~holes])
    anywhere = np.flatnonzero(np.diff(np.r_[0, bad.any(axis=0).astype(int), 0]))
    spans = tuple((a / recording.sfreq, b / recording.sfreq) for a, b in anywhere.reshape(-1, 2))
    note = f"{int(bad.sum())} samples are not finite, in {len(spans)} stretches: windows that touch them are rejected"
    filled = dataclasses.replace(recording, signal_uv=signal, gaps=(*recording.gaps, *spans))
    return filled.noting(note) if spans else filled


def drop_flat(recording: Recording) -> Recording:
    """Leave out channels that are flat over the whole recording. Raises ValueError when all are.

    Flat also means far below the other channels, so that a file in a wrong unit fails the check of units instead.
    """
    deviation = recording.signal_uv.std(axis=1)
    flat = (deviation < FLAT_UV) & (deviation <= 1e-3 * deviation.max())
    if flat.all():
        raise ValueError("every channel is constant: no electrode was connected, or the signal is missing")
    dropped = {recording.ch_names[i]: "flat over the whole recording" for i in np.flatnonzero(flat)}
    return recording.pick(np.flatnonzero(~flat).tolist(), dropped=dropped) if dropped else recording


def band_pass(recording: Recording, l_freq: float | None, h_freq: float | None) -> Recording:
    """MNE's default FIR band-pass. An upper edge at or above Nyquist is lowered to 0.9 of Nyquist, and noted."""
    import mne

    nyquist = recording.sfreq / 2
    if l_freq is None and h_freq is None:
        return recording
    if h_freq is not None and h_freq >= nyquist:
        lowered = 0.9 * nyquist
        recording = recording.noting(
            f"upper band edge lowered from {h_freq:g} to {lowered:g} Hz: the Nyquist frequency is {nyquist:g} Hz"
        )
        h_freq = lowered
    if l_freq is not None and l_freq >= (h_freq or nyquist):
        raise ValueError(f"no band is left between {l_freq:g} Hz and the Nyquist frequency of {nyquist:g} Hz")
    signal = recording.signal_uv.astype(np.float64)
    if l_freq is not None and recording.duration < _FILTER_CYCLES / min(max(0.25 * l_freq, 2), l_freq):
        # MNE pads such a recording with zeros beyond its reflection: an amplifier's offset would become a transient.
        signal -= signal.mean(axis=1, keepdims=True)
        recording = recording.noting(
            f"shorter ({recording.duration:.3g} s) than the high-pass filter: its mean was removed first, and most of "
            "what the filter saw is reflected padding"
        )
    with _warnings_off():
        filtered = mne.filter.filter_data(signal, recording.sfreq, l_freq, h_freq, verbose="ERROR")
    return dataclasses.replace(recording, signal_uv=filtered)


def notch_filter(recording: Recording, frequency: float | None) -> Recording:
    """MNE's default FIR notch at one frequency (no harmonics); skipped, and noted, where it reaches Nyquist."""
    import mne

    if frequency is None:
        return recording
    if frequency + frequency / 400 + 0.5 >= recording.sfreq / 2:
        return recording.noting(f"no {frequency:g} Hz notch: the Nyquist frequency is {recording.sfreq / 2:g} Hz")
    signal = recording.signal_uv.astype(np.float64)
    with _warnings_off():
        filtered = mne.filter.notch_filter(signal, recording.sfreq, [frequency], verbose="ERROR")
    return dataclasses.replace(recording, signal_uv=filtered)


def resample(recording: Recording, sfreq: float) -> Recording:
    """MNE's FFT resampler, up or down, only when the rates differ; round(n f_out / f_in) samples come out."""
    import mne

    if recording.sfreq == sfreq:
        return recording
    signal = recording.signal_uv.astype(np.float64)
    with _warnings_off():
        signal = mne.filter.resample(
            signal,
            up=sfreq,
            down=recording.sfreq,
            npad="auto",  # pyright: ignore[reportArgumentType]  (MNE documents it, its stub does not)
            pad="reflect_limited",
            verbose="ERROR",
        )
    return dataclasses.replace(recording, signal_uv=signal, sfreq=float(sfreq))


def derive(recording: Recording, config: PreprocessConfig) -> tuple[Recording, Montage]:
    """Re-reference, or take the asked channels (bipolar pairs as differences), and give the rows their positions."""
    wanted, references = wanted_names(config.montage), _references(config)
    if config.reference == "average":
        centred = recording.signal_uv - recording.signal_uv.mean(axis=0)
        recording = dataclasses.replace(recording, signal_uv=centred).noting("average reference")
    elif references:
        found = [find_name(name, recording.ch_names) for name in references]
        if None in found:
            raise ValueError(f"the reference {config.reference!r} asks for electrodes the file lacks")
        mean = recording.signal_uv[[recording.ch_names.index(name) for name in found if name]].mean(axis=0)
        rows = [i for i, name in enumerate(recording.ch_names) if name not in found or name in (wanted or ())]
        recording = dataclasses.replace(recording, signal_uv=recording.signal_uv - mean)
        recording = recording.pick(rows).noting(f"referenced to {config.reference}")
    if wanted is None:
        return recording, montage_of(recording.ch_names, locations=_locations(recording))
    signal = bipolar_signal(recording.signal_uv, recording.ch_names, wanted)
    asked = dataclasses.replace(recording, signal_uv=signal, ch_names=wanted, positions=None)
    return asked, montage_of(wanted, name=config.montage if config.montage in CHANNEL_ORDERS else None)


def _locations(recording: Recording) -> np.ndarray | None:
    """None when every name has a template position, else template positions with the file's own where names fail."""
    unknown = [i for i, name in enumerate(recording.ch_names) if not is_electrode(name)]
    if not unknown or recording.positions is None:
        return None
    rows = [name for name in recording.ch_names if is_electrode(name)]
    locations = recording.positions.copy()
    known = [i for i in range(len(recording.ch_names)) if i not in unknown]
    if known:
        locations[known] = electrode_positions(rows)
    return locations


def _references(config: PreprocessConfig) -> tuple[str, ...]:
    if config.reference in ("none", "average"):
        return ()
    return tuple(normalize_name(name) for name in config.reference.split(",") if name.strip())


def check_units(recording: Recording) -> None:
    """Raise ValueError, naming the likely factor, when the robust amplitude is not that of EEG.

    The amplitude is the median over channels of 1.4826 times the median absolute deviation, microvolts.
    """
    amplitude = _robust_amplitude(recording.signal_uv)
    low, high = PLAUSIBLE_UV
    if low <= amplitude <= high:
        return
    sentence = (
        f"robust amplitude of {amplitude:.3g} uV is not plausible for EEG ({low:g} to {high:g} uV; "
        f"unit: {recording.unit})"
    )
    factor = likely_factor(amplitude)
    if factor is None:
        raise ValueError(f"{sentence}: give --scale FACTOR if the unit is wrong, or --accept-units if it is right")
    raise ValueError(
        f"{sentence}: it looks like {_UNIT_FACTORS[factor]}; run with --scale {factor:g} if so, or --accept-units if "
        "the values are right"
    )


def robust_amplitude(recording: Recording) -> float:
    """Median over channels of 1.4826 times the median absolute deviation: the standard deviation, were it Gaussian."""
    return _robust_amplitude(recording.signal_uv)


def likely_factor(amplitude_uv: float) -> float | None:
    """The power of a thousand that brings an amplitude closest to typical EEG, or None when none makes it plausible."""
    if not np.isfinite(amplitude_uv) or amplitude_uv <= 0:
        return None
    best = min(_UNIT_FACTORS, key=lambda factor: abs(np.log10(amplitude_uv * factor / _TYPICAL_UV)))
    return best if PLAUSIBLE_UV[0] <= amplitude_uv * best <= PLAUSIBLE_UV[1] else None


def _robust_amplitude(signal: np.ndarray) -> float:
    centre = np.nanmedian(signal, axis=1, keepdims=True)
    return float(np.median(1.4826 * np.nanmedian(np.abs(signal - centre), axis=1)))


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    """MNE warns when a filter is longer than the signal; that is told in a note of ours instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
