"""Mumtaz2016: major depression or healthy, at rest (data.md 8.9)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from data_pipeline.corpora import tuh
from data_pipeline.corpora.base import Catalogue, Corpus, Division, Expected, Piece, Source, files_below, unknown_layout
from data_pipeline.corpora.published_splits import divide_by_place, unexpected_counts
from data_pipeline.montages import CHANNEL_ORDERS
from data_pipeline.preprocess import PreprocessConfig

_FILE = re.compile(r"(?P<prefix>\d+_)?(?P<group>H|MDD)\s+S(?P<number>\d+)\s+(?P<condition>EC|EO|TASK)", re.IGNORECASE)
_LABELS = {"H": 0, "MDD": 1}
_COUNTS = {1: 33, 0: 30}
_PLACES = {1: (slice(0, 23), slice(23, 28), slice(28, None)), 0: (slice(0, 19), slice(19, 23), slice(23, 27))}


@dataclass(frozen=True, kw_only=True)
class Mumtaz2016(Corpus):
    """Mumtaz2016: major depression or healthy, eyes closed and open, 19 channels, 256 Hz, 5 s."""

    name: ClassVar[str] = "mumtaz2016"
    title: ClassVar[str] = "MDD patients and healthy controls (Mumtaz 2016)"
    source: ClassVar[str] = "https://figshare.com/articles/dataset/EEG_Data_New/4244171"
    licence: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = "Mumtaz, MDD Patients and Healthy Controls EEG Data (New), figshare 4244171, 2016"
    layout: ClassVar[str] = "flat: `H S1 EC.edf`, `MDD S1 EO.edf`, ..."
    expected: ClassVar[Expected] = Expected(subjects=63, source="33 with depression, 30 healthy, files EC and EO")
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="mumtaz-19", notch=50.0, flat="keep", accept_units=True
    )

    names: Literal["tolerant", "as_reference"] = "tolerant"
    """as_reference loses the files whose name has two blanks (`MDD S11  EC.edf`), as splitting at single ones does"""

    def find(self, root: Path) -> Catalogue:
        """Class, subject and condition from the names; of several files of one session one without a prefix."""
        found, left_out = [], {}
        for name, path in files_below(root, ".edf"):
            match = _FILE.fullmatch(path.stem.strip())
            if match is None:
                left_out[name] = f"its name {path.stem!r} is not `H S<number> EC|EO|TASK` or `MDD ...`"
            elif match["condition"].upper() == "TASK":
                left_out[name] = "recorded during a task; only rest (EC, EO) is used"
            elif self.names == "as_reference" and "  " in path.stem:
                left_out[name] = "two blanks in its name (--names as_reference)"
            else:
                found.append((bool(match["prefix"]), name, path, match))
        sources: dict[tuple[str, str], Source] = {}
        for _, name, path, match in sorted(found, key=lambda item: item[:2]):
            group, condition = match["group"].upper(), match["condition"].upper()
            subject = f"{group} S{int(match['number'])}"
            if (subject, condition) in sources:
                left_out[name] = f"a second file of {subject} {condition}, beside {sources[subject, condition].name}"
            else:
                sources[subject, condition] = Source(path, name, subject, condition, label=_LABELS[group])
        if not sources:
            raise unknown_layout(self, root, left_out)
        warnings = unexpected_counts(list(sources.values()), _COUNTS, self.class_names())
        return Catalogue(list(sources.values()), left_out, warnings)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; all 19 electrodes are required, A2-A1 and two unnamed pairs are left out."""
        yield Piece(tuh.read_electrodes(source.path, CHANNEL_ORDERS["mumtaz-19"]), label=source.label)

    def split(self, catalogue: Catalogue) -> Division:
        """The first subjects of each class by number."""
        everyone = {source.subject: source.label for source in catalogue.sources}
        by_number = sorted(everyone, key=lambda subject: int(subject.split("S")[1]))
        order = {label: [s for s in by_number if everyone[s] == label] for label in _PLACES}
        rule = "subjects by number: depression 23 train, 5 validate, the others test; healthy 19, 4, 4"
        return divide_by_place(catalogue.sources, order, _PLACES, rule)

    def class_names(self) -> tuple[str, ...]:
        """Class 1 is depression."""
        return ("healthy", "depression")
