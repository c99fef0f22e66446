"""The window store: one HDF5 file of windows, labels and provenance (docs/data.md describes every field).

Every top-level group is a block of windows of one recording in one montage: `X (n,C,T)` float32 microvolts, `y`
(labelled files), `start_sample (n,)`. That is the layout the reference's loaders read; the attributes are what they
lack. `create_store` writes to a temporary name beside the target and renames it when complete, so a store either
exists whole or not at all. `WindowStore` reads ours and the reference's own (`old_files` knows what those do not say).
"""

import contextlib
import errno
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipeline.hdf5_heaps import TextHeaps
from data_pipeline.montages import CHANNEL_ORDERS, Montage
from data_pipeline.names import Names
from data_pipeline.old_files import (
    Flavour,
    GroupLook,
    OldFiles,
    Seams,
    identify,
    measure_seams,
    montage_of_rows,
    subject_of_group,
    taken_for_scrambled,
)
from data_pipeline.open_files import OpenFiles
from data_pipeline.window_hashes import hash_windows

SCHEMA_VERSION = "1"
_TO_MICROVOLTS = {"uV": 1.0, "mV": 1e3, "V": 1e6}
_LETTER_OF_ORDER = {  # of the pairs of TUH: as in pre-training, or as in the reference's labelled files
    CHANNEL_ORDERS["tuh-bipolar-22"]: "L",
    CHANNEL_ORDERS["tuh-bipolar-20"]: "L",
    CHANNEL_ORDERS["tuh-bipolar-22-disk"]: "D",
}
_HASHED_TOGETHER = 128  # windows in memory
_MOST_COMPRESSED = 1100  # deflate's limit is 1032 to 1
_MEASURED_GROUPS, _MEASURED_BYTES = 8, 1 << 24  # what is looked at to tell the layout of a file from its signal


@dataclass(frozen=True)
class StoreInfo:
    """What holds for every window of a store.

    `sfreq` in hertz, `n_times` samples per window, `stride_seconds` between window starts, `filters` and `provenance`
    free-form JSON, `class_names` in the order of the label numbers (None: no labels, or regression targets).
    """

    sfreq: float
    n_times: int
    stride_seconds: float
    filters: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    source_version: str = "lumamba_jax data_pipeline"


