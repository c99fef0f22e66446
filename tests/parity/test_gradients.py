"""Gradients and training steps of the PyTorch program, in float64: scan, Mamba block, pre-training loss, optimizer."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lumamba_jax import losses, masking, tasks
from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.lumamba import LuMamba
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from lumamba_jax.parity import mamba_block, read_manifest
from lumamba_jax.scan import selective_scan
from lumamba_jax.torch_weights import LAYOUTS, convert_tensors, mamba_keys, read_tensors, to_torch_tensors

COMMITTED = Path(__file__).parent / "golden"
CASES = {case.name: case for case in read_manifest(COMMITTED)}
ATOL = 1e-8
# Float64 numbers do not depend on it at this tolerance, and compiling takes half the time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _inputs(data):
    values = {name.removeprefix("in/"): array for name, array in data.items() if name.startswith("in/")}
    return {n: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else jnp.asarray(x) for n, x in values.items()}


def _close(ours, stored, what):
    np.testing.assert_allclose(np.asarray(ours), stored, rtol=0, atol=ATOL, err_msg=what)


def _check_scan_gradients(case, implementation):
    data = case.data()
    inputs = _inputs(data)
    weights = {name: inputs.pop(name) for name in ("w_out", "w_state")}

    def losses_of(arrays):
        swapped = {n: x.swapaxes(1, 2) if n in ("u", "delta", "B", "C", "z") else x for n, x in arrays.items()}
        softplus = case.config["delta_softplus"]
        y, last = selective_scan(**swapped, delta_softplus=softplus, implementation=implementation)
        out = jnp.sum(y.swapaxes(1, 2) * weights["w_out"])
        return jnp.stack([out, out + jnp.sum(last * weights["w_state"])])

    @_jit
    def values_and_gradients(arrays):
        values, pull_back = jax.vjp(losses_of, arrays)
        return values, jax.vmap(pull_back)(jnp.eye(2))[0]

    values, gradients = values_and_gradients(inputs)
    with_state = any(name.startswith("grad_out_state/") for name in data)  # the long cases have the first kind only
    kinds = ("out", "out_state") if with_state else ("out",)
    for row, kind in enumerate(kinds):
        _close(values[row], data[f"f64/loss_{kind}"], "loss")
        for name, gradient in gradients.items():
            _close(gradient[row], data[f"grad_{kind}/{name}"], f"{case.name} grad_{kind}/{name}")


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "selective_scan"])
def test_scan_gradients(name, implementation, x64):
    _check_scan_gradients(CASES[name], implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["associative", "sequential"])
def test_scan_gradients_of_the_full_set(golden_dir, implementation, x64):
    for case in read_manifest(golden_dir):
        if case.family == "selective_scan":
            _check_scan_gradients(case, implementation)


def _check_mamba_gradients(case):
    data = case.data()
    inputs = _inputs(data)
    graphdef, params = nnx.split(mamba_block(case, np.float64))

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) * inputs["w_out"])

    value, (gradients, x_gradient) = _jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs["x"])
    _close(value, data["f64/loss"], "loss")
    _close(x_gradient, data["grad/x"], "x")
    leaves = named_leaves(gradients)
    for row in mamba_keys("m", "block"):
        ours = LAYOUTS[row.layout].to_torch(np.asarray(leaves[row.path.removeprefix("block/")]))
        stored = data[f"grad/{row.torch_name.removeprefix('m.')}"]
        _close(ours, stored, f"{case.name} {row.torch_name}")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "mamba"])
def test_mamba_block_gradients(name, x64):
    _check_mamba_gradients(CASES[name])


@pytest.mark.slow
def test_mamba_block_gradients_of_the_full_set(golden_dir, x64):
    cases = [case for case in read_manifest(golden_dir) if case.family == "mamba"]
    with_gradients = [case for case in cases if "grad/x" in case.data()]
    assert with_gradients
    for case in with_gradients:
        _check_mamba_gradients(case)


# --- whole objectives ------------------------------------------------------------------------------------------------


def _golden_case(folder, name):
    return next(case for case in read_manifest(folder) if case.name == name)


def _model(state_files, *, num_heads=2):
    converted = convert_tensors(
        read_tensors(state_files), num_heads=num_heads, bidirectional="add", compute_dtype="float64"
    )
    config = converted.config.replace(dropout=0.0, head_dropout=0.0)
    graphdef = nnx.split(nnx.eval_shape(lambda: LuMamba(config, rngs=nnx.Rngs(0))))[0]
    return config, graphdef, jax.tree.map(jnp.asarray, converted.params)


@pytest.fixture
def reference_tiling(monkeypatch):
    """Positions of row r of the tokens come from sample r mod B, as in the PyTorch program."""
    monkeypatch.setattr(LuMamba, "__call__", functools.partialmethod(LuMamba.__call__, reference_position_tiling=True))


@pytest.mark.parametrize(
    "objective",
    [
        "mixed",
        pytest.param("reconstruction", marks=pytest.mark.slow),
        pytest.param("lejepa_only", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_pretraining_objectives(golden_dir, x64, monkeypatch, reference_tiling, objective):
    case = _golden_case(golden_dir, "pretrain_objectives")
    data = case.data()
    inputs = _inputs(data)
    config, graphdef, params = _model(case.state_files)
    # The stored draws replace ours; everything else is the code that trains.
    monkeypatch.setattr(masking, "draw_mask", lambda *_, **__: inputs["mask"])
    monkeypatch.setattr(masking, "draw_position_noise", lambda *_: inputs["loc_noise"])
    monkeypatch.setattr(masking, "draw_view_starts", lambda *_, **__: (inputs["start_local"], inputs["start_global"]))
    monkeypatch.setattr(masking, "draw_sigreg_directions", lambda *_: inputs["A_raw"])
    task = tasks.make_task(
        tasks.TaskConfig(objective="lejepa" if objective == "lejepa_only" else objective, sigreg_slices=128), config
    )
    signal = inputs["x_raw"]
    batch = {
        "signal": signal,
        "locations": inputs["channel_locations"],
        "channel_ids": inputs["channel_names"],
        "channel_mask": jnp.ones(signal.shape[:2], bool),
        "patch_mask": jnp.ones((signal.shape[0], signal.shape[2] // config.patch_size), bool),
        "window_mask": jnp.ones(signal.shape[0], bool),
    }
    keys = {name: masking.stream_key(0, name, 0) for name in masking.STREAMS}

    def loss(params):
        return task.loss(nnx.merge(graphdef, params), batch, keys)

    (total, terms), gradients = _jit(jax.value_and_grad(loss, has_aux=True))(params)
    _close(total, data[f"f64/{objective}/total_loss"], "total")
    if objective != "reconstruction":
        _close(terms["similarity"], data[f"f64/{objective}/LeJEPA_train_similarity_loss"], "similarity")
        _close(terms["sigreg"], data[f"f64/{objective}/LeJEPA_train_SIGReg_loss"], "sigreg")
    stored = {
        name.removeprefix(f"grad/{objective}/"): x for name, x in data.items() if name.startswith(f"grad/{objective}/")
    }
    ours = to_torch_tensors(config, gradients)
    assert set(stored) <= set(ours)
    for name, gradient in ours.items():
        _close(gradient, stored.get(name, np.zeros(gradient.shape)), f"{objective} {name}")


def _entry(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    return next(case for case in manifest["cases"] if case["name"] == name)


def _optimizer_config(entry):
    options, schedule = entry["config"]["optimizer"], entry["config"]["scheduler"]
    timing = {"schedule": "constant", "warmup_epochs": 0}
    if schedule:
        names = {"warmup_epochs": "warmup_epochs", "min_lr": "min_lr", "warmup_lr_init": "warmup_lr_init"}
        timing = {ours: schedule[theirs] for ours, theirs in names.items()}
    return OptimizerConfig(
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        recipe="reference",
        clip_grad_norm=entry["config"]["clip_grad_norm"],
        layerwise_decay=entry["config"]["layerwise_decay"] or 1.0,
        **timing,
    )


def _classification_loss(model, inputs):
    return losses.cross_entropy(model(inputs["x"], inputs["channel_locations"]).logits, inputs["labels"])


def _pretraining_loss(model, inputs):
    output = model(
        inputs["x"],
        inputs["channel_locations"],
        channel_ids=inputs["channel_names"],
        mask=inputs["mask"],
        position_noise=inputs["loc_noise"],
        reference_position_tiling=True,
    )
    terms = losses.masked_reconstruction(output.reconstruction, inputs["x"], inputs["mask"])
    return losses.pretraining_total(terms, losses.query_specialization(output.attention_scores))


def _check_five_steps(folder, name):
    entry = _entry(folder, name)
    data = load_file(folder / entry["data_file"])
    inputs = _inputs(data)
    config, graphdef, params = _model([folder / path for path in entry["state_files"]])
    objective = _pretraining_loss if entry["config"]["objective"] == "pre" else _classification_loss
    options = _optimizer_config(entry)
    timing = entry["config"]["scheduler"] or {}
    steps = {"total_steps": timing.get("total_steps", 5), "max_epochs": timing.get("max_epochs", 1)}
    frozen = [] if objective is _pretraining_loss else ["tokenizer/mask_token"]  # PyTorch: requires_grad False
    optimizer = make_optimizer(options, params, **steps, trainable=lambda path: path not in frozen)
    state = optimizer.init(params)

    @_jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: objective(nnx.merge(graphdef, p), inputs))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.global_norm(gradients)

    for i in range(5):
        params, state, loss, norm = step(params, state)
        _close(loss, data["f64/losses"][i], f"loss {i}")
        _close(norm, data["f64/grad_norms"][i], f"gradient norm {i}")
    _close(step(params, state)[2], data["f64/losses"][5], "loss after the last step")
    for torch_name, ours in to_torch_tensors(config, params).items():
        _close(ours, data[f"after/{torch_name}"], f"{name} {torch_name}")
    schedule = make_schedule(options, **steps)
    _close(schedule(4, options.lr), data["f64/lrs"][4].max(), "rate of the undecayed group at the last step")


def test_five_pretraining_steps(x64):
    _check_five_steps(COMMITTED, "train5_pretrain_adamw")


@pytest.mark.parametrize("name", [pytest.param("train5_cls_adamw", marks=pytest.mark.slow), "train5_cls_llrd_cosine"])
def test_five_finetuning_steps(golden_dir, x64, name):
    _check_five_steps(golden_dir, name)
