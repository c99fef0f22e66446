"""`eval.py metrics` on runs of a task preset: two seeds, published results beside them, the page, what is refused."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk
from test_train_eval import REPOSITORY, call

import configs
from configs.data import open_windows
from configs.task_sheet import TASKS
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, create_store

TASK = TASKS["modma_13"]
MICRO = (
    *("--model.embed-dim", "16", "--model.num-queries", "2", "--model.num-blocks", "1", "--model.d-state", "4"),
    *("--model.head", "linear", "--optimizer.lr", "1e-2", "--optimizer.warmup-epochs", "0"),
    *("--trainer.steps", "3", "--loader.batch-size", "8", "--loader.reader-threads", "0"),
    *("--data.test-fraction", "0.4"),
)


def write_store(path: Path, class_names=TASK.class_names, *, samples=TASK.samples) -> Path:
    """Ten subjects of four windows of noise: nothing to learn, so that scores are not all 0 or 1."""
    rng, montage = np.random.default_rng(0), montage_of(TASK.channels)
    info = StoreInfo(sfreq=TASK.sfreq, n_times=samples, stride_seconds=samples / TASK.sfreq, class_names=class_names)
    with create_store(path, info) as writer:
        for subject in range(10):
            label = subject % 2
            signal = rng.normal(0, 10, (4, 13, samples))
            about = {"subject": f"s{subject}", "recording": f"s{subject}.mat", "start_samples": samples * np.arange(4)}
            writer.add(f"g{subject}", signal, montage, **about, labels=np.full(4, label))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Two runs of one split, of another seed each."""
    folder = tmp_path_factory.mktemp("eval_tasks")
    write_store(folder / "modma.h5")
    for seed in (1, 2):
        run = ("--data.train", folder / "modma.h5", "--trainer.run-dir", folder / f"seed{seed}")
        call("train.py", "modma_13_lumamba_tiny", *run, "--trainer.seed", seed, *MICRO)
    return folder


@pytest.fixture(scope="module")
def scored(work) -> tuple[str, dict]:
    done = call("eval.py", "metrics", work / "seed1", work / "seed2", "--resamples", "20")
    return done.stdout, json.loads((work / "metrics_test_of_2_runs.json").read_text())


@pytest.fixture
def script():
    """Import an entry script as a module, by its file name."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"script_{name.removesuffix('.py')}", REPOSITORY / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def refused(monkeypatch, capsys, script):
    """Call eval.py's main in this process: it must return 2 and say one sentence. Returns the sentence."""

    def call_main(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
        assert script("eval.py").main() == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return call_main


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
    done = call("eval.py", "metrics", work / "seed1", *words)
    line = next(line for line in done.stdout.splitlines() if line.startswith("task mumtaz2016"))
    assert "not comparable, because" in line
    assert "250 Hz" in line
    row = next(line for line in done.stdout.splitlines() if line.startswith("CBraMod"))
    assert "0.9560" in row
    assert "0.9923" in row
    result = json.loads((work / "other" / "m.json").read_text())
    assert {row["model"] for row in result["comparison"]["published"]} >= {"LuMamba tiny", "CBraMod", "BIOT"}
    with np.load(work / "other" / "m.npz") as file:
        raw = sk.roc_auc_score(file["labels"], file["logits"][:, 1])
    assert result["comparison"]["ours_reference"]["auroc"]["mean"] == pytest.approx(raw, rel=0, abs=1e-12)
    assert sorted(path.name for path in (work / "other").iterdir()) == ["m.json", "m.npz"]


def test_runs_of_different_test_parts_and_wrong_tasks_are_refused(work, tmp_path, refused):
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


def test_training_refuses_stores_of_another_task_and_warns_of_other_windows(tmp_path, script, capsys):
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