class StoreWriter:
    """Adds groups to a store that is being created; made by `create_store`."""

    def __init__(self, file: h5py.File, info: StoreInfo) -> None:
        self._file = file
        self._info = info
        self._montages: dict[str, Montage] = {}
        self._label_shape: tuple | None = None
        self.n_windows = 0

    def add(
        self,
        group: str,
        signal_uv: np.ndarray,
        montage: Montage,
        *,
        subject: str,
        recording: str,
        start_samples: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> None:
        """Append one group of windows.

        `signal_uv` (n,C,T) microvolts, `start_samples` (n,) in samples of the stored rate, `labels` (n,) int class
        numbers, (n,K) int class numbers per channel, or (n,K) float targets. Raises ValueError when shapes, montages
        or labels contradict the store.
        """
        signal_uv = np.asarray(signal_uv, dtype=np.float32)
        labels = None if labels is None else np.asarray(labels)
        self._check(group, signal_uv, montage, np.asarray(start_samples), labels)
        block = self._file.create_group(group)
        block.create_dataset("X", data=signal_uv)
        block.create_dataset("start_sample", data=np.asarray(start_samples, dtype=np.int64))
        block.create_dataset("window_hash", data=hash_windows(signal_uv))
        if labels is not None:
            block.create_dataset("y", data=labels.astype(_label_type(labels)))
        block.attrs.update({"subject_id": subject, "recording_id": recording, "montage": montage.name})
        self._montages[montage.name] = montage
        self.n_windows += len(signal_uv)

    def _check(
        self, group: str, signal: np.ndarray, montage: Montage, starts: np.ndarray, labels: np.ndarray | None
    ) -> None:
        if not group or "/" in group or group in self._file:
            raise ValueError(f"group name {group!r} is empty, holds a slash or exists already")
        expected = (len(signal), len(montage), self._info.n_times)
        if signal.ndim != 3 or signal.shape != expected or len(signal) == 0:
            raise ValueError(f"group {group!r}: expected windows of shape (n > 0, {expected[1]}, {expected[2]}), "
                             f"found {signal.shape}")  # fmt: skip
        if not np.isfinite(signal).all():
            raise ValueError(f"group {group!r} holds values that are not finite: reject such windows before writing")
        if starts.shape != (len(signal),):
            raise ValueError(f"group {group!r}: {len(signal)} windows need as many start samples, found {starts.shape}")
        if self._montages.setdefault(montage.name, montage) != montage:
            raise ValueError(f"two montages are called {montage.name!r}: give them different names")
        self._check_labels(group, len(signal), labels)

    def _check_labels(self, group: str, n: int, labels: np.ndarray | None) -> None:
        if labels is not None and (labels.ndim not in (1, 2) or len(labels) != n):
            raise ValueError(f"group {group!r}: {n} windows need labels (n,) or (n,K), found {labels.shape}")
        if labels is not None and labels.ndim == 1 and not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"group {group!r}: class labels are integers, targets have shape (n,K); found {labels.dtype}"
            )
        shape = () if labels is None else (_label_type(labels), *labels.shape[1:])
        if self._label_shape is not None and self._label_shape != shape:
            raise ValueError(f"group {group!r}: either every window of a store has a label of one kind, or none has")
        self._label_shape = shape
        names = self._info.class_names
        if (
            labels is not None
            and np.issubdtype(labels.dtype, np.integer)
            and names is not None
            and not (0 <= labels.min() <= labels.max() < len(names))
        ):
            raise ValueError(f"group {group!r}: class numbers must lie in 0..{len(names) - 1} ({', '.join(names)})")

    def finish(self) -> None:
        """Write the file attributes; called by `create_store` when its block ends well."""
        if self.n_windows == 0:
            raise ValueError("no window to write: the store would be empty")
        info, montages = self._info, self._montages
        self._file.attrs.update(
            {
                "schema_version": SCHEMA_VERSION,
                "sfreq": float(info.sfreq),
                "unit": "uV",
                "window_seconds": info.n_times / info.sfreq,
                "stride_seconds": float(info.stride_seconds),
                "window_layout": "nct",
                "filters": json.dumps(info.filters),
                "provenance": json.dumps(info.provenance),
                "source_version": info.source_version,
                "montages": montages_to_json(montages.values()),
            }
        )
        if info.class_names is not None:
            self._file.attrs["class_names"] = json.dumps(list(info.class_names))
        if len(montages) == 1:
            (only,) = montages.values()
            self._file.attrs["channel_names"] = list(only.ch_names)
            if only.ch_names in _LETTER_OF_ORDER:
                self._file.attrs["channel_order"] = _LETTER_OF_ORDER[only.ch_names]


