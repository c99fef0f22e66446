"""EEGMAT: rest or mental arithmetic (PhysioNet)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from data_pipeline.corpora import tuh
from data_pipeline.corpora.base import (
    Catalogue,
    Corpus,
    Division,
    Expected,
    Piece,
    Source,
    divide_subjects,
    files_below,
    unknown_layout,
)
from data_pipeline.corpora.tables import number, read_rows
from data_pipeline.preprocess import PreprocessConfig

_FILE = re.compile(r"(Subject\d\d)_([12])", re.IGNORECASE)
_NAMES = "FP1 FP2 F3 F4 F7 F8 T3 T4 C3 C4 T5 T6 P3 P4 O1 O2 FZ CZ PZ"
_CHANNELS = tuple(_NAMES.split())
_TABLE, _SUBJECT, _QUALITY = "subject-info.csv", "Subject", "Count quality"
_CLASSES = {"task": ("rest", "arithmetic"), "quality": ("bad", "good")}


@dataclass(frozen=True, kw_only=True)
class Eegmat(Corpus):
    """EEGMAT: rest or mental arithmetic, 19 channels, 256 Hz, 5 s."""

    name: ClassVar[str] = "eegmat"
    title: ClassVar[str] = "EEG During Mental Arithmetic Tasks (eegmat)"
    source: ClassVar[str] = "https://physionet.org/content/eegmat/1.0.0/"
    licence: ClassVar[str] = "ODC-BY 1.0"
    citation: ClassVar[str] = "Zyma et al., Electroencephalograms during Mental Arithmetic, Data 4:14, 2019"
    layout: ClassVar[str] = f"SubjectNN_1.edf (rest), SubjectNN_2.edf (arithmetic), {_TABLE}"
    expected: ClassVar[Expected] = Expected(recordings=72, subjects=36, source="PhysioNet 1.0.0")
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage=",".join(_CHANNELS), notch=50.0, flat="keep", accept_units=True
    )
    split_options: ClassVar[frozenset[str]] = frozenset({"seed", "validation", "test"})

    target: Literal["task", "quality"] = "task"
    """rest or arithmetic, or whether the subject counted well (a column of the table of subjects)"""
    seed: int = 0
    """of the draw of validation and test subjects"""
    validation: float = 0.2
    """part of the subjects that validates"""
    test: float = 0.2
    """part of the subjects that tests"""

    def find(self, root: Path) -> Catalogue:
        """Subject and condition from the names; of copies the one nearest to the top of the folder."""
        quality = _count_quality(root) if self.target == "quality" else {}
        sources, left_out, seen = [], {}, {}
        for name, path in sorted(files_below(root, ".edf"), key=lambda item: (item[0].count("/"), item[0])):
            found = _FILE.fullmatch(path.stem)
            key = found.group(0).lower() if found else ""
            if found is None:
                left_out[name] = f"its name {path.stem!r} is not SubjectNN_1 or SubjectNN_2"
            elif key in seen:
                left_out[name] = f"the same recording as {seen[key]}"
            elif self.target == "quality" and found[1].lower() not in quality:
                left_out[name] = f"{_TABLE} gives no {_QUALITY} of {found[1]}"
            else:
                seen[key] = name
                label = int(found[2]) - 1 if self.target == "task" else quality[found[1].lower()]
                sources.append(Source(path, name, found[1].capitalize(), found[2], label=label))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; all 19 electrodes are required."""
        yield Piece(tuh.read_electrodes(source.path, _CHANNELS), label=source.label)

    def split(self, catalogue: Catalogue) -> Division:
        """By subject; there is no published division."""
        parts, rule = divide_subjects(
            catalogue.sources,
            validation=self.validation,
            test=self.test,
            seed=self.seed,
            rule=f"{self.validation:.0%} of the subjects validate, {self.test:.0%} test",
        )
        return Division(parts, rule=rule)

    def class_names(self) -> tuple[str, ...]:
        """Rest and arithmetic, or bad and good counting."""
        return _CLASSES[self.target]


def _count_quality(root: Path) -> dict[str, int]:
    """Subject in lower case -> 0 (bad) or 1 (good). Raises ValueError without the table or its columns."""
    path = root / _TABLE
    rows = read_rows(path, delimiter=",") if path.is_file() else []
    if not rows or not {_SUBJECT, _QUALITY} <= set(rows[0]):
        raise ValueError(f"--target quality needs {path} with the columns {_SUBJECT} and {_QUALITY}")
    values = {row[_SUBJECT].lower(): number(row[_QUALITY]) for row in rows}
    return {subject: int(value) for subject, value in values.items() if value in (0.0, 1.0)}
