"""APAVA: Alzheimer's disease or healthy, trials of 5 s (data.md 8.7)."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.corpora.base import (
    PARTS,
    Catalogue,
    Corpus,
    Division,
    Expected,
    Piece,
    Source,
    files_below,
    unknown_layout,
)
from data_pipeline.corpora.matlab import read_struct
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.recording import Recording

_FILE = re.compile(r"preproctrials(\d{1,2})", re.IGNORECASE)
_COUNT = 23
_ALZHEIMER = frozenset({1, 3, 6, 8, 9, 11, 12, 13, 15, 17, 19, 21})
_PLACES = {"validation": {15, 16, 19, 20}, "test": {1, 2, 17, 18}}


@dataclass(frozen=True, kw_only=True)
class Apava(Corpus):
    """APAVA: Alzheimer's disease or healthy, 16 channels, 256 Hz, trials of 5 s."""

    name: ClassVar[str] = "apava"
    title: ClassVar[str] = "APAVA, Alzheimer's disease"
    source: ClassVar[str] = "https://osf.io/jbysn/"
    licence: ClassVar[str] = "none stated with the files: ask their authors before passing them on"
    citation: ClassVar[str] = "Escudero et al., Physiological Measurement 27:1091, 2006"
    layout: ClassVar[str] = "preproctrials01.mat ... preproctrials23.mat"
    expected: ClassVar[Expected] = Expected(
        windows={"train": 347, "validation": 157, "test": 159},
        recordings=_COUNT,
        subjects=_COUNT,
        source="trials in the files; subjects of the parts: Medformer, arXiv 2405.19363",
    )
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="apava-16", notch=50.0, flat="keep", accept_units=True
    )

    filtering: Literal["fir", "detrend", "none"] = "fir"
    """fir: the band-pass and notch of all corpora, as the reference, though their 33 s are mostly padding around a
    trial of 5 s; detrend: subtract the straight line of each channel; none: as in the file"""

    def find(self, root: Path) -> Catalogue:
        """Subject numbers from the file names, whatever the order of the folder."""
        sources, left_out = [], {}
        for name, path in files_below(root, ".mat"):
            found = _FILE.fullmatch(path.stem)
            subject = int(found[1]) if found else 0
            if not 1 <= subject <= _COUNT:
                left_out[name] = f"its name {path.stem!r} is not preproctrials01 to preproctrials{_COUNT}"
                continue
            sources.append(Source(path, name, f"{subject:02d}", label=int(subject in _ALZHEIMER)))
        if not sources:
            raise unknown_layout(self, root, left_out)
        return Catalogue(sources, left_out)

    def read(self, source: Source) -> Iterator[Piece]:
        """One piece per trial. Raises ValueError for a file that is not the published structure."""
        data = read_struct(source.path, "data")
        missing = [field for field in ("label", "fsample", "trial") if field not in (data.dtype.names or ())]
        if missing:
            raise ValueError(f"its structure has no field {', '.join(missing)}")
        labels = tuple(str(np.asarray(cell).squeeze()) for cell in data["label"].reshape(-1))
        sfreq = float(np.asarray(data["fsample"]).squeeze())
        for number, trial in enumerate(data["trial"].reshape(-1), 1):
            signal = np.asarray(trial, dtype=np.float64)
            if signal.ndim != 2 or len(signal) != len(labels):
                raise ValueError(f"trial {number} is {signal.shape}: expected {len(labels)} channels by samples")
            recording = Recording(signal, sfreq, labels, unit="not stated, taken as uV")
            yield Piece(self._detrended(recording), label=source.label, name=f"trial{number:02d}")

    def common_chain(self) -> PreprocessConfig:
        """Without filters when they are not asked for."""
        if self.filtering == "fir":
            return self.chain_settings
        return dataclasses.replace(self.chain_settings, l_freq=None, h_freq=None, notch=None)

    def split(self, catalogue: Catalogue) -> Division:
        """The published subjects."""
        parts = {
            source.name: next((p for p in PARTS[1:] if int(source.subject) in _PLACES[p]), "train")
            for source in catalogue.sources
        }
        return Division(parts, rule="subjects 1 2 17 18 test, 15 16 19 20 validate, the other 15 train")

    def class_names(self) -> tuple[str, ...]:
        """Class 1 is Alzheimer's disease."""
        return ("healthy", "alzheimer")

    def _detrended(self, recording: Recording) -> Recording:
        if self.filtering != "detrend":
            return recording
        import scipy.signal

        return dataclasses.replace(recording, signal_uv=scipy.signal.detrend(recording.signal_uv, axis=1))
