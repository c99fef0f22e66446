"""What the PyTorch program's training computes, run here on its stored inputs: losses, normalisers, objectives, steps.

Families of a parity folder (`parity_cases`): `loss` (each criterion with its gradient), `normalize`,
`pretrain_objective` (three objectives with the gradient of every parameter, through `tasks` and with the stored draws),
`train` (five optimizer steps) and `schedule` (the rate of every step, and the layer-wise factor of every parameter).

Values are compared in float64 within 1e-9 and in float32 within 4 times the reference's own float32 error where that is
stored, else within 1e-5 of the value's scale; gradients and optimizer steps in float64 only, within 1e-8.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lumamba_jax import losses, masking, tasks
from lumamba_jax.losses import Penalty
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.normalization import channel_zscore, fixed_affine
from lumamba_jax.optimizer import (
    FRONT_END,
    OptimizerConfig,
    Schedule,
    base_rates,
    make_optimizer,
    make_schedule,
)
from lumamba_jax.parity_cases import (
    FLOAT64_TOLERANCE,
    GRADIENT_TOLERANCE,
    NOISE_FLOOR_FACTOR,
    ROUNDED_TOLERANCE,
    Arrays,
    ParityCase,
    StageCheck,
    compare,
    compare_group,
    float64_only,
    inputs_of,
    stored_stages,
    with_prefix,
)
from lumamba_jax.torch_keys import KeyMapping, key_map, unread
from lumamba_jax.torch_weights import ConvertedWeights, to_torch_tensors

CHECKED_FAMILIES = ("loss", "normalize", "pretrain_objective", "train", "schedule")
MASK_TOKEN = "tokenizer/mask_token"
"""Not trained with a classification head (PyTorch: requires_grad False)."""
FLOAT32_TOLERANCE = 1e-5
"""Of the value's scale, in float32, where no noise floor is stored."""
RATE_TOLERANCE = 1e-12
"""Of the ratio of a learning rate to the stored one, in float64."""
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
"""Compiling dominates, and no number in float64 depends on it at these tolerances."""
LAYERWISE_TABLE = "tables/layerwise_lr_decay.json"

Computed = tuple[dict[str, jax.Array], dict[str, jax.Array]]


def checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    """Everything stored in a case of one of `CHECKED_FAMILIES`, against ours; see `parity.check_case`.

    Raises:
        ValueError: a loss of unknown name, or weights that do not convert.
    """
    if case.family == "pretrain_objective":
        yield from _objective_checks(case, x64=x64)
    elif case.family == "train":
        yield from _train_checks(case, x64=x64)
    elif case.family == "schedule":
        yield from _schedule_checks(case, x64=x64)
    else:
        yield from _loss_checks(case, x64=x64)


def _value_check(case: ParityCase, stage: str, ours: Any, data: Arrays, *, x64: bool) -> StageCheck:
    reference = data.get(f"f64/{stage}", data.get(f"f32/{stage}"))
    assert reference is not None
    scale = float(np.max(np.abs(reference), initial=0.0))
    floor = case.noise_floor.get(stage, case.noise_floor.get(stage.removesuffix("/value")))
    if x64:
        tolerance = FLOAT64_TOLERANCE if reference.dtype == np.float64 else ROUNDED_TOLERANCE * scale
    else:
        tolerance = FLOAT32_TOLERANCE * scale if floor is None else NOISE_FLOOR_FACTOR * floor
    return compare(case.name, stage, ours, reference, tolerance)


def _compiled(function: Callable, *, x64: bool) -> Callable:
    return jax.jit(function, compiler_options=QUICK_COMPILATION if x64 else None)


# --- losses and normalisers: one compilation per case, values and gradients together ----------------------------------


def _loss_checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    computations: Mapping[str, Callable[[Arrays], Computed]] = {
        "reconstruction_loss": _reconstruction,
        "query_specialization": _query_specialization,
        "sigreg": _sigreg,
        "lejepa_given_embeddings": _lejepa,
        "normalize": _normalize,
    }
    if case.name not in computations:
        raise ValueError(f"case {case.name}: of family {case.family}, only {', '.join(computations)} are known")
    data = case.data()
    values, gradients = _compiled(computations[case.name], x64=x64)(inputs_of(data, x64=x64))
    for stage, _ in stored_stages(data):
        yield _value_check(case, stage, values.get(stage), data, x64=x64)
    stored = {name: array for name, array in data.items() if name.startswith("grad/")}
    if stored:
        yield (
            compare_group(case.name, "gradients", gradients, stored, GRADIENT_TOLERANCE)
            if x64
            else float64_only(case.name, "gradients")
        )


