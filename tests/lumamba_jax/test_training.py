"""The compiled steps: resumed = unbroken bit for bit, one device = eight, learning, warm start, freezing."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lumamba_jax import training
from lumamba_jax.checkpoint import TrainCheckpoints, abstract_params, named_leaves
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer
from lumamba_jax.sharding import MeshConfig, make_mesh, to_global
from lumamba_jax.tasks import TaskConfig, make_task

# Without dropout: its random numbers are most of what there is to compile. test_tasks.py covers its stream.
MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, dropout=0.0)
CLASSIFIER = MICRO.replace(head="linear", num_outputs=2)
PRETRAIN = TaskConfig(sigreg_slices=8, local_views=2, local_patches=1, global_views=1, global_patches=2)
CLASSIFY = TaskConfig(kind="classify")
STEPS = 5


def make_batch(step: int, *, rows: int = 16, channels: int = 3, patches: int = 4) -> dict[str, np.ndarray]:
    """Batch of a step: the class decides the frequency of a sine in noise; one row is filler, one is padded."""
    rng = np.random.default_rng(step)
    samples = patches * MICRO.patch_size
    label = rng.integers(2, size=rows).astype(np.int32)
    phase = rng.uniform(0, 2 * np.pi, (rows, channels, 1))
    wave = np.sin(2 * np.pi * (4 + 12 * label)[:, None, None] * np.arange(samples) / 160 + phase)
    batch = {
        "signal": (20 * wave + 5 * rng.standard_normal((rows, channels, samples))).astype(np.float32),
        "locations": (0.1 * rng.standard_normal((rows, channels, 3))).astype(np.float32),
        "channel_ids": rng.integers(-1, 90, (rows, channels)).astype(np.int32),
        "channel_mask": np.ones((rows, channels), bool),
        "patch_mask": np.ones((rows, patches), bool),
        "window_mask": np.arange(rows) < rows - 1,
        "window_id": np.arange(rows, dtype=np.int32),
        "label": label,
    }
    batch["channel_mask"][0, -1] = False
    batch["patch_mask"][0, -1] = False
    return batch


@functools.cache  # one compiled program per combination for the whole module
def build(
    model: LuMambaConfig,
    task: TaskConfig,
    mesh_config: MeshConfig,
    *,
    freeze: bool = False,
    lr: float = 1e-2,
    micro: int | None = None,
):
    mesh = make_mesh(mesh_config)
    # A large eps: the bias of attention keys has no gradient but rounding, which Adam would blow up to full steps.
    config = OptimizerConfig(lr=lr, eps=1e-3, warmup_epochs=0, schedule="constant", clip_grad_norm=1.0)
    trainable = training.is_head if freeze else None
    optimizer = make_optimizer(config, abstract_params(model), total_steps=100, max_epochs=1, trainable=trainable)
    program = make_task(task, model)
    step = training.make_train_step(model, program, optimizer, mesh, seed=7, freeze_encoder=freeze, micro_batch=micro)
    return mesh, optimizer, program, step


def run(step, state, mesh, start: int, stop: int):
    losses = []
    for k in range(start, stop):
        state, metrics = step(state, to_global(make_batch(k), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def unbroken():
    """Five pre-training steps on one device, the whole batch at once."""
    mesh, optimizer, _, step = build(MICRO, PRETRAIN, MeshConfig(devices=1), micro=16)
    state, losses = run(step, training.init_state(MICRO, optimizer, mesh, seed=3), mesh, 0, STEPS)
    return jax.device_get(state), losses


def test_resumed_equals_unbroken_bit_for_bit(unbroken, tmp_path):
    mesh, optimizer, _, step = build(MICRO, PRETRAIN, MeshConfig(devices=1), micro=16)
    state, first = run(step, training.init_state(MICRO, optimizer, mesh, seed=3), mesh, 0, 2)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
    with TrainCheckpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(training.abstract_state(MICRO, optimizer, mesh))
    state, second = run(step, state, mesh, int(state.step), STEPS)
    assert first + second == unbroken[1]
    expected = named_leaves(unbroken[0])
    found = named_leaves(state)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(found[name]), expected[name], err_msg=name)


@pytest.mark.slow
def test_eight_devices_in_blocks_equal_one_at_once(unbroken, monkeypatch):
    monkeypatch.setattr("lumamba_jax.sharding._MIN_SPLIT_SIZE", 128)  # so that kernels of the micro model are split
    mesh, optimizer, _, step = build(MICRO, PRETRAIN, MeshConfig(fsdp=2, devices=8), micro=1)
    state = training.init_state(MICRO, optimizer, mesh, seed=3)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    state, losses = run(step, state, mesh, 0, STEPS)
    np.testing.assert_allclose(losses, unbroken[1], rtol=1e-5)
    expected, found = named_leaves(unbroken[0].params), named_leaves(state.params)
    for name, value in expected.items():
        scale = np.abs(value).max()
        assert np.abs(np.asarray(found[name]) - value).max() <= 1e-5 * max(scale, 1e-2), name


def test_every_parameter_is_trained_by_the_mixed_objective(unbroken):
    mesh, optimizer, _, _ = build(MICRO, PRETRAIN, MeshConfig(devices=1), micro=16)
    before = named_leaves(jax.device_get(training.init_state(MICRO, optimizer, mesh, seed=3).params))
    after = named_leaves(unbroken[0].params)
    same = [name for name in before if np.array_equal(before[name], after[name])]
    # In the micro model a group of the GroupNorm is one channel, which removes the bias of the convolution before it;
    # what is added to all keys cancels in the softmax.
    zero_by_construction = ("tokenizer/time_path/convs", "unifier/keys_norm/bias")
    assert [name for name in same if not name.startswith(zero_by_construction)] == []


def test_training_learns_a_separable_problem():
    mesh, optimizer, task, step = build(CLASSIFIER, CLASSIFY, MeshConfig(devices=1), lr=3e-3)
    state = training.init_state(CLASSIFIER, optimizer, mesh, seed=0)
    state, losses = run(step, state, mesh, 0, 40)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    eval_step = training.make_eval_step(CLASSIFIER, task, mesh, seed=7)
    batches = [make_batch(1000 + k) for k in range(4)]
    evaluation = training.evaluate(eval_step, state.params, batches, mesh)
    assert len(evaluation.window_id) == 4 * 15  # filler rows are gone
    accuracy = np.mean(evaluation.outputs["logits"].argmax(-1) == evaluation.label)
    assert accuracy > 0.9
    assert task.summarize(evaluation.outputs, evaluation.label)["loss"] < 0.4


def test_frozen_encoder_stays_bit_for_bit_and_the_head_moves():
    mesh, optimizer, _, step = build(CLASSIFIER, CLASSIFY, MeshConfig(devices=1), freeze=True)
    state = training.init_state(CLASSIFIER, optimizer, mesh, seed=0)
    before = named_leaves(jax.device_get(state.params))
    state, _ = run(step, state, mesh, 0, 2)
    for name, leaf in named_leaves(state.params).items():
        assert np.array_equal(np.asarray(leaf), before[name]) == (not training.is_head(name)), name


def test_warm_start_takes_the_encoder_and_reports_the_rest():
    pretrained = nnx.split(LuMamba(MICRO, rngs=nnx.Rngs(11)))[1]
    warm = training.select_pretrained(CLASSIFIER, pretrained)
    for names in (warm.new, warm.unused):
        assert names
        assert all(training.is_head(name) for name in names)
    mesh, optimizer, _, _ = build(CLASSIFIER, CLASSIFY, MeshConfig(devices=1))
    state = training.init_state(CLASSIFIER, optimizer, mesh, seed=0, pretrained=warm.loaded)
    source = named_leaves(pretrained)
    for name, leaf in named_leaves(state.params).items():
        if name in warm.loaded:
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(source[name]), err_msg=name)
    same = training.select_pretrained(MICRO, pretrained)
    assert (same.new, same.unused) == ([], [])


def test_non_finite_steps_are_found_in_order():
    fetched = {7: False, 5: True, 6: False, 8: True}
    metrics = {k: {"finite": np.bool_(v), "loss": np.float32(k if v else np.nan)} for k, v in fetched.items()}
    assert training.non_finite_steps(metrics) == [6, 7]
    assert training.mean_metrics(metrics) == {"loss": 6.5}
    assert np.isnan(training.mean_metrics({6: metrics[6]})["loss"])


def test_progress_selects_the_lowest_finite_loss_and_counts_patience():
    progress = training.Progress()
    assert [progress.update(v, s) for s, v in enumerate([1.0, float("nan"), 0.9, 0.9, 1.2])] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert (progress.best_value, progress.best_step, progress.validations_since_best) == (0.9, 2, 2)
    assert training.Progress(**progress.to_json()) == progress
