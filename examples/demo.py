"""The whole life of the model on a CPU: `python examples/demo.py --out runs/demo [--data FOLDER]`.

recordings -> windows -> pre-training -> fine-tuning -> scores -> embeddings -> one report. Every step but the report
is the command a user would type; it is written to `OUT/commands.txt`. With `--data` the recordings are those of FOLDER,
labelled by FOLDER/labels.csv; without, a few synthetic ones are made.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the packages of this checkout, also where it is not installed

import configs  # noqa: E402
from configs.data import Windows, open_windows  # noqa: E402
from configs.results import baseline_predictions, kind_of  # noqa: E402
from data_pipeline.loader import LoaderConfig  # noqa: E402
from lumamba_jax import inference, masking, metrics, report  # noqa: E402
from lumamba_jax.checkpoint import BEST_DIRECTORY, abstract_params, read_metadata, save_pretrained  # noqa: E402
from lumamba_jax.compilation import enable_compilation_cache  # noqa: E402
from lumamba_jax.optimizer import make_optimizer  # noqa: E402
from lumamba_jax.run_log import read_metrics  # noqa: E402
from lumamba_jax.sharding import make_mesh  # noqa: E402
from lumamba_jax.tasks import forward  # noqa: E402
from lumamba_jax.training import init_state  # noqa: E402

MARK = ".made-by-demo"  # the folder may be cleared when it holds this file
SHOWN = ("balanced_accuracy", "auroc", "aupr", "f1_weighted", "kappa", "r2", "rmse", "pearson")
OURS, BASELINE = "LuMamba", "band power"
OBSERVED = 64  # test windows that attention maps and reconstructions are taken from
MAPPED = 1500  # test windows in an embedding map


class StepError(Exception):
    """A command of the demo ended with a status other than 0; it has said why."""

    def __init__(self, step: str, status: int):
        super().__init__(f"stopped: the step '{step}' failed with status {status}")
        self.status = status


@dataclass
class Demo:
    """The steps of one demo: runs commands, times them, prints one line each."""

    out: Path
    console: Console = field(default_factory=Console)
    steps: list[tuple[str, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block; its line appears when it has ended well."""
        start = time.perf_counter()
        yield
        self.steps.append((name, time.perf_counter() - start))
        self.console.print(f"{len(self.steps)}. {name:<38}{self.steps[-1][1]:7.1f} s", highlight=False)

    def command(self, name: str, *words: str | Path) -> None:
        """Run `python WORDS...`: messages and progress on standard error, the rest in OUT/logs. Raises StepError."""
        arguments = [str(word) for word in words]
        with (self.out / "commands.txt").open("a") as file:
            file.write(f"{shlex.join(['python', *arguments])}\n")
        log = self.out / "logs" / f"{len(self.steps) + 1}-{name.replace(' ', '-').replace(',', '')}.txt"
        log.parent.mkdir(exist_ok=True)
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self.step(name), log.open("w") as stdout:
            status = subprocess.run(
                [sys.executable, *arguments], stdout=stdout, env=environment, check=False
            ).returncode
            if status:
                raise StepError(name, status)


