"""SEED-V: five emotions while films are watched (data.md 8.6)."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from data_pipeline.corpora.base import Catalogue, Corpus, Division, Expected, Piece, Source, files_below, unknown_layout
from data_pipeline.montages import CHANNEL_ORDERS, find_name, normalize_name
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.readers.mne_formats import what_mne_said
from data_pipeline.recording import Recording

if TYPE_CHECKING:
    import mne

_CLASSES = ("disgust", "fear", "sad", "neutral", "happy")
_CHANNELS = CHANNEL_ORDERS["seed-v-62"]
_FILE = re.compile(r"(\d{1,2})_([123])_\d{8}(?:_raw|_eeg)?")
_CONVERTED = (".edf", ".bdf", ".fif", ".set", ".vhdr")  # sessions that somebody converted with another program


@dataclass(frozen=True)
class Trial:
    """A film: its number in the session from 1, seconds of its beginning and end, class number."""

    number: int
    start: float
    stop: float
    label: int


def _table(starts: str, stops: str, labels: str) -> tuple[Trial, ...]:
    rows = zip(starts.split(), stops.split(), labels.split(), strict=True)
    return tuple(Trial(i, float(a), float(b), int(label)) for i, (a, b, label) in enumerate(rows, 1))


TRIALS = {
    1: _table(
        "30 132 287 555 773 982 1271 1628 1730 2025 2227 2435 2667 2932 3204",
        "102 228 524 742 920 1240 1568 1697 1994 2166 2401 2607 2901 3172 3359",
        "4 1 3 2 0 4 1 3 2 0 4 1 3 2 0",
    ),
    2: _table(
        "30 299 548 646 836 1000 1091 1392 1657 1809 1966 2186 2333 2490 2741",
        "267 488 614 773 967 1059 1331 1622 1777 1908 2153 2302 2428 2709 2817",
        "2 1 3 0 4 4 0 3 2 1 3 4 1 2 0",
    ),
    3: _table(
        "30 353 478 674 825 908 1200 1346 1451 1711 2055 2307 2457 2726 2888",
        "321 418 643 764 877 1147 1284 1418 1679 1996 2275 2425 2664 2857 3066",
        "2 1 3 0 4 4 0 3 2 1 3 4 1 2 0",
    ),
}
_LAST_TRIALS = {"equal": (5, 10), "as_reference": (6, 11)}  # of training and validation
_LAST_SUBJECTS = (10, 13)


@dataclass(frozen=True, kw_only=True)
class SeedV(Corpus):
    """SEED-V: five emotions, 62 channels, 200 Hz, 1 s, band 1-75 Hz within each trial."""

    name: ClassVar[str] = "seed-v"
    title: ClassVar[str] = "SEED-V emotions"
    source: ClassVar[str] = "https://bcmi.sjtu.edu.cn/home/seed/seed-v.html"
    licence: ClassVar[str] = "academic research, after an application to BCMI, Shanghai Jiao Tong University"
    citation: ClassVar[str] = "Liu et al., Comparing Recognition Performance and Robustness, IEEE TCDS 14:715, 2021"
    layout: ClassVar[str] = "EEG_raw/<subject>_<session>_<date>.cnt (or the same converted to EDF, FIF, ...)"
    expected: ClassVar[Expected] = Expected(
        windows={"train": 43_328, "validation": 43_360, "test": 31_056},
        recordings=48,
        subjects=16,
        source="LUNA, arXiv 2510.22257, table 11: trials divided 6/5/4, --trials as_reference",
    )
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="seed-v-62", l_freq=1.0, h_freq=75.0, notch=None, sfreq=200.0, flat="keep", accept_units=True
    )
    window: ClassVar[float] = 1.0
    stride: ClassVar[float] = 1.0

    trials: Literal["equal", "as_reference", "by_subject"] = "equal"
    """equal: trials 1-5 of every session train, 6-10 validate, 11-15 test; as_reference: 6/5/4 trials, as published
    counts have it; by_subject: subjects 1-10, 11-13 and 14-16"""
    decimate: Literal["filter", "stride"] = "filter"
    """to 200 Hz: with an anti-alias filter, or every fifth sample as the reference does (what lies above 100 Hz folds
    into the band)"""

    def find(self, root: Path) -> Catalogue:
        """The sessions; of a session in two formats the first in alphabetical order, which is the original."""
        sources, left_out, seen = [], {}, {}
        for name, path in files_below(root, ".cnt", *_CONVERTED):
            found = _FILE.fullmatch(path.stem)
            if found is None:
                left_out[name] = f"its name {path.stem!r} is not <subject>_<session>_<date>"
                continue
            key = (f"{int(found[1]):02d}", found[2])
            if key in seen:
                left_out[name] = f"the same session as {seen[key]}"
                continue
            seen[key] = name
            sources.append(Source(path, name, *key, classes=tuple(range(len(_CLASSES)))))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """One piece per trial: filters act within it, as in the reference."""
        session = int(source.session)
        raw = _open(source.path, TRIALS[session][-1].stop)
        rows = _rows(raw.ch_names)
        duration = raw.n_times / raw.info["sfreq"]
        missing = [str(trial.number) for trial in TRIALS[session] if trial.stop > duration + 1e-6]
        notes = [f"ends after {duration:g} s: trials {', '.join(missing)} are cut short or absent"] if missing else []
        for trial in TRIALS[session]:
            if trial.start >= duration:
                continue
            recording = _cut(raw, rows, trial).noting(*notes)
            if self.decimate == "stride":
                recording = _every_nth(recording, self.chain_settings.sfreq)
            part = "" if self.trials == "by_subject" else _part(trial.number, _LAST_TRIALS[self.trials])
            yield Piece(recording, label=trial.label, name=f"trial{trial.number:02d}", onset=trial.start, part=part)

    def split(self, catalogue: Catalogue) -> Division:
        """Trials of every session, or subjects."""
        sources = catalogue.sources
        if self.trials == "by_subject":
            parts = {source.name: _part(int(source.subject), _LAST_SUBJECTS) for source in sources}
            return Division(parts, rule="subjects 1-10 train, 11-13 validate, 14-16 test")
        first, second = _LAST_TRIALS[self.trials]
        rule = f"trials 1-{first} of every session train, {first + 1}-{second} validate, {second + 1}-15 test"
        return Division({source.name: "" for source in sources}, unit="trial", rule=rule)

    def class_names(self) -> tuple[str, ...]:
        """In the order of the corpus's numbers."""
        return _CLASSES


