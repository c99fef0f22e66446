"""`eval.py metrics` on runs of a task preset: two seeds, published results beside them, the page, what is refused.

The runs are made in this process and not trained, which the slow test at the end does with real commands.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from sklearn import metrics as sk
from test_train_eval import REPOSITORY, call

import configs
from configs import scoring
from configs.data import open_windows, resolve
from configs.results import origin_of
from configs.run_directory import open_run_directory
from configs.task_sheet import TASKS
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, create_store
from lumamba_jax import metrics
from lumamba_jax.checkpoint import abstract_params, load_pretrained, save_pretrained

TASK = TASKS["modma_13"]
MICRO = (
    *("--model.embed-dim", "16", "--model.num-queries", "2", "--model.num-blocks", "1", "--model.d-state", "4"),
    *("--model.head", "linear", "--optimizer.lr", "1e-2", "--optimizer.warmup-epochs", "0"),
    *("--trainer.steps", "3", "--loader.batch-size", "8", "--loader.reader-threads", "0"),
    *("--data.test-fraction", "0.4"),
)


def write_store(
    path: Path, class_names=TASK.class_names, *, samples=TASK.samples, provenance=None, mixed=False
) -> Path:
    """Ten subjects of four windows of noise: nothing to learn, so that scores are not all 0 or 1.

    `mixed`: of twelve windows, six of each class.
    """
    rng, montage, count = np.random.default_rng(0), montage_of(TASK.channels), 12 if mixed else 4
    info = StoreInfo(sfreq=TASK.sfreq, n_times=samples, stride_seconds=samples / TASK.sfreq, class_names=class_names)
    info = dataclasses.replace(info, provenance=provenance or {})
    with create_store(path, info) as writer:
        for subject in range(10):
            signal = rng.normal(0, 10, (count, 13, samples))
            labels = np.repeat([0, 1], count // 2) if mixed else np.full(count, subject % 2)
            about = {"subject": f"s{subject}", "recording": f"s{subject}.mat"}
            writer.add(f"g{subject}", signal, montage, **about, labels=labels, start_samples=samples * np.arange(count))
    return path


def script(name: str) -> ModuleType:
    """An entry script as a module, by its file name."""
    spec = importlib.util.spec_from_file_location(f"script_{name.removesuffix('.py')}", REPOSITORY / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(*words: object) -> tuple[int, str, str]:
    """`eval.py` with these words in this process: status, what it printed, what it complained of."""
    said, complained = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            status = script("eval.py").main()
    return status, said.getvalue(), complained.getvalue()


def refused(*words: object) -> str:
    """What `eval.py` says when it ends with status 2: one sentence."""
    status, _, complained = evaluate(*words)
    assert status == 2
    lines = complained.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def write_run(run_dir: Path, store: Path, *words: object) -> Path:
    """A run as train.py leaves it, with random numbers as its best parameters: initialising them takes a compiler."""
    options = ("--data.train", store, "--trainer.run-dir", run_dir, *MICRO, *words)
    config = configs.cli(["modma_13_lumamba_tiny", *map(str, options)], "train.py")
    windows = open_windows(config.data, labelled=True)
    config = resolve(config, windows)
    open_run_directory(config, windows, {})
    rng = np.random.default_rng(config.trainer.seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract_params(config.model))
    provenance = script("train.py").Run(config, windows)._provenance(0)
    save_pretrained(run_dir / "best", config.model, params, provenance)
    return run_dir


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Two runs of one split, of another seed each."""
    folder = tmp_path_factory.mktemp("eval_tasks")
    write_store(folder / "modma.h5")
    for seed in (1, 2):
        write_run(folder / f"seed{seed}", folder / "modma.h5", "--trainer.seed", seed)
    return folder


@pytest.fixture(scope="module")
def scored(work) -> tuple[str, dict]:
    status, said, _ = evaluate("metrics", work / "seed1", work / "seed2", "--resamples", "20")
    assert status == 0
    return said, json.loads((work / "metrics_test_of_2_runs.json").read_text())


