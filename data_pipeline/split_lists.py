"""Published divisions: lists of subjects or recordings per part, as text, CSV or JSON, or a folder of text files.

lists.txt    a line `train:`, `val:` or `test:` begins a part; below it (or behind the colon) one entry per line
lists.csv    a column of ids (subject, recording, file, ...) and one of parts (split, part, set, ...)
lists.json   {"train": [...], "val": [...], "test": [...]}, or {"S01": "train", ...}
lists/       train.txt, val.txt, test.txt with one entry per line
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = ("train", "val", "test")
_CALLED = {
    "train": ("train", "training", "tr"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PART_OF = {name: part for part, names in _CALLED.items() for name in names}
_PART_COLUMNS = ("split", "part", "set", "subset", "partition", "fold")
_ID_COLUMNS = ("subject", "subject_id", "participant", "participant_id", "participants_id", "patient", "patient_id")
_ID_COLUMNS += ("recording", "recording_id", "file", "filename", "id", "name")
_COMMENT = re.compile(r"(?:^|\s)#.*")  # after a blank only: `#trial01` ends the names of recordings


def holds_lists(path: Path) -> bool:
    """Whether a split file is lists of somebody else, not one of `splits.save_split`."""
    if path.is_dir() or path.suffix.lower() in (".txt", ".csv", ".tsv", ".lst"):
        return True
    try:
        content = read_json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and not {"unit", "sha256"} & set(content)


def read_lists(path: Path) -> dict[str, list[str]]:
    """Entries of "train", "val" and "test" (empty where absent), in the order of the file.

    Raises ValueError, one sentence with the file and line, for anything that is not one of the four forms.
    """
    if path.is_dir():
        found = {}
        for own in sorted(path.iterdir()):
            part = _PART_OF.get(own.stem.lower())
            if part is not None and own.suffix.lower() in (".txt", ".lst", ".csv", ""):
                found.setdefault(part, []).extend(line for line in _lines(own) if line)
        return _complete(path, found)
    if path.suffix.lower() == ".json":
        return _complete(path, _from_json(path))
    if path.suffix.lower() in (".csv", ".tsv"):
        return _complete(path, _from_table(path))
    return _complete(path, _from_sections(path))


def read_json(path: Path) -> Any:
    """What a JSON file of a split holds. Raises ValueError, one sentence, for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a split ({error}): make it again") from error


def _complete(path: Path, found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    if not found.get("train"):
        raise ValueError(f"{path} lists nobody for training: expected parts train, val and test")
    for part, entries in found.items():
        twice = sorted(entry for entry, count in Counter(entries).items() if count > 1)
        if twice:
            raise ValueError(f"{path} lists {twice[0]} twice in {part}: take one of them out")
    return {part: list(found.get(part, [])) for part in PARTS}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list ({error})") from error
    return [_COMMENT.sub("", line).strip().rstrip(",") for line in text.splitlines()]


def _from_sections(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for number, line in enumerate(_lines(path), start=1):
        header = re.fullmatch(r"\[?([A-Za-z]+)\]?\s*(:\s*(.*))?", line)
        part = _PART_OF.get(header[1].lower()) if header else None
        if header and part is not None:
            current = found.setdefault(part, [])
            current += re.split(r"[,\s]+", header[3]) if header[3] else []
        elif line and current is None:
            raise ValueError(
                f"{path}, line {number}: {line!r} stands before the first part: begin with a line `train:`"
            )
        elif line and current is not None:
            current.append(line)
    return found


def _from_table(path: Path) -> dict[str, list[str]]:
    lines = [line for line in _lines(path) if line]
    delimiter = max("\t;,", key=lines[0].count) if lines else ","
    reader = csv.DictReader(io.StringIO("\n".join(lines)), delimiter=delimiter, skipinitialspace=True)
    try:
        header, rows = {(name or "").strip().lower(): name for name in reader.fieldnames or []}, list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: cannot be read as a table ({error})") from error
    ids, parts = (next((header[n] for n in names if n in header), None) for names in (_ID_COLUMNS, _PART_COLUMNS))
    if ids is None or parts is None:
        raise ValueError(f"{path} needs a column of ids (subject, recording, file, ...) and one of parts (split, part, "
                         f"set, ...), found {', '.join(header) or 'nothing'}")  # fmt: skip
    found: dict[str, dict[str, None]] = {}
    for number, row in enumerate(rows, start=2):
        entry, name = (row[ids] or "").strip(), (row[parts] or "").strip().lower()
        if name not in _PART_OF or not entry:
            raise ValueError(f"{path}, row {number}: part {name!r} of {entry!r}, expected train, val or test")
        found.setdefault(_PART_OF[name], {})[entry] = None  # a subject has a row for each of its files
    return {part: list(entries) for part, entries in found.items()}


def _from_json(path: Path) -> dict[str, list[str]]:
    content: dict[str, Any] = read_json(path)
    if content and all(isinstance(value, str) for value in content.values()):
        pairs = [(name.lower(), [entry]) for entry, name in content.items()]
    else:
        pairs = [(name.lower(), entries) for name, entries in content.items()]
    found: dict[str, list[str]] = {}
    for name, entries in pairs:
        if name not in _PART_OF or not isinstance(entries, list) or any(isinstance(e, dict | list) for e in entries):
            raise ValueError(f'{path}: {name!r} is not a part with a list of ids: expected {{"train": [...], ...}}')
        found.setdefault(_PART_OF[name], []).extend(str(entry) for entry in entries)
    return found
