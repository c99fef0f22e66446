"""The window store for buckets and many hosts: a folder of ArrayRecord shards with its description beside them.

    store.json                               what holds for all windows, the montages, and each shard's size and SHA-256
    index.npz                                per window: codes into tables of names, places, hashes, labels
    windows-00000-of-00012.arrayrecord       the windows: one record, (C,T) float32 microvolts, for each

A record is a chunk of its own (group size 1) and not compressed: noise in float32 shrinks by a fourteenth at zstd's
level 1 and takes twice as long to read. ArrayRecord checks the hash of a record whenever it is read. The folder is
written under a temporary name and renamed, so a store either exists whole or not at all.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.montages import Montage
from data_pipeline.names import Names
from data_pipeline.open_files import OpenFiles
from data_pipeline.store import Store, StoreInfo, montages_from_json, montages_to_json
from data_pipeline.window_hashes import hash_windows

FORMAT, FORMAT_VERSION = "lumamba_jax windows in ArrayRecord", 1
DESCRIPTION, INDEX = "store.json", "index.npz"
SHARD_WINDOWS = 16_384  # 1.8 GB of 22 x 1280: few enough files for a bucket, small enough to copy in parallel
MAX_OPEN = 512  # readers; one holds the places of its records (8 bytes each) and a buffer
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"  # random access: nothing beside the record asked for
_BUFFER_BYTES = 1 << 17  # one request for a record of 22 x 1280
_LITTLE = np.dtype("<f4")


_READERS: OpenFiles[Any] = OpenFiles(MAX_OPEN, lambda reader: reader.close())


class ArrayRecordStore(Store):
    """Random access to the windows of one folder; `Store` says what it offers.

    Opening it reads the description and the index and looks at the size of each shard, no more; `verify` reads
    everything. Raises ValueError, one sentence with the file, for whatever is missing, truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        description = self._described()
        self.sfreq, self.n_times = float(description["sfreq"]), int(description["n_times"])
        self.class_names = description["class_names"]
        self.montages: dict[str, Montage] = montages_from_json(json.dumps(description["montages"]))
        self._description = description
        self._read_index(description["index_sha256"])
        shards = description["shards"]
        self._files = [str(shard["file"]) for shard in shards]
        self._bounds = np.cumsum([0, *(int(shard["windows"]) for shard in shards)])
        if len(self) != self._bounds[-1]:
            raise ValueError(f"{self.path}: the index knows {len(self)} windows, the shards {self._bounds[-1]}")
        for shard in shards:
            self._check_size(shard)

    @property
    def num_bytes(self) -> int:
        """Size of the shards."""
        return sum(int(shard["bytes"]) for shard in self._description["shards"])

    @property
    def info(self) -> StoreInfo:
        """What holds for every window."""
        names = {field.name for field in dataclasses.fields(StoreInfo)}
        return StoreInfo(**{key: value for key, value in self._description.items() if key in names})

    def read_into(self, rows: np.ndarray, windows: Sequence[np.ndarray]) -> None:
        """Write window `rows[i]` into `windows[i]`, see `Store.read_into`."""
        shards = np.searchsorted(self._bounds, rows, side="right") - 1
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            records = self._records(int(shard), (rows[where] - self._bounds[shard]).tolist())
            for place, record in zip(where.tolist(), records, strict=True):
                if len(record) != windows[place].nbytes:
                    raise ValueError(f"{self.path / self._files[shard]}: a window has {len(record)} bytes, the index "
                                     f"says {windows[place].nbytes}: the files do not belong together")  # fmt: skip
                windows[place][...] = np.frombuffer(record, _LITTLE).reshape(windows[place].shape)

    def verify(self) -> None:
        """Read every shard and compare its checksum and number of windows. Raises ValueError naming the first bad."""
        for number, shard in enumerate(self._description["shards"]):
            if _sha256(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.path / shard['file']} is damaged (its checksum does not fit): copy it again")
            with self._reader(number) as reader:
                if reader.num_records() != shard["windows"]:
                    raise ValueError(f"{self.path / shard['file']} holds {reader.num_records()} windows, not "
                                     f"{shard['windows']}")  # fmt: skip

    def _described(self) -> dict:
        path = self.path / DESCRIPTION
        if not path.is_file():
            what = "holds no store.json" if self.path.is_dir() else "does not exist"
            raise ValueError(f"{self.path} {what}: make a store with `python -m data_pipeline.convert_store`")
        try:
            description = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): copy or convert the store again") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"{path} does not describe a window store")
        if description["format_version"] > FORMAT_VERSION:
            raise ValueError(f"{path} has format version {description['format_version']}, this program knows "
                             f"{FORMAT_VERSION}: update lumamba_jax")  # fmt: skip
        return description

    def _read_index(self, sha256: str) -> None:
        path = self.path / INDEX
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{path} is missing or damaged (its checksum does not fit): copy the store again")
        with np.load(io.BytesIO(content)) as index:
            self.subjects, self.recordings, self.montage_names = (
                Names(index[f"{name}_table"], index[f"{name}_codes"]) for name in ("subjects", "recordings", "montages")
            )
            self.start_samples = index["start_samples"]
            self.labels = index.get("labels")
            self.window_hashes = index.get("window_hashes")

    def _check_size(self, shard: dict) -> None:
        path = self.path / shard["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: the store has {len(self._files)} shards, copy them all")
        if (found := path.stat().st_size) != shard["bytes"]:
            raise ValueError(f"{path} has {found:,} bytes, not {shard['bytes']:,}: it is truncated or another store's, "
                             f"copy it again")  # fmt: skip

    def _records(self, shard: int, rows: list[int]) -> list[bytes]:
        with self._reader(shard) as reader:
            return reader.read(rows)

    @contextlib.contextmanager
    def _reader(self, shard: int) -> Iterator[Any]:
        path = self.path / self._files[shard]
        key = (str(path), self._description["shards"][shard]["sha256"])
        try:
            with _READERS.use(key, lambda: _array_record().ArrayRecordReader(
                str(path), _READ, file_reader_buffer_size=_BUFFER_BYTES
            )) as reader:  # fmt: skip
                yield reader
        except (RuntimeError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read ({reason}): if it is damaged, copy it again") from error


class ArrayRecordWriter:
    """Appends windows to a store that is being created; made by `create_array_record_store`."""

    def __init__(self, folder: Path, info: StoreInfo, num_windows: int, shard_windows: int) -> None:
        self._folder, self._info = folder, info
        self._num_windows, self._shard_windows = num_windows, shard_windows
        self._num_shards = math.ceil(num_windows / shard_windows)
        self._shards: list[dict] = []
        self._columns: list[tuple[Names, Names, Names, np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._montages: dict[str, Montage] = {}
        self._shard: Any = None
        self._in_shard = 0
        self.n_windows = 0

    def add(
        self,
        signal_uv: np.ndarray,
        montage: Montage,
        *,
        subjects: Names,
        recordings: Names,
        start_samples: np.ndarray,
        labels: np.ndarray | None,
    ) -> None:
        """Append windows (n,C,T) microvolts of one montage, with what is known of each.

        Raises ValueError for values that are not finite and for two montages of one name.
        """
        signal_uv = np.ascontiguousarray(signal_uv, dtype=_LITTLE)
        n = len(signal_uv)
        if signal_uv.shape[1:] != (len(montage), self._info.n_times) or n == 0:
            raise ValueError(f"expected windows of shape (n > 0, {len(montage)}, {self._info.n_times}), found "
                             f"{signal_uv.shape}")  # fmt: skip
        if not np.isfinite(signal_uv).all():
            raise ValueError("values that are not finite: reject such windows before writing")
        if self._montages.setdefault(montage.name, montage) != montage:
            raise ValueError(f"two montages are called {montage.name!r}: prepare the recordings into one store")
        for window in signal_uv:
            self._write(window.tobytes())
        names = Names([montage.name], np.zeros(n, np.uint8))
        self._columns.append((subjects, recordings, names, start_samples, hash_windows(signal_uv), labels))
        self.n_windows += n

    def finish(self) -> None:
        """Write index and description; called by `create_array_record_store` when its block ends well."""
        self._end_shard()
        if self.n_windows != self._num_windows:
            raise ValueError(f"{self._num_windows} windows were announced, {self.n_windows} came")
        subjects, recordings, montages, starts, hashes, labels = zip(*self._columns, strict=True)
        columns = {}
        for name, parts in (("subjects", subjects), ("recordings", recordings), ("montages", montages)):
            joined = Names.concatenate(parts)
            columns |= {f"{name}_table": joined.table, f"{name}_codes": joined.codes}
        columns["start_samples"] = np.concatenate(starts).astype(np.int64)
        columns["window_hashes"] = np.concatenate(hashes)
        if labels[0] is not None:
            columns["labels"] = np.concatenate(labels)
        np.savez_compressed(self._folder / INDEX, **columns)
        description = {"format": FORMAT, "format_version": FORMAT_VERSION, "unit": "uV", "record": "(C,T) <f4"}
        description |= {"windows": self.n_windows, **dataclasses.asdict(self._info)}
        description["montages"] = json.loads(montages_to_json(self._montages.values()))
        description |= {"index_sha256": _sha256(self._folder / INDEX), "shards": self._shards}
        (self._folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")

    def close(self) -> None:
        """Give up the file that is open, when the block ended badly."""
        if self._shard is not None:
            with contextlib.suppress(RuntimeError):
                self._shard.close()

    def _write(self, record: bytes) -> None:
        if self._shard is None:
            self._shard = _array_record().ArrayRecordWriter(str(self._folder / self._next_name()), _WRITE)
        self._shard.write(record)
        self._in_shard += 1
        if self._in_shard == self._shard_windows:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.close()
        self._shard = None
        path = self._folder / self._next_name()
        checksum, size = _sha256(path), path.stat().st_size
        self._shards.append({"file": path.name, "windows": self._in_shard, "bytes": size, "sha256": checksum})
        self._in_shard = 0

    def _next_name(self) -> str:
        return f"windows-{len(self._shards):05d}-of-{self._num_shards:05d}.arrayrecord"


@contextlib.contextmanager
def create_array_record_store(
    path: str | Path, info: StoreInfo, *, num_windows: int, shard_windows: int = SHARD_WINDOWS
) -> Iterator[ArrayRecordWriter]:
    """Write a folder of `num_windows` windows atomically: it appears, complete, when the block ends without an error.

    Raises ValueError when `path` exists, the number is not as announced, or a window cannot be stored; OSError with
    one sentence when the disk is full. Nothing is left behind then.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: remove it or choose another name")
    if num_windows < 1 or shard_windows < 1:
        raise ValueError("a store needs at least one window, and a shard too")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    writer = ArrayRecordWriter(partial, info, num_windows, shard_windows)
    try:
        yield writer
        writer.finish()
        for written in partial.iterdir():
            with written.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, RuntimeError) as error:  # the format's library raises RuntimeError for what the disk refuses
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"the disk is full: {path} was not written; free some space and run again") \
                from error  # fmt: skip
        raise
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array_record() -> Any:
    """The format's library, which exists for Linux and macOS."""
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ValueError(
            f"ArrayRecord stores need the package array-record, which cannot be loaded here ({sys.platform}: {error}): "
            f"use HDF5"
        ) from error
    return array_record_module
