"""Siena: long scalp recordings of 14 persons with epilepsy, for pre-training (data.md 8.2)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.corpora import tuh
from data_pipeline.corpora.base import Catalogue, Corpus, Expected, Piece, Source, files_below, unknown_layout
from data_pipeline.montages import CHANNEL_ORDERS
from data_pipeline.preprocess import PreprocessConfig

_FILE = re.compile(r"(PN\d\d)-[\w.]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Siena(Corpus):
    """Siena Scalp EEG Database for pre-training: 29 channels as recorded, 256 Hz, 5 s, no labels."""

    name: ClassVar[str] = "siena"
    title: ClassVar[str] = "Siena Scalp EEG Database"
    source: ClassVar[str] = "https://physionet.org/content/siena-scalp-eeg/1.0.0/"
    licence: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = "Detti et al., EEG Synchronization Analysis for Seizure Prediction, Processes 8:846, 2020"
    layout: ClassVar[str] = "PNxx/PNxx-N.edf (PhysioNet 1.0.0)"
    expected: ClassVar[Expected] = Expected(
        windows={"train": 101_520}, subjects=14, source="LUNA, arXiv 2510.22257, table 11"
    )
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="siena-29", notch=50.0, flat="keep", accept_units=True
    )

    def find(self, root: Path) -> Catalogue:
        """The recordings; lists of seizures are not used."""
        sources, left_out = [], {}
        for name, path in files_below(root, ".edf"):
            found = _FILE.fullmatch(path.stem)
            if found is None:
                left_out[name] = f"its name {path.stem!r} is not PNxx-N"
            else:
                sources.append(Source(path, name, found[1].upper()))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording; all 29 electrodes are required."""
        yield Piece(tuh.read_electrodes(source.path, CHANNEL_ORDERS["siena-29"]))