def test_scores_of_two_seeds_are_those_of_their_predictions(work, scored):
    shown, result = scored
    values = []
    for number in (1, 2):
        with np.load(work / f"metrics_test_of_2_runs_{number}.npz") as file:
            logits, labels = file["logits"].astype(np.float64), file["labels"]
            assert file["class_names"].tolist() == ["healthy", "depression"]
        values.append(sk.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        window = result["runs"][number - 1]["levels"]["window"]
        assert window["n_units"] == len(labels) == 16
        assert window["metrics"]["auroc"]["value"] == pytest.approx(values[-1], rel=0, abs=1e-12)
        reference = sk.roc_auc_score(labels, logits[:, 1])
        assert window["metrics"]["auroc_reference"]["value"] == pytest.approx(reference, rel=0, abs=1e-12)
        assert result["runs"][number - 1]["facts"]["seed"] == number
    spread = result["over_runs"]["window"]["auroc"]
    assert spread["values"] == pytest.approx(values, abs=1e-12)
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["sd"] == pytest.approx(np.std(values, ddof=1))
    assert len(result["runs"][0]["subjects"]) == 4
    assert {row["label"] for row in result["runs"][0]["subjects"]} == {"healthy", "depression"}
    assert "note:" not in shown
    assert f"{spread['mean']:.4f} ± {spread['sd']:.4f}" in shown


def test_the_task_of_the_preset_is_recorded_and_compared(scored):
    shown, result = scored
    comparison = result["comparison"]
    assert comparison["task"] == "modma_13"
    assert comparison["claim"] == "indicative"
    assert "12 test subjects" in comparison["reason"]
    assert "do not say which part of the corpus they are" in comparison["reason"]
    assert comparison["published"] == []
    assert "nothing was published on this task" in shown
    ours = comparison["ours"]["balanced_accuracy"]
    assert ours["values"] == result["over_runs"]["window"]["balanced_accuracy"]["values"]


def test_the_page_shows_confusion_reliability_and_subjects(work, scored):
    text = (work / "metrics_test_of_2_runs.html").read_text()
    sections = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', text, flags=re.DOTALL))
    assert sections["calibration"].count("<img") == 1
    assert sections["subjects"].count("<img") == 1
    assert sections["decisions-on-the-test-windows"].count("<img") == 3  # a confusion matrix for each run, and the ROC
    assert "indicative" in sections["beside-published-results"]
    assert "Mean ± sd of 2 runs" in sections["mean-over-runs"]
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!data:|#)', text)


def test_the_page_of_one_run_has_every_level_and_what_was_left_out(work, tmp_path):
    status, *_ = evaluate("metrics", work / "seed1", "--out", tmp_path / "x.json", "--resamples", "20", "--no-baseline")
    text = (tmp_path / "x.html").read_text()
    assert status == 0
    result = json.loads((tmp_path / "x.json").read_text())
    auroc = result["levels"]["subject"]["metrics"]["auroc"]["value"]
    (levels,) = re.findall(r'<section id="levels">(.*?)</section>', text, flags=re.DOTALL)
    assert f"per subject (n={len(result['subjects'])})" in levels
    assert f"{auroc:.3f}" in levels
    assert str(work / "modma.h5") in text

    write_store(tmp_path / "mixed.h5", mixed=True)
    run = write_run(tmp_path / "mixed", tmp_path / "mixed.h5")
    assert evaluate("metrics", run, "--resamples", "0", "--no-baseline")[0] == 0
    assert "subjects hold more than one label" in (run / "metrics_test.html").read_text()


def test_scores_on_another_store_leave_those_of_the_run(work, tmp_path):
    model = shutil.copytree(work / "seed1" / "best", tmp_path / "model")
    words = ("--data", work / "modma.h5", "--resamples", "0", "--no-baseline", "--no-page")
    assert evaluate("metrics", model, *words)[0] == 0
    assert (model / "metrics_of_modma.json").is_file()
    assert not (model / "metrics_test.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--resamples", "-1"), "--resamples must be 0"),
        (("--out", "scores.html"), "must end in .json"),
        (("--out", "taken.json"), "taken.json is a folder"),
        (("--out", "page.json"), "page.html is a folder"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_work(work, tmp_path, monkeypatch, words, message):
    for name in ("taken.json", "page.html"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "score_model", lambda *_, **__: pytest.fail("the work was begun"))
    status, _, complained = evaluate("metrics", work / "seed1", *words)
    assert status == 2
    assert message in complained


def test_values_are_not_scored_against_classes(work, tmp_path):
    config, params, _ = load_pretrained(work / "seed1")
    save_pretrained(tmp_path / "model", config, params, {"task": {"kind": "regress"}, "sfreq": TASK.sfreq})
    status, _, complained = evaluate("metrics", tmp_path / "model", "--data", work / "modma.h5")
    assert (status, "predicts values" in complained, "holds classes" in complained) == (2, True, True)


def test_an_interrupt_is_one_sentence(work, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("configs.outputs.run_batches", interrupted)
    out = tmp_path / "p.csv"
    status, _, complained = evaluate("predict", work / "seed1", work / "modma.h5", "--out", out)
    assert (status, complained.count("\n"), "interrupted" in complained) == (130, 1, True)
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_overwritten(work, tmp_path):
    store = shutil.copy(work / "modma.h5", tmp_path / "w.h5")
    before = store.read_bytes()
    for command in ("predict", "embed"):
        status, _, complained = evaluate(command, work / "seed1", store, "--out", store)
        assert (status, "it would be lost" in complained) == (2, True)
    assert store.read_bytes() == before


def test_another_task_of_the_same_classes_is_compared_with_a_warning(work):
    """mumtaz2016 has the same classes, other channels and another rate: its numbers are shown, and not comparable."""
    words = (
        "--task",
        "mumtaz2016",
        "--resamples",
        "0",
        "--no-page",
        "--no-baseline",
        "--out",
        work / "other" / "m.json",
    )
    status, said, _ = evaluate("metrics", work / "seed1", *words)
    assert status == 0
    line = next(line for line in said.splitlines() if line.startswith("task mumtaz2016"))
    assert "not comparable, because" in line
    assert "250 Hz" in line
    row = next(line for line in said.splitlines() if line.startswith("CBraMod"))
    assert "0.9560" in row
    assert "0.9923" in row
    result = json.loads((work / "other" / "m.json").read_text())
    assert {row["model"] for row in result["comparison"]["published"]} >= {"LuMamba tiny", "CBraMod", "BIOT"}
    with np.load(work / "other" / "m.npz") as file:
        raw = sk.roc_auc_score(file["labels"], file["logits"][:, 1])
    assert result["comparison"]["ours_reference"]["auroc"]["mean"] == pytest.approx(raw, rel=0, abs=1e-12)
    assert sorted(path.name for path in (work / "other").iterdir()) == ["m.json", "m.npz"]


def test_runs_of_different_test_parts_and_wrong_tasks_are_refused(work, tmp_path):
    shutil.copytree(work / "seed2", tmp_path / "swapped")
    data = configs.load(str(work / "seed2" / "config.yaml")).data
    other = open_windows(dataclasses.replace(data, split_seed=7), labelled=True)
    other.save_split(tmp_path / "swapped" / "split.json")
    quick = ("--resamples", "0", "--no-page", "--out", tmp_path / "out.json")
    message = refused("metrics", work / "seed1", tmp_path / "swapped", *quick)
    assert "swapped and seed1 were not scored on the same windows" in message
    message = refused("metrics", work / "seed1", "--task", "eegmat", *quick)
    assert "has the classes healthy, depression, task eegmat has rest, arithmetic" in message
    assert "did you mean 'tuab'" in refused("metrics", work / "seed1", "--task", "tuabb", *quick)
    assert not (tmp_path / "out.json").exists()


def test_training_refuses_stores_of_another_task_and_warns_of_other_windows(tmp_path, capsys):
    train = script("train.py")
    other = write_store(tmp_path / "classes.h5", ("rest", "task"))
    words = ("--data.train", str(other), "--trainer.run-dir", str(tmp_path / "run"), *MICRO)
    with pytest.raises(ValueError, match="has the classes rest, task, task modma_13 has healthy, depression"):
        train.run(configs.cli(["modma_13_lumamba_tiny", *words], "train.py"))
    assert not (tmp_path / "run").exists()
    short = write_store(tmp_path / "short.h5", samples=320)
    config = configs.cli(["modma_13_lumamba_tiny", "--data.train", str(short), *MICRO], "train.py")
    train._say_deviations(config, open_windows(config.data, labelled=True))
    said = capsys.readouterr().err
    assert "windows of 320 samples at 250 Hz" in said
    assert "will not compare with published ones" in said


def test_the_training_store_is_not_the_published_test_part(work, tmp_path):
    """The run's own draw of test subjects, from a store that says it is the corpus's training part."""
    about = {"corpus": TASK.corpus, "part": "train", "options": TASK.settings, "split": "as published"}
    run = write_run(tmp_path / "run", write_store(tmp_path / "train.h5", provenance=about), "--trainer.seed", 1)
    assert evaluate("metrics", run, "--resamples", "0", "--no-page", "--no-baseline")[0] == 0
    result = json.loads((run / "metrics_test.json").read_text())
    assert result["comparison"]["claim"] == "not comparable"
    assert "not the published test part: the windows come from the train store" in result["comparison"]["reason"]
    assert result["facts"]["stores"] == [about]
    assert result["facts"]["old_files"]["channel_order"] == "by_name"


@pytest.mark.parametrize("few_shot", [(), ("--data.few-shot", 1)])
def test_a_run_that_left_a_subject_out_is_scored_on_its_own_split(tmp_path, few_shot):
    store = write_store(tmp_path / "modma.h5", mixed=True)
    words = ("--data.leave-out", "s3", "--data.test-fraction", "0", *few_shot)
    run = write_run(tmp_path / "run", store, *words)
    config = configs.load(str(run / "config.yaml"))
    windows, part = scoring._labelled_windows(run, config, (), "test")
    expected = open_windows(config.data, labelled=True).parts["test"]
    assert part == "test"
    assert len(expected) >= 1
    np.testing.assert_array_equal(windows.parts["test"], expected)


def test_means_over_runs_count_seeds_and_say_when_the_runs_differ(work):
    """Three runs are no three seeds, and runs of another learning rate are no repeats."""
    first = scoring.score_model(work / "seed1", data=(), part="test", batch_size=64, resamples=0)
    config = first.config
    second = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, seed=2))
    other = dataclasses.replace(second, optimizer=dataclasses.replace(config.optimizer, lr=0.5))

    def reason(*configurations):
        runs = [dataclasses.replace(first, config=one) for one in configurations]
        return scoring.compare(dataclasses.replace(TASK, claim="comparable"), runs).reason

    assert "one seed only" in reason(config, config, config)
    assert "2 seeds only" in reason(config, second, config)
    assert "differ in more" not in reason(config, second, config)
    assert "the runs differ in more than the seed; 2 seeds only" in reason(config, second, other)


