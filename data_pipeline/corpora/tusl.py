"""TUSL: seizure, slowing, or neither? (data.md 8.5)"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

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
from data_pipeline.corpora.tuh_annotations import Event, annotation_file, covered, read_annotations, samples

_CLASSES = ("normal", "background", "seizure", "slowing")
_NUMBERS = {"bckg": 1, "seiz": 2, "slow": 3}
_ANNOTATIONS = (".csv", ".csv_bi", ".tse_agg", ".tse")


@dataclass(frozen=True, kw_only=True)
class Tusl(tuh.TuhLabelledCorpus):
    """TUH EEG Slowing Corpus: four kinds of background, 22 bipolar channels, 256 Hz, 5 s."""

    name: ClassVar[str] = "tusl"
    title: ClassVar[str] = "TUH EEG Slowing Corpus (TUSL)"
    layout: ClassVar[str] = (
        "edf/<subject>/<session>/<montage>/<subject>_sNNN_tNNN.edf with .csv or .tse_agg beside (v1, v2)"
    )
    expected: ClassVar[Expected] = Expected(
        windows={"train": 16_088, "validation": 1_203, "test": 2_540},
        recordings=112,
        subjects=38,
        source="LUNA, arXiv 2510.22257, table 11; recordings: TUSL v2.0.1",
    )
    split_options: ClassVar[frozenset[str]] = frozenset({"seed"})

    unannotated: Literal["skip", "normal"] = "skip"
    """recordings without an annotation file: leave out, or take every window as class 0 as the reference does"""
    seed: int = 0
    """of the draw of validation and test subjects"""

    def find(self, root: Path) -> Catalogue:
        """Every montage folder of every session."""
        sources, left_out = [], {}
        for name, path in files_below(root, ".edf"):
            try:
                stem = tuh.parse_stem(path.stem)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            found = annotation_file(path, _ANNOTATIONS)
            if found is None and self.unannotated == "skip":
                left_out[name] = f"no annotation file ({', '.join(_ANNOTATIONS)}) beside it"
                continue
            companions = () if found is None else (found,)
            sources.append(
                Source(path, name, stem.subject, stem.session, classes=_numbers_in(found), companions=companions)
            )
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; the label of a window is the most frequent of its samples."""
        recording = tuh.read_electrodes(source.path, tuh.ELECTRODES)
        events = [event for path in source.companions for event in read_annotations(path)]
        others = sum(event.label not in _NUMBERS for event in events)
        if others:
            recording = recording.noting(f"{others} annotations have a label that is none of the corpus")
        yield Piece(recording, label_windows=functools.partial(self._label_windows, events))

    def split(self, catalogue: Catalogue) -> Division:
        """80/10/10 by subject, proportional in the sets of labels that subjects have."""
        rule = "80 % train, 10 % validation, 10 % test by subject"
        parts, rule = divide_subjects(catalogue.sources, validation=0.1, test=0.1, seed=self.seed, rule=rule)
        return Division(parts, rule=rule)

    def class_names(self) -> tuple[str, ...]:
        """Class 0 is what nobody annotated."""
        return _CLASSES

    def _label_windows(self, events: Sequence[Event], starts: np.ndarray, n: int) -> list[int]:
        """Most frequent number of each window, ties to the smaller; of overlapping events the last row counts."""
        numbers = np.zeros(n, dtype=np.int8)
        for event in events:
            if event.label in _NUMBERS:
                numbers[samples(event, self.chain_settings.sfreq, n)] = _NUMBERS[event.label]
        counts = np.stack([covered(numbers == k, starts, self.n_times) for k in range(len(_CLASSES))])
        return counts.argmax(axis=0).tolist()


def _numbers_in(path: Path | None) -> tuple[int, ...]:
    """Class numbers that an annotation file names; none for a file that cannot be read (reading it says why)."""
    if path is None:
        return ()
    try:
        events = read_annotations(path)
    except (ValueError, OSError):
        return ()
    return tuple(sorted({_NUMBERS[event.label] for event in events if event.label in _NUMBERS}))
