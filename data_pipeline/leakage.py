"""What two parts of a split must not share: subjects, recordings, stretches of time, signal.

Each check takes the parts of a split and what is known of each window; `splits.check_leakage` chooses among them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.names import Names
from data_pipeline.window_hashes import NO_SIGNAL

CLOSE = 1e-6  # seconds that do not count


@dataclass(frozen=True)
class Times:
    """When windows were recorded: `starts` (n,) float64, seconds from the beginning of their recording, NaN unknown;
    `lengths` (n,) float64 or one number, seconds."""

    starts: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.broadcast_to(np.asarray(self.lengths, float), self.starts.shape))

    @classmethod
    def of_samples(cls, start_samples: np.ndarray, n_times: int, sfreq: float) -> "Times":
        """From the columns of a store; a start of -1 is unknown."""
        starts = np.where(start_samples < 0, np.nan, start_samples / sfreq)
        return cls(starts, np.asarray(n_times / sfreq))

    def ordered(self, rows: np.ndarray, recordings: Names) -> np.ndarray:
        """Rows by recording and time. Raises ValueError when a time is unknown."""
        unknown = rows[np.isnan(self.starts[rows])]
        if len(unknown):
            raise ValueError(f"recording {recordings[unknown[0]]}: the file does not say when its windows were "
                             f"recorded (start_sample): they cannot be divided in time, divide by subject")  # fmt: skip
        return rows[np.lexsort((self.starts[rows], recordings.codes[rows]))]


def check_disjoint(parts: Mapping[str, Sequence], *, what: str = "subject") -> None:
    """Refuse ids that occur in two parts, such as the subjects of a training file and of a test file.

    Raises ValueError naming the ids (the first five) and the two parts.
    """
    names = list(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = sorted(set(parts[first]) & set(parts[second]))
            if both:
                listed = ", ".join(str(b) for b in both[:5]) + (", ..." if len(both) > 5 else "")
                raise ValueError(
                    f"leakage: {what}{'s' * (len(both) > 1)} {listed} in both {first} and {second}: results would be "
                    f"too good; every {what} belongs in one of them"
                )


def check_times(
    parts: Mapping[str, np.ndarray], recordings: Names | np.ndarray, times: Times, *, gap: float = 1.0
) -> None:
    """Refuse windows of one recording that overlap, or lie closer than `gap` window lengths, across parts.

    With `gap` 0 parts may touch, as published divisions by minutes do, but only where one contiguous stretch ends and
    the next begins: a recording whose windows were dealt out singly is refused in any case. Raises ValueError naming
    the recording and the places, and saying why.
    """
    recordings = Names.of(recordings)
    part_of = np.full(len(recordings), -1)
    for number, rows in enumerate(parts.values()):
        part_of[rows] = number
    shared = _in_several_parts(recordings, parts)
    rows = times.ordered(np.flatnonzero((part_of >= 0) & shared[recordings.codes]), recordings)
    if len(rows) < 2:
        return
    same = np.diff(recordings.codes[rows].astype(np.int64)) == 0
    crossing = same & (np.diff(part_of[rows]) != 0)
    distance = np.diff(times.starts[rows]) - times.lengths[rows[:-1]]
    near = crossing & (distance < np.maximum(gap * times.lengths[rows[:-1]] - CLOSE, CLOSE))
    names = list(parts)
    for code in np.unique(recordings.codes[rows[:-1][near]]).tolist():
        own = recordings.codes[rows[:-1]] == code
        at = np.flatnonzero(own & near)
        dealt = int((own & near).sum()) > len(np.unique(part_of[rows[recordings.codes[rows] == code]])) - 1
        overlaps = distance[at] < -CLOSE
        if not (dealt or overlaps.any() or gap > 0):
            continue
        i = int(at[np.argmin(distance[at])])
        first, second = rows[i], rows[i + 1]
        near_what = f"{int(overlaps.sum())} windows overlap" if overlaps.any() else f"{len(at)} windows touch"
        raise ValueError(
            f"leakage: in recording {recordings[first]} {near_what} their neighbour across parts (the window at "
            f"{times.starts[first]:g} s is in {names[part_of[first]]}, the one at {times.starts[second]:g} s in "
            f"{names[part_of[second]]}): neighbours share signal and label, so that a model recognises the moment "
            f"instead of the state and scores far too well; divide by subject, or in contiguous stretches with a gap "
            f'between them (unit "time")'
        )


def check_content(
    parts: Mapping[str, np.ndarray],
    hashes: np.ndarray,
    subjects: Names | np.ndarray,
    recordings: Names | np.ndarray,
) -> None:
    """Refuse windows with the same signal in two parts, whatever they are called.

    `hashes` (n,) uint64 of `window_hashes.hash_windows`. Raises ValueError naming subjects and recordings, and saying
    whether a whole recording occurs twice.
    """
    subjects, recordings = Names.of(subjects), Names.of(recordings)
    for (first, a), (second, b) in itertools.combinations(parts.items(), 2):
        common = np.intersect1d(hashes[a], hashes[b])
        common = common[common != NO_SIGNAL]
        if not len(common):
            continue
        row_b = int(b[np.isin(hashes[b], common)][0])
        row_a = int(a[hashes[a] == hashes[row_b]][0])
        own = b[recordings.codes[b] == recordings.codes[row_b]]
        equal = int(np.isin(hashes[own], common).sum())
        extent = "all" if equal == len(own) else f"{equal} of the"
        raise ValueError(
            f"leakage: recording {recordings[row_a]} of subject {subjects[row_a]} in {first} holds the same signal as "
            f"recording {recordings[row_b]} of subject {subjects[row_b]} in {second} ({extent} {len(own)} windows of "
            f"it; {len(common):,} windows in all are in both parts): drop one copy, for example with `python -m "
            f"data_pipeline.audit FILE... --repair FOLDER`"
        )


def _in_several_parts(recordings: Names, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(K,) bool: whether a recording has windows in more than one part."""
    met = np.zeros((len(parts), len(recordings.table)), dtype=bool)
    for number, rows in enumerate(parts.values()):
        met[number, recordings.codes[rows]] = True
    return met.sum(axis=0) > 1


def shown(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(str(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
