"""What the corpora of Temple University Hospital share: file names, montage folders, electrodes, the signal chain."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

from data_pipeline.corpora.base import Corpus
from data_pipeline.montages import find_name, normalize_name
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.readers import read_recording
from data_pipeline.recording import Recording

_NAMES = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 A1 A2 FZ CZ PZ"
ELECTRODES = tuple(_NAMES.split())
LICENCE = "free of charge after registration with NEDC; may not be passed on"
SOURCE = "https://isip.piconepress.com/projects/nedc/html/tuh_eeg/"
CITATION = "Obeid & Picone, The Temple University Hospital EEG Data Corpus, Front. Neurosci. 10:196, 2016"
_STEM = re.compile(r"(?:.*_)?(?P<subject>[^_]+)_(?P<session>s\d+)_(?P<token>t\d+)", re.IGNORECASE)
_MONTAGE = re.compile(r"0[1-4]_tcp_\w+", re.IGNORECASE)


@dataclass(frozen=True)
class TuhName:
    """Fields of a stem `<subject>_s<NNN>_t<NNN>`; a few stems have a prefix, so the last three count."""

    subject: str
    session: str
    token: str


def parse_stem(stem: str) -> TuhName:
    """Raises ValueError for a stem of another form."""
    found = _STEM.fullmatch(stem)
    if found is None:
        raise ValueError(f"its name {stem!r} is not <subject>_sNNN_tNNN")
    return TuhName(found["subject"].lower(), found["session"].lower(), found["token"].lower())


def montage_folder(name: str) -> str:
    """`01_tcp_ar`, `02_tcp_le`, `03_tcp_ar_a` or `04_tcp_le_a`, whichever component of the path it is; else ''."""
    return next((part.lower() for part in PurePosixPath(name).parts[:-1] if _MONTAGE.fullmatch(part)), "")


def read_electrodes(path: Path, electrodes: tuple[str, ...]) -> Recording:
    """The recording with these electrodes only, in the order of the file.

    Raises ValueError naming the electrodes that the file lacks.
    """
    recording = read_recording(path)
    names = tuple(normalize_name(label) for label in recording.ch_names)
    found = {electrode: find_name(electrode, names) for electrode in electrodes}
    missing = [electrode for electrode, name in found.items() if name is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)} of the {len(electrodes)} electrodes that are required")
    rows = sorted(names.index(name) for name in found.values() if name is not None)
    others = [label for i, label in enumerate(recording.ch_names) if i not in rows]
    return recording.pick(rows, dropped=dict.fromkeys(others, "not one of the required electrodes"))


@dataclass(frozen=True, kw_only=True)
class TuhCorpus(Corpus):
    """The chain of all TUH corpora: 0.1-75 Hz, notch 60 Hz, 256 Hz, bipolar pairs, windows of 5 s (data.md 8.0)."""

    source: ClassVar[str] = SOURCE
    licence: ClassVar[str] = LICENCE
    citation: ClassVar[str] = CITATION
    # The units are known and nothing is rejected for its amplitude; the report lists what is implausible.
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        montage="tuh-bipolar-22", notch=60.0, flat="keep", accept_units=True
    )


@dataclass(frozen=True, kw_only=True)
class TuhLabelledCorpus(TuhCorpus):
    """TUAB, TUAR and TUSL: 22 pairs, all 21 electrodes required."""

    channel_order: Literal["L", "D"] = "L"
    """order of the 22 pairs: L = as in pre-training; D = as the reference's files of these corpora hold them"""

    def common_chain(self) -> PreprocessConfig:
        """The pairs in the order asked for."""
        order = {"L": "tuh-bipolar-22", "D": "tuh-bipolar-22-disk"}[self.channel_order]
        return dataclasses.replace(self.chain_settings, montage=order)