def test_measured_joints_are_scored_by_themselves():
    """MoBI: six angles were measured, six are predictions of a decoder (data.md Q17)."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(30, 12))
    outputs = targets + rng.normal(size=(30, 12)) * np.repeat([0.5, 2.0], 6)
    names = np.array([f"s{i % 3}" for i in range(30)])
    predictions = metrics.Predictions(outputs, targets, np.arange(30), names, names)
    found = scoring._score(predictions, "regression", None, "mobi_60", 20).levels["window"]
    assert [row["name"] for row in found.per_class][::6] == ["GHR", "PHR"]
    for name, count in (("r2", 12), ("r2_measured", 6)):
        expected = sk.r2_score(targets[:, :count], outputs[:, :count])
        assert found.metrics[name].value == pytest.approx(expected, abs=1e-12)
    assert found.metrics["rmse_measured"].value == pytest.approx(
        sk.root_mean_squared_error(targets[:, :6].ravel(), outputs[:, :6].ravel()), abs=1e-12
    )
    assert found.metrics["pearson_measured"].low < found.metrics["pearson_measured"].high


def test_published_mobi_numbers_stand_beside_those_of_the_measured_joints():
    ours = {name: metrics.Spread(value, float("nan"), [value]) for name, value in (("r2", 0.2), ("r2_measured", 0.1))}
    comparison = scoring.Comparison(TASKS["mobi_60"], "indicative", "...", ours, ())
    _, rows = comparison.rows()
    assert [row[:2] for row in rows] == [
        ["ours", "0.2000"],
        ["ours, 6 measured outputs", "0.1000"],
        ["LuMamba tiny", "0.1160"],
    ]
    assert comparison.to_dict()["ours_measured"]["r2"]["mean"] == 0.1


def test_the_origin_is_followed_to_the_objective_and_the_converted_file():
    pretrained = origin_of({"provenance": {"task": {"kind": "pretrain", "objective": "mixed"}}, "leaves": {"a": 1}})
    assert pretrained["objective"] == "mixed"
    assert len(pretrained["weights"]) == 16
    supervised = {"task": {"kind": "classify", "objective": "lejepa"}, "origin": pretrained}  # its objective is unused
    again = origin_of({"provenance": supervised, "leaves": {"a": 2}})
    assert again["objective"] == "mixed"
    assert again["weights"] != pretrained["weights"]
    converted = origin_of({"provenance": {"file": "LuMamba.safetensors", "sha256": "ab", "mapped": {}}})
    assert converted == {"file": "LuMamba.safetensors", "sha256": "ab", "weights": None}


@pytest.mark.slow
def test_a_preset_is_trained_from_a_pretrained_encoder_and_scored(tmp_path):
    """Real commands: the run records its task, and the objective and digest of the weights it started from."""
    store = write_store(tmp_path / "modma.h5")
    start = write_run(tmp_path / "start", store)
    metadata = json.loads((start / "best" / "metadata.json").read_text())
    run = tmp_path / "run"
    words = ("--data.train", store, "--trainer.run-dir", run, "--trainer.init-from", start, *MICRO)
    call("train.py", "modma_13_lumamba_tiny", *words)
    done = call("eval.py", "metrics", run, "--resamples", "20")
    assert "task modma_13: indicative" in done.stdout
    facts = json.loads((run / "metrics_test.json").read_text())["facts"]
    assert facts["origin"] == {"weights": scoring.weights_digest(metadata)}
