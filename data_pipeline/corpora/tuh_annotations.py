"""Annotation files of the TUH corpora: csv (version 2), tse and lbl (version 1), each also with `_bi` or `_agg`."""

import ast
import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TERM = "TERM"  # the channel of events that belong to the whole montage
_PAIR_LINE = re.compile(r"montage\s*=\s*(\d+)\s*,\s*([^:]+):")
_SYMBOLS_LINE = re.compile(r"symbols\[(\d+)\]\s*=\s*(\{.*\})")
_LABEL_LINE = re.compile(r"label\s*=\s*\{(.*)\}")


@dataclass(frozen=True)
class Event:
    """A labelled stretch in seconds from the start of the file; channel is an upper-case pair, or `TERM`."""

    start: float
    stop: float
    label: str
    channel: str = TERM


def annotation_file(recording: Path, suffixes: Sequence[str]) -> Path | None:
    """The first of `<stem><suffix>` that lies beside a recording, None without any."""
    return next((p for s in suffixes if (p := recording.with_suffix(s)).is_file()), None)


def read_annotations(path: Path) -> list[Event]:
    """The events of a file in its order; those that end before they start, or before 0, are dropped.

    Raises ValueError naming the file and line that cannot be read.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    kind = path.suffix.lower().removesuffix("_bi").removesuffix("_agg")
    reader: Callable[[str, list[str]], list[Event]] = {".csv": _csv, ".tse": _tse, ".lbl": _lbl}[kind]
    return [event for event in reader(path.name, lines) if event.stop > max(event.start, 0.0)]


def samples(event: Event, sfreq: float, n_times: int) -> slice:
    """The samples an event covers: round(seconds x rate), clipped to the recording."""
    start, stop = (int(np.clip(np.round(seconds * sfreq), 0, n_times)) for seconds in (event.start, event.stop))
    return slice(start, stop)


def covered(mask: np.ndarray, starts: np.ndarray, n_times: int) -> np.ndarray:
    """True samples of (..., n) in each window of `n_times` samples from `starts` (w,): (..., w) int32."""
    sums = mask.cumsum(axis=-1, dtype=np.int32)
    total = np.concatenate([np.zeros((*mask.shape[:-1], 1), np.int32), sums], axis=-1)
    return total[..., starts + n_times] - total[..., starts]


def _csv(name: str, lines: list[str]) -> list[Event]:
    content = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    if not content:
        return []
    rows = [_cells(name, line, text) for line, text in content]  # one by one: a quote must not swallow the next lines
    header = [column.strip().lower() for column in rows[0]]
    needed = ("channel", "start_time", "stop_time", "label")
    if not set(needed) <= set(header):
        raise ValueError(f"{name}, line {content[0][0]}: expected the columns {', '.join(needed)}, found {rows[0]}")
    places = [header.index(column) for column in needed]
    events = []
    for (line, _), row in zip(content[1:], rows[1:], strict=True):
        if len(row) <= max(places):
            raise ValueError(f"{name}, line {line}: {len(row)} columns, expected {len(header)}")
        channel, start, stop, label = (row[place].strip() for place in places)
        events.append(_event(name, line, start, stop, label, channel.upper()))
    return events


def _cells(name: str, line: int, text: str) -> list[str]:
    try:
        return next(csv.reader([text], skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {line}: cannot be read as cells with commas between ({error})") from error


def _tse(name: str, lines: list[str]) -> list[Event]:
    events = []
    for line, text in enumerate(lines, 1):
        words = text.split("#")[0].split()
        if not words or words[0] == "version":
            continue
        if len(words) < 3:
            raise ValueError(f"{name}, line {line}: expected `start stop label probability`, found {text!r}")
        events.append(_event(name, line, words[0], words[1], words[2], TERM))
    return events


def _lbl(name: str, lines: list[str]) -> list[Event]:
    """label = {level, sub-level, start, stop, channel, [p0, p1, ...]}: the label is the most probable symbol."""
    channels: dict[int, str] = {}
    symbols: dict[int, dict[int, str]] = {}
    events = []
    for line, text in enumerate(lines, 1):
        stripped = text.strip()
        try:
            if pair := _PAIR_LINE.match(stripped):
                channels[int(pair[1])] = pair[2].strip().upper()
            elif table := _SYMBOLS_LINE.match(stripped):
                symbols[int(table[1])] = ast.literal_eval(table[2])
            elif found := _LABEL_LINE.match(stripped):
                level, _, start, stop, channel, probabilities = ast.literal_eval(f"({found[1]})")
                label = symbols[level][int(np.argmax(probabilities))]
                events.append(_event(name, line, start, stop, label, channels.get(channel, TERM)))
        except (ValueError, SyntaxError, KeyError, TypeError) as error:
            raise ValueError(f"{name}, line {line}: cannot be read as an event ({stripped[:60]!r})") from error
    return events


def _event(name: str, line: int, start: str | float, stop: str | float, label: str, channel: str) -> Event:
    try:
        times = float(start), float(stop)
    except ValueError:
        raise ValueError(f"{name}, line {line}: start {start!r} and stop {stop!r} must be seconds") from None
    if not np.isfinite(times).all() or not label:
        raise ValueError(f"{name}, line {line}: start {start!r}, stop {stop!r} and label {label!r} mean nothing")
    return Event(*times, label.lower(), channel)
