"""Optimizers, learning-rate schedules, layer-wise decay and freezing, all by parameter path.

Update rules and clipping are those of PyTorch, so that a published recipe means here what it meant there. Where the
published code deviates from what was documented or from what is sensible, the choice has a name: `recipe`.

The path of a parameter is its place in the tree, as in `blocks/0/mamba/fwd/A_log` or `head/mlp/fc1/kernel`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

OptimizerName = Literal["adamw", "adam", "lamb", "sgd"]
Recipe = Literal["reference", "as_documented", "corrected"]
Stage = Literal["pretrain", "finetune"]
ScheduleName = Literal["cosine", "multistep", "constant"]
WarmupMode = Literal["reference", "shifted"]
LayerwiseScope = Literal["reference", "full"]
DecayMask = Literal["all", "matrices"]

FRONT_END = -1
"""Layer index of tokeniser and channel attention: one layer below block 0."""
CLIP_EPS = 1e-6
"""Added to the gradient norm by `torch.nn.utils.clip_grad_norm_`."""
CONSTANTS = ("rotary_frequencies",)
"""Stored with the weights, but never trained."""
NOT_MATRICES = ("A_log", "D")
"""Parameters of the scan that have, or may have, two axes but are no matrices."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One training recipe. A field that is None takes the value of `recipe` (`resolve`); a given value always wins.

    | `recipe` | pre-training betas, decay | warm-up | weight decay on | layer-wise decay on |
    |---|---|---|---|---|
    | "reference": what the released code runs (recipes R1, R2, R8) | (0.9, 0.999), 0.01 | reference | all | blocks |
    | "as_documented": its configuration text | (0.9, 0.98), 0.05 | reference | all | blocks |
    | "corrected" | (0.9, 0.98), 0.05 | shifted | matrices | blocks and front end |

    Fine-tuning uses betas (0.9, 0.999) and weight decay 0.05 under every recipe.

    Attributes:
        name: update rule. "adamw" decouples weight decay; "adam" and "sgd" add it to the gradient, as PyTorch does.
        lr: base learning rate.
        betas: of Adam and LAMB.
        eps: of Adam and LAMB, outside the square root.
        momentum: of SGD.
        weight_decay: see `name`.
        recipe: see above.
        schedule: "cosine", "multistep" or "constant", each after the warm-up.
        warmup_epochs: length of the linear warm-up, in epochs of `total_steps // max_epochs` steps.
        warmup_mode: "reference" keeps the released code's jump after the warm-up, "shifted" has none.
        warmup_lr_init: rate at step 0 of the warm-up; absolute, the same for every layer.
        min_lr: rate at the end of the cosine; absolute, the same for every layer: layers below it rise towards it.
        milestones: steps at which "multistep" multiplies the rate by `milestone_factor`.
        milestone_factor: see `milestones`.
        clip_grad_norm: largest global gradient norm; None = no clipping.
        layerwise_decay: gamma; the rate of block i of N is `lr * gamma^(N - i)`. 1 = off.
        layerwise_scope: "reference" leaves tokeniser and channel attention at the full rate; "full" gives them
            `gamma^(N + 1)`. The head always has the full rate.
        decay_mask: "all" decays every parameter; "matrices" spares norms, biases, A_log and D.
        accumulation: gradients averaged before each optimizer step; steps of the schedule are optimizer steps.
    """

    name: OptimizerName = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float | None = None
    recipe: Recipe = "corrected"
    schedule: ScheduleName = "cosine"
    warmup_epochs: float = 5.0
    warmup_mode: WarmupMode | None = None
    warmup_lr_init: float = 1e-6
    min_lr: float = 1e-6
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    clip_grad_norm: float | None = None
    layerwise_decay: float = 1.0
    layerwise_scope: LayerwiseScope | None = None
    decay_mask: DecayMask | None = None
    accumulation: int = 1

    def __post_init__(self) -> None:
        choices = {
            "name": OptimizerName,
            "recipe": Recipe,
            "schedule": ScheduleName,
            "warmup_mode": WarmupMode,
            "layerwise_scope": LayerwiseScope,
            "decay_mask": DecayMask,
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value is not None and value not in get_args(allowed):
                raise ValueError(f"optimizer config: {field} {value!r} is unknown: choose one of {get_args(allowed)}")
        if not self.lr > 0:
            raise ValueError(f"optimizer config: lr must be positive, not {self.lr}")
        for field in ("weight_decay", "warmup_epochs", "warmup_lr_init", "min_lr", "clip_grad_norm"):
            value = getattr(self, field)
            if value is not None and not value >= 0:
                raise ValueError(f"optimizer config: {field} must not be negative, not {value}")
        if not 0 < self.layerwise_decay <= 1:
            raise ValueError(f"optimizer config: layerwise_decay must be in (0, 1], not {self.layerwise_decay}")
        if self.accumulation < 1:
            raise ValueError(f"optimizer config: accumulation must be at least 1, not {self.accumulation}")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("optimizer config: the multistep schedule needs milestones (steps); or choose constant")

    def resolve(self, stage: Stage) -> "OptimizerConfig":
        """Fill every None (but `clip_grad_norm`) with the value of `recipe` for `stage`."""
        corrected = self.recipe == "corrected"
        if stage == "finetune":
            betas, weight_decay = (0.9, 0.999), 0.05
        elif self.recipe == "reference":
            betas, weight_decay = (0.9, 0.999), 0.01
        else:
            betas, weight_decay = (0.9, 0.98), 0.05
        of_recipe = {
            "betas": betas,
            "weight_decay": weight_decay,
            "warmup_mode": "shifted" if corrected else "reference",
            "layerwise_scope": "full" if corrected else "reference",
            "decay_mask": "matrices" if corrected else "all",
        }
        missing = {field: value for field, value in of_recipe.items() if getattr(self, field) is None}
        return dataclasses.replace(self, **missing)


# --- schedules --------------------------------------------------------------------------------------------------------

Rate = Float[Array, ""]
Schedule = Callable[[int | Int[Array, ""], float], Rate]


def _warmup(step: Rate, base: float, initial: float, warmup_steps: int) -> Rate:
    return initial + step * (base - initial) / max(warmup_steps, 1)


def cosine_rate(
    step: int | Int[Array, ""],
    base: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    initial: float = 0.0,
    minimum: float = 0.0,
    mode: WarmupMode = "reference",
) -> Rate:
    """Linear warm-up, then half a cosine from `base` to `minimum` (recipes 1, golden/README quirk 33).

    In mode "reference" the cosine is counted from step 0 although it starts after the warm-up, so the rate drops where
    the warm-up ends; "shifted" counts from the end of the warm-up. From `total_steps` on the rate is `minimum`.
    """
    t = jnp.asarray(step, jnp.result_type(float))
    origin = 0 if mode == "reference" else warmup_steps
    phase = jnp.pi * (t - origin) / max(total_steps - origin, 1)
    cosine = minimum + 0.5 * (base - minimum) * (1 + jnp.cos(phase))
    decayed = jnp.where(t >= total_steps, minimum, cosine)
    return jnp.where(t < warmup_steps, _warmup(t, base, initial, warmup_steps), decayed)


def multistep_rate(
    step: int | Int[Array, ""],
    base: float,
    *,
    milestones: tuple[int, ...],
    factor: float,
    warmup_steps: int = 0,
    initial: float = 0.0,
    mode: WarmupMode = "reference",
) -> Rate:
    """Linear warm-up, then `base`, multiplied by `factor` at each milestone (golden/README quirk 36).

    In mode "reference" the rate stays at the last warm-up value, one increment short of `base`, and a milestone inside
    the warm-up is skipped; "shifted" reaches `base` and counts every milestone passed.
    """
    t = jnp.asarray(step, jnp.result_type(float))
    counted, plateau = milestones, base
    if mode == "reference" and warmup_steps:
        counted = tuple(m for m in milestones if m >= warmup_steps)
        plateau = initial + (warmup_steps - 1) * (base - initial) / warmup_steps
    passed = sum((jnp.where(t >= milestone, 1, 0) for milestone in counted), start=jnp.zeros((), jnp.int32))
    decayed = plateau * jnp.asarray(factor, t.dtype) ** passed
    return jnp.where(t < warmup_steps, _warmup(t, base, initial, warmup_steps), decayed)


def make_schedule(config: OptimizerConfig, *, total_steps: int, max_epochs: int, stage: Stage = "finetune") -> Schedule:
    """Return `rate(step, base)`: the learning rate of optimizer step 0, 1, ... for a group whose base rate is `base`.

    Args:
        config: the recipe.
        total_steps: optimizer steps of all epochs, whatever early stopping does (recipes R16).
        max_epochs: epochs `total_steps` is made of.
        stage: see `OptimizerConfig.resolve`.

    Raises:
        ValueError: `total_steps` or `max_epochs` is below 1.
    """
    if total_steps < 1 or max_epochs < 1:
        raise ValueError(
            f"a schedule needs at least one step and one epoch, not {total_steps} steps in {max_epochs} epochs: "
            "is the data set smaller than one batch?"
        )
    config = config.resolve(stage)
    mode = config.warmup_mode or "shifted"
    warmup_steps = int(config.warmup_epochs * (total_steps // max_epochs))
    initial = config.warmup_lr_init

    def cosine(step: int | Int[Array, ""], base: float) -> Rate:
        minimum = config.min_lr
        return cosine_rate(
            step, base, total_steps=total_steps, warmup_steps=warmup_steps, initial=initial, minimum=minimum, mode=mode
        )

    def multistep(step: int | Int[Array, ""], base: float) -> Rate:
        milestones, factor = config.milestones, config.milestone_factor
        return multistep_rate(
            step, base, milestones=milestones, factor=factor, warmup_steps=warmup_steps, initial=initial, mode=mode
        )

    def constant(step: int | Int[Array, ""], base: float) -> Rate:
        t = jnp.asarray(step, jnp.result_type(float))
        return jnp.where(t < warmup_steps, _warmup(t, base, initial, warmup_steps), base)

    return {"cosine": cosine, "multistep": multistep, "constant": constant}[config.schedule]


# --- parameters by path -----------------------------------------------------------------------------------------------


def parameter_path(key_path: tuple[Any, ...]) -> str:
    """Turn a JAX key path into `blocks/0/norm/scale`; the attribute that holds a Flax variable's array is left out."""
    if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def layer_of_path(path: str) -> int | None:
    """Return the layer of a parameter: i for `blocks/i/...`, None for what follows them, `FRONT_END` for the rest.

    Adapters are new like the head: None, the full rate.
    """
    parts = path.split("/")
    if parts[0] == "encoder":
        parts = parts[1:]
    if parts[0] == "blocks":
        return int(parts[1])
    return None if parts[0] in ("head", "norm", "adapters") else FRONT_END


