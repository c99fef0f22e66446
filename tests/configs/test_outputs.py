"""Windows of any montages and lengths through a model: the order, the numbers, the shapes that are compiled."""

import dataclasses

import h5py
import numpy as np
import pytest
from flax import nnx

from configs import outputs
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax import inference
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.lumamba import LuMamba, LuMambaConfig

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)
SFREQ = 100
MONTAGES = (["C3", "C4"], ["FP1", "FP2", "O1", "O2"], ["F3", "FZ", "F4"])
COUNTS = {80: (5, 21, 3), 200: (18, 2, 9)}  # samples -> windows of each montage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params = nnx.split(LuMamba(MICRO, rngs=nnx.Rngs(0)))[1]
    return inference.load(save_pretrained(tmp_path_factory.mktemp("model") / "m", MICRO, params, {"sfreq": SFREQ}))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder, rng, opened = tmp_path_factory.mktemp("stores"), np.random.default_rng(0), []
    for samples, counts in COUNTS.items():
        with create_store(folder / f"{samples}.h5", StoreInfo(SFREQ, samples, samples / SFREQ)) as writer:
            for number, (names, count) in enumerate(zip(MONTAGES, counts, strict=True)):
                signal = rng.normal(0, 20, (count, len(names), samples)).astype(np.float32)
                who = {"subject": f"s{number}", "recording": f"r{number}"}
                writer.add(f"g{number}", signal, montage_of(names), start_samples=np.arange(count) * samples, **who)
        if samples == 80:  # the writer refuses what a damaged disk may hold
            with h5py.File(folder / "80.h5", "r+") as file:
                file["g1/X"][4, 0, 3] = np.nan
        opened.append(WindowStore(folder / f"{samples}.h5"))
    return opened


@pytest.fixture(scope="module")
def columns(model, stores):
    return outputs.store_columns(model, stores, "prediction")


def test_every_window_has_the_prediction_of_its_own_array(model, stores, columns):
    first = 0
    for store in stores:
        for name, montage in store.montages.items():
            rows = np.flatnonzero(np.asarray(store.montage_names) == name)
            usable = rows[np.isfinite(store.read(rows)).all((1, 2))]
            expected = inference.predict(model, store.read(usable), montage.locations)
            np.testing.assert_allclose(columns["predictions"][first + usable], expected, atol=1e-5)
            assert set(columns["montage"][first + rows]) == {name}
        first += len(store)
    assert np.flatnonzero(np.isnan(columns["predictions"]).any(1)).tolist() == [COUNTS[80][0] + 4]


def test_the_size_of_the_batch_changes_no_bit(model, stores, columns):
    for batch_size in (1, 24, 200):
        again = outputs.store_columns(model, stores, "prediction", batch_size=batch_size)
        np.testing.assert_array_equal(again["predictions"], columns["predictions"])


def test_one_program_for_each_shape(model, stores):
    assert outputs.padded_sizes([19, 62, 19, 22]) == (19, 22, 62)
    assert outputs.padded_sizes([4, 19, 20, 22, 23, 61]) == (4, 24, 64)
    batches = outputs.evaluation_batches(model, stores)
    assert {(channels, samples) for _, channels, samples in batches.shapes} == {
        (channels, samples) for channels in (2, 3, 4) for samples in COUNTS
    }
    program = inference._compiled(inference._pool)
    before = program._cache_size()
    inference.run_batches(model, batches, "embedding")
    assert program._cache_size() - before == len(batches.shapes)
    inference.run_batches(model, batches, "embedding")
    assert program._cache_size() - before == len(batches.shapes)


def test_recordings_have_the_mean_of_their_windows(columns):
    found = outputs.by_recording(columns)
    own = columns["predictions"][columns["recording"] == "r1"]
    assert found["windows"].tolist() == [5 + 18, 20 + 2, 3 + 9]
    np.testing.assert_allclose(found["predictions"][1], np.nanmean(own, axis=0), rtol=1e-6)


def test_what_does_not_fit_is_refused(model, stores):
    other = dataclasses.replace(model, metadata={"provenance": {"sfreq": 256.0}})
    with pytest.raises(ValueError, match="trained at 256 Hz"):
        outputs.store_columns(other, stores, "embedding")
    other = dataclasses.replace(model, config=MICRO.replace(patch_size=64))
    with pytest.raises(ValueError, match="80 samples"):
        outputs.store_columns(other, stores, "embedding")
