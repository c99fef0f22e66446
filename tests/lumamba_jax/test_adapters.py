"""Low-rank adapters: nothing at the start, only A, B and the head move, what is exported is a plain model."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train
from configs import from_mapping, load
from data_pipeline.montages import named_montage
from data_pipeline.store import StoreInfo, create_store
from lumamba_jax import hlo_costs, training
from lumamba_jax.adapters import (
    NO_ADAPTERS,
    AdapterConfig,
    abstract_adapted,
    adapted_layers,
    effective_kernel,
    is_adapter,
    merged,
    with_adapters,
)
from lumamba_jax.architectures import ModelConfig, abstract_model
from lumamba_jax.checkpoint import TrainCheckpoints, load_pretrained, named_leaves, save_pretrained
from lumamba_jax.femba import FembaConfig
from lumamba_jax.flops import forward_flops
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.optimizer import OptimizerConfig, base_rates, make_optimizer
from lumamba_jax.sharding import MeshConfig, make_mesh, to_global
from lumamba_jax.tasks import TaskConfig, make_task, merging_flops, step_flops

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"embed_dim": 16, "num_queries": 2, "num_heads": 2, "num_blocks": 1, "dropout": 0.0}
LUMAMBA = LuMambaConfig(**SIZES, d_state=4, head="linear", num_outputs=2)
LUNA = LunaConfig(**SIZES, head="linear", num_outputs=2)
FEMBA = FembaConfig(num_channels=4, num_samples=160, embed_dim=8, num_blocks=1, expand=2, d_state=4, head="linear",
                    num_outputs=2)  # fmt: skip
FAMILY = pytest.mark.parametrize("model", [LUMAMBA, LUNA, FEMBA], ids=lambda model: model.architecture)
RANK_3 = AdapterConfig(rank=3, alpha=6.0)
CLASSIFY = TaskConfig(kind="classify")


def make_batch(step: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Noise of 4 channels and 4 patches, with labels."""
    rng = np.random.default_rng(step)
    return {
        "signal": (20 * rng.standard_normal((rows, 4, 160))).astype(np.float32),
        "locations": (0.1 * rng.standard_normal((rows, 4, 3))).astype(np.float32),
        "channel_ids": np.zeros((rows, 4), np.int32),
        "channel_mask": np.ones((rows, 4), bool),
        "patch_mask": np.ones((rows, 4), bool),
        "window_mask": np.ones(rows, bool),
        "window_id": np.arange(rows, dtype=np.int32),
        "label": rng.integers(2, size=rows).astype(np.int32),
    }


def some_params(model: ModelConfig) -> nnx.State:
    """Numbers for every parameter, without compiling the initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), abstract_model(model)[1])


@functools.partial(jax.jit, static_argnames=("model", "adapters"))
def logits(params: nnx.State, model: ModelConfig, adapters: AdapterConfig = NO_ADAPTERS) -> jax.Array:
    """Of one batch, by the model of a train state's parameters."""
    batch = make_batch(0)
    return nnx.merge(abstract_model(model)[0], merged(params, adapters))(batch["signal"], batch["locations"]).logits


@functools.cache
def build_run(devices: int = 1, fsdp: int = 1, micro: int = 8):
    mesh = make_mesh(MeshConfig(fsdp=fsdp, devices=devices))
    config = OptimizerConfig(lr=1e-2, eps=1e-3, warmup_epochs=0, schedule="constant", clip_grad_norm=1.0)
    trains = training.trained_parameters(freeze_encoder=False, adapters=RANK_3)
    params = abstract_adapted(LUMAMBA, RANK_3)
    optimizer = make_optimizer(config, params, total_steps=100, max_epochs=1, trainable=trains)
    task = make_task(CLASSIFY, LUMAMBA)
    step = training.make_train_step(LUMAMBA, task, optimizer, mesh, seed=7, adapters=RANK_3, micro_batch=micro)
    return mesh, optimizer, step


def run(step, state, mesh, start: int, stop: int):
    losses = []
    for k in range(start, stop):
        state, metrics = step(state, to_global(make_batch(k), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def trained():
    """The state before and after four steps on one device, and the losses."""
    mesh, optimizer, step = build_run()
    state = training.init_state(LUMAMBA, optimizer, mesh, seed=3, adapters=RANK_3)
    before = jax.device_get(state)
    state, losses = run(step, state, mesh, 0, 4)
    return before, jax.device_get(state), losses


@FAMILY
def test_at_the_start_the_model_computes_what_it_did_bit_for_bit(model):
    params = some_params(model)
    adapted = with_adapters(params, model, RANK_3, seed=2)
    assert [name for name in named_leaves(adapted) if is_adapter(name)]
    for name, leaf in named_leaves(merged(adapted, RANK_3)).items():
        np.testing.assert_array_equal(leaf, named_leaves(params)[name], err_msg=name)
    np.testing.assert_array_equal(logits(adapted, model, RANK_3), logits(params, model))


@FAMILY
def test_default_targets_are_the_projections_of_the_blocks(model):
    ends = {layer.split("/", 2)[2] for layer in adapted_layers(model, RANK_3)}
    both = {f"mamba/{direction}/{name}" for direction in ("fwd", "rev") for name in ("in_proj", "out_proj")}
    assert ends == ({"attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"} if model is LUNA else both)


def test_effective_kernels_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 7), (5, 2), (2, 7)))
    found = effective_kernel(jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b), AdapterConfig(rank=2, alpha=3.0))
    np.testing.assert_allclose(found, kernel + 1.5 * a @ b, rtol=1e-5, atol=1e-6)


