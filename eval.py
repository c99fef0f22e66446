"""Score a fine-tuned model, or embed windows and recordings.

python eval.py metrics runs/finetune                          # the test part of the run's own split
python eval.py metrics runs/finetune --data OTHER.h5          # every window of another labelled store
python eval.py embed CHECKPOINT recording.edf --out embeddings.h5   # or a window store, or a folder
"""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import configs
from configs.data import Windows, check_windows, open_windows
from configs.results import (
    baseline_predictions,
    check_columns_file,
    kind_of,
    predictions_of,
    save_columns,
    save_predictions,
    score,
)
from data_pipeline.formats import is_store, open_store
from data_pipeline.loader import LoaderConfig
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.store import Store
from lumamba_jax import metrics
from lumamba_jax.architectures import ModelConfig
from lumamba_jax.checkpoint import load_pretrained
from lumamba_jax.compilation import enable_compilation_cache, use_cpu_cores
from lumamba_jax.inference import LoadedModel, embed, load
from lumamba_jax.run_log import write_json
from lumamba_jax.sharding import MeshConfig, make_mesh
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import evaluate, make_eval_step

Part = Literal["test", "validation", "train"]


@dataclass(frozen=True)
class Metrics:
    """Score a model on labelled windows: per window, recording and subject, intervals by subject bootstrap."""

    model: Annotated[Path, tyro.conf.Positional]
    """a fine-tuning run, or an exported model"""
    data: tuple[Path, ...] = ()
    """labelled window stores; empty = the stores and the split of the run"""
    part: Part = "test"
    """part of the run's split"""
    out: Path | None = None
    """JSON file for all scores; predictions are written beside it as npz (default: in the run, metrics_PART.json)"""
    batch_size: int = 64
    """windows per forward pass"""
    resamples: int = 1000
    """of the bootstrap; 0 = no intervals"""
    baseline: bool = True
    """also score band power with a linear model, fitted on the run's training windows"""


@dataclass(frozen=True)
class Embed:
    """Write one vector per window: the mean over time of the encoder's output."""

    model: Annotated[Path, tyro.conf.Positional]
    """a run, or an exported model"""
    source: Annotated[Path, tyro.conf.Positional]
    """a window store, a recording, or a folder of recordings"""
    out: Path
    """.npz or .h5: embeddings (n, M), window_id, subject, recording, montage, start_sample, and labels if there are"""
    batch_size: int = 64
    """windows per forward pass"""
    window: float = 5.0
    """seconds per window, for recordings"""


def run_metrics(options: Metrics) -> None:
    """Evaluate, print the tables, write JSON and predictions."""
    model, params, metadata = load_pretrained(options.model)
    if model.head in ("reconstruction", "none") or "task" not in metadata["provenance"]:
        raise ValueError(f"{options.model} was not fine-tuned (head {model.head!r}): there are no predictions to score")
    task_config = configs.from_mapping(metadata["provenance"]["task"], TaskConfig())
    windows, part = _labelled_windows(options)
    _check_fits(model, metadata["provenance"], windows)
    loader = LoaderConfig(batch_size=options.batch_size, patch_size=model.patch_size, grouping="padded")
    mesh = make_mesh(MeshConfig(devices=1))
    eval_step = make_eval_step(model, make_task(task_config, model), mesh, seed=0)
    evaluation = evaluate(eval_step, params, windows.batches(part, loader.for_evaluation()), mesh)
    predictions = predictions_of(evaluation, windows)
    kind = kind_of(task_config.kind, predictions.labels)
    names = windows.class_names if kind == "classification" else None
    report = metrics.evaluate(predictions, kind, class_names=names, n_resamples=options.resamples)
    result = {"model": str(options.model), "part": part, "data": [str(store.path) for store in windows.stores]}
    result |= {"split": windows.split.digest, **report.to_dict()}
    print(f"{options.model}, {part} windows\n{metrics.format_table(report)}")
    if options.baseline and len(windows.parts["train"]) and part != "train":
        baseline = score(baseline_predictions(windows, part), kind)
        result["band_power_baseline"] = baseline
        print("band power baseline (windows): " + ", ".join(f"{name} {value:.3f}" for name, value in baseline.items()))
    out = options.out or options.model / f"metrics_{part}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, out)
    save_predictions(out.with_suffix(".npz"), predictions, windows.class_names)
    print(f"{out}, {out.with_suffix('.npz')}")


