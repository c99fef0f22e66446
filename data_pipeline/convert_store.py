"""Window stores from one format to the other, several into one: `python -m data_pipeline.convert_store IN... OUT`.

OUT ending in .h5 or .hdf5 is written as one HDF5 file, any other name as a folder of ArrayRecord shards. An IN is a
store of either format or a folder of stores; windows keep their order. `--check STORE...` reads ArrayRecord stores and
compares their checksums.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.array_record_store import SHARD_WINDOWS, ArrayRecordStore, create_array_record_store
from data_pipeline.formats import HDF5_SUFFIXES, open_stores
from data_pipeline.store import Store, StoreInfo, create_store

_PIECE = 512  # windows in memory: 58 MB of 22 x 1280
_COMPARED = 64  # windows of the result that are read again and compared

Add = Callable[[Store, np.ndarray, np.ndarray], None]  # (store, rows of one recording and montage, signal (n,C,T))


@dataclass(frozen=True)
class ConvertConfig:
    """Stores to convert."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """IN... OUT: the stores to read, then the one to write"""
    shard_windows: int = SHARD_WINDOWS
    """windows in each file of an ArrayRecord store"""
    check: bool = False
    """write nothing: read the given ArrayRecord stores and compare their checksums"""


def convert(inputs: Sequence[Path], out: Path, *, shard_windows: int = SHARD_WINDOWS) -> Store:
    """Write the windows of `inputs` into `out` (`write_windows`). Raises ValueError when an input is damaged or the
    inputs do not fit one store.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or choose another name")
    stores = open_stores(inputs)
    info = _common_info(stores)
    return write_windows(stores, [np.arange(len(s)) for s in stores], out, info, shard_windows=shard_windows)


def write_windows(
    stores: Sequence[Store],
    rows: Sequence[np.ndarray],
    out: Path,
    info: StoreInfo,
    *,
    shard_windows: int = SHARD_WINDOWS,
) -> Store:
    """Write the windows `rows` (n,) of each store into `out`, whole or not at all, and return it opened.

    The result is read again: everything known of its windows, and the signal of 64 of them, is compared with what it
    was made of. Raises ValueError when `out` exists, nothing is to be written, or a window cannot be stored.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or choose another name")
    total = sum(map(len, rows))
    with _writer(out, info, total, shard_windows) as add, _bar(f"{out.name}:", total) as advance:
        for store, chosen in zip(stores, rows, strict=True):
            for own in _pieces(store, chosen):
                add(store, own, store.read(own))
                advance(len(own))
    (result,) = open_stores([out])
    _compare(stores, rows, result)
    return result


def check(paths: Sequence[Path]) -> None:
    """Compare the checksums of ArrayRecord stores. Raises ValueError naming the first file that is damaged."""
    for store in open_stores(paths):
        if not isinstance(store, ArrayRecordStore):
            raise ValueError(f"{store.path} is an HDF5 file, which has no checksums: convert it to compare windows")
        store.verify()
        print(f"{store.path}: {len(store):,} windows, every checksum fits")


@contextmanager
def _writer(out: Path, info: StoreInfo, total: int, shard_windows: int) -> Iterator[Add]:
    if out.suffix in HDF5_SUFFIXES:
        with create_store(out, info) as hdf5:
            number = iter(range(total))
            yield lambda store, rows, signal: hdf5.add(
                # HDF5 lists groups by name: the number keeps the windows in their order
                f"{next(number):08d}-{re.sub(r'[^A-Za-z0-9._-]', '_', store.recordings[rows[0]])[:80]}",
                signal,
                store.montages[store.montage_names[rows[0]]],
                subject=str(store.subjects[rows[0]]),
                recording=str(store.recordings[rows[0]]),
                start_samples=store.start_samples[rows],
                labels=None if store.labels is None else store.labels[rows],
            )
        return
    with create_array_record_store(out, info, num_windows=total, shard_windows=shard_windows) as shards:
        yield lambda store, rows, signal: shards.add(
            signal,
            store.montages[store.montage_names[rows[0]]],
            subjects=store.subjects.take(rows),
            recordings=store.recordings.take(rows),
            start_samples=store.start_samples[rows],
            labels=None if store.labels is None else store.labels[rows],
        )


def _pieces(store: Store, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of `rows` of one subject, recording and montage, at most `_PIECE` at a time."""
    columns = (store.subjects.codes[rows], store.recordings.codes[rows], store.montage_names.codes[rows])
    changes = np.flatnonzero(np.any([np.diff(codes.astype(np.int64)) != 0 for codes in columns], axis=0)) + 1
    bounds = [0, *changes.tolist(), len(rows)]
    for first, last in pairwise(bounds):
        for start in range(first, last, _PIECE):
            yield rows[start : min(start + _PIECE, last)]


def _common_info(stores: Sequence[Store]) -> StoreInfo:
    """What the stores agree on; their own filters and provenance are listed when they differ."""
    first = stores[0]
    for store in stores[1:]:
        for what, a, b in (
            ("sampling rate", first.sfreq, store.sfreq),
            ("window length", first.n_times, store.n_times),
            ("stride", first.info.stride_seconds, store.info.stride_seconds),
            ("class names", first.class_names, store.class_names),
            ("kind of labels", _label_kind(first), _label_kind(store)),
        ):
            if a != b:
                raise ValueError(f"{first.path} and {store.path} differ in their {what} ({a} and {b}): they cannot be "
                                 f"one store; convert them separately")  # fmt: skip
    infos = [store.info for store in stores]
    if all(info.filters == infos[0].filters and info.provenance == infos[0].provenance for info in infos):
        return infos[0]
    own = {s.path.name: {"filters": i.filters, "provenance": i.provenance} for s, i in zip(stores, infos, strict=True)}
    return dataclasses.replace(infos[0], filters={"see": "provenance"}, provenance={"stores": own})


def _label_kind(store: Store) -> str:
    return "none" if store.labels is None else f"{store.labels.dtype} {store.labels.shape[1:]}"


def _compare(stores: Sequence[Store], rows: Sequence[np.ndarray], result: Store) -> None:
    starts = np.cumsum([0, *map(len, rows)])
    same = len(result) == starts[-1]
    known = ["subjects", "recordings", "montage_names", "start_samples"] + ["labels"] * (result.labels is not None)
    for name in known if same else ():
        found = np.asarray(getattr(result, name))
        for store, own, first in zip(stores, rows, starts[:-1].tolist(), strict=True):
            same = same and np.array_equal(found[first : first + len(own)], np.asarray(getattr(store, name))[own])
    rng = np.random.default_rng(0)
    for row in {0, len(result) - 1, *rng.integers(len(result), size=_COMPARED).tolist()} if same else ():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        origin = stores[number][rows[number][row - starts[number]]]
        same = same and np.array_equal(result[row]["signal"], origin["signal"])
    if not same:
        raise ValueError(f"{result.path} does not hold what was read, the disk may be failing: remove it")


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one sentence on stderr."""
    config: Any = tyro.cli(
        ConvertConfig, args=arguments, description=__doc__, prog="python -m data_pipeline.convert_store"
    )
    try:
        if config.check:
            check(config.paths)
            return 0
        if len(config.paths) < 2:
            raise ValueError("give the stores to read, then the one to write")
        *inputs, out = config.paths
        result = convert(inputs, out, shard_windows=config.shard_windows)
    except (ValueError, OSError) as error:
        print(f"convert_store: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_store: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{result.path}: {len(result):,} windows, {result.num_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
