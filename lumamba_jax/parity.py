"""Our models, the scan and the Mamba block run on the stored inputs of a parity folder, stage by stage.

What is compared: our float32 run with the float64 reference, within 4 times the reference's own float32 error of that
stage; our float64 run within 1e-9, or 1e-6 of the stage's scale where the file holds the value rounded to float32;
stored gradients in float64 within 1e-8; electrode positions in float32 bit for bit. Losses, objectives and optimizer
steps are in `training_parity`, the format of a folder in `parity_cases`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumamba_jax import training_parity
from lumamba_jax.architectures import Model
from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.heads import ModelOutput
from lumamba_jax.layers import Dtypes
from lumamba_jax.mamba import MambaBlock, MambaConfig
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
    read_manifest,
    stored_stages,
    with_prefix,
)
from lumamba_jax.scan import ScanImplementation, selective_scan
from lumamba_jax.tokens import (
    POSITION_EPSILON,
    POSITION_NOISE_STD,
    encode_positions,
    normalized_positions,
    position_encoding,
)
from lumamba_jax.torch_keys import LAYOUTS, mamba_keys, unread
from lumamba_jax.torch_weights import to_torch_tensors

__all__ = [
    "CHECKED_FAMILIES",
    "COMPARISONS",
    "FinalOutput",
    "ParityCase",
    "StageCheck",
    "check_case",
    "final_outputs",
    "position_checks",
    "read_manifest",
]

REQUIRED_INPUTS = {
    "lumamba": ("x", "channel_locations"),
    "luna": ("x", "channel_locations"),
    "femba": ("x",),
    "mamba": ("x",),
    "selective_scan": ("u", "delta", "A", "B", "C"),
}
CHECKED_FAMILIES = (*REQUIRED_INPUTS, *training_parity.CHECKED_FAMILIES, "channels")
MODEL_INPUTS = ("x", "channel_locations", "channel_names", "mask", "loc_noise")
SCAN_IMPLEMENTATIONS: tuple[ScanImplementation, ...] = ("associative", "sequential")
POSITION_WIDTHS = (64, 96, 128)
"""embed_dim of LuMamba and LUNA base, LUNA large, LUNA huge."""
ROUNDING_STEP = 2.0**-24
"""Distance of neighbouring float32 values in [1/2, 1)."""

Stages = dict[str, Any]


def check_case(case: ParityCase, *, x64: bool = False) -> list[StageCheck]:
    """Run the stored inputs through our code and compare every stored stage, in the order of the computation.

    Raises:
        FileNotFoundError: a file of the case is not there.
        ValueError: a family that is not in `CHECKED_FAMILIES`, weights that do not convert, or an incomplete case.
    """
    if case.family not in CHECKED_FAMILIES:
        raise ValueError(f"case {case.name}: family {case.family!r} is not one of {', '.join(CHECKED_FAMILIES)}")
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        try:
            if case.family == "channels":
                return list(_channel_checks(case))
            if case.family in training_parity.CHECKED_FAMILIES:
                return list(training_parity.checks(case, x64=x64))
            return list(_checks(case, x64=x64))
        except KeyError as error:
            raise ValueError(f"case {case.name}: its entry in the manifest or its files lack {error}") from error


def _checks(case: ParityCase, *, x64: bool) -> Iterator[StageCheck]:
    data = case.data()
    inputs = inputs_of(data, x64=x64)
    missing = [name for name in REQUIRED_INPUTS[case.family] if name not in inputs]
    if missing:
        raise ValueError(f"{case.data_file}: the input(s) {', '.join('in/' + name for name in missing)} are missing")
    run = {"mamba": _run_mamba, "selective_scan": _run_scan}.get(case.family, _run_model)
    has_gradients = any(name.startswith("grad") for name in data)
    computed, gradients = run(case, inputs, x64=x64, with_gradients=x64 and has_gradients)
    stages = dict(stored_stages(data))
    order = {stage: i for i, stage in enumerate(case.noise_floor)}
    for stage in sorted(stages, key=lambda stage: (order.get(stage, len(order)), stage)):
        if not stage.startswith("loss"):  # scalars that belong to the gradients
            yield _check_stage(case, stage, computed.get(stage), data, x64=x64)
    if "channel_locations" in inputs and not x64:
        yield from _position_stages(case, data)
    if has_gradients:
        yield from _gradient_checks(case, data, computed, gradients, x64=x64)


def _check_stage(case: ParityCase, stage: str, ours: jax.Array | None, data: Arrays, *, x64: bool) -> StageCheck:
    reference = data.get(f"f64/{stage}", data.get(f"f32/{stage}"))
    assert reference is not None
    if x64:
        rounded = reference.dtype != np.float64
        scale = float(np.max(np.abs(reference), initial=0.0))
        tolerance = ROUNDED_TOLERANCE * scale if rounded else FLOAT64_TOLERANCE
        problem = "" if f"f64/{stage}" in data else "no float64 reference is stored"
    else:
        tolerance = NOISE_FLOOR_FACTOR * case.noise_floor.get(stage, 0.0)
        problem = "" if stage in case.noise_floor else "the manifest has no noise floor for it"
    if problem and ours is not None:
        return StageCheck(case.name, stage, float("nan"), float("nan"), tolerance, problem)
    stored_layout = None if ours is None else _in_stored_layout(stage, np.asarray(ours), reference.shape)
    return compare(case.name, stage, stored_layout, reference, tolerance)


def _in_stored_layout(stage: str, ours: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ours keep (B, C, S) or (B, S) apart where the files merge them, and keep features last."""
    if stage.startswith("patch_embed.proj_in."):  # (B, C, S, W, O) -> (B, O, C*S, W)
        ours = np.moveaxis(ours, -1, 1)
    if stage == "dt_raw":  # (B, L, D) -> (B, D, L)
        ours = np.swapaxes(ours, 1, 2)
    return ours.reshape(shape) if ours.size == np.prod(shape) else ours


