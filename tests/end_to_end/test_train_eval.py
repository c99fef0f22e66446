"""The command line from recordings to embeddings, through real processes, with the debug preset."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.store import WindowStore
from lumamba_jax import checkpoint
from lumamba_jax.run_log import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def environment() -> dict[str, str]:
    # One device, and the compiler's shortest effort: these tests are about the commands, not their speed.
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {**os.environ, **flags, "PYTHONPATH": str(REPOSITORY)}


def call(*words: object, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*words), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == status, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


def debug_options(store: Path, run_dir: Path) -> list[object]:
    options = ["--data.train", store, "--trainer.run-dir", run_dir, "--data.test-fraction", "0.25"]
    return [*options, "--loader.batch-size", "4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Recordings of four subjects in two montages, and their windows."""
    folder = tmp_path_factory.mktemp("end_to_end")
    call("-m", "data_pipeline.synthetic", folder / "recordings", "--subjects", "4", "--seconds", "10")
    options = ("--labels", folder / "recordings" / "labels.csv", "--window", "2.5", "--jobs", "1")
    call("-m", "data_pipeline.prepare", folder / "recordings", folder / "windows.h5", *options)
    call("-m", "data_pipeline.prepare", folder / "recordings", folder / "unlabelled.h5", *options[2:])
    return folder


@pytest.fixture(scope="module")
def pretrained(work) -> Path:
    """Four steps of pre-training, stopped after two and resumed."""
    run_dir = work / "pretrain"
    stopped = call("train.py", "debug", *debug_options(work / "windows.h5", run_dir), "--trainer.stop-after", "2")
    assert "stopped and saved at step 2 of 4" in stopped.stdout
    assert not (run_dir / "results.json").exists()
    call("train.py", "debug", *debug_options(work / "windows.h5", run_dir), "--trainer.resume", "true")
    return run_dir


@pytest.fixture(scope="module")
def finetuned(work, pretrained) -> Path:
    run_dir = work / "finetune"
    kind = ("--task.kind", "classify", "--model.head", "linear", "--task.class-weights", "balanced")
    options = debug_options(work / "windows.h5", run_dir)
    done = call("train.py", "debug", *options, *kind, "--trainer.init-from", pretrained, "--trainer.patience", "5")
    assert "unused: head/" in done.stdout
    assert "band power" in done.stdout
    return run_dir


def test_batches_keep_the_contract(work):
    """Keys, shapes and dtypes of docs/architecture.md, "The batch"."""
    batch = make_dataset(WindowStore(work / "windows.h5"), None, LoaderConfig(batch_size=4, grouping="padded")).batch(0)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "signal": ((4, 22, 640), "float32"),
        "locations": ((4, 22, 3), "float32"),
        "channel_ids": ((4, 22), "int32"),
        "channel_mask": ((4, 22), "bool"),
        "patch_mask": ((4, 16), "bool"),
        "window_mask": ((4,), "bool"),
        "window_id": ((4,), "int32"),
        "label": ((4,), "int32"),
    }


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(work, pretrained):
    unbroken = work / "unbroken"
    call("train.py", "debug", *debug_options(work / "windows.h5", unbroken))
    assert read_metrics(unbroken) == read_metrics(pretrained)
    for state in ("checkpoints/4/state", "best/weights"):
        first, second = (_arrays(run / state) for run in (unbroken, pretrained))
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in checkpoint.ocp.load(path).items()}


def test_sigterm_saves_at_a_step_boundary_and_the_run_can_go_on(work):
    run_dir = work / "terminated"
    words = debug_options(work / "windows.h5", run_dir)
    long = ("--trainer.steps", "100000", "--trainer.validate-every", "100000")
    process = subprocess.Popen(
        command("train.py", "debug", *words, *long),
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
    )
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped and saved at step" in output
    with checkpoint.TrainCheckpoints(run_dir / "checkpoints") as saved:
        stopped_at = saved.latest_step
    assert stopped_at == read_metrics(run_dir)[-1]["step"]
    more = ("--trainer.resume", "true", "--trainer.stop-after", "1")
    output = call("train.py", "debug", *words, *long, *more).stdout
    assert f"stopped and saved at step {stopped_at + 1}" in output


