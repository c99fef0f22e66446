"""Published weight files into NumPy: safetensors, their shards, and PyTorch checkpoints, without running their pickles.

A weight file comes from a stranger. What it is shows in its content, never in its name; every size it claims is held
against its real size before anything is allocated; and a PyTorch checkpoint's pickle is only parsed: names of classes
and functions stay names, and nothing is imported or called. Memory is bounded by a small factor of the file's size plus
the opcodes of one pickle (`MAX_OPCODES`).

A file is read whole or refused whole: `FileNotFoundError` for what is not there, else `ValueError` with one sentence
that begins with the path.
"""

import hashlib
import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import ml_dtypes  # the safetensors reader needs bfloat16 registered with NumPy
import numpy as np
from safetensors import safe_open

from lumamba_jax.torch_pickle import TensorView, is_shape, is_size, parse_weights, quoted

LIGHTNING_PREFIX = "model."
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
MAX_DIRECTORY_BYTES = 8 << 20
"""What a file may spend on listing its tensors: safetensors header, shard index, zip directory (ours need < 200 kB)."""
MAX_EXPANSION = 4
"""Tensors that share storage are copied apart; together they may take this many times the size of the file."""

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class _Refused(Exception):  # noqa: N818
    """Why a file is not read: the rest of a sentence that `_blamed_on` begins with the path."""


# --- what others use -------------------------------------------------------------------------------------------------


def read_tensors(paths: Iterable[str | Path]) -> dict[str, np.ndarray]:
    """The union of the tensors of weight files, without Lightning's prefix `model.`, in their stored dtypes.

    Args:
        paths: each a `.safetensors` file, an index of safetensors shards (`*.safetensors.index.json`), or a PyTorch
            checkpoint in zip format (`torch.save` since 1.6; Lightning's `.ckpt`). Of a checkpoint only the weights are
            read: the mapping of names to tensors at its top, or under `state_dict`, `model_state_dict` or `model`.

    Returns:
        Arrays by published name, in file order; bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        FileNotFoundError: a file, or a shard of an index, is not there.
        ValueError: a file that is damaged, unsafe, or of another kind, or a name that occurs twice.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in map(Path, paths):
        with _blamed_on(path):
            for name, tensor in _read(path).items():
                bare = name.removeprefix(LIGHTNING_PREFIX)
                if bare in tensors:
                    raise _Refused(f"tensor {quoted(bare)} occurs twice; the files must hold each tensor once")
                tensors[bare] = tensor
    return tensors


def weight_files(folder: str | Path) -> list[Path]:
    """The file of a folder that holds the model, for `read_tensors`: the index of its shards, else the only one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no file, or several between which the user must choose; they are listed.
    """
    folder = Path(folder)
    with _blamed_on(folder):
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise _Refused("is a file, not a folder; give it directly")
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        found = [path for path in files if path.name.endswith(INDEX_SUFFIX)]
        found = found or [path for path in files if path.suffix.lower() in WEIGHT_SUFFIXES]
        if not found:
            there = ", ".join(path.name for path in files[:20]) or "nothing"
            raise _Refused(f"holds no weight file ({', '.join(WEIGHT_SUFFIXES)} or *{INDEX_SUFFIX}), only {there}")
        if len(found) > 1:
            raise _Refused(f"holds several weight files; give one of {', '.join(path.name for path in found)}")
    return found


def files_at(path: Path) -> list[Path]:
    """What `read_tensors` takes for a path that may be a file or a folder; errors as `weight_files`."""
    return weight_files(path) if path.is_dir() else [path]


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it cannot be read.
    """
    path = Path(path)
    with _blamed_on(path):
        _require_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


# --- one file --------------------------------------------------------------------------------------------------------


@contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Complete a refusal with the path. Nothing but ValueError and FileNotFoundError comes out."""
    try:
        yield
    except _Refused as reason:
        raise ValueError(f"{path}: {reason}") from reason.__cause__
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read; {type(error).__name__}: {_one_line(error)}") from error


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Around a library that parses the file: whatever it throws there is the file's fault."""
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"{what} is damaged ({type(error).__name__}: {_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return ascii(str(error))[1:-1][:200]


def _require_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a .safetensors, .ckpt or .pt file, or an index of shards")
    if not path.is_file():
        raise _Refused("is not a file; of a folder, give the file that holds the model")


def _read(path: Path) -> dict[str, np.ndarray]:
    _require_file(path)
    readers = {"safetensors": _read_safetensors, "zip": _read_checkpoint, "json": _read_index}
    tensors = readers[_kind(path)](path)
    if not tensors:
        raise _Refused("holds no tensors")
    return tensors


