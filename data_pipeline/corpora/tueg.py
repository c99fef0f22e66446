"""TUEG: all recordings of the hospital, for pre-training (data.md 8.1)."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.corpora import tuh
from data_pipeline.corpora.base import Catalogue, Expected, Piece, Source, files_below, unknown_layout
from data_pipeline.montages import CHANNEL_ORDERS, split_pair
from data_pipeline.preprocess import PreprocessConfig

_MONTAGES = {"01": "tuh-bipolar-22", "02": "tuh-bipolar-22", "03": "tuh-bipolar-20", "04": "tuh-bipolar-20"}
_LABELLED = "TUAB, TUAR and TUSL"
_ID = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Tueg(tuh.TuhCorpus):
    """TUH EEG Corpus for pre-training: 22 or 20 bipolar channels by montage folder, 256 Hz, 5 s, no labels."""

    name: ClassVar[str] = "tueg"
    title: ClassVar[str] = "TUH EEG Corpus (TUEG)"
    layout: ClassVar[str] = (
        "edf/**/{01_tcp_ar,02_tcp_le,03_tcp_ar_a,04_tcp_le_a}/**/<subject>_sNNN_tNNN.edf (v1: montage first; v2: last)"
    )
    expected: ClassVar[Expected] = Expected(
        windows={"train": 15_686_874}, subjects=14_987, source="LUNA, arXiv 2510.22257, table 11"
    )
    recordings_per_store: ClassVar[int | None] = 2000
    split_options: ClassVar[frozenset[str]] = frozenset({"exclude"})

    exclude: tuple[Path, ...] = ()
    """raw or prepared folders of TUAB, TUAR and TUSL (or text files of ids): their subjects are left out"""

    def find(self, root: Path) -> Catalogue:
        """Every recording in a montage folder, of subjects that are not to be tested on."""
        excluded = {subject: path.name for path in self.exclude for subject in _subjects_of(path)}
        sources, left_out, found = [], {}, set()
        for name, path in files_below(root, ".edf"):
            if not tuh.montage_folder(name):
                left_out[name] = "in no montage folder 01_tcp_ar, 02_tcp_le, 03_tcp_ar_a or 04_tcp_le_a"
                continue
            try:
                stem = tuh.parse_stem(path.stem)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            if stem.subject in excluded:
                found.add(stem.subject)
                left_out[name] = f"its subject is in {excluded[stem.subject]} (--exclude)"
            else:
                sources.append(Source(path, name, stem.subject, stem.session))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out, self._warnings(len(excluded), len(found)))

    def _warnings(self, excluded: int, found: int) -> list[str]:
        if not self.exclude:
            return [f"no --exclude: subjects of {_LABELLED} may be in the pre-training set, tests on them would leak"]
        if not found:
            return [f"none of the {excluded} subjects to exclude is in this corpus: are the ids of the same release?"]
        return []

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; only the electrodes of its pairs are required."""
        pairs = CHANNEL_ORDERS[self.chain(source).montage]
        sites = dict.fromkeys(site for pair in pairs for site in split_pair(pair) or ())
        yield Piece(tuh.read_electrodes(source.path, tuple(sites)))

    def chain(self, source: Source) -> PreprocessConfig:
        """22 pairs in the folders with ear electrodes, 20 in the others."""
        montage = _MONTAGES[tuh.montage_folder(source.name)[:2]]
        return dataclasses.replace(self.chain_settings, montage=montage)


def _subjects_of(path: Path) -> set[str]:
    """Subjects of a prepared folder (its manifest), of a raw folder (names of its EDF files), or of a list of ids.

    Raises ValueError when there is none.
    """
    if (path / "manifest.json").is_file():
        subjects = _subjects_in_manifest(path / "manifest.json")
    elif path.is_dir():
        subjects = {_stem_subject(found.stem) for _, found in files_below(path, ".edf")}
    elif path.is_file():
        subjects = _subjects_in_list(path)
    else:
        raise ValueError(f"--exclude {path} does not exist")
    subjects.discard("")
    if not subjects:
        raise ValueError(f"--exclude {path} names no subject: expected {_LABELLED}, raw or prepared, or a list of ids")
    return subjects


def _subjects_in_manifest(path: Path) -> set[str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {entry.get("subject") or _stem_subject(Path(name).stem) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--exclude {path.parent}: its {path.name} is not that of a prepared corpus") from error


def _subjects_in_list(path: Path) -> set[str]:
    """Ids, or files of the subjects, one a line; a line of another form would silently exclude nobody."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--exclude {path} is not a text in UTF-8: expected one subject a line") from error
    subjects = set()
    for number, line in enumerate((line.split("#")[0].strip() for line in lines), start=1):
        subject = _stem_subject(Path(line).name.removesuffix(".edf")) or line.lower()
        if subject and not _ID.fullmatch(subject):
            raise ValueError(f"--exclude {path}, line {number}: {line[:60]!r} is no subject, expected one id a line")
        subjects.add(subject)
    return subjects


def _stem_subject(stem: str) -> str:
    try:
        return tuh.parse_stem(stem).subject
    except ValueError:
        return ""
