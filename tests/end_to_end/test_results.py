"""`results.json` of a run on MoBI: measured targets by themselves, and float32 whatever the model was trained in."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn import metrics as sk

import configs
from configs import scoring
from configs.data import open_windows, resolve
from configs.results import score
from configs.run_directory import open_run_directory
from configs.task_sheet import TASKS
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, create_store
from lumamba_jax import metrics
from lumamba_jax.checkpoint import abstract_params, save_pretrained
from lumamba_jax.watchdog import Watchdog

TASK = TASKS["mobi_19"]
MICRO = (
    *("--model.embed-dim", "16", "--model.num-queries", "2", "--model.num-blocks", "1", "--model.d-state", "4"),
    *("--model.head", "linear", "--trainer.epochs", "1", "--loader.batch-size", "8", "--loader.reader-threads", "0"),
    *("--data.split-unit", "subject", "--data.validation-fraction", "0.3", "--data.test-fraction", "0.3"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What train.py builds for the preset as released (bfloat16), with random numbers as the best parameters."""
    folder, rng = tmp_path_factory.mktemp("results"), np.random.default_rng(0)
    info = StoreInfo(sfreq=TASK.sfreq, n_times=TASK.samples, stride_seconds=TASK.samples / TASK.sfreq)
    with create_store(folder / "mobi.h5", info) as writer:
        for subject in range(6):
            signal = rng.normal(0, 10, (4, len(TASK.channels), TASK.samples))
            about = {"subject": f"s{subject}", "recording": f"s{subject}", "start_samples": TASK.samples * np.arange(4)}
            writer.add(f"g{subject}", signal, montage_of(TASK.channels), **about, labels=rng.normal(size=(4, 12)))
    words = ("--data.train", folder / "mobi.h5", "--trainer.run-dir", folder / "run", *MICRO)
    config = configs.cli(["mobi_19_lumamba_tiny_reference", *map(str, words)], "train.py")
    windows = open_windows(config.data, labelled=True)
    config = resolve(config, windows)
    open_run_directory(config, windows, {})
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract_params(config.model))
    source = Path(configs.__file__).parents[1] / "train.py"
    spec = importlib.util.spec_from_file_location("script_train", source)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    built = script.Run(config, windows)
    save_pretrained(folder / "run" / "best", config.model, params, built._provenance(0))
    return built


@pytest.fixture(scope="module")
def results(run):
    with Watchdog(None, None) as watchdog:
        return run.score_best(watchdog)


def test_results_have_the_scores_of_the_measured_joints(run, results):
    """data.md Q17: six of the twelve targets are predictions of a decoder; of the baseline too."""
    with np.load(run.directory / "predictions_test.npz") as file:
        outputs, targets = file["logits"].astype(np.float64), file["labels"].astype(np.float64)
    test = results["test"]
    for name, count in (("r2", 12), ("r2_measured", 6)):
        assert test[name] == pytest.approx(sk.r2_score(targets[:, :count], outputs[:, :count]), abs=1e-9)
    assert test["rmse_measured"] == pytest.approx(np.sqrt(np.mean((outputs - targets)[:, :6] ** 2)), abs=1e-9)
    assert test["pearson_measured"] != test["pearson"]
    assert results["test, band power"]["r2_measured"] != results["test, band power"]["r2"]


def test_the_best_model_is_scored_in_float32_as_the_published_code_tests(run, results):
    assert run.config.model.compute_dtype == "bfloat16"
    found = scoring.score_model(run.directory, data=(), part="test", batch_size=8, resamples=0)
    with np.load(run.directory / "predictions_test.npz") as file:
        np.testing.assert_allclose(file["logits"], found.predictions.logits, rtol=1e-4, atol=1e-5)
    assert results["test"]["rmse"] == pytest.approx(found.report.levels["window"].metrics["rmse"].value, abs=1e-6)


def test_only_tasks_that_tell_measured_targets_apart_have_their_scores():
    rng, names = np.random.default_rng(1), np.array(["a", "b"] * 10)
    predictions = metrics.Predictions(rng.normal(size=(20, 12)), rng.normal(size=(20, 12)), np.arange(20), names, names)
    assert "r2_measured" in score(predictions, "regression", "mobi_60")
    assert set(score(predictions, "regression")) == {"r2", "rmse", "pearson"}
    six = predictions.of_outputs(slice(6))  # prepared with --targets 6: all of them are measured
    assert set(score(six, "regression", "mobi_60")) == {"r2", "rmse", "pearson"}
