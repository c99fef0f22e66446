"""Score a fine-tuned model; predict or embed windows and recordings; probe an encoder on labelled windows.

python eval.py metrics runs/finetune                          # the test part of the run's own split
python eval.py metrics runs/seed1 runs/seed2 runs/seed3       # the same for several, with mean and sd
python eval.py metrics runs/finetune --task tuab              # published results of the task sheet beside ours
python eval.py metrics runs/finetune --data OTHER.h5          # every window of another labelled store
python eval.py predict runs/finetune recording.edf --out predictions.csv   # or window stores, or a folder
python eval.py embed CHECKPOINT recording.edf --out embeddings.h5          # --whole: one vector per recording
python eval.py probe CHECKPOINT labelled.h5 --folds 5         # frozen encoder and baselines, by subject
"""

import io
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from configs import scoring
from configs.outputs import (
    Output,
    by_recording,
    channels_of,
    shown_when_long,
    store_columns,
    whole_recording_columns,
)
from configs.protocol_table import (
    folds_of,
    frozen_rows,
    given_test,
    labelled,
    labelled_rows,
    markdown,
    pretraining_subjects,
)
from configs.recordings import RecordingSettings, prepare_windows
from configs.results import (
    check_output,
    is_input,
    print_predictions,
    save_columns,
    save_predictions,
    save_table,
)
from configs.scoring import Part
from configs.task_sheet import find_task
from data_pipeline.formats import is_store, open_store
from lumamba_jax import metrics, report
from lumamba_jax.compilation import enable_compilation_cache, use_cpu_cores
from lumamba_jax.inference import LoadedModel, evaluation, load
from lumamba_jax.run_log import write_json

_PLAIN_NAMES = tyro.conf.arg(name="", help="how recordings become windows")


@dataclass(frozen=True)
class Metrics:
    """Score a model on labelled windows: per window, recording and subject, intervals by subject bootstrap."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """fine-tuning runs, or exported models; several are scored on the same windows, with mean and sd"""
    data: tuple[Path, ...] = ()
    """labelled window stores; empty = the stores and the split of the run"""
    part: Part = "test"
    """part of the run's split"""
    task: str | None = None
    """of the task sheet (python -m configs.task_sheet): published numbers beside ours; default: as the run records"""
    out: Path | None = None
    """JSON file for all scores, with a page (.html) and predictions (.npz) beside it; default: metrics_PART.json in the
    run (with --data metrics_of_STORE.json), or metrics_PART_of_N_runs.json beside the first of several"""
    batch_size: int = 64
    """windows per forward pass"""
    resamples: int = 1000
    """of the bootstrap; 0 = no intervals"""
    baseline: bool = True
    """also score band power with a linear model, fitted on the run's training windows"""
    page: bool = True
    """write the page: confusion matrices, calibration, subjects, published results"""


@dataclass(frozen=True)
class Predict:
    """Write the class probabilities, or the predicted values, of every window; print the mean of each recording."""

    model: Annotated[Path, tyro.conf.Positional]
    """a fine-tuning run, or an exported model with a classifier"""
    source: Annotated[Path, tyro.conf.Positional]
    """a window store, a recording, or a folder of recordings"""
    out: Path
    """.csv (a row per window, a column per class), .npz or .h5: predictions (n, K), or (n, C, K) with classes for each
    channel, window_id, subject, recording, montage, start_sample (at the model's rate), start_seconds, labels if any"""
    batch_size: int = 64
    """windows per forward pass; it changes no number on a CPU"""
    recordings: Annotated[RecordingSettings, _PLAIN_NAMES] = field(default_factory=RecordingSettings)


@dataclass(frozen=True)
class Embed:
    """Write one vector per window: the mean over time of the encoder's output."""

    model: Annotated[Path, tyro.conf.Positional]
    """a run, or an exported model"""
    source: Annotated[Path, tyro.conf.Positional]
    """a window store, a recording, or a folder of recordings"""
    out: Path
    """.npz or .h5: embeddings (n, M), window_id, subject, recording, montage, start_sample (at the model's rate),
    start_seconds, and labels if there are"""
    batch_size: int = 64
    """windows per forward pass; it changes no number on a CPU"""
    recordings: Annotated[RecordingSettings, _PLAIN_NAMES] = field(default_factory=RecordingSettings)
    whole: bool = False
    """each recording as one long window, in bounded memory (LuMamba): embeddings (recordings, M), recording, seconds"""