def _reconstruction(inputs: Arrays) -> Computed:
    values, gradients = {}, {}

    def terms(reconstruction: jax.Array, mask: jax.Array, kind: Penalty) -> tuple[jax.Array, Any]:
        found = losses.masked_reconstruction(reconstruction, inputs["original"], mask, kind=kind)
        return found.total, found

    for mask in ("mask", "mask_per_sample"):
        for kind in get_args(Penalty):
            gradient, found = jax.grad(terms, has_aux=True)(inputs["reconstructed"], inputs[mask], kind)
            values |= {f"{mask}/{kind}/masked": found.masked, f"{mask}/{kind}/unmasked": found.unmasked}
            gradients[f"grad/{mask}/{kind}/reconstructed"] = gradient
    visible = jnp.zeros(inputs["mask"].shape, bool)
    values["all_false_mask/smooth_l1/unmasked"] = terms(inputs["reconstructed"], visible, "smooth_l1")[1].unmasked
    return values, gradients


def _query_specialization(inputs: Arrays) -> Computed:
    values, gradients = {}, {}

    def loss(scores: jax.Array, kind: Penalty, weight: float) -> jax.Array:
        return losses.query_specialization(scores[None], kind=kind, weight=weight)  # all rows: patches of one window

    for name, scores in inputs.items():
        tag = name.split("/")[0]
        for kind in get_args(Penalty):
            for weight in (1.0, losses.QUERY_WEIGHT):
                value, gradient = jax.value_and_grad(loss)(scores, kind, weight)
                values[f"{tag}/{kind}/{weight}"], gradients[f"grad/{tag}/{kind}/{weight}"] = value, gradient
    return values, gradients


def _sigreg(inputs: Arrays) -> Computed:
    values = {}
    for tag in dict.fromkeys(name.split("/")[0] for name in inputs):
        value, gradient = jax.value_and_grad(losses.sigreg)(inputs[f"{tag}/x"], inputs[f"{tag}/A_raw"])
        values |= {f"{tag}/value": value, f"{tag}/grad_x": gradient}
    return values, {}


def _lejepa(inputs: Arrays) -> Computed:
    def loss(local: jax.Array, global_: jax.Array) -> tuple[jax.Array, losses.LeJEPATerms]:
        terms = losses.lejepa(local, global_, inputs["A_raw"])
        return terms.total, terms

    tokens = inputs["local_tokens"], inputs["global_tokens"]
    gradients, terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(*tokens)
    values = {"loss": terms.total, "sigreg": terms.sigreg, "similarity": terms.similarity}
    values["local_embeddings"] = losses.view_embeddings(tokens[0])
    return values, {"grad/local_tokens": gradients[0], "grad/global_tokens": gradients[1]}


def _normalize(inputs: Arrays) -> Computed:
    return {"channelwise": channel_zscore(inputs["x"]), "quartile_-20_20": fixed_affine(inputs["x"])}, {}


# --- the pre-training objectives --------------------------------------------------------------------------------------


class _AsPublished(LuMamba):
    """LuMamba with the positions of token row r from sample r mod B, as the published code has it."""

    __call__ = functools.partialmethod(  # pyright: ignore[reportAssignmentType]
        LuMamba.__call__, reference_position_tiling=True
    )


def _trained_model(case: ParityCase, *, x64: bool) -> tuple[ConvertedWeights, LuMambaConfig, nnx.GraphDef]:
    """The weights of a case, and configuration and static half of its model, without dropout."""
    converted = case.convert("float64" if x64 else "float32")
    if not isinstance(converted.config, LuMambaConfig):
        raise ValueError(f"case {case.name}: training is compared for LuMamba, not {converted.config.architecture}")
    config = converted.config.replace(dropout=0.0, head_dropout=0.0)
    graphdef = nnx.split(nnx.eval_shape(lambda: _AsPublished(config, rngs=nnx.Rngs(0))))[0]
    return converted, config, graphdef


