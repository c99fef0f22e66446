"""What a supervised run hands back: predictions on disk, the baseline on the same windows, a table of scores."""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from configs.data import Windows
from configs.task_sheet import TASKS
from data_pipeline import band_power
from data_pipeline.file_results import one_line
from data_pipeline.formats import is_store
from data_pipeline.readers import why_not_a_recording
from lumamba_jax import metrics
from lumamba_jax.training import Evaluation

# The scores a table shows, when a result has them; the JSON files hold all.
SHOWN = ("loss", "balanced_accuracy", "auroc", "aupr", "kappa", "f1_weighted", "accuracy", "r2", "rmse", "pearson")
SHOWN += ("r2_measured", "rmse_measured", "pearson_measured", "masked", "unmasked", "query", "similarity", "sigreg")


def weights_digest(metadata: Mapping[str, Any]) -> str | None:
    """First 16 hex digits of the SHA-256 of an export's checksums; None for exports of versions that wrote none."""
    leaves = metadata.get("leaves")
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16] if leaves else None


def origin_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What an export's weights are: their digest, the objective of the pre-training, name and hash of converted files.

    A fine-tuned model has the objective and the files of its own origin.
    """
    provenance = metadata["provenance"]
    task, files = provenance.get("task", {}), provenance.get("sources", [provenance])
    pretrained = {"objective": task["objective"]} if task.get("kind") == "pretrain" else {}
    converted = {key: [one[key] for one in files if one.get(key)] for key in ("file", "sha256")}
    found = {key: ", ".join(values) for key, values in converted.items() if values}
    return {**provenance.get("origin", {}), **pretrained, **found, "weights": weights_digest(metadata)}


def predictions_of(evaluation: Evaluation, windows: Windows) -> metrics.Predictions:
    """Join model outputs with the recording and subject of each window. Raises ValueError when labels are missing."""
    if evaluation.label is None:
        raise ValueError("the windows have no labels to score against: prepare the store with labels, or use embed")
    ids = evaluation.window_id
    parts = (evaluation.outputs["logits"], evaluation.label, ids, windows.recordings[ids], windows.subjects[ids])
    return metrics.Predictions.merge([metrics.Predictions(*parts)])


def kind_of(task_kind: str, labels: np.ndarray) -> metrics.Kind:
    """How predictions are scored: float labels of a classification are independent yes/no outputs."""
    if task_kind == "regress":
        return "regression"
    return "multilabel" if np.issubdtype(labels.dtype, np.floating) else "classification"


def save_predictions(path: Path, predictions: metrics.Predictions, class_names: list[str] | None) -> None:
    """Write logits, labels, window_id, recording and subject as one npz file; complete or not at all."""
    fields = {name: getattr(predictions, name) for name in ("logits", "labels", "window_id", "recording", "subject")}
    save_columns(path, fields | {"class_names": np.array(class_names or [], dtype=str)})


def check_columns_file(path: Path) -> None:
    """Refuse a name that `save_columns` cannot write."""
    _check_suffix(path, (".npz", ".h5"))


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before the work is done, an output that could not be written after it; nothing is made.

    Raises: ValueError, one sentence, for another suffix, a folder of that name, or where nothing can be written.
    """
    _check_suffix(path, suffixes)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: the output must be a file, for example {path / f'scores{suffixes[0]}'}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {folder}")


def is_input(path: Path, source: Path) -> bool:
    """Whether writing `path` would destroy `source`, or a recording or store of that folder."""
    if not path.is_file() or not source.exists():
        return False
    own, read = path.resolve(), source.resolve()
    if own == read:
        return True
    return read in own.parents and (is_store(path) or not why_not_a_recording(path))


def _check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix not in suffixes:
        *others, last = suffixes
        names = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"the output must end in {names}, not {path.name!r}")