def _gradient_checks(
    case: ParityCase, data: Arrays, computed: Stages, gradients: Stages, *, x64: bool
) -> Iterator[StageCheck]:
    """One line per way to compute them (`gradients` has "<way>/<stored name>") and one per stored loss."""
    if not x64:
        yield float64_only(case.name, "gradients")
        return
    losses = {name: x for name, x in with_prefix(data, "f64/").items() if name.startswith("loss")}
    for name, stored in losses.items():
        yield compare(case.name, name, computed.get(name), stored, GRADIENT_TOLERANCE)
    stored = {name: array for name, array in data.items() if name.startswith("grad")}
    for way in dict.fromkeys(name.split("/")[0] for name in gradients):
        title = "gradients" if way == "all" else f"gradients, {way} scan"
        yield compare_group(case.name, title, with_prefix(gradients, f"{way}/"), stored, GRADIENT_TOLERANCE)


# --- our side of each family: stages and, by "<way>/<stored name>", gradients of sum(output * w_out) ------------------

Computed = tuple[Stages, Stages]


def _compiled(function: Callable, *, x64: bool) -> Callable:
    """Float64 errors are far below the tolerance however it is compiled; float32 is checked as users run it."""
    return jax.jit(function, compiler_options=training_parity.QUICK_COMPILATION if x64 else None)


def _run_model(case: ParityCase, inputs: Arrays, *, x64: bool, with_gradients: bool) -> Computed:
    weights = case.convert("float64" if x64 else "float32")
    arrays = {name: jnp.asarray(inputs[name]) for name in (*MODEL_INPUTS, "w_out") if name in inputs}

    def run(params: nnx.State, arrays: Stages) -> tuple[jax.Array, Stages]:
        stages: Stages = {}
        output = _call(nnx.merge(weights.graphdef, params), arrays, stages)
        result = output.logits if output.reconstruction is None else output.reconstruction
        return jnp.zeros(()) if result is None else jnp.sum(result * arrays.get("w_out", 0.0)), stages

    if not with_gradients:
        return _compiled(run, x64=x64)(weights.params, arrays)[1], {}
    (loss, stages), gradients = _compiled(jax.value_and_grad(run, has_aux=True), x64=x64)(weights.params, arrays)
    unread_gradients = dict.fromkeys(unread(weights.config), 0.0)
    named = to_torch_tensors(weights.config, gradients, kept=unread_gradients)
    return stages | {"loss": loss}, {f"all/grad/{name}": gradient for name, gradient in named.items()}


