"""EDF/EDF+, BDF, FIF, BrainVision and EEGLAB files to recordings, through MNE."""

import dataclasses
import glob
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.montages import is_ear_reference, is_electrode, normalize_name
from data_pipeline.readers.edf_header import read_edf_header
from data_pipeline.readers.matlab5 import check_matlab5, is_matlab73
from data_pipeline.recording import Annotation, Recording

if TYPE_CHECKING:
    import mne

_VOLTS_TO_MICROVOLTS = 1e6


def read_edf(path: Path) -> Recording:
    """EDF, EDF+ or BDF. Channels at another rate than the EEG channels are dropped, not interpolated."""
    import mne

    header = read_edf_header(path)
    rate, dropped = _common_rate(header.labels, header.rates)
    reader = mne.io.read_raw_bdf if header.is_bdf else mne.io.read_raw_edf
    other_rates = sorted({label for label, f in zip(header.labels, header.rates, strict=True) if f != rate})
    try:
        raw = _through_mne(reader, path, exclude=other_rates)
    except ValueError as error:
        if "latin1" not in str(error):
            raise
        raw = _through_mne(reader, path, exclude=other_rates, encoding="latin1")  # annotations older than UTF-8
    recording = _from_raw(raw, unit=_stated_units(header.labels, header.dimensions))
    recording = _merge_repeated(recording, [label for label in header.labels if label not in other_rates])
    notes = []
    if 0 < header.n_records < header.n_records_declared:
        notes.append(f"cut short: {header.n_records} of {header.n_records_declared} declared records are present")
    return recording.pick(range(len(recording.ch_names)), dropped=dropped).noting(*notes)


def read_fif(path: Path) -> Recording:
    """A continuous FIF file; channels that the file does not call EEG are dropped, its digitised positions kept."""
    import mne

    for part in (path, *path.parent.glob(f"{glob.escape(path.stem)}-*.fif")):  # MNE goes on in the parts of a long file
        _check_tags_end(part)
    return _from_raw(_through_mne(mne.io.read_raw_fif, path), unit="V (FIF)")


def _check_tags_end(path: Path) -> None:
    """Raise ValueError when the tags of a FIF file lead in a circle, which MNE would follow for ever.

    A tag is four big-endian int32: kind, type, bytes of content, and where the next tag is (0 = behind the content,
    below 0 = there is none).
    """
    seen, position = set(), 0
    with path.open("rb") as file:
        while position not in seen:
            seen.add(position)
            file.seek(position)
            tag = file.read(16)
            if len(tag) < 16:
                return
            size, after = struct.unpack(">8xIi", tag)
            if after < 0:
                return
            position = after or position + 16 + size
    raise ValueError(f"damaged: the tags of {path.name} lead back to byte {position}, they have no end")


def read_brainvision(path: Path) -> Recording:
    """A BrainVision header with its data and marker files; channels whose unit is no voltage are dropped."""
    import mne

    raw = _through_mne(mne.io.read_raw_brainvision, path)
    text = path.read_bytes().decode("utf-8", errors="replace")
    fields = [line.split(",") for line in re.findall(r"(?m)^Ch\d+=(.*)$", text)]
    units = [(f[0].replace(r"\1", ","), f[3].strip() if len(f) > 3 else "") for f in fields]
    # The format's default unit is the microvolt; coordinates share the "Ch" keys but not the names.
    stated = [(name, unit or "uV") for name, unit in units if name in raw.ch_names]
    recording = _from_raw(raw, unit="")
    kept = [(name, unit) for name, unit in stated if name in recording.ch_names]
    return dataclasses.replace(recording, unit=_stated_units([n for n, _ in kept], [u for _, u in kept]))


def read_eeglab(path: Path) -> Recording:
    """A continuous EEGLAB .set (with or without .fdt); EEGLAB's unit is the microvolt, its positions are kept."""
    import mne

    if not is_matlab73(path):
        check_matlab5(path)
    return _from_raw(_through_mne(mne.io.read_raw_eeglab, path), unit="uV (EEGLAB's convention)")


