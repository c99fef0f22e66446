"""TUAR: which artifact is in the window, or in each of its channels? (data.md 8.4)"""

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
    Drop,
    Expected,
    Label,
    Piece,
    Source,
    divide_subjects,
    files_below,
    unknown_layout,
)
from data_pipeline.corpora.tuh_annotations import TERM, Event, annotation_file, covered, read_annotations, samples
from data_pipeline.preprocess import wanted_names

FAMILIES = ("normal", "chewing", "electrode", "eye", "muscle", "shivering")  # numbers 0..5 of the published labels
_PARTS_OF_LABEL = {"chew": 1, "elec": 2, "elpp": 2, "eyem": 3, "musc": 4, "shiv": 5}
_FAMILY = {  # the 13 artifact labels of the papers and the reference
    "chew": 1, "chew_elec": 1, "chew_musc": 1,
    "elec": 2,
    "eyem": 3, "eyem_chew": 3, "eyem_elec": 3, "eyem_musc": 3, "eyem_shiv": 3,
    "musc": 4, "musc_elec": 4,
    "shiv": 5, "shiv_elec": 5,
}  # fmt: skip
_OVERLOOKED = {"elpp": 2, "chew_shiv": 1, "shiv_musc": 5}  # artifacts that the reference's families lack
_SEIZURES = ("cpsz", "fnsz", "gnsz", "tcsz")
_NO_ARTIFACT = {"null", "bckg", *_SEIZURES}
_ANNOTATIONS = (".csv", ".lbl", ".lbl_agg", ".tse_agg", ".tse")

Mode = Literal["binary_30", "binary_any13", "multi_binary", "multi_label", "multi_class_5", "multi_class_6"]