def test_finetuning_leaves_scores_predictions_and_the_baseline(work, finetuned):
    results = json.loads((finetuned / "results.json").read_text())
    assert set(results) == {f"{part}{kind}" for part in ("validation", "test") for kind in ("", ", band power")}
    split = json.loads((finetuned / "split.json").read_text())
    with np.load(finetuned / "predictions_test.npz") as file:
        assert set(file["subject"]) == set(split["test"])
        assert not set(file["subject"]) & set(split["train"])
        accuracy = np.mean(file["logits"].argmax(1) == file["labels"])
    assert results["test"]["accuracy"] == pytest.approx(accuracy)
    assert checkpoint.read_metadata(finetuned)["provenance"]["class_names"] == ["rest", "task"]


def test_scores_of_the_saved_model_equal_those_of_the_run(finetuned):
    done = call("eval.py", "metrics", finetuned, "--resamples", "20")
    assert "balanced_accuracy" in done.stdout
    scores = json.loads((finetuned / "metrics_test.json").read_text())
    results = json.loads((finetuned / "results.json").read_text())
    for name in ("auroc", "balanced_accuracy"):
        assert scores["levels"]["window"]["metrics"][name]["value"] == pytest.approx(results["test"][name])
        assert scores["band_power_baseline"][name] == pytest.approx(results["test, band power"][name])


def test_embeddings_of_recordings_equal_those_of_their_windows(work, pretrained):
    call("eval.py", "embed", pretrained, work / "windows.h5", "--out", work / "all.npz")
    recording = work / "recordings" / "subject-02.edf"
    call("eval.py", "embed", pretrained, recording, "--out", work / "one.h5", "--window", "2.5")
    with np.load(work / "all.npz") as every, h5py.File(work / "one.h5") as one:
        own = every["recording"] == "subject-02.edf"
        stored_rows = zip(every["start_sample"][own], every["embeddings"][own], strict=True)
        starts = {int(start): row for start, row in stored_rows}
        fresh_rows = zip(one["start_sample"], one["embeddings"], strict=True)
        common = [(starts[int(start)], row) for start, row in fresh_rows if int(start) in starts]
        assert len(common) >= 2
        for stored, fresh in common:
            np.testing.assert_allclose(stored, fresh, atol=1e-5)


@pytest.mark.slow
def test_a_recording_is_one_vector_or_overlapping_windows(work, pretrained):
    recording = work / "recordings" / "subject-02.edf"
    call("eval.py", "embed", pretrained, work / "recordings", "--out", work / "whole.npz", "--whole")
    call("eval.py", "embed", pretrained, recording, "--out", work / "long.npz", "--window", "20")
    call("eval.py", "embed", pretrained, recording, "--out", work / "over.npz", "--window", "2.5", "--stride", "1.25")
    with np.load(work / "whole.npz") as whole, np.load(work / "long.npz") as long, np.load(work / "over.npz") as over:
        (row,) = np.flatnonzero(whole["recording"] == recording.name)
        assert whole["seconds"][row] == pytest.approx(20, abs=0.2)
        assert len(long["start_sample"]) == 1
        np.testing.assert_allclose(whole["embeddings"][row], long["embeddings"][0], atol=1e-4)
        assert np.diff(over["start_sample"]).tolist() == [320] * 14


def test_predictions_of_a_recording_are_those_of_the_saved_model(work, finetuned):
    recording = work / "recordings" / "subject-02.edf"
    done = call("eval.py", "predict", finetuned, recording, "--out", work / "one.csv", "--window", "2.5")
    assert "subject-02.edf" in done.stdout
    lines = [line.split(",") for line in (work / "one.csv").read_text().splitlines()]
    assert lines[0][-2:] == ["rest", "task"]
    probabilities = np.array([line[-2:] for line in lines[1:]], float)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    call("eval.py", "predict", finetuned, work / "windows.h5", "--out", work / "all_predictions.npz")
    with np.load(work / "all_predictions.npz") as every:
        own = every["recording"] == recording.name
        starts = dict(zip(every["start_sample"][own].tolist(), every["predictions"][own], strict=True))
        start = lines[0].index("start_sample")
        both = [
            (starts[int(line[start])], p)
            for line, p in zip(lines[1:], probabilities, strict=True)
            if int(line[start]) in starts
        ]
        assert len(both) >= 2
        np.testing.assert_allclose(*map(np.array, zip(*both, strict=True)), atol=1e-5)


