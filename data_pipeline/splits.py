"""Who is trained on, who is validated on, who is tested: splits, their storage, and what is refused as leakage.

A subject is never divided unless it is asked for, and then by recordings or by time, never by single windows. Ids are
sorted before any draw, so a split depends on the set of subjects, their labels and the seed, not on the order of
files. Strata are the sets of classes a subject has windows of.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.leakage import CLOSE, Times, check_disjoint, check_times, shown
from data_pipeline.names import Names
from data_pipeline.split_lists import PARTS, holds_lists, read_json, read_lists

UNITS = ("subject", "recording", "time", "window")
_ATTEMPTS = 32  # places tried for the windows of a few-shot split


@dataclass(frozen=True)
class Split:
    """Rows of a window store for training, validation and test.

    `train`, `val`, `test` are (n,) int64, sorted; `subjects` gives the sorted subject ids of each part (recording ids
    for the unit "recording"). `unit` is what is never divided: "subject"; "recording" (a subject may be in every part);
    "time" (a recording may, but its windows neither overlap nor touch across parts); "window" (nothing, hence refused).
    `num_windows`: of the store, where rows are what is stored (units "time" and "window").
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    subjects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unit: str = "subject"
    num_windows: int | None = None

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """Name -> rows."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of what `save_split` stores: name it with every result."""
        return _digest(_contents(self))


