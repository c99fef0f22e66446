"""Parity folders that the export script writes for small models of the three families, and our models against them."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lumamba_jax.parity import check_case, read_manifest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402  (needs torch)
from torch_femba import FEMBA  # noqa: E402
from torch_lumamba import LuMamba  # noqa: E402
from torch_luna import LUNA  # noqa: E402

from examples import export_torch_stages  # noqa: E402

STORED_WEIGHTS = str(Path(__file__).parent / "golden" / "state" / "lumamba_micro_head_linear.safetensors")
TWINS = {"lumamba": LuMamba, "luna": LUNA, "femba": FEMBA}
MONTAGE = {"patch_size": 40, "num_queries": 2, "embed_dim": 16, "num_heads": 2}
KWARGS = {
    "lumamba": MONTAGE | {"exp": 2, "num_blocks": 2},
    "luna": MONTAGE | {"depth": 2},
    "femba": {"seq_length": 64, "num_channels": 6, "embed_dim": 4, "exp": 2, "num_blocks": 2, "kernel_dec": [5, 3]},
}
CLASSES = {
    "lumamba": {"num_classes": 3, "num_blocks": 1},
    "luna": {"num_classes": 3, "depth": 1},
    "femba": {"num_classes": 3, "num_blocks": 1, "classification_type": "mmc"},
}
SHAPES = {"lumamba": ("2", "5", "80"), "luna": ("2", "5", "80"), "femba": ("2", "6", "64")}
CASES = [f"{family}_{head}" for family in TWINS for head in ("pretrain", "classify")]

CHANNEL_UNIFICATION = {
    *("freq_features", "freq_embed", "patch_embed", "nerf_encoding", "channel_location_emb", "tokens"),
    *(f"patch_embed.proj_in.{i}" for i in range(9)),
    *(f"cross_attn.{name}" for name in ("queries_norm", "keys_norm", "values_norm", "mha_out", "ffn")),
    *(f"cross_attn.query_self_attn.{i}" for i in range(3)),
    *("cross_attn_out", "attention_scores", "latent"),
}
RECONSTRUCTION = {"decoder_queries", "decoder.transformer_out", "decoder.norm", "recon"}
ATTENTION_CLASSIFIER = {"classifier.attn_out", "classifier.attn_weights", "logits"}
MAMBA_CLASSIFIER = {"classifier.fc1", "classifier.mamba_1", "classifier.pooled", "logits"}


def _blocks(count, *names):
    return {f"block{i}.{name}" for i in range(count) for name in names}


LUMAMBA_BLOCK = ("norm", "mamba_fwd", "mamba_rev_raw", "mamba_out")
FEMBA_BLOCK = ("in", "mamba_fwd", "mamba_rev_raw", "mamba_out", "residual", "out")
STAGES = {
    "lumamba_pretrain": CHANNEL_UNIFICATION | _blocks(2, *LUMAMBA_BLOCK) | {"block0.out"} | RECONSTRUCTION,
    "lumamba_classify": CHANNEL_UNIFICATION | _blocks(1, *LUMAMBA_BLOCK) | ATTENTION_CLASSIFIER,
    "luna_pretrain": CHANNEL_UNIFICATION | _blocks(2, "attn", "mlp", "out") | RECONSTRUCTION,
    "luna_classify": CHANNEL_UNIFICATION | _blocks(1, "attn", "mlp", "out") | ATTENTION_CLASSIFIER,
    "femba_pretrain": {"patch_embed"} | _blocks(2, *FEMBA_BLOCK) | {"decoder.dec_conv", "recon"},
    "femba_classify": {"patch_embed"} | _blocks(1, *FEMBA_BLOCK) | MAMBA_CLASSIFIER,
}

# A user's module: it imports the packages, takes the published arguments in the published order, has no loc_noise, and
# returns the input (and the scores) beside its result.
THEIR_MODELS = """
import torch
from mamba_ssm import Mamba
from rotary_embedding_torch import RotaryEmbedding
from timm.models.layers import DropPath, Mlp
from torch_femba import FEMBA
from torch_luna import LUNA
from torch_lumamba import LuMamba


class Published:
    def redraw(self):  # what starts as zero, one or a constant would hide a stage that leaves it out
        for parameter in self.parameters():
            if parameter.dim() <= 1 or parameter.shape[:2] == (1, 1) or not parameter.any():
                parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, x_signal, mask, channel_locations, channel_names=None):
        noise = None if mask is None else torch.randn_like(channel_locations)
        return super().forward(x_signal, channel_locations, channel_names, mask, noise), x_signal