@pytest.mark.parametrize("baselines", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_frozen_encoder_is_probed_beside_baselines(work, pretrained, baselines):
    words = ("eval.py", "probe", pretrained, work / "windows.h5", "--folds", "2", "--resamples", "20")
    done = call(*words, "--out", work / "probe.json", "--baselines" if baselines else "--no-baselines")
    rows = {row["name"]: row for row in json.loads((work / "probe.json").read_text())["rows"]}
    assert {"encoder, linear", "encoder, linear, re-centred"} <= set(rows)
    assert baselines == ({"band power", "tangent space", "EEGNet"} <= set(rows))
    assert len({row["windows"] for row in rows.values() if row["scores"]}) == 1
    assert "uses the test subject's unlabelled windows" in done.stdout
    assert "no class for each window" in call("eval.py", "probe", pretrained, work / "unlabelled.h5", status=2).stderr


# --- bad input: one sentence, status 2, nothing half-written ---


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call a script's main in this process: it must return 2 and say one sentence. Returns the sentence."""

    def call_main(script: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), REPOSITORY / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main() == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return call_main


def test_bad_input_ends_with_status_2_and_no_traceback(tmp_path):
    done = call("train.py", "debug", *debug_options(tmp_path / "absent.h5", tmp_path / "run"), status=2)
    assert done.stderr.startswith("train.py: ")
    assert not list(tmp_path.iterdir())


def test_bad_stores_are_refused_in_one_sentence(work, tmp_path, refused):
    stored = (work / "windows.h5").read_bytes()
    (tmp_path / "truncated.h5").write_bytes(stored[: len(stored) // 2])
    run_dir = tmp_path / "run"
    assert "does not exist" in refused("train.py", "debug", *debug_options(tmp_path / "absent.h5", run_dir))
    assert "truncated" in refused("train.py", "debug", *debug_options(tmp_path / "truncated.h5", run_dir))
    with h5py.File(work / "windows.h5") as source, h5py.File(tmp_path / "bare.h5", "w") as bare:
        for name in source:
            source.copy(name, bare)
            del bare[name]["y"]
        for key, value in source.attrs.items():
            bare.attrs[key] = value
    classify = ("--task.kind", "classify", "--model.head", "linear")
    assert "no labels" in refused("train.py", "debug", *debug_options(tmp_path / "bare.h5", run_dir), *classify)
    ragged = refused("train.py", "debug", *debug_options(work / "windows.h5", run_dir), "--model.patch-size", "48")
    assert "not a multiple of the patch size" in ragged
    assert not run_dir.exists()


def test_bad_checkpoints_are_refused_in_one_sentence(work, pretrained, tmp_path, refused):
    options = (*debug_options(work / "windows.h5", tmp_path / "run"), "--trainer.init-from", pretrained)
    message = refused("train.py", "debug", *options, "--model.embed-dim", "32", "--model.num-blocks", "2")
    assert "embed_dim 16 (expected 32)" in message
    assert "num_blocks 1 (expected 2)" in message
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    assert "holds none of the family" in refused("eval.py", "embed", tmp_path, work / "windows.h5", "--out", "x.npz")
    assert "was not fine-tuned" in refused("eval.py", "metrics", pretrained)
    options = debug_options(work / "windows.h5", pretrained)
    assert "already holds a run" in refused("train.py", "debug", *options)
    changed = refused("train.py", "debug", *options, "--trainer.resume", "true", "--optimizer.lr", "1")
    assert "optimizer.lr was 0.001, is now 1.0" in changed
    assert not (tmp_path / "run").exists()


def test_bad_configurations_are_refused(tmp_path, refused):
    (tmp_path / "typo.yaml").write_text("modle: {embed_dim: 16}\n")
    assert "did you mean 'model'" in refused("train.py", tmp_path / "typo.yaml")
    assert "did you mean 'debug'" in refused("train.py", "debgu")
    assert "--data.train" in refused("train.py", "debug")


def test_subjects_of_the_training_cannot_be_scored_as_test(work, finetuned, refused):
    assert "leakage" in refused("eval.py", "metrics", finetuned, "--data", work / "windows.h5")
