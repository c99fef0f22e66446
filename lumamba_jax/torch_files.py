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
import pickletools
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes  # the safetensors reader needs bfloat16 registered with NumPy
import numpy as np
from safetensors import safe_open

LIGHTNING_PREFIX = "model."
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where training programs put the weights in a checkpoint, the first being Lightning's."""
MAX_DIRECTORY_BYTES = 8 << 20
"""What a file may spend on listing its tensors: safetensors header, shard index, zip directory (ours need < 200 kB)."""
MAX_OPCODES = 1_000_000
"""Of one pickle; a tensor takes about 30, with its optimizer state about 100."""
MAX_STACK = 100_000
MAX_NESTING = 1_000
MAX_EXPANSION = 4
"""Tensors that share storage are copied apart; together they may take this many times the size of the file."""
MAX_AXES = 32

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
_TORCH_NAMES: Mapping[str, tuple[str, str]] = {  # of typed storages, and of dtypes beside an untyped storage
    "F64": ("DoubleStorage", "float64"),
    "F32": ("FloatStorage", "float32"),
    "F16": ("HalfStorage", "float16"),
    "BF16": ("BFloat16Storage", "bfloat16"),
    "I64": ("LongStorage", "int64"),
    "I32": ("IntStorage", "int32"),
    "I16": ("ShortStorage", "int16"),
    "I8": ("CharStorage", "int8"),
    "U64": ("UInt64Storage", "uint64"),
    "U32": ("UInt32Storage", "uint32"),
    "U16": ("UInt16Storage", "uint16"),
    "U8": ("ByteStorage", "uint8"),
    "BOOL": ("BoolStorage", "bool"),
}
_UNTYPED_STORAGES = ("torch.storage.UntypedStorage", "torch.storage._UntypedStorage", "torch.UntypedStorage")
_STORAGE_DTYPES = {f"torch.{storage}": _DTYPES[key] for key, (storage, _) in _TORCH_NAMES.items()}
_TORCH_DTYPES = {f"torch.{dtype}": _DTYPES[key] for key, (_, dtype) in _TORCH_NAMES.items()}


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
                    raise _Refused(f"tensor {_quoted(bare)} occurs twice; the files must hold each tensor once")
                tensors[bare] = tensor
    return tensors


def weight_files(folder: str | Path) -> list[Path]:
    """The file of a folder that holds the model, for `read_tensors`: the index of its shards, else the only one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no file, or several between which the user must choose; they are listed.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    with _blamed_on(folder):
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


def _quoted(name: str) -> str:
    """A name from a file, fit to be printed: no line breaks or lone surrogates, not too long."""
    return ascii(name) if len(name) <= 100 else f"{name[:100]!a}..."


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
            raise _Refused(f"{what} names {_quoted(twice)} twice")
        return found

    with _damage(what):
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(parsed, dict):
        raise _Refused(f"{what} is not a JSON object")
    return parsed


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _fits(shape: Iterable[int]) -> bool:
    """Whether NumPy can hold the shape, also when another axis is empty."""
    return math.prod(n for n in shape if n) < 2**48


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
            raise _Refused(f"tensor {_quoted(name)} starts at byte {start} of the data, expected {end}")
        end = stop
    if end != size - 8 - length:
        raise _Refused(
            f"holds {size - 8 - length} bytes of data but lists tensors of {end}; it is truncated or damaged"
        )


def _safetensors_span(name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"tensor {_quoted(name)} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Refused(f"tensor {_quoted(name)} is of no known dtype; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)) or not _fits(shape):
        raise _Refused(f"tensor {_quoted(name)} has no possible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _Refused(f"tensor {_quoted(name)} has no possible data_offsets")
    start, stop = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _Refused(
            f"tensor {_quoted(name)} of {dtype} {shape} needs {needed} bytes; its offsets span {stop - start}"
        )
    return start, stop


def _read_index(path: Path) -> dict[str, np.ndarray]:
    shards = _shards_of_index(path)
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        listed = ", ".join(map(_quoted, missing[:20]))
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(shards)} shards are not beside it: {listed}")
    tensors: dict[str, np.ndarray] = {}
    for shard, expected in shards.items():
        try:
            if _kind(path.parent / shard) != "safetensors":
                raise _Refused("is not a safetensors file")
            found = _read_safetensors(path.parent / shard)
        except _Refused as reason:
            raise _Refused(f"its shard {_quoted(shard)}: {reason}") from reason.__cause__
        for names, problem in ((expected - found.keys(), "lacks"), (found.keys() - expected, "has unlisted")):
            if names:
                listed = ", ".join(map(_quoted, sorted(names)[:20]))
                raise _Refused(f"its shard {_quoted(shard)} {problem} tensors: {listed}")
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
            raise _Refused(f"puts tensor {_quoted(tensor)} into no shard")
        plain = shard not in ("", ".", "..") and not set(shard) & set("/\\:\0")
        if not plain:
            raise _Refused(f"puts tensor {_quoted(tensor)} into a shard that is no plain file name: {_quoted(shard)}")
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
        parser = _PickleParser()
        views = _weights(parser.parse(_bytes_of(archive, entries[f"{folder}data.pkl"])))
        if unused := storages.keys() - parser.storage_keys:
            raise _Refused(f"has storages that no tensor names: {', '.join(map(_quoted, sorted(unused)[:20]))}")
        _check_views(views, storages, size)
        return _materialise(archive, storages, views, big_endian=big_endian)


def _check_zip_end(file: BinaryIO, size: int) -> None:
    """Bound the zip directory before `zipfile` reads it. torch.save adds no comment: the end record comes last."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise _Refused("is a zip archive without its end; it is truncated or damaged")
    length = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\x06\x07" and tail[-98:-94] == b"PK\x06\x06":  # the 64-bit end record and its locator
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
                f"is a zip archive whose entry {_quoted(info.filename)} is not stored plainly, as torch.save does"
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
    with _damage(f"the zip entry {_quoted(info.filename)}"):
        found = archive.read(info)
    if len(found) != info.file_size:
        raise _Refused(f"the zip entry {_quoted(info.filename)} is truncated")
    return found


