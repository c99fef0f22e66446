"""Windows of one or several stores -> host batches: order, mixing of montages, per-host slice, augmentation, padding.

The batch of step `k` is a function of (data, seed, `k`) and of nothing else: no reader thread, restart or number of
hosts changes which windows (and which augmentation draws) step `k` holds. The pipeline is Grain's random-access
`MapDataset` to the end: source -> seed -> shuffle -> repeat -> random_map -> own rows -> batch, one such stream
for each bucket, joined by a fixed schedule. A bucket is what may share a batch, and has one shape: the number of
compiled programs is the number of distinct shapes.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import grain
import numpy as np

from data_pipeline.montages import Montage
from data_pipeline.names import Names
from data_pipeline.store import Store

FILLER = -1  # window_id of rows that only fill up the last batch
_REPLACEMENT_TRIES = 64


@dataclass(frozen=True)
class LoaderConfig:
    """How windows become batches.

    Attributes:
        batch_size: windows per step over all hosts.
        patch_size: samples per entry of `patch_mask`, usually a patch of the model; every window length must be a
            multiple of it.
        seed: decides permutations and augmentation draws.
        shuffle: a new permutation of each bucket every epoch; False = stored order.
        drop_remainder: leave out the windows of an epoch that do not fill a batch (others every epoch); False = fill
            the last batch with rows of `window_mask` False.
        grouping: "montage" = a batch holds one montage and one window length, never padded; "padded" = montages and
            lengths are mixed in a batch and padded to the smallest bucket that holds them.
        channel_buckets: channel counts to pad to; empty = the largest montage. "padded" only.
        time_buckets: window lengths in samples to pad to; empty = the longest window. "padded" only.
        interleave: "proportional" = buckets alternate evenly over the epoch; "sequential" = one after the other, in
            order of first mention (the reference's order).
        channel_dropout: augmentation, probability that a channel is hidden (`channel_mask` False); one always stays.
        noise_uv: augmentation, standard deviation of white noise added to the signal, microvolts.
        reader_threads: threads that read ahead in `Batches.iterate`; 0 = read when asked.
        prefetch: batches held ready by those threads.
    """

    batch_size: int = 64
    patch_size: int = 40
    seed: int = 0
    shuffle: bool = True
    drop_remainder: bool = True
    grouping: Literal["montage", "padded"] = "montage"
    channel_buckets: tuple[int, ...] = ()
    time_buckets: tuple[int, ...] = ()
    interleave: Literal["proportional", "sequential"] = "proportional"
    channel_dropout: float = 0.0
    noise_uv: float = 0.0
    reader_threads: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        for name in ("batch_size", "patch_size", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"loader: {name} must be at least 1, not {getattr(self, name)}")
        if self.grouping not in ("montage", "padded"):
            raise ValueError(f"loader: grouping must be 'montage' or 'padded', not {self.grouping!r}")
        if self.interleave not in ("proportional", "sequential"):
            raise ValueError(f"loader: interleave must be 'proportional' or 'sequential', not {self.interleave!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"loader: seed must lie in 0..2**32-1, not {self.seed}")
        if not 0 <= self.channel_dropout < 1 or self.noise_uv < 0 or self.reader_threads < 0:
            raise ValueError("loader: channel_dropout must lie in [0, 1), noise_uv and reader_threads must be >= 0")
        if self.grouping == "montage" and (self.channel_buckets or self.time_buckets):
            raise ValueError("loader: channel_buckets and time_buckets pad: they need grouping 'padded'")
        ragged = [t for t in self.time_buckets if t % self.patch_size]
        if ragged:
            raise ValueError(f"loader: time bucket {ragged[0]} is not a multiple of the patch size {self.patch_size}")

    def for_evaluation(self) -> "LoaderConfig":
        """The same shapes for one complete pass: no augmentation, the last batch of each bucket filled up.

        Rows come in the order asked for within a bucket; with several buckets go by `window_id`.
        """
        return dataclasses.replace(self, shuffle=False, drop_remainder=False, channel_dropout=0.0, noise_uv=0.0)


def make_dataset(
    stores: Store | Sequence[Store],
    rows: np.ndarray | Sequence[np.ndarray] | None,
    config: LoaderConfig,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> "Batches":
    """Batches of the windows `rows` of `stores`, as this host sees them.

    `rows` is one array of row numbers for each store (a single array for a single store); None = every window.
    Raises ValueError when nothing is left, a window length is not a multiple of the patch size, stores differ in
    sampling rate, a bucket has too few windows for one batch, or the hosts do not divide the batch.
    """
    own_stores, own_rows = _paired(stores, rows)
    if config.batch_size % host_count or not 0 <= host_index < host_count:
        raise ValueError(f"loader: batch size {config.batch_size} cannot be divided over {host_count} hosts "
                         f"(this is host {host_index})")  # fmt: skip
    windows = _Windows(own_stores)
    ids = windows.ids_of(own_rows)
    return Batches(windows, _make_buckets(windows, ids, config), config, host_index, host_count)


class Batches:
    """Random access to the batches of a run; made by `make_dataset`.

    `len(batches)` is the number of steps per epoch; steps count on through the epochs. Keys, shapes and dtypes of a
    batch are those of docs/architecture.md. `window_id` is the row in the store; with several stores the windows are
    numbered through in the order of the stores (`locate` turns a number back); -1 in filler rows.

    Attributes: num_windows (distinct windows of an epoch before any remainder is dropped), shapes (the distinct
    (B,C,T) of this host), label_problem (why batches have no `label`, or None when they have).
    """

    def __init__(
        self, windows: "_Windows", buckets: list["_Bucket"], config: LoaderConfig, host_index: int, host_count: int
    ) -> None:
        self.config = config
        self.num_windows = sum(len(bucket.ids) for bucket in buckets)
        self.shapes = sorted({(config.batch_size // host_count, b.channels, b.samples) for b in buckets})
        self.label_problem = windows.label_problem
        self._windows = windows
        self._bad: set[int] = set()
        self._schedule = _Schedule([b.steps(config) for b in buckets], config.interleave)
        streams = [self._stream(bucket, i, host_index, host_count) for i, bucket in enumerate(buckets)]
        self._dataset = grain.MapDataset.select_from_datasets(streams, self._schedule).repeat()

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """One epoch, the first."""
        return self.iterate(0, len(self))

    @property
    def num_bad_windows(self) -> int:
        """Distinct unusable windows met so far.

        With shuffling (training), windows that are not finite or constant on every channel; each is replaced by
        another window of its bucket, always the same one. Without (evaluation), windows that are not finite; their
        signal is set to zero and `window_mask` to False, so that they are scored by nobody.
        """
        return len(self._bad)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step` (0-based, any epoch). Raises IndexError for a negative step."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        batch = self._dataset[int(step)]
        assert batch is not None, "nothing filters the stream"
        return batch

    def iterate(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """`batch(start_step), batch(start_step + 1), ...` read ahead by threads; endless without `stop_step`."""
        steps = self._dataset[start_step:stop_step]
        if len(steps) == 0:
            return iter(())
        threads = self.config.reader_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.config.prefetch if threads else 0)
        return iter(steps.to_iter_dataset(options))

    def locate(self, window_id: int) -> tuple[int, int]:
        """Number of the store and row in it."""
        return self._windows.locate(window_id)

    def _stream(self, bucket: "_Bucket", number: int, host_index: int, host_count: int) -> grain.MapDataset:
        config = self.config
        size = config.batch_size
        local = size // host_count
        # Grain's per-epoch seeds are consecutive: without mixing, bucket 1 in epoch 0 would repeat bucket 0 in epoch 1
        seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0])
        epoch = grain.MapDataset.source(cast(Sequence, bucket.ids)).seed(seed)  # an array reads like a sequence
        if config.shuffle:
            epoch = epoch.shuffle()
        steps = bucket.steps(config)
        missing = steps * size - len(bucket.ids)
        if missing > 0:
            epoch = grain.MapDataset.concatenate([epoch, grain.MapDataset.source([FILLER] * missing)]).seed(seed)
        stream = epoch[: steps * size].repeat().random_map(_with_seed)

        def batch(step: int) -> dict[str, np.ndarray]:
            # A run of neighbouring rows of each batch: put together in the order of the hosts they are the batch of a
            # single host, so that what is drawn per row (masks, views) does not depend on their number.
            first = step * size + host_index * local
            ids, seeds = zip(*(cast(tuple, stream[row]) for row in range(first, first + local)), strict=True)
            return self._assemble(bucket, np.array(ids), np.array(seeds))

        return grain.MapDataset.range(sys.maxsize // size).map(batch)

    def _assemble(self, bucket: "_Bucket", ids: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
        """ids (b,) window numbers or FILLER, seeds (b,) of the augmentation draws -> batch."""
        real = ids != FILLER
        batch = _empty_batch(len(ids), bucket, self.config.patch_size)
        ids = ids.copy()
        usable = self._fill(batch, ids, np.flatnonzero(real))
        if self.config.shuffle:
            replaced = np.flatnonzero(real & ~usable)
            for row in replaced:
                ids[row] = self._replacement(int(ids[row]), bucket)
            self._fill(batch, ids, replaced)
            usable = real
        # a filler row has a montage too: masks that hide everything would make NaN of an attention over channels
        self._describe(batch, np.flatnonzero(~real), *self._windows.kind_of(bucket.ids[0]))
        batch["signal"][~real] = 0.0
        batch["window_mask"] = real & usable
        batch["window_id"] = ids.astype(np.int32)
        if self._windows.label_problem is None:
            batch["label"] = self._windows.labels_of(ids)
        if self.config.channel_dropout or self.config.noise_uv:
            for row in np.flatnonzero(real):
                _augment(batch, int(row), self.config, np.random.default_rng(seeds[row]))
        return batch

    def _fill(self, batch: dict, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Write the windows `ids[rows]` into `rows` of the batch; returns (b,) bool, False where unusable."""
        usable = np.ones(len(ids), dtype=bool)
        for where, montage, samples in self._windows.read(ids, rows, batch["signal"]):
            self._describe(batch, where, montage, samples)
            for row in where.tolist():
                window = batch["signal"][row, : len(montage), :samples]
                finite = _is_finite(window)
                usable[row] = finite and not (self.config.shuffle and _is_flat(window))
                if not finite:
                    window[...] = 0.0
            self._bad.update(ids[where[~usable[where]]].tolist())
        return usable

    def _describe(self, batch: dict, where: np.ndarray, montage: Montage, samples: int) -> None:
        """Make rows `where` windows of `montage` and `samples`: everything but the signal."""
        channels = len(montage.ch_names)
        for key in ("locations", "channel_mask", "patch_mask"):
            batch[key][where] = 0
        batch["channel_ids"][where] = -1
        batch["locations"][where, :channels] = montage.locations
        batch["channel_ids"][where, :channels] = montage.channel_ids
        batch["channel_mask"][where, :channels] = True
        batch["patch_mask"][where, : samples // self.config.patch_size] = True

    def _replacement(self, bad_id: int, bucket: "_Bucket") -> int:
        """A usable window in place of an unusable one: a function of (seed, window) alone."""
        draws = np.random.default_rng((self.config.seed, bad_id)).integers(len(bucket.ids), size=_REPLACEMENT_TRIES)
        room = np.empty((1, bucket.channels, bucket.samples), np.float32)
        for candidate in bucket.ids[draws]:
            ((_, montage, samples),) = self._windows.read(np.array([candidate]), np.array([0]), room)
            window = room[0, : len(montage), :samples]
            if _is_finite(window) and not _is_flat(window):
                return int(candidate)
        store, row = self._windows.locate(bad_id)
        raise ValueError(
            f"window {row} of {self._windows.name(store)} is flat or not finite, and so are {_REPLACEMENT_TRIES} "
            f"others drawn to replace it: the recordings hold no usable signal"
        )


def _paired(
    stores: Store | Sequence[Store], rows: np.ndarray | Sequence[np.ndarray] | None
) -> tuple[list[Store], list[np.ndarray]]:
    single = not isinstance(stores, Sequence)
    stores = [stores] if single else list(stores)
    if rows is None:
        return stores, [np.arange(len(store)) for store in stores]
    own = [np.asarray(rows)] if single else [np.asarray(part) for part in rows]
    if len(own) != len(stores):
        raise ValueError(f"loader: {len(stores)} stores need as many arrays of rows, found {len(own)}")
    return stores, own


class _Windows:
    """The windows of several stores under one numbering, with what the batches need to know of each."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        rates = sorted({float(store.sfreq) for store in stores})
        if len(rates) > 1:
            raise ValueError(f"loader: stores differ in sampling rate ({', '.join(f'{r:g}' for r in rates)} Hz): "
                             f"prepare them with one target rate")  # fmt: skip
        self._offsets = np.cumsum([0, *(len(store) for store in stores)])
        self._labels, self.label_problem = _joined_labels(self.stores)

    def name(self, store: int) -> str:
        return str(getattr(self.stores[store], "path", f"store {store}"))

    def locate(self, window_id: int) -> tuple[int, int]:
        store = int(np.searchsorted(self._offsets, window_id, side="right")) - 1
        return store, int(window_id - self._offsets[store])

    def ids_of(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Window numbers of `rows` of each store, (n,) int64. Raises ValueError for rows that do not exist."""
        parts = []
        for i, own in enumerate(rows):
            own = np.asarray(own, dtype=np.int64)
            n = len(self.stores[i])
            if len(own) and not 0 <= own.min() <= own.max() < n:
                raise ValueError(f"loader: rows {own.min()}..{own.max()} asked for, {self.name(i)} has {n} windows")
            parts.append(own + self._offsets[i])
        ids = np.concatenate(parts)
        if not len(ids):
            raise ValueError("loader: no windows selected: the split or the store is empty")
        return ids

    def kinds_of(self, ids: np.ndarray) -> list[tuple[int, str, np.ndarray]]:
        """(store, montage name, positions in `ids`) for each kind of window, in order of first mention."""
        store_of = np.searchsorted(self._offsets, ids, side="right") - 1
        kinds = []
        for store, at in _grouped(store_of):
            names = Names.of(self.stores[store].montage_names).take(ids[at] - self._offsets[store])
            kinds += [(store, str(names.table[code]), at[own]) for code, own in _grouped(names.codes)]
        return kinds

    def kind_of(self, window_id: int) -> tuple[Montage, int]:
        """Montage and number of samples of one window."""
        number, row = self.locate(window_id)
        store = self.stores[number]
        return store.montages[str(store.montage_names[row])], store.n_times

    def read(self, ids: np.ndarray, rows: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, Montage, int]]:
        """Write the windows `ids[rows]` into `out[rows]` (b,C,T), zero beyond their size.

        Yields (rows, montage, samples) for each kind of window among them, when it is written.
        """
        for number, name, at in self.kinds_of(ids[rows]):
            store, where = self.stores[number], rows[at]
            montage, own = store.montages[name], ids[where] - self._offsets[number]
            channels, samples = len(montage), store.n_times
            if (channels, samples) == out.shape[1:] and isinstance(store, Store):
                store.read_into(own, [out[row] for row in where.tolist()])
            else:
                out[where, channels:] = 0.0
                out[where, :, samples:] = 0.0
                out[where, :channels, :samples] = store.read(own)
            yield where, montage, samples

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Labels of window numbers, zero for FILLER."""
        labels = self._labels[np.maximum(ids, 0)]
        labels[ids == FILLER] = 0
        return labels


def _grouped(codes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(code, its positions, sorted) for each code that occurs, in order of first mention."""
    if not len(codes):
        return []
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order].astype(np.int64))) + 1)
    return [(int(codes[own[0]]), own) for own in sorted(groups, key=lambda own: own[0])]