def test_a_has_variance_one_over_its_inputs_and_depends_on_seed_and_layer_alone():
    wide = LUMAMBA.replace(embed_dim=64, num_queries=4)
    params = some_params(wide)
    rank_8, more = AdapterConfig(rank=8), AdapterConfig(rank=8, targets=("mamba", "^unifier/ffn"))
    first, second, other = (
        named_leaves(with_adapters(params, wide, config, seed=seed))
        for config, seed in ((rank_8, 5), (more, 5), (rank_8, 6))
    )
    name = "adapters/blocks/0/mamba/fwd/in_proj/A"
    np.testing.assert_array_equal(first[name], second[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first[name.replace("fwd", "rev")])
    assert np.std(np.asarray(first[name])) == pytest.approx(256**-0.5, rel=0.06)


def test_only_adapters_and_head_move(trained):
    before, after, _ = trained
    was, now = named_leaves(before.params), named_leaves(after.params)
    for name in was:
        moves = is_adapter(name) or training.is_head(name)
        assert (was[name].tobytes() != now[name].tobytes()) == moves, name


def test_nothing_is_kept_for_what_does_not_move(trained):
    _, after, _ = trained
    moving = {name for name in named_leaves(after.params) if is_adapter(name) or training.is_head(name)}
    kept = [name for name, leaf in named_leaves(after.opt_state).items() if leaf.ndim]
    assert len(kept) == 2 * len(moving)  # Adam's two moments
    assert all(any(name.endswith(path) for path in moving) for name in kept)


def test_two_devices_in_blocks_equal_one_and_send_no_gradient_of_the_encoder(trained, monkeypatch):
    before, after, losses = trained
    monkeypatch.setattr("lumamba_jax.sharding._MIN_SPLIT_SIZE", 128)  # so that kernels of the micro model are split
    mesh, optimizer, step = build_run(devices=2, fsdp=2, micro=2)
    state = training.init_state(LUMAMBA, optimizer, mesh, seed=3, adapters=RANK_3)
    split = {name: not leaf.sharding.is_fully_replicated for name, leaf in named_leaves(state.params).items()}
    assert any(split.values())
    assert not any(split[name] for name in split if is_adapter(name))
    compiled = step.lower(state, to_global(make_batch(0), mesh)).compile()
    state, found = run(compiled, state, mesh, 0, 4)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    collectives = hlo_costs.collectives(hlo_costs.parse_program(compiled.as_text()))
    sums = [c for c in collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert sums
    sizes = {name: leaf.nbytes for name, leaf in named_leaves(before.params).items()}
    trained_bytes = sum(size for name, size in sizes.items() if is_adapter(name) or training.is_head(name))
    assert trained_bytes <= sum(c.size * c.count for c in sums) < trained_bytes + 1024  # and scalars
    assert trained_bytes + 1024 < sum(sizes.values()) / 4
    for name, value in named_leaves(after.params).items():
        np.testing.assert_allclose(named_leaves(state.params)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_resumed_equals_unbroken_bit_for_bit(trained, tmp_path):
    mesh, optimizer, step = build_run()
    state, first = run(step, training.init_state(LUMAMBA, optimizer, mesh, seed=3, adapters=RANK_3), mesh, 0, 2)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
    with TrainCheckpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(training.abstract_state(LUMAMBA, optimizer, mesh, adapters=RANK_3))
    state, second = run(step, state, mesh, 2, 4)
    assert first + second == trained[2]
    for name, value in named_leaves(trained[1]).items():
        np.testing.assert_array_equal(np.asarray(named_leaves(state)[name]), value, err_msg=name)


def test_the_exported_model_is_plain_and_predicts_the_same(trained, tmp_path):
    _, after, _ = trained
    mesh = make_mesh(MeshConfig(devices=1))
    plain = training.make_merge(LUMAMBA, RANK_3, mesh)(after.params)
    save_pretrained(tmp_path / "model", LUMAMBA, plain, {})
    config, params, _ = load_pretrained(tmp_path / "model")
    assert config == LUMAMBA
    expected = logits(after.params, LUMAMBA, RANK_3)
    np.testing.assert_allclose(logits(params, config), expected, atol=1e-6)
    unadapted = [leaf * (not is_adapter(name)) for name, leaf in named_leaves(after.params).items()]
    base = jax.tree.unflatten(jax.tree.structure(after.params), unadapted)
    assert np.abs(logits(base, LUMAMBA, RANK_3) - expected).max() > 1e-3  # the adapters have learnt something


def test_adapters_have_the_full_rate():
    config = OptimizerConfig(lr=1.0, layerwise_decay=0.5)
    rates = base_rates(config.resolve("finetune"), abstract_adapted(LUMAMBA, RANK_3))
    assert {rate for name, rate in rates.items() if is_adapter(name)} == {1.0}
    assert rates["blocks/0/mamba/fwd/in_proj/kernel"] == 0.5


def test_flops_of_a_step_count_the_way_back_from_the_head_to_the_first_adapter():
    window = (4, 160)
    tokens, unification, temporal, head = forward_flops(LUMAMBA, *window).values()
    forward = tokens + unification + temporal + head
    blocks = adapted_layers(LUMAMBA, RANK_3)
    below = adapted_layers(LUMAMBA, AdapterConfig(rank=3, targets=("unifier/attention", "out_proj")))
    assert step_flops(CLASSIFY, LUMAMBA, *window, frozen_encoder=True) == forward + 2 * head
    assert step_flops(CLASSIFY, LUMAMBA, *window, adapted=blocks) == forward + temporal + 2 * head
    assert step_flops(CLASSIFY, LUMAMBA, *window, adapted=below) == 2 * forward - tokens + head
    assert merging_flops(LUMAMBA, *window, blocks) == temporal


# --- refused in one sentence ---


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AdapterConfig(rank=2, targets=("mamba", "out_projection")), r"'out_projection' is no linear layer.*out_proj"),
        (AdapterConfig(rank=2, targets=("^head/",)), r"'\^head/' is no linear layer of the LuMamba encoder"),
        (AdapterConfig(rank=33), r"rank 33 is more than the kernel \(32, 128\) of blocks/0/mamba/fwd/in_proj"),
    ],
)
def test_targets_and_ranks_that_do_not_fit_the_model_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        adapted_layers(LUMAMBA, config)


