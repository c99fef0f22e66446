"""Recordings kept as text: plain CSV/TSV, ARFF-like CSV, OpenBCI GUI logs, Mind Monitor (Muse) exports.

MNE has no reader for these. What text files do not say is assumed out loud: the unit (microvolts unless the header
names one) and, for the headset whose export carries no time, the rate.
"""

import csv
import datetime as dt
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.montages import is_electrode, normalize_name
from data_pipeline.recording import Annotation, Recording

_EMOTIV = ("AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4")
_EMOTIV_SFREQ = 128.0
_TIME_COLUMN = re.compile(
    r"^(time ?stamps?|time|t|seconds|sec|s)[ _]*[\[(]?(s|sec|seconds|ms|us)?[\])]?$", re.IGNORECASE
)
_LABEL_COLUMN = re.compile(
    r"^(class|label|labels|event|events|marker|markers|target|eyedetection|stage)$", re.IGNORECASE
)
_UNIT_IN_NAME = re.compile(r"^(.*?)\s*[\[(]\s*([nuµμm]?V)\s*[\])]$")
_UNIT_FACTORS = {"V": 1e6, "mV": 1e3, "uV": 1.0, "nV": 1e-3}
_MIN_SFREQ = 20.0  # below, nothing of the EEG bands is left and the file is a table of features or a log


@dataclass(frozen=True)
class _Table:
    """A parsed header and where its rows start: columns, delimiter, index of the first data line, header comments."""

    columns: list[str]
    delimiter: str
    first_row: int
    comments: list[str]


def describe_text(path: Path) -> str:
    """'' when the file looks like a table of EEG samples, else why it does not, in one clause."""
    try:
        table = _sniff(path)
    except ValueError as error:
        return str(error)
    channels = _channel_columns(table)
    return "" if channels else "a text file without columns of EEG channels"


def read_text(path: Path, *, sfreq: float | None = None) -> Recording:
    """A table of samples with a header of channel names; `sfreq` (hertz) overrides what its time column says.

    Raises ValueError, one sentence, when there are no channel columns, no rate, or no numbers.
    """
    table = _sniff(path)
    channels = _channel_columns(table)
    if not channels:
        raise ValueError("a text file without columns of EEG channels")
    cells = _rows(path, table)
    if len(cells) < 2:
        raise ValueError(f"the table holds {len(cells)} rows of samples")
    muse = any(column.startswith("RAW_") for column in table.columns)
    if muse:  # rows that only carry an event (blink, marker) have no samples
        cells = [row for row in cells if row[channels[0]] != ""]
    signal = np.array([[_number(row[c]) for row in cells] for c in channels], dtype=np.float64)
    if not np.isfinite(signal).any():
        raise ValueError("the channel columns hold no numbers")
    names, factors, unit = _names_and_units([table.columns[c] for c in channels])
    rate, notes = (sfreq, (f"rate of {sfreq:g} Hz as given",)) if sfreq else _rate(table, cells, names)
    if rate < _MIN_SFREQ:
        raise ValueError(
            f"its rows come at {rate:.3g} Hz: a log of features or settings, not EEG samples; give --text-sfreq if the "
            "times are wrong"
        )
    return Recording(
        signal_uv=signal * np.array(factors)[:, None],
        sfreq=rate,
        ch_names=tuple(names),
        annotations=_label_runs(table, cells, rate),
        unit=unit,
        notes=(*notes, *_name_notes([table.columns[c] for c in channels], names)),
    )


def _sniff(path: Path) -> _Table:
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if b"\x00" in head:
        raise ValueError("a binary file with the suffix of a text file")
    lines = head.decode("utf-8", errors="replace").lstrip("\ufeff").splitlines()
    comments = [line for line in lines if line.startswith("%")]
    if any(line.strip().lower().startswith("@data") for line in lines):
        first = next(i for i, line in enumerate(lines) if line.strip().lower().startswith("@data")) + 1
        found = [re.match(r"@attribute\s+['\"]?([^'\"\s]+)", line.strip(), re.IGNORECASE) for line in lines[:first]]
        return _Table([m[1] for m in found if m], ",", first, comments)
    first = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in "%#"), None)
    if first is None or first + 1 >= len(lines):
        raise ValueError("a text file without a table of samples")
    delimiter = max(",;\t", key=lines[first].count)
    if lines[first].count(delimiter) == 0:
        delimiter = " " if len(lines[first].split()) > 1 else ","
    columns = _split(lines[first], delimiter)
    if all(_is_number(column) for column in columns):
        raise ValueError("a table of numbers without a header of channel names")
    return _Table([column.strip().strip("'\"") for column in columns], delimiter, first + 1, comments)


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"a damaged table: {error}") from error


def _channel_columns(table: _Table) -> list[int]:
    """Channel columns: Muse RAW_*, OpenBCI EXG Channel *, else all but time and label if one is a known electrode."""
    columns = table.columns
    raw = [i for i, name in enumerate(columns) if re.fullmatch(r"RAW_(TP9|AF7|AF8|TP10)", name)]
    exg = [i for i, name in enumerate(columns) if re.match(r"EXG Channel \d+$", name)]
    if raw or exg:
        return raw or exg
    rest = [i for i, n in enumerate(columns) if n and not _TIME_COLUMN.match(n) and not _LABEL_COLUMN.match(n)]
    known = [i for i in rest if is_electrode(normalize_name(_UNIT_IN_NAME.sub(r"\1", columns[i])))]
    return rest if known else []