def decays(path: str, leaf: Array) -> bool:
    """Say whether "matrices" puts weight decay on a parameter: two axes or more, and no norm, bias, A_log or D."""
    name = path.rsplit("/", 1)[-1]
    return leaf.ndim >= 2 and name not in NOT_MATRICES and "bias" not in name and "scale" not in name


def base_rates(
    config: OptimizerConfig, params: PyTree, *, layer_of: Callable[[str], int | None] = layer_of_path
) -> dict[str, float]:
    """Return the base learning rate of every parameter, by path: `lr`, times the layer-wise decay of its layer.

    Block i of N has `gamma^(N - i)`, so the last block has gamma, not 1 (golden/README quirk 35).
    """
    paths = [parameter_path(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = {path: layer_of(path) for path in paths}
    n_blocks = 1 + max((layer for layer in layers.values() if layer is not None), default=FRONT_END)
    lowest = FRONT_END if config.layerwise_scope == "full" else 0

    def rate(layer: int | None) -> float:
        if layer is None or layer < lowest:
            return config.lr
        return config.lr * config.layerwise_decay ** (n_blocks - layer)

    return {path: rate(layer) for path, layer in layers.items()}


# --- transformations --------------------------------------------------------------------------------------------------


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + CLIP_EPS))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # noqa: ARG005