def test_contradictory_configurations_are_refused():
    for values, said in (
        ({"rank": -1}, "rank must be 0"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be positive"),
        ({"rank": 2, "targets": ["("]}, "is not a regular expression"),
        ({"rank": 2}, "adapters.rank to 0 for task 'pretrain'"),
    ):
        with pytest.raises(ValueError, match=said):
            from_mapping({"adapters": values}, load("debug"))


# --- the command line ---


def call(*words: object) -> subprocess.CompletedProcess:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **flags}, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


def write_windows(path: Path) -> None:
    """Windows of four subjects with two classes."""
    rng, montage = np.random.default_rng(0), named_montage("siena-29")
    with create_store(path, StoreInfo(256.0, 160, stride_seconds=0.625, class_names=["rest", "task"])) as writer:
        for subject in range(4):
            signal = rng.normal(0, 20, (6, len(montage), 160))
            names = {"subject": f"S{subject}", "recording": f"S{subject}_1", "start_samples": 160 * np.arange(6)}
            writer.add(f"g{subject}", signal, montage, **names, labels=np.arange(6) % 2)


def test_a_run_from_pretrained_weights_to_scores(tmp_path, monkeypatch, capsys):
    model = load("debug").model.replace(head="none", num_outputs=None)
    source = some_params(model)
    save_pretrained(tmp_path / "pretrained", model, source, {})
    write_windows(tmp_path / "windows.h5")
    words = ("train.py", "debug", "--data.train", tmp_path / "windows.h5", "--data.test-fraction", "0.25",
             "--loader.batch-size", "4", "--task.kind", "classify", "--model.head", "linear",
             "--trainer.init-from", tmp_path / "pretrained", "--trainer.baseline", "false",
             "--trainer.run-dir", tmp_path / "run", "--adapters.rank", "2")  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--adapters.targets", "in_projection"])
    assert train.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'in_projection' is no linear layer" in said
    assert not (tmp_path / "run").exists()
    done = call(*words)
    assert "parameters are trained, with adapters of rank 2 on 4 layers" in done.stdout
    config, params, metadata = load_pretrained(tmp_path / "run")
    assert metadata["provenance"]["adapters"]["rank"] == 2
    assert metadata["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    best, given = named_leaves(params), named_leaves(source)
    layers = adapted_layers(config, AdapterConfig(rank=2))
    moved = {name for name in given if not np.array_equal(best[name], given[name])}
    assert moved == {f"{layer}/kernel" for layer in layers}
    assert "balanced_accuracy" in call("eval.py", "metrics", tmp_path / "run", "--resamples", "20").stdout