def _labelled_windows(options: Metrics) -> tuple[Windows, Part]:
    """The run's own part, or other stores as the test part: then their subjects must not be the training subjects."""
    run_config = options.model / "config.yaml"
    stores = tuple(str(path) for path in options.data)
    if run_config.is_file():
        data = configs.load(str(run_config)).data
        fixed = {"num_folds": None, "fold": None, "split_file": str(options.model / "split.json")}
        changes = fixed | ({"test": stores} if stores else {})
        return open_windows(dataclasses.replace(data, **changes), labelled=True), "test" if stores else options.part
    if not stores:
        raise ValueError(f"{options.model} is not a training run: name the labelled stores to score it on with --data")
    windows = open_windows(configs.DataConfig(train=stores, validation_fraction=0.0), labelled=True)
    return dataclasses.replace(
        windows, parts={"train": windows.parts["train"][:0], "test": windows.parts["train"]}
    ), "test"


def _check_fits(model: ModelConfig, provenance: dict, windows: Windows) -> None:
    trained, found = provenance.get("class_names"), windows.class_names
    if trained and found and list(trained) != list(found):
        raise ValueError(f"the model knows the classes {', '.join(trained)}, the stores name {', '.join(found)}")
    if model.output_channels is None and (model.num_outputs or 1) < windows.num_outputs:
        raise ValueError(f"the model has {model.num_outputs} outputs, the labels need {windows.num_outputs}")
    check_windows(model, windows)
    _check_rate(provenance, windows.stores[0])


def _check_rate(provenance: dict, store: Store) -> None:
    trained = provenance.get("sfreq")
    if trained and abs(trained - store.sfreq) > 1e-6:
        raise ValueError(
            f"the model was trained at {trained:g} Hz, {store.path} holds {store.sfreq:g} Hz: prepare it again"
        )


def run_embed(options: Embed) -> None:
    """Embed every window of a store, or of recordings that are prepared into a temporary store first."""
    check_columns_file(options.out)
    model = load(options.model)
    with tempfile.TemporaryDirectory() as temporary:
        path = options.source
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not is_store(path):
            path = _prepared(path, Path(temporary) / "windows.h5", model, options.window)
        columns = _embeddings(model, open_store(path), options.batch_size)
    save_columns(options.out, columns)
    print(f"{options.out}: embeddings {columns['embeddings'].shape} of {options.source}")


def _prepared(source: Path, out: Path, model: LoadedModel, seconds: float) -> Path:
    sfreq = float(model.metadata["provenance"].get("sfreq", 256.0))
    folder, include = (source, ()) if source.is_dir() else (source.parent, (source.name,))
    prepare(PrepareConfig(folder, out, include=include, sfreq=sfreq, window=seconds))
    return out


def _embeddings(model: LoadedModel, store: Store, batch_size: int) -> dict[str, np.ndarray]:
    _check_rate(model.metadata["provenance"], store)
    embeddings = np.zeros((len(store), model.config.width), np.float32)
    for name, montage in store.montages.items():
        rows = np.flatnonzero(store.montage_names == name)
        for start in range(0, len(rows), batch_size):
            own = rows[start : start + batch_size]
            embeddings[own] = embed(model, store.read(own), montage.locations, batch_size=batch_size)
    columns = {
        "embeddings": embeddings,
        "window_id": np.arange(len(store)),
        "subject": np.asarray(store.subjects),
        "recording": np.asarray(store.recordings),
        "montage": np.asarray(store.montage_names),
        "start_sample": store.start_samples,
    }
    return columns if store.labels is None else columns | {"label": store.labels}


def main() -> int:
    """Exit status 0, or 2 for bad input (one sentence)."""
    enable_compilation_cache()
    use_cpu_cores()
    options = tyro.extras.subcommand_cli_from_dict(
        {"metrics": Metrics, "embed": Embed}, prog="eval.py", description=__doc__
    )
    try:
        run_metrics(options) if isinstance(options, Metrics) else run_embed(options)
    except (ValueError, OSError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
