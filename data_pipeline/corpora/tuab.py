"""TUAB: is the whole recording normal or abnormal? (data.md 8.3)"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from data_pipeline.corpora import tuh
from data_pipeline.corpora.base import (
    Catalogue,
    Division,
    Expected,
    Piece,
    Source,
    divide_subjects,
    files_below,
    unknown_layout,
)

_CLASSES = ("normal", "abnormal")


@dataclass(frozen=True, kw_only=True)
class Tuab(tuh.TuhLabelledCorpus):
    """TUH Abnormal EEG Corpus: normal or abnormal, 22 bipolar channels, 256 Hz, 5 s."""

    name: ClassVar[str] = "tuab"
    title: ClassVar[str] = "TUH Abnormal EEG Corpus (TUAB)"
    layout: ClassVar[str] = "edf/{train,eval}/{normal,abnormal}/01_tcp_ar/**/<subject>_sNNN_tNNN.edf (v1 to v3)"
    expected: ClassVar[Expected] = Expected(
        windows={"train": 591_357, "validation": 154_938, "test": 74_010},
        recordings=2_993,
        subjects=2_329,
        source="LUNA, arXiv 2510.22257, table 11; recordings: TUAB v3.0.1",
    )
    split_options: ClassVar[frozenset[str]] = frozenset({"seed", "validation"})

    seed: int = 0
    """of the draw of validation subjects"""
    validation: float = 0.2
    """part of the official training subjects that validates"""

    def find(self, root: Path) -> Catalogue:
        """Class and official part from the folders, at any depth."""
        sources, left_out = [], {}
        for name, path in files_below(root, ".edf"):
            folders = {part.lower() for part in PurePosixPath(name).parts[:-1]}
            part, label = folders & {"train", "eval"}, folders & set(_CLASSES)
            if len(part) != 1 or len(label) != 1:
                left_out[name] = "not in a folder train or eval with a folder normal or abnormal"
                continue
            try:
                stem = tuh.parse_stem(path.stem)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            official = {"train": "train", "eval": "test"}[part.pop()]
            label_number = _CLASSES.index(label.pop())
            sources.append(Source(path, name, stem.subject, stem.session, part=official, label=label_number))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording, one label."""
        yield Piece(tuh.read_electrodes(source.path, tuh.ELECTRODES), label=source.label)

    def split(self, catalogue: Catalogue) -> Division:
        """Official evaluation subjects test; of the others, a part validates, proportional in "has an abnormal file".

        A patient with normal and abnormal recordings is on one side only; one who also is in the evaluation set is
        left out of training.
        """
        tested = {source.subject for source in catalogue.sources if source.part == "test"}
        others = [source for source in catalogue.sources if source.subject not in tested]
        abnormal = {source.subject for source in others if source.label == 1}
        strata = [Source(s.path, s.name, s.subject, label=int(s.subject in abnormal)) for s in others]
        rule = f"official evaluation set; {self.validation:.0%} of the other subjects validate"
        parts = {}
        if others:
            parts, rule = divide_subjects(strata, validation=self.validation, test=0.0, seed=self.seed, rule=rule)
        leaking = {
            source.name: "its subject is in the official evaluation set"
            for source in catalogue.sources
            if source.subject in tested and source.part != "test"
        }
        parts |= {source.name: "test" for source in catalogue.sources if source.part == "test"}
        return Division(parts, rule=rule, left_out=leaking)

    def class_names(self) -> tuple[str, ...]:
        """Class 1 is abnormal."""
        return _CLASSES
