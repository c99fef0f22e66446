"""Files to recordings: which files of a folder are recordings, and reading one, by content and suffix."""

import dataclasses
import re
from pathlib import Path

from data_pipeline.readers import mne_formats
from data_pipeline.readers.text_formats import describe_text, read_text
from data_pipeline.recording import Recording

_MNE_READERS = {
    ".edf": mne_formats.read_edf,
    ".rec": mne_formats.read_edf,
    ".bdf": mne_formats.read_edf,
    ".fif": mne_formats.read_fif,
    ".vhdr": mne_formats.read_brainvision,
    ".ahdr": mne_formats.read_brainvision,
    ".set": mne_formats.read_eeglab,
}
_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".arff")
_COMPANION_OF = {".eeg": ".vhdr", ".vmrk": ".vhdr", ".avg": ".vhdr", ".fdt": ".set"}
_POSITION_SUFFIXES = (".hpts", ".locs", ".loc", ".elc", ".sfp", ".ced", ".bvct", ".bvef", ".elp")


def why_not_a_recording(path: Path) -> str:
    """'' for a file worth reading as a recording, else one clause that says what it is instead."""
    suffix = path.suffix.lower()
    if suffix in _MNE_READERS:
        return ""
    if suffix in _COMPANION_OF:
        return f"data or markers that belong to a {_COMPANION_OF[suffix]} file and are read through it"
    if suffix in _POSITION_SUFFIXES:
        return "electrode positions, not a recording"
    if suffix in _TEXT_SUFFIXES:
        return describe_text(path)
    return "not a format of recordings known here (EDF, BDF, FIF, BrainVision, EEGLAB, CSV/TXT)"


def companions(path: Path) -> list[Path]:
    """The other files that `path` is read from, sorted: they belong to its identity."""
    wanted = [suffix for suffix, header in _COMPANION_OF.items() if header == path.suffix.lower()]
    stem = path.stem
    if path.suffix.lower() == ".vhdr":
        text = path.read_bytes().decode("utf-8", errors="replace")
        named = [name.strip().replace("$b", stem) for name in re.findall(r"(?m)^(?:DataFile|MarkerFile)=(.*)$", text)]
        return sorted(p for p in (path.parent / name for name in named) if _is_file(p))
    return sorted(p for p in (path.with_suffix(suffix) for suffix in wanted) if _is_file(p))


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name from a damaged header may be none that a file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_recording(path: str | Path, *, text_sfreq: float | None = None) -> Recording:
    """Read one file; `text_sfreq` (hertz) is the rate of text files that do not say theirs.

    Subject and session come from BIDS-style names (`sub-01`, `ses-02`) in the path, else they are empty.
    Raises ValueError whose message is one sentence starting with the file's name.
    """
    path = Path(path)
    try:
        reason = why_not_a_recording(path)
        if reason:
            raise ValueError(reason)
        reader = _MNE_READERS.get(path.suffix.lower())
        recording = reader(path) if reader else read_text(path, sfreq=text_sfreq)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    subject, session = (re.search(rf"(?:^|[_/\\]){key}-([A-Za-z0-9]+)", str(path)) for key in ("sub", "ses"))
    return dataclasses.replace(
        recording, subject=subject[0].lstrip("_/\\") if subject else "", session=session[1] if session else ""
    )
