"""What became of one file: its identity, its manifest entry, errors as sentences, JSON that is whole or absent."""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

_LONGEST = 500  # characters of a reason
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota: errors of the run, not of a file


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of the bytes of the files, in this order. Raises OSError for one that cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def outcome_of(work: Callable[[], dict], file_name: str) -> tuple[dict, bool]:
    """The entry `work` returns, or a "rejected" entry with one sentence for whatever is wrong with the file.

    The second value says whether it would be the same next time (a lack of memory may pass). Only a full disk raises.
    """
    try:
        return work(), True
    except ValueError as error:
        return _rejected(one_line(str(error).removeprefix(f"{file_name}: "))), True
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return _rejected(f"cannot be read ({one_line(error.strerror or str(error))})"), False
    except MemoryError:
        return _rejected("too large for the memory of this machine: split it or use --jobs 1"), False
    except Exception as error:  # one file must not stop the others; the type says where to look
        return _rejected(f"unexpected {type(error).__name__}: {one_line(str(error))}"), False


def _rejected(reason: str) -> dict:
    return {"status": "rejected", "reason": reason}


@contextlib.contextmanager
def json_beside(path: Path, content: dict) -> Iterator[None]:
    """Write JSON under a temporary name, and give it its name only when the block has ended well."""
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(json.dumps(content, indent=1))
        yield
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write JSON, whole or not at all."""
    with json_beside(path, content):
        pass


@contextlib.contextmanager
def disk_full_named(kept: Path) -> Iterator[None]:
    """One sentence for a full disk; the folder of finished files stays for the next run."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = f"the disk is full: nothing was written; free some space and run again (finished files: {kept})"
        raise OSError(errno.ENOSPC, message) from error


def name_inside(folder: Path, path: Path) -> str:
    """A path below `folder`, with slashes. Bytes that are no UTF-8, which no store or report can hold, become \\xNN."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    """The same words without line breaks; what a damaged file makes endless is cut."""
    words = " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 4]} ..."


def package_version(package: str) -> str:
    """Installed version of a package, or "unreleased"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unreleased"