@dataclass(frozen=True)
class Probe:
    """What a frozen encoder knows: probes, adaptation without gradients, few-shot calibration, beside baselines."""

    model: Annotated[Path, tyro.conf.Positional]
    """a run, or an exported model"""
    data: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """window stores with a class for each window"""
    test: tuple[Path, ...] = ()
    """stores to test on (a published division), of other subjects or of other trials; empty = folds"""
    folds: int | None = 5
    """folds by subject; None = one subject left out at a time"""
    shots: int | None = None
    """also few-shot calibration with so many windows per class of the test subject"""
    baselines: bool = True
    """also band power, tangent space and EEGNet, fitted on the same folds"""
    resamples: int = 1000
    """of the bootstrap over subjects"""
    out: Path | None = None
    """JSON file for the table"""


def run_metrics(options: Metrics) -> None:
    """Evaluate, print the tables, write JSON, predictions and the page."""
    if not options.models:
        raise ValueError("name at least one fine-tuning run: eval.py metrics RUN")
    if options.task:
        find_task(options.task)  # a typo is refused before the work is done
    if options.resamples < 0:
        raise ValueError(f"--resamples must be 0 (no intervals) or more, not {options.resamples}")
    out = options.out or _default_out(options)
    check_output(out, (".json",))
    for suffix in (".npz", ".html"):
        check_output(out.with_suffix(suffix), (suffix,))
    how = {"data": options.data, "part": options.part, "batch_size": options.batch_size, "resamples": options.resamples}
    runs = [scoring.score_model(path, **how, task=options.task) for path in options.models]
    notes, task = scoring.notes_on(runs), scoring.task_of(runs, options.task)
    comparison = None if task is None else scoring.compare(task, runs)
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    for run in runs:
        print(f"{run.path}, {run.part} windows\n{metrics.format_table(run.report)}\n")
    if len(runs) > 1:
        print(f"windows, {len(runs)} runs\n{scoring.format_runs(runs)}\n")
    with shown_when_long("band power baseline"):
        baseline = scoring.band_power_scores(runs[0]) if options.baseline else None
    if baseline:
        print("band power baseline (windows): " + ", ".join(f"{name} {value:.3f}" for name, value in baseline.items()))
    if comparison is not None:
        print(scoring.format_comparison(comparison))
    result = scoring.result_of(runs, comparison, baseline, notes)
    written = _write_scores(runs, result, out)
    if options.page:
        written.append(
            report.write_report(scoring.page_of(runs, comparison, baseline, notes), out.with_suffix(".html"))
        )
    print(", ".join(map(str, written)))


def _default_out(options: Metrics) -> Path:
    """Other stores than the run's own have files of their own: its test scores stay."""
    name = "_".join(["of", *(path.stem for path in options.data)]) if options.data else options.part
    path, count = options.models[0], len(options.models)
    several = path.absolute().parent / f"metrics_{name}_of_{count}_runs.json"
    return several if count > 1 else path / f"metrics_{name}.json"


