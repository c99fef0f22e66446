"""The way back to PyTorch: byte for byte, under a strict load, with its papers, or not at all."""

import errno
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert_torch_weights import main
from lumamba_jax.architectures import SIZES, build
from lumamba_jax.checkpoint import load_pretrained, named_leaves, save_pretrained
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.parity import CHECKED_FAMILIES, read_manifest
from lumamba_jax.torch_architecture import Overrides
from lumamba_jax.torch_export import export, torch_arguments
from lumamba_jax.torch_weights import convert_tensors, to_torch_tensors

MODELS = {
    "LuMamba": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1),
    "LuMamba, one direction": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1, bidirectional="none"),
    "LuMamba, linear": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1, head="linear", num_outputs=3),
    "LuMamba, attention": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1, head="attention", num_outputs=2),
    "LuMamba, mmc": LuMambaConfig(
        embed_dim=16, num_queries=2, num_blocks=1, head="mamba", num_outputs=3, output_channels=5
    ),
    "LUNA": LunaConfig(embed_dim=16, num_queries=2, num_blocks=1),
    "LUNA, attention": LunaConfig(embed_dim=16, num_queries=2, num_blocks=1, head="attention", num_outputs=2),
    "FEMBA": FembaConfig(num_channels=6, num_samples=128, embed_dim=4, num_blocks=1, expand=2),
    "FEMBA, mc": FembaConfig(
        num_channels=6, num_samples=128, embed_dim=4, num_blocks=1, expand=2, head="mamba", output_channels=6
    ),
}
OVERRIDES = {"LuMamba, mmc": ["--output-channels", "5"], "FEMBA, mc": ["--output-channels", "6"]}


def _published(name, dtype=np.float32):
    """As in a published file: every other tensor in `dtype`, and the unread scalar not at its initial value."""
    config = MODELS[name]
    tensors = to_torch_tensors(config, nnx.split(build(config, seed=4))[1])
    tensors = {key: tensor.astype(dtype) if i % 2 else tensor for i, (key, tensor) in enumerate(tensors.items())}
    return tensors | {key: np.asarray(0.25, np.float32) for key in tensors if key.endswith("temparature")}


@pytest.mark.parametrize("name", MODELS)
def test_torch_to_ours_to_torch_is_byte_equal(tmp_path, capsys, name):
    tensors = _published(name, ml_dtypes.bfloat16)
    save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "in.safetensors")
    assert main([str(tmp_path / "in.safetensors"), str(tmp_path / "ours"), *OVERRIDES.get(name, [])]) == 0
    config = load_pretrained(tmp_path / "ours")[0]
    assert config.architecture == MODELS[name].architecture
    out = tmp_path / "back" / "weights.safetensors"
    assert main(["--export", str(tmp_path / "ours"), str(out), "--prefix", "model."]) == 0
    back = load_file(out)
    assert set(back) == {f"model.{key}" for key in tensors}
    for key, tensor in tensors.items():
        assert back[f"model.{key}"].dtype == tensor.dtype, key
        assert back[f"model.{key}"].tobytes() == tensor.tobytes(), key
    provenance = json.loads((out.parent / "provenance.json").read_text())
    assert "CC BY-ND 4.0" in provenance["licence_note"]
    assert len(provenance["origin"]["sha256"]) == 64
    assert len(provenance["origin"]["mapped"]) + len(provenance["origin"]["kept"]) == len(tensors)
    assert json.loads((out.parent / "config.json").read_text())["architecture"] == config.architecture
    assert "adapted weights" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_the_pytorch_code_loads_it_strictly(tmp_path, name):
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    import torch_femba
    import torch_lumamba
    import torch_luna

    config = MODELS[name]
    save_pretrained(tmp_path / "ours", config, nnx.split(build(config, seed=5))[1], {})
    export(tmp_path / "ours", tmp_path / "out" / "weights.safetensors")
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())
    modules = {"LuMamba": torch_lumamba.LuMamba, "LUNA": torch_luna.LUNA, "FEMBA": torch_femba.FEMBA}
    twin = modules[arguments.pop("architecture")](**arguments)
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    twin.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in weights.items()}, strict=True)


def test_every_stored_state_is_byte_equal_after_the_round_trip(golden_dir):
    checked = 0
    for case in read_manifest(golden_dir):
        if case.family not in CHECKED_FAMILIES[:3]:
            continue
        tensors, converted = case.tensors(), case.convert()
        back = to_torch_tensors(converted.config, converted.params, kept=converted.kept, stored=converted.stored)
        assert back.keys() == tensors.keys(), case.name
        for key, tensor in tensors.items():
            assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape), (case.name, key)
            assert back[key].tobytes() == tensor.tobytes(), (case.name, key)
        checked += 1
    assert checked == 29 + 12 + 10


def test_constructor_arguments_are_those_of_the_published_listings(golden_dir):
    variants = json.loads((golden_dir / "tables" / "state_dicts.json").read_text())
    for name, size in (("lumamba_tiny_pretrain", "LuMamba tiny"), ("luna_huge_pretrain", "LUNA huge")):
        assert torch_arguments(SIZES[size]).items() >= variants[name]["config"].items()
    assert torch_arguments(SIZES["FEMBA large"]).items() >= variants["femba_pretrain_default"]["config"].items()


def test_papers_of_other_weights_are_not_overwritten(tmp_path):
    config = MODELS["LUNA"]
    save_pretrained(tmp_path / "ours", config, nnx.split(build(config))[1], {})
    out = tmp_path / "out" / "a.safetensors"
    export(tmp_path / "ours", out)
    export(tmp_path / "ours", out)  # the same file again is fine
    with pytest.raises(ValueError, match="export into a folder of its own"):
        export(tmp_path / "ours", out.with_name("b.safetensors"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.safetensors", "config.json", "provenance.json"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    config = MODELS["LUNA"]
    save_pretrained(tmp_path / "ours", config, nnx.split(build(config))[1], {})

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["--export", str(tmp_path / "ours"), str(tmp_path / "out" / "w.safetensors")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_model_trained_here_exports_without_a_source(tmp_path):
    config = MODELS["LUNA"]
    params = nnx.split(build(config, seed=6))[1]
    save_pretrained(tmp_path / "ours", config, params, {"run": "somewhere"})
    tensors = export(tmp_path / "ours", tmp_path / "w.safetensors")
    assert tensors["cross_attn.temparature"] == np.float32(1)
    again = convert_tensors(tensors, overrides=Overrides())
    for path, leaf in named_leaves(params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[path], leaf, err_msg=path)