class TheirMamba(Mamba):
    def forward(self, u):
        return super().forward(u, inference_params=None)


class TheirLuMamba(Published, LuMamba):
    def __init__(self, num_blocks: int = 7, **kwargs):
        super().__init__(num_blocks=num_blocks, **kwargs)
        for block in self.mamba_blocks:
            block.mamba_fwd = TheirMamba(d_model=32, expand=2, use_fast_path=True)
        self.redraw()


class TheirLuna(Published, LUNA):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for block in self.blocks:
            block.attn.rotary_emb = RotaryEmbedding(dim=8, learned_freq=False)
            block.mlp = Mlp(32, 128, 32, act_layer=torch.nn.GELU, norm_layer=torch.nn.LayerNorm, drop=0.1)
            block.drop_path1 = DropPath(0.1)
        self.redraw()


class TheirFemba(Published, FEMBA):
    def __init__(self, stride=(2, 16), patch_size=(2, 16), **kwargs):
        super().__init__(stride=stride, patch_size=patch_size, **kwargs)
        self.redraw()

    def forward(self, x, mask):
        masked = x.clone()
        masked[mask] = 0
        return FEMBA.forward(self, masked, mask), x
"""
FACTORIES = {"lumamba": "TheirLuMamba", "luna": "TheirLuna", "femba": "TheirFemba"}


def _without_packages(monkeypatch):
    """As if none had been imported; what the script puts in their place is undone with the fixture."""
    for package, submodules, _ in export_torch_stages.PLAIN_PACKAGES:
        for name in (package, *(f"{package}.{submodule}" for submodule in submodules)):
            monkeypatch.setitem(sys.modules, name, None)  # so that undoing also removes what was not there
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A parity folder with two cases of each family, written by the command line."""
    work = tmp_path_factory.mktemp("export")
    (work / "their_models.py").write_text(THEIR_MODELS)
    folder = work / "parity"
    with pytest.MonkeyPatch.context() as monkeypatch:
        _without_packages(monkeypatch)
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "path", [str(work), *sys.path])
        for family, factory in FACTORIES.items():
            common = ["--factory", f"their_models:{factory}", "--shape", *SHAPES[family], "--runs", "2", "--gradients"]
            for head, kwargs, mask in (
                ("pretrain", KWARGS[family], ["--mask"]),
                ("classify", KWARGS[family] | CLASSES[family], []),
            ):
                options = ["--kwargs", json.dumps(kwargs), *mask, "--name", f"{family}_{head}"]
                export_torch_stages.main([str(folder), *common, *options])
        monkeypatch.delitem(sys.modules, "their_models")
    return folder


def _case(folder, name):
    return next(case for case in read_manifest(folder) if case.name == name)


def _torch_arrays(arrays):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _inputs(data):
    return _torch_arrays({key.removeprefix("in/"): value for key, value in data.items() if key.startswith("in/")})


def _twin(case):
    twin = TWINS[case.family](**case.config)
    twin.load_state_dict(_torch_arrays(case.tensors()), strict=True)
    return twin.double()


@pytest.mark.parametrize("name", CASES)
def test_every_stage_is_there_and_has_a_noise_floor(exported, name):
    case = _case(exported, name)
    data = load_file(exported / "cases" / f"{name}.safetensors")
    stages = {key.removeprefix("f64/") for key in data if key.startswith("f64/")} - {"loss"}
    assert stages == STAGES[name]
    assert set(case.noise_floor) == stages
    assert all(0 <= error < 1e-4 for error in case.noise_floor.values())
    assert all(data[f"f64/{stage}"].dtype == np.float64 for stage in stages)
    finals = {"recon", "logits", "latent", "attention_scores"} & stages
    assert finals <= {key.removeprefix("f32/") for key in data if key.startswith("f32/")}


def test_the_manifest_states_family_and_configuration(exported):
    cases = read_manifest(exported)
    assert [case.name for case in cases] == CASES
    for case in cases:
        assert case.family == case.name.split("_")[0]
        assert KWARGS[case.family].keys() <= case.config.keys()
    # Defaults of the factory that the arguments leave open are stated too, and arguments win over them.
    assert _case(exported, "femba_pretrain").config["stride"] == [2, 16]
    assert _case(exported, "lumamba_pretrain").config["num_blocks"] == 2


