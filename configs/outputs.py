"""Every window of stores, recordings or folders through a loaded model -> columns to save or show."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.data import loader_patch
from configs.recordings import RecordingSettings, check_channels, recording_config, say_of_recordings
from data_pipeline.file_results import name_inside
from data_pipeline.loader import Batches, LoaderConfig, make_dataset
from data_pipeline.preprocess import preprocess
from data_pipeline.readers import read_recording, why_not_a_recording
from data_pipeline.store import Store
from lumamba_jax.architectures import ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.inference import LoadedModel, bucket_size, embed_recording, run_batches, whole_blocks

Item = TypeVar("Item")
Output = Literal["embedding", "prediction"]
COLUMN = {"embedding": "embeddings", "prediction": "predictions"}
MOST_SIZES = 4
"""More channel counts than these are padded to the next of 1, 2, 3, 4, 6, 8, 12, ...; each is one compiled program."""
_QUICK_SECONDS = 3.0  # what takes no longer shows no progress


@contextlib.contextmanager
def shown_when_long(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A progress bar with the time left on stderr, once the block has taken some seconds; call what it gives per step.

    Without `total` it only shows that work goes on.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*columns, TextColumn("left"), TimeRemainingColumn()) if total is not None else (columns[0], columns[3])
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(what, total=total)
    timer = threading.Timer(_QUICK_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: progress.advance(task)
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The same items, with the progress through them (`shown_when_long`)."""
    with shown_when_long(what, total) as advance:
        for item in items:
            yield item
            advance()


