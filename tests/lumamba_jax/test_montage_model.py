"""Invariances of LuMamba and LUNA: channel order, batch mates, exact padding, dtypes; and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import LuMamba, LuMambaConfig, LunaConfig
from lumamba_jax.architectures import build
from lumamba_jax.tokens import position_encoding

# Half the compile time; the invariances hold at any optimisation level.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=2, dropout=0.0, head_dropout=0.0)
LUNA = LunaConfig(embed_dim=16, num_queries=2, num_blocks=2, dropout=0.0, head_dropout=0.0)
HEADS = {
    "reconstruction": MICRO,
    "attention": MICRO.replace(head="attention", num_outputs=3),
    "mamba": MICRO.replace(head="mamba", num_outputs=3),
    "mamba per channel": MICRO.replace(head="mamba", num_outputs=4, output_channels=5),
    "linear": MICRO.replace(head="linear", num_outputs=3),
    "ew_multiply": MICRO.replace(bidirectional="ew_multiply"),
    "unidirectional": MICRO.replace(bidirectional="none"),
    "LUNA": LUNA,
    "LUNA, attention": LUNA.replace(head="attention", num_outputs=3),
    "associative": MICRO.replace(scan_implementation="associative"),
}


def _batch(batch=3, channels=5, samples=200, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "signal": rng.normal(size=(batch, channels, samples)).astype(np.float32),
        "locations": rng.normal(size=(batch, channels, 3)).astype(np.float32) * 0.1,
        "channel_ids": rng.integers(0, 90, (batch, channels)).astype(np.int32),
        "mask": np.repeat(rng.random((batch, channels, samples // 40)) < 0.4, 40, axis=2),
    }


def _perturbed(config, seed=0):
    # Norm scales of one and zero biases would hide a norm that ignores its parameters.
    graphdef, params = nnx.split(build(config, seed=seed))
    rng = np.random.default_rng(seed + 1)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    return nnx.merge(graphdef, params)


def _outputs(out):
    return {k: np.asarray(v, np.float64) for k, v in out._asdict().items() if v is not None}


def _jitted(config):
    """The model as one compiled function of its inputs (far quicker than running it operation by operation)."""
    graphdef, params = nnx.split(_perturbed(config))
    return _jit(lambda **x: nnx.merge(graphdef, params)(**x))


def _assert_close(actual, expected, name, atol=1e-5):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=atol * scale, err_msg=name)


@pytest.mark.parametrize("name", HEADS)
def test_channel_order_does_not_matter(name):
    model, x = _jitted(HEADS[name]), _batch()
    order = np.random.default_rng(5).permutation(5)
    plain = _outputs(model(**x))
    permuted = _outputs(model(**{k: v[:, order] for k, v in x.items()}))
    _assert_close(permuted["latent"], plain["latent"], "latent")
    _assert_close(permuted["attention_scores"], plain["attention_scores"][..., order], "attention scores")
    if "reconstruction" in plain:
        _assert_close(permuted["reconstruction"], plain["reconstruction"][:, order], "reconstruction")
    else:
        _assert_close(permuted["logits"], plain["logits"], "logits")


@pytest.mark.parametrize("name", HEADS)
def test_padded_channels_and_time_equal_the_sample_alone(name):
    """One compiled program serves a batch of montages and lengths; each row equals the row alone."""
    model = _jitted(HEADS[name])
    sizes = [(5, 200), (1, 120)]
    alone = [_batch(1, channels, samples, seed=i) for i, (channels, samples) in enumerate(sizes)]
    rng = np.random.default_rng(9)
    padded = {k: [] for k in ("signal", "locations", "channel_ids", "mask", "channel_mask", "patch_mask")}
    for x, (channels, samples) in zip(alone, sizes, strict=True):
        row = {
            "signal": rng.normal(size=(7, 280)).astype(np.float32) * 100,  # padding holds garbage, not zeros
            "locations": rng.normal(size=(7, 3)).astype(np.float32),
            "channel_ids": np.zeros(7, np.int32),
            "mask": np.zeros((7, 280), bool),
        }
        row["signal"][:channels, :samples] = x["signal"][0]
        row["mask"][:channels, :samples] = x["mask"][0]
        row["locations"][:channels], row["channel_ids"][:channels] = x["locations"][0], x["channel_ids"][0]
        row["channel_mask"], row["patch_mask"] = np.arange(7) < channels, np.arange(7) < samples // 40
        for key, value in row.items():
            padded[key].append(value)
    together = _outputs(model(**{k: np.stack(v) for k, v in padded.items()}))
    for i, (x, (channels, samples)) in enumerate(zip(alone, sizes, strict=True)):
        expected = _outputs(model(**x))
        patches = samples // 40
        _assert_close(together["latent"][i, :patches], expected["latent"][0], f"latent {i}")
        scores = together["attention_scores"][i, :patches]
        _assert_close(scores[..., :channels], expected["attention_scores"][0], f"scores {i}")
        assert not scores[..., channels:].any(), "padded channels got attention"
        if "reconstruction" in expected:
            recon = together["reconstruction"][i, :channels, :samples]
            _assert_close(recon, expected["reconstruction"][0], f"reconstruction {i}")
        else:
            _assert_close(together["logits"][i], expected["logits"][0], f"logits {i}")


@pytest.mark.parametrize("config", [MICRO, LUNA], ids=["LuMamba", "LUNA"])
def test_nan_in_the_padding_does_not_leak(config):
    model, x = _jitted(config), _batch(1)
    expected = _outputs(model(**x))["reconstruction"]
    signal = np.full((1, 6, 240), np.nan, np.float32)
    signal[:, :5, :200] = x["signal"]
    padded = model(
        signal=signal,
        locations=np.pad(x["locations"], ((0, 0), (0, 1), (0, 0))),
        channel_ids=np.pad(x["channel_ids"], ((0, 0), (0, 1))),
        mask=np.pad(x["mask"], ((0, 0), (0, 1), (0, 40))),
        channel_mask=np.arange(6)[None] < 5,
        patch_mask=np.arange(6)[None] < 5,
    )
    _assert_close(np.asarray(padded.reconstruction)[:, :5, :200], expected, "reconstruction")


def test_batch_mates_do_not_matter():
    model, x = _jitted(MICRO), _batch(4)
    together = _outputs(model(**x))
    for i in range(4):
        single = _outputs(model(**{k: v[i : i + 1] for k, v in x.items()}))
        for key, value in single.items():
            _assert_close(together[key][i : i + 1], value, f"{key} of row {i}")


@pytest.mark.parametrize("config", [MICRO, LUNA], ids=["LuMamba", "LUNA"])
def test_gradients_do_not_feel_padding(config):
    model, x = _perturbed(config), _batch(1, channels=3, samples=120)
    graphdef, params = nnx.split(model)

    def loss(params, arrays, channels, samples):
        out = nnx.merge(graphdef, params)(**arrays)
        return jnp.square(out.reconstruction[:, :channels, :samples]).sum()

    wide = {
        "signal": np.pad(x["signal"], ((0, 0), (0, 2), (0, 80))),
        "locations": np.pad(x["locations"], ((0, 0), (0, 2), (0, 0))),
        "channel_ids": np.pad(x["channel_ids"], ((0, 0), (0, 2))),
        "mask": np.pad(x["mask"], ((0, 0), (0, 2), (0, 80))),
        "channel_mask": np.arange(5)[None] < 3,
        "patch_mask": np.arange(5)[None] < 3,
    }
    gradient = _jit(jax.grad(loss), static_argnums=(2, 3))
    alone, padded = gradient(params, x, 3, 120), gradient(params, wide, 3, 120)
    for (path, a), (_, b) in zip(nnx.to_flat_state(alone), nnx.to_flat_state(padded), strict=True):
        assert np.isfinite(b[...]).all(), path
        np.testing.assert_allclose(b[...], a[...], atol=2e-5 * max(1.0, float(np.abs(a[...]).max())), err_msg=str(path))


def test_masked_content_reaches_the_output_only_through_the_statistics():
    """A property of the published model: the mask token replaces the patch after the group norms."""
    model, x = _jitted(MICRO), _batch(1)
    louder = {**x, "signal": np.where(x["mask"], 3 * x["signal"], x["signal"])}
    moved = np.abs(_outputs(model(**louder))["latent"] - _outputs(model(**x))["latent"]).max()
    assert 1e-4 < moved < 10


def test_bfloat16_stays_near_float32():
    x = _batch()
    exact = _outputs(_jitted(MICRO)(**x))
    low = MICRO.replace(compute_dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(LuMamba(low, rngs=nnx.Rngs(0))))} == {jnp.dtype("float32")}
    out = _jitted(low)(**x)
    assert out.latent.dtype == jnp.bfloat16
    assert out.attention_scores.dtype == jnp.float32
    for key, value in _outputs(out).items():
        error = np.sqrt(np.mean((value - exact[key]) ** 2) / np.mean(exact[key] ** 2))
        assert error < 0.03, (key, error)


def test_dropout_needs_rngs_and_is_reproducible():
    config = MICRO.replace(dropout=0.3)
    graphdef, params = nnx.split(LuMamba(config, rngs=nnx.Rngs(0)))
    x = _batch()
    still = [np.asarray(_jit(lambda: nnx.merge(graphdef, params)(**x).latent)()) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    train = _jit(lambda seed: nnx.merge(graphdef, params)(**x, rngs=nnx.Rngs(dropout=jax.random.key(seed))).latent)
    first, again, other = (np.asarray(train(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - still[0]).max() > 1e-3


def test_stochastic_depth_drops_branches_of_whole_windows_in_training_only():
    config = LUNA.replace(drop_path=0.6, head="none")
    graphdef, params = nnx.split(_perturbed(config))
    x = {key: value for key, value in _batch(8).items() if key in ("signal", "locations")}

    @_jit
    def run(seed):
        model = nnx.merge(graphdef, params)
        return model(**x).latent, model(**x, rngs=nnx.Rngs(dropout=jax.random.key(seed))).latent

    plain, first = map(np.asarray, run(1))
    again, other = np.asarray(run(1)[1]), np.asarray(run(2)[1])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_allclose(plain, _outputs(_jitted(config.replace(drop_path=0.0))(**x))["latent"], atol=1e-5)
    # 0.4^4 of the windows keep every branch, each then 1 / 0.4 as large: no window may equal the plain one
    assert all(np.abs(first[i] - plain[i]).max() > 1e-3 for i in range(8))


def test_rotary_frequencies_are_stored_but_get_no_gradient():
    graphdef, params = nnx.split(_perturbed(LUNA))
    x = _batch(1)
    gradient = _jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(**x).latent).sum()))(params)
    leaves = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}
    fixed = [name for name in leaves if name.endswith("rotary_frequencies")]
    assert len(fixed) == 2
    assert not any(leaves[name].any() for name in fixed)
    assert leaves["blocks/0/attn/qkv/kernel"].any()


def test_positions_encoded_on_the_host_equal_those_of_the_device():
    model, x = _jitted(MICRO), _batch()
    encoding = position_encoding(x["locations"], MICRO.embed_dim)
    _assert_close(_outputs(model(**x, position_encoding=encoding))["latent"], _outputs(model(**x))["latent"], "latent")


def test_unknown_channel_is_reconstructed_from_its_position():
    model, x = _jitted(MICRO), _batch(1)
    unknown = model(**{**x, "channel_ids": np.full((1, 5), -1, np.int32)}).reconstruction
    nameless = model(**{k: v for k, v in x.items() if k != "channel_ids"}).reconstruction
    np.testing.assert_allclose(unknown, nameless, atol=1e-6)
    assert np.abs(unknown - model(**x).reconstruction).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": np.zeros((3, 5, 210), np.float32)}, "not a multiple of the patch size 40"),
        ({"signal": np.zeros((5, 200), np.float32)}, r"must be \(batch, channels, samples\)"),
        ({"locations": np.zeros((3, 4, 3), np.float32)}, "locations has shape"),
        ({"mask": np.zeros((3, 5, 160), bool)}, "mask has shape"),
        ({"channel_mask": np.ones((3, 6), bool)}, "channel_mask has shape"),
        ({"patch_mask": np.ones((3, 6), bool)}, "patch_mask has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LuMamba(MICRO, rngs=nnx.Rngs(0))(**{**_batch(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 24}, "multiple of 16"),
        ({"patch_size": 50}, "multiple of 4"),
        ({"head": "attention"}, "needs num_outputs"),
        ({"head": "mlp"}, "head 'mlp' is unknown"),
        ({"num_blocks": 0}, "at least 1"),
        ({"head": "linear", "num_outputs": 2, "output_channels": 3}, "mamba head only"),
    ],
)
def test_contradictory_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MICRO.replace(**change)


def test_float64_without_x64_is_refused():
    with pytest.raises(ValueError, match="jax_enable_x64"):
        LuMamba(MICRO.replace(compute_dtype="float64"), rngs=nnx.Rngs(0))
