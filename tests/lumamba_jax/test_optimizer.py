"""Schedules, update rules against PyTorch, and rates, decay and freezing by path.

Every value of the reference's schedules and layer-wise factors: tests/parity/test_training_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lumamba_jax import optimizer
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule


def test_shifted_warmup_joins_without_a_jump():
    config = OptimizerConfig(recipe="corrected", warmup_epochs=5.0, min_lr=0.0, warmup_lr_init=0.0)
    schedule = make_schedule(config, total_steps=100, max_epochs=10)
    values = np.asarray(jax.vmap(lambda step: schedule(step, 1.0))(jnp.arange(101)))
    np.testing.assert_allclose(values[[0, 25, 49, 50, 75, 100]], [0, 0.5, 0.98, 1, 0.5, 0], atol=1e-6)
    assert np.abs(np.diff(values)).max() < 0.04


def test_reference_warmup_sanity_values_of_the_recipes():
    config = OptimizerConfig(recipe="reference", warmup_epochs=5.0, min_lr=0.0, warmup_lr_init=0.0)
    schedule = make_schedule(config, total_steps=100, max_epochs=10)
    values = [float(schedule(step, 1.0)) for step in (0, 25, 49, 50, 75, 100)]
    np.testing.assert_allclose(values, [0, 0.5, 0.98, 0.5, 0.14645, 0], atol=1e-5)


def test_shifted_multistep_reaches_the_base_rate_and_constant_stays():
    options = {"warmup_epochs": 2.0, "warmup_lr_init": 0.0, "recipe": "corrected"}
    multistep = make_schedule(
        OptimizerConfig(schedule="multistep", milestones=(1, 6), milestone_factor=0.5, **options),
        total_steps=8,
        max_epochs=4,
    )
    values = [float(multistep(step, 1.0)) for step in range(8)]
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25, 0.25], rtol=1e-6)
    constant = make_schedule(OptimizerConfig(schedule="constant", **options), total_steps=8, max_epochs=4)
    np.testing.assert_allclose([float(constant(s, 1.0)) for s in (0, 2, 4, 7, 99)], [0, 0.5, 1, 1, 1], rtol=1e-6)


def _problem(rng):
    """Parameters of a small regression with a gradient that changes sign and scale."""
    shapes = {"front": {"kernel": (4, 5)}, "blocks": {0: {"kernel": (5, 5), "bias": (5,)}}, "head": {"kernel": (5, 1)}}
    params = jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return params, rng.normal(size=(32, 4)) * 3, rng.normal(size=(32, 1)) * 5


def _loss(params, x, y):
    h = np.asarray(x) @ params["front"]["kernel"]
    h = h @ params["blocks"][0]["kernel"] + params["blocks"][0]["bias"][None, :]
    return (((h**2) @ params["head"]["kernel"] - y) ** 2).mean()


def _torch_optimizer(torch, name, groups):
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.05)
    if name == "adam":
        return torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.05)
    return torch.optim.SGD(groups, lr=1.0, momentum=0.8, weight_decay=0.05)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_steps_equal_torch_with_clipping_layerwise_rates_and_a_schedule(x64, name, clip):
    torch = pytest.importorskip("torch")
    params, x, y = _problem(np.random.default_rng(0))
    config = OptimizerConfig(
        name=name,
        lr=0.01,
        betas=(0.9, 0.98),
        momentum=0.8,
        weight_decay=0.05,
        recipe="reference",
        warmup_epochs=2.0,
        min_lr=1e-4,
        warmup_lr_init=1e-3,
        clip_grad_norm=clip,
        layerwise_decay=0.75,
    )
    total, epochs, n_steps = 12, 12, 8
    schedule = make_schedule(config, total_steps=total, max_epochs=epochs)

    leaves = {"front": params["front"]["kernel"], "k": params["blocks"][0]["kernel"]}
    leaves |= {"b": params["blocks"][0]["bias"], "head": params["head"]["kernel"]}
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in leaves.items()}
    bases = {"front": 0.01, "k": 0.0075, "b": 0.0075, "head": 0.01}
    theirs = _torch_optimizer(torch, name, [{"params": [tensors[key]], "name": key} for key in tensors])
    tx = make_optimizer(config, params, total_steps=total, max_epochs=epochs)
    ours = jax.tree.map(jnp.asarray, params)
    state = tx.init(ours)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    for k in range(n_steps):
        for group in theirs.param_groups:
            group["lr"] = float(schedule(k, bases[group["name"]]))
        theirs.zero_grad()
        h = torch.tensor(x) @ tensors["front"] @ tensors["k"] + tensors["b"]
        (((h**2) @ tensors["head"] - torch.tensor(y)) ** 2).mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), clip)
        theirs.step()
        ours, state = step(ours, state)
    found = {"front": ours["front"]["kernel"], "k": ours["blocks"][0]["kernel"]}
    found |= {"b": ours["blocks"][0]["bias"], "head": ours["head"]["kernel"]}
    for key, value in found.items():
        np.testing.assert_allclose(value, tensors[key].detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=key)


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.A_log = nnx.Param(jnp.ones((4, 2)))
        self.D = nnx.Param(jnp.ones(4))


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.tokenizer = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([_Block(rngs), _Block(rngs)])
        self.head = nnx.Linear(4, 2, rngs=rngs)


@pytest.fixture
def params():
    return nnx.split(_Model(nnx.Rngs(0)))[1]


def _by_path(tree):
    return {optimizer.parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layerwise_rates_by_path(params):
    reference = OptimizerConfig(lr=1.0, layerwise_decay=0.75, recipe="reference").resolve("finetune")
    full = OptimizerConfig(lr=1.0, layerwise_decay=0.75, recipe="corrected").resolve("finetune")
    for config, front in ((reference, 1.0), (full, 0.75**3)):
        rates = optimizer.base_rates(config, params)
        assert rates["blocks/0/A_log"] == rates["blocks/0/norm/scale"] == 0.5625
        assert rates["blocks/1/linear/kernel"] == 0.75
        assert rates["head/bias"] == 1.0
        assert rates["tokenizer/kernel"] == front


def test_weight_decay_mask(params):
    zero_gradient = jax.tree.map(jnp.zeros_like, params)
    matrices = {"tokenizer/kernel", "blocks/0/linear/kernel", "blocks/1/linear/kernel", "head/kernel"}
    for mask, expected in (("matrices", matrices), ("all", set(_by_path(params)))):
        config = OptimizerConfig(schedule="constant", warmup_epochs=0.0, decay_mask=mask, weight_decay=0.1)
        tx = make_optimizer(config, params, total_steps=10, max_epochs=1)
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(zero_gradient, tx.init(ones), ones)
        assert {path for path, update in _by_path(updates).items() if np.any(np.asarray(update))} == expected


def test_frozen_parameters_do_not_move_have_no_state_and_do_not_count_in_the_norm(params):
    rule = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    config = OptimizerConfig(lr=0.1, schedule="constant", warmup_epochs=0.0, clip_grad_norm=1.0, **rule)
    head_only = make_optimizer(
        config, params, total_steps=10, max_epochs=1, trainable=lambda path: path.startswith("head")
    )
    gradient = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 + (1.0 if "head" in optimizer.parameter_path(path) else 1e6), params
    )
    state = head_only.init(params)
    updates, state = jax.jit(head_only.update)(gradient, state, params)
    for path, update in _by_path(updates).items():
        expected = -0.1 / np.sqrt(10) if path.startswith("head") else 0.0  # head: 8 + 2 entries of gradient 1
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == 10  # the momentum of the head

    with pytest.raises(ValueError, match="no parameter is trainable"):
        make_optimizer(config, params, total_steps=10, max_epochs=1, trainable=lambda path: "tail" in path)


def test_accumulation_equals_one_step_on_the_mean_gradient(params):
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params) for _ in range(6)]
    options = {"lr": 0.1, "warmup_epochs": 0.0, "clip_grad_norm": 0.5}

    def run(accumulation, gradients):
        config = OptimizerConfig(accumulation=accumulation, **options)
        tx = make_optimizer(config, params, total_steps=4, max_epochs=1, trainable=lambda path: "tokenizer" not in path)
        current, state = params, tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, current)
            current = optax.apply_updates(current, updates)
        return _by_path(current)

    means = [jax.tree.map(lambda *g: sum(g) / 3, *gradients[i : i + 3]) for i in (0, 3)]
    accumulated, direct = run(3, gradients), run(1, means)
    for path in direct:
        np.testing.assert_allclose(accumulated[path], direct[path], atol=2e-6, err_msg=path)


def test_lamb_step_has_the_length_of_its_parameter(params):
    config = OptimizerConfig(name="lamb", lr=0.1, schedule="constant", warmup_epochs=0.0)
    tx = make_optimizer(config, params, total_steps=4, max_epochs=1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(jax.tree.map(lambda p: 3 * jnp.ones_like(p), params), tx.init(ones), ones)
    for path, update in _by_path(updates).items():
        np.testing.assert_allclose(np.linalg.norm(update), 0.1 * np.sqrt(update.size), rtol=1e-5, err_msg=path)


def test_optimizer_can_be_built_and_initialised_from_shapes(params):
    shapes = jax.eval_shape(lambda: params)
    tx = make_optimizer(OptimizerConfig(layerwise_decay=0.5), shapes, total_steps=4, max_epochs=1)
    from_shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(tx.init, shapes))
    assert from_shapes == jax.tree.map(lambda leaf: leaf.shape, tx.init(params))


def test_recipes_mean_what_they_say_and_explicit_values_win():
    pretrain = {r: OptimizerConfig(recipe=r).resolve("pretrain") for r in ("reference", "as_documented", "corrected")}
    assert {r: (c.betas, c.weight_decay) for r, c in pretrain.items()} == {
        "reference": ((0.9, 0.999), 0.01),
        "as_documented": ((0.9, 0.98), 0.05),
        "corrected": ((0.9, 0.98), 0.05),
    }
    corrected = pretrain["corrected"]
    assert (corrected.warmup_mode, corrected.decay_mask, corrected.layerwise_scope) == ("shifted", "matrices", "full")
    finetune = OptimizerConfig(recipe="reference").resolve("finetune")
    assert (finetune.betas, finetune.weight_decay, finetune.decay_mask) == ((0.9, 0.999), 0.05, "all")
    assert OptimizerConfig(recipe="reference", weight_decay=0.0).resolve("pretrain").weight_decay == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamax"}, "'adamax'"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"layerwise_decay": 1.5}, "layerwise_decay"),
        ({"accumulation": 0}, "accumulation"),
        ({"schedule": "multistep"}, "needs milestones"),
        ({"min_lr": -1e-6}, "min_lr must not be negative"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):  # TypeError: from the annotation, when checked
        OptimizerConfig(**options)


def test_schedule_without_steps_is_an_error():
    with pytest.raises(ValueError, match="smaller than one batch"):
        make_schedule(OptimizerConfig(), total_steps=0, max_epochs=3)
