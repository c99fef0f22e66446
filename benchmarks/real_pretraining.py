"""Pre-training on every real recording at hand: `python -m benchmarks.real_pretraining DATA [--out DIR] [--steps N]`.

DATA holds the folders named in `SOURCES`. Recordings -> window stores (montages of 1 to 64 channels, windows of 5 s and
1 s) -> LuMamba tiny pre-trained once with each objective on all of them together -> loss curves, error of hidden
samples on held-out windows, a linear probe on eegmat by subject before and after, effective rank of the embeddings.
Everything is kept in DIR: what is there is used again, so an interrupted run goes on. `--page` only writes the tables
of docs/real_pretraining.md and its picture from the JSON.
"""

import argparse
import csv
import dataclasses
import functools
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score

from benchmarks.eegmat import zscore_by_subject
from data_pipeline.band_power import classify, window_features
from data_pipeline.splits import Split, split_by_subject, subject_folds
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax.architectures import build
from lumamba_jax.checkpoint import package_versions
from lumamba_jax.inference import LoadedModel, embed, load
from lumamba_jax.masking import draw_mask
from lumamba_jax.metrics import Predictions, evaluate
from lumamba_jax.run_log import read_metrics, write_json
from lumamba_jax.tasks import forward

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "real_pretraining.json"
PAGE = ROOT / "docs" / "real_pretraining.md"
PICTURE = ROOT / "docs" / "real_pretraining.svg"
BEGIN, END = "<!-- tables of benchmarks/real_pretraining.py -->", "<!-- end of tables -->"

OBJECTIVES = ("reconstruction", "lejepa", "mixed")
SFREQ, PATCH, SEED = 256, 64, 42  # the seed is train.py's default: "untrained" is what the runs started from
CLASSES = ("rest", "arithmetic")
FOLDS, RESAMPLES = 5, 2000
RANDOM_INITIALISATIONS = 5
RECIPE = {
    "model.patch-size": (PATCH,),
    "task.mask-patch": (1, PATCH),
    "task.sigreg-count": (2040,),
    "task.local-patches": (2,),
    "task.global-patches": (4,),
    "loader.patch-size": (PATCH,),
    "loader.batch-size": (16,),
    "loader.grouping": ("padded",),
    "loader.channel-buckets": (19, 32, 64),
    "loader.time-buckets": (256, 1280),
    "loader.reader-threads": (0,),
    "optimizer.lr": (1e-3,),
    "optimizer.warmup-epochs": (1,),
    "mesh.devices": (1,),
    "trainer.log-every": (5,),
    "trainer.validate-every": (25,),
}
"""What differs from the preset pretrain_lumamba_tiny: option of train.py -> values."""


