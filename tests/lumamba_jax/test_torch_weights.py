"""The key map is complete and reversible, architectures are recognised, and damaged files are refused as a whole."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert_torch_weights import main
from lumamba_jax.architecture_summary import count_parameters, published_size
from lumamba_jax.architectures import SIZES, build
from lumamba_jax.checkpoint import abstract_params, load_pretrained, named_leaves
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.parity import read_manifest
from lumamba_jax.torch_architecture import Overrides, infer_config
from lumamba_jax.torch_files import read_tensors
from lumamba_jax.torch_keys import LAYOUTS, key_map, unread
from lumamba_jax.torch_weights import convert_tensors, load_torch_weights, replace_head, to_torch_tensors

PARITY = Path(__file__).parent.parent / "parity" / "golden"
STATE = PARITY / "state" / "lumamba_micro_unidir.safetensors"
SMALL = {
    "LuMamba": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=2, vocab_size=7),
    "LUNA": LunaConfig(embed_dim=16, num_queries=2, num_blocks=2, vocab_size=7, mlp_ratio=2.0),
    "FEMBA": FembaConfig(num_channels=6, num_samples=128, embed_dim=4, num_blocks=2, expand=2, decoder_kernel=(3, 5)),
}
CLASSIFIERS = {"LuMamba": ("attention", "mamba", "linear"), "LUNA": ("attention",), "FEMBA": ("mamba", "linear")}


@pytest.fixture(scope="module")
def tensors():
    """A one-block pre-training model, in float32."""
    path = PARITY / "state" / "lumamba_micro_1block_ewmul.safetensors"
    return {name: tensor.astype(np.float32) for name, tensor in read_tensors([path]).items()}


def _same(left, right):
    left, right = named_leaves(left), named_leaves(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def _published_shapes(config):
    leaves = named_leaves(abstract_params(config))
    shapes = {
        row.torch_name: LAYOUTS[row.layout].to_torch(np.broadcast_to(np.float32(0), leaves[row.path].shape)).shape
        for row in key_map(config)
    }
    return shapes | dict.fromkeys(unread(config), ())


def _with_head(architecture, head):
    classifies = head not in ("reconstruction", "none")
    return SMALL[architecture].replace(head=head, num_outputs=3 if classifies else None)


ARCHITECTURES_AND_HEADS = [
    (name, head) for name, classifiers in CLASSIFIERS.items() for head in ("reconstruction", "none", *classifiers)
]


@pytest.mark.parametrize(("architecture", "head"), ARCHITECTURES_AND_HEADS)
def test_key_map_covers_every_parameter_once(architecture, head):
    config = _with_head(architecture, head)
    for variant in (config, config.replace(bidirectional="none")) if architecture != "LUNA" else (config,):
        rows = key_map(variant)
        assert sorted(row.path for row in rows) == sorted(named_leaves(abstract_params(variant)))
        assert len({row.torch_name for row in rows}) == len(rows)


@pytest.mark.parametrize(("architecture", "head"), ARCHITECTURES_AND_HEADS)
def test_architecture_and_sizes_are_recognised_from_names_and_shapes(architecture, head):
    config = _with_head(architecture, head)
    found, _ = infer_config(_published_shapes(config))
    ignored = {} if head == "reconstruction" else {"vocab_size": 90} if architecture != "FEMBA" else {}
    if architecture == "FEMBA" and head != "reconstruction":
        ignored = {"decoder_kernel": (31, 31)}
    assert found == config.replace(**ignored)


@pytest.mark.parametrize(("architecture", "head"), ARCHITECTURES_AND_HEADS)
def test_ours_to_torch_and_back_is_bit_exact(architecture, head):
    config = _with_head(architecture, head)
    params = nnx.split(build(config, seed=3))[1]
    tensors = to_torch_tensors(config, params)
    assert {name: tensor.shape for name, tensor in tensors.items()} == _published_shapes(config)
    _same(convert_tensors(tensors).params, params)


def test_names_shapes_and_sizes_of_every_published_variant(golden_dir):
    variants = json.loads((golden_dir / "tables" / "state_dicts.json").read_text())
    assert len(variants) == 21
    for name, variant in variants.items():
        shapes = {key: tuple(shape) for key, shape in variant["keys"].items()}
        per_channel = 22 if name.endswith(("_mc", "_mmc")) else None
        config, _ = infer_config(shapes, overrides=Overrides(output_channels=per_channel))
        assert _published_shapes(config) == shapes, name
        assert sum(count_parameters(config).values()) == variant["total_parameters"], name


@pytest.mark.parametrize(
    ("size", "head", "millions"),
    [
        ("LuMamba tiny", "mamba", "4.6"),
        ("LUNA base", "attention", "7.1"),
        ("LUNA large", "attention", "43.1"),
        ("LUNA huge", "attention", "311.8"),
        ("FEMBA tiny", "reconstruction", "7.8"),
        ("FEMBA large", "mamba", "77.8"),
        ("FEMBA huge", "mamba", "386.2"),
    ],
)
def test_published_roundings(size, head, millions):
    config = SIZES[size].replace(head=head, num_outputs=None if head == "reconstruction" else 2)
    assert f"{sum(count_parameters(config).values()) / 1e6:.1f}" == millions
    assert published_size(config) == size


def test_every_stored_state_converts_with_the_sizes_of_its_manifest():
    for case in read_manifest(PARITY):
        if case.family != "lumamba":
            continue
        config, stated = case.convert().config, case.config
        assert (config.patch_size, config.num_queries, config.embed_dim, config.num_blocks, config.expand) == tuple(
            stated[name] for name in ("patch_size", "num_queries", "embed_dim", "num_blocks", "exp")
        )
        if case.name.endswith("mmc__c22_t200"):
            assert (config.output_channels, config.num_outputs) == (22, stated["num_classes"])
        elif stated["num_classes"]:
            assert (config.output_channels, config.num_outputs) == (None, stated["num_classes"])


def test_there_and_back_is_bit_exact(tensors):
    converted = convert_tensors(tensors)
    back = to_torch_tensors(converted.config, converted.params, kept=converted.kept, stored=converted.stored)
    assert back.keys() == tensors.keys()  # the tensor that no computation reads included
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_stored_dtype_and_prefix_change_nothing(tensors, tmp_path, dtype, prefix):
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file({prefix + name: tensor for name, tensor in rounded.items()}, tmp_path / "half.safetensors")
    converted = load_torch_weights(tmp_path / "half.safetensors")
    _same(converted.params, convert_tensors({n: t.astype(np.float32) for n, t in rounded.items()}).params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted.params))


def test_several_files_are_one_model_and_duplicates_are_refused(tensors, tmp_path):
    names = sorted(tensors)
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / part)
    _same(load_torch_weights([tmp_path / "a", tmp_path / "b"]).params, convert_tensors(tensors).params)
    with pytest.raises(ValueError, match="occurs twice"):
        load_torch_weights([tmp_path / "a", tmp_path / "a"])


def test_every_problem_is_listed_at_once(tensors):
    damaged = dict(tensors)
    del damaged["norm_layers.0.bias"]
    del damaged["cross_attn.query_embed"]  # a tensor the sizes are read from
    damaged["decoder_head.extra.weight"] = np.zeros((2, 3), np.float32)
    damaged["mask_token"] = np.zeros((1, 1, 5), np.float32)
    damaged["freq_embed.frequency_to_embed.fc1.weight"] = tensors["freq_embed.frequency_to_embed.fc1.weight"].T.copy()
    damaged["mamba_blocks.0.mamba_fwd.D"] = tensors["mamba_blocks.0.mamba_fwd.D"].copy()
    damaged["mamba_blocks.0.mamba_fwd.D"][3:5] = np.nan, np.inf
    damaged["channel_emb.embeddings.weight"] = np.zeros(tensors["channel_emb.embeddings.weight"].shape, np.int64)
    with pytest.raises(ValueError, match=r"7 problem\(s\)") as error:
        convert_tensors(damaged, source="damaged.safetensors")
    text = str(error.value)
    for line in (
        "missing     norm_layers.0.bias (64,)",
        "missing     cross_attn.query_embed (1, 2, 32)",
        "unused      decoder_head.extra.weight (2, 3)",
        "misshapen   mask_token (1, 1, 5), expected (1, 1, 32)",
        "misshapen   freq_embed.frequency_to_embed.fc1.weight (42, 168), expected (168, 42)",
        "non-finite  mamba_blocks.0.mamba_fwd.D: 2 of 128 values",
        "not float   channel_emb.embeddings.weight is stored as int64",
    ):
        assert line in text


def test_what_is_not_visible_is_assumed_and_can_be_overridden(tensors):
    assumed = " ".join(convert_tensors(tensors).assumed)
    assert "num_heads is 2" in assumed
    assert '"ew_multiply"' in assumed
    told = convert_tensors(tensors, overrides=Overrides(num_heads=4, bidirectional="ew_multiply"))
    assert (told.config.num_heads, told.config.bidirectional, told.assumed) == (4, "ew_multiply", ())
    with pytest.raises(ValueError, match="contradicts the tensors, which hold 2 direction"):
        convert_tensors(tensors, overrides=Overrides(bidirectional="none"))
    with pytest.raises(ValueError, match="num_heads 5"):
        convert_tensors(tensors, overrides=Overrides(num_heads=5))


def test_a_new_head_keeps_the_encoder_and_says_what_changed(tensors):
    source = convert_tensors(tensors)
    classifier = replace_head(source, "attention", num_outputs=2)
    assert classifier.config.head == "attention"
    old, new = named_leaves(source.params), named_leaves(classifier.params)
    for name in new:
        if not name.startswith("head/"):
            np.testing.assert_array_equal(new[name], old[name])
    assert set(classifier.fresh) == {name for name in new if name.startswith("head/")}
    again, other = (replace_head(source, "attention", num_outputs=2, seed=seed) for seed in (0, 1))
    _same(again.params, classifier.params)
    assert not np.array_equal(named_leaves(other.params)["head/query"], new["head/query"])
    assert "decoder_head.norm.bias" in classifier.dropped
    assert all(name.startswith(("decoder_head.", "channel_emb.")) for name in classifier.dropped)


def test_what_is_none_of_the_family_is_named():
    with pytest.raises(ValueError, match=r"none of the family.*2 tensor"):
        infer_config({"a.b": (1,), "c": (2,)})
    with pytest.raises(ValueError, match="model width cannot be read"):
        infer_config({"blocks.0.attn.qkv_proj.weight": (3, 3), "cross_attn.query_embed": (1, 2, 16)} | _TOKENS_ONLY)


_TOKENS_ONLY = {
    "freq_embed.frequency_to_embed.fc1.bias": (168,),
    "cross_attn.ffn.fc1.bias": (64,),
}


def test_overrides_that_contradict_or_do_not_apply_are_refused():
    luna, femba = (_published_shapes(_with_head(name, "reconstruction")) for name in ("LUNA", "FEMBA"))
    with pytest.raises(ValueError, match="num_heads=4 contradicts the rotary frequencies"):
        infer_config(luna, overrides=Overrides(num_heads=4))
    with pytest.raises(ValueError, match="does not apply"):
        infer_config(luna, overrides=Overrides(bidirectional="add"))
    with pytest.raises(ValueError, match="does not apply"):
        infer_config(femba, overrides=Overrides(num_heads=2))
    with pytest.raises(ValueError, match="its tensors show 3 x 8"):
        infer_config(femba, overrides=Overrides(num_samples=640))
    overlapping, _ = infer_config(femba, overrides=Overrides(channel_stride=1, patch_stride=8))
    assert (overlapping.num_channels, overlapping.num_samples) == (4, 72)
    assert overlapping.grid == SMALL["FEMBA"].grid


def test_values_that_no_longer_fit_the_stored_dtype_are_written_in_float32(tensors):
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    converted = convert_tensors(half)
    leaves = named_leaves(converted.params)
    changed = {**leaves, "tokenizer/mask_token": leaves["tokenizer/mask_token"] + np.float32(1e-6)}
    params = jax.tree.unflatten(jax.tree.structure(converted.params), list(changed.values()))
    back = to_torch_tensors(converted.config, params, kept=converted.kept, stored=converted.stored)
    assert back["mask_token"].dtype == np.float32
    for name in back.keys() - {"mask_token"}:
        assert back[name].dtype == half[name].dtype
        assert back[name].tobytes() == half[name].tobytes()


# --- the command line ------------------------------------------------------------------------------------------------


def test_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    assert main([str(STATE), str(tmp_path / "out"), "--num-heads", "2"]) == 0
    out = capsys.readouterr().out
    assert "CC BY-ND 4.0" in out
    assert "cross_attn.temparature" in out
    config, params, metadata = load_pretrained(tmp_path / "out")
    expected = load_torch_weights(STATE)
    assert config == expected.config
    _same(params, expected.params)
    assert metadata["provenance"]["mapped"]["mask_token"] == "tokenizer/mask_token"
    assert str(tmp_path) not in json.dumps(metadata["provenance"])


def test_command_with_a_new_head_lists_dropped_and_fresh(tmp_path, capsys):
    arguments = ["--new-head", "linear", "--num-outputs", "2", "--dtype", "bfloat16"]
    assert main([str(STATE), str(tmp_path / "out"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "dropped  decoder_head.norm.weight" in out
    assert "fresh    head/fc1/kernel" in out
    config = load_pretrained(tmp_path / "out")[0]
    assert (config.head, config.num_outputs, config.compute_dtype) == ("linear", 2, "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not safetensors at all", "is neither safetensors nor a PyTorch checkpoint"),
        ("truncated", "truncated"),
    ],
)
def test_bad_files_end_with_status_2_and_write_nothing(tmp_path, capsys, content, message):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(STATE.read_bytes()[:5000] if content == "truncated" else content)
    assert main([str(path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not [p for p in tmp_path.iterdir() if p.name != "weights.safetensors"]