def _joined_labels(stores: Sequence[Store]) -> tuple[np.ndarray, str | None]:
    labels = [s.labels for s in stores if s.labels is not None]
    nothing = np.zeros(0, np.int32)
    if len(labels) < len(stores):
        bare = next(i for i, s in enumerate(stores) if s.labels is None)
        return nothing, f"{getattr(stores[bare], 'path', f'store {bare}')} has no labels"
    if len({(own.dtype.kind, own.shape[1:]) for own in labels}) > 1:
        return nothing, "the stores have labels of different kinds"
    if len({tuple(s.class_names or ()) for s in stores}) > 1:
        return nothing, "the stores name different classes"
    joined = np.concatenate(labels)
    return joined.astype(np.int32 if joined.dtype.kind in "iub" else np.float32), None


@dataclass(frozen=True)
class _Bucket:
    """Windows that may share a batch of shape (·, channels, samples)."""

    name: str
    channels: int
    samples: int
    ids: np.ndarray

    def steps(self, config: LoaderConfig) -> int:
        n = len(self.ids) / config.batch_size
        return math.floor(n) if config.drop_remainder else math.ceil(n)


def _make_buckets(windows: _Windows, ids: np.ndarray, config: LoaderConfig) -> list[_Bucket]:
    kinds = windows.kinds_of(ids)
    sizes = [(len(windows.stores[s].montages[m]), windows.stores[s].n_times) for s, m, _ in kinds]
    for (store, _, _), (_, samples) in zip(kinds, sizes, strict=True):
        if samples % config.patch_size:
            raise ValueError(
                f"loader: windows of {windows.name(store)} have {samples} samples, not a multiple of the patch size "
                f"{config.patch_size}: prepare them with another window length"
            )
    channel_sizes = config.channel_buckets or (max(c for c, _ in sizes),)
    time_sizes = config.time_buckets or (max(t for _, t in sizes),)
    members: dict[tuple, list[np.ndarray]] = {}
    shapes: dict[tuple, tuple[str, int, int]] = {}
    for (store, name, at), (channels, samples) in zip(kinds, sizes, strict=True):
        if config.grouping == "padded":
            channels = _smallest_holding(channels, channel_sizes, f"channels (montage {name})")
            samples = _smallest_holding(samples, time_sizes, f"samples ({windows.name(store)})")
            key, label = (channels, samples), f"{channels} channels x {samples} samples"
        else:
            montage = windows.stores[store].montages[name]
            key = (montage.ch_names, np.asarray(montage.locations).tobytes(), samples)
            label = f"montage {name}"
        members.setdefault(key, []).append(at)
        shapes.setdefault(key, (label, channels, samples))
    # positions are sorted so that a bucket keeps the order asked for, whatever kinds it joins
    buckets = [_Bucket(*shapes[key], ids[np.sort(np.concatenate(parts))]) for key, parts in members.items()]
    for bucket in buckets:
        if bucket.steps(config) == 0:
            raise ValueError(
                f"loader: {bucket.name} has {len(bucket.ids)} windows, fewer than one batch of {config.batch_size}: "
                f"lower batch_size, set drop_remainder to false, or set grouping to 'padded'"
            )
    return buckets


