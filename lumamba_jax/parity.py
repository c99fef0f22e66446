"""Parity files: stored inputs and stage-by-stage outputs of the PyTorch program, and our model run against them.

A parity folder holds `manifest.json` and safetensors files. The manifest has `cases`, each with `name`, `family`,
`config` (the PyTorch constructor's arguments), `state_files`, `data_file` and `noise_floor_f32_vs_f64`: per stage the
largest error of the PyTorch program in float32 against itself in float64. A data file has `in/<name>` inputs,
`f32/<stage>` and `f64/<stage>` outputs. `examples/export_torch_stages.py` writes such a folder for any checkpoint.

What is compared: our float32 run with the float64 reference, within 4 times the reference's own float32 error of that
stage; our float64 run within 1e-9, or 1e-6 of the stage's scale where the file holds the value rounded to float32.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.heads import ComputeDtype
from lumamba_jax.layers import Dtypes
from lumamba_jax.mamba import MambaBlock, MambaConfig
from lumamba_jax.scan import selective_scan
from lumamba_jax.torch_architecture import Overrides
from lumamba_jax.torch_files import read_tensors
from lumamba_jax.torch_keys import LAYOUTS, mamba_keys
from lumamba_jax.torch_weights import ConvertedWeights, convert_tensors

FORMAT_VERSION = 1
NOISE_FLOOR_FACTOR = 4.0
FLOAT64_TOLERANCE = 1e-9
ROUNDED_TOLERANCE = 1e-6
REQUIRED_INPUTS = {
    "lumamba": ("x", "channel_locations"),
    "luna": ("x", "channel_locations"),
    "femba": ("x",),
    "mamba": ("x",),
    "selective_scan": ("u", "delta", "A", "B", "C"),
}
CHECKED_FAMILIES = tuple(REQUIRED_INPUTS)

_QUICK_COMPILATION = {"xla_backend_optimization_level": 0}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ParityCase:
    """One case of a manifest; files are read when asked for.

    Attributes:
        name, family: as in the manifest; `CHECKED_FAMILIES` can be run.
        config: constructor arguments of the PyTorch program.
        state_files: the weights, all of them together.
        data_file: inputs and stages.
        noise_floor: stage -> largest float32 error of the PyTorch program.
        state_prefix: where in the weights the module of this case lies (family mamba).
    """

    name: str
    family: str
    config: Mapping[str, Any]
    state_files: tuple[Path, ...]
    data_file: Path
    noise_floor: Mapping[str, float]
    state_prefix: str = ""

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights under their published names, int8 codes multiplied by their scales."""
        tensors = read_tensors(self.state_files)
        scales = {name.removesuffix("::scale"): tensors.pop(name) for name in list(tensors) if name.endswith("::scale")}
        return {name: t.astype(np.float32) * scales[name] if name in scales else t for name, t in tensors.items()}

    def data(self) -> dict[str, np.ndarray]:
        """Everything in the data file, by its stored name."""
        return read_tensors([self.data_file])

    def convert(self, compute_dtype: ComputeDtype = "float32") -> ConvertedWeights:
        """The model of this case; what weights cannot show is taken from `config`."""
        config = self.config
        per_channel = config.get("classification_type") in ("mc", "mmc")
        channels = config.get("classification_num_channels", config.get("num_channels"))
        overrides: dict[str, Any] = {"output_channels": channels if per_channel else None}
        if self.family != "femba":
            overrides["num_heads"] = config.get("num_heads")
        if self.family != "luna":
            strategy = config.get("bidirectional_strategy", "add") if config.get("bidirectional", True) else "none"
            overrides["bidirectional"] = strategy
        if self.family == "femba":
            strides = config.get("stride", (None, None))
            overrides |= {"num_channels": config["num_channels"], "num_samples": config["seq_length"]}
            overrides |= {"channel_stride": strides[0], "patch_stride": strides[1]}
        return convert_tensors(
            self.tensors(),
            source=f"case {self.name}",
            overrides=Overrides(**overrides),
            compute_dtype=compute_dtype,
        )


