"""Rest or mental arithmetic? The whole chain on real EEG: `python benchmarks/eegmat.py DATA_DIR [--quick]`.

DATA_DIR holds the recordings of PhysioNet `eegmat` (SubjectNN_1.edf rest, SubjectNN_2.edf arithmetic). Recordings ->
window stores -> 5 folds by subject -> pre-training on the unlabelled windows of the training subjects -> classifiers ->
balanced accuracy and AUROC with subject-bootstrap intervals, beside band power on the same folds and beside permuted
labels. What is chosen is chosen inside the training subjects of each fold (inner folds by subject).

Two protocols, never to be compared with each other: inductive (a test window is classified knowing nothing of its
subject but the scale of its own recording) and transductive (all unlabelled windows of the test subject, of both
conditions, re-centre its features). Each has the band-power baseline of the same protocol beside it.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_pipeline.band_power import classify, window_features
from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.splits import Split, subject_folds
from data_pipeline.store import WindowStore
from lumamba_jax import LuMambaConfig
from lumamba_jax.checkpoint import abstract_params, named_leaves, package_versions
from lumamba_jax.metrics import Predictions, classification, evaluate
from lumamba_jax.normalization import channel_zscore
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer
from lumamba_jax.sharding import MeshConfig, make_mesh, to_global
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import evaluate as run_over
from lumamba_jax.training import graph_definition, init_state, is_head, make_eval_step, make_train_step

MODEL = LuMambaConfig(patch_size=40, embed_dim=32, num_queries=4, num_blocks=1, head="reconstruction")
BAND_HZ = (1.0, 45.0)
CLIP = 15.0  # of the scaled signal: an artefact of one electrode must not decide a whole batch
PROBE_INVERSE_PENALTY = 1e-3
N_CLASSES = 2
TUNED_CANDIDATE = "full attention | pretrained | recording"


@dataclass(frozen=True)
class Settings:
    """Effort and seeds. Steps are fixed: nothing is stopped early, so no validation subject is looked at twice."""

    outer_folds: int = 5
    inner_folds: int = 3
    seed: int = 0
    batch_size: int = 16
    pretrain_steps: int = 100
    finetune_steps: int = 30
    permutations: int = 10
    resamples: int = 2000


QUICK = Settings(outer_folds=2, inner_folds=2, pretrain_steps=4, finetune_steps=2, permutations=2, resamples=100)


# --- recordings to windows --------------------------------------------------------------------------------------------


def prepare_stores(data: Path, folder: Path) -> tuple[WindowStore, WindowStore]:
    """(256 Hz windows every 5 s for band power, 128 Hz windows every second for the model)."""
    names = sorted(path.name for path in data.glob("Subject*_[12].edf"))
    if not names:
        raise ValueError(f"{data} holds no recordings Subject*_1.edf, Subject*_2.edf: give the folder of eegmat")
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        rows = [(name, "rest" if name.endswith("_1.edf") else "arithmetic", name.split("_")[0]) for name in names]
        csv.writer(file).writerows([("file", "label", "subject"), *rows])
    shared = {"labels": table, "class_names": ("rest", "arithmetic"), "include": ("Subject*_[12].edf",)}
    shared |= {"exclude": ("full_length/*",)}
    prepare(PrepareConfig(data, folder / "plain.h5", **shared))
    band = {"l_freq": BAND_HZ[0], "h_freq": BAND_HZ[1]}
    prepare(PrepareConfig(data, folder / "dense.h5", sfreq=128.0, stride=1.0, **band, **shared))
    return WindowStore(folder / "plain.h5"), WindowStore(folder / "dense.h5")


def scored_rows(plain: WindowStore, dense: WindowStore) -> np.ndarray:
    """Rows of `dense` that are the windows of `plain`, in the same order: the windows that are scored."""
    rows = np.flatnonzero(dense.start_samples % dense.n_times == 0)
    assert np.array_equal(dense.recordings[rows], plain.recordings)
    assert np.allclose(dense.start_samples[rows] / dense.sfreq, plain.start_samples / plain.sfreq)
    return rows


class Windows:
    """The reading interface of `WindowStore` over a signal in memory that is already normalised (and other labels)."""

    def __init__(self, store: WindowStore, signal: np.ndarray, labels: np.ndarray | None = None):
        self.signal, self.labels = signal, store.labels if labels is None else labels
        self.sfreq, self.n_times, self.montages = store.sfreq, store.n_times, store.montages
        self.montage_names, self.class_names = store.montage_names, store.class_names

    def __len__(self) -> int:
        return len(self.signal)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.signal[rows]


# --- normalisation ----------------------------------------------------------------------------------------------------


def amplitude_spectrum(signal: np.ndarray) -> np.ndarray:
    """Root mean square amplitude of windows (n,C,T) at each frequency, smoothed over 1 Hz: (C, T//2+1)."""
    power = np.mean(np.abs(np.fft.rfft(signal * np.hanning(signal.shape[-1]))) ** 2, axis=0)
    kernel = np.ones(5) / 5
    padded = np.pad(np.sqrt(power), [(0, 0), (2, 2)], mode="edge")
    return np.stack([np.convolve(row, kernel, "valid") for row in padded])


def flatten_spectrum(signal: np.ndarray, reference: np.ndarray, sfreq: float) -> np.ndarray:
    """Divide windows (n,C,T) by a reference amplitude spectrum (C or 1, F) inside `BAND_HZ`; nothing outside."""
    frequency = np.fft.rfftfreq(signal.shape[-1], 1 / sfreq)
    inside = (frequency >= BAND_HZ[0]) & (frequency <= BAND_HZ[1])
    gain = np.where(inside, 1 / np.maximum(reference, 1e-12), 0)
    flat = np.fft.irfft(np.fft.rfft(signal) * gain, n=signal.shape[-1])
    return (flat / flat.std()).astype(np.float32)


def per_recording(signal: np.ndarray, recordings: np.ndarray) -> np.ndarray:
    """One scale for each recording, over all its channels and windows, so that topography stays; clipped."""
    scaled = np.empty_like(signal)
    for recording in np.unique(recordings):
        own = recordings == recording
        scaled[own] = np.clip(signal[own] / np.median(signal[own].std(-1)), -CLIP, CLIP)
    return scaled


def inductive_inputs(store: WindowStore, signal: np.ndarray, train: np.ndarray) -> dict[str, np.ndarray]:
    """The normalisations that are tried; the spectrum that is divided by is that of the training subjects."""
    reference = amplitude_spectrum(signal[train]).mean(0, keepdims=True)
    flat = flatten_spectrum(signal, reference, store.sfreq)
    return {"recording": per_recording(flat, store.recordings), "window": np.asarray(channel_zscore(jnp.asarray(flat)))}


def transductive_input(store: WindowStore, signal: np.ndarray) -> np.ndarray:
    """Every channel divided by the mean spectrum of its own subject (all windows, both conditions)."""
    flat = np.empty(signal.shape, np.float32)
    for subject in np.unique(store.subjects):
        own = store.subjects == subject
        flat[own] = flatten_spectrum(signal[own], amplitude_spectrum(signal[own]), store.sfreq)
    return np.clip(flat, -CLIP, CLIP)


def zscore_by_subject(features: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Standardise features (n,D) over all windows of each subject: transductive."""
    out = np.empty(features.shape)
    for subject in np.unique(subjects):
        own = subjects == subject
        out[own] = (features[own] - features[own].mean(0)) / (features[own].std(0) + 1e-9)
    return out


# --- training ---------------------------------------------------------------------------------------------------------


class Program:
    """One compiled training step with its fresh state, used again for every fold."""

    def __init__(self, model: LuMambaConfig, task: TaskConfig, optimizer: OptimizerConfig, settings: Settings,
                 *, steps: int, freeze: bool = False):  # fmt: skip
        self.mesh, self.steps, self.settings = make_mesh(MeshConfig(devices=1)), steps, settings
        stage = "pretrain" if task.kind == "pretrain" else "finetune"
        built = make_task(task, model)
        update = make_optimizer(
            optimizer, abstract_params(model), total_steps=steps, max_epochs=max(1, steps // 10), stage=stage,
            trainable=is_head if freeze else None,
        )  # fmt: skip
        self.step = make_train_step(model, built, update, self.mesh, seed=settings.seed, freeze_encoder=freeze)
        self.evaluation = make_eval_step(model, built, self.mesh, seed=settings.seed)
        self.fresh = jax.device_get(init_state(model, update, self.mesh, seed=settings.seed))
        self.loader = LoaderConfig(batch_size=settings.batch_size, patch_size=model.patch_size, reader_threads=0)

    def fit(self, windows: Windows, rows: np.ndarray, *, encoder: Mapping[str, np.ndarray], seed: int) -> tuple:
        """Train from `encoder` (values by parameter path, {} = from scratch); (params, losses)."""
        names = named_leaves(self.fresh.params)
        leaves = [np.array(encoder.get(n, v) if not is_head(n) else v) for n, v in names.items()]
        params = jax.tree.unflatten(jax.tree.structure(self.fresh.params), leaves)
        state = jax.tree.map(jnp.array, self.fresh._replace(params=params))
        batches = make_dataset(windows, rows, LoaderConfig(**asdict(self.loader) | {"seed": seed}))
        losses = []
        for k in range(self.steps):
            state, metrics = self.step(state, to_global(batches.batch(k), self.mesh))
            losses.append(metrics["loss"])
        return jax.device_get(state.params), [float(loss) for loss in losses]

    def probabilities(self, params: nnx.State, windows: Windows, rows: np.ndarray) -> np.ndarray:
        """Class probabilities (n,2) of windows `rows`, in their order."""
        found = run_over(self.evaluation, params, make_dataset(windows, rows, self.loader.for_evaluation()), self.mesh)
        order = {window: i for i, window in enumerate(found.window_id.tolist())}
        logits = found.outputs["logits"][[order[row] for row in rows.tolist()]].astype(np.float64)
        return np.asarray(jax.nn.softmax(logits))


def pretraining(settings: Settings) -> Program:
    """Masked reconstruction, small and short: a few hundred windows of training subjects are all there is."""
    task = TaskConfig(objective="reconstruction", normalization="none", mask_patch=(1, MODEL.patch_size))
    optimizer = OptimizerConfig(lr=2e-3, warmup_epochs=1, clip_grad_norm=1.0)
    return Program(MODEL, task, optimizer, settings, steps=settings.pretrain_steps)


def finetuning(settings: Settings, head: str, *, freeze: bool) -> Program:
    """Fine-tuning with one head; the encoder frozen, or trained with layer-wise decay."""
    model = MODEL.replace(head=head, num_outputs=N_CLASSES)
    task = TaskConfig(kind="classify", normalization="none", label_smoothing=0.1)
    optimizer = OptimizerConfig(
        lr=2e-3 if freeze else 5e-4, warmup_epochs=1, weight_decay=0.2, clip_grad_norm=1.0, layerwise_decay=0.7
    )
    return Program(model, task, optimizer, settings, steps=settings.finetune_steps, freeze=freeze)


class Encoder:
    """Windows -> mean, then standard deviation, of the latent over patches: (n, 2M)."""

    def __init__(self) -> None:
        graph = graph_definition(MODEL)

        def pooled(params: nnx.State, signal: jax.Array, locations: jax.Array) -> jax.Array:
            latent = nnx.merge(graph, params).encode(signal, locations).latent
            return jnp.concatenate([latent.mean(1), latent.std(1)], axis=-1)

        self.pooled = jax.jit(pooled)

    def __call__(self, params: nnx.State, windows: Windows, rows: np.ndarray, batch: int = 46) -> np.ndarray:
        montage = next(iter(windows.montages.values()))
        locations = np.broadcast_to(montage.locations, (batch, *montage.locations.shape))
        parts = []
        for start in range(0, len(rows), batch):
            own = rows[start : start + batch]
            parts.append(np.asarray(self.pooled(params, windows.read(np.resize(own, batch)), locations))[: len(own)])
        return np.concatenate(parts).astype(np.float64)


# --- nested cross-validation ------------------------------------------------------------------------------------------

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(training positions, their labels, positions to predict) -> probabilities (n,2). Positions count scored windows."""


def probe(features: np.ndarray) -> Fit:
    """Logistic regression on standardised features, with one strong penalty fixed in advance."""

    def fit(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_INVERSE_PENALTY, max_iter=500))
        return model.fit(features[train], labels).predict_proba(features[test])

    return fit


@dataclass
class Outcome:
    """A candidate in one outer fold: scores (balanced accuracy, AUROC) of each inner fold, and test probabilities."""

    inner: list[tuple[float, float]]
    test: np.ndarray

    @property
    def auroc(self) -> float:
        return float(np.mean([score[1] for score in self.inner]))


@dataclass(frozen=True)
class Bench:
    """The scored windows, their folds and what is needed to score them."""

    settings: Settings
    labels: np.ndarray
    subjects: np.ndarray
    recordings: np.ndarray
    folds: list[Split]

    def positions(self, fold: Split) -> tuple[np.ndarray, np.ndarray]:
        """(training, test) positions of an outer fold."""
        return np.sort(np.concatenate([fold.train, fold.val])), fold.test

    def inner(self, train: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(fitting, validation) positions: folds by subject of the training subjects alone."""
        folds = subject_folds(self.subjects[train], self.labels[train], self.settings.inner_folds, seed)
        return [(train[np.sort(np.concatenate([f.train, f.val]))], train[f.test]) for f in folds]

    def run(self, fit: Fit, number: int, *, refit: bool = True) -> Outcome:
        """Inner scores, then test probabilities: fitted again on all training subjects, or the inner models' mean."""
        train, test = self.positions(self.folds[number])
        scores, members = [], []
        for fitting, validation in self.inner(train, number):
            wanted = validation if refit else np.concatenate([validation, test])
            found = fit(fitting, self.labels[fitting], wanted)
            score = classification(np.log(found[: len(validation)] + 1e-12), self.labels[validation])
            scores.append((score["balanced_accuracy"], score["auroc"]))
            members.append(found[len(validation) :])
        return Outcome(scores, fit(train, self.labels[train], test) if refit else np.mean(members, axis=0))

    def permuted(self, fit: Fit, number: int, seed: int) -> np.ndarray:
        """Test probabilities after training on labels permuted within each training subject."""
        train, test = self.positions(self.folds[number])
        labels, rng = self.labels[train].copy(), np.random.default_rng((seed, number))
        for subject in np.unique(self.subjects[train]):
            own = self.subjects[train] == subject
            labels[own] = rng.permutation(labels[own])
        return fit(train, labels, test)

    def report(self, parts: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        """Scores of the test probabilities of all folds, by level, with subject-bootstrap intervals."""
        tested = np.concatenate([fold.test for fold in self.folds])
        found = Predictions(np.log(np.concatenate(parts) + 1e-12), self.labels[tested], tested,
                            self.recordings[tested], self.subjects[tested])  # fmt: skip
        levels = evaluate(found, "classification", n_resamples=self.settings.resamples).levels
        names = ("balanced_accuracy", "auroc")
        return {level: {name: asdict(levels[level].metrics[name]) for name in names} for level in levels}


def run_fold(bench: Bench, number: int, dense: WindowStore, scored: np.ndarray, signal: np.ndarray,
             by_subject: Windows, programs: Mapping[str, Program], encoder: Encoder) -> dict[str, Any]:  # fmt: skip
    """Everything of one outer fold: pre-training, the candidates of both protocols, permuted labels of the chosen."""
    train, _ = bench.positions(bench.folds[number])
    training_rows = np.flatnonzero(np.isin(dense.subjects, np.unique(bench.subjects[train])))
    inputs = {name: Windows(dense, x) for name, x in inductive_inputs(dense, signal, training_rows).items()}
    pretrain = programs["pretrain"]
    encoder_params, losses = pretrain.fit(inputs["recording"], training_rows, encoder={}, seed=number)
    encoders = {"random": pretrain.fresh.params, "pretrained": encoder_params}
    fits: dict[str, dict[str, Fit]] = {"inductive": {}, "transductive": {}}
    for name, params in encoders.items():
        for how, windows in inputs.items():
            features = encoder(params, windows, scored)
            fits["inductive"][f"probe mean | {name} | {how}"] = probe(features[:, : MODEL.width])
            fits["inductive"][f"probe mean+std | {name} | {how}"] = probe(features)
        features = zscore_by_subject(encoder(params, by_subject, scored), bench.subjects)
        fits["transductive"][f"probe mean | {name} | subject"] = probe(features[:, : MODEL.width])
        fits["transductive"][f"probe mean+std | {name} | subject"] = probe(features)
    found: dict[str, Any] = {"losses": losses}
    for protocol, candidates in fits.items():
        found[protocol] = {name: bench.run(fit, number) for name, fit in candidates.items()}
    tuned = finetune_fits(programs, inputs["recording"], dense, scored, bench, number, named_leaves(encoder_params))
    trained = {name: bench.run(fit, number, refit=False) for name, fit in tuned.items()}
    found["inductive"][TUNED_CANDIDATE] = trained[TUNED_CANDIDATE]
    found["heads"] = trained
    for protocol, candidates in fits.items():
        chosen = max(found[protocol], key=lambda name: found[protocol][name].auroc)
        found[f"{protocol} chosen"] = chosen
        fit, count = (candidates | tuned)[chosen], bench.settings.permutations if chosen in candidates else 1
        runs = [bench.permuted(fit, number, seed) for seed in range(count)]
        found[f"{protocol} permuted"] = [runs[seed % count] for seed in range(bench.settings.permutations)]
    return found


def finetune_fits(programs: Mapping[str, Program], windows: Windows, dense: WindowStore, scored: np.ndarray,
                  bench: Bench, number: int, pretrained: Mapping[str, np.ndarray]) -> dict[str, Fit]:  # fmt: skip
    """Fine-tuned candidates. In every fold the full fine-tuning of the attention head; all others in fold 0 only."""

    def made(program: Program, start: Mapping[str, np.ndarray]) -> Fit:
        def fit(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
            subjects = np.unique(bench.subjects[train])
            rows = np.flatnonzero(np.isin(dense.subjects, subjects))  # windows every second
            own = bench.labels[train]
            if np.array_equal(own, labels):
                labelled = Windows(dense, windows.signal)
            else:  # permuted: only the scored windows have a label of their own
                rows, changed = scored[train], dense.labels.copy()
                changed[rows] = labels
                labelled = Windows(dense, windows.signal, changed)
            params, _ = program.fit(labelled, rows, encoder=start, seed=number)
            return program.probabilities(params, windows, scored[test])

        return fit

    fits = {}
    for name, program in programs.items():
        if name == "pretrain" or (number and name != "full attention"):
            continue
        fits[f"{name} | pretrained | recording"] = made(program, pretrained)
        if number == 0 and name.startswith("full"):
            fits[f"{name} | scratch | recording"] = made(program, {})
    return fits


# --- results ----------------------------------------------------------------------------------------------------------


def baselines(bench: Bench, plain: WindowStore) -> dict[str, list[np.ndarray]]:
    """Band power on the same folds: as it is, and standardised by subject (transductive)."""
    features = window_features(plain, np.arange(len(plain)), next(iter(plain.montages.values())).ch_names)
    found: dict[str, list[np.ndarray]] = {}
    for name, own in (("inductive", features), ("transductive", zscore_by_subject(features, bench.subjects))):
        found[name] = []
        for fold in bench.folds:
            train, test = bench.positions(fold)
            who = bench.subjects[train]
            found[name].append(classify(own[train], bench.labels[train], own[test], N_CLASSES, train_subjects=who))
    return found


def collect(bench: Bench, folds: list[dict[str, Any]], base: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Tables of both protocols from the outcomes of all folds."""
    result: dict[str, Any] = {}
    for protocol in ("inductive", "transductive"):
        names = list(folds[0][protocol])
        chosen = [fold[f"{protocol} chosen"] for fold in folds]
        selected = [fold[protocol][name].test for fold, name in zip(folds, chosen, strict=True)]
        averaged = [np.mean([outcome.test for outcome in fold[protocol].values()], axis=0) for fold in folds]
        permuted = [
            bench.report([fold[f"{protocol} permuted"][i] for fold in folds])["window"]
            for i in range(bench.settings.permutations)
        ]
        result[protocol] = {
            "outer": {
                "band power": bench.report(base[protocol]),
                "chosen by inner folds": bench.report(selected),
                "mean of all candidates": bench.report(averaged),
            },
            "permuted": {
                name: [run[name]["value"] for run in permuted] for name in ("balanced_accuracy", "auroc")
            },
            "chosen": chosen,
            "candidates": {
                name: np.mean([np.mean(f[protocol][name].inner, axis=0) for f in folds], axis=0).tolist()
                for name in names
            },
            "candidates, test (not used)": {
                name: bench.report([f[protocol][name].test for f in folds])["window"] for name in names
            },
        }  # fmt: skip
    result["heads, inner folds of fold 0"] = {
        name: np.mean(outcome.inner, axis=0).tolist() for name, outcome in folds[0]["heads"].items()
    }
    result["pretraining loss, first and last ten steps"] = [
        [float(np.mean(fold["losses"][:10])), float(np.mean(fold["losses"][-10:]))] for fold in folds
    ]
    return result


def _cell(score: Mapping[str, float]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def tables(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = []
    for protocol in ("inductive", "transductive"):
        own = result[protocol]
        lines += [f"### {protocol.capitalize()} protocol, test folds", ""]
        lines += ["| | balanced accuracy | AUROC | AUROC by recording |", "|---|---|---|---|"]
        for name, levels in own["outer"].items():
            window = levels["window"]
            cells = [_cell(window["balanced_accuracy"]), _cell(window["auroc"]), _cell(levels["recording"]["auroc"])]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        spread = [f"{np.mean(v):.3f} ({np.min(v):.3f} to {np.max(v):.3f})" for v in own["permuted"].values()]
        lines += ["| chosen, labels permuted: mean (range) | " + " | ".join(spread) + " | |", ""]
        lines += ["Chosen, by fold: " + "; ".join(f"`{name}`" for name in own["chosen"]), ""]
        lines += ["| candidate: read-out, encoder, normalisation | inner balanced accuracy | inner AUROC |"]
        lines += ["|---|---|---|"]
        lines += [f"| {name.replace(' | ', ', ')} | {b:.3f} | {a:.3f} |" for name, (b, a) in own["candidates"].items()]
        lines += [""]
    lines += ["### Heads, inner folds of the training subjects of fold 0", ""]
    lines += ["| trained part and head, start, normalisation | inner balanced accuracy | inner AUROC |"]
    lines += ["|---|---|---|"]
    heads = result["heads, inner folds of fold 0"]
    return "\n".join(lines + [f"| {n.replace(' | ', ', ')} | {b:.3f} | {a:.3f} |" for n, (b, a) in heads.items()])


def run(data: Path, settings: Settings) -> dict[str, Any]:
    """The whole benchmark. Raises ValueError when `data` is not the folder it should be."""
    started = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plain, dense = prepare_stores(data, Path(folder))
        scored, signal = scored_rows(plain, dense), dense.read(np.arange(len(dense)))
        folds = subject_folds(plain.subjects, plain.labels, settings.outer_folds, settings.seed)
        bench = Bench(settings, plain.labels, plain.subjects, plain.recordings, folds)
        say("prepared")
        base = baselines(bench, plain)
    for name, parts in base.items():
        say(f"band power, {name}: {bench.report(parts)['window']}")
    programs = {"pretrain": pretraining(settings)}
    for freeze in (False, True):
        for head in ("attention", "linear"):
            programs[f"{'frozen' if freeze else 'full'} {head}"] = finetuning(settings, head, freeze=freeze)
    say("programs built")
    encoder, found, by_subject = Encoder(), [], Windows(dense, transductive_input(dense, signal))
    for number in range(settings.outer_folds):
        found.append(run_fold(bench, number, dense, scored, signal, by_subject, programs, encoder))
        say(f"fold {number}: {found[-1]['inductive chosen']}; {found[-1]['transductive chosen']}")
    result = {"settings": asdict(settings), "model": asdict(MODEL), "splits": [fold.digest for fold in folds]}
    result |= {"subjects": len(np.unique(bench.subjects)), "windows": len(scored), "versions": package_versions()}
    return result | collect(bench, found, base) | {"seconds": round(time.time() - started)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the recordings")
    parser.add_argument("--quick", action="store_true", help="two folds and a few steps: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/eegmat[_quick].json)")
    arguments = parser.parse_args()
    name = "eegmat_quick.json" if arguments.quick else "eegmat.json"
    out = arguments.out or Path(__file__).parent / "results" / name
    try:
        result = run(arguments.data, QUICK if arguments.quick else Settings())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