def _part(number: int, last: tuple[int, int]) -> str:
    return "train" if number <= last[0] else "validation" if number <= last[1] else "test"


def _open(path: Path, last_trial: float) -> "mne.io.BaseRaw":
    """The session, not yet in memory. Raises ValueError for a file that MNE cannot read."""
    import mne

    def opened(**options: str) -> "mne.io.BaseRaw":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = mne.io.read_raw_cnt if path.suffix.lower() == ".cnt" else mne.io.read_raw
            return reader(path, preload=False, verbose="ERROR", **options)  # pyright: ignore[reportArgumentType]

    try:
        try:
            return opened()
        except RuntimeError:  # the count of samples in some headers is wrong, and the width of a sample a guess
            if path.suffix.lower() != ".cnt":
                raise
        raw = opened(data_format="int32")
        return raw if raw.n_times >= last_trial * raw.info["sfreq"] else opened(data_format="int16")
    except Exception as error:  # MNE raises many types for a bad file; each means that it cannot be read
        raise ValueError(f"damaged: {what_mne_said(error, path)}") from error


def _rows(labels: list[str]) -> list[int]:
    """Rows of the 62 channels in their order. Raises ValueError naming those that lack."""
    names = tuple(normalize_name(label) for label in labels)
    found = {wanted: find_name(wanted, names) for wanted in _CHANNELS}
    missing = [wanted for wanted, name in found.items() if name is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)} of the {len(_CHANNELS)} channels")
    return [names.index(name) for name in found.values() if name is not None]


def _cut(raw: "mne.io.BaseRaw", rows: list[int], trial: Trial) -> Recording:
    sfreq = float(raw.info["sfreq"])
    start, stop = round(trial.start * sfreq), min(round(trial.stop * sfreq), raw.n_times)
    volts = np.asarray(raw.get_data(picks=np.array(rows), start=start, stop=stop))
    others = {name: "not one of the 62 channels" for i, name in enumerate(raw.ch_names) if i not in rows}
    return Recording(volts * 1e6, sfreq, _CHANNELS, unit="V (as MNE reads it)", dropped=others)


def _every_nth(recording: Recording, sfreq: float) -> Recording:
    step = recording.sfreq / sfreq
    if step != round(step):
        raise ValueError(f"sampled at {recording.sfreq:g} Hz: no whole number of samples makes {sfreq:g} Hz")
    signal = np.ascontiguousarray(recording.signal_uv[:, :: round(step)])
    return Recording(signal, sfreq, recording.ch_names, unit=recording.unit, dropped=recording.dropped).noting(
        *recording.notes, f"every {round(step)}th sample taken, without an anti-alias filter"
    )
