"""The files of a BIDS-EEG data set: entities in names, and sidecars by the inheritance principle (BIDS 1.10)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from data_pipeline.corpora.tables import MISSING, number, read_rows

SUFFIXES = (".edf", ".bdf", ".vhdr", ".set", ".fif")
_NOT_RAW = ("derivatives", "sourcedata", "code", "stimuli")
_TO_METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
_LANDMARKS = {"nasion": ("nas", "nasion"), "lpa": ("lpa", "left"), "rpa": ("rpa", "right")}


@dataclass(frozen=True)
class BidsName:
    """`sub-01_ses-02_task-rest_run-1_eeg` -> entities {"sub": "01", ...} and the suffix "eeg"."""

    entities: Mapping[str, str]
    suffix: str


def parse_name(stem: str) -> BidsName | None:
    """None for a stem that is not made of entities and a suffix."""
    *pairs, suffix = stem.split("_")
    entities = {}
    for pair in pairs:
        key, dash, value = pair.partition("-")
        if not (key and dash and value):
            return None
        entities[key] = value
    return BidsName(entities, suffix) if suffix and "-" not in suffix else None


def why_not_raw_eeg(name: str) -> str:
    """'' for the path of a raw EEG recording inside the data set, else one clause."""
    path = PurePosixPath(name)
    if path.parts[0] in _NOT_RAW:
        return f"below {path.parts[0]}/: not raw data"
    found = parse_name(path.stem)
    if found is None or found.suffix != "eeg" or "sub" not in found.entities:
        return f"its name {path.stem!r} is not sub-<label>[_ses-...][_task-...][_run-...]_eeg"
    if path.parent.name != "eeg" or path.parts[0] != f"sub-{found.entities['sub']}":
        return f"not in sub-{found.entities['sub']}/[ses-.../]eeg/"
    if found.entities.get("split", "01").lstrip("0") not in ("1", ""):
        return "a later part of a divided recording: read with its first part"
    return ""


def sidecar(root: Path, recording: Path, suffix: str) -> Path | None:
    """The file with this end (`channels.tsv`) that applies to a recording, None without any.

    It lies in the recording's folder or above, inside `root`, and names no entity (but `space`) that the recording has
    not: the nearest counts, of several there the one with most entities.
    """
    own = parse_name(recording.stem)
    if own is None:
        return None
    wanted, extension = suffix.split(".")
    for folder in (recording.parent, *recording.parent.parents):
        found = []
        for path in sorted(folder.glob(f"*{wanted}.{extension}")):
            name = parse_name(path.stem)
            entities = {k: v for k, v in (name.entities if name else {}).items() if k != "space"}
            if name is not None and name.suffix == wanted and entities.items() <= own.entities.items():
                found.append((len(entities), path))
        if found:
            return max(found, key=lambda item: item[0])[1]
        if folder == root:
            return None
    return None


def participants(root: Path, column: str) -> dict[str, str]:
    """Subject (`sub-01`) -> its cell in a column of participants.tsv; subjects whose cell says nothing are left out.

    Raises ValueError without the table or the column.
    """
    path = root / "participants.tsv"
    if not path.is_file():
        raise ValueError(f"--label-column {column}: {path} does not exist")
    rows = read_rows(path)
    if not rows or column not in rows[0] or "participant_id" not in rows[0]:
        columns = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"--label-column {column}: {path} has no column {column} beside participant_id: {columns}")
    return {
        f"sub-{row['participant_id'].removeprefix('sub-')}": row[column]
        for row in rows
        if row[column].lower() not in MISSING
    }


@dataclass(frozen=True)
class Positions:
    """Electrode -> (3,) metres in the head frame, and a sentence for the manifest."""

    of: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: str = ""


def electrode_table(electrodes: Path, coordsystem: Path | None) -> Positions:
    """Positions of electrodes.tsv, moved to the head frame by the landmarks of coordsystem.json.

    CapTrak without landmarks is taken as the head frame, which it is by definition; any other frame without landmarks
    cannot be moved, and gives no positions.
    """
    about = json.loads(coordsystem.read_text(encoding="utf-8-sig")) if coordsystem else {}
    unit = str(about.get("EEGCoordinateUnits", "m")).lower()
    if unit not in _TO_METRES:
        return Positions(note=f"positions of electrodes.tsv are not used: unit {unit!r}")
    points = {row.get("name", ""): [number(row.get(axis, "")) for axis in "xyz"] for row in read_rows(electrodes)}
    metres = {
        name: np.array(xyz, dtype=np.float64) * _TO_METRES[unit] for name, xyz in points.items() if None not in xyz
    }
    landmarks = _landmarks(about, metres)
    if len(landmarks) == len(_LANDMARKS):
        return Positions(_to_head(metres, landmarks), "positions of electrodes.tsv, moved to the head frame")
    if str(about.get("EEGCoordinateSystem", "")).lower() == "captrak":
        return Positions(metres, "positions of electrodes.tsv, in the CapTrak frame, taken as the head frame")
    frame = about.get("EEGCoordinateSystem", "not stated")
    return Positions(note=f"positions of electrodes.tsv are not used: frame {frame}, without nasion and ear points")


def _landmarks(about: Mapping, metres: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """nasion, lpa, rpa in metres: from coordsystem.json, else from rows of electrodes.tsv."""
    stated: dict[str, np.ndarray] = {name.lower(): xyz for name, xyz in metres.items()}
    for kind in ("AnatomicalLandmark", "Fiducials"):
        unit = about.get(f"{kind}CoordinateUnits", about.get(f"{kind}Units", about.get("EEGCoordinateUnits", "m")))
        points = about.get(f"{kind}Coordinates", {})
        if isinstance(points, dict) and str(unit).lower() in _TO_METRES:
            factor = _TO_METRES[str(unit).lower()]
            stated |= {name.lower(): np.array(xyz, dtype=np.float64) * factor for name, xyz in points.items()}
    found = {}
    for landmark, names in _LANDMARKS.items():
        known = [stated[name] for name in names if name in stated and stated[name].shape == (3,)]
        if known:
            found[landmark] = known[0]
    return found


def _to_head(metres: Mapping[str, np.ndarray], landmarks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import mne

    montage = mne.channels.make_dig_montage(dict(metres), **landmarks, coord_frame="unknown")
    return mne.channels.montage.transform_to_head(montage).get_positions()["ch_pos"]
