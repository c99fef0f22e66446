"""The windows of an experiment: which stores are opened, who trains, validates and tests, and with which labels."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import DataConfig, ExperimentConfig
from data_pipeline.formats import open_stores
from data_pipeline.leakage import Times, check_content, check_disjoint, check_times
from data_pipeline.loader import Batches, LoaderConfig, make_dataset
from data_pipeline.names import Names
from data_pipeline.splits import (
    Split,
    check_leakage,
    few_shot,
    leave_subject_out,
    load_split,
    save_split,
    split_by_recording,
    split_by_subject,
    split_in_time,
    subject_folds,
)
from data_pipeline.store import Store
from data_pipeline.window_hashes import NO_SIGNAL
from lumamba_jax.architectures import ModelConfig
from lumamba_jax.femba import FembaConfig

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Windows:
    """All windows of an experiment under one numbering (the loader's `window_id`), and the part each belongs to.

    Attributes:
        stores: opened stores, in the order of the numbering.
        parts: window numbers of "train", "validation" and "test", each `(n,)`, sorted, disjoint by subject.
        subjects, recordings: `(N,)` names, for every window.
        labels: `(N,)` int32 classes or `(N, K)` targets, None when the stores have none; permuted if asked.
        class_names: names of the classes, if the stores have them.
        split: how the training stores were divided.
    """

    stores: tuple[Store, ...]
    parts: dict[str, np.ndarray]
    subjects: Names
    recordings: Names
    labels: np.ndarray | None
    class_names: list[str] | None
    split: Split

    @property
    def num_outputs(self) -> int:
        """Classes, or regression targets, of the labels."""
        assert self.labels is not None, "asked for in open_windows"
        if self.labels.dtype.kind == "f":
            return self.labels.shape[1]
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def batches(self, part: str, config: LoaderConfig, *, host_index: int = 0, host_count: int = 1) -> Batches:
        """The batches of one part; ValueError says when it is empty or cannot be batched."""
        if not len(self.parts[part]):
            raise ValueError(f"there are no {part} windows: give more subjects, a {part} store or a larger fraction")
        rows = self._by_store(self.parts[part])
        return make_dataset(list(self.stores), rows, config, host_index=host_index, host_count=host_count)

    @functools.cached_property
    def has_several_montages(self) -> bool:
        """Whether the windows have more than one montage."""
        return len({name for store in self.stores for name in store.montages}) > 1

    @functools.cached_property
    def preparation(self) -> dict[str, Any]:
        """How the training windows were prepared, each None where their stores differ.

        `channels`, names in their order; `filters`, as the stores state them (`StoreInfo.filters`).
        """
        stores = [store for store, _ in self.pairs("train")]
        channels = {montage.ch_names for store in stores for montage in store.montages.values()}
        filters = {json.dumps(store.info.filters, sort_keys=True) for store in stores}
        return {
            "channels": list(channels.pop()) if len(channels) == 1 else None,
            "filters": json.loads(filters.pop()) if len(filters) == 1 else None,
        }

    def montage_names_of(self, window_ids: np.ndarray) -> np.ndarray:
        """Names of the montages of windows `(n,)`; empty for filler rows (-1)."""
        ends = np.cumsum([len(store) for store in self.stores])
        stores = np.searchsorted(ends, window_ids, side="right")
        return np.array(
            [
                "" if i < 0 else str(self.stores[number].montage_names[i - ends[number] + len(self.stores[number])])
                for i, number in zip(window_ids, stores, strict=True)
            ]
        )

    @functools.cached_property
    def digest(self) -> str:
        """What the windows are, without reading a signal: their hashes where the stores hold them, else the sizes of
        files; subjects, recordings, places, labels. The same in every format and place."""
        found = hashlib.sha256()
        for store in self.stores:
            found.update(f"{store.sfreq} {store.n_times}".encode())
            hashes = store.window_hashes
            found.update(str(store.num_bytes).encode() if hashes is None else np.ascontiguousarray(hashes).tobytes())
            for column in (store.subjects, store.recordings, store.montage_names):
                found.update("\n".join([*column.table, ""]).encode())
                found.update(np.ascontiguousarray(column.codes).tobytes())
            found.update(np.ascontiguousarray(store.start_samples).tobytes())
            if store.labels is not None:
                found.update(np.ascontiguousarray(store.labels).tobytes())
        return found.hexdigest()[:16]

    def pairs(self, part: str) -> list[tuple[Store, np.ndarray]]:
        """(store, rows in it) of one part, in the order of the numbering; stores without such windows are left out."""
        rows = self._by_store(self.parts[part])
        return [(store, own) for store, own in zip(self.stores, rows, strict=True) if len(own)]

    def class_weights(self) -> np.ndarray:
        """Weights `(K,)` float32 inverse to the class frequencies of the training windows, mean 1 over decisions."""
        assert self.labels is not None
        counts = np.bincount(self.labels[self.parts["train"]].reshape(-1), minlength=self.num_outputs)
        if not counts.all():
            raise ValueError(f"class {int(np.argmin(counts))} has no training window: it cannot be weighted")
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)

    def save_split(self, path: Path) -> None:
        """Write the division of the training stores, to be named by `data.split_file` of another run."""
        save_split(self.split, path)

    def _by_store(self, numbers: np.ndarray) -> list[np.ndarray]:
        bounds = np.cumsum([0, *(len(store) for store in self.stores)])
        store_of = np.searchsorted(bounds, numbers, side="right") - 1
        order = np.argsort(store_of, kind="stable")
        places = np.searchsorted(store_of[order], np.arange(len(bounds)))
        return [numbers[order[a:b]] - first for (a, b), first in zip(pairwise(places), bounds, strict=False)]


def open_windows(config: DataConfig, *, labelled: bool) -> Windows:
    """Open the stores of `config` and divide their subjects.

    Raises: ValueError when no store is given, a store is missing or damaged, labels are missing though `labelled`, the
        division is impossible, or a subject or recording would be in two parts.
    """
    if not config.train:
        raise ValueError("no training data: give one or more window stores or a folder of them, --data.train FILE.h5")
    groups = [open_stores(paths, config.old_files) for paths in (config.train, config.validation, config.test)]
    stores = [store for group in groups for store in group]
    labels = _labels(stores) if labelled else None
    subjects, recordings = (Names.concatenate([getattr(s, n) for s in stores]) for n in ("subjects", "recordings"))
    sizes = [sum(len(store) for store in group) for group in groups]
    starts = np.cumsum([0, *sizes])
    own = np.arange(sizes[0])
    split = _split(config, groups[0], subjects.take(own), recordings.take(own))
    parts = {
        "train": split.train,
        "validation": np.arange(starts[1], starts[2]) if config.validation else split.val,
        "test": np.arange(starts[2], starts[3]) if config.test else split.test,
    }
    _check_parts(config, stores, split, parts, subjects, recordings)
    if labels is not None and config.permute_labels:
        labels = _permuted(stores, labels, np.concatenate([parts["train"], parts["validation"]]), config.split_seed)
    names = stores[0].class_names if labelled else None
    return Windows(tuple(stores), parts, subjects, recordings, labels, names, split)


def resolve(config: ExperimentConfig, windows: Windows) -> ExperimentConfig:
    """Fill in what the data decides (number of outputs), and refuse what contradicts it."""
    model = config.model
    if windows.labels is not None:
        targets = np.issubdtype(windows.labels.dtype, np.floating)
        if config.task.kind == "regress" and not targets:
            raise ValueError("the stores hold class labels: use --task.kind classify, or prepare targets (n, K)")
        model = model.replace(num_outputs=model.num_outputs or windows.num_outputs)
        if model.output_channels is None and model.num_outputs != windows.num_outputs:
            found, names = windows.num_outputs, ", ".join(windows.class_names or [])
            raise ValueError(f"model.num_outputs is {model.num_outputs}, but the labels have {found} ({names})")
    check_windows(model, windows)
    loader = dataclasses.replace(config.loader, patch_size=loader_patch(model))
    return dataclasses.replace(config, model=model, loader=loader)


def loader_patch(model: ModelConfig) -> int:
    """The `patch_size` of the loader: samples per entry of its `patch_mask`, of which it fills whole ones only.

    The model's patch, but for a FEMBA whose windows are no multiple of it: the rest at their end is not read, and a
    fixed grid knows no padding for a mask to tell, so the entries need only divide the window.
    """
    return math.gcd(model.patch_size, model.num_samples) if isinstance(model, FembaConfig) else model.patch_size


def check_windows(model: ModelConfig, windows: Windows) -> None:
    """Raise ValueError when a montage or window length of the stores does not fit the model."""
    for store in windows.stores:
        for name, montage in store.montages.items():
            try:
                model.check_window(len(montage.ch_names), store.n_times)
            except ValueError as error:
                raise ValueError(f"{store.path}, montage {name}: {error}") from error


def _split(config: DataConfig, stores: Sequence[Store], subjects: Names, recordings: Names) -> Split:
    labels, seed = _split_labels(stores), config.split_seed
    validation = 0.0 if config.validation else config.validation_fraction
    fractions = {"val_fraction": validation, "test_fraction": 0.0 if config.test else config.test_fraction}
    if config.split_file:
        split = load_split(config.split_file, subjects, recordings)
    elif config.num_folds is not None and config.fold is not None:
        folds = subject_folds(subjects, labels, config.num_folds, seed, val_fraction=validation)
        split = folds[config.fold]
    elif config.few_shot is not None:
        if labels is None:
            raise ValueError("data.few_shot counts windows per class: the training stores have no class labels")
        whole = {"shots": config.few_shot, "others": config.few_shot_others, "val_fraction": validation, "seed": seed}
        split = few_shot(subjects, labels, _whole(recordings), _times(stores), subject=config.leave_out, **whole)
    elif config.leave_out:
        split = leave_subject_out(subjects, config.leave_out, labels, val_fraction=validation, seed=seed)
    elif config.split_unit == "time":
        split = split_in_time(_whole(recordings), _times(stores), subjects=subjects, **fractions)
    elif config.split_unit == "recording":
        split = split_by_recording(recordings, labels, seed=seed, **fractions)
    else:
        split = split_by_subject(subjects, labels, seed=seed, **fractions)
    times = _times(stores) if split.unit in ("time", "window") else None
    check_leakage(split, subjects, recordings if times is None else _whole(recordings), times)
    return split


def _check_parts(
    config: DataConfig,
    stores: Sequence[Store],
    split: Split,
    parts: dict[str, np.ndarray],
    subjects: Names,
    recordings: Names,
) -> None:
    """What `check_leakage` did within the training stores, between them and the other stores; and equal windows."""
    used = {"train": np.concatenate(list(split.parts.values()))}  # a split in time has its subjects in several parts
    used |= {name: parts[name] for name in PARTS[1:] if getattr(config, name)}
    if config.split_unit == "subject":
        check_disjoint({part: subjects.unique(rows).tolist() for part, rows in used.items()})
    elif config.split_unit == "recording":
        check_disjoint({part: recordings.unique(rows).tolist() for part, rows in used.items()}, what="recording")
    elif len(used) > 1:
        check_times(used, _whole(recordings), _times(stores), gap=0.0)
    if config.compare_windows != "none" and sum(map(bool, map(len, parts.values()))) > 1:
        check_content(parts, np.concatenate([_hashes(config, store) for store in stores]), subjects, recordings)


def _hashes(config: DataConfig, store: Store) -> np.ndarray:
    if store.window_hashes is None and config.compare_windows == "stored":
        return np.full(len(store), NO_SIGNAL, np.uint64)
    return store.content_hashes()


def _times(stores: Sequence[Store]) -> Times:
    found = [Times.of_samples(store.start_samples, store.n_times, store.sfreq) for store in stores]
    return Times(np.concatenate([t.starts for t in found]), np.concatenate([t.lengths for t in found]))


def _whole(recordings: Names) -> Names:
    """What pieces of recordings (`recording#piece`, the names of trials and parts of a file) were cut from."""
    whole = Names.of(np.array([name.partition("#")[0] for name in recordings.table], dtype=str))
    return Names(whole.table, whole.codes[recordings.codes])


def _split_labels(stores: Sequence[Store]) -> np.ndarray | None:
    """Labels for the strata, whatever the task: pre-training on a labelled store must use the folds of fine-tuning."""
    found = [store.labels for store in stores if store.labels is not None and store.labels.ndim == 1]
    return np.concatenate(found) if len(found) == len(stores) else None


def _labels(stores: Sequence[Store]) -> np.ndarray:
    bare = [str(store.path) for store in stores if store.labels is None]
    if bare:
        raise ValueError(f"{bare[0]} has no labels: prepare it with labels, or train with a pre-training preset")
    found = [store.labels for store in stores if store.labels is not None]
    if len({(labels.dtype.kind, labels.shape[1:]) for labels in found}) > 1:
        raise ValueError("the stores have labels of different kinds: prepare them with the same label file format")
    if len({tuple(store.class_names or ()) for store in stores}) > 1:
        raise ValueError("the stores name different classes: prepare them with the same class names")
    return np.concatenate(found)


def _permuted(stores: Sequence[Store], labels: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle the labels of `rows` among themselves, also in the stores that the loader reads."""
    permuted = labels.copy()
    permuted[rows] = labels[np.random.default_rng((seed, 1)).permutation(rows)]
    bounds = np.cumsum([len(store) for store in stores])[:-1]
    for store, own in zip(stores, np.split(permuted, bounds), strict=True):
        store.labels = own
    return permuted
