"""Writes PyTorch checkpoints without PyTorch, opcode by opcode, so that tests can write what torch.save never would."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


def number(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def foreign(value: object) -> bytes:
    """Any Python object as Python pickles it, to be embedded."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key: str, numel: int, dtype: str = "float32") -> bytes:
    kind = name("torch", f"{STORAGES[dtype]}Storage")
    return sequence(text("storage"), kind, text(key), text("cpu"), number(numel)) + b"Q"


def tensor(stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    axes = (sequence(*map(number, shape)), sequence(*map(number, strides)))
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, number(offset), *axes, b"\x89", hooks)


def whole(key: str, array: np.ndarray) -> bytes:
    """A tensor that is its whole storage."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return tensor(storage(key, array.size, array.dtype.name), array.shape, strides)


def state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    return mapping({key: whole(str(i), array) for i, (key, array) in enumerate(arrays.items())})


def storages(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {str(i): array.tobytes() for i, array in enumerate(arrays.values())}


def program(top: bytes) -> bytes:
    """The whole pickle of an expression."""
    return b"\x80\x02" + top + b"."


def write_checkpoint(
    path: Path,
    pickle: bytes,
    stored: Mapping[str, bytes],
    *,
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a zip with the layout of torch.save: a pickle, and the bytes of the storages by key."""
    entries = {"data.pkl": pickle} | ({} if byteorder is None else {"byteorder": byteorder})
    entries |= {f"data/{key}": data for key, data in stored.items()} | {"version": b"3\n"} | dict(more or {})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), data, compression)
    return path


def with_64_bit_end(content: bytes) -> bytes:
    """The archive as torch.save ends it: an end record with 64-bit sizes and its locator before the usual one."""
    entries, length, start = struct.unpack("<HII", content[-12:-2])
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, length, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content) - 22, 1)
    return content[:-22] + record + locator + content[-22:]