class LearningRateState(NamedTuple):
    """Number of optimizer steps taken."""

    count: Int[Array, ""]


def scale_by_rates(schedule: Schedule, rates: dict[str, float]) -> optax.GradientTransformation:
    """Multiply each update by minus the scheduled rate of its parameter.

    Not a factor per layer: `min_lr` and `warmup_lr_init` are absolute, so each base rate has a schedule of its own.
    """

    def init(params: PyTree) -> LearningRateState:
        del params
        return LearningRateState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, LearningRateState]:
        del params
        scheduled = {base: schedule(state.count, base) for base in sorted(set(rates.values()))}

        def scale(key_path: tuple[Any, ...], u: Array) -> Array:
            return -scheduled[rates[parameter_path(key_path)]].astype(u.dtype) * u

        return jax.tree_util.tree_map_with_path(scale, updates), LearningRateState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _update_rule(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """The rule of PyTorch (LAMB: You et al., arXiv 1904.00962), before the learning rate."""

    def decay_mask(params: PyTree) -> PyTree:
        def decayed(key_path: tuple[Any, ...], leaf: Array) -> bool:
            return config.decay_mask == "all" or decays(parameter_path(key_path), leaf)

        return jax.tree_util.tree_map_with_path(decayed, params)

    beta1, beta2 = config.betas or (0.9, 0.999)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay or 0.0, mask=decay_mask)
    rules = {
        "adamw": [adam, decay],
        "adam": [decay, adam],
        "lamb": [adam, decay, optax.scale_by_trust_ratio()],
        "sgd": [decay, optax.trace(decay=config.momentum)],
    }
    return rules[config.name]