def _call(model: Model, arrays: Stages, stages: Stages | None = None) -> ModelOutput:
    """The model on the stored inputs, tiled as the published code tiles them; `position_encoding` may be added."""
    return model(
        arrays["x"],
        arrays.get("channel_locations"),  # pyright: ignore[reportArgumentType]  (FEMBA takes none)
        channel_ids=arrays.get("channel_names"),
        mask=arrays.get("mask"),
        position_noise=arrays.get("loc_noise"),
        position_encoding=arrays.get("position_encoding"),
        reference_position_tiling=True,
        stages=stages,
    )


def _run_mamba(case: ParityCase, inputs: Arrays, *, x64: bool, with_gradients: bool) -> Computed:
    graphdef, params = nnx.split(mamba_block(case, np.float64 if x64 else np.float32))

    def run(params: nnx.State, x: jax.Array) -> tuple[jax.Array, Stages]:
        stages: Stages = {}
        out = nnx.merge(graphdef, params)(x, stages=stages)
        return jnp.sum(out * inputs.get("w_out", 0.0)), stages | {"out": out}

    x = jnp.asarray(inputs["x"])
    if not with_gradients:
        return _compiled(run, x64=x64)(params, x)[1], {}
    differentiated = _compiled(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), x64=x64)
    (loss, stages), (gradients, x_gradient) = differentiated(params, x)
    leaves = named_leaves(gradients)
    named = {"all/grad/x": x_gradient}
    for row in mamba_keys("m", "block"):
        gradient = LAYOUTS[row.layout].to_torch(np.asarray(leaves[row.path.removeprefix("block/")]))
        named[f"all/grad/{row.torch_name.removeprefix('m.')}"] = gradient
    return stages | {"loss": loss}, named


def mamba_block(case: ParityCase, dtype: type) -> MambaBlock:
    """The single Mamba block of a case of family `mamba`, with its weights."""
    sizes = ("d_model", "d_state", "d_conv", "expand", "dt_rank")
    config = MambaConfig(**{name: case.config[name] for name in sizes if name in case.config})
    dtypes = Dtypes(jnp.dtype(dtype), jnp.dtype(dtype))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MambaBlock(config, dtypes=dtypes, rngs=nnx.Rngs(0))))
    tensors = case.tensors()
    arrays = {
        row.path.removeprefix("block/"): LAYOUTS[row.layout].from_torch(tensors[case.state_prefix + row.torch_name[2:]])
        for row in mamba_keys("m", "block")
    }
    names = named_leaves(state)
    leaves = [jnp.asarray(arrays[name].astype(dtype)) for name in names]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def _run_scan(case: ParityCase, inputs: Arrays, *, x64: bool, with_gradients: bool) -> Computed:
    softplus = bool(case.config.get("delta_softplus", False))
    arrays = {name: jnp.asarray(x) for name, x in inputs.items() if not name.startswith("w_")}

    def run(arrays: Stages, implementation: ScanImplementation) -> tuple[jax.Array, jax.Array]:
        # Stored with features before steps, here with steps before features.
        swapped = {n: x.swapaxes(1, 2) if n in ("u", "delta", "B", "C", "z") else x for n, x in arrays.items()}
        y, last = selective_scan(**swapped, delta_softplus=softplus, implementation=implementation)
        return y.swapaxes(1, 2), last

    out, last = _compiled(functools.partial(run, implementation="auto"), x64=x64)(arrays)
    stages = {"out": out, "last_state": last}
    if not with_gradients:
        return stages, {}

    def losses_of(arrays: Stages, implementation: ScanImplementation) -> jax.Array:
        """The loss of `grad_out`, and that of `grad_out_state`, which takes the last state in."""
        y, last = run(arrays, implementation)
        loss = jnp.sum(y * inputs["w_out"])
        return jnp.stack([loss, loss + jnp.sum(last * inputs["w_state"])])

    def values_and_gradients(arrays: Stages, implementation: ScanImplementation) -> tuple[jax.Array, Stages]:
        values, pull_back = jax.vjp(functools.partial(losses_of, implementation=implementation), arrays)
        return values, jax.vmap(pull_back)(jnp.eye(2))[0]

    named: Stages = {}
    for way in SCAN_IMPLEMENTATIONS:
        values, gradients = _compiled(functools.partial(values_and_gradients, implementation=way), x64=x64)(arrays)
        stages |= {"loss_out": values[0], "loss_out_state": values[1]}
        for row, kind in enumerate(("grad_out", "grad_out_state")):
            named |= {f"{way}/{kind}/{name}": gradient[row] for name, gradient in gradients.items()}
    return stages, named