def _through_mne(
    reader: "Callable[..., mne.io.BaseRaw]",
    path: Path,
    *,
    exclude: Sequence[str] | None = None,
    encoding: str | None = None,
) -> "mne.io.BaseRaw":
    options: dict = {} if exclude is None else {"exclude": exclude, "encoding": encoding or "utf8"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = reader(path, preload=True, verbose="ERROR", **options)
            raw.get_channel_types()  # a kind of channel that does not exist shows here only
            return raw
    except MemoryError:
        raise ValueError("too large for the memory of this machine: split the file") from None
    except Exception as error:  # MNE raises many types for a bad file; each means that it cannot be read
        trials = re.search(r"number of trials is (\d+)", str(error))
        if trials:
            raise ValueError(
                f"epoched: the file holds {trials[1]} separate trials, only continuous recordings can be windowed"
            ) from error
        raise ValueError(f"damaged, or not what its suffix says: {what_mne_said(error, path)}") from error


def what_mne_said(error: Exception, path: Path) -> str:
    """One clause with the first sentence of an error of MNE; the same wherever the file lies."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lines[0].startswith(("Traceback", 'File "')):  # an error that quotes where another one came from
        lines = lines[-1:]
    sentence = re.sub(r"\w+Path\(('[^']*')\)", r"\1", lines[0]).replace(f"{path.parent}{os.sep}", "")
    return f"MNE cannot read it ({type(error).__name__}: {sentence})"


def _from_raw(raw: "mne.io.BaseRaw", *, unit: str) -> Recording:
    types = raw.get_channel_types()
    eeg = [i for i, kind in enumerate(types) if kind == "eeg"]
    dropped = {raw.ch_names[i]: f"not EEG ({kind})" for i, kind in enumerate(types) if kind != "eeg"}
    if not eeg:
        raise ValueError(f"no EEG channel: the file holds {', '.join(sorted(set(types))) or 'no channels'} only")
    if raw.n_times < 2:
        raise ValueError(f"the file holds {raw.n_times} samples")
    start = raw.first_time if raw.info["meas_date"] is not None else 0.0
    annotations = tuple(
        Annotation(float(onset) - start, float(duration), str(description))
        for onset, duration, description in zip(
            raw.annotations.onset, raw.annotations.duration, raw.annotations.description, strict=True
        )
    )
    return Recording(
        signal_uv=np.asarray(raw.get_data())[eeg] * _VOLTS_TO_MICROVOLTS,
        sfreq=float(raw.info["sfreq"]),
        ch_names=tuple(raw.ch_names[i] for i in eeg),
        annotations=annotations,
        positions=_head_positions([raw.info["chs"][i] for i in eeg]),
        unit=unit,
        dropped=dropped,
    )


def _head_positions(channels: list[dict]) -> np.ndarray | None:
    """(C,3) metres, head frame, NaN where the file gives none or gives it in another frame; None if nowhere."""
    from mne._fiff.constants import FIFF

    xyz = np.array([np.asarray(channel["loc"][:3], dtype=np.float64) for channel in channels])
    in_head = np.array([channel["coord_frame"] == FIFF.FIFFV_COORD_HEAD for channel in channels])
    known = in_head & np.isfinite(xyz).all(axis=1) & (np.abs(xyz).sum(axis=1) > 0)
    xyz[~known] = np.nan
    return xyz if known.any() else None


def _common_rate(labels: tuple[str, ...], rates: tuple[float, ...]) -> tuple[float, dict[str, str]]:
    """The rate most EEG channels have (ties: the highest), and the channels at other rates with the reason."""
    names = [normalize_name(label) for label in labels]
    eeg = [i for i, name in enumerate(names) if is_electrode(name) and not is_ear_reference(name)]
    counted = Counter(rates[i] for i in (eeg or range(len(labels))))
    rate = max(counted, key=lambda f: (counted[f], f))
    others = {
        label: f"sampled at {f:g} Hz, the others at {rate:g} Hz"
        for label, f in zip(labels, rates, strict=True)
        if f != rate
    }
    return rate, others


def _merge_repeated(recording: Recording, labels: list[str]) -> Recording:
    """MNE numbers repeated labels (`T8-P8-0`, `T8-P8-1`): identical copies become one, different ones are dropped."""
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    dropped, renamed = {}, list(recording.ch_names)
    for label in repeated:
        copies = [i for i, name in enumerate(recording.ch_names) if re.fullmatch(re.escape(label) + r"-\d+", name)]
        if len(copies) < 2:  # a damaged label, which MNE spells in another way: its copies have names of their own
            continue
        same = all(np.array_equal(recording.signal_uv[copies[0]], recording.signal_uv[i]) for i in copies[1:])
        reason = "an identical copy of a repeated label" if same else f"label {label!r} occurs {len(copies)} times"
        for i in copies[1:] if same else copies:
            dropped[recording.ch_names[i]] = reason
        if same:
            renamed[copies[0]] = label
    if not repeated:
        return recording
    rows = [i for i, name in enumerate(recording.ch_names) if name not in dropped]
    kept = recording.pick(rows, dropped=dropped)
    return dataclasses.replace(kept, ch_names=tuple(renamed[i] for i in rows))


def _stated_units(labels: Sequence[str], dimensions: Sequence[str]) -> str:
    """The units the file states for its electrodes, most common first, as text."""
    names = [normalize_name(label) for label in labels]
    eeg = [
        d.replace("\u00b5", "u").replace("\u03bc", "u")
        for n, d in zip(names, dimensions, strict=True)
        if is_electrode(n)
    ]
    units = [unit or "none stated" for unit, _ in Counter(eeg or dimensions).most_common()]
    return f"{', '.join(units)} (header)"