def _rows(path: Path, table: _Table) -> list[list[str]]:
    text = path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    lines = text.splitlines()[table.first_row :]
    rows = [_split(line, table.delimiter) for line in lines if line.strip() and not line.startswith("%")]
    width = len(table.columns)
    if rows and len(rows[-1]) < width:  # a log that was cut while writing ends in half a line
        rows.pop()
    return [[cell.strip() for cell in row] + [""] * (width - len(row)) for row in rows]


def _names_and_units(columns: list[str]) -> tuple[list[str], list[float], str]:
    """Channel names, factors to microvolts, and the unit as text."""
    names: list[str] = []
    factors: list[float] = []
    units: list[str] = []
    for column in columns:
        match = _UNIT_IN_NAME.match(column)
        unit = match[2].replace("\u00b5", "u").replace("\u03bc", "u") if match else ""
        names.append((match[1] if match else column).removeprefix("RAW_"))
        factors.append(_UNIT_FACTORS[unit] if unit else 1.0)
        units.append(unit)
    if len(names) == len(_EMOTIV) and sum(a != b for a, b in zip(names, _EMOTIV, strict=True)) == 1:
        names = list(_EMOTIV)  # the public eye-state file misspells P7 as P
    stated = sorted({unit for unit in units if unit})
    return names, factors, f"{', '.join(stated)} (header)" if stated else "uV (assumed, the file does not say)"


def _name_notes(columns: list[str], names: list[str]) -> list[str]:
    pairs = [(_UNIT_IN_NAME.sub(r"\1", c).removeprefix("RAW_"), n) for c, n in zip(columns, names, strict=True)]
    return [
        f"column {old!r} read as {new}: the header is that of a 14-channel Emotiv headset"
        for old, new in pairs
        if old != new
    ]


def _rate(table: _Table, cells: list[list[str]], names: list[str]) -> tuple[float, tuple[str, ...]]:
    declared = [re.search(r"Sample Rate\s*=\s*([\d.]+)", line) for line in table.comments]
    for match in declared:
        if match and _is_number(match[1]):
            return float(match[1]), ()
    for i, column in enumerate(table.columns):
        if _TIME_COLUMN.match(column):
            return _rate_from_times(column, [row[i] for row in cells])
    if tuple(names) == _EMOTIV:
        return _EMOTIV_SFREQ, (f"rate of {_EMOTIV_SFREQ:g} Hz assumed: an Emotiv header without a time column",)
    raise ValueError("the table has no time column and states no sampling rate: give it with --text-sfreq")


def _rate_from_times(column: str, texts: list[str]) -> tuple[float, tuple[str, ...]]:
    """Hertz from the first and last time; 256.3 and the like are rounded to the nearest whole number within 1 %."""
    times = np.array([_seconds(text) for text in texts])
    times = times[np.isfinite(times)]
    if len(times) < 2 or times[-1] <= times[0]:
        raise ValueError(f"the time column {column!r} does not increase: give the rate with --text-sfreq")
    step = (times[-1] - times[0]) / (len(times) - 1)
    if re.search(r"\b(ms|us)\b", column.lower().replace("_", " ")):
        step *= 1e-3 if "ms" in column.lower() else 1e-6
    elif times[0] > 1e11:  # seconds since 1970 are about 1.5e9: this is a clock in milliseconds
        step *= 1e-3
    rate = 1.0 / step
    nearest = float(round(rate))
    if nearest > 0 and abs(rate - nearest) < 0.01 * nearest:
        rate = nearest
    jitter = np.max(np.abs(np.diff(times))) / np.median(np.diff(times)) if np.median(np.diff(times)) > 0 else 1.0
    uneven = (f"time steps are uneven (the longest is {jitter:.1f} times the median): taken as even",)
    return rate, (f"rate of {rate:g} Hz from column {column!r}", *(uneven if jitter > 1.5 else ()))


def _label_runs(table: _Table, cells: list[list[str]], rate: float) -> tuple[Annotation, ...]:
    """A label column becomes annotations `column=value`, one for each run of equal values."""
    for i, column in enumerate(table.columns):
        if not _LABEL_COLUMN.match(column):
            continue
        values = np.array([row[i] for row in cells])
        edges = np.flatnonzero(values[1:] != values[:-1]) + 1
        starts, stops = np.r_[0, edges], np.r_[edges, len(values)]
        return tuple(
            Annotation(a / rate, (b - a) / rate, f"{column}={values[a]}")
            for a, b in zip(starts, stops, strict=True)
            if values[a]
        )
    return ()


def _seconds(text: str) -> float:
    if _is_number(text):
        return float(text)
    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return np.nan


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _is_number(text: str) -> bool:
    return np.isfinite(_number(text))
