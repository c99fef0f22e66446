"""The train state and its two compiled programs: one optimizer step, one evaluation batch.

Init goes in three moves (abstract shapes -> shardings -> compiled init), so that a resumed run never materialises the
fresh weights. Every random draw of step `k` is a function of (seed, stream, `k`): no generator state is saved, and a
continued run equals the unbroken one bit for bit. Under `jit` the view is global: a mean over the batch is the mean
over all devices.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from lumamba_jax.adapters import NO_ADAPTERS, AdapterConfig, abstract_adapted, is_adapter, merged, with_adapters
from lumamba_jax.architectures import Model, ModelConfig, abstract_model, build
from lumamba_jax.checkpoint import abstract_params, named_leaves
from lumamba_jax.compilation import compiler_options
from lumamba_jax.masking import STREAMS, stream_key
from lumamba_jax.micro_batches import blocks_per_device, evaluation, value_and_gradient
from lumamba_jax.optimizer import CONSTANTS
from lumamba_jax.representation import MOST_EMBEDDINGS
from lumamba_jax.sharding import batch_sharding, replicated, state_shardings, to_global
from lumamba_jax.tasks import EMBEDDING, Task

Keys = dict[str, Key[Array, ""]]
WINDOW_FINITE = "window_finite"


class TrainState(NamedTuple):
    """What changes from step to step. `step` is the number of optimizer steps done, and the next batch's index.

    `params` are those of the model, and of its adapters if any (`adapters.with_adapters`): a resume needs nothing else.
    """

    step: Int[Array, ""]
    params: nnx.State
    opt_state: optax.OptState


def step_keys(seed: int, step: Int[Array, ""] | int) -> Keys:
    """One key for each random stream at one step (`masking.stream_key`)."""
    return {name: stream_key(seed, name, step) for name in STREAMS}


def graph_definition(config: ModelConfig) -> nnx.GraphDef:
    """The static half of the model; `nnx.merge(graph_definition(config), params)` is the model."""
    return abstract_model(config)[0]


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    adapters: AdapterConfig = NO_ADAPTERS,
) -> TrainState:
    """Shapes, dtypes and shardings of the train state: what a resume restores into."""
    params = abstract_adapted(config, adapters)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    adapters: AdapterConfig = NO_ADAPTERS,
    pretrained: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
    """Fresh parameters and optimizer state, created sharded.

    Args:
        config: sizes and head.
        optimizer: from `optimizer.make_optimizer`.
        mesh: from `sharding.make_mesh`.
        seed: of the initialisation.
        adapters: beside the encoder, if any.
        pretrained: values that replace the fresh ones, by parameter path (`select_pretrained`).
    """
    return _init_program(config, optimizer, mesh, seed, adapters)(dict(pretrained or {}))


@functools.lru_cache(maxsize=4)  # compiling it takes longer than a short run
def _init_program(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, adapters: AdapterConfig
) -> Callable[[dict[str, np.ndarray]], TrainState]:
    def init(replacements: Mapping[str, Array]) -> TrainState:
        params = nnx.split(build(config, seed=seed))[1]
        leaves = {**named_leaves(params), **replacements}
        params = jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))
        params = with_adapters(params, config, adapters, seed=seed)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh, adapters=adapters))
    return jax.jit(init, out_shardings=shardings)


class WarmStart(NamedTuple):
    """Which parameters come from a checkpoint: `loaded` by path, `new` start fresh, `unused` stay behind."""

    loaded: dict[str, np.ndarray]
    new: list[str]
    unused: list[str]


def select_pretrained(config: ModelConfig, params: nnx.State) -> WarmStart:
    """Choose the parameters of a pre-trained model that fit `config`: the encoder, and the head where it is the same.

    A head is taken only as a whole: if one of its tensors is absent or has another shape, all of it starts fresh.
    """
    found, wanted = named_leaves(params), named_leaves(abstract_params(config))
    fits = {name: name in found and tuple(found[name].shape) == tuple(leaf.shape) for name, leaf in wanted.items()}
    head_fits = all(fit for name, fit in fits.items() if is_head(name))
    loaded = {name: np.asarray(found[name]) for name, fit in fits.items() if fit and (head_fits or not is_head(name))}
    return WarmStart(
        loaded,
        new=[name for name in wanted if name not in loaded],
        unused=[name for name in found if name not in loaded],
    )


def is_head(name: str) -> bool:
    """Whether a parameter path belongs to the head (fresh in fine-tuning, trained when the encoder is frozen)."""
    return name.split("/", 1)[0] == "head"


def trained_parameters(*, freeze_encoder: bool, adapters: AdapterConfig) -> Callable[[str], bool] | None:
    """Which parameters are trained, by path; None = all. Adapters keep the encoder's own as they are in any case."""
    if adapters.rank:
        return lambda name: is_head(name) or is_adapter(name)
    return is_head if freeze_encoder else None


