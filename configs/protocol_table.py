"""A table of protocols: an encoder that is not trained, and baselines, on folds by subject of a labelled store.

Joins what knows nothing of each other: windows of a store, embeddings of a model, the methods of
`data_pipeline.protocols`, scores with intervals.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from configs.data import open_windows
from configs.outputs import store_columns
from configs.run_directory import CONFIG_FILE, SPLIT_FILE
from configs.schema import read_yaml
from data_pipeline.band_power import common_channels, window_features
from data_pipeline.leakage import Times, check_content
from data_pipeline.names import Names
from data_pipeline.protocols import (
    Knows,
    Labelled,
    Method,
    baseline_methods,
    calibration_splits,
    embedding_methods,
    few_shot_methods,
    fitted_rows,
    out_of_fold,
)
from data_pipeline.splits import (
    Split,
    check_leakage,
    leave_one_subject_out,
    split_by_lists,
    split_by_subject,
    subject_folds,
)
from data_pipeline.store import Store
from data_pipeline.window_hashes import later_copies
from lumamba_jax.checkpoint import BEST_DIRECTORY
from lumamba_jax.eegnet import EEGNetClassifier, EEGNetConfig
from lumamba_jax.inference import LoadedModel
from lumamba_jax.metrics import Predictions, evaluate

EEGNET_SFREQ = 128.0
SHOWN = ("balanced_accuracy", "auroc")
LEVELS = ("window", "subject")
_NOT_FINITE = "some windows are not finite: audit the stores and repair them first"
_FLOOR = 1e-12  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Row:
    """One method: what it knows of a test subject, its scores by level, or why it has none.

    `scores`: level -> metric -> value and 95 % interval over subjects (`metrics.Estimate` as a mapping).
    """

    name: str
    knows: Knows
    windows: int = 0
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
    because: str = ""


def labelled(stores: Sequence[Store]) -> Labelled:
    """All labelled windows of `stores` in memory, in their order, at the channels that all their montages have.

    Classes without names are those that occur. Raises: ValueError without class labels, for fewer than two classes,
        without a common channel, for stores of different windows or classes, and for more than the memory of this
        machine can hold.
    """
    for store in stores:
        if store.labels is None or store.labels.ndim != 1 or store.labels.dtype.kind not in "iub":
            raise ValueError(f"{store.path} has no class for each window: prepare it with labels")
        if (store.sfreq, store.n_times, store.class_names) != (
            stores[0].sfreq,
            stores[0].n_times,
            stores[0].class_names,
        ):
            raise ValueError(f"{store.path} has another rate, window length or other classes than {stores[0].path}")
    channels = shared_channels(stores)
    _require_memory(sum(map(len, stores)) * len(channels) * stores[0].n_times * 4)
    rows = labelled_rows(stores)
    labels, starts, subjects, recordings = (
        np.concatenate([np.asarray(getattr(store, column)) for store in stores])[rows]
        for column in ("labels", "start_samples", "subjects", "recordings")
    )
    if len(found := np.unique(labels)) < 2:
        paths = ", ".join(str(store.path) for store in stores)
        raise ValueError(f"{paths}: {len(rows)} labelled windows of {len(found)} class: there is nothing to tell apart")
    names = stores[0].class_names
    if not names:
        names, labels = [str(label) for label in found], np.searchsorted(found, labels)
    signal = np.concatenate([_at_channels(store, channels) for store in stores])
    signal = signal if len(rows) == len(signal) else signal[rows]
    sfreq, n_times = float(stores[0].sfreq), stores[0].n_times
    return Labelled(signal, labels, subjects, recordings, Times.of_samples(starts, n_times, sfreq), sfreq, names)


def labelled_rows(stores: Sequence[Store]) -> np.ndarray:
    """Numbers `(n,)` of the windows of `stores`, counted through, whose class is known (not negative)."""
    return np.flatnonzero(np.concatenate([np.asarray(store.labels) for store in stores]) >= 0)


def _at_channels(store: Store, channels: Sequence[str]) -> np.ndarray:
    signal = np.empty((len(store), len(channels), store.n_times), np.float32)
    montage_names = np.asarray(store.montage_names)
    for name, montage in store.montages.items():
        rows = np.flatnonzero(montage_names == name)
        signal[rows] = store.read(rows)[:, [montage.ch_names.index(channel) for channel in channels]]
    return signal


def _require_memory(size: int) -> None:
    """Methods hold copies of the windows: refuse what a machine cannot hold three times."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if 3 * size > machine:
        raise ValueError(f"probes and baselines hold all windows in memory, three times {size / 2**30:.1f} GiB of them "
                         f"where the machine has {machine / 2**30:.0f}: give a part of the corpus")  # fmt: skip


def shared_channels(stores: Sequence[Store]) -> list[str]:
    """Names that every montage of the stores has; what baselines use. Embeddings use every channel of a window."""
    return common_channels([montage.ch_names for store in stores for montage in store.montages.values()])


