"""The PyTorch twin against the stored runs; a parity folder written by the export script, checked by our converter."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_torch_weights import main as convert
from lumamba_jax.parity import read_manifest

torch = pytest.importorskip("torch")

from examples import export_torch_stages  # noqa: E402  (needs torch)

COMMITTED = Path(__file__).parent / "golden"
CASES = {case.name: case for case in read_manifest(COMMITTED)}
SMALL = {"patch_size": 40, "num_queries": 2, "embed_dim": 16, "num_heads": 2, "exp": 2, "num_blocks": 2}


@pytest.fixture(autouse=True)
def _importable_twin(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def _torch_arrays(arrays):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "lumamba"])
def test_twin_reproduces_the_stored_stages_in_float64(name):
    """The hooks name the same tensors as the stored files, so the exported files mean the same."""
    from torch_lumamba import LuMamba

    case = CASES[name]
    twin = LuMamba(**case.config)
    tensors = {key: value.astype(np.float32) for key, value in case.tensors().items()}
    twin.load_state_dict(_torch_arrays(tensors), strict=True)
    data = case.data()
    inputs = {key.removeprefix("in/"): value for key, value in data.items() if key.startswith("in/")}
    stages = export_torch_stages.run(twin, _torch_arrays(inputs), torch.float64)
    compared = 0
    for key, stored in data.items():
        stage = key.removeprefix("f64/")
        if key.startswith("f64/") and stage in stages:
            tolerance = 1e-12 if stored.dtype == np.float64 else 1e-7 * np.abs(stored).max()
            np.testing.assert_allclose(stages[stage].numpy().reshape(stored.shape), stored, rtol=0, atol=tolerance)
            compared += 1
    missing = {key.removeprefix("f64/") for key in data if key.startswith("f64/")} - set(stages)
    assert missing <= {"classifier.pooled"}  # of the linear head: the result of no module
    assert compared >= 8


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "mamba"])
def test_plain_mamba_equals_the_stored_block_and_its_gradients(name):
    case = CASES[name]
    block = export_torch_stages.Mamba(**case.config).double()
    block.load_state_dict(_torch_arrays({key: value.astype(np.float64) for key, value in case.tensors().items()}))
    data = case.data()
    x = torch.from_numpy(data["in/x"]).double().requires_grad_()
    out = block(x)
    (out * torch.from_numpy(data["in/w_out"])).sum().backward()
    np.testing.assert_allclose(out.detach(), data["f64/out"], atol=1e-12)
    for parameter, value in [*block.named_parameters(), ("x", x)]:
        np.testing.assert_allclose(value.grad, data[f"grad/{parameter}"], atol=1e-11)


def test_a_model_that_imports_mamba_ssm_exports_and_passes_our_check(tmp_path, monkeypatch, capsys):
    # A user's module: imports the CUDA package, takes the published arguments, has no loc_noise.
    (tmp_path / "their_model.py").write_text(
        "import torch\nfrom mamba_ssm import Mamba\nfrom torch_lumamba import LuMamba\n\n"
        "class Theirs(LuMamba):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.mamba_blocks[0].mamba_fwd = Mamba(d_model=32, expand=2, use_fast_path=True)\n"
        "        torch.nn.init.normal_(self.mask_token)\n\n"
        "    def forward(self, x_signal, mask, channel_locations, channel_names=None):\n"
        "        noise = None if mask is None else torch.randn_like(channel_locations)\n"
        "        return super().forward(x_signal, channel_locations, channel_names, mask, noise), x_signal\n"
    )
    for name in ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "parity"
    common = [str(folder), "--factory", "their_model:Theirs", "--shape", "2", "5", "80", "--runs", "2"]
    export_torch_stages.main([*common, "--kwargs", json.dumps(SMALL), "--mask", "--name", "pretrain"])
    classes = SMALL | {"num_classes": 3, "num_blocks": 1}
    export_torch_stages.main([*common, "--kwargs", json.dumps(classes), "--name", "classify"])
    data = load_file(folder / "cases" / "pretrain.safetensors")
    assert {"f64/recon", "f64/block0.mamba_rev_raw", "f64/latent", "f64/freq_features", "in/loc_noise"} <= set(data)
    assert convert(["--check", str(folder)]) == 0
    assert convert(["--check", str(folder), "--x64"]) == 0
    assert capsys.readouterr().out.count("2 of 2 cases pass") == 2
    # The exported weights are a published-style file of their own.
    assert convert([str(folder / "state" / "classify.safetensors"), str(tmp_path / "checkpoint")]) == 0
    # Exported numbers that are not those of the weights are noticed.
    data["f64/latent"] = data["f64/latent"] + 1e-3
    save_file(data, folder / "cases" / "pretrain.safetensors")
    assert convert(["--check", str(folder), "--case", "pretrain"]) == 1
