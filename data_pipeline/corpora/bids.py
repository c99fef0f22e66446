"""Any BIDS-EEG data set: `python -m data_pipeline.prepare bids --raw DIR --out DIR --label-column group`."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.corpora.base import (
    Catalogue,
    Corpus,
    Division,
    Piece,
    Source,
    divide_subjects,
    files_below,
    unknown_layout,
)
from data_pipeline.corpora.bids_files import (
    SUFFIXES,
    electrode_table,
    parse_name,
    participants,
    sidecar,
    why_not_raw_eeg,
)
from data_pipeline.corpora.tables import MISSING, number, read_rows
from data_pipeline.montages import normalize_name
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.readers import read_recording
from data_pipeline.recording import Annotation, Recording
from data_pipeline.signal_options import SignalOptions, described_classes
from data_pipeline.windows import Segment, annotation_segments

_CHANNELS, _EVENTS, _ELECTRODES = "channels.tsv", "events.tsv", "electrodes.tsv"
_COORDINATES, _SETTINGS = "coordsystem.json", "eeg.json"
_SIDECARS = (_CHANNELS, _EVENTS, _ELECTRODES, _COORDINATES, _SETTINGS)
_MOST_CLASSES = 50


@dataclass(frozen=True, kw_only=True)
class Bids(SignalOptions, Corpus):  # pyright: ignore[reportIncompatibleVariableOverride]  (windows are options)
    """A data set in BIDS-EEG form; labels, band and windows as asked for."""

    name: ClassVar[str] = "bids"
    title: ClassVar[str] = "a BIDS-EEG data set"
    source: ClassVar[str] = "for example https://openneuro.org/search/modality/eeg"
    licence: ClassVar[str] = "see its dataset_description.json"
    citation: ClassVar[str] = "see its README; the format: Pernet et al., EEG-BIDS, Sci. Data 6:103, 2019"
    layout: ClassVar[str] = "sub-<label>/[ses-<label>/]eeg/*_eeg.{edf,bdf,vhdr,set,fif} with sidecars"
    split_options: ClassVar[frozenset[str]] = frozenset({"seed", "validation", "test"})

    task: tuple[str, ...] = ()
    """only recordings of these tasks (default: all)"""
    label_column: str = ""
    """label by subject: this column of participants.tsv"""
    label_entity: Literal["", "task", "ses", "run", "acq"] = ""
    """label by recording: this part of the file names"""
    events: tuple[str, ...] = ()
    """label by stretch: rows of events.tsv, DESCRIPTION or DESCRIPTION=CLASS"""
    event_column: str = "trial_type"
    """column of events.tsv that holds the descriptions"""
    classes: tuple[str, ...] = ()
    """order of the classes (default: sorted)"""
    seed: int = 0
    """of the draw of validation and test subjects"""
    validation: float = 0.2
    """part of the subjects that validates, when there are labels"""
    test: float = 0.2
    """part of the subjects that tests, when there are labels"""

    def __post_init__(self) -> None:
        asked = [name for name in ("label_column", "label_entity", "events") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"labels come from one place, found {', '.join(asked)}")
        self.check_signal_options()

    def completed(self, root: Path) -> "Bids":
        """With the classes that occur, where their order is not given."""
        found = self._found_classes(root)
        if found is None:
            return self
        absent = sorted(set(found) - set(self.classes)) if self.classes else []
        if absent:
            raise ValueError(f"--classes does not list {', '.join(absent)}")
        if len(found) > _MOST_CLASSES:
            raise ValueError(f"{self.label_column or self.label_entity} has {len(found)} values: these are no classes")
        return dataclasses.replace(self, classes=self.classes or tuple(found))

    def find(self, root: Path) -> Catalogue:
        """Raw recordings, with the sidecars that apply to them."""
        by_subject = participants(root, self.label_column) if self.label_column else {}
        sources, left_out, mains = [], {}, set()
        for name, path in files_below(root, *SUFFIXES):
            reason = why_not_raw_eeg(name) or self._why_not_asked(path, by_subject)
            if reason:
                left_out[name] = reason
                continue
            entities = _entities(path)
            found = [side for suffix in _SIDECARS if (side := sidecar(root, path, suffix))]
            mains |= _mains(found)
            label = self._label(entities, by_subject)
            others = [f"{k}-{v}" for k, v in entities.items() if k != "sub"]
            subject = f"sub-{entities['sub']}"
            sources.append(Source(path, name, subject, " ".join(others), label=label, companions=tuple(found)))
        if not sources:
            raise unknown_layout(self, root, left_out)
        wrong = sorted(mains - {float(self.notch)} if self.notch != "none" else set())
        warnings = [f"the sidecars state mains of {hertz:g} Hz, the notch is at {self.notch} Hz" for hertz in wrong]
        return Catalogue(sources, left_out, warnings)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording, or the stretches of the asked events."""
        recording = read_recording(source.path)
        sides = {suffix: _of(source, suffix) for suffix in _SIDECARS}
        if sides[_CHANNELS]:
            recording = _with_channels(recording, sides[_CHANNELS])
        if sides[_ELECTRODES]:
            recording = _with_positions(recording, sides[_ELECTRODES], sides[_COORDINATES])
        if not self.events:
            yield Piece(recording, label=source.label)
            return
        if sides[_EVENTS]:
            recording = _with_events(recording, sides[_EVENTS], self.event_column)
        recording = _on_samples(recording, self.sfreq)
        segments, ignored = annotation_segments(
            recording, described_classes(self.events), event_seconds=self.event_seconds or self.window
        )
        if not segments:
            raise ValueError(f"none of its {ignored} events is one of {', '.join(described_classes(self.events))}")
        numbered = [Segment(s.start, s.stop, self.classes.index(str(s.label))) for s in segments]
        yield Piece(recording.noting(f"{len(segments)} events label, {ignored} others do not"), segments=numbered)

    def split(self, catalogue: Catalogue) -> Division:
        """By subject when there are labels, otherwise everything is for training."""
        if not self._labelled():
            return super().split(catalogue)
        rule = f"{self.validation:.0%} of the subjects validate, {self.test:.0%} test"
        parts, rule = divide_subjects(
            catalogue.sources, validation=self.validation, test=self.test, seed=self.seed, rule=rule
        )
        return Division(parts, rule=rule)

    def class_names(self) -> tuple[str, ...] | None:
        """The classes in their order, None without labels."""
        return self.classes if self._labelled() else None

    def common_chain(self) -> PreprocessConfig:
        """Band, rate, montage and unit as asked for."""
        return self.chain_config()

    def _labelled(self) -> bool:
        return bool(self.label_column or self.label_entity or self.events)

    def _found_classes(self, root: Path) -> list[str] | None:
        """The classes that occur, numbers in numerical order before words; None without labels."""
        if self.events:
            found = set(described_classes(self.events).values())
        elif self.label_column:
            found = set(participants(root, self.label_column).values())
        elif self.label_entity:
            raw = [path for name, path in files_below(root, *SUFFIXES) if not why_not_raw_eeg(name)]
            found = {_entities(path).get(self.label_entity, "") for path in raw} - {""}
        else:
            return None
        return sorted(found, key=lambda name: (number(name) is None, number(name) or 0.0, name))

    def _why_not_asked(self, path: Path, by_subject: dict[str, str]) -> str:
        entities = _entities(path)
        if self.task and entities.get("task") not in self.task:
            return f"task {entities.get('task', 'not named')}, not one of --task"
        if self.label_column and f"sub-{entities['sub']}" not in by_subject:
            return f"participants.tsv gives no {self.label_column} of sub-{entities['sub']}"
        if self.label_entity and self.label_entity not in entities:
            return f"its name has no {self.label_entity}-"
        return ""

    def _label(self, entities: dict[str, str], by_subject: dict[str, str]) -> int | None:
        if self.label_column:
            return self.classes.index(by_subject[f"sub-{entities['sub']}"])
        return self.classes.index(entities[self.label_entity]) if self.label_entity else None