def folds_of(data: Labelled, folds: int | None, *, seed: int = 0) -> list[Split]:
    """`folds` folds by subject, or one for each subject."""
    if folds is None:
        return leave_one_subject_out(data.subjects, data.labels, seed=seed)
    return subject_folds(data.subjects, data.labels, folds, seed)


def given_test(data: Labelled, tested: int, *, seed: int = 0) -> list[Split]:
    """One fold: the last `tested` windows are the test, the others are divided by subject into training and validation.

    Where subjects are in both (a division by trials, as SEED-V's), windows that overlap or touch across parts are
    refused. Raises: ValueError for these, and for fewer than two subjects to train on.
    """
    fitted = len(data.subjects) - tested
    fold = split_by_subject(data.subjects[:fitted], data.labels[:fitted], val_fraction=0.2, seed=seed)
    test = np.unique(data.subjects[fitted:])
    if not np.isin(test, data.subjects[:fitted]).any():
        lists = fold.subjects
        return [split_by_lists(data.subjects, train=lists["train"], val=lists["val"], test=test.tolist())]
    rows = np.arange(fitted, len(data.subjects))
    ids = {**fold.subjects, "test": tuple(test.tolist())}
    split = Split(fold.train, fold.val, rows, ids, unit="time", num_windows=len(data.subjects))
    check_leakage(split, data.subjects, data.recordings, data.times)
    return [split]


def trains_on_tested(data: Labelled, folds: Sequence[Split]) -> bool:
    """Whether some fold trains on labelled windows of a subject that it tests, as divisions by trial do."""
    return any(np.isin(data.subjects[fold.test], data.subjects[fitted_rows(fold)]).any() for fold in folds)


def frozen_rows(
    data: Labelled,
    stores: Sequence[Store],
    models: Mapping[str, LoadedModel],
    folds: Sequence[Split],
    *,
    shots: int | None,
    resamples: int,
    say: Callable[[str], None],
    baselines: bool = True,
    seen: Mapping[str, Collection[str]] | None = None,
) -> list[Row]:
    """Every method that trains no encoder: baselines, then the probes of each of `models`, then few-shot calibration.

    Args:
        data, stores: the same windows.
        models: name -> encoder.
        folds: by subject.
        shots: windows of each class that few-shot calibration is given of a test subject; None = leave it out.
        resamples: of the bootstrap over subjects.
        say: takes a sentence of progress for each method.
        baselines: band power, tangent space and EEGNet too.
        seen: subjects of the windows that each of `models` was trained on (`pretraining_subjects`); labels of them are
            known to a model whose task has some.

    Raises: ValueError for windows that are not finite, or that a model or band power cannot use, and for a recording or
        a signal in two parts of a fold.
    """
    kept, hashes = labelled_rows(stores), np.concatenate([store.content_hashes() for store in stores])
    hashes = hashes[kept]
    refuse_leakage(data, hashes, folds)
    methods: list[Method] = []
    features: dict[str, np.ndarray] = {}
    knows: dict[str, Knows] = {"band power": "nothing"}
    if baselines:
        channels = shared_channels(stores)
        power = np.concatenate([window_features(store, np.arange(len(store)), channels) for store in stores])[kept]
        if not np.isfinite(power).all():
            raise ValueError(_NOT_FINITE)
        features["band power"] = power
        methods += baseline_methods(data, power, eegnet)
    for name, model in models.items():
        own = features[name] = store_columns(model, stores, "embedding")["embeddings"][kept]
        if not np.isfinite(own).all():
            raise ValueError(_NOT_FINITE)
        known = set((seen or {}).get(name, ())) & set(np.unique(data.subjects).tolist())
        supervised = model.task.get("kind", "pretrain") != "pretrain"
        knows[name] = "nothing" if not known else "labelled windows" if supervised else "pre-training windows"
        methods += embedding_methods(data, own, name=name, knows=knows[name])
    if trains_on_tested(data, folds):  # then no method is without labels of a test subject
        methods = [replace(method, knows="labelled windows") for method in methods]
    rows = [_row(data, method, folds, resamples, say) for method in methods]
    if shots is None:
        return rows
    try:
        splits = calibration_splits(data, shots)
        refuse_leakage(data, hashes, splits)
    except ValueError as error:
        return [*rows, Row("few-shot calibration", "labelled windows", because=str(error))]
    for name, own in features.items():
        few = few_shot_methods(data, own, name=name, knows=knows[name])
        rows += [_row(data, method, splits, resamples, say) for method in few]
    return rows


def refuse_leakage(data: Labelled, hashes: np.ndarray, folds: Sequence[Split]) -> None:
    """Raise ValueError when two parts of a fold by subject share a recording, or two of any fold the same signal.

    `hashes`: `(n,)` of the windows. Splits in time were made with a look at the times of their windows.
    """
    subjects, recordings = Names.of(data.subjects), Names.of(data.recordings)
    copies = later_copies(hashes).any()
    for fold in folds:
        if fold.unit == "subject":
            check_leakage(fold, subjects, recordings)
        if copies:
            check_content(fold.parts, hashes, subjects, recordings)


