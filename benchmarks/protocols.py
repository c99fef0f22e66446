"""Every protocol and every baseline on two labelled data sets, by subject, and a leak that is refused.

    python -m benchmarks.real_pretraining DATA --out runs/real_pretraining      # makes the encoder
    python -m benchmarks.protocols DATA --encoder runs/real_pretraining/run_mixed [--out DIR]
    python -m benchmarks.protocols --page                                       # tables of docs/protocols.md again

DATA holds `eegmat`, `uci_eeg_alcoholism` and `emotiv_eye_state`. eegmat: rest against mental arithmetic, 5 folds by
subject. UCI: alcoholic against control, one subject left out at a time. Baselines, probes and few-shot calibration are
computed here (`configs.protocol_table`); what trains an encoder goes through `train.py`, once for each fold. Everything
is kept in DIR: what is there is used again. Nothing was tuned on these figures: the settings were fixed beforehand.
"""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from scipy.special import softmax
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.real_pretraining import CLASSES, uci_to_csv
from configs.protocol_table import Row, folds_of, frozen_rows, labelled, markdown, pretraining_subjects, scores_of
from data_pipeline.leakage import Times
from data_pipeline.names import Names
from data_pipeline.splits import Split, check_leakage, split_in_time, split_random_windows
from data_pipeline.store import WindowStore
from lumamba_jax.architectures import build
from lumamba_jax.checkpoint import package_versions
from lumamba_jax.compilation import enable_compilation_cache, use_cpu_cores
from lumamba_jax.inference import LoadedModel, load
from lumamba_jax.metrics import classification
from lumamba_jax.run_log import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "protocols.json"
PAGE = ROOT / "docs" / "protocols.md"
BEGIN, END = "<!-- tables of benchmarks/protocols.py -->", "<!-- end of tables -->"
SEED, RESAMPLES = 0, 2000


@dataclass(frozen=True)
class DataSet:
    """A labelled data set and how it is divided.

    Attributes:
        name, title: short and long.
        folds: by subject; None = one subject left out at a time.
        shots: windows of each class for few-shot calibration.
        epochs: of everything that goes through train.py.
    """

    name: str
    title: str
    folds: int | None
    shots: int
    epochs: int


DATA_SETS = (
    DataSet("eegmat", "eegmat, rest against mental arithmetic, 5 folds by subject", 5, 3, 4),
    DataSet("uci", "UCI EEG database, alcoholic against control, one subject left out at a time", None, 3, 4),
)
FROM_SCRATCH = "full, from scratch"
TRAINED = {
    "full fine-tuning": (),
    "frozen encoder, attention head": ("--trainer.freeze-encoder", "true", "--optimizer.lr", "2e-3"),
    "low-rank adapters": ("--adapters.rank", "8", "--optimizer.lr", "2e-3"),
    FROM_SCRATCH: ("--trainer.init-from", ""),
}
"""Protocol -> options of train.py beside `TRAINING`."""
TRAINING = (
    *("--loader.batch-size", "32", "--optimizer.warmup-epochs", "2", "--trainer.patience", "5"),
    *("--trainer.baseline", "false", "--mesh.devices", "1", "--optimizer.clip-grad-norm", "1.0"),
    *("--loader.drop-remainder", "false", "--trainer.checkpoint-every", "1000000", "--trainer.keep-checkpoints", "2"),
)


# --- windows ----------------------------------------------------------------------------------------------------------