def _kind(path: Path) -> str:
    """`safetensors`, `zip` or `json`, by content; any other content is refused by what it is."""
    with path.open("rb") as file:
        start = file.read(64)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        raise _Refused("is empty (0 bytes); download it again")
    if start.startswith(b"version https://git-lfs"):
        raise _Refused("is a git-lfs pointer, not the weights; run `git lfs pull`, or download the file itself")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise _Refused("is a web page, not weights: the download failed or needs a login; download it again")
    if start[8:9] == b"{" and b"\0" in start[:8]:  # first: a header's length may begin like a pickle or like JSON
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if text.startswith(b"{"):
        return "json"
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        what = "in PyTorch's old format" if start[2:4] == b"\x8a\x0a" else "a plain pickle"
        raise _Refused(
            f"is {what}, which is not read; save it again with torch.save of a recent PyTorch or safetensors"
        )
    raise _Refused(f"is neither safetensors nor a PyTorch checkpoint; it begins with {start[:8]!r}")


def _parse_json(text: bytes, what: str) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _Refused(f"{what} names {quoted(twice)} twice")
        return found

    with _damage(what):
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(parsed, dict):
        raise _Refused(f"{what} is not a JSON object")
    return parsed


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    _check_safetensors_header(path)
    with _damage("the file"), safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def _check_safetensors_header(path: Path) -> None:
    """Every claim of the header against the size of the file: the tensors tile the data without gap or overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _Refused(f"claims a header of {length} bytes but has {size}; it is truncated or damaged")
        if length > MAX_DIRECTORY_BYTES:
            raise _Refused(f"has a header of {length} bytes; at most {MAX_DIRECTORY_BYTES} are read")
        header = _parse_json(file.read(length), "the safetensors header")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise _Refused("the safetensors header's __metadata__ is not a mapping of strings")
        else:
            spans.append((*_safetensors_span(name, entry), name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _Refused(f"tensor {quoted(name)} starts at byte {start} of the data, expected {end}")
        end = stop
    if end != size - 8 - length:
        raise _Refused(
            f"holds {size - 8 - length} bytes of data but lists tensors of {end}; it is truncated or damaged"
        )


def _safetensors_span(name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"tensor {quoted(name)} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Refused(f"tensor {quoted(name)} is of no known dtype; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not is_shape(shape):
        raise _Refused(f"tensor {quoted(name)} has no possible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise _Refused(f"tensor {quoted(name)} has no possible data_offsets")
    start, stop = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _Refused(
            f"tensor {quoted(name)} of {dtype} {shape} needs {needed} bytes; its offsets span {stop - start}"
        )
    return start, stop


def _read_index(path: Path) -> dict[str, np.ndarray]:
    shards = _shards_of_index(path)
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        listed = ", ".join(map(quoted, missing[:20]))
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(shards)} shards are not beside it: {listed}")
    tensors: dict[str, np.ndarray] = {}
    for shard, expected in shards.items():
        try:
            if _kind(path.parent / shard) != "safetensors":
                raise _Refused("is not a safetensors file")
            found = _read_safetensors(path.parent / shard)
        except _Refused as reason:
            raise _Refused(f"its shard {quoted(shard)}: {reason}") from reason.__cause__
        for names, problem in ((expected - found.keys(), "lacks"), (found.keys() - expected, "has unlisted")):
            if names:
                listed = ", ".join(map(quoted, sorted(names)[:20]))
                raise _Refused(f"its shard {quoted(shard)} {problem} tensors: {listed}")
        tensors |= found
    return tensors


def _shards_of_index(path: Path) -> dict[str, set[str]]:
    """The tensor names by shard. Shards are named, not pathed, so that an index cannot reach out of its folder.

    A shard may be a symbolic link, as in the cache of the Hugging Face hub: the link was made on this machine.
    """
    size = path.stat().st_size
    if size > MAX_DIRECTORY_BYTES:
        raise _Refused(f"is JSON of {size} bytes; at most {MAX_DIRECTORY_BYTES} are read as an index of shards")
    index = _parse_json(path.read_bytes(), "the index of shards")
    weight_map = index.get("weight_map")
    if not index.keys() <= {"weight_map", "metadata"} or not isinstance(weight_map, dict):
        raise _Refused("is JSON but no index of safetensors shards: it must hold weight_map and at most metadata")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _Refused(f"puts tensor {quoted(tensor)} into no shard")
        plain = shard not in ("", ".", "..") and not set(shard) & set("/\\:\0")
        if not plain:
            raise _Refused(f"puts tensor {quoted(tensor)} into a shard that is no plain file name: {quoted(shard)}")
        shards.setdefault(shard, set()).add(tensor)
    return shards


# --- PyTorch checkpoints ---------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        size = path.stat().st_size
        _check_zip_end(file, size)
        with _damage("the zip archive"):
            archive = zipfile.ZipFile(file)
        entries = _checked_entries(archive, size)
        folder = _checkpoint_folder(entries)
        storages = {name.removeprefix(f"{folder}data/"): info for name, info in entries.items() if "/data/" in name}
        big_endian = _is_big_endian(archive, entries.get(f"{folder}byteorder"))
        pickle = _bytes_of(archive, entries[f"{folder}data.pkl"])
        try:
            views, keys = parse_weights(pickle)
        except ValueError as reason:
            raise _Refused(str(reason)) from reason.__cause__
        if unused := storages.keys() - keys:
            raise _Refused(f"has storages that no tensor names: {', '.join(map(quoted, sorted(unused)[:20]))}")
        _check_views(views, storages, size)
        return _materialise(archive, storages, views, big_endian=big_endian)


def _check_zip_end(file: BinaryIO, size: int) -> None:
    """Bound the zip directory before `zipfile` reads it. torch.save adds no comment: the end record comes last."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise _Refused("is a zip archive without its end; it is truncated or damaged")
    length = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\x06\x07":  # the locator of a 64-bit end record, which torch.save puts right before it
        if tail[-98:-94] != b"PK\x06\x06" or int.from_bytes(tail[-34:-26], "little") != size - 98:
            raise _Refused("is a zip archive with two ends that disagree; it is damaged")
        length = int.from_bytes(tail[-58:-50], "little")
    if length > min(size, MAX_DIRECTORY_BYTES):
        raise _Refused(f"claims a zip directory of {length} bytes; it is damaged")


