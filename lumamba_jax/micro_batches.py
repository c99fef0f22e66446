"""Windows over devices and blocks: gradients and evaluations that are those of the whole batch, with a block's memory.

A task's loss is `objective(terms)`, with a few terms per window (`tasks.Task`). By the chain rule its gradient is a sum
over blocks of windows, each pulling the slope of the objective in its own terms back to the parameters:

    slope    = d objective / d terms                              whole batch, small
    gradient = sum over blocks of  (d terms of the block / d parameters)^T slope of the block

Where the objective is linear in its terms the slope is known beforehand. The terms in which it is not (`Task.curved`,
the embeddings of LeJEPA's views) are computed once more, without a gradient, before.

Each device works through its own windows, block after block, and hears of others only in the objective and in the sum
of the gradients at the end. (Left to itself the partitioner of JAX 0.10 gathers the inputs of every Mamba layer on all
devices, because the gradient of the scan walks over the rows of the batch.) Everything is drawn for the whole batch, so
no draw depends on blocks or devices, but for dropout: its key is folded with the number of the block in the batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from lumamba_jax.architectures import Model
from lumamba_jax.compilation import CPU_BATCH_BLOCK
from lumamba_jax.sharding import BATCH_AXES
from lumamba_jax.tasks import Batch, Draws, Keys, Metrics, Task, Terms, dropout_stream

Tree = TypeVar("Tree")
Windows = tuple[Int[Array, "blocks"], Batch, Draws]
"""Numbers of blocks, and what each of their windows is computed from."""

_SHARED, _ROWS = PartitionSpec(), PartitionSpec(BATCH_AXES)


class Gradient(NamedTuple):
    """Of one batch: loss, metrics, gradient, and which windows contributed nothing but finite numbers."""

    loss: Float[Array, ""]
    metrics: Metrics
    gradient: nnx.State
    finite: Bool[Array, "B"]


def blocks_per_device(rows: int, micro_batch: int | None, mesh: Mesh) -> int:
    """How many blocks each device works through.

    Args:
        rows: windows of the global batch.
        micro_batch: windows of a block. None: `CPU_BATCH_BLOCK` on a CPU, if the windows of a device divide by it; else
            all windows of a device at once.
        mesh: where the batch lies.

    Raises: ValueError when the windows of a device do not divide by a given `micro_batch`.
    """
    own = rows // mesh.size
    if micro_batch is None:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return own // CPU_BATCH_BLOCK if on_cpu and own % CPU_BATCH_BLOCK == 0 else 1
    if own % micro_batch:
        raise ValueError(
            f"trainer.micro_batch is {micro_batch}, but each of {mesh.size} device(s) has {own} windows of a "
            f"batch of {rows}: choose a divisor of {own}"
        )
    return own // micro_batch


def value_and_gradient(
    task: Task,
    model_of: Callable[[nnx.State], Model],
    params: nnx.State,
    batch: Batch,
    keys: Keys,
    *,
    blocks: int,
    mesh: Mesh,
) -> Gradient:
    """Loss, metrics and gradient of `task.loss`, summed in the dtype of the parameters (float32, or float64).

    Args:
        task: whose loss.
        model_of: parameters -> model.
        params: where the gradient is taken.
        batch: the whole batch, on the mesh.
        keys: one per stream, as for `Task.loss`.
        blocks: from `blocks_per_device`.
        mesh: where the batch lies.
    """
    draws = task.draw(batch, keys, training=True)
    windows = jnp.arange(blocks * mesh.size), dict(batch), draws.of_windows()

    def terms_of(params: nnx.State, key: Key[Array, ""], block: Windows) -> Terms:
        numbers, batch, draws = block
        return task.window_terms(model_of(params), batch, draws, dropout_stream(jax.random.fold_in(key, numbers[0])))

    def of_all(params: nnx.State, key: Key[Array, ""], block: Windows) -> Terms:
        return task.window_terms(model_of(params), *block[1:], dropout_stream(key))

    def objective_of(terms: Terms) -> tuple[Float[Array, ""], Metrics]:
        return task.objective(terms, batch, draws)

    key = keys["dropout"]
    if blocks == 1:
        # One device needs no partition, and draws its dropout as `Task.loss` does.
        spread = _over_devices(terms_of, mesh, (_SHARED, _SHARED, _ROWS), _ROWS) if mesh.size > 1 else of_all

        def whole(params: nnx.State) -> tuple[Float[Array, ""], tuple[Metrics, Bool[Array, "B"]]]:
            terms = spread(params, key, windows)
            loss, metrics = objective_of(terms)
            return loss, (metrics, finite_windows(terms))

        (loss, (metrics, finite)), gradient = jax.value_and_grad(whole, has_aux=True)(params)
        return Gradient(loss, metrics, gradient, finite)

    def curved_terms(params: nnx.State, key: Key[Array, ""], windows: Windows) -> Terms:
        def of_block(block: Windows) -> Terms:
            terms = terms_of(params, key, block)
            return {name: terms[name] for name in task.curved}  # nothing else is run

        return _joined(jax.lax.map(of_block, _divided(windows, blocks)))

    def pulled_back(params: nnx.State, key: Key[Array, ""], windows: Windows, slope: Terms) -> tuple[nnx.State, Terms]:
        def add_block(total: nnx.State, inputs: tuple[Windows, Terms]) -> tuple[nnx.State, Terms]:
            block, slope = inputs
            terms, pull_back = jax.vjp(lambda p: terms_of(p, key, block), params)
            return jax.tree.map(jnp.add, total, pull_back(slope)[0]), terms

        nothing = jax.tree.map(jnp.zeros_like, params)
        total, terms = jax.lax.scan(add_block, nothing, _divided((windows, slope), blocks))
        return jax.lax.psum(total, BATCH_AXES), _joined(terms)

    shapes = jax.eval_shape(terms_of, params, key, windows)
    point = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    if task.curved:
        point |= _over_devices(curved_terms, mesh, (_SHARED, _SHARED, _ROWS), _ROWS)(params, key, windows)
    slope = jax.grad(lambda terms: objective_of(terms)[0])(point)
    pull = _over_devices(pulled_back, mesh, (_SHARED, _SHARED, _ROWS, _ROWS), (_SHARED, _ROWS))
    gradient, terms = pull(params, key, windows, slope)
    return Gradient(*objective_of(terms), gradient, finite_windows(terms))


def finite_windows(terms: Terms) -> Bool[Array, "B"]:
    """Which windows have finite terms only."""
    each = [jnp.isfinite(term).reshape(term.shape[0], -1).all(axis=1) for term in terms.values()]
    return functools.reduce(jnp.logical_and, each)


def evaluation(
    task: Task,
    model_of: Callable[[nnx.State], Model],
    params: nnx.State,
    batch: Batch,
    keys: Keys,
    *,
    blocks: int,
    mesh: Mesh,
) -> dict[str, Float[Array, "B ..."]]:
    """`task.evaluate`; arguments as in `value_and_gradient`."""
    draws = task.draw(batch, keys, training=False)

    def found_for(params: nnx.State, windows: tuple[Batch, Draws]) -> Terms:
        def of_block(block: tuple[Batch, Draws]) -> Terms:
            return task.window_outputs(model_of(params), *block)

        return of_block(windows) if blocks == 1 else _joined(jax.lax.map(of_block, _divided(windows, blocks)))

    spread = _over_devices(found_for, mesh, (_SHARED, _ROWS), _ROWS)
    return task.outputs(spread(params, (dict(batch), draws.of_windows())), batch, draws)


def _over_devices(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on every device with its rows of what is split, and all of what is shared."""
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _divided(tree: Tree, blocks: int) -> Tree:
    """Arrays `(rows, ...)` -> `(blocks, rows / blocks, ...)`, neighbours together."""
    return jax.tree.map(lambda array: array.reshape(blocks, -1, *array.shape[1:]), tree)


def _joined(tree: Tree) -> Tree:
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tree)