def prepare_store(data: Path, out: Path, name: str) -> Path:
    """The labelled store of a data set; made once. Raises ValueError, one sentence, when DATA lacks it."""
    store = out / f"{name}.h5"
    if store.is_file():
        return store
    out.mkdir(parents=True, exist_ok=True)
    if name == "eegmat":
        folder, window, notch, extra = data / "eegmat", 5, 50, []
        files = sorted(path.name for path in folder.glob("Subject*_[12].edf"))
        rows = [(f, CLASSES[0] if f.endswith("_1.edf") else CLASSES[1], f.split("_")[0]) for f in files]
        include, classes = ["Subject*_[12].edf"], list(CLASSES)
    else:
        folder, window, notch, extra = out / "uci_csv", 1, 60, ["--text-sfreq", "256"]
        uci_to_csv(data / "uci_eeg_alcoholism", folder)
        include, classes = ["*.csv"], ["control", "alcoholic"]
        paths = sorted(folder.rglob("*.csv"))
        rows = [(str(p.relative_to(folder)), classes[p.parent.name[3] == "a"], p.parent.name) for p in paths]
    if not rows:
        raise ValueError(f"{data} holds no recordings of {name}: see the first lines of `--help`")
    table = out / f"{name}_labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "subject"), *rows])
    options = ["--window", str(window), "--notch", str(notch), "--jobs", "1", "--include", *include, *extra]
    options += ["--labels", str(table), "--class-names", *classes]
    command = [sys.executable, "-m", "data_pipeline.prepare", str(folder), str(store), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {' '.join(done.stderr.split())}")
    return store


# --- protocols that train the encoder ---------------------------------------------------------------------------------


def trained_row(
    name: str, dataset: DataSet, store: WindowStore, splits: Sequence[Split], encoder: LoadedModel, source: Path,
    out: Path, options: argparse.Namespace,
) -> tuple[Row, dict[str, float]]:  # fmt: skip
    """One run of train.py for each fold, scored together; (row, seconds and epochs)."""
    data = labelled([store])
    rows, probabilities, seconds = [], [], 0.0
    for number, split in enumerate(splits):
        run = out / dataset.name / name.replace(", ", "_").replace(" ", "_") / str(number)
        seconds += _train(name, dataset, store, split, number, encoder, source, run, options)
        with np.load(run / "predictions_test.npz") as found:
            order = np.argsort(found["window_id"])
            rows.append(found["window_id"][order])
            logits = found["logits"][order].astype(np.float64)
        if not np.array_equal(rows[-1], np.sort(split.test)):
            raise ValueError(f"{run} tested other windows than fold {number}: choose another --out")
        probabilities.append(softmax(logits, axis=1))
    scores = scores_of(data, np.concatenate(rows), np.concatenate(probabilities), options.resamples)
    count = sum(map(len, rows))
    return Row(name, "nothing", count, scores), {"seconds": round(seconds), "runs": len(splits)}


def _train(
    name: str, dataset: DataSet, store: WindowStore, split: Split, number: int, encoder: LoadedModel, source: Path,
    run: Path, options: argparse.Namespace,
) -> float:  # fmt: skip
    """Run train.py for one fold, unless it is there; its seconds."""
    if (run / "seconds.json").is_file():
        return json.loads((run / "seconds.json").read_text())["seconds"]
    started = time.time()
    if dataset.folds is None:
        division = ("--data.leave-out", str(store.subjects[split.test[0]]))
    else:
        division = ("--data.num-folds", str(dataset.folds), "--data.fold", str(number))
    sizes = [("--model." + key.replace("_", "-"), str(getattr(encoder.config, key)))
             for key in ("patch_size", "embed_dim", "num_queries", "num_blocks")]  # fmt: skip
    epochs = options.epochs or dataset.epochs
    words = [
        *("finetune_classify", "--data.train", str(store.path), *division, "--data.split-seed", str(SEED)),
        *(word for pair in sizes for word in pair),
        *("--trainer.run-dir", str(run), "--trainer.init-from", str(source), "--trainer.epochs", str(epochs)),
        *("--trainer.resume", "true", *TRAINING, *TRAINED[name]),
    ]
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=file, stderr=file)
    if done.returncode:
        raise ValueError(f"train.py ended with status {done.returncode}: see {log}")
    seconds = time.time() - started
    write_json({"seconds": seconds}, run / "seconds.json")
    return seconds


# --- the leak ---------------------------------------------------------------------------------------------------------


