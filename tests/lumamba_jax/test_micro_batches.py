"""A gradient block by block is that of the whole batch, for every objective, with padding and on any number of devices.

Every objective is checked on a toy in place of a model, which compiles at once; LuMamba itself is trained in blocks on
eight devices in test_training.py.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax.architectures import ModelConfig, build
from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import EncoderOutput, ModelOutput
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.masking import STREAMS, stream_key
from lumamba_jax.micro_batches import blocks_per_device, evaluation, value_and_gradient
from lumamba_jax.sharding import MeshConfig, make_mesh, to_global
from lumamba_jax.tasks import TaskConfig, make_task

ROWS, CHANNELS, PATCHES = 16, 3, 4
MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, dropout=0.0)
CLASSIFIER = MICRO.replace(head="linear", num_outputs=3)
# One sample and one channel are left by the strides and must count nowhere.
FEMBA = FembaConfig(
    num_channels=3, num_samples=160, patch_stride=13, embed_dim=4, num_blocks=1, d_state=4, decoder_kernel=(3, 3)
)
VIEWS = TaskConfig(sigreg_slices=8, local_views=2, local_patches=1, global_views=2, global_patches=2)
KEYS = {stream: stream_key(0, stream, 3) for stream in STREAMS}
WEIGHTS = np.array([0.5, 1.0, 4.0], np.float32)
TASKS: dict[str, tuple[ModelConfig, TaskConfig, str]] = {  # name -> model, task, kind of labels
    "classification": (CLASSIFIER, TaskConfig(kind="classify", label_smoothing=0.1), "class"),
    "independent decisions": (CLASSIFIER, TaskConfig(kind="classify"), "decisions"),
    "regression": (CLASSIFIER, TaskConfig(kind="regress"), "targets"),
    "reconstruction": (MICRO, TaskConfig(objective="reconstruction"), ""),
    "FEMBA": (FEMBA, TaskConfig(objective="reconstruction", normalization="fixed_affine"), ""),
    "LeJEPA": (MICRO, replace(VIEWS, objective="lejepa"), ""),
    "mixed": (MICRO, replace(VIEWS, objective="mixed"), ""),
}


def make_batch(labels: str, dtype: str) -> dict[str, np.ndarray]:
    """Windows of unlike sizes: channels and patches are missing here and there, three windows are filler."""
    rng = np.random.default_rng(0)
    samples = PATCHES * MICRO.patch_size
    batch = {
        "signal": 20 * rng.standard_normal((ROWS, CHANNELS, samples)),
        "locations": 0.1 * rng.standard_normal((ROWS, CHANNELS, 3)),
        "channel_ids": rng.integers(-1, 90, (ROWS, CHANNELS)).astype(np.int32),
        "channel_mask": np.ones((ROWS, CHANNELS), bool),
        "patch_mask": np.ones((ROWS, PATCHES), bool),
        "window_mask": ~np.isin(np.arange(ROWS), (5, 14, 15)),
    }
    batch["channel_mask"][::3, -1] = False
    batch["patch_mask"][1::4, -2:] = False
    kinds = {
        "class": lambda: np.where(np.arange(ROWS) == 2, -1, rng.integers(3, size=ROWS)).astype(np.int32),
        "decisions": lambda: rng.integers(2, size=(ROWS, 3)).astype(np.float64),
        "targets": lambda: rng.standard_normal((ROWS, 3)),
    }
    batch |= {"label": kinds[labels]()} if labels else {}
    return {key: x.astype(dtype) if x.dtype == np.float64 else x for key, x in batch.items()}


class Toy:
    """Stands in for a model: few parameters, nothing linear, and one window independent of the other."""

    def __init__(self, params: dict[str, jax.Array], covered: tuple[slice, ...]):
        self.params, self.covered = params, covered

    def encode(self, signal, locations, *, mask=None, position_noise=None, rngs=None, **_):
        places = locations if position_noise is None else locations + 0.02 * position_noise
        seen = signal if mask is None else jnp.where(mask, 0, signal)
        patches = seen.reshape(*seen.shape[:2], -1, MICRO.patch_size)
        patches = jnp.einsum("bcsp,pm->bcsm", patches, self.params["patch"])
        latent = jnp.tanh(patches + jnp.einsum("bcx,xm->bcm", places, self.params["place"])[:, :, None]).mean(1)
        if rngs is not None:
            latent = jnp.where(jax.random.bernoulli(rngs.dropout(), 0.5, latent.shape), latent, 0)
        return EncoderOutput(latent, jax.nn.softmax(patches[..., :2].transpose(0, 2, 3, 1)))

    def __call__(self, signal, locations, **arguments):
        latent, scores, _ = self.encode(signal, locations, **arguments)
        rebuilt = jnp.einsum("bsm,pm->bsp", latent, self.params["patch"]).reshape(len(latent), 1, -1)
        rebuilt = jnp.broadcast_to(rebuilt, signal.shape)
        return ModelOutput(latent, scores, rebuilt[self.covered], jnp.sin(latent.mean(1) @ self.params["head"]))


def make_program(name: str, model_of: Callable, params, dtype: str, blocks: int, devices: int):
    """(compiled, arguments): loss, metrics and gradient of one task, each device working through `blocks` blocks."""
    model, config, labels = TASKS[name]
    # Its float32 draws are rounded differently in a loop: 1e-9 in a float64 gradient.
    config = replace(config, position_noise=dtype == "float32")
    task = make_task(config, model, WEIGHTS if labels == "class" else None)
    mesh = make_mesh(MeshConfig(devices=devices))

    def run(params, batch):
        return value_and_gradient(task, model_of, params, batch, KEYS, blocks=blocks, mesh=mesh)

    arguments = params, to_global(make_batch(labels, dtype), mesh)
    return jax.jit(run).lower(*arguments).compile(), arguments


def of_toy(name: str, dtype: str, blocks: int, devices: int = 1, *, dropout: bool = False) -> dict[str, np.ndarray]:
    params, covered = toy(name, dtype)

    def model_of(params):
        toy = Toy(params, covered)
        if not dropout:
            toy.encode = functools.partial(_without_dropout, toy)
        return toy

    return _numbers(*make_program(name, model_of, params, dtype, blocks, devices))


def toy(name: str, dtype: str) -> tuple[dict[str, jax.Array], tuple[slice, ...]]:
    """Parameters, and what of the signal is reconstructed."""
    rng = np.random.default_rng(1)
    width = TASKS[name][0].width
    shapes = {"patch": (MICRO.patch_size, width), "place": (3, width), "head": (width, 3)}
    params = {key: jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, dtype) for key, shape in shapes.items()}
    return params, tuple(slice(size) for size in (None, *getattr(TASKS[name][0], "covered", ())))


def _without_dropout(toy: Toy, *args, **arguments):
    return Toy.encode(toy, *args, **(arguments | {"rngs": None}))


def evaluation_of_toy(name: str, blocks: int, devices: int) -> dict[str, np.ndarray]:
    model, config, labels = TASKS[name]
    task, mesh, (params, covered) = (
        make_task(config, model),
        make_mesh(MeshConfig(devices=devices)),
        toy(name, "float32"),
    )

    def model_of(params) -> Any:
        return Toy(params, covered)

    def run(params, batch):
        return evaluation(task, model_of, params, batch, KEYS, blocks=blocks, mesh=mesh)

    return jax.device_get(jax.jit(run)(params, to_global(make_batch(labels, "float32"), mesh)))


@functools.cache  # compiling is what these tests cost
def lumamba(name: str, blocks: int, devices: int, dropout: float = 0.0):
    graphdef, params = nnx.split(build(TASKS[name][0].replace(dropout=dropout), seed=0))
    return make_program(name, lambda params: nnx.merge(graphdef, params), params, "float32", blocks, devices)


def _numbers(compiled, arguments) -> dict[str, np.ndarray]:
    loss, metrics, gradient, finite = jax.device_get(compiled(*arguments))
    assert finite.all()
    gradient = gradient if isinstance(gradient, dict) else named_leaves(gradient)
    return {"loss": loss, **metrics} | {f"gradient/{key}": value for key, value in gradient.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Every number within `tolerance` of the scale of its tensor.

    The scale of a gradient is at least 1 % of the largest one: some are zero by construction, but for rounding.
    """
    assert list(found) == list(expected)
    gradients = [name for name in expected if name.startswith("gradient/")]
    largest = max(np.abs(expected[name]).max() for name in gradients)
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 0.01 * largest if name in gradients else 0)
        assert np.abs(found[name] - value).max() <= tolerance * scale, name