def _smallest_holding(size: int, buckets: Sequence[int], what: str) -> int:
    holding = [b for b in buckets if b >= size]
    if not holding:
        raise ValueError(f"loader: {size} {what} do not fit the largest bucket, {max(buckets)}: add a larger one")
    return min(holding)


class _Schedule(grain.transforms.DatasetSelectionMap):
    """Step -> (bucket, batch in the bucket's stream); the same sequence of buckets in every epoch."""

    def __init__(self, steps: Sequence[int], interleave: str) -> None:
        self._steps = list(steps)
        bucket = np.repeat(np.arange(len(steps)), steps)
        rank = np.concatenate([np.arange(n) for n in steps])
        if interleave == "proportional":
            order = np.lexsort((bucket, (rank + 0.5) / np.asarray(steps)[bucket]))
            bucket, rank = bucket[order], rank[order]
        self._bucket, self._rank = bucket.tolist(), rank.tolist()

    def __len__(self) -> int:
        return len(self._bucket)

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, position = divmod(index, len(self))
        bucket = self._bucket[position]
        return bucket, epoch * self._steps[bucket] + self._rank[position]


def _with_seed(window_id: int, rng: np.random.Generator) -> tuple[np.int64, np.int64]:
    """The draw belongs to the example's place in the stream, so it does not depend on the number of hosts."""
    return np.int64(window_id), rng.integers(2**62)