def _objective_checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    data = case.data()
    inputs = inputs_of(data, x64=x64)
    converted, config, graphdef = _trained_model(case, x64=x64)
    normalized = tasks.normalize({"signal": jnp.asarray(inputs["x_raw"])}, "channel_zscore")
    yield _value_check(case, "normalized_input", normalized, data, x64=x64)
    for objective in [name.split("/")[1] for name in data if re.fullmatch("f64/.*/total_loss", name)]:
        task = _pretrain_task(case, config, objective)

        def loss(params: nnx.State, inputs: Arrays, task: tasks.Pretrain = task) -> tuple[jax.Array, tasks.Metrics]:
            return _objective(task, nnx.merge(graphdef, params), inputs)

        differentiated = jax.value_and_grad(loss, has_aux=True) if x64 else lambda *a, loss=loss: (loss(*a), {})
        run = jax.jit(differentiated, compiler_options=QUICK_COMPILATION)
        (total, metrics), gradients = run(converted.params, inputs)
        terms = _logged_terms(total, metrics)
        for stage in with_prefix(data, f"f64/{objective}/"):
            yield _value_check(case, f"{objective}/{stage}", terms.get(stage), data, x64=x64)
        title = f"{objective}: gradients"
        if not x64:
            yield float64_only(case.name, title)
            continue
        ours = to_torch_tensors(config, gradients, kept=dict.fromkeys(unread(config), 0.0))
        # A parameter without a stored gradient is one that the objective does not reach.
        nothing = {name: np.zeros(gradient.shape) for name, gradient in ours.items()}
        stored = nothing | with_prefix(data, f"grad/{objective}/")
        yield compare_group(case.name, title, ours, stored, GRADIENT_TOLERANCE)


def _pretrain_task(case: ParityCase, config: LuMambaConfig, objective: str) -> tasks.Pretrain:
    views, query = case.config["le_jepa"], case.config["query_specialization"]
    task_config = tasks.TaskConfig(
        objective="lejepa" if objective == "lejepa_only" else objective,  # pyright: ignore[reportArgumentType]
        penalty=case.config["criterion"],
        unmasked_weight=case.config["unmasked_loss_coeff"],
        query_weight=query["loss_coeff"],
        lejepa_weight=views["lejepa_scaling_factor"],
        lejepa_lambda=views["lambd_lejepa"],
        sigreg_slices=views["num_slices"],
        local_views=views["num_local_views"],
        local_patches=views["num_patches_local"],
        global_views=views["num_global_views"],
        global_patches=views["num_patches_global"],
    )
    return tasks.Pretrain(task_config, config)


