"""What an EDF or BDF header promises, checked against the bytes that are there (Kemp et al. 1992, 2003).

MNE reads the samples; it does not say when a file was cut, ruined by a text-mode copy, or holds signals of different
rates (it upsamples the slow ones). This module answers those questions before MNE is asked.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

_REPLACEMENT = b"\xef\xbf\xbd"  # U+FFFD in UTF-8: what a text-mode copy puts in place of every byte it cannot decode
_ANNOTATION_LABELS = ("EDF Annotations", "BDF Annotations")


@dataclass(frozen=True)
class EdfHeader:
    """Labels, dimensions and rates (hertz) of the signals without the annotation channels, and the record counts."""

    labels: tuple[str, ...]
    dimensions: tuple[str, ...]
    rates: tuple[float, ...]
    n_records: int
    n_records_declared: int
    record_seconds: float
    is_bdf: bool


def read_edf_header(path: Path) -> EdfHeader:
    """Parse and check the header. Raises ValueError, one sentence, when the file cannot be trusted to hold EEG."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        width = _sample_bytes(head)
        n_signals = _integer(head[252:256], "number of signals")
        block = file.read(256 * n_signals)
        if len(block) < 256 * n_signals:
            raise ValueError(f"truncated: the header of {n_signals} signals ends after {size} bytes")
        labels = [_text(block[i * 16 : (i + 1) * 16]) for i in range(n_signals)]
        dimensions = [_text(block[n_signals * 96 + i * 8 :][:8]) for i in range(n_signals)]
        _refuse_text_copy(file.read(1 << 20), head + block)
        counts = [_integer(block[n_signals * 216 + i * 8 :][:8], "samples per record") for i in range(n_signals)]
        declared = _integer(head[236:244], "number of records", least=-1)
        seconds = _number(head[244:252], "record duration")
        record_bytes = width * sum(counts)
        present = (size - 256 * (n_signals + 1)) // record_bytes if record_bytes else 0
        annotation = [label in _ANNOTATION_LABELS for label in labels]
        if all(annotation):
            raise ValueError("annotations only: the file holds no signal (use it for labels, not as a recording)")
        if present < 1:
            raise ValueError(f"truncated: {size} bytes hold the header and not one whole data record")
        n_records = min(present, declared) if declared > 0 else present
        if head[192:197] in (b"EDF+D", b"BDF+D") and any(annotation):
            start = 256 * (n_signals + 1) + width * sum(counts[: annotation.index(True)])
            length = width * counts[annotation.index(True)]
            _refuse_interruptions(path, start, length, record_bytes, n_records, seconds)
    kept = [i for i, is_annotation in enumerate(annotation) if not is_annotation]
    if seconds <= 0 or any(counts[i] < 1 for i in kept):
        raise ValueError("the header gives a record of zero length: the sampling rate is unknown")
    return EdfHeader(
        labels=tuple(labels[i] for i in kept),
        dimensions=tuple(dimensions[i] for i in kept),
        rates=tuple(counts[i] / seconds for i in kept),
        n_records=n_records,
        n_records_declared=declared,
        record_seconds=seconds,
        is_bdf=width == 3,
    )


def _sample_bytes(head: bytes) -> int:
    if len(head) < 256:
        raise ValueError(f"truncated: {len(head)} bytes are less than the 256 of an EDF header")
    if head[:8] == b"\xffBIOSEMI":
        return 3
    if head[:8].strip() == b"0":
        return 2
    if head.startswith(_REPLACEMENT):
        raise ValueError("ruined by a text-mode copy (UTF-8 replacement characters): get a binary copy of the file")
    raise ValueError("not an EDF or BDF file: it does not start with their version field")


def _refuse_text_copy(data: bytes, header: bytes) -> None:
    if data.count(_REPLACEMENT) > 20 + len(data) / 1000 or _REPLACEMENT in header:
        raise ValueError(
            "ruined by a text-mode copy: its bytes were replaced by UTF-8 replacement characters, the signal is lost; "
            "get a binary copy of the file"
        )


def _refuse_interruptions(path: Path, start: int, length: int, stride: int, n_records: int, seconds: float) -> None:
    """EDF+D: the first annotation of every record is its onset; consecutive records must be `seconds` apart."""
    onsets = []
    with path.open("rb") as file:
        for record in range(n_records):
            file.seek(start + record * stride)
            onsets.append(_number(file.read(length).split(b"\x14", 1)[0], "record onset"))
    gaps = np.flatnonzero(np.abs(np.diff(onsets) - seconds) > 1e-3)
    if len(gaps):
        raise ValueError(
            f"discontinuous (EDF+D) with {len(gaps)} interruptions, the first after "
            f"{onsets[gaps[0]] + seconds - onsets[0]:g} s: split it into continuous files"
        )


def _text(raw: bytes) -> str:
    return raw.decode("latin-1").strip("\x00 ")


def _integer(raw: bytes, what: str, *, least: int = 0) -> int:
    value = _number(raw, what)
    if value < least:
        raise ValueError(f"damaged header: {what} is {_text(raw)!r}")
    return int(value)


def _number(raw: bytes, what: str) -> float:
    try:
        value = float(_text(raw))
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"damaged header: {what} is {_text(raw)!r}, not a number")
    return value
