"""Scores of fine-tuned models on labelled windows, of one run or several, beside published results; JSON and a page."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from configs.data import Windows, check_windows, open_windows
from configs.outputs import check_rate, counted, evaluation_loader, shown_when_long
from configs.results import baseline_predictions, kind_of, predictions_of, score, weights_digest
from configs.schema import DataConfig, ExperimentConfig, differences, from_mapping, read_yaml, to_mapping
from configs.task_sheet import TASKS, EvaluationTask, claim_of, deviations, find_task, format_score, stated_parts
from lumamba_jax import metrics, report
from lumamba_jax.architectures import ModelConfig
from lumamba_jax.checkpoint import load_pretrained
from lumamba_jax.sharding import MeshConfig, make_mesh
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import evaluate, make_eval_step

Part = Literal["test", "validation", "train"]
_SUBJECT_SCORE = {"classification": "accuracy", "multilabel": "auroc", "regression": "pearson"}
_OF_ONE_RUN = {"trainer.seed", "loader.seed", "trainer.run_dir", "trainer.resume", "trainer.stop_after"}


@dataclass(frozen=True)
class Scored:
    """One model on one part of its windows.

    facts: what the model is, ready for JSON. config: of the run, None for an exported model. task: recorded in it.
    """

    path: Path
    part: Part
    windows: Windows
    predictions: metrics.Predictions
    report: metrics.Report
    facts: dict[str, Any]
    config: ExperimentConfig | None
    task: str | None

    def to_dict(self) -> dict[str, Any]:
        """All scores and what they were computed on, ready for JSON."""
        about = {"model": str(self.path), "part": self.part, "data": [str(store.path) for store in self.windows.stores]}
        return about | {"split": self.windows.split.digest, "facts": self.facts, **self.report.to_dict()}

    @property
    def kind(self) -> metrics.Kind:
        """How it was scored."""
        return self.report.kind


def score_model(
    path: Path, *, data: Sequence[Path], part: Part, batch_size: int, resamples: int, task: str | None = None
) -> Scored:
    """Run a fine-tuned model over a part of its own split, or over other labelled stores `data`, and score it.

    `task` of the sheet, default as the run records, names the outputs of a regression.
    In float32, as the published code tests, whatever the training computed in. Raises: ValueError, one sentence, for a
    model without predictions, or windows that do not fit it or were trained on.
    """
    model, params, metadata = load_pretrained(path)
    provenance = metadata["provenance"]
    if model.head in ("reconstruction", "none") or "task" not in provenance:
        raise ValueError(f"{path} was not fine-tuned (head {model.head!r}): there are no predictions to score")
    model = model.replace(compute_dtype="float32") if model.compute_dtype == "bfloat16" else model
    task_config = from_mapping(provenance["task"], TaskConfig())
    config = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else None
    windows, part = _labelled_windows(path, config, data, part)
    _check_fits(model, provenance, windows)
    _check_labels(model, task_config, windows)
    loader = evaluation_loader(model, windows.stores, batch_size)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    eval_step = make_eval_step(model, make_task(task_config, model), mesh, seed=0)
    batches = windows.batches(part, loader)
    evaluation = evaluate(eval_step, params, counted(batches, len(batches), f"{path.name}, batches"), mesh)
    predictions, kind, names = _decided(predictions_of(evaluation, windows), task_config, windows)
    recorded = provenance.get("evaluation_task")
    with shown_when_long(f"{path.name}, scores with {resamples} resamples"):
        found = _score(predictions, kind, names, recorded if task is None else task, resamples)
    facts = _facts(model, metadata, config, windows, part)
    return Scored(path, part, windows, predictions, found, facts, config, recorded)


def _score(
    predictions: metrics.Predictions, kind: metrics.Kind, names: list[str] | None, task: str | None, resamples: int
) -> metrics.Report:
    """All scores; where a task tells measured targets from others (data.md Q17), also those of the measured ones."""
    sheet = TASKS.get(task or "")
    outputs = sheet.output_names if sheet is not None and kind == "regression" else ()
    if sheet is None or len(outputs) != predictions.logits.shape[-1]:
        return metrics.evaluate(predictions, kind, class_names=names, n_resamples=resamples)
    found = metrics.evaluate(predictions, kind, class_names=outputs, n_resamples=resamples)
    if sheet.measured is None:
        return found
    own = predictions.of_outputs(slice(sheet.measured))
    measured = metrics.evaluate(own, kind, class_names=outputs[: sheet.measured], n_resamples=resamples)
    levels = {
        name: dataclasses.replace(
            level,
            metrics=level.metrics | {f"{key}_measured": one for key, one in measured.levels[name].metrics.items()},
        )
        for name, level in found.levels.items()
    }
    note = f"_measured: of {', '.join(outputs[: sheet.measured])}; the other outputs are predictions of another model"
    return dataclasses.replace(found, levels=levels, notes=[*found.notes, note])


def _decided(
    predictions: metrics.Predictions, task: TaskConfig, windows: Windows
) -> tuple[metrics.Predictions, metrics.Kind, list[str] | None]:
    """How the predictions are scored. Two classes for each channel are one yes/no output for each (`mc`, recipes 5)."""
    kind = kind_of(task.kind, predictions.labels)
    if kind != "classification":
        return predictions, kind, None
    if predictions.labels.ndim == 2 and predictions.logits.shape[-1] == 2:
        montages = {montage.ch_names for store in windows.stores for montage in store.montages.values()}
        names = list(montages.pop()) if len(montages) == 1 else None
        return metrics.as_multilabel(predictions), "multilabel", names
    return predictions, kind, windows.class_names


def _labelled_windows(
    path: Path, config: ExperimentConfig | None, data: Sequence[Path], part: Part
) -> tuple[Windows, Part]:
    """The run's own part, or other stores as the test part: then their subjects must not be the training subjects."""
    stores = tuple(map(str, data))
    if config is not None:
        drawn = {"num_folds": None, "fold": None, "leave_out": "", "few_shot": None}  # all of it is in the split file
        fixed = drawn | {"split_file": str(path / "split.json")}
        changes = fixed | ({"test": stores} if stores else {})
        return open_windows(dataclasses.replace(config.data, **changes), labelled=True), "test" if stores else part
    if not stores:
        raise ValueError(f"{path} is not a training run: name the labelled stores to score it on with --data")
    windows = open_windows(DataConfig(train=stores, validation_fraction=0.0), labelled=True)
    return dataclasses.replace(
        windows, parts={"train": windows.parts["train"][:0], "test": windows.parts["train"]}
    ), "test"


