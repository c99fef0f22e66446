"""A long window in parts equals the window at once, whatever the parts; and says what it cannot take."""

import numpy as np
import pytest
from flax import nnx

import lumamba_jax
from lumamba_jax import inference
from lumamba_jax.architectures import build
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=2, d_state=4, head="none")
PATCHES = 37


@pytest.fixture(scope="module")
def recording():
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 20, (5, PATCHES * 40)) + np.array([3, -2, 0, 500, 0])[:, None]
    signal[:, 200:800] *= 5  # statistics of a part differ from those of the whole
    signal[4] = 7  # a flat channel is zero once normalised
    return signal.astype(np.float32), rng.normal(0, 0.1, (5, 3)).astype(np.float32)


def _loaded(config, folder):
    return inference.load(save_pretrained(folder, config, nnx.split(build(config, seed=1))[1], {}))


@pytest.mark.parametrize("strategy", ["add", "ew_multiply", "none"])
def test_parts_equal_the_whole(tmp_path, recording, strategy):
    model = _loaded(MICRO.replace(bidirectional=strategy), tmp_path / "m")
    whole = inference.embed(model, *recording, per_patch=True)
    scale = np.abs(whole).max()
    for part in (4, 16, 64) if strategy == "add" else (16,):
        parts = lumamba_jax.embed_recording(model, *recording, per_patch=True, part=part)
        assert parts.shape == whole.shape == (PATCHES, MICRO.width)
        np.testing.assert_allclose(parts, whole, atol=1e-5 * scale)
    pooled = inference.embed_recording(model, *recording, part=16)
    np.testing.assert_allclose(pooled, inference.embed(model, *recording), atol=1e-5 * scale)


def test_a_file_is_read_part_by_part(tmp_path, recording):
    model, (signal, locations) = _loaded(MICRO, tmp_path / "m"), recording
    np.save(tmp_path / "signal.npy", signal)
    mapped = np.load(tmp_path / "signal.npy", mmap_mode="r")
    read = []

    class Watched:
        shape = mapped.shape

        def __getitem__(self, key):
            read.append(key[1].stop - key[1].start)
            return mapped[key]

    watched = inference.embed_recording(model, Watched(), locations, part=8)
    np.testing.assert_array_equal(watched, inference.embed_recording(model, signal, locations, part=8))
    assert max(read) == 8 * 40


def test_what_cannot_run_in_parts_is_refused(tmp_path, recording):
    signal, locations = recording
    luna = LunaConfig(embed_dim=16, num_queries=2, num_blocks=1, head="none")
    for config in (luna, FembaConfig(num_channels=5, num_samples=640, embed_dim=4, num_blocks=1, head="none")):
        with pytest.raises(ValueError, match="cannot encode a recording part by part"):
            inference.embed_recording(_loaded(config, tmp_path / config.architecture), signal, locations)
    model = _loaded(MICRO, tmp_path / "m")
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        inference.embed_recording(model, signal[:, :-1], locations)
    with pytest.raises(ValueError, match="locations must be"):
        inference.embed_recording(model, signal, locations[:3])
    with pytest.raises(ValueError, match="too short: give at least 4"):
        inference.embed_recording(model, signal, locations, part=3)
    broken = signal.copy()
    broken[1, 700] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite values in samples 640 to 1280"):
        inference.embed_recording(model, broken, locations, part=16)