def save_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as npz or HDF5, as the suffix says; complete or not at all."""
    check_columns_file(path)
    with _whole_or_absent(path) as temporary:
        if path.suffix == ".npz":
            np.savez(temporary, allow_pickle=False, **columns)
        else:
            memory = io.BytesIO()  # HDF5 itself cannot end well on a full disk: its errors come on closing, and later
            with h5py.File(memory, "w") as file:
                for name, values in columns.items():
                    file.create_dataset(name, data=values.astype(object) if values.dtype.kind == "U" else values)
            temporary.write_bytes(memory.getbuffer())


@contextlib.contextmanager
def _whole_or_absent(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block has ended well. Raises OSError that names `path`."""
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or one_line(str(error))
        raise OSError(f"{path} was not written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def baseline_predictions(windows: Windows, part: str) -> metrics.Predictions:
    """Band power with a linear model, fitted on the training windows (labels as trained on), predicting `part`.

    The logits of a classification are log probabilities, so that every score reads them as it reads the model's.
    Raises: ValueError as `band_power.band_power_baseline`.
    """
    assert windows.labels is not None
    outputs = band_power.band_power_baseline(windows.pairs("train"), windows.pairs(part))
    if kind_of("classify", windows.labels) == "classification":
        outputs = np.log(np.maximum(outputs, 1e-12))
    ids = windows.parts[part]
    return metrics.Predictions(outputs, windows.labels[ids], ids, windows.recordings[ids], windows.subjects[ids])


def score(predictions: metrics.Predictions, kind: metrics.Kind, task: str = "") -> dict[str, float]:
    """Scores of all windows together, with the `measured_scores` of a `task` of the sheet."""
    score_of = {"classification": metrics.classification, "multilabel": metrics.multilabel}
    found = score_of.get(kind, metrics.regression)(predictions.logits, predictions.labels)
    return found | measured_scores(predictions, kind, task)


def measured_scores(predictions: metrics.Predictions, kind: metrics.Kind, task: str) -> dict[str, float]:
    """`NAME_measured`: scores of the measured targets alone, where the task tells them from others (data.md Q17)."""
    sheet = TASKS.get(task)
    if kind != "regression" or sheet is None or sheet.measured is None:
        return {}
    if predictions.logits.shape[-1] != len(sheet.output_names):
        return {}
    own = predictions.of_outputs(slice(sheet.measured))
    return {f"{name}_measured": value for name, value in metrics.regression(own.logits, own.labels).items()}


def print_table(results: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print one column per result and one row per score, to standard output."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for metric in SHOWN:
        cells = [result.get(metric) for result in results.values()]
        if any(cell is not None for cell in cells):
            table.add_row(metric, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    Console().print(table)


def save_table(
    path: Path,
    columns: Mapping[str, np.ndarray],
    class_names: list[str] | None,
    channel_names: list[str] | None = None,
) -> None:
    """Write predictions `(n, K)` or `(n, C, K)` as CSV, a row per window; complete or not at all.

    A column per class, or `CHANNEL CLASS` per channel and class.
    """
    predictions = columns["predictions"]
    names = _output_names(predictions.shape[1:], class_names, channel_names)
    others = [name for name in columns if name != "predictions"]
    values = predictions.reshape(len(predictions), -1).tolist()
    labels = {name: columns[name].reshape(len(predictions), -1) for name in others}
    titles = [name if own.shape[1] == 1 else f"{name}_{k}" for name, own in labels.items() for k in range(own.shape[1])]
    rows = zip(*(own.tolist() for own in labels.values()), values, strict=True)
    with _whole_or_absent(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*titles, *names])
        writer.writerows([value for part in row for value in part] for row in rows)


def print_predictions(
    recordings: Mapping[str, np.ndarray], class_names: list[str] | None, channel_names: list[str] | None = None
) -> None:
    """Print the mean prediction of each recording (`configs.outputs.by_recording`).

    With predictions for each channel a row per recording and channel: no terminal holds a column for each.
    """
    means = recordings["predictions"]
    per_channel = means.ndim == 3
    classes = _output_names(means.shape[-1:], class_names, None if per_channel else channel_names)
    channels = _output_names(means.shape[1:2], None, channel_names, what="channel") if per_channel else [""]
    table = Table(title="mean over the windows of each recording", title_justify="left")
    for name in ("recording", "windows", *(["channel"] if per_channel else []), *classes):
        table.add_column(name, justify="left" if name in ("recording", "channel") else "right")
    means = means.reshape(len(means), len(channels), -1)
    for name, count, rows in zip(recordings["recording"], recordings["windows"], means, strict=True):
        for channel, values in zip(channels, rows, strict=True):
            own = [channel] if per_channel else []
            table.add_row(str(name), str(count), *own, *(f"{value:.3f}" for value in values))
    Console().print(table)


def _output_names(
    shape: tuple[int, ...], class_names: list[str] | None, channel_names: list[str] | None, *, what: str = "output"
) -> list[str]:
    """A name for each output of `shape` (K,), (C,) or (C, K): of classes and channels where known, else numbers."""
    if len(shape) == 2:
        channels = _output_names(shape[:1], None, channel_names, what="channel")
        return [f"{channel} {name}" for channel in channels for name in _output_names(shape[1:], class_names, None)]
    known = [names for names in (class_names, channel_names) if names and len(names) == shape[0]]
    return list(known[0]) if known else [f"{what}_{k}" for k in range(shape[0])]