def leakage_demo(data: Path) -> dict[str, Any]:
    """Eyes open or closed from single samples (emotiv_eye_state): nearest neighbours on shuffled and on later rows."""
    path = next((data / "emotiv_eye_state").glob("*.csv"), None)
    if path is None:
        raise ValueError(f"{data} has no folder emotiv_eye_state with a CSV file")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    signal, labels, sfreq = table[:, :-1], table[:, -1].astype(int), 128.0
    count = len(labels)
    subjects = Names.of(np.full(count, "subject"))
    recordings = Names.of(np.full(count, path.name))
    times = Times(np.arange(count) / sfreq, np.asarray(1 / sfreq))
    shuffled = split_random_windows(subjects, val_fraction=0.3, seed=SEED)
    shuffled = dataclasses.replace(shuffled, val=shuffled.val[:0], test=shuffled.val)
    later = split_in_time(recordings, times, val_fraction=0.0, test_fraction=0.3, subjects=subjects)
    found: dict[str, Any] = {"rows": count}
    for name, split in (("shuffled rows", shuffled), ("the last 30 % in time", later)):
        model = KNeighborsClassifier(5).fit(signal[split.train], labels[split.train])
        scores = classification(np.log(model.predict_proba(signal[split.test]) + 1e-12), labels[split.test])
        found[name] = {"accuracy": scores["accuracy"], "balanced_accuracy": scores["balanced_accuracy"]}
        try:
            check_leakage(split, subjects, recordings, times)
            found[name]["refused"] = None
        except ValueError as error:
            found[name]["refused"] = str(error)
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All data sets, then the leak. Raises ValueError, one sentence, for what cannot be used."""
    started = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    out = options.out.absolute()
    encoder = load(options.encoder)
    fresh = dataclasses.replace(encoder, params=nnx.split(build(encoder.config, seed=SEED))[1])
    result: dict[str, Any] = {"versions": package_versions(), "resamples": options.resamples}
    result["encoder"] = {key: encoder.metadata["provenance"].get(key) for key in ("task", "step", "data")}
    result["leak"] = leakage_demo(options.data)
    seen = {"pre-trained encoder": pretraining_subjects(options.encoder)[0]}
    for dataset in DATA_SETS:
        if dataset.name not in options.only:
            continue
        store = WindowStore(prepare_store(options.data, out, dataset.name))
        data = labelled([store])
        splits = folds_of(data, dataset.folds, seed=SEED)
        say(f"{dataset.name}: {len(data.labels)} windows, {len(np.unique(data.subjects))} subjects")
        models = {"untrained encoder": fresh, "pre-trained encoder": encoder}
        trained, costs = [], {}
        for name in TRAINED:  # first, because each run is kept
            row, costs[name] = trained_row(name, dataset, store, splits, encoder, options.encoder, out, options)
            if name != FROM_SCRATCH and seen["pre-trained encoder"] & set(np.unique(data.subjects).tolist()):
                row = dataclasses.replace(row, knows="pre-training windows")
            assert row.scores is not None
            say(f"{name}: balanced accuracy {row.scores['window']['balanced_accuracy']['value']:.3f}")
            trained.append(row)
        how = {"shots": dataset.shots, "resamples": options.resamples, "say": say, "seen": seen}
        rows = frozen_rows(data, [store], models, splits, **how) + trained
        result[dataset.name] = {
            "title": dataset.title,
            "windows": len(data.labels),
            "subjects": len(np.unique(data.subjects)),
            "splits": [split.digest for split in splits],
            "settings": asdict(dataset),
            "rows": [asdict(row) for row in rows],
            "training": costs,
        }
        write_json(result, options.json)
    return result


def tables(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    parts = []
    for dataset in DATA_SETS:
        if dataset.name not in result:
            continue
        own = result[dataset.name]
        parts += [f"### {own['title']}", f"{own['windows']} windows of {own['subjects']} subjects."]
        parts += [markdown([Row(**row) for row in own["rows"]])]
    leak = result["leak"]
    lines = ["| division | accuracy | balanced accuracy | what the check says |", "|---|---|---|---|"]
    for name in ("shuffled rows", "the last 30 % in time"):
        found = leak[name]
        verdict = f"refused: {found['refused']}" if found["refused"] else "accepted"
        lines.append(f"| {name} | {found['accuracy']:.3f} | {found['balanced_accuracy']:.3f} | {verdict} |")
    parts += ["### A leak: eyes open or closed, one subject, 117 s, five nearest neighbours of single samples"]
    return "\n\n".join([*parts, "\n".join(lines)])


def write_page(text: str, page: Path) -> None:
    """Put the tables between the marks of `page`."""
    whole = page.read_text()
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of the recordings")
    parser.add_argument("--encoder", type=Path, help="pre-trained run or export")
    parser.add_argument("--out", type=Path, default=Path("runs/protocols"), help="stores and runs (kept)")
    parser.add_argument("--only", nargs="+", choices=[d.name for d in DATA_SETS], default=[d.name for d in DATA_SETS])
    parser.add_argument("--epochs", type=int, help="of every training (default: as fixed for the data set)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap over subjects")
    parser.add_argument("--json", type=Path, default=RESULTS, help="figures to write, or with --page to read")
    parser.add_argument("--page", action="store_true", help="compute nothing: write the tables from the JSON")
    options = parser.parse_args()
    if not options.page:
        if options.data is None or options.encoder is None:
            parser.error("give the folder of the recordings and --encoder, or --page")
        enable_compilation_cache()
        use_cpu_cores()
        try:
            run(options)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    elif not options.json.is_file():
        parser.error(f"{options.json} does not exist: run the benchmark first")
    text = tables(json.loads(options.json.read_text()))
    print(text)
    if options.json == RESULTS:
        write_page(text, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