PARTS_OF_MIXED = {"LeJEPA", "reconstruction"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in PARTS_OF_MIXED else []) for name in TASKS]
)
def test_blocks_give_loss_metrics_and_gradient_of_the_whole_batch(name):
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            whole = of_toy(name, dtype, 1)
            assert np.isfinite(whole["loss"])
            assert all(value.any() for key, value in whole.items() if key != "gradient/head")
            for blocks, devices in ((4, 1), (1, 8), (2, 8)):
                assert_same(of_toy(name, dtype, blocks, devices), whole, tolerance)


@pytest.mark.parametrize("name", ["classification", "mixed"])
def test_dropout_depends_on_the_blocks_but_not_on_the_devices(name):
    one, eight, whole = (of_toy(name, "float32", *where, dropout=True) for where in ((8, 1), (1, 8), (1, 1)))
    assert_same(eight, one, 1e-5)
    assert abs(one["loss"] - whole["loss"]) > 1e-4


@pytest.mark.parametrize("name", ["classification", "mixed"])
def test_an_evaluation_in_blocks_is_that_of_the_whole_batch(name):
    whole = evaluation_of_toy(name, 1, 1)
    for blocks, devices in ((4, 1), (1, 8), (2, 8)):
        found = evaluation_of_toy(name, blocks, devices)
        assert list(found) == list(whole)
        for key, value in whole.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the mixed objective in blocks on eight devices is also in test_training.py