def make_optimizer(
    config: OptimizerConfig,
    params: PyTree,
    *,
    total_steps: int,
    max_epochs: int,
    stage: Stage = "finetune",
    layer_of: Callable[[str], int | None] = layer_of_path,
    trainable: Callable[[str], bool] | None = None,
) -> optax.GradientTransformation:
    """Build the optimizer of a run: clipping, update rule, weight decay, per-layer schedules, accumulation.

    Args:
        config: the recipe.
        params: the parameters, or their shapes (`jax.eval_shape`).
        total_steps: optimizer steps of all epochs.
        max_epochs: epochs they are made of.
        stage: decides what the fields left to `recipe` mean.
        layer_of: path -> block index, `FRONT_END`, or None (always the full rate).
        trainable: path -> False freezes a parameter: its update is 0, it has no optimizer state, and its gradient does
            not count in the norm that is clipped.

    Returns:
        A transformation whose updates are added to the parameters (`optax.apply_updates`).

    Raises:
        ValueError: nothing is trainable, or the schedule has no steps.
    """
    config = config.resolve(stage)
    schedule = make_schedule(config, total_steps=total_steps, max_epochs=max_epochs, stage=stage)
    steps = [scale_by_rates(schedule, base_rates(config, params, layer_of=layer_of))]
    steps = _update_rule(config) + steps
    if config.clip_grad_norm is not None:
        steps = [clip_by_global_norm(config.clip_grad_norm), *steps]
    optimizer = optax.chain(*steps)
    if config.accumulation > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulation).gradient_transformation()
    fixed = [path for path in base_rates(config, params) if path.endswith(CONSTANTS)]
    if trainable is None and not fixed:
        return optimizer

    def label(key_path: tuple[Any, ...], _leaf: Array) -> str:
        path = parameter_path(key_path)
        return "trained" if path not in fixed and (trainable is None or trainable(path)) else "frozen"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError("no parameter is trainable: unfreeze the head, or evaluate instead of training")
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
