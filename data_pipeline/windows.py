"""Recording -> windows: which stretches carry which label, where windows lie, and which of them are unusable.

A window belongs to exactly one stretch and lies wholly inside it; the tail that does not fill a window is dropped.
Labels come from a table (`read_label_table`) or from annotations of the recording (`annotation_segments`).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.preprocess import FLAT_UV
from data_pipeline.recording import Recording

_TABLE_FIELDS = ("file", "start", "stop", "subject", "session")


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording: start and stop in seconds (stop None = to the end) and its label.

    label: a class name as text, a class number, a tuple of regression targets, or None.
    """

    start: float = 0.0
    stop: float | None = None
    label: str | int | tuple[float, ...] | None = None


@dataclass(frozen=True)
class LabelTable:
    """Rows of a label file by file name.

    segments: file (as written in the table) -> its stretches. subjects: file -> subject, where the table has one.
    class_names: sorted names when the labels are classes, None when they are regression targets.
    """

    path: Path
    segments: Mapping[str, tuple[Segment, ...]]
    subjects: Mapping[str, str]
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Windows:
    """Windows of one recording: signal (n,C,T) float32 microvolts, start_samples (n,) int64 at the recording's rate,
    labels (a list of n segment labels), rejected (reason -> count).
    """

    signal: np.ndarray
    start_samples: np.ndarray
    labels: list
    rejected: dict[str, int]


def cut_windows(
    recording: Recording,
    *,
    n_times: int,
    stride: int,
    segments: Sequence[Segment] = (Segment(),),
    keep_flat: bool = False,
) -> Windows:
    """Cut every segment into windows of `n_times` samples, `stride` samples apart, from the segment's start.

    A window is rejected, and counted, when it touches a gap ("not finite") or all its channels are flat ("flat",
    unless `keep_flat`: the published corpora hold such windows).
    Raises ValueError for a segment that cannot lie in the recording.
    """
    if n_times < 1 or stride < 1:
        raise ValueError(f"window and stride must be at least one sample, found {n_times} and {stride}")
    gap = np.zeros(recording.n_times, dtype=bool)
    for start, stop in recording.gaps:
        gap[int(np.floor(start * recording.sfreq)) : int(np.ceil(stop * recording.sfreq))] = True
    kept, starts, labels, rejected = [], [], [], {}
    for segment in segments:
        for start in _window_starts(segment, recording, n_times, stride):
            window = recording.signal_uv[:, start : start + n_times]
            reason = _unusable(window, gap[start : start + n_times], keep_flat=keep_flat)
            if reason:
                rejected[reason] = rejected.get(reason, 0) + 1
                continue
            kept.append(window.astype(np.float32))
            starts.append(start)
            labels.append(segment.label)
    signal = np.stack(kept) if kept else np.empty((0, len(recording.ch_names), n_times), np.float32)
    return Windows(signal, np.array(starts, dtype=np.int64), labels, rejected)


def _window_starts(segment: Segment, recording: Recording, n_times: int, stride: int) -> range:
    stop = recording.duration if segment.stop is None else segment.stop
    if not 0 <= segment.start < stop:
        raise ValueError(f"a segment from {segment.start:g} s to {stop:g} s is empty or begins before the recording")
    if stop > recording.duration + 1.0:  # ends of hand-written labels are rounded to a second
        raise ValueError(f"a segment ends at {stop:g} s, the recording at {recording.duration:g} s")
    first = int(np.ceil(segment.start * recording.sfreq - 1e-6))
    last = min(int(np.floor(stop * recording.sfreq + 1e-6)), recording.n_times)
    return range(first, last - n_times + 1, stride)


def _unusable(window: np.ndarray, gap: np.ndarray, *, keep_flat: bool) -> str:
    if gap.any() or not np.isfinite(window).all():
        return "not finite"
    return "flat" if not keep_flat and (window.std(axis=1) < FLAT_UV).all() else ""