@dataclass(frozen=True)
class StageCheck:
    """One line of the table: a stage of our run against the stored one.

    `relative_error` is `max_error` over the largest absolute value of the stored stage; `problem` says why a stage
    could not be compared at all, otherwise it is empty.
    """

    case: str
    stage: str
    max_error: float
    relative_error: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """The stage was compared, and the error (never NaN) is within the tolerance."""
        return not self.problem and self.max_error <= self.tolerance


def read_manifest(path: str | Path) -> list[ParityCase]:
    """The cases of a parity folder, given its `manifest.json` (or the folder).

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: not a manifest, or of another format version.
    """
    path = Path(path)
    path = path / "manifest.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest; give the manifest.json of a parity folder")
    try:
        manifest = json.loads(path.read_text())
        cases = manifest["cases"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a parity manifest: no list of cases can be read from it ({error!r})"
        ) from error
    if manifest.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {manifest.get('format')!r}; this version reads format {FORMAT_VERSION}")
    return [_case(path.parent, entry) for entry in cases]


def _case(root: Path, entry: Mapping[str, Any]) -> ParityCase:
    missing = [key for key in ("name", "family", "data_file") if key not in entry]
    if missing:
        raise ValueError(f"manifest in {root}: a case lacks {', '.join(missing)}")
    floor = entry.get("noise_floor_f32_vs_f64", {})
    return ParityCase(
        name=entry["name"],
        family=entry["family"],
        config=entry.get("config", {}),
        state_files=tuple(root / name for name in entry.get("state_files", ())),
        data_file=root / entry["data_file"],
        noise_floor={
            stage: value["max_abs_err"]
            for stage, value in floor.items()
            if isinstance(value, Mapping) and "max_abs_err" in value
        },
        state_prefix=entry.get("state_prefix") or "",
    )


def check_case(case: ParityCase, *, x64: bool = False) -> list[StageCheck]:
    """Run the stored inputs through our code and compare every stored stage, in the order of the computation.

    Raises:
        ValueError: a family that is not in `CHECKED_FAMILIES`, or weights that do not convert.
    """
    if case.family not in CHECKED_FAMILIES:
        raise ValueError(f"case {case.name}: family {case.family!r} is not one of {', '.join(CHECKED_FAMILIES)}")
    run = {"mamba": _run_mamba, "selective_scan": _run_scan}.get(case.family, _run_model)
    data = case.data()
    inputs = {name.removeprefix("in/"): array for name, array in data.items() if name.startswith("in/")}
    missing = [name for name in REQUIRED_INPUTS[case.family] if name not in inputs]
    if missing:
        raise ValueError(f"{case.data_file}: the input(s) {', '.join('in/' + name for name in missing)} are missing")
    dtype = np.float64 if x64 else np.float32
    inputs = {name: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x for name, x in inputs.items()}
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        computed = {stage: np.asarray(value) for stage, value in run(case, inputs, dtype).items()}
    stored = {name[4:] for name in data if name.startswith(("f32/", "f64/"))}
    order = {stage: i for i, stage in enumerate(case.noise_floor)}
    return [
        _compare(case, stage, computed.get(stage), data, x64=x64)
        for stage in sorted(stored, key=lambda stage: (order.get(stage, len(order)), stage))
        if not stage.startswith("loss")  # scalars that belong to stored gradients
    ]