def _objective(task: tasks.Pretrain, model: LuMamba, inputs: Arrays) -> tuple[jax.Array, tasks.Metrics]:
    """The code that trains, with the stored draws in place of ours."""
    signal = inputs["x_raw"]
    rows, channels, samples = signal.shape
    batch = {
        "signal": signal,
        "locations": inputs["channel_locations"],
        "channel_ids": inputs["channel_names"],
        "channel_mask": jnp.ones((rows, channels), bool),
        "patch_mask": jnp.ones((rows, samples // model.config.patch_size), bool),
        "window_mask": jnp.ones(rows, bool),
    }
    starts = inputs["start_local"].T, inputs["start_global"].T
    draws = tasks.Draws(inputs["mask"], inputs["loc_noise"], starts, inputs["A_raw"])
    keys = {name: masking.stream_key(0, name, 0) for name in masking.STREAMS}
    return task.loss(model, batch, keys, draws=draws)


def _logged_terms(total: jax.Array, metrics: tasks.Metrics) -> dict[str, jax.Array]:
    """Under the names of the PyTorch program's log (golden/README quirks 27, 29)."""
    terms = {"total_loss": total}
    if "masked" in metrics:
        terms["masked_loss"] = metrics["masked"] + losses.UNMASKED_WEIGHT * metrics["unmasked"]
        terms["query_specialization_loss"] = metrics["query"]
    if "similarity" in metrics:
        similarity, sigreg = metrics["similarity"], metrics["sigreg"]
        terms |= {"LeJEPA_train_similarity_loss": similarity, "LeJEPA_train_SIGReg_loss": sigreg}
        terms["lejepa_loss"] = (1 - losses.LEJEPA_LAMBDA) * similarity + losses.LEJEPA_LAMBDA * sigreg
    return terms


# --- optimizer steps --------------------------------------------------------------------------------------------------


def _train_checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    """Losses before each step and after the last, gradient norms, rates, and every parameter at the end."""
    count = case.config["steps"]
    if not x64:
        # Gradients that are zero but for rounding make Adam's steps differ in float32 (golden/README quirk 38).
        yield float64_only(case.name, f"{count} optimizer steps")
        return
    data = case.data()
    converted, config, graphdef = _trained_model(case, x64=True)
    params = jax.tree.map(jnp.asarray, converted.params)
    options = _optimizer_config(case.config)
    timing = case.config["scheduler"] or {}
    total_steps, max_epochs = timing.get("total_steps", count), timing.get("max_epochs", 1)
    pretraining = case.config["objective"] == "pre"
    optimizer = make_optimizer(
        options,
        params,
        total_steps=total_steps,
        max_epochs=max_epochs,
        trainable=lambda path: pretraining or path != MASK_TOKEN,
    )
    schedule = make_schedule(options, total_steps=total_steps, max_epochs=max_epochs)
    rates = _rates(case, schedule, base_rates(options.resolve("finetune"), params), key_map(config))
    objective = _pretraining_loss if pretraining else _classification_loss
    found, norms, params = _steps(optimizer, objective, graphdef, params, inputs_of(data, x64=True), count)
    yield compare(case.name, "losses", found, data["f64/losses"], GRADIENT_TOLERANCE)
    yield compare(case.name, "gradient norms", norms, data["f64/grad_norms"], GRADIENT_TOLERANCE)
    yield compare(
        case.name, "learning rates", _ratio(rates, data["f64/lrs"]), np.ones(data["f64/lrs"].shape), RATE_TOLERANCE
    )
    ours, stored = to_torch_tensors(config, params, kept=converted.kept), with_prefix(data, "after/")
    yield compare_group(case.name, f"parameters after {count} steps", ours, stored, GRADIENT_TOLERANCE)


def _steps(
    optimizer: optax.GradientTransformation,
    objective: Callable[[LuMamba, Arrays], jax.Array],
    graphdef: nnx.GraphDef,
    params: Any,
    inputs: Arrays,
    count: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Losses (count + 1), gradient norms (count), and the parameters after `count` steps on the same inputs."""

    @functools.partial(_compiled, x64=True)
    def step(params: Any, state: Any, inputs: Arrays) -> tuple[Any, Any, jax.Array, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda p: objective(nnx.merge(graphdef, p), inputs))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.global_norm(gradients)

    state = optimizer.init(params)
    found, norms = [], []
    for _ in range(count):
        params, state, loss, norm = step(params, state, inputs)
        found.append(loss)
        norms.append(norm)
    found.append(step(params, state, inputs)[2])
    return jnp.stack(found), jnp.stack(norms), params


def _classification_loss(model: LuMamba, inputs: Arrays) -> jax.Array:
    logits = model(inputs["x"], inputs["channel_locations"]).logits
    assert logits is not None, "a case of fine-tuning has a classification head"
    return losses.cross_entropy(logits, inputs["labels"])


def _pretraining_loss(model: LuMamba, inputs: Arrays) -> jax.Array:
    output = model(
        inputs["x"],
        inputs["channel_locations"],
        channel_ids=inputs["channel_names"],
        mask=inputs["mask"],
        position_noise=inputs["loc_noise"],
    )
    assert output.reconstruction is not None, "a case of pre-training has a reconstruction head"
    assert output.attention_scores is not None, "LuMamba has queries"
    terms = losses.masked_reconstruction(output.reconstruction, inputs["x"], inputs["mask"])
    return losses.pretraining_total(terms, losses.query_specialization(output.attention_scores))


def _optimizer_config(config: Mapping[str, Any]) -> OptimizerConfig:
    options, schedule = config["optimizer"], config["scheduler"]
    timing = {"schedule": "constant", "warmup_epochs": 0}
    if schedule:
        timing = {name: schedule[name] for name in ("warmup_epochs", "min_lr", "warmup_lr_init")}
    return OptimizerConfig(
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        recipe="reference",
        clip_grad_norm=config["clip_grad_norm"],
        layerwise_decay=config["layerwise_decay"] or 1.0,
        **timing,
    )


def _rates(
    case: ParityCase, schedule: Schedule, bases: Mapping[str, float], mapping: Iterable[KeyMapping]
) -> np.ndarray:
    """Our rate `(steps, groups)` of every parameter in the stored order, or of the only group."""
    lr = case.config["optimizer"]["lr"]
    paths = {row.torch_name: row.path for row in mapping}
    # PyTorch's optimizer was given one group per parameter in fine-tuning, one for all in pre-training.
    names = case.parameter_order if case.config["objective"] == "cls" else ("all",)
    groups = [bases[paths[name]] if name in paths else lr for name in names]
    return np.asarray([[schedule(k, base) for base in groups] for k in range(case.config["steps"])], np.float64)


# --- schedules --------------------------------------------------------------------------------------------------------


def _ratio(ours: Any, stored: np.ndarray) -> np.ndarray:
    """Ours over the stored rate, so that the small rates of a schedule count as much as the large ones."""
    ours = np.asarray(ours, np.float64)
    if ours.shape != stored.shape:
        return ours
    return np.where(stored == 0, 1 + ours, ours / np.where(stored == 0, 1, stored))


def _schedule_checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    data = case.data()

    def all_rates() -> dict[str, jax.Array]:
        return {name: _scheduled(name, case.config[name], len(stored)) for name, stored in data.items()}

    rates = _compiled(all_rates, x64=x64)()
    for name, stored in data.items():
        ours = np.asarray(rates[name]).reshape(stored.shape)
        if x64:
            yield compare(case.name, name, _ratio(ours, stored), np.ones(stored.shape), RATE_TOLERANCE)
        else:
            yield compare(case.name, name, ours, stored, FLOAT32_TOLERANCE * float(stored.max()))
    table = case.folder / LAYERWISE_TABLE
    if table.is_file():
        variants = json.loads(table.read_text())
        for variant, entry in variants.items():
            if isinstance(entry, Mapping):
                yield _layerwise_check(case.name, variant, entry["multiplier"], variants["decay"])


def _scheduled(name: str, options: Mapping[str, Any], count: int) -> jax.Array:
    """Our rates `(steps, groups)` of one stored schedule."""
    bases = np.atleast_1d(options["base"]).tolist()
    if name.startswith("cosine/"):
        config = OptimizerConfig(
            recipe="reference", warmup_epochs=float(options["warm"]), min_lr=options["mn"], warmup_lr_init=options["wi"]
        )
        total_steps, max_epochs = options["total"], options["max_epochs"]
    else:
        config = OptimizerConfig(
            schedule="multistep",
            recipe="reference",
            warmup_epochs=float(options.get("warmup_iter", 0)),
            warmup_lr_init=options.get("warmup_init_lr", 0.0),
            milestones=tuple(int(m) for m in options["milestones"].split("+")),
            milestone_factor=options["gamma"],
        )
        total_steps = max_epochs = count
    schedule = make_schedule(config, total_steps=total_steps, max_epochs=max_epochs)
    columns = [jax.vmap(lambda step, base=base: schedule(step, base))(jnp.arange(count)) for base in bases]
    return jnp.stack(columns, axis=1)


def _layerwise_check(case: str, variant: str, stored: Mapping[str, float], decay: float) -> StageCheck:
    """The factor of every published parameter name, exactly."""

    def layer_of(path: str) -> int:
        parts = path.split(".")
        return int(parts[1]) if parts[0] in ("blocks", "mamba_blocks", "norm_layers") else FRONT_END

    config = OptimizerConfig(lr=1.0, layerwise_decay=decay, recipe="reference").resolve("finetune")
    ours = base_rates(config, dict.fromkeys(stored, jnp.zeros(())), layer_of=layer_of)
    return compare_group(case, f"layer-wise factors, {variant}", ours, stored, 0.0)