@contextlib.contextmanager
def create_store(path: str | Path, info: StoreInfo) -> Iterator[StoreWriter]:
    """Write a window store atomically: the target appears, complete, when the block ends without an error.

    An existing file is replaced at that moment and untouched before. Raises OSError with one sentence when the disk is
    full, ValueError when no window was added; nothing is left behind in either case.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with _disk_errors_named(path):
            with h5py.File(partial, "w") as file:
                writer = StoreWriter(file, info)
                yield writer
                writer.finish()
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError when closing cannot flush
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {path} was not written; free some space and run again"
            ) from error
        raise


class Store(ABC):
    """Random access to windows with what is known about each: the reading interface of both formats.

    Attributes: path, sfreq (hertz), n_times, class_names, montages {name: Montage}, labels ((n,) int32 classes, (n,K)
    int32 per channel classes or float32 targets, or None), subjects / recordings / montage_names (n,) `Names`,
    start_samples (n,) int64 (-1 where unknown), window_hashes (n,) uint64 of `window_hashes.hash_windows` (None: not in
    the files), info (what holds for all windows).
    """

    path: Path
    sfreq: float
    n_times: int
    class_names: list[str] | None
    montages: dict[str, Montage]
    labels: np.ndarray | None
    subjects: Names
    recordings: Names
    montage_names: Names
    start_samples: np.ndarray
    window_hashes: np.ndarray | None
    info: StoreInfo

    def __len__(self) -> int:
        return len(self.start_samples)

    def __getitem__(self, i: int) -> dict:
        """Window `i`: signal (C,T) float32 microvolts, montage (name), label (scalar, (K,), or absent)."""
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        window = {"signal": self.read(np.array([i % len(self)]))[0], "montage": str(self.montage_names[i])}
        if self.labels is not None:
            window["label"] = self.labels[i]
        return window

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Windows at `rows` (m,), all of one montage: (m,C,T) float32 microvolts, in the order asked for.

        Raises ValueError for several montages, or one sentence when the file is damaged or has changed.
        """
        rows = np.asarray(rows, dtype=np.int64)
        names = self.montage_names.unique(rows)
        if len(names) != 1:
            raise ValueError(f"rows to read together must share one montage, found {', '.join(names) or 'no rows'}")
        out = np.empty((len(rows), len(self.montages[str(names[0])]), self.n_times), dtype=np.float32)
        self.read_into(rows, list(out))
        return out

    def content_hashes(self) -> np.ndarray:
        """(n,) uint64: `window_hashes`, made by reading every window where the files do not hold them."""
        if self.window_hashes is not None:
            return self.window_hashes
        found = np.zeros(len(self), np.uint64)
        for name in self.montage_names.unique():
            rows = np.flatnonzero(self.montage_names == name)
            for piece in np.array_split(rows, -(-len(rows) // _HASHED_TOGETHER)):
                found[piece] = hash_windows(self.read(piece))
        return found

    @abstractmethod
    def read_into(self, rows: np.ndarray, windows: Sequence[np.ndarray]) -> None:
        """Write window `rows[i]` into `windows[i]`, a contiguous (C,T) float32 array, in microvolts. Errors as `read`.

        Windows go where they are wanted without a copy in between: most of a loader's work is moving memory.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size on disk."""


@dataclass(frozen=True)
class _Block:
    """One group of an HDF5 file; `offset` is the place of its first sample in the file, -1 where only HDF5 knows."""

    name: str
    shape: tuple[int, int, int]
    offset: int
    attributes: dict[str, Any]
    starts: np.ndarray | None
    labels: np.ndarray | None
    hashes: np.ndarray | None
    dtype: np.dtype

    @property
    def look(self) -> GroupLook:
        """What `old_files` tells a flavour by."""
        shape, kind = (None, "") if self.labels is None else (self.labels.shape, self.labels.dtype.kind)
        return GroupLook(self.name, self.shape, self.dtype, shape, kind, self.attributes)


MAX_OPEN = 64  # a folder of thousands of files must not use up the file descriptors of a process (often 1,024)
_DESCRIPTORS: OpenFiles[int] = OpenFiles(MAX_OPEN, os.close)
_HDF5_FILES: OpenFiles[h5py.File] = OpenFiles(MAX_OPEN, h5py.File.close)


class WindowStore(Store):
    """Random access to the windows of one HDF5 file. Between reads it holds no handle of its own (`OpenFiles` does).

    Files without our attributes (the reference's flavours) are recognised, their rows named and brought to the order
    of the pre-trained models, scrambled windows repaired, volts turned into microvolts; `old` overrules each of these
    or asks for the reference's own reading. Who the subjects are is known from TUEG and Siena files only: the others
    count as one subject per file, so that they cannot be divided by mistake.

    `to_look` opens a file for an audit though it lacks what a model must know: an unknown rate is NaN, an unknown unit
    microvolts, unknown rows "row 0" ... at no place, and labels that contradict each other are none.

    Attributes besides those of `Store`: attributes (the file's own, decoded), dtype (of the first group), flavour (of
    the reference, or None), scrambled (whether windows are repaired on reading), channel_rows (where the rows of a
    window lie in the file, None = as stored), groups (names, in the order of the windows), first_rows (of each group),
    num_replaced (values that were not finite and have been read as 0 so far).
    Raises ValueError, one sentence, when the file is missing, truncated, not a window store, or lacks information.
    """

    def __init__(self, path: str | Path, old: OldFiles = OldFiles(), *, to_look: bool = False) -> None:  # noqa: B008
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"window store {self.path} does not exist: make it with `python -m data_pipeline.prepare`")
        self._identity = _identity(self.path.stat())
        self._title = f"{self.path.resolve().parent.name}/{self.path.stem}"  # the reference calls every file train.h5
        self._old, self._to_look = old, to_look
        self.num_replaced = 0
        with self._readable(), h5py.File(self.path, "r") as file, self.path.open("rb", buffering=0) as raw:
            texts = TextHeaps(raw.fileno())
            self.attributes = _attributes(file, texts)
            blocks = self._blocks(file, texts)
            self.flavour: Flavour | None = None
            if "window_layout" not in self.attributes:
                self.flavour = identify([block.look for block in blocks])
            self._read_settings(blocks)
            self._index(blocks)
            self.scrambled = self._layout_is_scrambled(file)

    def read_into(self, rows: np.ndarray, windows: Sequence[np.ndarray]) -> None:
        """Write window `rows[i]` into `windows[i]`, see `Store.read_into`."""
        groups = np.searchsorted(self.first_rows, rows, side="right") - 1
        own = rows - self.first_rows[groups]
        as_they_lie = not self.scrambled and self.channel_rows is None
        if as_they_lie and (self._offsets[groups] >= 0).all():
            self._read_plain(windows, self._offsets[groups] + own * windows[0].nbytes)
        else:
            self._read_by_hdf5(windows, groups, own)
        for window in windows:
            self._clean(window)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._identity[0]

    @property
    def info(self) -> StoreInfo:
        """What holds for every window; windows are taken to follow each other where the file does not say."""
        found = self.attributes
        with self._readable():
            return StoreInfo(
                sfreq=self.sfreq,
                n_times=self.n_times,
                stride_seconds=float(found.get("stride_seconds", self.n_times / self.sfreq)),
                filters=json.loads(found.get("filters", "{}")),
                provenance=json.loads(found.get("provenance", "{}")),
                class_names=self.class_names,
                source_version=str(found.get("source_version", "unknown")),
            )

    def _read_plain(self, windows: Sequence[np.ndarray], offsets: np.ndarray) -> None:
        """Fill `windows` from the file itself: HDF5's library has one lock for all threads, and opens slowly."""
        with _DESCRIPTORS.use((str(self.path), self._identity), self._open_descriptor) as descriptor:
            for window, offset in zip(windows, offsets.tolist(), strict=True):
                if os.preadv(descriptor, [window.data], offset) != window.nbytes:
                    raise ValueError(f"{self.path} was truncated after it had been opened: make it again")

    def _read_by_hdf5(self, windows: Sequence[np.ndarray], groups: np.ndarray, own: np.ndarray) -> None:
        with self._readable(), _HDF5_FILES.use((str(self.path), self._identity), self._open_hdf5) as file:
            for group in np.unique(groups):
                where, name = np.flatnonzero(groups == group), self.groups[group]
                found = self._read_group(_dataset(file[name], "X", name), own[where])
                for place, window in zip(where.tolist(), found, strict=True):
                    windows[place][...] = window

    def _open_descriptor(self) -> int:
        self._check_unchanged()
        return os.open(self.path, os.O_RDONLY)

    def _open_hdf5(self) -> h5py.File:
        self._check_unchanged()
        return h5py.File(self.path, "r")

    def _check_unchanged(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"window store {self.path} was removed while it was being read")
        if _identity(self.path.stat()) != self._identity:
            raise ValueError(f"window store {self.path} was replaced while it was being read: start again")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of HDF5's library, and of what it hands out of a damaged file, become one sentence."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, ValueError) and str(self.path) in str(error):  # a sentence of ours
                raise
            reason = (str(error).strip("'\"").splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.path} cannot be read as a window store, it is truncated or not HDF5 ({reason}): make it again"
            ) from error

    def _blocks(self, file: h5py.File, texts: TextHeaps) -> list[_Block]:
        blocks = [self._block(str(name), file[name], texts) for name in file if name != "index_map"]
        if not any(block.shape[0] for block in blocks):
            raise ValueError(f"{self.path} holds no group of windows")
        blocks = [block for block in blocks if block.shape[0]]
        lengths = sorted({block.shape[2] for block in blocks})
        if len(lengths) > 1:
            raise ValueError(f"{self.path} mixes windows of {lengths} samples: one store holds one window length")
        self.n_times = int(lengths[0])
        return blocks

    def _block(self, name: str, group: Any, texts: TextHeaps) -> _Block:
        data = group.get("X") if isinstance(group, h5py.Group) else None
        if not isinstance(data, h5py.Dataset) or data.ndim != 3:
            raise ValueError(f"{self.path}: group {name!r} has no dataset X of shape (n, channels, samples)")
        if data.dtype.kind not in "fiu" or min(data.shape[1:]) == 0:
            raise ValueError(f"{self.path}: X of group {name!r} has shape {data.shape} and type {data.dtype}, which is "
                             f"not a signal")  # fmt: skip
        self._check_stored(data)
        attributes = _attributes(group, texts)
        starts, labels, hashes = (self._column(group, key, len(data)) for key in ("start_sample", "y", "window_hash"))
        return _Block(name, data.shape, _offset(data), attributes, starts, labels, hashes, data.dtype)

    def _column(self, group: h5py.Group, column: str, n: int) -> np.ndarray | None:
        """A number, or a few, for each of the n windows."""
        if column not in group:
            return None
        found, place = group[column], f"{self.path}: {str(group.name).strip('/')}/{column}"
        if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "fiub":
            raise ValueError(f"{place} is not a dataset of numbers")
        allowed = (1, 2) if column == "y" else (1,)
        if found.ndim not in allowed or len(found) != n:
            raise ValueError(f"{place} has shape {found.shape}, which does not fit {n} windows")
        self._check_stored(found)
        return found[:]

    def _check_stored(self, data: h5py.Dataset) -> None:
        """Refuse a dataset that declares more than it can hold: a damaged header must not fill the memory."""
        declared, stored = int(np.prod(data.shape, dtype=object)) * data.dtype.itemsize, data.id.get_storage_size()
        if data.is_virtual or data.external:
            return
        compressed = data.chunks is not None
        largest = stored * _MOST_COMPRESSED if compressed else min(stored, self.num_bytes)
        chunk = int(np.prod(data.chunks, dtype=object)) * data.dtype.itemsize if data.chunks else 0
        if declared > largest or stored > self.num_bytes or chunk > max(largest, 1 << 26):
            raise ValueError(f"{self.path}: {str(data.name).strip('/')} declares {data.shape} values, which the file "
                             f"does not hold: it is damaged or was not written to the end, make it again")  # fmt: skip

    def _read_settings(self, blocks: list[_Block]) -> None:
        attributes, old, flavour = self.attributes, self._old, self.flavour
        usual = flavour if flavour is not None and flavour.n_times == self.n_times else None
        described = "window_layout" in attributes
        given_unit = None if described or old.unit == "auto" else old.unit
        unit = given_unit or attributes.get("unit") or (usual.unit if usual else None)
        given_rate = None if described else old.sfreq
        sfreq = given_rate or attributes.get("sfreq") or (usual.sfreq if usual else None)
        lacking = [name for name, known in (("unit", unit), ("sfreq", sfreq)) if not known]
        if lacking and self._to_look:
            unit, sfreq = unit or "uV", sfreq or np.nan
        elif lacking:
            made = f" ({flavour.corpora} files have windows of {flavour.n_times} samples)" if flavour else ""
            raise ValueError(
                f"{self.path} does not say its {' and '.join(lacking)}{made}, it is a file of another pipeline: give "
                f"OldFiles({', '.join(f'{name}=...' for name in lacking)}), or data.old_files of a run"
            )
        if unit not in _TO_MICROVOLTS:
            raise ValueError(f"{self.path}: unknown unit {unit!r}, expected one of {', '.join(_TO_MICROVOLTS)}")
        self._scale = _TO_MICROVOLTS[unit]
        if not (isinstance(sfreq, int | float) and (0 < sfreq < 1e6 or np.isnan(sfreq))):
            raise ValueError(f"{self.path}: the attribute sfreq is {sfreq!r}, expected a rate in hertz")
        self.sfreq = float(sfreq)
        names = attributes.get("class_names")
        self.class_names = None if names is None else [str(name) for name in json.loads(names)]
        self.montages, self.channel_rows = self._read_montages(blocks[0].shape[1])

    def _read_montages(self, channels: int) -> tuple[dict[str, Montage], np.ndarray | None]:
        if "montages" in self.attributes:
            return montages_from_json(self.attributes["montages"]), None
        names = self.attributes.get("channel_names")
        try:
            montage, rows = montage_of_rows(self._old, names, self.flavour, channels)
        except ValueError as error:
            if not self._to_look:
                raise ValueError(f"{self.path}: {error}") from error
            montage, rows = (
                Montage("unknown", tuple(f"row {i}" for i in range(channels)), np.zeros((channels, 3))),
                None,
            )
        return {montage.name: montage}, rows

    def _index(self, blocks: list[_Block]) -> None:
        counts = [block.shape[0] for block in blocks]
        self.groups = [block.name for block in blocks]
        self.dtype = blocks[0].dtype
        self.first_rows = np.cumsum([0, *counts[:-1]])
        self._offsets = np.array([block.offset for block in blocks])
        only = next(iter(self.montages)) if len(self.montages) == 1 else None
        montage_names = [only or str(block.attributes.get("montage", "")) for block in blocks]
        for block, montage in zip(blocks, montage_names, strict=True):
            channels = block.shape[1]
            if montage not in self.montages or channels != len(self.montages[montage]):
                raise ValueError(
                    f"{self.path}: group {block.name!r} has {channels} channels, which montage {montage!r} does not "
                    f"describe"
                )
        self.montage_names = Names.repeated(montage_names, counts)
        who = [self._who(block) for block in blocks]
        self.subjects = Names.repeated([subject for subject, _ in who], counts)
        self.recordings = Names.repeated([recording for _, recording in who], counts)
        self.start_samples = np.concatenate([self._starts(block) for block in blocks])
        hashes = [block.hashes for block in blocks if block.hashes is not None]
        self.window_hashes = np.concatenate(hashes).astype(np.uint64) if len(hashes) == len(blocks) else None
        try:
            self.labels = self._joined_labels(blocks)
        except ValueError:
            if not self._to_look:
                raise
            self.labels = None

    def _who(self, block: _Block) -> tuple[str, str]:
        """Subject and recording of a group; numbered groups of the reference tell neither."""
        subject = subject_of_group(block.name) if self.flavour is not None and self.flavour.letter == "B" else None
        unknown = (f"{self._title} (subjects unknown)", f"{self._title}/{block.name}")
        unknown = unknown if subject is None else (subject, block.name)
        found = (block.attributes.get(key) for key in ("subject_id", "recording_id"))
        subject, recording = (str(name or guess) for name, guess in zip(found, unknown, strict=True))
        return subject, recording

    def _starts(self, block: _Block) -> np.ndarray:
        """Places of the windows; those of a flavour-B recording follow each other from its beginning."""
        if block.starts is not None:
            return block.starts.astype(np.int64)
        if self.flavour is not None and self.flavour.letter == "B":
            return np.arange(block.shape[0], dtype=np.int64) * self.n_times
        return np.full(block.shape[0], -1, dtype=np.int64)

    def _joined_labels(self, blocks: list[_Block]) -> np.ndarray | None:
        bare = [block.name for block in blocks if block.labels is None]
        if len(bare) == len(blocks):
            return None
        if bare:
            raise ValueError(
                f"{self.path}: {len(bare)} groups have no labels (the first: {bare[0]!r}), the others have"
            )
        found = [block.labels for block in blocks if block.labels is not None]
        if len({(labels.dtype.kind in "iub", labels.shape[1:]) for labels in found}) > 1:
            raise ValueError(f"{self.path}: the groups have labels of different kinds, y has different shapes or types")
        labels = np.concatenate(found)
        if labels.dtype.kind in "iub":
            per_channel = self.channel_rows is not None and labels.shape[1:] == self.channel_rows.shape
            return (labels[:, self.channel_rows] if per_channel else labels).astype(np.int32)
        return labels.astype(np.float32).reshape(len(labels), -1)

    def seams(self, groups: Sequence[int] | None = None) -> Seams:
        """Whether the windows of some groups (places in `groups`; None: a few over the file) look scrambled."""
        with self._readable(), h5py.File(self.path, "r") as file:
            return self._seams(file, groups)

    def _seams(self, file: h5py.File, groups: Sequence[int] | None = None) -> Seams:
        spread = np.unique(np.linspace(0, len(self.groups) - 1, _MEASURED_GROUPS).astype(int)).tolist()
        names = [self.groups[i] for i in (spread if groups is None else groups)]
        found = [_dataset(file[name], "X", name) for name in names]
        counts = [max(2, min(64, _MEASURED_BYTES // (data[:1].nbytes or 1))) for data in found]
        return measure_seams([(data[:count], len(data)) for data, count in zip(found, counts, strict=True)])

    def _layout_is_scrambled(self, file: h5py.File) -> bool:
        stated = self.attributes.get("window_layout")
        if stated is not None:
            if stated != "nct":
                raise ValueError(f"{self.path}: unknown window_layout {stated!r}: update lumamba_jax")
            return False
        if self._old.windows != "auto":
            return self._old.windows == "scrambled"
        if self.flavour is not None and self.flavour.letter != "B":
            return False
        return taken_for_scrambled(self._seams(file), self.flavour)

    def _read_group(self, data: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
        unique, back = np.unique(rows, return_inverse=True)
        first, last = int(unique[0]), int(unique[-1])
        together = len(unique) == last - first + 1  # a plain slice is much faster than a list of rows
        if self.scrambled:
            found = _unscrambled(data, first, last + 1) if together else np.concatenate(
                [_unscrambled(data, row, row + 1) for row in unique.tolist()]
            )  # fmt: skip
        else:
            found = data[first : last + 1] if together else data[unique]
        if self.channel_rows is not None:
            found = found[:, self.channel_rows]
        return found[back].astype(np.float32)

    def _clean(self, signal: np.ndarray) -> None:
        """Make microvolts of a window just read, and zeros of a float16 overflow, in place."""
        if self._scale != 1.0:
            signal *= np.float32(self._scale)
        if "window_layout" in self.attributes or self._old.non_finite == "keep" or np.isfinite(signal).all():
            return
        bad = int((~np.isfinite(signal)).sum())
        self.num_replaced += bad
        warnings.warn(
            f"{self.path}: {bad} values are not finite (a float16 overflow of the writing pipeline) and are read as 0",
            stacklevel=4,
        )
        np.nan_to_num(signal, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _unscrambled(data: h5py.Dataset, first: int, stop: int) -> np.ndarray:
    """True windows `first` to `stop` of a block that was reshaped from (C, n*T) to (n,C,T) as it lay in memory.

    Channel c is then pieces c*n ... c*n + n - 1 of the stored order. Bit-exact; reads no more than it returns, and up
    to a stored window at each end of a channel.
    """
    n, channels, samples = data.shape
    out = np.empty((stop - first, channels, samples), data.dtype)
    for channel in range(channels):
        begin, end = channel * n + first, channel * n + stop
        whole = slice(begin // channels, -(-end // channels))
        if stop - first == 1:
            out[0, channel] = data[begin // channels, begin % channels]
        else:
            out[:, channel] = data[whole].reshape(-1, samples)[begin - whole.start * channels :][: stop - first]
    return out


def montages_from_json(text: str) -> dict[str, Montage]:
    """The montages that a store's description holds, by name."""
    return {name: Montage(name, m["ch_names"], np.array(m["locations"])) for name, m in json.loads(text).items()}


def montages_to_json(montages: Iterable[Montage]) -> str:
    """The inverse of `montages_from_json`; float32 positions survive it."""
    return json.dumps({m.name: {"ch_names": m.ch_names, "locations": m.locations.tolist()} for m in montages})


def _label_type(labels: np.ndarray) -> type:
    """Type on disk: the reference's for classes, one per window or per channel; float32 for targets."""
    if labels.ndim == 1:
        return np.int64
    return np.int8 if np.issubdtype(labels.dtype, np.integer) else np.float32


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _offset(data: h5py.Dataset) -> int:
    """Where plain float32 windows lie one after the other in the file; -1: they do not, HDF5 must read them."""
    plain = data.dtype == np.float32 and data.dtype.isnative and not data.external and hasattr(os, "preadv")
    if not plain or data.file.userblock_size:
        return -1
    found = data.id.get_offset()  # None for chunks, compression and virtual datasets
    return -1 if found is None else int(found)


def _dataset(group: Any, column: str, name: str) -> h5py.Dataset:
    found = group[column]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{group.file.filename}: {name}/{column} is not a dataset")
    return found


def _attributes(thing: h5py.File | h5py.Group, texts: TextHeaps) -> dict[str, Any]:
    texts.check(thing)
    return {key: _decoded(value) for key, value in thing.attrs.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_decoded(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value