def _check_fits(model: ModelConfig, provenance: Mapping[str, Any], windows: Windows) -> None:
    trained, found = provenance.get("class_names"), windows.class_names
    if trained and found and list(trained) != list(found):
        raise ValueError(f"the model knows the classes {', '.join(trained)}, the stores name {', '.join(found)}")
    if model.output_channels is None and (model.num_outputs or 1) < windows.num_outputs:
        raise ValueError(f"the model has {model.num_outputs} outputs, the labels need {windows.num_outputs}")
    check_windows(model, windows)
    check_rate(provenance, windows.stores[0])


def _check_labels(model: ModelConfig, task: TaskConfig, windows: Windows) -> None:
    """Refuse labels of another kind, or of another number, than the model's outputs."""
    labels = windows.labels
    assert labels is not None, "asked for in open_windows"
    path, targets = windows.stores[0].path, labels.dtype.kind == "f"
    if task.kind == "regress" and not targets:
        raise ValueError(f"the model predicts values, {path} holds classes: score it on a store with targets (n, K)")
    outputs = model.num_outputs or model.output_channels
    if targets and labels.shape[1:] != (outputs,):
        raise ValueError(f"the model has {outputs} outputs, {path} has {labels.shape[1]} targets for each window")
    if not targets and labels.shape[1:] != (() if model.output_channels is None else (model.output_channels,)):
        own = "the window" if model.output_channels is None else f"each of {model.output_channels} channels"
        found = "the window" if labels.ndim == 1 else f"each of {labels.shape[1]} channels"
        raise ValueError(f"the model decides on {own}, {path} has labels for {found}")


def _facts(
    model: ModelConfig, metadata: Mapping[str, Any], config: ExperimentConfig | None, windows: Windows, part: Part
) -> dict[str, Any]:
    """What recipes 8 asks to be stated with every score; the report says at which level each score is."""
    provenance = metadata["provenance"]
    keys = ("corpus", "part", "options", "split")
    stores = [store.info.provenance for store, _ in windows.pairs(part)]
    return {
        "architecture": model.architecture,
        "head": model.head,
        "num_parameters": metadata["num_parameters"],
        "weights": weights_digest(metadata),
        "initialized_from": provenance.get("initialized_from"),
        "origin": provenance.get("origin"),
        "seed": None if config is None else config.trainer.seed,
        "recipe": None if config is None else config.optimizer.recipe,
        "montages": sorted({name for store in windows.stores for name in store.montages}),
        "stores": [{key: own[key] for key in (*keys, "stores") if key in own} for own in stores],
        "old_files": None if config is None else to_mapping(config.data.old_files),
    }