def _entities(path: Path) -> dict[str, str]:
    found = parse_name(path.stem)
    return dict(found.entities) if found else {}


def _of(source: Source, suffix: str) -> Path | None:
    return next((path for path in source.companions if path.name.endswith(suffix)), None)


def _mains(sidecars: list[Path]) -> set[float]:
    """The mains frequency that eeg.json states, if it can be one."""
    for path in sidecars:
        if path.name.endswith(_SETTINGS):
            try:
                stated = json.loads(path.read_text(encoding="utf-8-sig")).get("PowerLineFrequency")
            except (ValueError, AttributeError):
                return set()
            return {float(stated)} if isinstance(stated, int | float) and stated > 0 else set()
    return set()


def _with_channels(recording: Recording, path: Path) -> Recording:
    """Channels that channels.tsv calls anything but EEG are dropped; bad ones stay, and are noted."""
    rows = {row.get("name", ""): row for row in read_rows(path)}
    by_name = {normalize_name(name): row for name, row in rows.items()}
    of = {label: rows.get(label) or by_name.get(normalize_name(label)) for label in recording.ch_names}
    kinds = {label: (row or {}).get("type", "").upper() for label, row in of.items()}
    dropped = {
        label: f"not EEG ({kind} in channels.tsv)"
        for label, kind in kinds.items()
        if kind.lower() not in MISSING and kind != "EEG"
    }
    kept = [i for i, label in enumerate(recording.ch_names) if label not in dropped]
    if not kept:
        raise ValueError("channels.tsv calls none of its channels EEG")
    unknown = [label for label in recording.ch_names if of[label] is None]
    states = {label: (row or {}).get("status", "").lower() for label, row in of.items() if label not in dropped}
    bad = [label for label, status in states.items() if status == "bad"]
    notes = [f"channels.tsv does not list {len(unknown)} channels of the file: {', '.join(unknown)}"] if unknown else []
    notes += [f"bad in channels.tsv, and kept: {', '.join(bad)}"] if bad else []
    return recording.pick(kept, dropped=dropped).noting(*notes)