def _empty_batch(size: int, bucket: _Bucket, patch_size: int) -> dict[str, np.ndarray]:
    """Arrays of a batch; the signal is not initialised, since each of its rows is written once."""
    channels, samples = bucket.channels, bucket.samples
    return {
        "signal": np.empty((size, channels, samples), np.float32),
        "locations": np.zeros((size, channels, 3), np.float32),
        "channel_ids": np.full((size, channels), -1, np.int32),
        "channel_mask": np.zeros((size, channels), bool),
        "patch_mask": np.zeros((size, samples // patch_size), bool),
    }


def _is_finite(signal: np.ndarray) -> bool:
    """(C,T): no value is NaN or infinite. A sum tells it in one pass; only a sum may overflow, so that is looked at."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(signal.sum())) or bool(np.isfinite(signal).all())


def _is_flat(signal: np.ndarray) -> bool:
    """(C,T): every channel is constant over the window. The first samples nearly always tell."""
    return all(bool((signal[:, :n] == signal[:, :1]).all()) for n in (8, signal.shape[1]))


def _augment(batch: dict[str, np.ndarray], row: int, config: LoaderConfig, rng: np.random.Generator) -> None:
    """Add noise and hide channels of one row, in place; padding stays zero."""
    channels = np.flatnonzero(batch["channel_mask"][row])
    samples = int(batch["patch_mask"][row].sum()) * config.patch_size
    signal = batch["signal"][row]
    if config.noise_uv:
        noise = rng.normal(0.0, config.noise_uv, (len(channels), samples)).astype(np.float32)
        signal[channels, :samples] += noise
    if config.channel_dropout:
        hidden = rng.random(len(channels)) < config.channel_dropout
        hidden[rng.integers(len(channels))] = False
        signal[channels[hidden]] = 0.0
        batch["channel_mask"][row, channels[hidden]] = False