def count_parameters(params: Any, trains: Callable[[str], bool] | None) -> tuple[int, int]:
    """(trained, all) of a tree of parameters, or of their shapes; constants among them are not trained."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(params).items()}
    trained = {k: v for k, v in sizes.items() if not k.endswith(CONSTANTS) and (trains is None or trains(k))}
    return sum(trained.values()), sum(sizes.values())


def make_train_step(
    config: ModelConfig,
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    freeze_encoder: bool = False,
    adapters: AdapterConfig = NO_ADAPTERS,
    micro_batch: int | None = None,
    skip_non_finite: bool = False,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Compile `(state, batch) -> (state, metrics)`; the given state's buffers are donated, the metrics stay on device.

    Metrics are scalars: `loss`, `grad_norm`, `update_norm`, `finite` (loss and gradient are), and the task's; and
    `WINDOW_FINITE (B,)`, False for the windows whose own terms of the loss are not finite. With `skip_non_finite` such
    a step counts, but leaves parameters and optimizer as they were.

    The gradient is taken in the trained parameters alone (`trained_parameters`, which the optimizer must have been made
    with); the others are passed on as they are. Adapters are merged within each block of windows, so that the gradient
    of a merged kernel lives no longer than the block, and only those of A and B are summed and sent. Each device works
    through its windows `micro_batch` at a time, None as `micro_batches.blocks_per_device` says; that changes nothing
    but the draws of dropout, and rounding.
    """
    graphdef = graph_definition(config)
    trains = trained_parameters(freeze_encoder=freeze_encoder, adapters=adapters)

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        batch = _in_precision(batch, config)
        keys = step_keys(seed, state.step)
        blocks = blocks_per_device(batch["signal"].shape[0], micro_batch, mesh)
        trained, fixed = _trained_and_fixed(state.params, trains)

        def model_of(trained: nnx.State) -> Model:
            return nnx.merge(graphdef, merged(nnx.merge_state(trained, fixed), adapters))

        found = value_and_gradient(task, model_of, trained, batch, keys, blocks=blocks, mesh=mesh)
        gradient = nnx.merge_state(found.gradient, jax.tree.map(jnp.zeros_like, fixed))  # whose zeros nothing reads
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        updates = _trained_and_fixed(updates, trains)[0]
        moved: Any = optax.apply_updates(trained, updates)
        params = nnx.merge_state(moved, fixed)
        norms = {"grad_norm": optax.global_norm(found.gradient), "update_norm": optax.global_norm(updates)}
        finite = jnp.isfinite(found.loss) & jnp.isfinite(norms["grad_norm"])
        if skip_non_finite:
            kept = functools.partial(jnp.where, finite)
            params, opt_state = jax.tree.map(kept, (params, opt_state), (state.params, state.opt_state))
        metrics = {"loss": found.loss, **norms, "finite": finite, WINDOW_FINITE: found.finite, **found.metrics}
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh, adapters=adapters))
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def _in_precision(batch: dict[str, Array], config: ModelConfig) -> dict[str, Array]:
    """For a float64 model, the arrays of a batch in float64: else the sums of the normalisation would round to float32,
    and differently for every number of devices."""
    if config.compute_dtype != "float64":
        return batch
    return {name: x.astype(jnp.float64) if x.dtype == jnp.float32 else x for name, x in batch.items()}


def _trained_and_fixed(params: Any, trains: Callable[[str], bool] | None) -> tuple[nnx.State, nnx.State]:
    """The two parts of a tree of parameters; `nnx.merge_state` joins them."""
    if trains is None:
        return params, nnx.State({})
    trained, fixed = nnx.split_state(params, lambda path, _: trains("/".join(map(str, path))), ...)
    return trained, fixed


def make_merge(config: ModelConfig, adapters: AdapterConfig, mesh: Mesh) -> Callable[[nnx.State], nnx.State]:
    """`params` of a train state -> parameters of the plain model (`adapters.merged`), to be evaluated and exported."""
    if not adapters.rank:
        return lambda params: params
    shardings = state_shardings(abstract_params(config), mesh)
    return jax.jit(functools.partial(merged, config=adapters), out_shardings=shardings)