def _write_scores(runs: list[scoring.Scored], result: dict, out: Path) -> list[Path]:
    """JSON of everything, and the predictions of each run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, out)
    written = [out]
    for number, run in enumerate(runs, 1):
        path = out.with_suffix(".npz") if len(runs) == 1 else out.with_name(f"{out.stem}_{number}.npz")
        save_predictions(path, run.predictions, run.report.class_names)
        written.append(path)
    return written


def run_predict(options: Predict) -> None:
    """Predict every window of a store, or of recordings that are prepared into a temporary store first."""
    as_table = options.out.suffix == ".csv"
    check_output(options.out, (".csv", ".npz", ".h5"))
    if is_input(options.out, options.source):
        raise ValueError(f"{options.out} is to be read: it would be lost, choose another output")
    model = load(options.model)
    evaluation(model, "prediction")  # refuses a model without predictions before recordings are prepared
    columns, channels = _columns(model, options, "prediction")
    if as_table:
        save_table(options.out, columns, model.class_names, channels)
    else:
        save_columns(options.out, columns)
    print_predictions(by_recording(columns), model.class_names, channels)
    print(f"{options.out}: predictions {columns['predictions'].shape} of {options.source}")


def run_embed(options: Embed) -> None:
    """Embed every window of a store, or of recordings that are prepared into a temporary store first."""
    check_output(options.out, (".npz", ".h5"))
    if is_input(options.out, options.source):
        raise ValueError(f"{options.out} is to be read: it would be lost, choose another output")
    model = load(options.model)
    if options.whole:
        if is_store(options.source):
            raise ValueError(f"{options.source} holds windows already: --whole takes recordings")
        if options.recordings.window is not None or options.recordings.stride is not None:
            raise ValueError("--whole takes each recording as one window: leave --window and --stride out")
        columns = whole_recording_columns(model, options.source, options.recordings, _say)
    else:
        columns = _columns(model, options, "embedding")[0]
    save_columns(options.out, columns)
    print(f"{options.out}: embeddings {columns['embeddings'].shape} of {options.source}")


def _columns(
    model: LoadedModel, options: Predict | Embed, output: Output
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """What to save of every window, and the names of the channels when each has outputs."""
    with tempfile.TemporaryDirectory() as temporary:
        path = options.source
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not is_store(path):
            path = Path(temporary) / "windows.h5"
            prepare_windows(options.source, path, model, options.recordings, _say)
        elif options.recordings != RecordingSettings():
            raise ValueError(f"{path} holds windows already: --window, --montage and the filters are for recordings")
        stores = [open_store(path)]
        return store_columns(model, stores, output, batch_size=options.batch_size), channels_of(model, stores)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def run_probe(options: Probe) -> None:
    """Print the table of protocols, write it as JSON where asked."""
    if not options.data:
        raise ValueError("name the labelled window stores to probe the encoder on")
    if options.resamples < 0:
        raise ValueError(f"--resamples must be 0 (no intervals) or more, not {options.resamples}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    stores, tested = ([open_store(path) for path in paths] for paths in (options.data, options.test))
    data = labelled([*stores, *tested])
    if unknown := sum(map(len, [*stores, *tested])) - len(data.labels):
        _say(f"{unknown} windows without a class are left out")
    folds = given_test(data, len(labelled_rows(tested))) if tested else folds_of(data, options.folds)
    seen, seen_is_all = pretraining_subjects(options.model)
    rows = frozen_rows(
        data, [*stores, *tested], {"encoder": load(options.model)}, folds, shots=options.shots,
        resamples=options.resamples, say=lambda text: print(text, file=sys.stderr), baselines=options.baselines,
        seen={"encoder": seen},
    )  # fmt: skip
    if not seen_is_all:
        note = "whether the encoder was pre-trained on these subjects is not known: if it was, its rows know more"
        print(f"eval.py: {note} than they say", file=sys.stderr)
    print(markdown(rows))
    if options.out is not None:
        found = {
            "model": str(options.model),
            "data": [str(store.path) for store in stores],
            "test": [str(store.path) for store in tested],
            "rows": [asdict(row) for row in rows],
        }
        write_json(found | {"splits": [fold.digest for fold in folds]}, options.out)


def main() -> int:
    """Exit status 0, 2 for bad input (one sentence), 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    enable_compilation_cache()
    use_cpu_cores()
    commands = {"metrics": Metrics, "predict": Predict, "embed": Embed, "probe": Probe}
    runs = {Metrics: run_metrics, Predict: run_predict, Embed: run_embed, Probe: run_probe}
    options = tyro.extras.subcommand_cli_from_dict(commands, prog="eval.py", description=__doc__)
    try:
        runs[type(options)](options)
    except (ValueError, OSError, ImportError) as error:
        print(f"eval.py: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: interrupted; no file is half-written, run the same command again", file=sys.stderr)
        return 130
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
