"""FEMBA on windows whose grid leaves a rest: an odd channel, and samples that fill no whole patch."""

import dataclasses

import numpy as np
import pytest
from edfio import Edf, EdfSignal

import eval as evaluation
import train
from configs import DataConfig, load, scoring
from configs.data import loader_patch, open_windows, resolve
from configs.outputs import evaluation_batches
from configs.task_presets import task_preset_names
from configs.task_sheet import TASKS
from data_pipeline.montages import montage_of
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax import inference

CHANNELS, SAMPLES = ["C3", "CZ", "C4", "P3", "P4"], 200
FILTERS = {"l_freq": 1.0, "h_freq": 75.0, "notch": None, "reference": "none"}
READ = (slice(None), slice(4), slice(192))  # of 5 channels and 200 samples, in patches of 2 x 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("rest") / "windows.h5", np.random.default_rng(0)
    with create_store(path, StoreInfo(200.0, SAMPLES, 1.0, FILTERS, class_names=["a", "b"])) as writer:
        for subject in range(6):
            signal, who = rng.normal(0, 20, (4, len(CHANNELS), SAMPLES)), f"s{subject}"
            starts = SAMPLES * np.arange(4)
            about = {"subject": who, "recording": who, "start_samples": starts, "labels": np.array([0, 1, 0, 1])}
            writer.add(who, signal.astype(np.float32), montage_of(CHANNELS), **about)
    return path


def small(store, run_dir):
    """The preset of SEED-V with a small model and this store."""
    config = load("seed_v_femba_tiny")
    sizes = {
        "num_channels": len(CHANNELS),
        "num_samples": SAMPLES,
        "num_outputs": 2,
        "embed_dim": 2,
        "num_blocks": 1,
        "head": "linear",
    }
    data = DataConfig(train=(str(store),), validation_fraction=0.2, test_fraction=0.2)
    trainer = dataclasses.replace(config.trainer, run_dir=str(run_dir), steps=1, baseline=False)
    loader = dataclasses.replace(config.loader, batch_size=8)
    return dataclasses.replace(config, model=config.model.replace(**sizes), data=data, trainer=trainer, loader=loader)


def test_every_femba_preset_takes_the_windows_of_its_task():
    for name in (name for name in task_preset_names() if "_femba_" in name):
        config = load(name)
        task = TASKS[name.partition("_femba_")[0]]
        config.model.check_window(len(task.channels), task.samples)
        patch = loader_patch(config.model)
        assert task.samples % patch == 0
        assert patch == 16 or task.samples == 200


def test_it_trains_is_scored_and_does_not_read_the_rest(store, tmp_path):
    config = small(store, tmp_path / "run")
    windows = open_windows(config.data, labelled=True)
    batch = windows.batches("train", resolve(config, windows).loader).batch(0)
    assert batch["signal"].shape == (8, 5, 200)
    assert batch["patch_mask"].all()
    assert train.run(config)
    scored = scoring.score_model(tmp_path / "run", data=(), part="test", batch_size=4, resamples=0)
    assert np.isfinite(scored.predictions.logits).all()

    model, opened = inference.load(tmp_path / "run"), WindowStore(store)
    signal = opened.read(np.arange(4))
    changed = np.full_like(signal, 7.0)
    changed[READ] = signal[READ]
    expected = inference.predict(model, signal)
    np.testing.assert_array_equal(inference.predict(model, changed), expected)
    changed[:, 3, 191] += 50
    assert (inference.predict(model, changed) != expected).any()
    _, found = inference.run_batches(model, evaluation_batches(model, [opened]), "prediction")
    np.testing.assert_allclose(found[:4], expected, atol=1e-6)
    _check_a_recording(model, tmp_path)


def _check_a_recording(model, folder):
    """The run says how its windows were prepared, and a recording of other channels, order and rate becomes such."""
    provenance = model.metadata["provenance"]
    assert (provenance["channels"], provenance["filters"]) == (CHANNELS, FILTERS)
    rng, names = np.random.default_rng(1), [*reversed(CHANNELS), "O1"]
    about = {"physical_dimension": "uV", "physical_range": (-200, 200)}
    signals = [EdfSignal(20 * rng.normal(size=5 * 256), 256, label=name, **about) for name in names]
    Edf(signals).write(folder / "own.edf")
    evaluation.run_predict(evaluation.Predict(folder / "run", folder / "own.edf", folder / "own.npz"))
    chain = {"montage": ",".join(CHANNELS), "l_freq": 1.0, "h_freq": 75.0, "notch": "none", "sfreq": 200.0}
    prepare(PrepareConfig(folder, folder / "own.h5", include=("own.edf",), window=1.0, **chain))
    expected = inference.predict(model, WindowStore(folder / "own.h5").read(np.arange(5)))
    with np.load(folder / "own.npz") as found:
        np.testing.assert_allclose(found["predictions"], expected, atol=1e-6)
    other = evaluation.RecordingSettings(window=2.0)
    with pytest.raises(ValueError, match="windows must be 5 channels x 200 samples"):
        evaluation.run_predict(
            evaluation.Predict(folder / "run", folder / "own.edf", folder / "x.npz", recordings=other)
        )
    with pytest.raises(ValueError, match="holds windows already"):
        evaluation.run_predict(
            evaluation.Predict(folder / "run", folder / "own.h5", folder / "x.npz", recordings=other)
        )
    assert not (folder / "x.npz").exists()