def pretraining_subjects(run: Path) -> tuple[set[str], bool]:
    """Subjects that a run, and the runs its weights come from, trained or validated on; whether that is all of them.

    It is not where weights come from something else than a run, or where the split does not list subjects and the
    stores of the run are gone. A name such as `corpus/subject` counts as `subject` too: joined stores prefix them.
    """
    run = run.parent if run.name == BEST_DIRECTORY else run
    if not (run / SPLIT_FILE).is_file() or not (run / CONFIG_FILE).is_file():
        return set(), False
    config, lists = read_yaml(run / CONFIG_FILE), json.loads((run / SPLIT_FILE).read_text())
    listed = lists.get("unit") == "subject"
    names = {name for part in ("train", "val") for name in lists[part]} if listed else set()
    if not listed or config.data.validation:
        try:
            windows = open_windows(config.data, labelled=False)
            used = np.concatenate([windows.parts["train"], windows.parts["validation"]])
            names |= set(windows.subjects.unique(used).tolist())
            listed = True
        except (ValueError, OSError):
            listed = False
    names |= {name.rpartition("/")[2] for name in names}
    earlier, all_of_them = set(), True
    if config.trainer.init_from:
        earlier, all_of_them = pretraining_subjects(Path(config.trainer.init_from))
    return names | earlier, listed and all_of_them


def eegnet(data: Labelled, signal: np.ndarray, split: Split) -> np.ndarray:
    """Probabilities `(m, K)` of the test windows by an EEGNet trained on the others; validation subjects stop it.

    Faster recordings are brought to 128 Hz, as in its paper (Lawhern et al., J. Neural Eng. 15:056013, 2018).
    """
    sfreq = data.sfreq
    if sfreq > EEGNET_SFREQ:
        ratio = Fraction(EEGNET_SFREQ / sfreq).limit_denominator(1000)
        signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=-1).astype(np.float32)
        sfreq *= float(ratio)
    network = EEGNetClassifier(data.num_classes, sfreq, EEGNetConfig(max_epochs=40, patience=8))
    network.fit(signal[split.train], data.labels[split.train], (signal[split.val], data.labels[split.val]))
    return network.predict_proba(signal[split.test]).astype(np.float64)


def scores_of(data: Labelled, rows: np.ndarray, probabilities: np.ndarray, resamples: int) -> dict[str, Any]:
    """Level -> metric -> estimate, of out-of-fold probabilities."""
    logits = np.log(np.maximum(probabilities, _FLOOR))
    found = Predictions(logits, data.labels[rows], rows, data.recordings[rows], data.subjects[rows])
    levels = evaluate(found, "classification", class_names=list(data.class_names), n_resamples=resamples).levels
    return {
        level: {name: asdict(levels[level].metrics[name]) for name in SHOWN if name in levels[level].metrics}
        for level in LEVELS
        if level in levels
    }


def _row(data: Labelled, method: Method, folds: Sequence[Split], resamples: int, say: Callable[[str], None]) -> Row:
    if method.fit is None:
        return Row(method.name, method.knows, because=method.because)
    started = time.perf_counter()
    try:
        rows, probabilities = out_of_fold(folds, method.fit)
    except ValueError as error:  # too few subjects or classes for this method
        say(f"{method.name}: not used, {error}")
        return Row(method.name, method.knows, because=str(error))
    scores = scores_of(data, rows, probabilities, resamples)
    value = scores["window"]["balanced_accuracy"]["value"]
    say(f"{method.name}: balanced accuracy {value:.3f} ({time.perf_counter() - started:.0f} s)")
    return Row(method.name, method.knows, len(rows), scores)


def markdown(rows: Sequence[Row]) -> str:
    """The table, one block for each kind of knowledge of the test subject."""
    lines = ["| method | windows | balanced accuracy | AUROC | AUROC of subjects |", "|---|---|---|---|---|"]
    titles = {
        "nothing": "knows nothing of the test subject",
        "pre-training windows": "the encoder was pre-trained on unlabelled windows of test subjects",
        "unlabelled windows": "uses the test subject's unlabelled windows",
        "labelled windows": "uses labelled windows of the test subject",
    }
    for knows, title in titles.items():
        own = [row for row in rows if row.knows == knows]
        lines += [f"| *{title}* | | | | |"] if own else []
        lines += [_line(row) for row in own]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.scores is None:
        return f"| {row.name} | | not used: {row.because} | | |"
    cells = [_cell(row.scores, "window", name) for name in SHOWN] + [_cell(row.scores, "subject", "auroc")]
    return f"| {row.name} | {row.windows} | " + " | ".join(cells) + " |"


def _cell(scores: Mapping[str, Any], level: str, name: str) -> str:
    found = scores.get(level, {}).get(name)
    if found is None or not _is_number(found["value"]):
        return ""
    interval = f" [{found['low']:.3f}, {found['high']:.3f}]" if _is_number(found["low"]) else ""
    return f"{found['value']:.3f}{interval}"


def _is_number(value: float | None) -> bool:
    """Files have null where there is none (`run_log.write_json`)."""
    return value is not None and bool(np.isfinite(value))
