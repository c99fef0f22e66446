"""Counting, describing and loading whatever somebody brings: parameters, FLOPs, the page of `--inspect`, `load`."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lumamba_jax
from convert_torch_weights import main
from lumamba_jax import inference
from lumamba_jax.architecture_summary import count_parameters, summarize
from lumamba_jax.architectures import SIZES, build
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.torch_architecture import Overrides
from lumamba_jax.torch_weights import convert_tensors, to_torch_tensors

MICRO = {
    "LuMamba": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1, head="linear", num_outputs=3),
    "LUNA": LunaConfig(embed_dim=16, num_queries=2, num_blocks=1),
    "FEMBA": FembaConfig(num_channels=6, num_samples=128, embed_dim=4, num_blocks=1, expand=2),
}


@pytest.fixture(params=MICRO)
def weights(request, tmp_path):
    """A published-style file of each architecture."""
    config = MICRO[request.param]
    path = tmp_path / "weights.safetensors"
    save_file(to_torch_tensors(config, nnx.split(build(config))[1]), path)
    return config, path


def test_page_of_a_weight_file_and_of_its_checkpoint(weights, tmp_path, capsys):
    config, path = weights
    assert main(["--inspect", str(path)]) == 0
    page = capsys.readouterr().out
    total = sum(count_parameters(config).values())
    for said in (config.architecture, f"{total:,}", "normalisation", "a load maps", "SHA-256", "CC BY-ND 4.0"):
        assert said in page, said
    assert ("cross_attn.temparature" in page) == (config.architecture != "FEMBA")
    assert main([str(path), str(tmp_path / "ours")]) == 0
    again = summarize(tmp_path / "ours")
    assert f"{total:,}" in again
    assert "a load maps" in again


def test_a_damaged_file_is_described_by_the_error_of_its_load(tmp_path, capsys):
    (tmp_path / "w.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert main(["--inspect", str(tmp_path / "w.safetensors")]) == 2
    assert "git-lfs" in capsys.readouterr().err


def test_published_sizes_are_recognised():
    tensors = to_torch_tensors(SIZES["LuMamba tiny"], nnx.split(build(SIZES["LuMamba tiny"]))[1])
    assert convert_tensors(tensors).config == SIZES["LuMamba tiny"]


def test_table_of_counts(capsys):
    assert main(["--counts"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    totals = {(" ".join(row[:2]), row[2].rstrip(",")): row[-1] for row in rows}
    assert totals["LuMamba tiny", "reconstruction"] == "4,194,337"
    assert totals["LuMamba tiny", "mamba"] == "4,631,611"
    assert totals["LUNA huge", "attention"] == "311,812,667"
    assert totals["FEMBA large", "reconstruction"] == "77,166,345"


def test_load_gives_the_same_model_from_a_file_a_folder_and_a_checkpoint(weights, tmp_path):
    config, path = weights
    assert main([str(path), str(tmp_path / "ours")]) == 0
    signal = np.random.default_rng(0).normal(0, 20, (2, 6, 128 if config.architecture == "FEMBA" else 160))
    locations = np.random.default_rng(1).normal(0, 0.1, (6, 3))
    models = [lumamba_jax.load(source) for source in (path, str(tmp_path / "ours"))]
    only = tmp_path / "folder"
    only.mkdir()
    path.rename(only / path.name)
    models.append(lumamba_jax.load(only))
    embeddings = [lumamba_jax.embed(model, signal, locations) for model in models]
    assert [model.config for model in models] == [config] * 3
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    assert models[0].normalization == ("fixed_affine" if config.architecture == "FEMBA" else "channel_zscore")


def test_load_options_and_their_errors(tmp_path):
    config = MICRO["LUNA"]
    save_file(to_torch_tensors(config, nnx.split(build(config))[1]), tmp_path / "w.safetensors")
    save_pretrained(tmp_path / "ours", config, nnx.split(build(config))[1], {})
    low = inference.load(tmp_path / "w.safetensors", compute_dtype="bfloat16")
    assert low.config.compute_dtype == "bfloat16"
    signal, locations = (
        np.random.default_rng(0).normal(0, 20, (5, 160)),
        np.random.default_rng(1).normal(0, 0.1, (5, 3)),
    )
    exact = inference.load(tmp_path / "ours", position_dtype="float64")
    difference = inference.embed(exact, signal, locations) - inference.embed(
        inference.load(tmp_path / "ours"), signal, locations
    )
    assert np.abs(difference).max() < 1e-4  # E = 16 has two octaves: hardly anything is amplified
    with pytest.raises(ValueError, match="overrides nothing"):
        inference.load(tmp_path / "ours", overrides=Overrides(num_heads=2))
    with pytest.raises(ValueError, match="SHA-256"):
        inference.load(tmp_path / "w.safetensors", sha256="0" * 64)
    with pytest.raises(FileNotFoundError):
        inference.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="electrode positions"):
        inference.embed(exact, signal)


def test_femba_refuses_other_windows(tmp_path):
    config = MICRO["FEMBA"]
    model = inference.load(save_pretrained(tmp_path / "ours", config, nnx.split(build(config))[1], {}))
    rng = np.random.default_rng(0)
    assert inference.embed(model, rng.normal(0, 20, (3, 6, 128))).shape == (3, config.width)
    assert inference.embed(model, rng.normal(0, 20, (6, 128)), per_patch=True).shape == (8, config.width)
    with pytest.raises(ValueError, match="fixed grid: windows must be 6 channels x 128 samples"):
        inference.embed(model, rng.normal(0, 20, (3, 5, 128)))


def test_damaged_headers_load_equal_or_not_at_all(weights, tmp_path):
    """What the reader cannot tell (another valid name, shape or dtype) the key map refuses."""
    config, path = weights
    content = path.read_bytes()
    expected = inference.load(path)
    header = int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.choice(header, 120, replace=False):
        damaged = bytearray(content)
        damaged[8 + position] = rng.integers(32, 127)
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        try:
            model = inference.load(tmp_path / "damaged.safetensors")
        except ValueError:
            refused += 1
        else:
            assert model.config == expected.config == config
            same = jax.tree.map(np.array_equal, model.params, expected.params)
            assert all(jax.tree.leaves(same))
    assert refused > 60