def test_lumamba_in_blocks_on_eight_devices_is_lumamba_at_once():
    assert_same(_numbers(*lumamba("mixed", 2, 8)), _numbers(*lumamba("mixed", 1, 1)), 1e-5)


@pytest.mark.parametrize(
    "choice", [pytest.param(("mixed", 2, 8), marks=pytest.mark.slow), ("classification", 2, 8, 0.1)]
)
def test_no_window_moves_between_devices(choice):
    text = lumamba(*choice)[0].as_text()
    assert text is not None
    assert re.search(r"\ball-reduce", text), "the gradient is summed over devices"
    assert not re.findall(r"\b(?:all-gather|all-to-all|collective-permute)\S*", text)


def test_the_default_is_a_block_that_fits_the_cache_of_a_cpu():
    mesh = make_mesh(MeshConfig(devices=2))
    assert [blocks_per_device(rows, None, mesh) for rows in (8, 16, 20, 64)] == [1, 1, 1, 4]
    assert [blocks_per_device(64, size, mesh) for size in (1, 8, 32)] == [32, 4, 1]
    for size in (3, 64):  # no divisor, more than a device has
        with pytest.raises(ValueError, match=f"trainer.micro_batch is {size}, but each of 2 device.* divisor of 32"):
            blocks_per_device(64, size, mesh)


@pytest.mark.parametrize("name", TASKS)
def test_the_slope_depends_on_the_curved_terms_alone(name):
    model, config, labels = TASKS[name]
    task = make_task(config, model, WEIGHTS if labels == "class" else None)
    batch = {key: jnp.asarray(value) for key, value in make_batch(labels, "float32").items()}
    draws = task.draw(batch, KEYS, training=True)
    shapes = {"loss": (), "correct": (), "masked": (), "unmasked": (), "query": ()}
    if task.curved:
        shapes |= {"local": (2, model.width), "global": (2, model.width)}

    def slope(seed: int) -> dict[str, jax.Array]:
        terms = {key: jax.random.normal(jax.random.key(seed), (ROWS, *shape)) for key, shape in shapes.items()}
        return jax.grad(lambda terms: task.objective(terms, batch, draws)[0])(terms)

    first, second = slope(0), slope(1)
    assert {key for key in shapes if not np.array_equal(first[key], second[key])} == set(task.curved)