# --- electrode positions ----------------------------------------------------------------------------------------------


def _position_stages(case: ParityCase, data: Arrays) -> Iterator[StageCheck]:
    """The positions of a model case, and the encoding where the PyTorch program's own float32 is stored."""
    locations = np.asarray(data["in/channel_locations"], np.float32)
    yield from position_checks(case.name, "in/channel_locations", locations)
    stored = data.get("f32/nerf_encoding")
    if stored is not None and "in/loc_noise" not in data:
        ours = position_encoding(locations, stored.shape[-1])
        yield compare(case.name, "position encoding, their float32", ours, stored, ROUNDING_STEP)


def position_checks(case: str, montage: str, locations: np.ndarray) -> list[StageCheck]:
    """The float32 electrode encoding of one montage, for every published width, against IEEE arithmetic.

    The normalised positions, compiled, must be equal bit for bit, and so must the angles, which are products of them
    with powers of two and decide the encoding: on the host that is equal bit for bit to the correctly rounded sine and
    cosine of the expected angles; compiled, sine and cosine are the library's and may be off by two rounding steps.

    Args:
        case: name for the table.
        montage: name for the table.
        locations: `(B, C, 3)` float32, metres.
    """
    x = np.asarray(locations, np.float32)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    expected = np.divide(x - low, (high - low) + np.float32(POSITION_EPSILON), dtype=np.float32)
    exact = {f"E{width}": _encode_expected(expected, width) for width in POSITION_WIDTHS}
    host = {f"E{width}": position_encoding(x, width) for width in POSITION_WIDTHS}
    results = [compare_group(case, f"position encoding, {montage}", host, exact, 0.0)]
    if jax.default_backend() != "cpu":  # their division need not be correctly rounded; the host's encoding serves them
        return results

    @jax.jit
    def compiled(x: jax.Array) -> tuple[jax.Array, Stages]:
        positions = normalized_positions(x)
        return positions, {f"E{width}": encode_positions(positions, width) for width in POSITION_WIDTHS}

    with jax.enable_x64(new_val=False):
        positions, encodings = compiled(x)
    results.append(compare(case, f"positions compiled, {montage}", positions, expected, 0.0))
    results.append(compare_group(case, f"encoding compiled, {montage}", encodings, exact, 2 * ROUNDING_STEP))
    return results


