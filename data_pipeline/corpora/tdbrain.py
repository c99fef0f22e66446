"""TDBrain: Parkinson's disease or healthy, eyes closed (data.md 8.8)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.corpora.base import Catalogue, Corpus, Division, Expected, Piece, Source
from data_pipeline.corpora.tables import number, read_rows, read_samples
from data_pipeline.montages import CHANNEL_ORDERS, normalize_name
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.recording import Recording

_TABLE = "TDBRAIN_participants_V2.tsv"
_INDICATIONS = {"PARKINSON": 1, "HEALTHY": 0}
_COUNTS = {1: 25, 0: 47}
_SFREQ = 500.0
_CHANNELS = CHANNEL_ORDERS["tdbrain-26"]
_FIRST_HEALTHY = 26  # pseudo-id; those with Parkinson's disease are 1 to 25
_IDS = {  # pseudo-ids of each part; 26 to 28 and those from 54 on are in none
    "train": {*range(1, 18), *range(29, 46)},
    "validation": {*range(18, 22), *range(46, 50)},
    "test": {*range(22, 26), *range(50, 54)},
}


@dataclass(frozen=True, kw_only=True)
class TdBrain(Corpus):
    """TDBrain: Parkinson's disease or healthy, eyes closed, 26 channels, 256 Hz, 1.25 s."""

    name: ClassVar[str] = "tdbrain"
    title: ClassVar[str] = "Two Decades Brainclinics (TDBRAIN), Parkinson's disease"
    source: ClassVar[str] = "https://www.brainclinics.com/resources (registration; data on Synapse)"
    licence: ClassVar[str] = "free of charge for registered users of Synapse under the terms of Brainclinics"
    citation: ClassVar[str] = "van Dijk et al., The two decades brainclinics research archive, Sci. Data 9:333, 2022"
    layout: ClassVar[str] = f"{_TABLE} and derivatives/<sub>/ses-1/eeg/<sub>_ses-1_task-restEC_eeg.csv"
    expected: ClassVar[Expected] = Expected(
        recordings=50, subjects=50, source="25 with Parkinson and 25 of 47 healthy; Medformer, arXiv 2405.19363"
    )
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="tdbrain-26", notch=50.0, flat="keep", accept_units=True
    )
    window: ClassVar[float] = 1.25
    stride: ClassVar[float] = 1.25

    def find(self, root: Path) -> Catalogue:
        """Subjects in the order of their first row that fits: their pseudo-ids, by which the split goes.

        The reference numbers them in the order of a set, which changes from run to run and cannot be reproduced.
        """
        order = self._subjects(root)
        sources, left_out = [], {}
        for label, subjects in order.items():
            for place, subject in enumerate(subjects):
                name = f"derivatives/{subject}/ses-1/eeg/{subject}_ses-1_task-restEC_eeg.csv"
                if not (root / name).is_file():
                    left_out[name] = f"{_TABLE} names {subject}, and the file does not exist"
                    continue
                pseudo_id = place + (1 if label else _FIRST_HEALTHY)
                sources.append(Source(root / name, name, subject, f"ses-1, pseudo-id {pseudo_id}", label=label))
        if not sources:
            found = f"{_TABLE} names {sum(map(len, order.values()))} subjects that fit, none with a file"
            raise ValueError(f"{root} does not hold {self.title}: expected {self.layout}; {found}")
        names = {label: indication.lower() for indication, label in _INDICATIONS.items()}
        warnings = [
            f"{len(order[label])} subjects are {names[label]} with eyes closed, {count} were expected: the published "
            "split may mean others"
            for label, count in _COUNTS.items()
            if len(order[label]) != count
        ]
        return Catalogue(sources, left_out, warnings)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording. Raises ValueError when an electrode lacks."""
        with source.path.open(encoding="utf-8-sig", errors="replace") as file:
            header = [normalize_name(cell.strip().strip('"')) for cell in file.readline().split(",")]
        missing = [name for name in _CHANNELS if name not in header]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)} of the {len(_CHANNELS)} channels")
        signal = read_samples(source.path, [header.index(n) for n in _CHANNELS], delimiter=",", header_lines=1)
        others = {name: "not one of the 26 channels" for name in header if name not in _CHANNELS}
        recording = Recording(signal, _SFREQ, _CHANNELS, unit="uV (documented)", dropped=others)
        yield Piece(recording, label=source.label)

    def split(self, catalogue: Catalogue) -> Division:
        """34, 8 and 8 subjects, half of each with Parkinson's disease."""
        parts, left_out = {}, {}
        for source in catalogue.sources:
            pseudo_id = int(source.session.rsplit(" ", 1)[1])
            part = next((part for part, ids in _IDS.items() if pseudo_id in ids), "")
            if part and (pseudo_id < _FIRST_HEALTHY) == bool(source.label):  # a 26th patient is no healthy person
                parts[source.name] = part
            else:
                left_out[source.name] = f"pseudo-id {pseudo_id} is in no part of the published split"
        rule = "pseudo-ids 1-17 and 29-45 train, 18-21 and 46-49 validate, 22-25 and 50-53 test"
        return Division(parts, rule=rule, left_out=left_out)

    def class_names(self) -> tuple[str, ...]:
        """Class 1 is Parkinson's disease."""
        return ("healthy", "parkinson")

    def _subjects(self, root: Path) -> dict[int, list[str]]:
        """Class number -> subjects with eyes closed, each once, in the order of the table."""
        order: dict[int, list[str]] = {1: [], 0: []}
        for row in _participants(self, root):
            label = _INDICATIONS.get(row["indication"].upper())
            if label is None or number(row["ec"]) != 1.0 or not row["participants_id"]:
                continue
            subject = f"sub-{row['participants_id'].removeprefix('sub-')}"
            if subject not in order[label]:
                order[label].append(subject)
        return order


def _participants(corpus: Corpus, root: Path) -> list[Mapping[str, str]]:
    """Rows of the table of participants, columns in lower case."""
    path = root / _TABLE
    if not path.is_file():
        raise ValueError(f"{root} does not hold {corpus.title}: expected {corpus.layout}; found no {_TABLE}")
    rows = [{key.lower(): value for key, value in row.items()} for row in read_rows(path)]
    missing = {"participants_id", "indication", "ec"} - set(rows[0] if rows else {})
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}, or no rows")
    return rows