@dataclass(frozen=True, kw_only=True)
class Tuar(tuh.TuhLabelledCorpus):
    """TUH EEG Artifact Corpus: artifacts per window or per channel, 22 bipolar channels, 256 Hz, 5 s."""

    name: ClassVar[str] = "tuar"
    title: ClassVar[str] = "TUH EEG Artifact Corpus (TUAR)"
    layout: ClassVar[str] = (
        "edf/{01_tcp_ar,02_tcp_le,03_tcp_ar_a}/**/<subject>_sNNN_tNNN.edf with .csv beside (v1 to v3)"
    )
    expected: ClassVar[Expected] = Expected(
        windows={"train": 49_241, "validation": 5_870, "test": 5_179},
        recordings=310,
        subjects=213,
        source="LUNA, arXiv 2510.22257, table 11; recordings and subjects: TUAR v3.0.1, of which 03_tcp_ar_a is unused",
    )
    split_options: ClassVar[frozenset[str]] = frozenset({"seed", "split_unit"})

    labels: Mode = "binary_30"
    """binary_30: any of 18 labels on any channel for >= 30 % of the window (the reference's "Binary"); binary_any13:
    any of 13 labels on any channel for any sample (as papers describe it); multi_binary: the first rule per channel;
    multi_label: family per channel, 0..5; multi_class_5, multi_class_6: one family per window, without or with
    "normal"; windows with several are left out"""
    label_set: Literal["reference", "artifacts"] = "reference"
    """reference: seizures and elpp count as artifacts in the binary rules, chew_shiv and shiv_musc nowhere;
    artifacts: every artifact label counts, elpp as electrode, seizures do not"""
    several: Literal["drop", "largest"] = "drop"
    """multi_class: windows with more than one family are left out, or get the family with most samples"""
    split_unit: Literal["subject", "file"] = "subject"
    """what 80/10/10 divides; "file" leaks subjects, as the reference does"""
    seed: int = 0
    """of the draw of validation and test subjects"""

    def find(self, root: Path) -> Catalogue:
        """Recordings of the folders 01 and 02; 03 lacks ear electrodes."""
        sources, left_out, bare = [], {}, 0
        for name, path in files_below(root, ".edf"):
            montage = tuh.montage_folder(name)
            if montage[:2] not in ("01", "02"):
                left_out[name] = (
                    f"{montage} has no ear electrodes, 22 pairs need them" if montage else "in no montage folder"
                )
                continue
            try:
                stem = tuh.parse_stem(path.stem)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            found = annotation_file(path, _ANNOTATIONS)
            bare += found is None
            companions = () if found is None else (found,)
            sources.append(
                Source(path, name, stem.subject, stem.session, classes=_families_in(found), companions=companions)
            )
        if not sources:
            raise unknown_layout(self, root, left_out)
        warning = f"{bare} recordings have no annotation file: all their windows count as free of artifacts"
        return Catalogue(sources, left_out, (warning,) if bare else ())

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; its windows are labelled by the rule of `labels`."""
        recording = tuh.read_electrodes(source.path, tuh.ELECTRODES)
        events = [event for path in source.companions for event in read_annotations(path)]
        per_channel = any(path.suffix.lower() == ".csv" for path in source.companions)
        pairs = wanted_names(self.common_chain().montage) or ()
        known = {*_FAMILY, *_OVERLOOKED, *_NO_ARTIFACT}
        unknown = sum(event.label not in known for event in events)
        places = {*pairs} if per_channel else {*pairs, TERM}  # a csv has a row for each channel
        elsewhere = sum(event.channel not in places for event in events)
        events = [event for event in events if event.channel in places]
        notes = [] if source.companions else ["no annotation file: all windows count as free of artifacts"]
        notes += [f"{unknown} annotations have a label that is none of the corpus"] if unknown else []
        notes += [f"{elsewhere} annotations are on a channel that is none of the 22"] if elsewhere else []
        rule = functools.partial(self._label_windows, events, pairs)
        yield Piece(recording.noting(*notes), label_windows=rule)

    def split(self, catalogue: Catalogue) -> Division:
        """80/10/10 by subject (or by file), proportional in the sets of artifact families."""
        sources = catalogue.sources
        if self.split_unit == "file":
            sources = [Source(s.path, s.name, s.name, classes=s.classes) for s in sources]
        rule = f"80 % train, 10 % validation, 10 % test by {self.split_unit}"
        parts, rule = divide_subjects(sources, validation=0.1, test=0.1, seed=self.seed, rule=rule)
        return Division(parts, unit="subject" if self.split_unit == "subject" else "recording", rule=rule)

    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the label numbers."""
        if self.labels in ("binary_30", "binary_any13", "multi_binary"):
            return ("clean", "artifact")
        return FAMILIES[1:] if self.labels == "multi_class_5" else FAMILIES

    def _label_windows(
        self, events: Sequence[Event], pairs: Sequence[str], starts: np.ndarray, n: int
    ) -> Sequence[Label | Drop]:
        if self.labels == "binary_any13":
            artifact = _anywhere(self._mask(events, pairs, n, set(self._families)))
            return (covered(artifact, starts, self.n_times) > 0).astype(int).tolist()
        if self.labels in ("binary_30", "multi_binary"):
            artifact = self._mask(events, pairs, n, self._binary_labels)
            artifact = artifact if self.labels == "multi_binary" else _anywhere(artifact)
            enough = _enough(covered(artifact, starts, self.n_times), self.n_times).astype(int)
            return [tuple(row) for row in enough.T.tolist()] if self.labels == "multi_binary" else enough.tolist()
        if self.labels == "multi_label":
            return [tuple(row) for row in self._family_per_channel(events, pairs, starts, n).T.tolist()]
        return self._family_of_window(events, pairs, starts, n)

    @property
    def _families(self) -> dict[str, int]:
        return _FAMILY if self.label_set == "reference" else _FAMILY | _OVERLOOKED

    @property
    def _binary_labels(self) -> set[str]:
        return {*_FAMILY, "elpp", *_SEIZURES} if self.label_set == "reference" else set(self._families)

    def _mask(self, events: Sequence[Event], pairs: Sequence[str], n: int, labels: set[str]) -> np.ndarray:
        """(C,n) bool: samples under one of the labels."""
        mask = np.zeros((len(pairs), n), dtype=bool)
        for event in events:
            if event.label in labels:
                mask[_rows(event, pairs), samples(event, self.chain_settings.sfreq, n)] = True
        return mask

    def _family_per_channel(
        self, events: Sequence[Event], pairs: Sequence[str], starts: np.ndarray, n: int
    ) -> np.ndarray:
        """(C,w): the most frequent number among those on >= 30 % of the window (ties: the smaller), else 0.

        A later row overwrites an earlier one, and one that is no artifact overwrites with 0.
        """
        codes = np.zeros((len(pairs), n), dtype=np.int8)
        for event in events:
            where = _rows(event, pairs), samples(event, self.chain_settings.sfreq, n)
            codes[where] = self._families.get(event.label, 0)
        counts = np.stack([covered(codes == k, starts, self.n_times) for k in range(len(FAMILIES))])
        return np.where(_enough(counts, self.n_times), counts, 0).argmax(axis=0)

    def _family_of_window(
        self, events: Sequence[Event], pairs: Sequence[str], starts: np.ndarray, n: int
    ) -> list[Label | Drop]:
        """Our rule of one label per window (the published one is unknown): families on >= 30 % of it, on any channel.

        A combined label (eyem_musc) counts for both of its families. None: 0; one: its number; several: `several`.
        """
        masks = np.zeros((len(FAMILIES), n), dtype=bool)
        for event in events:
            if event.label in self._families and (event.channel in pairs or event.channel == TERM):
                for part in event.label.split("_"):
                    masks[_PARTS_OF_LABEL[part], samples(event, self.chain_settings.sfreq, n)] = True
        counts = covered(masks, starts, self.n_times)
        found = _enough(counts, self.n_times)
        labels: list[Label | Drop] = []
        for own, present in zip(counts.T, found.T, strict=True):
            if present.sum() > 1 and self.several == "drop":
                labels.append(Drop("several artifact families"))
            elif not present.any() and self.labels == "multi_class_5":
                labels.append(Drop("no artifact"))
            else:
                family = int(np.where(present, own, 0).argmax()) if present.any() else 0
                labels.append(family - (self.labels == "multi_class_5"))
        return labels


def _rows(event: Event, pairs: Sequence[str]) -> list[int]:
    """Rows of an event: its channel; every one for an event of the whole montage; none for other channels."""
    if event.channel == TERM:
        return list(range(len(pairs)))
    return [pairs.index(event.channel)] if event.channel in pairs else []


def _anywhere(mask: np.ndarray) -> np.ndarray:
    """(n,) whether any channel of (C,n) is True."""
    return np.logical_or.reduce(mask, axis=0)


def _enough(counts: np.ndarray, n_times: int) -> np.ndarray:
    """At least 30 % of a window, without rounding."""
    return 10 * counts >= 3 * n_times


def _families_in(path: Path | None) -> tuple[int, ...]:
    """Families that an annotation file names; none for a file that cannot be read (reading it says why)."""
    if path is None:
        return ()
    try:
        events = read_annotations(path)
    except (ValueError, OSError):
        return ()
    return tuple(sorted({_FAMILY[event.label] for event in events if event.label in _FAMILY}))