def _compare(case: ParityCase, stage: str, ours: np.ndarray | None, data: Arrays, *, x64: bool) -> StageCheck:
    reference = data.get(f"f64/{stage}", data.get(f"f32/{stage}"))
    assert reference is not None
    scale = float(np.max(np.abs(reference), initial=0.0))
    if x64:
        rounded = reference.dtype != np.float64
        tolerance = ROUNDED_TOLERANCE * scale if rounded else FLOAT64_TOLERANCE
    else:
        tolerance = NOISE_FLOOR_FACTOR * case.noise_floor.get(stage, 0.0)
    nan = float("nan")
    if ours is None:
        return StageCheck(case.name, stage, nan, nan, tolerance, "our model has no such stage")
    if not x64 and stage not in case.noise_floor:
        return StageCheck(case.name, stage, nan, nan, tolerance, "the manifest has no noise floor for it")
    if x64 and f"f64/{stage}" not in data:
        return StageCheck(case.name, stage, nan, nan, tolerance, "no float64 reference is stored")
    ours = _in_stored_layout(stage, ours, reference.shape)
    if ours.shape != reference.shape:
        return StageCheck(case.name, stage, nan, nan, tolerance, f"shape {ours.shape}, stored {reference.shape}")
    error = float(np.max(np.abs(ours.astype(np.float64) - reference.astype(np.float64)), initial=0.0))
    return StageCheck(case.name, stage, error, error / scale if scale else error, tolerance)


def _in_stored_layout(stage: str, ours: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ours keep (B, C, S) or (B, S) apart where the files merge them, and keep features last."""
    if stage.startswith("patch_embed.proj_in."):  # (B, C, S, W, O) -> (B, O, C*S, W)
        ours = np.moveaxis(ours, -1, 1)
    if stage == "dt_raw":  # (B, L, D) -> (B, D, L)
        ours = np.swapaxes(ours, 1, 2)
    return ours.reshape(shape) if ours.size == np.prod(shape) else ours


# --- our side of each family -----------------------------------------------------------------------------------------


def _run_model(case: ParityCase, inputs: Arrays, dtype: type) -> dict[str, jax.Array]:
    weights = case.convert("float64" if dtype is np.float64 else "float32")
    channel_ids = inputs.get("channel_names")

    # Float64 errors are far below the tolerance however it is compiled; float32 is checked as users run it.
    @functools.partial(jax.jit, compiler_options=_QUICK_COMPILATION if dtype is np.float64 else None)
    def run(params: nnx.State, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stages: dict[str, jax.Array] = {}
        nnx.merge(weights.graphdef, params)(
            arrays["x"],
            arrays.get("channel_locations"),
            channel_ids=None if channel_ids is None else arrays["channel_names"],
            mask=arrays.get("mask"),
            position_noise=arrays.get("loc_noise"),
            reference_position_tiling=True,
            stages=stages,
        )
        return stages

    known = ("x", "channel_locations", "channel_names", "mask", "loc_noise")
    arrays = {
        name: jnp.asarray(inputs[name].astype(np.int32) if name == "channel_names" else inputs[name])
        for name in known
        if name in inputs
    }
    return run(weights.params, arrays)


def _run_mamba(case: ParityCase, inputs: Arrays, dtype: type) -> dict[str, jax.Array]:
    block = mamba_block(case, dtype)
    stages: dict[str, jax.Array] = {}
    stages["out"] = block(jnp.asarray(inputs["x"]), stages=stages)
    return stages


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


def _run_scan(case: ParityCase, inputs: Arrays, dtype: type) -> dict[str, jax.Array]:  # noqa: ARG001  (one signature)
    def time_major(name: str) -> jax.Array:  # (B, D, L) -> (B, L, D)
        return jnp.asarray(inputs[name].swapaxes(1, 2))

    y, last = selective_scan(
        time_major("u"),
        time_major("delta"),
        jnp.asarray(inputs["A"]),
        time_major("B"),
        time_major("C"),
        jnp.asarray(inputs["D"]) if "D" in inputs else None,
        time_major("z") if "z" in inputs else None,
        delta_bias=jnp.asarray(inputs["delta_bias"]) if "delta_bias" in inputs else None,
        delta_softplus=bool(case.config.get("delta_softplus", False)),
    )
    return {"out": y.swapaxes(1, 2), "last_state": last}