# --- recordings to windows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Recordings that are prepared with the same options.

    Attributes:
        name: of the store, and prefix of its subjects.
        folder: below DATA.
        include: files.
        window: length of a window, seconds.
        notch: mains frequency of the country of the recording, hertz.
        subject: pattern that finds the subject in a path; "" = every file is a subject of its own.
        options: further options of `data_pipeline.prepare`.
        divided_by: held out are whole subjects, or the end of each recording that is long enough.
    """

    name: str
    folder: str
    include: tuple[str, ...]
    window: float = 5.0
    notch: int = 50
    subject: str = ""
    options: tuple[str, ...] = ()
    divided_by: str = "time"


# An 8-channel Cyton log names no electrodes: these are the vendor's suggested places, not known facts.
_CYTON = [f"EXG Channel {i}={name}" for i, name in enumerate(("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2"))]
SOURCES = (
    Source("eegmat", "eegmat", ("Subject*_[12].edf",), subject=r"(Subject\d+)_", divided_by="subject"),
    Source("uci", "uci_eeg_alcoholism", ("*.csv",), window=1, notch=60, subject=r"(co2[ac]\d+)",
           options=("--text-sfreq", str(SFREQ)), divided_by="subject"),
    Source("emotiv", "emotiv_eye_state", ("*.csv",)),
    Source("eeglab", "eeglab", ("eeglab_data.set", "eeglab_data_epochs_ica.set", "test.edf", "testmusemonitor.csv"),
           notch=60),
    Source("openbci", "openbci", ("*.txt",), notch=60, options=("--rename", *_CYTON)),
    Source("sleep", "edf_special", ("short_psg.edf", "SC4001EC-Hypnogram.edf", "corrupt_utf8_S001R01.edf")),
    Source("mne", "mne_test_files", ("duplicate_channel_labels.edf", "test.vhdr", "test_bdf_stim_channel.bdf",
           "test_edf_stim_channel.edf", "test_stim_channel.edf", "test_uneven_samp.edf")),
    Source("biosemi", "mne_test_files", ("test.bdf",), window=1),
)  # fmt: skip
LEFT_OUT = {
    "tuh_layout/": "white noise in the layout of TUH, CHB-MIT, Siena and SeizeIT, not EEG",
    "eegmat/full_length/Subject02_1.edf": "the recording of eegmat/Subject02_1.edf, uncut",
    "eeglab/BIDS_test/": "two copies of eeglab/test.edf, one of them processed",
    "mne_test_files/test_units.vhdr": "the recording of test.vhdr in other units",
    "mne_test_files/test_bin_raw.fif": "the recording of test.vhdr with channels that have no names",
    "edf_special/test_subsecond.edf": "a synthetic signal",
}


def uci_to_csv(folder: Path, out: Path) -> None:
    """The UCI text format (a file per trial, lines `trial channel sample microvolts`) as CSV, a column per channel."""
    for path in sorted(folder.rglob("*.gz")):
        signal: dict[str, list[str]] = {}
        with gzip.open(path, "rt") as file:
            for line in file:
                if not line.startswith("#"):
                    _, channel, _, value = line.split()
                    signal.setdefault(channel, []).append(value)
        target = out / path.parent.name / f"{path.name.removesuffix('.gz')}.csv"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="") as file:
            csv.writer(file).writerows([list(signal), *zip(*signal.values(), strict=True)])


def prepare_sources(data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Make the window store of every source under `out`; the manifests, by source.

    Raises ValueError, one sentence, for a folder that is missing or of which nothing can be used.
    """
    out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if store_path(out, source).is_file():
            continue
        folder = data / source.folder
        if not folder.is_dir():
            raise ValueError(f"{data} has no folder {source.folder}")
        if source.name == "uci":
            folder = out / "uci_csv"
            uci_to_csv(data / source.folder, folder)
        options = [*source.options, "--include", *source.include, "--window", str(source.window)]
        options += ["--notch", str(source.notch), "--sfreq", str(SFREQ), "--jobs", "1"]
        options += ["--subject-pattern", source.subject] if source.subject else []
        if source.name == "eegmat":
            options += ["--labels", str(_eegmat_labels(folder, out)), "--class-names", *CLASSES]
        command = [sys.executable, "-m", "data_pipeline.prepare", str(folder), str(store_path(out, source)), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{source.name}: {' '.join(done.stderr.split())}")
    manifests = {source.name: store_path(out, source).with_suffix(".manifest.json") for source in SOURCES}
    return {name: json.loads(path.read_text()) for name, path in manifests.items()}


def store_path(out: Path, source: Source) -> Path:
    """Where the windows of one source lie."""
    return out / f"{source.name}.h5"


def _eegmat_labels(folder: Path, out: Path) -> Path:
    table = out / "eegmat_labels.csv"
    names = sorted(path.name for path in folder.glob("Subject*_[12].edf"))
    rows = [(name, CLASSES[0] if name.endswith("_1.edf") else CLASSES[1], name.split("_")[0]) for name in names]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "subject"), *rows])
    return table


def probe_folds(eegmat: WindowStore) -> list[Split]:
    """The folds of the probe. The subjects of the first one's test part are held out of the pre-training."""
    return subject_folds(eegmat.subjects, eegmat.labels, FOLDS)


