"""Who is trained on, who is validated on, who is tested: splits by subject, their storage, and the leakage check.

A subject is never divided. Subject ids are sorted before any draw, so a split depends on the set of subjects, their
labels and the seed, not on the order of files. Strata are the sets of classes a subject has windows of.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.names import Names

_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Rows of a window store for training, validation and test.

    `train`, `val`, `test` are (n,) int64, sorted; `subjects` gives the sorted subject ids of each part. `unit` is
    "subject", or "window" for the random-window rule, where a subject may be in every part.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    subjects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unit: str = "subject"

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
            f"validation ({val_fraction:.0%}) and test ({test_fraction:.0%}): give more subjects or smaller fractions"
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
    train_rows, val_rows, test_rows = (_rows_of(subjects, lists[part]) for part in _PARTS)
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
    rows = {"train": np.sort(order[n_val:]), "val": np.sort(order[:n_val]), "test": np.zeros(0, np.int64)}
    names = {part: tuple(subjects.unique(own).tolist()) for part, own in rows.items()}
    return Split(**rows, subjects=names, unit="window")


def check_leakage(split: Split, subjects: Names | np.ndarray, recordings: Names | np.ndarray | None = None) -> None:
    """Refuse a split with a window, a subject or a recording in two parts.

    `subjects` and `recordings` (n,) str belong to the windows of the store. Raises ValueError naming them.
    """
    seen = np.bincount(np.concatenate(list(split.parts.values())), minlength=len(subjects))
    if seen.max(initial=0) > 1:  # sets of every window only to name them: there may be millions
        twice = np.flatnonzero(seen > 1)
        check_disjoint({p: np.intersect1d(rows, twice).tolist() for p, rows in split.parts.items()}, what="window")
    for what, column in (("subject", subjects), ("recording", recordings)):
        if column is not None:
            names = Names.of(column)
            check_disjoint({part: names.unique(rows).tolist() for part, rows in split.parts.items()}, what=what)


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


def save_split(split: Split, path: str | Path) -> None:
    """Write a split as JSON, whole or not at all: its subject lists (row numbers for unit "window") and its digest."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = _contents(split)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(contents | {"sha256": _digest(contents)}, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_split(path: str | Path, subjects: Names | np.ndarray) -> Split:
    """Read a split for the windows of `subjects` (n,) str.

    Subject lists apply to any store with the same subjects; a store may lack some, none of its subjects may be
    unknown to the split. Row numbers apply to a store with the same windows. Raises ValueError when the file is
    missing, damaged (its digest does not fit) or meant for other data.
    """
    path, subjects = Path(path), Names.of(subjects)
    try:
        stored = json.loads(path.read_text())
        digest = stored.pop("sha256")
        unit, own = stored["unit"], {part: stored[part] for part in _PARTS}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a split ({error}): make it again") from error
    if digest != _digest(stored):
        raise ValueError(f"{path} was changed after it was written (its digest does not fit): make it again")
    if unit == "window":
        if stored["num_windows"] != len(subjects):
            raise ValueError(f"{path} divides {stored['num_windows']} windows, this store has {len(subjects)}")
        rows = {part: np.array(own[part], dtype=np.int64) for part in _PARTS}
        return Split(**rows, subjects={p: tuple(subjects.unique(r).tolist()) for p, r in rows.items()}, unit=unit)
    present = set(subjects.unique().tolist())
    unknown = sorted(present - set().union(*own.values()))
    if unknown:
        raise ValueError(f"{path} does not say where subjects {', '.join(unknown[:5])} of this store belong")
    return split_by_lists(subjects, **{part: [s for s in own[part] if s in present] for part in _PARTS})


def _contents(split: Split) -> dict:
    if split.unit == "window":
        rows = {part: own.tolist() for part, own in split.parts.items()}
        return {"unit": "window", "num_windows": sum(map(len, rows.values())), **rows}
    return {"unit": "subject", **{part: list(split.subjects[part]) for part in _PARTS}}


def _digest(contents: dict) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _rows_of(subjects: Names, ids: Sequence[str]) -> np.ndarray:
    return np.flatnonzero(subjects.isin(ids)).astype(np.int64)


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