def _with_positions(recording: Recording, electrodes: Path, coordsystem: Path | None) -> Recording:
    """Positions of the file's own electrodes; they count where a name has no standard position."""
    positions = electrode_table(electrodes, coordsystem)
    if not positions.of:
        return recording.noting(positions.note)
    own = np.full((len(recording.ch_names), 3), np.nan) if recording.positions is None else recording.positions
    xyz = np.stack([positions.of.get(label, row) for label, row in zip(recording.ch_names, own, strict=True)])
    return dataclasses.replace(recording, positions=xyz).noting(positions.note)


def _with_events(recording: Recording, path: Path, column: str) -> Recording:
    """Rows of events.tsv instead of the file's own annotations. Raises ValueError when the column lacks."""
    rows = read_rows(path)
    if rows and not {"onset", column} <= set(rows[0]):
        raise ValueError(f"{path.name} has no column {column} (--event-column): {', '.join(rows[0])}")
    timed = [(number(row["onset"]), number(row.get("duration", "")) or 0.0, row[column]) for row in rows]
    annotations = tuple(Annotation(onset, duration, text) for onset, duration, text in timed if onset is not None)
    return dataclasses.replace(recording, annotations=annotations)


def _on_samples(recording: Recording, sfreq: float) -> Recording:
    """Events without a duration moved to the nearest sample, so that a window of exactly their stretch fits."""
    moved = tuple(
        event if event.duration else dataclasses.replace(event, onset=round(event.onset * sfreq) / sfreq)
        for event in recording.annotations
    )
    return dataclasses.replace(recording, annotations=moved)