def store_columns(
    model: LoadedModel, stores: Sequence[Store], output: Output, *, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """What `model` makes of every window of `stores`, in their order, with what the stores know of each.

    Windows of any montages and lengths share the batches (`evaluation_batches`). A window that is not finite has NaN.

    Returns: `embeddings` (n, M) or `predictions` (n, K) float32, (n, C, K) of a model with classes for each channel;
        `window_id`, `subject`, `recording`, `montage`, `start_sample` (at the rate of the store), `start_seconds` and,
        where all stores have them, `label` (n,).
    Raises: ValueError, one sentence, when a store does not fit the model.
    """
    for store in stores:
        check_rate(model.metadata["provenance"], store)
        for name, montage in store.montages.items():
            check_channels(model, montage.ch_names, f"{store.path}, montage {name},")
    found: dict[str, np.ndarray] = {"window_id": np.arange(sum(map(len, stores)))}
    batches = evaluation_batches(model, stores, batch_size=batch_size)
    ids, values = run_batches(model, counted(batches, len(batches), f"{COLUMN[output]}, batches"), output)
    found[COLUMN[output]] = np.full((len(found["window_id"]), *values.shape[1:]), np.nan, np.float32)
    found[COLUMN[output]][ids] = values
    columns = ("subjects", "recordings", "montage_names", "start_samples")
    for name, column in zip(("subject", "recording", "montage", "start_sample"), columns, strict=True):
        found[name] = np.concatenate([np.asarray(getattr(store, column)) for store in stores])
    found["start_seconds"] = np.concatenate([np.asarray(store.start_samples) / store.sfreq for store in stores])
    labels = [store.labels for store in stores if store.labels is not None]
    if len(labels) == len(stores) and len({own.shape[1:] for own in labels}) == 1:
        found["label"] = np.concatenate(labels)
    return found


def evaluation_batches(model: LoadedModel, stores: Sequence[Store], *, batch_size: int = 64) -> Batches:
    """One pass over all windows (`evaluation_loader`). Raises: ValueError, one sentence, for windows that do not fit
    the model."""
    return make_dataset(list(stores), None, evaluation_loader(model.config, stores, batch_size))


def evaluation_loader(config: ModelConfig, stores: Sequence[Store], batch_size: int) -> LoaderConfig:
    """How windows of any montages and lengths are read once, in as few shapes as `padded_sizes` says.

    Batches are whole blocks of windows on every local device. Raises: ValueError, one sentence, for windows that do not
    fit the model.
    """
    sizes = {(len(montage), store.n_times) for store in stores for montage in store.montages.values()}
    for channels, samples in sorted(sizes):
        config.check_window(channels, samples)
    shapes = {}
    if not isinstance(config, FembaConfig):  # a fixed grid is never padded
        shapes = {"grouping": "padded", "channel_buckets": padded_sizes([channels for channels, _ in sizes])}
        shapes["time_buckets"] = tuple(sorted({samples for _, samples in sizes}))
    loader = LoaderConfig(batch_size=whole_blocks(batch_size), patch_size=loader_patch(config), **shapes)
    return loader.for_evaluation()


def padded_sizes(counts: Sequence[int]) -> tuple[int, ...]:
    """The channel counts that batches have: those that occur, or a ladder of sizes when these are many."""
    distinct = sorted(set(counts))
    if len(distinct) <= MOST_SIZES:
        return tuple(distinct)
    return tuple(sorted({bucket_size(count) for count in distinct}))


def check_rate(provenance: Mapping[str, Any], store: Store) -> None:
    """Refuse windows of another sampling rate than the model was trained at, as its provenance says."""
    trained = provenance.get("sfreq")
    if trained and abs(trained - store.sfreq) > 1e-6:
        raise ValueError(
            f"the model was trained at {trained:g} Hz, {store.path} holds {store.sfreq:g} Hz: prepare it again"
        )


def whole_recording_columns(
    model: LoadedModel, source: Path, asked: RecordingSettings, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """The embedding of every recording of `source` (a file or a folder) as one long window, in bounded memory.

    A recording that cannot be used is said and left out, and how they are prepared is said. Files that are no
    recordings, or belong to another, are passed over, as hidden ones.

    Returns: `embeddings` (n, M), `recording` (the path below `source`), `montage` (n,), `seconds` (n,).
    Raises: ValueError when none is left, or for an architecture that needs windows (`embed_recording`).
    """
    folder = source if source.is_dir() else source.parent
    settings = recording_config(source, Path("unused.h5"), model, asked, say, cut=False).preprocess_config()
    rows: list[tuple[np.ndarray, str, str, float]] = []
    remarks: dict[str, list[str]] = {}
    paths = _recordings_below(source) if source.is_dir() else [source]
    for path in counted(paths, len(paths), "embeddings, recordings"):
        name = name_inside(folder, path)
        try:
            recording, montage = preprocess(read_recording(path), settings)
        except (ValueError, OSError) as error:
            remarks[name] = [f"left out, {str(error).removeprefix(f'{path.name}: ')}"]
            continue
        count = recording.signal_uv.shape[1] // model.config.patch_size * model.config.patch_size
        if not count:
            remarks[name] = [f"left out, shorter than one patch of {model.config.patch_size} samples"]
            continue
        remarks[name] = list(recording.notes)
        latent = embed_recording(model, recording.signal_uv[:, :count], montage.locations)
        rows.append((latent, name, montage.name, count / recording.sfreq))
    say_of_recordings(remarks, say)
    if not rows:
        raise ValueError(f"no recording of {source} can be embedded")
    embeddings, names, montages, seconds = zip(*rows, strict=True)
    return {
        "embeddings": np.stack(embeddings),
        "recording": np.array(names),
        "montage": np.array(montages),
        "seconds": np.array(seconds),
    }


def _recordings_below(folder: Path) -> list[Path]:
    """The files of a folder that are recordings, sorted; what cannot be opened is one, to be named when it is read."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            is_recording = not why_not_a_recording(path)
        except OSError:
            is_recording = True
        if is_recording:
            found.append(path)
    return found


def by_recording(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean prediction of every recording, over its windows that have one: `recording`, `windows`, `predictions`.

    Where subjects have recordings of one name, these are called SUBJECT/RECORDING.
    """
    owned = np.unique(np.stack([columns["recording"], columns["subject"]]).astype(str), axis=1)
    shared = owned[0][1:][owned[0][1:] == owned[0][:-1]]
    with_subject = np.char.add(np.char.add(columns["subject"].astype(str), "/"), columns["recording"].astype(str))
    names = np.where(np.isin(columns["recording"], shared), with_subject, columns["recording"])
    names, group = np.unique(names, return_inverse=True)
    values = columns["predictions"].astype(np.float64)
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    counts = np.bincount(group[finite], minlength=len(names))
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, group[finite], values[finite])
    with np.errstate(invalid="ignore"):
        means = sums / counts.reshape(-1, *[1] * (values.ndim - 1))
    return {"recording": names, "windows": counts, "predictions": means}


def channels_of(model: LoadedModel, stores: Sequence[Store]) -> list[str] | None:
    """Names of the channels that a model with outputs for each channel predicts: of its training, else of the stores.

    None for a model without such outputs, and where they are not known.
    """
    if model.config.output_channels is None:
        return None
    found = {montage.ch_names for store in stores for montage in store.montages.values()}
    return model.metadata["provenance"].get("channels") or (list(found.pop()) if len(found) == 1 else None)
