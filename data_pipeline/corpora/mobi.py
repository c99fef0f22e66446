"""MoBI: joint angles while walking on a treadmill, a regression (data.md 8.11)."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.corpora.base import (
    PARTS,
    Catalogue,
    Corpus,
    Division,
    Drop,
    Expected,
    Piece,
    Source,
    files_below,
    unknown_layout,
)
from data_pipeline.corpora.tables import read_samples
from data_pipeline.montages import CHANNEL_ORDERS, is_electrode, normalize_name
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.recording import Recording

_SESSION = re.compile(r"(SL\d\d)-(T\d\d)", re.IGNORECASE)
_NAMES = """
FP1 FP2 F7 F3 FZ F4 F8 FC5 FC1 FC2 FC6 T7 C3 CZ C4 T8 TP9 CP5 CP1 CP2 CP6 TP10 P7 P3 PZ P4 P8 PO9 O1 OZ O2 PO10
AF7 AF3 AF4 AF8 F5 F1 F2 F6 FT9 FT7 FC3 FC4 FT8 FT10 C5 C1 C2 C6 TP7 CP3 CPZ CP4 TP8 P5 P1 P2 P6 PO7 PO3 POZ PO4 PO8
"""
_COLUMNS = tuple(_NAMES.split())  # of eeg.txt after the time; TP9 TP10 FT9 FT10 are electrodes beside the eyes
_SFREQ = 100.0
_STRETCHES = ((120, 720), (720, 1020), (1020, 1320))  # seconds of training, validation, test; the start is standing
_AVERAGED = 5  # samples of an angle at the end of a window
_FULL_ANGLE = 90.0
_ANGLES = 12  # columns of joints.txt after the time
_LARGEST_ANGLE = 1e6  # degrees; a goniometer gives less than 360


@dataclass(frozen=True, kw_only=True)
class Mobi(Corpus):
    """MoBI: joint angles while walking, 60 channels, 100 Hz, 2 s every 50 ms, unfiltered."""

    name: ClassVar[str] = "mobi"
    title: ClassVar[str] = "Mobile brain-body imaging while walking on a treadmill"
    source: ClassVar[str] = "https://www.nature.com/articles/sdata201874 (data on figshare)"
    licence: ClassVar[str] = "as stated on figshare"
    citation: ClassVar[str] = "He et al., A mobile brain-body imaging dataset, Sci. Data 5:180074, 2018"
    layout: ClassVar[str] = "SL01-T01/eeg.txt with joints.txt beside, ... SL08-T03"
    expected: ClassVar[Expected] = Expected(
        windows={"train": 24 * 11_961, "validation": 24 * 5_961},
        recordings=24,
        subjects=8,
        source="10 and 5 minutes of each session; test parts are shorter where a session ends early",
    )
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="mobi-60", l_freq=None, h_freq=None, notch=None, sfreq=_SFREQ, flat="keep", accept_units=True
    )
    window: ClassVar[float] = 2.0

    channels: Literal[60, 19] = 60
    """all but the four beside the eyes, or the 10-20 ones"""
    targets: Literal[12, 6] = 12
    """12 angles, as published, of which the last 6 are predictions of a decoder, or the 6 that were measured"""
    step: int = 5
    """samples between windows; 5 = 50 ms, as published"""

    def find(self, root: Path) -> Catalogue:
        """Sessions that have a signal and angles."""
        sources, left_out = [], {}
        for name, path in files_below(root, ".txt"):
            found = _SESSION.fullmatch(path.parent.name)
            if path.name.lower() != "eeg.txt":
                continue
            angles = path.with_name("joints.txt")
            if found is None:
                left_out[name] = f"its folder {path.parent.name!r} is not SL<subject>-T<trial>"
            elif not angles.is_file():
                left_out[name] = "no joints.txt beside it"
            else:
                impedances = path.with_name("impedances-before.txt")
                companions = (angles, impedances) if impedances.is_file() else (angles,)
                subject, session = found[1].upper(), found[2].upper()
                sources.append(Source(path, name, subject, session, companions=companions))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """One piece per part of the session, as far as it lasts. Raises ValueError for a file of another form."""
        wanted = CHANNEL_ORDERS[self._order()]
        columns = [1 + _COLUMNS.index(name) for name in wanted]
        signal = read_samples(source.path, columns, delimiter="\t", header_lines=1, width=1 + len(_COLUMNS))
        joints, wanted_angles = source.path.with_name("joints.txt"), range(1, 1 + self.targets)
        angles = read_samples(joints, wanted_angles, delimiter="\t", header_lines=2, width=1 + _ANGLES)
        notes = _doubts(source, signal.shape[1], angles.shape[1])
        n_times = min(signal.shape[1], angles.shape[1])
        for part, stretch in zip(PARTS, _STRETCHES, strict=True):
            start, stop = (min(round(seconds * _SFREQ), n_times) for seconds in stretch)
            if stop - start < self.n_times:
                continue
            recording = Recording(signal[:, start:stop], _SFREQ, wanted, unit="uV (documented)", notes=notes)
            ends = functools.partial(_targets, angles[:, start:stop] / _FULL_ANGLE, self.n_times)
            yield Piece(recording, label_windows=ends, name=part, part=part, onset=start / _SFREQ)

    def split(self, catalogue: Catalogue) -> Division:
        """By time within each session."""
        rule = "of each session 10 min train, the next 5 validate, the next 5 test, after 2 min that are skipped"
        return Division({source.name: "" for source in catalogue.sources}, unit="time", rule=rule)

    def common_chain(self) -> PreprocessConfig:
        """With the order of the chosen channels."""
        return dataclasses.replace(self.chain_settings, montage=self._order())

    @property
    def stride_samples(self) -> int:
        """Samples between windows."""
        return self.step

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"--step must be at least 1 sample, found {self.step}")

    def _order(self) -> str:
        return f"mobi-{self.channels}"


def _targets(angles: np.ndarray, n_times: int, starts: np.ndarray, _: int) -> list[tuple[float, ...] | Drop]:
    """Mean of each angle (K,T) over the last samples of the windows from `starts` (n,): n tuples of K.

    Windows whose angles are lacking (not a number) or impossible are dropped.
    """
    ends = starts[:, None] + n_times - _AVERAGED + np.arange(_AVERAGED)
    possible = np.logical_and.reduce(np.abs(angles) <= _LARGEST_ANGLE / _FULL_ANGLE, axis=0)
    usable = np.logical_and.reduce(possible[ends], axis=-1).tolist()
    means = angles[:, ends].mean(axis=-1).T.tolist()
    return [tuple(row) if ok else Drop("no angle") for row, ok in zip(means, usable, strict=True)]


def _doubts(source: Source, n_signal: int, n_angles: int) -> tuple[str, ...]:
    """What does not fit together, in sentences. The order of the columns is documented, not stated in eeg.txt."""
    doubts = []
    if n_signal != n_angles:
        doubts.append(f"{n_signal} samples of signal and {n_angles} of angles: cut to the shorter")
    if (shorter := min(n_signal, n_angles)) < _STRETCHES[1][1] * _SFREQ:
        doubts.append(f"ends after {shorter / _SFREQ:g} s: there is nothing of it to test on")
    for path in source.companions[1:]:
        words = [normalize_name(word) for word in re.split(r"[\s,;:]+", path.read_text(errors="replace")) if word]
        listed = tuple(dict.fromkeys(word for word in words if is_electrode(word)))
        if set(listed) == set(_COLUMNS) and listed != _COLUMNS:
            doubts.append(f"{path.name} lists the electrodes in another order than the documented one, which is used")
    return tuple(doubts)