def _checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise _Refused("is a zip archive with two entries of one name")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise _Refused(
                f"is a zip archive whose entry {quoted(info.filename)} is not stored plainly, as torch.save does"
            )
    if sum(info.file_size for info in infos) > size:
        raise _Refused("is a zip archive whose entries claim more bytes than the file has")
    return entries


def _checkpoint_folder(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    """The archive's one folder, with its slash; it is named after the file that was first saved."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in entries):
        raise _Refused(
            "is a TorchScript archive, which is code; save model.state_dict() with torch.save or safetensors"
        )
    folders = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise _Refused("is a zip archive but no PyTorch checkpoint: it must hold one data.pkl")
    return folders[0]


def _bytes_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with _damage(f"the zip entry {quoted(info.filename)}"):
        found = archive.read(info)
    if len(found) != info.file_size:
        raise _Refused(f"the zip entry {quoted(info.filename)} is truncated")
    return found


def _is_big_endian(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bool:
    order = b"little" if info is None else _bytes_of(archive, info)  # before PyTorch 2.1 there was no such entry
    if order not in (b"little", b"big"):
        raise _Refused(f"has the unknown byte order {order[:20]!r}")
    return order == b"big"


def _check_views(views: Mapping[str, TensorView], entries: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    for name, view in views.items():
        entry = entries.get(view.storage.key)
        if entry is None:
            raise _Refused(f"lacks the storage of tensor {quoted(name)}: {quoted(f'data/{view.storage.key}')}")
        if problem := view.problem(entry.file_size):
            raise _Refused(f"tensor {quoted(name)} {problem}")
    total = sum(view.nbytes for view in views.values())
    if total > MAX_EXPANSION * size:
        raise _Refused(f"lists tensors of {total} bytes in a file of {size}; at most {MAX_EXPANSION} times are read")


def _materialise(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    views: Mapping[str, TensorView],
    *,
    big_endian: bool,
) -> dict[str, np.ndarray]:
    """Read storage by storage, so that no more than one is held beside the tensors."""
    by_storage: dict[str, list[str]] = {}
    for name, view in views.items():
        by_storage.setdefault(view.storage.key, []).append(name)
    tensors = {}
    for key, names in by_storage.items():
        raw = np.frombuffer(_bytes_of(archive, entries[key]), np.uint8)
        tensors |= {name: views[name].of(raw, big_endian=big_endian) for name in names}
    return {name: tensors[name] for name in views}