def split_by_subject(
    subjects: Names | np.ndarray,
    labels: np.ndarray | None = None,
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Divide subjects at random, proportionally within the strata of `labels`.

    `subjects` (n,) str and `labels` (n,) int (other labels: no strata) belong to the windows. A part with a fraction
    above zero gets at least one subject. Raises ValueError when there are too few subjects.
    """
    subjects = Names.of(subjects)
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {fraction}")
    rng = np.random.default_rng(seed)
    everyone = _by_stratum(subjects, labels, rng)
    test, rest = _carve(everyone, _count(len(everyone), test_fraction), rng)
    val, train = _carve(rest, min(_count(len(everyone), val_fraction), len(rest)), rng)
    if not train:
        raise ValueError(
            f"{len(everyone)} subjects cannot be divided into training ({1 - val_fraction - test_fraction:.0%}), "
            f"validation ({val_fraction:.0%}) and test ({test_fraction:.0%}): give more subjects or smaller fractions, "
            f'or divide each recording in time (unit "time")'
        )
    return split_by_lists(subjects, train=train, val=val, test=test)


def subject_folds(
    subjects: Names | np.ndarray, labels: np.ndarray | None, n_folds: int, seed: int = 0, *, val_fraction: float = 0.2
) -> list[Split]:
    """`n_folds` splits; every subject is tested in exactly one, validation is taken from the training subjects.

    The folds depend on `labels` through the strata: to use the folds of a labelled store on another store, save the
    splits and load them there. Raises ValueError when there are fewer subjects than folds.
    """
    subjects = Names.of(subjects)
    rng = np.random.default_rng(seed)
    everyone = _by_stratum(subjects, labels, rng)
    if not 2 <= n_folds <= len(everyone):
        raise ValueError(f"{n_folds} folds of {len(everyone)} subjects: choose between 2 and the number of subjects")
    order = rng.permutation(n_folds)
    folds = []
    for fold in range(n_folds):
        test = [s for i, s in enumerate(everyone) if order[i % n_folds] == fold]
        tested = set(test)
        rest = [s for s in everyone if s not in tested]
        carve = np.random.default_rng((seed, fold))
        val, train = _carve(rest, min(_count(len(rest), val_fraction), len(rest) - 1), carve)
        folds.append(split_by_lists(subjects, train=train, val=val, test=test))
    return folds


def leave_one_subject_out(
    subjects: Names | np.ndarray, labels: np.ndarray | None = None, *, val_fraction: float = 0.2, seed: int = 0
) -> list[Split]:
    """As many splits as subjects, in the order of their sorted ids; each tests one of them (`leave_subject_out`)."""
    subjects = Names.of(subjects)
    return [
        leave_subject_out(subjects, subject, labels, val_fraction=val_fraction, seed=seed)
        for subject in subjects.unique().tolist()
    ]


def leave_subject_out(
    subjects: Names | np.ndarray,
    subject: str,
    labels: np.ndarray | None = None,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """One subject is tested, the others are divided into training and validation, at random within the strata.

    Raises ValueError for a subject without windows, and when fewer than two others are left.
    """
    subjects = Names.of(subjects)
    ids = subjects.unique().tolist()
    if subject not in ids:
        raise ValueError(f"subject {subject!r} has no windows here; there are {shown(ids)}")
    rng = np.random.default_rng((seed, ids.index(subject)))
    rest = [s for s in _by_stratum(subjects, labels, rng) if s != subject]
    val, train = _carve(rest, min(_count(len(rest), val_fraction), len(rest) - 1), rng) if rest else ([], [])
    if not train:
        raise ValueError(f"{subject!r} is the only subject: nobody is left to train on")
    return split_by_lists(subjects, train=train, val=val, test=[subject])


def few_shot(
    subjects: Names | np.ndarray,
    labels: np.ndarray,
    recordings: Names | np.ndarray,
    times: Times,
    *,
    subject: str,
    shots: int,
    others: bool = True,
    gap: float = 1.0,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """`shots` windows of each class of one subject join the training, the rest of that subject is the test.

    The shots of a class follow each other in time (a seeded place); windows closer to one than `gap` window lengths
    belong to no part, since neighbours share signal. The other subjects are divided as by `leave_subject_out`;
    `others` False leaves them out of the training (validation stays). `labels` (n,) int. Unit "time".
    Raises ValueError when a class has too few windows, or labels or times are unknown.
    """
    subjects, recordings, labels = Names.of(subjects), Names.of(recordings), np.asarray(labels)
    if shots < 1 or labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(f"few-shot needs at least one window per class and class labels (n,), found {shots} windows "
                         f"and labels {labels.shape} of {labels.dtype}")  # fmt: skip
    around = leave_subject_out(subjects, subject, labels, val_fraction=val_fraction, seed=seed)
    own = times.ordered(around.test, recordings)
    classes = np.unique(labels[own])
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng((seed, shots, attempt))
        chosen = np.concatenate([_run_of(own[labels[own] == label], shots, rng) for label in classes])
        free = own[_distance(own, chosen, recordings, times) >= gap * times.lengths[own] - CLOSE]
        free = np.setdiff1d(free, chosen)
        if len(chosen) == shots * len(classes) and set(labels[free].tolist()) == set(classes.tolist()):
            break
    else:
        counts = ", ".join(f"{int((labels[own] == label).sum())} of class {label}" for label in classes)
        raise ValueError(f"subject {subject!r} has {counts}: too few for {shots} windows per class, a gap of {gap:g} "
                         f"windows and a test; ask for fewer")  # fmt: skip
    train = np.union1d(chosen, around.train) if others else np.sort(chosen)
    return _of_rows(subjects, "time", train, around.val, free)


def split_in_time(
    recordings: Names | np.ndarray,
    times: Times,
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    gap: float = 1.0,
    subjects: Names | np.ndarray | None = None,
) -> Split:
    """Each recording is divided in time: its beginning trains, then comes validation, its end is tested. Unit "time".

    Windows closer than `gap` window lengths to the next part belong to none: neighbours share signal and label. Nothing
    is drawn. Raises ValueError when a time is unknown or a part stays empty.
    """
    recordings = Names.of(recordings)
    rows: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    fractions = {"train": 1.0 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    if fractions["train"] <= 0 or min(fractions.values()) < 0:
        raise ValueError("val_fraction and test_fraction must be positive and leave something to train on")
    bounds = np.cumsum(list(fractions.values()))
    ordered = times.ordered(np.arange(len(recordings)), recordings)
    starts = np.flatnonzero(np.diff(recordings.codes[ordered].astype(np.int64), prepend=-1))
    for own in np.split(ordered, starts[1:]):
        ends = np.floor(bounds * len(own) + 0.5).astype(int)
        pieces = np.split(own, ends[:-1])
        for number, (part, piece) in enumerate(zip(PARTS, pieces, strict=True)):
            later = np.concatenate([own[:0], *pieces[number + 1 :]])
            limit = times.starts[later[0]] if len(later) else np.inf
            rows[part].append(piece[times.starts[piece] + (1 + gap) * times.lengths[piece] <= limit + CLOSE])
    joined = {part: np.sort(np.concatenate(found)) for part, found in rows.items()}
    empty = [part for part, fraction in fractions.items() if fraction and not len(joined[part])]
    if empty:
        raise ValueError(f"the recordings are too short to be divided in time: no window is left for {empty[0]}")
    return _of_rows(Names.of(recordings if subjects is None else subjects), "time", **joined)


def split_by_recording(
    recordings: Names | np.ndarray,
    labels: np.ndarray | None = None,
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """As `split_by_subject`, but recordings (or trials) are what is drawn: a subject may be in every part."""
    drawn = split_by_subject(recordings, labels, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    return dataclasses.replace(drawn, unit="recording")


def split_by_lists(
    subjects: Names | np.ndarray, *, train: Sequence[str], val: Sequence[str] = (), test: Sequence[str] = ()
) -> Split:
    """The split given by explicit subject ids, for published lists.

    Windows of subjects in no list are left out. Raises ValueError for a subject in two lists or absent from
    `subjects`, and when no training subject is given.
    """
    subjects = Names.of(subjects)
    lists = {"train": tuple(sorted(train)), "val": tuple(sorted(val)), "test": tuple(sorted(test))}
    check_disjoint(lists)
    absent = sorted(set().union(*lists.values()) - set(subjects.unique().tolist()))
    if absent:
        raise ValueError(f"subjects {', '.join(absent)} of the split have no windows in this store")
    if not lists["train"]:
        raise ValueError("the split has no training subject")
    train_rows, val_rows, test_rows = (_rows_of(subjects, lists[part]) for part in PARTS)
    return Split(train_rows, val_rows, test_rows, subjects=lists)


def split_random_windows(subjects: Names | np.ndarray, *, val_fraction: float = 0.2, seed: int = 0) -> Split:
    """The reference's pre-training rule: a random part of the windows, whoever they come from.

    It leaks subjects into validation by design, so `check_leakage` refuses it; its `unit` says "window". For
    comparison with the reference's pre-training only.
    """
    subjects = Names.of(subjects)
    n_val = _count(len(subjects), val_fraction)
    if not len(subjects) > n_val:
        raise ValueError(f"{len(subjects)} windows cannot be divided with a validation fraction of {val_fraction}")
    order = np.random.default_rng(seed).permutation(len(subjects))
    return _of_rows(subjects, "window", np.sort(order[n_val:]), np.sort(order[:n_val]), np.zeros(0, np.int64))


def check_leakage(
    split: Split,
    subjects: Names | np.ndarray,
    recordings: Names | np.ndarray | None = None,
    times: Times | None = None,
) -> None:
    """Refuse a split with a window in two parts, or whatever its unit forbids to divide.

    `subjects` and `recordings` (n,) str and `times` belong to the windows of the store; the units "time" and "window"
    are checked by their times. Raises ValueError naming subjects, recordings or places.
    """
    seen = np.bincount(np.concatenate(list(split.parts.values())), minlength=len(subjects))
    if seen.max(initial=0) > 1:  # sets of every window only to name them: there may be millions
        twice = np.flatnonzero(seen > 1)
        check_disjoint({p: np.intersect1d(rows, twice).tolist() for p, rows in split.parts.items()}, what="window")
    if split.unit in ("time", "window") and recordings is not None and times is not None:
        check_times(split.parts, recordings, times)
    elif split.unit == "time":
        raise ValueError("a split in time needs to know when the windows of each recording were recorded")
    columns = {"subject": (subjects, recordings), "recording": (None, recordings), "time": (None, None)}
    for what, column in zip(("subject", "recording"), columns.get(split.unit, (subjects, recordings)), strict=True):
        if column is not None:
            names = Names.of(column)
            check_disjoint({part: names.unique(rows).tolist() for part, rows in split.parts.items()}, what=what)


def save_split(split: Split, path: str | Path) -> None:
    """Write a split as JSON, whole or not at all: its lists of ids, or its rows (units "time" and "window"); digest."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = _contents(split)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(contents | {"sha256": _digest(contents)}, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_split(path: str | Path, subjects: Names | np.ndarray, recordings: Names | np.ndarray | None = None) -> Split:
    """Read a split, or published lists (`split_lists`), for windows with these subjects and recordings, (n,) str each.

    Lists of a saved split apply to any store with the same subjects (or recordings); a store may lack some, none of
    its own may be unknown to the split. Row numbers apply to a store with the same windows. Published lists must be
    found completely; windows in none of them are left out. Raises ValueError when the file is missing, damaged (its
    digest does not fit) or meant for other data.
    """
    path, subjects = Path(path), Names.of(subjects)
    if holds_lists(path):
        return _split_from(path, read_lists(path), subjects, recordings)
    stored = read_json(path)
    try:
        digest = stored.pop("sha256")
        unit, own = stored["unit"], {part: stored[part] for part in PARTS}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a split ({error}): make it again") from error
    if digest != _digest(stored):
        raise ValueError(f"{path} was changed after it was written (its digest does not fit): make it again")
    if "num_windows" in stored:
        if stored["num_windows"] != len(subjects):
            raise ValueError(f"{path} divides {stored['num_windows']} windows, this store has {len(subjects)}")
        return _of_rows(subjects, unit, *(np.array(own[part], dtype=np.int64) for part in PARTS))
    if unit not in ("subject", "recording"):
        raise ValueError(f"{path} divides the windows of a recording (unit {unit!r}), which its lists do not tell: "
                         f"use the stores train.h5, validation.h5 and test.h5 beside it as they are")  # fmt: skip
    names = subjects if unit == "subject" else Names.of([] if recordings is None else recordings)
    present = set(names.unique().tolist())
    unknown = sorted(present - set().union(*own.values()))
    if unknown:
        raise ValueError(f"{path} does not say where {unit}s {shown(unknown)} of this store belong")
    lists = {part: [s for s in own[part] if s in present] for part in PARTS}
    return dataclasses.replace(split_by_lists(names, **lists), unit=unit)


def _split_from(path: Path, lists: Mapping[str, Sequence[str]], subjects: Names, recordings: Any) -> Split:
    """Published lists of subjects or of recordings; a subject in two of them is refused either way."""
    check_disjoint(lists, what="entry")
    wanted = [entry for own in lists.values() for entry in own]
    by_subject = {name: [name] for name in subjects.unique().tolist()}
    columns = [(by_subject, subjects)]
    if recordings is not None:
        recordings = Names.of(recordings)
        columns.append((_by_short_name(recordings.unique().tolist()), recordings))
    for known, column in columns:
        missing = [entry for entry in wanted if entry not in known]
        if len(missing) == len(wanted):
            continue
        if missing:
            raise ValueError(f"{path}: {len(missing)} of {len(wanted)} entries have no windows in the stores "
                             f"({shown(missing)}): take them off the lists, or prepare them")  # fmt: skip
        rows = {p: _rows_of(column, [name for entry in own for name in known[entry]]) for p, own in lists.items()}
        check_disjoint({part: subjects.unique(own).tolist() for part, own in rows.items()})
        ids = {part: tuple(subjects.unique(own).tolist()) for part, own in rows.items()}
        if not len(rows["train"]):
            raise ValueError(f"{path}: the split has no training subject")
        whole = all(len(_rows_of(subjects, ids[part])) == len(own) for part, own in rows.items())
        return Split(**rows, subjects=ids, unit="subject") if whole else _of_rows(subjects, "time", **rows)
    raise ValueError(f"{path}: no entry is a subject or a recording of the stores (in the lists: {shown(wanted)}; in "
                     f"the stores: {shown(sorted(by_subject))})")  # fmt: skip


def _by_short_name(recordings: Sequence[str]) -> dict[str, list[str]]:
    """How lists may call recordings: by their whole name, without the folder, and without the suffix either."""
    found: dict[str, list[str]] = {}
    for name in recordings:
        base = name.partition("#")[0]
        for short in dict.fromkeys((name, base, PurePosixPath(base).name, PurePosixPath(base).stem)):
            found.setdefault(short, []).append(name)
    return found


def _contents(split: Split) -> dict:
    if split.unit in ("time", "window"):
        rows = {part: own.tolist() for part, own in split.parts.items()}
        return {"unit": split.unit, "num_windows": split.num_windows or sum(map(len, rows.values())), **rows}
    return {"unit": split.unit, **{part: list(split.subjects[part]) for part in PARTS}}


def _digest(contents: dict) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _rows_of(subjects: Names, ids: Sequence[str]) -> np.ndarray:
    return np.flatnonzero(subjects.isin(ids)).astype(np.int64)


def _of_rows(subjects: Names, unit: str, train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Split:
    rows = {"train": train, "val": val, "test": test}
    names = {part: tuple(subjects.unique(own).tolist()) for part, own in rows.items()}
    return Split(**rows, subjects=names, unit=unit, num_windows=len(subjects))


def _run_of(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of `rows` that follow each other, from a random place on; fewer when there are not more than that."""
    return rows[(first := int(rng.integers(max(len(rows) - count, 0) + 1))) : first + count]


def _distance(rows: np.ndarray, chosen: np.ndarray, recordings: Names, times: Times) -> np.ndarray:
    """Seconds between each of `rows` and the nearest of `chosen` in its recording; negative where they overlap."""
    nearest = np.full(len(rows), np.inf)
    for row in chosen.tolist():
        start, length = times.starts[row], times.lengths[row]
        apart = np.maximum(times.starts[rows] - start - length, start - times.starts[rows] - times.lengths[rows])
        same = recordings.codes[rows] == recordings.codes[row]
        nearest = np.minimum(nearest, np.where(same, apart, np.inf))
    return nearest


def _count(n: int, fraction: float) -> int:
    return 0 if fraction == 0 else max(1, math.floor(n * fraction + 0.5))


def _by_stratum(subjects: Names, labels: np.ndarray | None, rng: np.random.Generator) -> list[str]:
    """Every subject once, stratum after stratum, in random order within each."""
    if not len(subjects):
        raise ValueError("there are no windows to split")
    strata: dict[tuple, list[str]] = {}
    classes = None if labels is None else np.asarray(labels)
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind not in "iub"):
        classes = None
    classes_of: dict[str, list[int]] = {str(subject): [] for subject in subjects.unique()}
    if classes is not None:
        labels, label_codes = np.unique(classes, return_inverse=True)
        for pair in np.unique(subjects.codes * np.int64(len(labels)) + label_codes):
            subject, label = divmod(int(pair), len(labels))
            classes_of[str(subjects.table[subject])].append(int(labels[label]))
    for subject, own in classes_of.items():
        strata.setdefault(tuple(own), []).append(subject)
    return [str(s) for key in sorted(strata) for s in rng.permutation(strata[key])]


def _carve(ordered: list[str], count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """`count` subjects at even distances of the ordered list (hence proportional to the strata), and the others."""
    if count >= len(ordered):
        return ordered, []
    taken = set(np.floor((np.arange(count) + rng.random()) * len(ordered) / count).astype(int)) if count else set()
    return [s for i, s in enumerate(ordered) if i in taken], [s for i, s in enumerate(ordered) if i not in taken]