def test_femba_gets_a_mask_and_no_montage(exported):
    pretrain, classify = (_case(exported, f"femba_{head}").data() for head in ("pretrain", "classify"))
    assert {key for key in pretrain if key.startswith("in/")} == {"in/x", "in/mask", "in/w_out"}
    assert {key for key in classify if key.startswith("in/")} == {"in/x", "in/mask", "in/w_out"}
    assert 0.3 < pretrain["in/mask"].mean() < 0.7
    assert not classify["in/mask"].any()


@pytest.mark.parametrize("name", CASES)
def test_the_written_weights_and_inputs_give_the_written_numbers(exported, name):
    case = _case(exported, name)
    data = case.data()
    twin = _twin(case)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in _inputs(data).items()}
    weight = inputs.pop("w_out")
    output = twin(**inputs)
    stored = data["f64/recon" if "f64/recon" in data else "f64/logits"]
    np.testing.assert_allclose(output.detach(), stored, rtol=0, atol=1e-13)
    np.testing.assert_allclose((output * weight).sum().item(), data["f64/loss"], rtol=1e-13)


@pytest.mark.parametrize("family", TWINS)
def test_gradients_are_the_slope_of_the_stored_loss(exported, family):
    """Central differences along random directions, in which every parameter's share of the slope is of order one."""
    case = _case(exported, f"{family}_pretrain")
    data = case.data()
    twin = _twin(case)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in _inputs(data).items()}
    weight = inputs.pop("w_out")
    stored = {key.removeprefix("grad/"): torch.from_numpy(x) for key, x in data.items() if key.startswith("grad/")}
    trainable = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert set(stored) == set(trainable)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        directions = {
            name: torch.randn(g.shape, generator=generator, dtype=torch.float64) / (g.norm() + 1.0)
            for name, g in stored.items()
        }
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):  # from the weights to one side, then to the other
                for name, parameter in trainable.items():
                    parameter += step * directions[name]
                ends.append(float((twin(**inputs) * weight).sum()))
            for name, parameter in trainable.items():
                parameter += 1e-5 * directions[name]
        expected = sum(float((stored[name] * directions[name]).sum()) for name in stored)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, expected, rtol=1e-6, atol=1e-6)


BESIDE = ("position", "encoding ", "gradients", "loss")  # lines of the check that are no stage


@pytest.mark.parametrize(
    ("name", "x64"),
    [
        *((name, False) for name in CASES),
        *((f"{family}_pretrain", True) for family in TWINS),
        *((f"{family}_classify", True) for family in ("luna", "femba")),
    ],
)
def test_our_model_gives_the_exported_stages_and_gradients(exported, name, x64):
    checks = check_case(_case(exported, name), x64=x64)
    assert {check.stage for check in checks if not check.stage.startswith(BESIDE)} == STAGES[name]
    assert not [check for check in checks if not check.passed]
    gradients = checks[-1]
    assert gradients.stage.startswith("gradients")
    assert bool(gradients.skipped) != x64
    if x64:
        assert gradients.tolerance == 1e-8


def test_numbers_that_are_not_those_of_the_weights_are_noticed(exported, tmp_path):
    case = _case(exported, "femba_classify")
    data = load_file(case.data_file)
    data["f64/block0.out"] += 1e-4
    changed = dataclasses.replace(case, data_file=tmp_path / "changed.safetensors")
    save_file(data, changed.data_file)
    assert [check.stage for check in check_case(changed) if not check.passed] == ["block0.out"]


def test_a_case_of_the_same_name_is_replaced_and_nothing_temporary_stays(tmp_path):
    torch.manual_seed(0)
    for blocks in (1, 2):
        model = FEMBA(seq_length=32, num_channels=2, embed_dim=2, exp=1, num_blocks=blocks)
        inputs = {"x": torch.randn(1, 2, 32)}  # without a mask: it gets one that hides nothing
        export_torch_stages.export(model, tmp_path, "mine", {"num_blocks": blocks}, inputs, runs=1)
    (case,) = read_manifest(tmp_path)
    assert case.config == {"num_channels": 2, "seq_length": 32, "num_blocks": 2}
    assert not case.data()["in/mask"].any()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["manifest.json", "mine.safetensors", "mine.safetensors"]


