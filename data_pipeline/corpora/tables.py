"""Text tables that corpora come with: participants, events and channels, and samples kept as text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MISSING = frozenset({"", "n/a", "na", "nan", "none", "null"})


def read_rows(path: Path, *, delimiter: str = "\t") -> list[dict[str, str]]:
    """Rows as column -> text, blanks and quotes around names and cells removed, cells that a row lacks "".

    Tolerates a byte order mark, 8-bit encodings, empty lines and ragged rows.
    Raises ValueError when there is no header.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path.name} is empty: expected a header and rows")
    header, *rows = [[cell.strip().strip('"').strip() for cell in line.split(delimiter)] for line in lines]
    return [dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=False)) for row in rows]


def number(text: str) -> float | None:
    """The number a cell means, also with a decimal comma; None for a cell that holds none."""
    try:
        value = float(text.strip().replace(",", "."))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def read_samples(
    path: Path, columns: Sequence[int], *, delimiter: str, header_lines: int, width: int | None = None
) -> np.ndarray:
    """The columns at these places of a table of numbers below `header_lines` lines: (len(columns), T) float64.

    width: how many columns the first row must have (None: any number), where nothing but their order names them.
    Raises ValueError when a cell is no number, a row is too short, or there are no rows.
    """
    try:
        with path.open(encoding="latin-1") as file:
            head = [next(file, "") for _ in range(header_lines + 1)]
        if not head[-1].strip():
            raise ValueError("no rows below the header")
        found = head[-1].rstrip().count(delimiter) + 1
        if width not in (None, found):
            raise ValueError(f"its first row has {found} columns, {width} were expected")
        # Any byte is a letter of latin-1: a header with a micro sign in an 8-bit encoding is no obstacle.
        values = np.loadtxt(
            path, delimiter=delimiter, skiprows=header_lines, usecols=columns, ndmin=2, encoding="latin-1"
        )
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path.name} is not the table that it should be: {first}") from None
    return np.ascontiguousarray(values.T)
