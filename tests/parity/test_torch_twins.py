"""The PyTorch twins against the published key listings and the stored runs: what the exporter's tests may rely on."""

import json
from pathlib import Path

import numpy as np
import pytest

from lumamba_jax.parity import read_manifest

torch = pytest.importorskip("torch")

from torch_femba import FEMBA  # noqa: E402  (needs torch)
from torch_lumamba import LuMamba  # noqa: E402
from torch_luna import LUNA  # noqa: E402

from examples import export_torch_stages  # noqa: E402

COMMITTED = Path(__file__).parent / "golden"
CASES = {case.name: case for case in read_manifest(COMMITTED)}
TWINS = {"lumamba": LuMamba, "luna": LUNA, "femba": FEMBA}
# Final outputs are stored in float64, other stages mostly rounded to float32; measured: 4.4e-15, and 5.9e-8 (rounding).
FLOAT64_TOLERANCE = 1e-12
ROUNDED_TOLERANCE = 1e-7
VARIANTS = [
    "lumamba_tiny_pretrain",
    "lumamba_tiny_head_luna_2",
    "lumamba_tiny_head_linear_2",
    *(f"lumamba_tiny_head_mamba_{kind}" for kind in ("bc", "mcc", "ml", "mc", "mmc")),
    "lumamba_tiny_unidirectional",
    *(f"luna_{size}_{head}" for size in ("base", "large", "huge") for head in ("pretrain", "cls2")),
    "femba_pretrain_default",
    *(f"femba_finetune_default_{kind}" for kind in ("bc", "ml", "mcc", "mc", "mmc")),
]
LUNA_CASES = [
    "luna_micro_pretrain__c22_t200",
    "luna_micro_pretrain__c22_t200_masked_noise",
    "luna_micro_pretrain__c22_t200_masked_zeronoise",
    "luna_micro_pretrain__c1_t640",
    "luna_micro_rotary_perturbed__c16_t200",
    "luna_micro_q3_h4__c16_t200",
    "luna_micro_cls__c22_t200",
    "luna_micro_cls__c22_t200_allfalse_mask_noise",
    "luna_base_cls__allfalse_mask_noise",
]
FEMBA_CASES = [
    "femba_micro_pretrain__masked60",
    "femba_micro_pretrain__allfalse",
    "femba_micro_pretrain_kdec__masked60",
    "femba_micro_pretrain_overlap__masked60",
    "femba_mid_pretrain__masked60",
    *(f"femba_micro_cls_{kind}__allfalse" for kind in ("bc", "ml", "mcc", "mc", "mmc")),
]


def _listings(golden_dir):
    return json.loads((golden_dir / "tables" / "state_dicts.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_shapes_and_trainable_parameters_are_the_published_ones(golden_dir, variant):
    listing = _listings(golden_dir)[variant]
    with torch.device("meta"):  # LUNA huge without a byte of it
        twin = TWINS[variant.split("_")[0]](**listing["config"])
    shapes = {name: list(value.shape) for name, value in twin.state_dict().items()}
    assert shapes == listing["keys"]
    frozen = {name for name, parameter in twin.named_parameters() if not parameter.requires_grad}
    assert frozen == set(listing["not_trainable"])
    assert sum(parameter.numel() for parameter in twin.parameters()) == listing["total_parameters"]


def test_every_published_variant_has_a_twin(golden_dir):
    assert set(VARIANTS) == set(_listings(golden_dir))


def _torch_arrays(arrays):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _check_case(case):
    """Every stored float64 stage is exported under its name, in its shape, with its value."""
    twin = TWINS[case.family](**case.config)
    tensors = {key: value.astype(np.float32) for key, value in case.tensors().items()}
    twin.load_state_dict(_torch_arrays(tensors), strict=True)
    data = case.data()
    inputs = {key.removeprefix("in/"): value for key, value in data.items() if key.startswith("in/")}
    stages = export_torch_stages.run(twin, case.family, _torch_arrays(inputs), torch.float64)
    stored = {key.removeprefix("f64/"): value for key, value in data.items() if key.startswith("f64/")}
    assert {"recon", "logits"} & set(stored)
    assert len(stored) >= 7
    assert set(stored) <= set(stages)
    for name, theirs in stored.items():
        ours = stages[name].numpy()
        tolerance = FLOAT64_TOLERANCE if theirs.dtype == np.float64 else ROUNDED_TOLERANCE * np.abs(theirs).max()
        assert ours.shape == theirs.shape, name
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=f"{case.name} {name}")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family in TWINS])
def test_twin_reproduces_the_committed_cases(name):
    """The hooks name the same tensors as the stored files, so exported files mean the same."""
    _check_case(CASES[name])


@pytest.mark.parametrize("name", [*LUNA_CASES, *FEMBA_CASES])
def test_twin_reproduces_the_stored_stages_in_float64(golden_dir, name):
    _check_case(next(case for case in read_manifest(golden_dir) if case.name == name))


def test_stored_rotary_frequencies_are_honoured(golden_dir):
    """With the default frequencies instead of the stored ones the first block gives something else."""
    case = next(case for case in read_manifest(golden_dir) if case.name == "luna_micro_rotary_perturbed__c16_t200")
    twin = LUNA(**case.config)
    freqs = twin.get_parameter("blocks.0.attn.rotary_emb.freqs")
    default = freqs.clone()
    twin.load_state_dict(_torch_arrays(case.tensors()), strict=True)
    freqs.data = default
    data = case.data()
    inputs = {key.removeprefix("in/"): value for key, value in data.items() if key.startswith("in/")}
    stages = export_torch_stages.run(twin, "luna", _torch_arrays(inputs), torch.float64)
    assert np.abs(stages["latent"].numpy() - data["f64/latent"]).max() > 1e-3


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