def annotation_segments(
    recording: Recording, classes: Mapping[str, str], *, event_seconds: float
) -> tuple[tuple[Segment, ...], int]:
    """Segments for the annotations named in `classes` (description -> class name).

    An annotation without a duration (an event) covers `event_seconds` from its onset. Stretches that leave the
    recording are cut to it. Returns the segments and the number of annotations that were not asked for.
    """
    segments, ignored = [], 0
    for annotation in recording.annotations:
        if annotation.description not in classes:
            ignored += 1
            continue
        start = max(annotation.onset, 0.0)
        stop = min(annotation.onset + (annotation.duration or event_seconds), recording.duration)
        if start < stop:
            segments.append(Segment(start, stop, classes[annotation.description]))
    return tuple(segments), ignored


def read_label_table(path: str | Path, *, task: str = "auto") -> LabelTable:
    """Read a CSV with the columns file, label and optionally start, stop (seconds; empty = whole file), subject.

    Every other numeric column is a label column too: several of them are regression targets, one is a class number
    when it holds integers. task "classification" or "regression" overrides that choice for a single column.
    Raises ValueError naming the line when the table is missing, empty or malformed.
    """
    path = Path(path)
    rows, columns = _table_rows(path)
    regression = _is_regression(path, rows, columns, task)
    segments: dict[str, list[Segment]] = {}
    subjects: dict[str, str] = {}
    for line, row in rows:
        name, subject = row["file"], row.get("subject", "")
        segments.setdefault(name, []).append(_row_segment(path, line, row, columns, regression=regression))
        if subject and subjects.setdefault(name, subject) != subject:
            raise ValueError(f"{path}, line {line}: file {name!r} belongs to {subjects[name]!r} in an earlier line")
    names = {segment.label for listed in segments.values() for segment in listed}
    return LabelTable(
        path=path,
        segments={name: tuple(listed) for name, listed in segments.items()},
        subjects=subjects,
        class_names=None if regression else tuple(sorted((str(n) for n in names), key=_class_order)),
    )


def _table_rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    if not path.is_file():
        raise ValueError(f"label file {path} does not exist")
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            header = [(name or "").strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [
                (reader.line_num, {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)})
                for row in reader
            ]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: cannot be read as a table ({error})") from error
    columns = [name for name in header if name and name not in _TABLE_FIELDS]
    if "file" not in header or not columns:
        raise ValueError(f"{path} needs the columns file and label (optional: start, stop, subject), found {header}")
    if not rows:
        raise ValueError(f"{path} has a header and no rows")
    return rows, columns


def _is_regression(path: Path, rows: list[tuple[int, dict[str, str]]], columns: list[str], task: str) -> bool:
    if task not in ("auto", "classification", "regression"):
        raise ValueError(f"task must be auto, classification or regression, found {task!r}")
    if len(columns) > 1 and task == "classification":
        raise ValueError(f"{path} has {len(columns)} label columns ({', '.join(columns)}): classes need exactly one")
    values = [row.get(column, "") for _, row in rows for column in columns]
    numeric = all(_is_number(value) for value in values)
    if len(columns) > 1 or task == "regression":
        return True
    return task == "auto" and numeric and any(float(value) != round(float(value)) for value in values)


def _row_segment(path: Path, line: int, row: dict[str, str], columns: list[str], *, regression: bool) -> Segment:
    def seconds(key: str, default: float | None) -> float | None:
        text = row.get(key, "")
        if text and not _is_number(text):
            raise ValueError(f"{path}, line {line}: {key} is {text!r}, expected seconds or nothing")
        return float(text) if text else default

    labels = [row.get(column, "") for column in columns]
    empty = [column for column, label in zip(columns, labels, strict=True) if not label]
    if empty or not row["file"]:
        raise ValueError(f"{path}, line {line}: {', '.join(empty) or 'file'} is empty")
    bad = [label for label in labels if regression and not _is_number(label)]
    if bad:
        raise ValueError(f"{path}, line {line}: regression targets must be numbers, found {bad[0]!r}")
    label = tuple(float(text) for text in labels) if regression else labels[0]
    start, stop = seconds("start", 0.0), seconds("stop", None)
    if start is None or start < 0 or (stop is not None and stop <= start):
        raise ValueError(
            f"{path}, line {line}: start {row.get('start')!r} and stop {row.get('stop')!r} enclose nothing"
        )
    return Segment(start, stop, label)


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers in numerical order before words in alphabetical order."""
    return (0, float(name), "") if _is_number(name) else (1, 0.0, name)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
