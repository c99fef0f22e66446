"""Inference: the same numbers as the model itself, whatever the batch, the montage and the padding to a bucket."""

import jax
import numpy as np
import pytest
from flax import nnx

import lumamba_jax
from lumamba_jax import inference, normalization
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.lumamba import LuMamba, LuMambaConfig

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)
SAMPLES = 5 * MICRO.patch_size  # 5 patches and 5 channels: both are padded to 6


def export(path, config=MICRO, **provenance):
    params = nnx.split(LuMamba(config, rngs=nnx.Rngs(0)))[1]
    return save_pretrained(path, config, params, provenance)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return inference.load(export(tmp_path_factory.mktemp("model") / "run" / "best", class_names=["a", "b", "c"]).parent)


@pytest.fixture(scope="module")
def recording():
    rng = np.random.default_rng(0)
    return rng.normal(0, 20, (3, 5, SAMPLES)).astype(np.float32), rng.normal(0, 0.1, (5, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(model, recording):
    return inference.embed(model, *recording)


def test_embeddings_equal_the_mean_latent_of_the_unpadded_model(model, recording, embeddings):
    signal, locations = recording
    encode = jax.jit(lambda s, p: model.module().encode(normalization.channel_zscore(s), p).latent.mean(1))
    expected = encode(signal, np.broadcast_to(locations, (3, 5, 3)))
    assert embeddings.shape == (3, MICRO.width)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_batch_size_single_windows_and_patches_agree(model, recording, embeddings):
    signal, locations = recording
    np.testing.assert_allclose(inference.embed(model, signal, locations, batch_size=1), embeddings, atol=1e-5)
    np.testing.assert_allclose(inference.embed(model, signal[1], locations, batch_size=1), embeddings[1], atol=1e-5)
    patches = inference.embed(model, signal, locations, per_patch=True)
    assert patches.shape == (3, 5, MICRO.width)
    np.testing.assert_allclose(patches.mean(1), embeddings, atol=1e-5)


def test_predictions_are_probabilities_of_the_named_classes(model, recording):
    probabilities = lumamba_jax.predict(model, *recording)
    assert model.class_names == ["a", "b", "c"]
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    signal, locations = recording
    logits = jax.jit(lambda s, p: model.module()(normalization.channel_zscore(s), p).logits)(
        signal, np.broadcast_to(locations, (3, 5, 3))
    )
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-5)


def test_bucket_sizes_hold_their_content_and_waste_at_most_half():
    for size in range(1, 300):
        bucket = inference.bucket_size(size)
        assert size <= bucket <= max(size, 1.5 * size)
    assert [inference.bucket_size(size) for size in (1, 3, 5, 7, 19, 22, 25, 32)] == [1, 3, 6, 8, 24, 24, 32, 32]


def test_bad_arrays_are_refused(model, recording):
    signal, locations = recording
    with pytest.raises(ValueError, match="199 samples"):
        inference.embed(model, signal[..., :-1], locations)
    with pytest.raises(ValueError, match="locations must be"):
        inference.embed(model, signal, locations[:-1])
    with pytest.raises(ValueError, match="NaN"):
        inference.embed(model, np.where(signal > 40, np.nan, signal), locations)
    with pytest.raises(ValueError, match="windows, channels, samples"):
        inference.embed(model, signal[0, 0], locations)


def test_a_model_without_a_classifier_predicts_nothing(tmp_path, recording):
    encoder = inference.load(export(tmp_path / "m", MICRO.replace(head="none", num_outputs=None)))
    with pytest.raises(ValueError, match="fine-tune it first"):
        inference.predict(encoder, *recording)