def _is_big_endian(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bool:
    order = b"little" if info is None else _bytes_of(archive, info)  # before PyTorch 2.1 there was no such entry
    if order not in (b"little", b"big"):
        raise _Refused(f"has the unknown byte order {order[:20]!r}")
    return order == b"big"


def _weights(top: object) -> dict[str, "_View"]:
    """The mapping of names to tensors: the top of the checkpoint, or what its usual names for it hold."""
    if not isinstance(top, _Mapping):
        raise _Refused(f"holds {_said(top)} instead of weights; save model.state_dict() with torch.save or safetensors")
    found = {key: top.items[key] for key in WEIGHT_KEYS if isinstance(top.items.get(key), _Mapping)}
    if len(found) > 1:
        raise _Refused(f"may hold weights under {' and '.join(found)}; save the state dict alone")
    if top.repeated in WEIGHT_KEYS:
        raise _Refused(f"holds {top.repeated} twice")
    weights = next(iter(found.values()), top)
    assert isinstance(weights, _Mapping)
    if weights.repeated is not None:
        raise _Refused(f"tensor {_quoted(weights.repeated)} occurs twice; the files must hold each tensor once")
    if weights.odd_key is not None:
        raise _Refused(f"weights are named by {weights.odd_key}, not by a string")
    views = {}
    for name, view in weights.items.items():
        if not isinstance(view, _View):
            raise _Refused(f"weight {_quoted(name)} is {_said(view)}, not a tensor that can be read")
        views[name] = view
    return views


def _check_views(views: Mapping[str, "_View"], entries: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    for name, view in views.items():
        entry = entries.get(view.storage.key)
        if entry is None:
            raise _Refused(f"lacks the storage of tensor {_quoted(name)}: data/{view.storage.key}")
        if problem := view.problem(entry.file_size):
            raise _Refused(f"tensor {_quoted(name)} {problem}")
    total = sum(view.nbytes for view in views.values())
    if total > MAX_EXPANSION * size:
        raise _Refused(f"lists tensors of {total} bytes in a file of {size}; at most {MAX_EXPANSION} times are read")


def _materialise(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    views: Mapping[str, "_View"],
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


# --- the pickle of a checkpoint, parsed only -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Inert:
    """A value of a class we do not build, or that is not what it should be; harmless unless it is a weight."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class _Global:
    """The name of a class or function. Nothing looks it up."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """An entry of the archive: `numel` elements of `dtype`, or bytes without one."""

    key: str
    dtype: np.dtype | None
    numel: int


class _Mapping:
    """A dict or OrderedDict. Only string keys are kept; others are not even hashed, as nested ones would recurse."""

    __slots__ = ("items", "odd_key", "repeated")

    def __init__(self):
        self.items: dict[str, object] = {}
        self.repeated: str | None = None
        self.odd_key: str | None = None

    def update(self, flat: list[object]) -> None:
        if len(flat) % 2:
            raise _Refused("its pickle is damaged (a key without a value)")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                self.odd_key = _said(key)
            elif key in self.items:
                self.repeated = key
            else:
                self.items[key] = value


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A tensor as torch stores it: strides and offset into a storage, in elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def problem(self, available: int) -> str | None:
        """Why the view cannot be read from a storage of `available` bytes; None if it can."""
        itemsize = 1 if self.storage.dtype is None else self.storage.dtype.itemsize
        if self.storage.numel * itemsize != available:
            return f"claims a storage of {self.storage.numel * itemsize} bytes; data/{self.storage.key} has {available}"
        if not _fits(self.shape):
            return "has an impossible shape"
        if available % self.dtype.itemsize or self.offset > available // self.dtype.itemsize:
            return "starts outside its storage"
        if 0 in self.shape:
            return None
        last = self.offset  # the reach of the axes passed so far, from the innermost outwards
        for stride, n in sorted((stride, n) for stride, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride <= last - self.offset:
                return "has overlapping elements; save it after .contiguous()"
            last += stride * (n - 1)
        return "reaches outside its storage" if last >= available // self.dtype.itemsize else None

    def of(self, raw: np.ndarray, *, big_endian: bool) -> np.ndarray:
        """A copy of the elements, contiguous and in native byte order, from the bytes of the storage."""
        itemsize = self.dtype.itemsize
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if big_endian:
            raw = np.ascontiguousarray(raw.reshape(-1, itemsize)[:, ::-1]).reshape(-1)
        flat = raw.view(self.dtype)[self.offset :]
        strides = tuple(stride * itemsize if n > 1 else 0 for stride, n in zip(self.strides, self.shape, strict=True))
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides), order="C")


def _said(value: object) -> str:
    if isinstance(value, _Inert):
        return value.what
    if isinstance(value, _Global):
        return f"the name {_quoted(value.name)}"
    return "a mapping" if isinstance(value, _Mapping) else f"a {type(value).__name__.lstrip('_').lower()}"


class _PickleParser:
    """Parses one pickle into inert values: the opcodes of protocols 0 to 5 on a stack, with a memo, and no imports.

    What is understood is what weights consist of: scalars, strings, lists, tuples, mappings and torch's own way of
    naming tensors. Any other object becomes `_Inert`, whatever its class wants to be called with.
    """

    def __init__(self):
        self.storage_keys: set[str] = set()
        self._stack: list[object] = []
        self._marked: list[list[object]] = []  # the stacks below the open marks
        self._memo: dict[int, object] = {}

    def parse(self, pickle: bytes) -> object:
        """The value the pickle describes."""
        stop = -1
        for count, (opcode, argument, stop) in enumerate(_opcodes(pickle)):
            if count > MAX_OPCODES or len(self._stack) > MAX_STACK or len(self._marked) > MAX_NESTING:
                raise _Refused(f"its pickle is larger than a checkpoint's ({MAX_OPCODES} opcodes, {MAX_NESTING} deep)")
            try:
                self._step(opcode.name, argument)
            except (IndexError, KeyError) as error:  # the stack or the memo does not hold what the opcode needs
                raise _Refused(f"its pickle is damaged ({opcode.name} at byte {stop})") from error
        if self._marked or len(self._stack) != 1 or stop != len(pickle) - 1:
            raise _Refused("its pickle is damaged (it ends too early)")
        return self._stack[0]

    def _step(self, name: str, argument: object) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "POP":
                self._pop(1) if stack else self._since_mark()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[_memo_key(argument)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[_memo_key(argument)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "BYTEARRAY8":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case _:
                self._build(name, argument)

    def _build(self, name: str, argument: object) -> None:
        match name:
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(tuple(self._pop(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(name))))
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self._stack.append({"EMPTY_LIST": list, "EMPTY_DICT": _Mapping}.get(name, _some_set)())
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self._since_mark()
                made = {"TUPLE": tuple, "LIST": list}.get(name, _some_set)
                self._stack.append(_mapping_of(items) if name == "DICT" else made(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self._pop(1) if name == "APPEND" else self._since_mark()
                if isinstance(target := self._target(list), list):
                    target.extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._since_mark()
                if isinstance(target := self._target(_Mapping), _Mapping):
                    target.update(items)
            case "BUILD":  # attributes of an object; those of a state dict are versions of modules
                self._pop(1)
                self._target(_Mapping)
            case _:
                self._make(name, argument)

    def _make(self, name: str, argument: object) -> None:
        """The opcodes by which a pickle imports and calls. Here they only name."""
        match name:
            case "GLOBAL":
                made = _Global(str(argument).replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, attribute = self._pop(2)
                made = (
                    _Global(f"{module}.{attribute}") if isinstance(module, str) and isinstance(attribute, str) else None
                )
            case "REDUCE" | "NEWOBJ":
                made = _called(*self._pop(2))
            case "NEWOBJ_EX":
                made = _object_of(self._pop(3)[0])
            case "INST":
                self._since_mark()
                made = _object_of(_Global(str(argument).replace(" ", ".", 1)))
            case "OBJ":
                made = _object_of(self._since_mark()[0])
            case "BINPERSID":
                made = _storage(self._pop(1)[0])
                if isinstance(made, _Storage):
                    self.storage_keys.add(made.key)
            case _:
                raise _Refused(f"its pickle uses {name}, which torch.save does not")
        if made is None:
            raise KeyError(name)
        self._stack.append(made)

    def _pop(self, n: int) -> list[object]:
        if len(self._stack) < n:
            raise IndexError(n)
        popped = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return popped

    def _since_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _target(self, kind: type) -> object:
        """The container on top of the stack that receives items or attributes: of a kind we build, or inert."""
        target = self._stack[-1]
        if not isinstance(target, kind | _Inert):
            raise KeyError(kind.__name__)
        return target


def _opcodes(pickle: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    with _damage("its pickle"):
        yield from pickletools.genops(pickle)


def _memo_key(argument: object) -> int:
    # Small ones only, as picklers number them: huge ones can be chosen to collide in the memo's hash table.
    if isinstance(argument, int) and 0 <= argument < MAX_OPCODES:
        return argument
    raise KeyError(argument)


def _some_set(*_: object) -> _Inert:
    return _Inert("a set")


def _mapping_of(flat: list[object]) -> _Mapping:
    mapping = _Mapping()
    mapping.update(flat)
    return mapping


def _object_of(callee: object) -> _Inert:
    return _Inert(
        f"an object of {_quoted(callee.name)}" if isinstance(callee, _Global) else "an object of no known class"
    )


def _called(callee: object, arguments: object) -> object:
    """What a call would return, for the few functions that make up a state dict; nothing is called."""
    name = callee.name if isinstance(callee, _Global) else None
    match name, arguments:
        case "collections.OrderedDict", ():
            return _Mapping()
        case "collections.OrderedDict", ([*pairs],) if all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            return _mapping_of([item for pair in pairs for item in pair])
        case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, _, _, *metadata):
            return _view(storage, storage.dtype, offset, shape, strides, metadata)
        case "torch._utils._rebuild_tensor_v3", (_Storage() as storage, offset, shape, strides, _, _, dtype, *metadata):
            dtype = _TORCH_DTYPES.get(dtype.name) if isinstance(dtype, _Global) else None
            return _view(storage, dtype, offset, shape, strides, metadata)
        case "torch._utils._rebuild_parameter", (_View() as view, _, _):
            return view
        case "torch._utils._rebuild_parameter_with_state", (_View() as view, _, _, _):
            return view
    return _object_of(callee)


def _storage(persistent_id: object) -> _Storage | _Inert:
    match persistent_id:
        case ("storage", _Global() as kind, str(key), _, numel) if _is_size(numel):
            if kind.name in _UNTYPED_STORAGES:
                return _Storage(key, None, numel)
            if kind.name in _STORAGE_DTYPES:
                return _Storage(key, _STORAGE_DTYPES[kind.name], numel)
            return _Inert(f"a tensor in the unknown storage {_quoted(kind.name)}")
    return _Inert("a persistent object that is no storage")


def _view(
    storage: _Storage, dtype: np.dtype | None, offset: object, shape: object, strides: object, metadata: list[object]
) -> _View | _Inert:
    if dtype is None:
        return _Inert("a tensor of unknown dtype")
    if any(found is not None and not (isinstance(found, _Mapping) and not found.items) for found in metadata):
        return _Inert("a tensor with metadata (conjugated or negated lazily)")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_AXES):
        return _Inert("a tensor without shape and strides")
    if not isinstance(offset, int) or not all(map(_is_size, (offset, *shape, *strides))):
        return _Inert("a tensor with an impossible shape, stride or offset")
    return _View(storage, dtype, offset, shape, strides)