def band_power_scores(scored: Scored) -> dict[str, float] | None:
    """Scores of the baseline on the same windows, fitted on the training windows; None where it is not defined."""
    windows, labels = scored.windows, scored.windows.labels
    per_channel = labels is not None and labels.ndim == 2 and labels.dtype.kind != "f"
    if per_channel or scored.part == "train" or not len(windows.parts["train"]):
        return None
    return score(baseline_predictions(windows, scored.part), scored.kind, scored.task or "")


# --- several runs -----------------------------------------------------------------------------------------------------


def names_of(runs: Sequence[Scored]) -> list[str]:
    """Short names that tell the runs apart: of their folders, or the whole paths."""
    short = [run.path.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def notes_on(runs: Sequence[Scored]) -> list[str]:
    """In what else than the seed runs differ, in sentences. Raises ValueError for runs of different test windows."""
    names = names_of(runs)
    metrics.require_same_windows({name: run.predictions for name, run in zip(names, runs, strict=True)})
    if len({run.kind for run in runs}) > 1 or len({tuple(run.report.class_names) for run in runs}) > 1:
        raise ValueError(f"{', '.join(names)} decide different things: there is no mean over them")
    notes = [
        f"{name} differs from {names[0]}: {'; '.join(changed)}"
        for name, run in zip(names[1:], runs[1:], strict=True)
        if (changed := _differences(runs[0], run))
    ]
    seeds = [run.facts["seed"] for run in runs]
    if len(runs) > 1 and None not in seeds and len(set(seeds)) < len(seeds):
        notes.append(f"the seeds are {', '.join(map(str, seeds))}: runs of one seed are no independent repeats")
    return notes


def _differences(first: Scored, other: Scored) -> list[str]:
    """In what else than the seed two runs differ, as far as both have a configuration."""
    if first.config is None or other.config is None:
        return []
    return [text for key, text in differences(first.config, other.config) if key not in _OF_ONE_RUN]


def result_of(
    runs: Sequence[Scored],
    comparison: "Comparison | None",
    baseline: Mapping[str, float] | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything as JSON: one run as it is, several below "runs" with their means below "over_runs"."""
    result = {"band_power_baseline": dict(baseline)} if baseline else {}
    if comparison is not None:
        result["comparison"] = comparison.to_dict()
    if len(runs) == 1:
        return runs[0].to_dict() | result
    spreads = metrics.over_runs([run.report for run in runs])
    means = {level: {name: _plain(spread) for name, spread in own.items()} for level, own in spreads.items()}
    return {"runs": [run.to_dict() for run in runs], "over_runs": means, "notes": list(notes), **result}


# --- beside published results -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Scores over windows beside those that were published on the task, and how far the comparison goes."""

    task: EvaluationTask
    claim: str
    reason: str
    ours: Mapping[str, metrics.Spread]
    notes: Sequence[str]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header, and one row per model, ours first and again as the published code scores."""
        header = ["", *self.task.metrics, "claim", "source"]
        runs = len(next(iter(self.ours.values())).values)
        label = "ours" if runs == 1 else f"ours, mean ± sd of {runs} runs"
        rows = [[label, *(_cell(self.ours.get(name)) for name in self.task.metrics), "", ""]]
        reference = [self._reference(name) for name in self.task.metrics]
        if any(f"{name}_reference" in self.ours for name in self.task.metrics):
            rows.append([f"{label}, scored as the released code does", *map(_cell, reference), "", ""])
        measured = [self.ours.get(f"{name}_measured") for name in self.task.metrics]
        if any(measured):
            rows.append([f"{label}, {self.task.measured} measured outputs", *map(_cell, measured), "", ""])
        for row in self.task.published:
            claim = "not comparable" if self.claim == "not comparable" else (row.level or self.claim)
            source = f"{row.source} ({row.remark})" if row.remark else row.source
            rows.append([row.model, *(format_score(row, name) for name in self.task.metrics), claim, source])
        return header, rows

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "task": self.task.name,
            "claim": self.claim,
            "reason": self.reason,
            "level": "window",
            "notes": list(self.notes),
            "metrics": list(self.task.metrics),
            "ours": {name: _plain(self.ours.get(name)) for name in self.task.metrics},
            "ours_reference": {name: _plain(self._reference(name)) for name in self.task.metrics},
            "ours_measured": {name: _plain(self.ours.get(f"{name}_measured")) for name in self.task.metrics},
            "published": [dataclasses.asdict(row) for row in self.task.published],
        }

    def _reference(self, name: str) -> metrics.Spread | None:
        return self.ours.get(f"{name}_reference", self.ours.get(name))


def task_of(runs: Sequence[Scored], asked: str | None) -> EvaluationTask | None:
    """The task asked for ("" = none), else the one that the runs record. Raises ValueError when they record several."""
    if asked is not None:
        return find_task(asked) if asked else None
    recorded = {run.task for run in runs}
    if len(recorded) > 1:
        raise ValueError(f"the runs are of different tasks ({', '.join(map(str, recorded))}): choose one with --task")
    name = recorded.pop()
    return find_task(name) if name else None


def compare(task: EvaluationTask, runs: Sequence[Scored]) -> Comparison:
    """Scores of the runs beside those of the task. Raises ValueError when the stores hold another task's labels."""
    notes = list(dict.fromkeys(note for run in runs for note in deviations(task, run.windows.stores)))
    ours = metrics.over_runs([run.report for run in runs])["window"]
    stores = [store for run in runs for store, _ in run.windows.pairs(run.part)]
    seeds = {run.config.trainer.seed for run in runs if run.config is not None}
    claim, reason = claim_of(
        task,
        part=runs[0].part,
        windows=len(runs[0].predictions),
        seeds=len(seeds),
        stated=stated_parts(stores),
        deviating=notes,
        alike=all(run.config is not None and not _differences(runs[0], run) for run in runs[1:]),
    )
    return Comparison(task, claim, reason, ours, notes)


def _cell(spread: metrics.Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.4f}" if len(spread.values) == 1 else f"{spread.mean:.4f} ± {spread.sd:.4f}"


def _plain(spread: metrics.Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return dataclasses.asdict(spread) | {"sd": spread.sd if len(spread.values) > 1 else None}


# --- the page ---------------------------------------------------------------------------------------------------------


def page_of(
    runs: Sequence[Scored],
    comparison: Comparison | None,
    baseline: Mapping[str, float] | None,
    notes: Sequence[str] = (),
) -> report.RunReport:
    """Notes, scores, confusion matrices, reliability and subjects of the runs, as `report.write_report` draws them."""
    names, first = names_of(runs), runs[0]
    scores: dict[str, Mapping[str, metrics.Estimate]] = {
        name: run.report.levels["window"].metrics for name, run in zip(names, runs, strict=True)
    }
    if baseline:
        scores["band power"] = {name: metrics.Estimate(value) for name, value in baseline.items()}
    tables = {}
    if comparison is not None:
        header, rows = comparison.rows()
        note = f"Task {comparison.task.name}: {comparison.claim}, because {comparison.reason}."
        tables["Beside published results"] = report.Table(header, rows, note)
    if len(runs) > 1:
        tables["Mean over runs"] = _over_runs_table(runs)
    elif len(first.report.levels) > 1:
        tables["Levels"] = _levels_table(first)
    if said := _notes_table(runs, names, notes):
        tables["Notes"] = said
    tables["Classes and outputs"] = _class_table(runs[0], names[0])
    metric = _SUBJECT_SCORE[first.kind]
    by_subject = {
        name: {row["subject"]: row[metric] for row in run.report.subjects}
        for name, run in zip(names, runs, strict=True)
    }
    reliability = None
    if first.kind == "classification":
        levels = {name: run.report.levels["window"] for name, run in zip(names, runs, strict=True)}
        bins = {name: level.reliability for name, level in levels.items()}
        reliability = report.Reliability(bins, {name: level.metrics["ece"].value for name, level in levels.items()})
    return report.RunReport(
        title=f"Scores of {', '.join(names)}",
        facts=_page_facts(first),
        scores=scores,
        scores_note=_scores_note(first),
        outcome=_outcome(runs, names),
        tables=tables,
        reliability=reliability,
        subjects=report.SubjectScores(metric, by_subject),
    )


def _scores_note(run: Scored) -> str:
    found, windows = run.report, f"On {run.part} windows, each by itself"
    dropped = found.levels["window"].dropped_resamples
    intervals = (
        f"; {found.confidence:.0%} intervals by resampling subjects ({found.n_resamples} times, {dropped} dropped)"
    )
    reference = "; “reference”: as the released code computes it (docs/evaluation.md)"
    return f"{windows}{intervals if found.n_resamples else ''}{reference}."


def _levels_table(run: Scored) -> report.Table:
    """Every score of one run at every level."""
    levels = run.report.levels
    rows = [
        [name.replace("_", " "), *(_interval(level.metrics.get(name)) for level in levels.values())]
        for name in levels["window"].metrics
    ]
    header = ["", *(f"per {name} (n={level.n_units:,})" for name, level in levels.items())]
    return report.Table(header, rows, "Recordings and subjects are scored by the mean output of their windows.")


def _interval(estimate: metrics.Estimate | None) -> str:
    if estimate is None or estimate.value != estimate.value:
        return "–"
    text = f"{estimate.value:.3f}"
    return text if estimate.low != estimate.low else f"{text} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _notes_table(runs: Sequence[Scored], names: Sequence[str], notes: Sequence[str]) -> report.Table | None:
    """What was left out of the scores, and in what the runs differ; None when there is nothing to say."""
    rows = [["", note] for note in notes]
    for name, run in zip(names, runs, strict=True):
        own = [f"{level}: {note}" for level, found in run.report.levels.items() for note in found.notes]
        rows += [[name, note] for note in [*run.report.notes, *own]]
    return report.Table([], rows) if rows else None


def _page_facts(run: Scored) -> dict[str, str]:
    counted = f"{len(run.predictions):,} of {run.report.n_subjects} subjects"
    shown = {name.replace("_", " "): text for name, value in run.facts.items() if (text := _text(value))}
    scored = ", ".join(str(store.path) for store, _ in run.windows.pairs(run.part))
    about = {"model": str(run.path), "data": f"{run.part} part of {scored}"}
    return about | shown | {"windows": counted, "split": run.windows.split.digest}


def _text(value: Any) -> str:
    """A fact in words; empty for nothing."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, item in value.items() if (text := _text(item)))
    if isinstance(value, list):
        return "; ".join(dict.fromkeys(filter(None, map(_text, value))))
    return "" if value is None else str(value)


def _over_runs_table(runs: Sequence[Scored]) -> report.Table:
    spreads = metrics.over_runs([run.report for run in runs])
    names = list(next(iter(spreads.values())))
    rows = [[name, *(_cell(level.get(name)) for level in spreads.values())] for name in names]
    return report.Table(["", *(f"per {level}" for level in spreads)], rows, f"Mean ± sd of {len(runs)} runs.")


def _class_table(run: Scored, name: str) -> report.Table:
    rows = run.report.levels["window"].per_class
    header = list(rows[0]) if rows else ["name"]
    cells = [[str(row["name"]), *(_number(row[key]) for key in header[1:])] for row in rows]
    return report.Table(["", *header[1:]], cells, f"Of {name}, over windows.")


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value != value else f"{value:.3f}"


def _outcome(runs: Sequence[Scored], names: Sequence[str]) -> report.Decisions | report.Estimates | None:
    first = runs[0]
    if first.kind == "regression":
        predicted = {name: run.predictions.logits for name, run in zip(names, runs, strict=True)}
        return report.Estimates(first.predictions.labels, predicted)
    if first.kind == "multilabel":
        return None
    found = {name: metrics.decisions(run.predictions) for name, run in zip(names, runs, strict=True)}
    labels = next(iter(found.values()))[1]
    return report.Decisions(labels, first.report.class_names, {name: p for name, (p, _) in found.items()})


def format_runs(runs: Sequence[Scored]) -> str:
    """Every run's scores over windows, their mean and standard deviation, for the terminal."""
    spreads = metrics.over_runs([run.report for run in runs])["window"]
    header = ["", *names_of(runs), "mean ± sd"]
    rows = [[name, *(f"{value:.4f}" for value in s.values), _cell(s)] for name, s in spreads.items()]
    return "\n".join(metrics.align([header, *rows]))


def format_comparison(comparison: Comparison) -> str:
    """The table of `Comparison.rows` for the terminal, sources below each other after it."""
    header, rows = comparison.rows()
    sources = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    marks = {source: f"[{number}]" for number, source in enumerate(sources, 1)}
    table = metrics.align([[*header[:-1], ""], *([*row[:-1], marks.get(row[-1], "")] for row in rows)])
    if not comparison.task.published:
        table.append("nothing was published on this task")
    lines = [f"task {comparison.task.name}: {comparison.claim}, because {comparison.reason}", *table]
    return "\n".join([*lines, *(f"{mark} {source}" for source, mark in marks.items())])