def make_eval_step(
    config: ModelConfig, task: Task, mesh: Mesh, *, seed: int, micro_batch: int | None = None
) -> Callable[[nnx.State, dict[str, Array]], dict[str, Array]]:
    """Compile `(params, batch) -> outputs`: the arrays `(B, ...)` of `task.evaluate` with the batch's ids and labels.

    No dropout and no position noise; draws that the objective itself needs (masks, views) are the same in every
    evaluation, so that validation losses are comparable over a run. `micro_batch` as in `make_train_step`.
    """
    graphdef = graph_definition(config)

    def eval_step(params: nnx.State, batch: dict[str, Array]) -> dict[str, Array]:
        batch = _in_precision(batch, config)
        blocks = blocks_per_device(batch["signal"].shape[0], micro_batch, mesh)
        keys = step_keys(seed, 0)
        outputs = evaluation(
            task, functools.partial(nnx.merge, graphdef), params, batch, keys, blocks=blocks, mesh=mesh
        )
        return outputs | {key: batch[key] for key in ("window_id", "window_mask", "label") if key in batch}

    params_shardings = state_shardings(abstract_params(config), mesh)
    return jax.jit(
        eval_step,
        in_shardings=(params_shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


class Evaluation(NamedTuple):
    """Outputs of `n` real windows: `outputs` by name `(n, ...)`, `window_id (n,)`, `label (n, ...)` or None.

    Embeddings are those of the first `MOST_EMBEDDINGS` windows only.
    """

    outputs: dict[str, np.ndarray]
    window_id: np.ndarray
    label: np.ndarray | None


def evaluate(
    eval_step: Callable[[nnx.State, dict[str, Array]], dict[str, Array]],
    params: nnx.State,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> Evaluation:
    """Run one pass over host batches and drop the filler rows.

    Raises: ValueError when there is no real window.
    """
    parts, count = [], 0
    for batch in batches:
        part = jax.device_get(eval_step(params, to_global(batch, mesh)))
        real = part.pop("window_mask")
        part = {key: values[real] for key, values in part.items()}
        if EMBEDDING in part:
            part[EMBEDDING] = part[EMBEDDING][: max(0, MOST_EMBEDDINGS - count)]
        count += int(real.sum())
        parts.append(part)
    if not count:
        raise ValueError("there is no window to evaluate")
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return Evaluation(joined, joined.pop("window_id"), joined.pop("label", None))


@dataclass
class Progress:
    """What a run remembers besides its state, saved with every checkpoint as JSON.

    Attributes:
        best_value, best_step, validations_since_best: model selection on a validation loss (lower is better).
        skipped_steps: steps without effect, because their loss or gradient was not finite.
        rollbacks: how often the run went back to a checkpoint.
        passed_over: batches left out by that: step k has the batch of k + passed_over.
    """

    best_value: float | None = None
    best_step: int = 0
    validations_since_best: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    passed_over: int = 0

    def update(self, value: float, step: int) -> bool:
        """Record a validation; True when it is the best so far."""
        if math.isfinite(value) and (self.best_value is None or value < self.best_value):
            self.best_value, self.best_step, self.validations_since_best = value, step, 0
            return True
        self.validations_since_best += 1
        return False

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `Progress(**progress.to_json()) == progress`."""
        return asdict(self)


def non_finite_steps(fetched: Mapping[int, Mapping[str, np.ndarray]]) -> list[int]:
    """The steps, in order, whose loss or gradient was not finite; `fetched` holds the metrics of each step."""
    return [step for step in sorted(fetched) if not fetched[step]["finite"]]


def mean_metrics(fetched: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Means over steps of every scalar metric, without the steps that are not finite; nan when none is."""
    good = [metrics for metrics in fetched.values() if metrics["finite"]]
    names = [name for name in next(iter(fetched.values())) if name not in ("finite", WINDOW_FINITE)]
    return {name: float(np.mean([metrics[name] for metrics in good])) if good else math.nan for name in names}


class PerShape:
    """A jitted `(state or parameters, batch) -> ...` that reports each compilation: one per shape of the batch."""

    def __init__(self, program: Callable[[Any, dict[str, Array]], Any], report: Callable[[tuple, float], None]):
        """`report((B, C, T), seconds)` is called after the first call of each shape, whose time is all compiling."""
        self._program, self._report = program, report
        self._seen: set[tuple] = set()

    def __call__(self, first: Any, batch: dict[str, Array]) -> Any:
        """What the program returns."""
        shape = batch["signal"].shape
        if shape in self._seen:
            return self._program(first, batch)
        begin = time.perf_counter()
        result = self._program(first, batch)
        self._seen.add(shape)
        self._report(shape, time.perf_counter() - begin)
        return result