def end_of_recording(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) windows of a recording of `count` consecutive windows.

    The last fifth is held out, the window before it belongs to neither; from fewer than 10 windows nothing is.
    """
    held = count // 5 if count >= 10 else 0
    return np.arange(count - held - bool(held)), np.arange(count - held, count)


def divide(source: Source, store: WindowStore) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) rows of the store of one source."""
    if source.name == "eegmat":
        held = np.unique(store.subjects[probe_folds(store)[0].test])
    elif source.divided_by == "subject":
        held = np.unique(store.subjects[split_by_subject(store.subjects, val_fraction=0.2).val])
    else:
        parts = []
        for recording in np.unique(store.recordings):
            own = np.flatnonzero(store.recordings == recording)
            parts.append([own[part] for part in end_of_recording(len(own))])
        train, end = (np.sort(np.concatenate(rows)) for rows in zip(*parts, strict=True))
        return train, end
    is_held = np.isin(store.subjects, held)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def blocks(store: WindowStore, rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows` by recording; each part has one montage."""
    for recording in dict.fromkeys(store.recordings[rows].tolist()):
        yield rows[store.recordings[rows] == recording]


def write_parts(out: Path) -> tuple[dict[str, list[Path]], dict[str, Any]]:
    """Join the stores of all sources into one of each window length, for training and held out; counts by source."""
    paths: dict[str, list[Path]] = {"train": [], "held_out": []}
    counts: dict[str, Any] = {}
    for part in paths:
        for window in sorted({source.window for source in SOURCES}):
            path = out / f"{part}_{window:g}s.h5"
            info = StoreInfo(SFREQ, round(window * SFREQ), window, provenance={"part": part})
            with create_store(path, info) as writer:
                for source in SOURCES:
                    if source.window != window:
                        continue
                    store = WindowStore(store_path(out, source))
                    rows = divide(source, store)[part == "held_out"]
                    counts.setdefault(source.name, {})[part] = _count(source, store, rows)
                    # the end of a recording is called a subject of its own: the loader refuses one subject in two parts
                    suffix = " (end)" if part == "held_out" and source.divided_by == "time" else ""
                    for i, own in enumerate(blocks(store, rows)):
                        first = own[0]
                        writer.add(
                            f"{source.name}__{i}",
                            store.read(own),
                            store.montages[str(store.montage_names[first])],
                            subject=f"{source.name}/{store.subjects[first]}{suffix}",
                            recording=f"{source.name}/{store.recordings[first]}{suffix}",
                            start_samples=store.start_samples[own],
                        )
            paths[part].append(path)
    return paths, counts


def _count(source: Source, store: WindowStore, rows: np.ndarray) -> dict[str, Any]:
    names = np.unique(store.montage_names[rows])
    subjects = np.unique(store.subjects[rows])
    found = {"windows": len(rows), "seconds": len(rows) * source.window, "subjects": len(subjects)}
    found["channels"] = sorted({len(store.montages[str(name)]) for name in names})
    return found | ({"names": subjects.tolist()} if source.divided_by == "subject" else {})


# --- training ---------------------------------------------------------------------------------------------------------


def train(objective: str, paths: Mapping[str, list[Path]], out: Path, steps: int) -> dict[str, Any]:
    """Pre-train with one objective (or find the run that is there); its loss curves. Raises ValueError if it fails."""
    run, started = out / f"run_{objective}", time.time()
    if not (run / "results.json").is_file():
        options = {"task.objective": (objective,), "trainer.steps": (steps,), "trainer.run-dir": (run,)}
        options |= {"data.train": tuple(paths["train"]), "data.validation": tuple(paths["held_out"])}
        options |= {"trainer.resume": ("true",)}
        words = [str(word) for name, values in {**RECIPE, **options}.items() for word in (f"--{name}", *values)]
        done = subprocess.run([sys.executable, "train.py", "pretrain_lumamba_tiny", *words], cwd=ROOT)
        if done.returncode:
            raise ValueError(f"the run with objective {objective} ended with status {done.returncode}")
        write_json({"seconds": round(time.time() - started)}, run / "seconds.json")
    lines = read_metrics(run)
    if lines[-1]["step"] != steps:
        raise ValueError(f"{run} holds a run of {lines[-1]['step']} steps: choose another --out")
    validation = [line for line in lines if line["split"] == "validation"]
    return {
        "train": [line for line in lines if line["split"] == "train"],
        "validation": validation,
        "best_step": load(run).metadata["provenance"]["step"],
        "seconds": json.loads((run / "seconds.json").read_text())["seconds"],
    }


def untrained(trained: LoadedModel, seed: int) -> LoadedModel:
    """The model before its first step; with `SEED`, the one that the runs started from."""
    return dataclasses.replace(trained, params=nnx.split(build(trained.config, seed=seed))[1])


# --- held-out reconstruction ------------------------------------------------------------------------------------------


def between_in_time(x: Float[np.ndarray, "B C T"], mask: Bool[np.ndarray, "B C T"]) -> Float[np.ndarray, "B C T"]:
    """Hidden samples on the line between the visible neighbours in time; 0 for a channel that is hidden throughout."""
    out, times = np.where(mask, 0, x), np.arange(x.shape[-1])
    for row, (values, hidden) in enumerate(zip(x.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1]), strict=True)):
        if hidden.any() and not hidden.all():
            out.reshape(-1, x.shape[-1])[row, hidden] = np.interp(times[hidden], times[~hidden], values[~hidden])
    return out


def nearest_electrode(
    x: Float[np.ndarray, "B C T"], mask: Bool[np.ndarray, "B C T"], locations: Float[np.ndarray, "C 3"]
) -> Float[np.ndarray, "B C T"]:
    """Hidden samples as the nearest electrode that is visible at that time has them; 0 where none is."""
    out, open_ = np.where(mask, 0, x), mask.copy()
    distance = np.linalg.norm(locations[:, None] - locations[None], axis=-1)
    for channel, order in enumerate(np.argsort(distance, axis=1, kind="stable")):
        for other in order:
            taken = open_[:, channel] & ~mask[:, other]
            out[:, channel][taken] = x[:, other][taken]
            open_[:, channel] &= ~taken
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reconstruct(graphdef: nnx.GraphDef, how: Any, params: nnx.State, batch: dict, mask: jax.Array) -> tuple:
    output, normalised = forward(nnx.merge(graphdef, params), batch, how, mask=mask)
    return output.reconstruction, normalised


def hidden_errors(models: Mapping[str, LoadedModel], paths: list[Path]) -> dict[str, Any]:
    """Mean error of the hidden samples of the held-out windows by montage, for each model and each simple predictor.

    One mask for all (a fixed key) hides half of the patches. Smooth-L1 as in training, and squared: the signal is
    standardised, so the squared error of predicting 0 is about 1.
    """
    found: dict[str, Any] = {}
    for path in paths:
        store = WindowStore(path)
        sources = np.array([name.split("/")[0] for name in store.subjects])
        names = np.asarray(store.montage_names).tolist()
        for source, montage in dict.fromkeys(zip(sources.tolist(), names, strict=True)):
            rows = np.flatnonzero((sources == source) & (store.montage_names == montage))
            signal, locations = store.read(rows), store.montages[montage].locations
            mask = draw_mask(jax.random.key(0), signal.shape, ratio=0.5, patch=(1, PATCH))
            batch = {"signal": jnp.asarray(signal), "locations": jnp.broadcast_to(locations, (*signal.shape[:2], 3))}
            guesses, target = {}, np.zeros(0)
            for name, model in models.items():
                made = _reconstruct(model.graphdef, model.normalization, model.params, batch, mask)
                guesses[name], target = (np.asarray(array, np.float64) for array in made)
            hidden = np.asarray(mask)
            guesses["zero"] = np.zeros(target.shape)
            guesses["line in time"] = between_in_time(target, hidden)
            guesses["nearest electrode"] = nearest_electrode(target, hidden, np.asarray(locations))
            found[f"{source}, {signal.shape[1]} channels"] = {
                "windows": len(rows),
                "samples": int(hidden.sum()),
                "errors": {name: _errors((guess - target)[hidden]) for name, guess in guesses.items()},
            }
    return found | {"all held-out windows": _pooled(list(found.values()))}


def _errors(difference: np.ndarray) -> dict[str, float]:
    size = np.abs(difference)
    smooth = np.where(size < 1, size**2 / 2, size - 0.5)
    return {"smooth_l1": float(smooth.mean()), "squared": float((size**2).mean())}


def _pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the hidden samples of all montages."""
    weights = [part["samples"] for part in parts]
    errors = {
        name: {
            kind: float(np.average([part["errors"][name][kind] for part in parts], weights=weights)) for kind in kinds
        }
        for name, kinds in parts[0]["errors"].items()
    }
    return {"windows": sum(part["windows"] for part in parts), "samples": sum(weights), "errors": errors}


# --- embeddings -------------------------------------------------------------------------------------------------------


def effective_rank(features: Float[np.ndarray, "n D"]) -> float:
    """exp of the entropy of the normalised eigenvalues of the covariance (Roy and Vetterli, EUSIPCO 2007)."""
    eigenvalues = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    share = eigenvalues / eigenvalues.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def embeddings(model: LoadedModel, store: WindowStore, rows: np.ndarray) -> Float[np.ndarray, "n M"]:
    """Mean over patches of the latent of windows `rows`, in their order."""
    out = np.zeros((len(rows), model.config.width))
    for montage in dict.fromkeys(store.montage_names[rows].tolist()):
        at = np.flatnonzero(store.montage_names[rows] == montage)
        out[at] = embed(model, store.read(rows[at]), store.montages[montage].locations, batch_size=32)
    return out


def out_of_fold(features: np.ndarray, store: WindowStore, folds: list[Split]) -> np.ndarray:
    """Class probabilities (n,2) of every window by a logistic regression that has seen no window of its subject."""
    labels, found = np.asarray(store.labels), np.zeros((len(store), 2))
    for fold in folds:
        fit = np.sort(np.concatenate([fold.train, fold.val]))
        who = store.subjects[fit]
        found[fold.test] = classify(features[fit], labels[fit], features[fold.test], 2, train_subjects=who)
    return found


def score(probabilities: np.ndarray, store: WindowStore, rows: np.ndarray) -> dict[str, dict[str, float]]:
    """AUROC and balanced accuracy of windows `rows`, with 95 % intervals over subjects."""
    labels = np.asarray(store.labels)
    chosen = Predictions(np.log(probabilities[rows] + 1e-12), labels[rows], rows, store.recordings[rows],
                         store.subjects[rows])  # fmt: skip
    metrics = evaluate(chosen, "classification", n_resamples=RESAMPLES).levels["window"].metrics
    return {name: dataclasses.asdict(metrics[name]) for name in ("auroc", "balanced_accuracy")}


def difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> dict[str, float]:
    """AUROC of scores `first` minus that of `second`, 95 % interval over the same resamples of subjects for both."""
    names, group = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)[:, group]

    def gain(weights: np.ndarray | None) -> float:
        a, b = (roc_auc_score(labels, scores, sample_weight=weights) for scores in (first, second))
        return float(a - b)

    low, high = np.quantile([gain(weights) for weights in drawn], (0.025, 0.975))
    return {"value": gain(None), "low": float(low), "high": float(high)}


def probe(models: Mapping[str, LoadedModel], out: Path, held_out: list[Path]) -> dict[str, Any]:
    """The linear probe on eegmat and the effective ranks."""
    store = WindowStore(out / "eegmat.h5")
    rows, labels, folds = np.arange(len(store)), np.asarray(store.labels), probe_folds(store)
    assert len(store.montages) == 1, "eegmat has one montage"
    features = {"band power": window_features(store, rows, next(iter(store.montages.values())).ch_names)}
    others = [WindowStore(path) for path in held_out]
    ranks: dict[str, Any] = {}
    for name, model in models.items():
        features[name] = embeddings(model, store, rows)
        elsewhere = np.concatenate([embeddings(model, other, np.arange(len(other))) for other in others])
        ranks[name] = {"eegmat": effective_rank(features[name]), "held out": effective_rank(elsewhere)}
    probabilities = {name: out_of_fold(own, store, folds) for name, own in features.items()}
    centred = {name: zscore_by_subject(own, store.subjects) for name, own in features.items()}
    transductive = {name: out_of_fold(own, store, folds) for name, own in centred.items()}
    names = [name for name in features if not name.startswith("random")]
    result: dict[str, Any] = {"windows": len(store), "subjects": len(np.unique(store.subjects))}
    result["unseen subjects"] = np.unique(store.subjects[folds[0].test]).tolist()
    for title, found in (("inductive", probabilities), ("transductive", transductive)):
        result[title] = {name: score(found[name], store, rows) for name in names}
        result[f"{title}, unseen"] = {name: score(found[name], store, folds[0].test) for name in names}
        result[f"{title}, minus untrained"] = {
            name: difference(found[name][:, 1], found["untrained"][:, 1], labels, store.subjects)
            for name in names
            if name != "untrained"
        }
        spread = [float(roc_auc_score(labels, found[name][:, 1])) for name in features if name.startswith("random")]
        result[f"{title}, random initialisations"] = spread
    return {"probe": result, "rank": ranks}


# --- the whole --------------------------------------------------------------------------------------------------------


def run(data: Path, out: Path, steps: int, objectives: Sequence[str]) -> dict[str, Any]:
    """Everything for some of `OBJECTIVES`, in order. Raises ValueError, one sentence, for what cannot be used."""
    started = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    out = out.absolute()
    manifests = prepare_sources(data, out)
    paths, counts = write_parts(out)
    say(f"prepared: {json.dumps(counts)}")
    curves = {}
    for objective in objectives:
        curves[objective] = train(objective, paths, out, steps)
        say(f"{objective}: best at step {curves[objective]['best_step']}, {curves[objective]['seconds']} s")
    trained = {objective: load(out / f"run_{objective}") for objective in objectives}
    first = trained[objectives[0]]
    models = {"untrained": untrained(first, SEED), **trained}
    reconstructing = {name: model for name, model in models.items() if name != "lejepa"}
    reconstruction = hidden_errors(reconstructing, paths["held_out"])
    say("reconstruction measured")
    others = {f"random {i}": untrained(first, i) for i in range(RANDOM_INITIALISATIONS)}
    measured = probe({**models, **others}, out, paths["held_out"])
    say("probed")
    leaves = jax.tree.leaves(models["untrained"].params)
    return {
        "settings": {"steps": steps, **{name: list(values) for name, values in RECIPE.items()}},
        "parameters": sum(leaf.size for leaf in leaves),
        "versions": package_versions(),
        "recordings": {source.name: _facts(source, manifests[source.name]) | counts[source.name] for source in SOURCES},
        "left_out": LEFT_OUT,
        "shapes": _shapes(paths["train"]),
        "curves": curves,
        "reconstruction": reconstruction,
        **measured,
    }


def _facts(source: Source, manifest: dict[str, Any]) -> dict[str, Any]:
    files = manifest["files"]
    used = [entry for entry in files.values() if entry["status"] == "windows"]
    refused = {f"{source.folder}/{name}": entry["reason"] for name, entry in files.items() if not entry.get("windows")}
    return {
        "folder": source.folder,
        "window": source.window,
        "files": len(used),
        "rates": sorted({entry["sfreq"] for entry in used}),
        "refused": refused,
    }


def _shapes(paths: list[Path]) -> list[list[int]]:
    """Channels and samples of the batches that the training meets: one compiled program each."""
    found = set()
    for path in paths:
        store = WindowStore(path)
        samples = min(size for size in RECIPE["loader.time-buckets"] if size >= store.n_times)
        for montage in store.montages.values():
            channels = min(size for size in RECIPE["loader.channel-buckets"] if size >= len(montage))
            found.add((channels, samples))
    return [list(shape) for shape in sorted(found)]


# --- the page ---------------------------------------------------------------------------------------------------------


def _markdown(head: str, rows: list[list[str]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def tables(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    return "\n\n".join(
        f"### {title}\n\n{table(result)}"
        for title, table in (
            ("Recordings", _recordings_table),
            ("Left out and refused", _refused_table),
            ("Loss curves", _curves_table),
            ("Held-out reconstruction", _reconstruction_table),
            ("Linear probe on eegmat", _probe_table),
            ("Effective rank of the embeddings", _rank_table),
        )
    )


def _recordings_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, own in result["recordings"].items():
        train, held = own["train"], own["held_out"]
        channels = sorted({*train["channels"], *held["channels"]})
        who = ", ".join(held.get("names", [])) or ("end of the recording" if held["windows"] else "nothing: too short")
        cells = [f"{name} (`{own['folder']}`)", str(own["files"]), ", ".join(map(str, channels))]
        cells += [", ".join(f"{rate:g}" for rate in own["rates"]), f"{own['window']:g}"]
        rows.append([*cells, str(train["windows"]), str(held["windows"]), who])
    total = [sum(own[part]["windows"] for own in result["recordings"].values()) for part in ("train", "held_out")]
    rows.append(
        ["all", str(sum(own["files"] for own in result["recordings"].values())), "", "", "", *map(str, total), ""]
    )
    head = "source | files | channels | rate, Hz | window, s | training windows | held-out windows | held out"
    shapes = ", ".join(f"{channels} x {samples}" for channels, samples in result["shapes"])
    count = len(result["shapes"])
    return f"{_markdown(head, rows)}\n\nBatches are padded to {count} shapes (channels x samples): {shapes}."


def _refused_table(result: Mapping[str, Any]) -> str:
    refused = {name: reason for own in result["recordings"].values() for name, reason in own["refused"].items()}
    rows = [[f"`{name}`", reason, "the benchmark"] for name, reason in result["left_out"].items()]
    rows += [[f"`{name}`", reason, "`data_pipeline.prepare`"] for name, reason in refused.items()]
    return _markdown("file | reason | by", rows)


def _curves_table(result: Mapping[str, Any]) -> str:
    rows = []
    for objective, curve in result["curves"].items():
        first, last = curve["validation"][0], curve["validation"][-1]
        for name in ("loss", "masked", "query", "similarity", "sigreg"):
            if name in first:
                best = next(line[name] for line in curve["validation"] if line["step"] == curve["best_step"])
                train = [line[name] for line in curve["train"]]
                values = (train[0], float(np.mean(train[-5:])), first[name], last[name], best)
                rows.append([objective, name, *(f"{value:.4g}" for value in values)])
        rows[-1][0] += f" ({curve['seconds']} s, best at step {curve['best_step']})"
    step = next(iter(result["curves"].values()))["validation"][0]["step"]
    head = "objective | term | training, first 5 steps | training, last 25 steps"
    head += f" | held out, step {step} | held out, last | held out, best"
    return _markdown(head, rows)


def _reconstruction_table(result: Mapping[str, Any]) -> str:
    found = result["reconstruction"]
    names = list(found["all held-out windows"]["errors"])
    parts = []
    for kind, title in (("smooth_l1", "smooth-L1 (the trained loss)"), ("squared", "squared")):
        rows = [
            [montage, str(own["windows"]), *(f"{own['errors'][name][kind]:.3f}" for name in names)]
            for montage, own in found.items()
        ]
        parts.append(
            f"Mean {title} error of hidden samples:\n\n" + _markdown(" | ".join(["montage", "windows", *names]), rows)
        )
    return "\n\n".join(parts)


def _probe_table(result: Mapping[str, Any]) -> str:
    own, parts = result["probe"], []
    for title in ("inductive", "transductive"):
        rows = []
        for name, scores in own[title].items():
            gain = own[f"{title}, minus untrained"].get(name)
            unseen = own[f"{title}, unseen"][name]["auroc"]
            cells = [_interval(scores["auroc"]), _interval(scores["balanced_accuracy"])]
            rows.append([name, *cells, _interval(gain, "+") if gain else "", _interval(unseen)])
        spread = own[f"{title}, random initialisations"]
        rows.append([f"untrained, {len(spread)} other seeds", f"{min(spread):.3f} to {max(spread):.3f}", "", "", ""])
        head = f"{title} | AUROC | balanced accuracy | AUROC minus untrained"
        head += f" | AUROC, {len(own['unseen subjects'])} unseen subjects"
        parts.append(_markdown(head, rows))
    return "\n\n".join(parts)


def _rank_table(result: Mapping[str, Any]) -> str:
    rows = [[name, f"{own['eegmat']:.1f}", f"{own['held out']:.1f}"] for name, own in result["rank"].items()]
    return _markdown("encoder | eegmat, all windows | held-out windows of all montages", rows)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Loss of each objective, and the terms they are made of, over steps; lines: training, dots: held out."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    colours = dict(zip(OBJECTIVES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    panels = [(f"loss of {objective}", "loss", (objective,)) for objective in OBJECTIVES]
    panels += [("error of hidden samples (smooth-L1)", "masked", ("reconstruction", "mixed"))]
    panels += [("LeJEPA: similarity of views", "similarity", ("lejepa", "mixed"))]
    panels += [("LeJEPA: SIGReg", "sigreg", ("lejepa", "mixed"))]
    for panel, (title, term, objectives) in zip(axes.flat, panels, strict=True):
        for objective in [name for name in objectives if name in result["curves"]]:
            curve, colour = result["curves"][objective], colours[objective]
            steps, values = zip(*((line["step"], line[term]) for line in curve["train"]), strict=True)
            panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.7, label=f"{objective}, training")
            steps, values = zip(*((line["step"], line[term]) for line in curve["validation"]), strict=True)
            panel.plot(steps, values, "o-", color=colour, markersize=3, label=f"{objective}, held out")
        if term == "masked":
            zero = result["reconstruction"]["all held-out windows"]["errors"]["zero"]["smooth_l1"]
            panel.axhline(zero, color="black", linewidth=0.8, linestyle=":", label="predicting 0, held out")
        if term in ("similarity", "sigreg"):
            panel.set_yscale("log")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
        if panel.lines:
            panel.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_page(result: Mapping[str, Any]) -> None:
    """Put the tables between their marks in the page, and draw the picture."""
    draw(result, PICTURE)
    before, rest = PAGE.read_text().split(BEGIN, 1)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{rest.split(END, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of the recordings")
    parser.add_argument("--out", type=Path, default=Path("runs/real_pretraining"), help="stores and runs (kept)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, help="runs to make")
    parser.add_argument("--json", type=Path, default=RESULTS, help="figures to write, or with --page to read")
    parser.add_argument("--page", action="store_true", help="compute nothing: write tables and picture from the JSON")
    arguments = parser.parse_args()
    if not arguments.page:
        if arguments.data is None:
            parser.error("give the folder of the recordings, or --page")
        try:
            result = run(arguments.data, arguments.out, arguments.steps, arguments.objectives)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, arguments.json)
        print(tables(result))
        return 0
    write_page(json.loads(arguments.json.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