def test_linear_head_that_forgets_to_return_its_logits():
    """The published one: the activation's output stands for the missing result, but has no gradient to offer."""

    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.activation1 = nn.Linear(16, 3), nn.GELU()

        def forward(self, x):
            self.activation1(self.fc1(x.mean(1)))

    torch.manual_seed(0)
    model = LuMamba(num_queries=1, embed_dim=16, num_blocks=1, num_classes=3, classifier_option="linear")
    inputs = export_torch_stages.eeg_like_inputs("lumamba", 1, 3, 80)
    expected = export_torch_stages.run(model, "lumamba", inputs, torch.float64)
    forgetful = Forgetful()
    forgetful.load_state_dict(model.classifier.state_dict())
    model.classifier = forgetful
    stages = export_torch_stages.run(model, "lumamba", inputs, torch.float64)
    assert set(stages) == set(expected)
    torch.testing.assert_close(stages["logits"], expected["logits"])
    with pytest.raises(ValueError, match="forward returns none"):
        export_torch_stages.gradients(model, inputs)


def test_a_cache_filled_in_float32_does_not_reach_float64():
    """As in rotary_embedding_torch, which keeps the angles of its first run in a buffer."""

    class CachingRotary(export_torch_stages.RotaryEmbedding):
        def __init__(self, dim):
            super().__init__(dim)
            self.register_buffer("cached", None, persistent=False)

        def rotate_queries_or_keys(self, t):
            if self.cached is None:
                self.cached = torch.arange(t.shape[-2], dtype=t.dtype)[:, None] * self.freqs
            cos, sin, even, odd = self.cached.cos(), self.cached.sin(), t[..., 0::2], t[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    torch.manual_seed(0)
    model = LUNA(num_queries=1, embed_dim=16, depth=1, num_classes=2)
    inputs = export_torch_stages.eeg_like_inputs("luna", 1, 3, 400)
    expected = export_torch_stages.run(model, "luna", inputs, torch.float64)["latent"]
    model.get_submodule("blocks.0.attn").rotary_emb = CachingRotary(8)
    export_torch_stages.run(model, "luna", inputs, torch.float32)
    np.testing.assert_array_equal(export_torch_stages.run(model, "luna", inputs, torch.float64)["latent"], expected)


def test_installed_packages_are_left_alone_except_the_cuda_one(monkeypatch):
    _without_packages(monkeypatch)
    theirs = type(sys)("timm")
    monkeypatch.setitem(sys.modules, "timm", theirs)
    monkeypatch.setitem(sys.modules, "mamba_ssm", type(sys)("mamba_ssm"))
    export_torch_stages.install_plain_packages()
    assert sys.modules["timm"] is theirs
    assert "timm.layers" not in sys.modules
    assert sys.modules["mamba_ssm"].Mamba is export_torch_stages.Mamba
    assert sys.modules["mamba_ssm.modules.mamba_simple"].Mamba is export_torch_stages.Mamba


@pytest.mark.parametrize("family", TWINS)
def test_family_by_parameter_names(family):
    with torch.device("meta"):
        names = list(TWINS[family](num_classes=2).state_dict())
    assert export_torch_stages.recognise_family(names) == family
    with pytest.raises(ValueError, match="not those of one of lumamba, luna, femba"):
        export_torch_stages.recognise_family([f"model.{name}" for name in names])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--factory", "models.LUNA"], "expected module:name, such as models.LUNA:LUNA"),
        (["--factory", "torch.nn:Linear", "--kwargs", '{"in_features": 2, "out_features": 2}'], "give --family"),
        (["--factory", "torch_luna:LUNA", "--family", "eegnet"], "invalid choice: 'eegnet'"),
        (["--factory", "torch_femba:FEMBA", "--kwargs", '{"embed_dim": 1}', "--name", "../x"], "cannot name a case"),
        (["--factory", "torch_femba:FEMBA", "--inputs", "nowhere"], "nowhere cannot be read as a safetensors file"),
        (["--factory", "torch_femba:FEMBA", "--weights", __file__], "cannot be read as a safetensors file"),
        (["--factory", "torch_luna:LUNA", "--weights", STORED_WEIGHTS], "does not fit the model"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    _without_packages(monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        export_torch_stages.main([str(tmp_path / "parity"), *arguments])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "parity").exists()