def _encode_expected(positions: np.ndarray, width: int) -> np.ndarray:
    """Written from the specification (1.4), independently of `tokens`: float32 angles, then correctly rounded."""
    encoding = np.zeros((*positions.shape[:2], width), np.float32)
    for octave in range(width // 6):
        for axis in range(3):
            angles = np.float32(2.0**octave) * positions[:, :, axis]
            start = (octave * 3 + axis) * 2
            encoding[..., start] = np.sin(angles.astype(np.float64))
            encoding[..., start + 1] = np.cos(angles.astype(np.float64))
    return encoding


def _channel_checks(case: ParityCase) -> Iterator[StageCheck]:
    for name, locations in case.data().items():
        if name.endswith("/locations_f32"):
            yield from position_checks(case.name, name.split("/")[0], locations[None])


# --- end to end -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinalOutput:
    """How far one output of a float32 run is from a reference.

    Attributes:
        case: name of the case.
        output: `latent`, `recon` or `logits`.
        run: whose float32 it is, and against what: a key of `COMPARISONS`.
        max_error: largest absolute difference.
        relative_error: `max_error` over the largest absolute value of the reference.
        rmse: root of the mean squared difference.
        correlation: Pearson's r.
    """

    case: str
    output: str
    run: str
    max_error: float
    relative_error: float
    rmse: float
    correlation: float


COMPARISONS = {
    "ours": "our float32 against float64",
    "ours, their float32": "our float32 against their float32",
    "ours, exact positions": "our float32 with positions encoded in float64, against float64",
    "theirs": "their float32 against float64",
}


def final_outputs(case: ParityCase) -> list[FinalOutput]:
    """Latent, reconstruction and logits of one model case, as far as stored, by every entry of `COMPARISONS`.

    Electrode positions are encoded on the host, as `inference` does it.

    Raises:
        ValueError: a family that is no model, or weights that do not convert.
    """
    if case.family not in ("lumamba", "luna", "femba"):
        raise ValueError(f"case {case.name}: family {case.family!r} has no outputs of a model")
    data = case.data()
    inputs = inputs_of(data, x64=False)
    weights = case.convert()

    @jax.jit
    def outputs(params: nnx.State, arrays: Stages) -> Stages:
        output = _call(nnx.merge(weights.graphdef, params), arrays)
        named = {"latent": output.latent, "recon": output.reconstruction, "logits": output.logits}
        return {name: x for name, x in named.items() if x is not None}

    arrays = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
    montage = "channel_locations" in inputs
    encodings = {
        run: {"position_encoding": _encoding(data, weights.config.embed_dim, dtype)} if montage else {}
        for run, dtype in (("ours", np.float32), ("exact", np.float64))
    }
    with jax.default_matmul_precision("highest"):
        ours = outputs(weights.params, arrays | encodings["ours"])
        exact = outputs(weights.params, arrays | encodings["exact"]) if montage else {}
    results = []
    for name in ours:
        double, single = data.get(f"f64/{name}"), data.get(f"f32/{name}")
        pairs = {
            "ours": (ours[name], double),
            "ours, their float32": (ours[name], single),
            "ours, exact positions": (exact.get(name), double),
            "theirs": (single, double),
        }
        results += [
            _difference(case.name, name, run, x, y) for run, (x, y) in pairs.items() if not (x is None or y is None)
        ]
    return results


def _encoding(data: Arrays, embed_dim: int, dtype: type) -> np.ndarray:
    """`tokens.position_encoding` of the stored locations and noise: positions and angles in `dtype`, then float32."""
    with jax.enable_x64(new_val=True):
        positions = normalized_positions(jnp.asarray(data["in/channel_locations"], dtype))
        if "in/loc_noise" in data:
            positions = positions + dtype(POSITION_NOISE_STD) * jnp.asarray(data["in/loc_noise"], dtype)
        return np.asarray(encode_positions(positions.astype(jnp.float64), embed_dim), np.float32)


def _difference(case: str, output: str, run: str, ours: jax.Array | np.ndarray, stored: np.ndarray) -> FinalOutput:
    x, y = np.asarray(ours, np.float64).ravel(), np.asarray(stored, np.float64).ravel()
    error = np.abs(x - y)
    correlation = float(np.corrcoef(x, y)[0, 1]) if x.size > 1 else float("nan")
    rmse = float(np.sqrt(np.mean(error**2)))
    return FinalOutput(case, output, run, float(error.max()), float(error.max() / np.abs(y).max()), rmse, correlation)
