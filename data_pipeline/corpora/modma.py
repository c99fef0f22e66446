"""MODMA: major depression or healthy, at rest, 128 channels (data.md 8.10)."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.corpora.base import Catalogue, Corpus, Division, Expected, Piece, Source, files_below, unknown_layout
from data_pipeline.corpora.matlab import read_numeric
from data_pipeline.corpora.published_splits import divide_by_place, unexpected_counts
from data_pipeline.montages import CHANNEL_ORDERS, Montage, electrode_positions
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.recording import Recording

_ID = re.compile(r"(\d{4})(\d{4})\D.*", re.DOTALL)
_LABELS = {"0201": 1, "0202": 0, "0203": 0}
_ROWS = 129  # E1 to E128 and the reference Cz, which is zero
_SFREQ = 250.0
_COUNTS = {1: 24, 0: 29}
_PLACES = {1: (slice(0, 14), slice(14, 19), slice(19, 24)), 0: (slice(0, 15), slice(15, 22), slice(22, 29))}


@dataclass(frozen=True, kw_only=True)
class Modma(Corpus):
    """MODMA: major depression or healthy, at rest, 128 channels, 250 Hz, 5.12 s."""

    name: ClassVar[str] = "modma"
    title: ClassVar[str] = "MODMA, resting EEG of 128 channels"
    source: ClassVar[str] = "http://modma.lzu.edu.cn/data/index/ (EEG_128channels_resting_lanzhou_2015)"
    licence: ClassVar[str] = "research, after an application to Lanzhou University; may not be passed on"
    citation: ClassVar[str] = (
        "Cai et al., A multi-modal open dataset for mental-disorder analysis, Sci. Data 9:178, 2022"
    )
    layout: ClassVar[str] = "<8 digits>rest <date> <time>.mat, 53 files"
    expected: ClassVar[Expected] = Expected(recordings=53, subjects=53, source="24 with depression, 29 healthy")
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="modma-128", notch=50.0, sfreq=_SFREQ, flat="keep", accept_units=True
    )
    window: ClassVar[float] = 5.12
    stride: ClassVar[float] = 5.12

    channels: Literal[128, 13] = 128
    """E1 to E128, or the published choice of 13"""
    positions: Literal["template", "head"] = "template"
    """frame of the electrode positions: the template's own numbers, as the reference has them for this corpus only, or
    the head frame, as for all others"""

    def find(self, root: Path) -> Catalogue:
        """Subject and class from the first digits of the names; the table of subjects is not needed."""
        sources, left_out, seen = [], {}, {}
        for name, path in files_below(root, ".mat"):
            found = _ID.fullmatch(path.name)
            label = _LABELS.get(found[1]) if found else None
            if found is None or label is None:
                left_out[name] = f"its name {path.name!r} does not begin with 0201, 0202 or 0203 and 4 more digits"
            elif found[1] + found[2] in seen:
                left_out[name] = f"a second file of subject {found[1]}{found[2]}, beside {seen[found[1] + found[2]]}"
            else:
                seen[found[1] + found[2]] = name
                sources.append(Source(path, name, found[1] + found[2], label=label))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out, unexpected_counts(sources, _COUNTS, self.class_names()))

    def read(self, source: Source) -> Iterator[Piece]:
        """The whole recording without Cz."""
        variables = read_numeric(source.path)
        wanted = CHANNEL_ORDERS[self._order()]
        rows = [int(name[1:]) - 1 for name in wanted]
        signal = _signal(variables)[rows].astype(np.float64)
        recording = Recording(signal, _sfreq(variables), wanted, unit="uV (documented)")
        yield Piece(recording, label=source.label)

    def common_chain(self) -> PreprocessConfig:
        """With the order of the chosen channels."""
        return dataclasses.replace(self.chain_settings, montage=self._order())

    def placed(self, montage: Montage) -> Montage:
        """At the template's own positions, under another name, unless the head frame is asked for."""
        if self.positions == "head":
            return montage
        locations = electrode_positions(montage.ch_names, frame="template")
        return Montage(f"{montage.name}-template", montage.ch_names, locations.astype(np.float32))

    def split(self, catalogue: Catalogue) -> Division:
        """Places in the order of the last four digits within each class."""
        everyone = {source.subject: source.label for source in catalogue.sources}
        by_number = sorted(everyone, key=lambda subject: (subject[4:], subject))
        order = {label: [s for s in by_number if everyone[s] == label] for label in _PLACES}
        rule = "by the last 4 digits: depression 14 train, 5 validate, 5 test; healthy 15, 7, 7"
        return divide_by_place(catalogue.sources, order, _PLACES, rule)

    def class_names(self) -> tuple[str, ...]:
        """Class 1 is depression."""
        return ("healthy", "depression")

    def _order(self) -> str:
        return f"modma-{self.channels}"


def _signal(variables: Mapping[str, np.ndarray]) -> np.ndarray:
    """(129,T): the only numeric matrix with 129 rows, whatever its name. Raises ValueError for none or several."""
    found = {
        name: value for name, value in variables.items() if value.ndim == 2 and len(value) == _ROWS < value.shape[1]
    }
    if len(found) != 1:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in variables.items()) or "no numeric variable"
        raise ValueError(f"expected one matrix of {_ROWS} channels by samples, found {len(found)} among {shapes}")
    return next(iter(found.values()))


def _sfreq(variables: Mapping[str, np.ndarray]) -> float:
    """What a scalar named like a sampling rate says, else the documented 250 Hz."""
    stated = [value for name, value in variables.items() if "rate" in name.lower() and value.size == 1]
    return float(stated[0].squeeze()) if stated else _SFREQ