def main() -> int:
    """Exit status 0, or that of the step that failed; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo writes")
    parser.add_argument("--data", type=Path, help="folder with recordings and labels.csv (file, label, ...)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a micro model: shows that it runs")
    options = parser.parse_args()
    enable_compilation_cache()
    try:
        if options.data and not (options.data / "labels.csv").is_file():
            raise ValueError(
                f"{options.data / 'labels.csv'} does not exist: it gives the label of each recording, in the columns "
                "file, label and optionally start, stop (seconds) and subject"
            )
        _clear(options.out)
        run(Demo(options.out), options.data, quick=options.quick)
    except StepError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return error.status
    except (ValueError, OSError) as error:
        print(f"demo.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(demo: Demo, data: Path | None, *, quick: bool) -> None:
    """All steps, the table and the report."""
    out, store = demo.out, demo.out / "windows.h5"
    recordings = data or out / "recordings"
    if data is None:
        size = ("--subjects", "6", "--seconds", "20") if quick else ("--subjects", "20", "--seconds", "40")
        demo.command("synthetic recordings", "-m", "data_pipeline.synthetic", recordings, *size)
    labels = ("--labels", recordings / "labels.csv", "--unlabelled", "skip")
    demo.command("recordings to windows", "-m", "data_pipeline.prepare", recordings, store, *labels)

    finetuning = configs.load("demo_finetune")
    windows = open_windows(dataclasses.replace(finetuning.data, train=(str(store),)), labelled=True)
    train, evaluate = (Path(os.path.relpath(REPOSITORY / name)) for name in ("train.py", "eval.py"))
    untrained, pretrained, finetuned = (out / name for name in ("untrained", "pretrain", "finetune"))

    options = ("--trainer.run-dir", pretrained, "--data.train", store, *_fitted("demo_pretrain", windows, quick=quick))
    demo.command("pre-training", train, "demo_pretrain", *options)
    options = ("--trainer.run-dir", finetuned, "--data.train", store, *_fitted("demo_finetune", windows, quick=quick))
    options += ("--trainer.init-from", pretrained, "--trainer.baseline", "false", *_task_options(windows))
    demo.command("fine-tuning", train, "demo_finetune", *options)
    demo.command("scores", evaluate, "metrics", finetuned, "--out", out / "scores.json")
    with demo.step("an untrained model to compare with"):
        _save_untrained(untrained, like=pretrained)
    for model in (untrained, pretrained, finetuned):
        demo.command(f"embeddings, {model.name}", evaluate, "embed", model, store, "--out", _embedding_file(model))
    with demo.step("report"):
        content = _gather(demo, windows, real=data is not None)
        report.write_report(content, out / "report.html")
    _print_scores(demo.console, content)
    demo.console.print(f"report: {out / 'report.html'}", highlight=False)


def _clear(out: Path) -> None:
    """Make the folder, or empty it when an earlier demo made it. Raises ValueError for a folder of someone else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise ValueError(f"{out} is not empty and was not made by the demo: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


# --- sizes ------------------------------------------------------------------------------------------------------------


def _fitted(preset: str, windows: Windows, *, quick: bool) -> list[str]:
    """Options that keep the time of a step about constant: the presets are made for the synthetic recordings, others
    may have more channels (smaller batches) or too few windows for a batch."""
    preferred = configs.load(preset).loader.batch_size
    channels = max(len(montage) for montage in windows.stores[0].montages.values())
    batch = min(preferred, max(2, preferred * 22 // channels), len(windows.parts["train"]))
    options = [] if batch == preferred else ["--loader.batch-size", str(batch)]
    if quick:
        options += ["--model.embed-dim", "16", "--model.num-queries", "2", "--model.num-blocks", "1"]
        options += ["--trainer.steps", "4", "--trainer.validate-every", "2", "--trainer.log-every", "1"]
    return options


def _task_options(windows: Windows) -> list[str]:
    """Fine-tuning for classes is the preset; targets are regressed."""
    regression = windows.labels is not None and np.issubdtype(windows.labels.dtype, np.floating)
    return ["--task.kind", "regress", "--task.class-weights", "none"] if regression else []


def _save_untrained(directory: Path, *, like: Path) -> None:
    """Export the parameters that the pre-training run `like` began with: the same program, sizes and seed."""
    config, metadata = configs.load(str(like / "config.yaml")), read_metadata(like / BEST_DIRECTORY)
    optimizer = make_optimizer(
        config.optimizer, abstract_params(config.model), total_steps=1, max_epochs=1, stage="pretrain"
    )
    state = init_state(config.model, optimizer, make_mesh(config.mesh), seed=config.trainer.seed)
    save_pretrained(directory, config.model, state.params, metadata["provenance"] | {"step": 0})


def _embedding_file(model: Path) -> Path:
    return model.with_name(f"embeddings_{model.name}.npz")


# --- the report -------------------------------------------------------------------------------------------------------


def _gather(demo: Demo, windows: Windows, *, real: bool) -> report.RunReport:
    """Everything the report shows, as arrays."""
    out = demo.out
    pretrained = inference.load(out / "pretrain")
    seen = _observe(pretrained, windows)
    outcome, scores = _outcome(out / "scores.npz", windows)
    return report.RunReport(
        title="LuMamba on your recordings" if real else "LuMamba on synthetic recordings",
        facts=_facts(windows, pretrained),
        steps=demo.steps,
        scores=scores,
        scores_note="On the windows of subjects that neither training nor model selection has seen; "
        "95 % intervals by resampling subjects.",
        losses=[_losses(out / "pretrain", "Pre-training"), _losses(out / "finetune", "Fine-tuning")],
        reconstruction=_typical(seen, windows),
        attention=_attention(seen, windows),
        outcome=outcome,
        embeddings=_embedding_maps(out, windows),
    )


def _facts(windows: Windows, model: inference.LoadedModel) -> dict[str, str]:
    store, config = windows.stores[0], model.config
    montages = ", ".join(f"{name} ({len(montage)} channels)" for name, montage in store.montages.items())
    parts = ", ".join(f"{len(rows)} {part}" for part, rows in windows.parts.items())
    sizes = f"embed_dim {config.embed_dim}, {config.num_queries} queries, blocks {config.num_blocks}"
    return {
        "recordings": f"{len(np.unique(windows.recordings))} of {len(np.unique(windows.subjects))} subjects",
        "montages": montages,
        "windows": f"{len(store)} of {store.n_times / store.sfreq:g} s at {store.sfreq:g} Hz: {parts} (by subject)",
        "classes": ", ".join(windows.class_names or ["none: a regression"]),
        "model": f"{model.metadata['num_parameters']:,} parameters: {sizes}, patches of {config.patch_size} samples",
        "versions": ", ".join(f"{name} {version}" for name, version in model.metadata["versions"].items()),
    }


def _losses(run_dir: Path, title: str) -> report.LossCurves:
    lines = read_metrics(run_dir)
    curves = {}
    for split in ("train", "validation"):
        own = [
            (line["step"], np.nan if line["loss"] is None else line["loss"]) for line in lines if line["split"] == split
        ]
        curves[split] = (np.array([step for step, _ in own]), np.array([loss for _, loss in own], dtype=float))
    return report.LossCurves(title, curves, best_step=read_metadata(run_dir / BEST_DIRECTORY)["provenance"]["step"])


@dataclass(frozen=True)
class Observed:
    """What the pre-trained model did with some test windows; rows belong together, padding included.

    `signal`, `reconstruction` `(n,C,T)` normalised, `hidden` `(n,C,T)` bool, `attention` `(n,Q,C)` mean over time.
    """

    window_id: np.ndarray
    signal_uv: np.ndarray
    signal: np.ndarray
    reconstruction: np.ndarray
    hidden: np.ndarray
    attention: np.ndarray


def _observe(model: inference.LoadedModel, windows: Windows) -> Observed:
    """Run the pre-trained model on up to OBSERVED test windows, spread over the test subjects."""
    chosen = _spread(windows.parts["test"], OBSERVED)
    loader = LoaderConfig(batch_size=min(16, len(chosen)), patch_size=model.config.patch_size, grouping="padded")
    batches = dataclasses.replace(windows, parts={"test": chosen}).batches("test", loader.for_evaluation())

    masks = ("channel_mask", "patch_mask")
    ratio, patch = model.task["mask_ratio"], tuple(model.task["mask_patch"])

    @jax.jit
    def look(params: nnx.State, batch: dict[str, jax.Array], hidden: jax.Array) -> tuple[jax.Array, ...]:
        output, signal = forward(nnx.merge(model.graphdef, params), batch, model.normalization, mask=hidden)
        return signal, output.reconstruction, output.attention_scores.mean(axis=1)

    parts = []
    for number, batch in enumerate(batches):
        real = batch["window_mask"]
        arrays = {name: value for name, value in batch.items() if name != "label"}
        key = masking.stream_key(0, "mask", number)
        padding = {name: arrays[name] for name in masks}
        hidden = np.asarray(masking.draw_mask(key, batch["signal"].shape, ratio=ratio, patch=patch, **padding))
        signal, reconstruction, _ = look(model.params, arrays, hidden)
        attention = look(model.params, arrays, np.zeros_like(hidden))[2]
        values = (batch["window_id"], batch["signal"], signal, reconstruction, hidden, attention)
        parts.append([np.asarray(value)[real] for value in values])
    return Observed(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _typical(seen: Observed, windows: Windows) -> report.Reconstruction:
    """The window of median amplitude, its reconstruction brought back to microvolts."""
    amplitude = seen.signal_uv.std(axis=2).mean(axis=1)
    row = int(np.argsort(amplitude)[len(amplitude) // 2])
    number, store = int(seen.window_id[row]), windows.stores[0]
    montage = store.montages[str(store.montage_names[number])]
    own = slice(len(montage))
    signal_uv = seen.signal_uv[row, own]
    scale = signal_uv.std(axis=1, keepdims=True) / np.maximum(seen.signal[row, own].std(axis=1, keepdims=True), 1e-12)
    offset = signal_uv.mean(axis=1, keepdims=True) - scale * seen.signal[row, own].mean(axis=1, keepdims=True)
    return report.Reconstruction(
        signal_uv,
        seen.reconstruction[row, own] * scale + offset,
        seen.hidden[row, own],
        store.sfreq,
        montage.ch_names,
        f"A test window of {windows.subjects[number]}, montage {montage.name}.",
    )


def _attention(seen: Observed, windows: Windows) -> list[report.AttentionMap]:
    """Mean attention for each montage among the observed windows."""
    store = windows.stores[0]
    names = store.montage_names[seen.window_id]
    maps = []
    for name in dict.fromkeys(names.tolist()):
        montage = store.montages[name]
        weights = seen.attention[names == name].mean(axis=0)[:, : len(montage)]
        maps.append(report.AttentionMap(name, weights, montage.locations, montage.ch_names))
    return maps


def _outcome(
    predictions: Path, windows: Windows
) -> tuple[report.Decisions | report.Estimates, dict[str, dict[str, metrics.Estimate]]]:
    """Test predictions of the fine-tuned model (as eval.py stored them) and of the baseline, and their scores."""
    with np.load(predictions) as file:
        ours = metrics.Predictions(*(file[name] for name in ("logits", "labels", "window_id", "recording", "subject")))
    models = {OURS: ours, BASELINE: baseline_predictions(windows, "test")}
    kind = kind_of("regress" if windows.class_names is None else "classify", windows.labels)
    scores = {}
    for name, of_model in models.items():
        found = metrics.evaluate(of_model, kind, class_names=windows.class_names).levels["window"].metrics
        scores[name] = {score: found[score] for score in SHOWN if score in found}
    if kind == "regression":
        return report.Estimates(ours.labels, {name: p.logits for name, p in models.items()}), scores
    shares = {name: np.asarray(jax.nn.softmax(p.logits, axis=-1)) for name, p in models.items()}
    return report.Decisions(ours.labels, windows.class_names, shares), scores


def _embedding_maps(out: Path, windows: Windows) -> report.EmbeddingMaps:
    """The test windows (at most MAPPED, evenly chosen) before and after pre-training, and after fine-tuning."""
    moments = {"untrained": "Before pre-training", "pretrain": "After pre-training", "finetune": "After fine-tuning"}
    embeddings = {}
    for name, moment in moments.items():
        with np.load(_embedding_file(out / name)) as file:
            embeddings[moment] = file["embeddings"]
    chosen = _spread(windows.parts["test"], MAPPED)
    labels = windows.labels if windows.labels.ndim == 1 else windows.labels[:, 0]
    return report.EmbeddingMaps(
        {moment: values[chosen] for moment, values in embeddings.items()},
        windows.subjects[chosen],
        labels[chosen],
        windows.class_names or (),
        "Windows of the test subjects.",
    )


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of `rows`, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]


def _print_scores(console: Console, content: report.RunReport) -> None:
    table = Table(title="Test subjects, windows; 95 % intervals by resampling subjects", title_justify="left")
    table.add_column("")
    for name in content.scores:
        table.add_column(name, justify="right")
    for score in SHOWN:
        found = [model.get(score) for model in content.scores.values()]
        if any(found):
            table.add_row(score, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" if e else "" for e in found))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
