"""A parity folder: what the PyTorch program computed, case by case, and one line per comparison with it.

A folder holds `manifest.json` and safetensors files. The manifest has `cases`, each with `name`, `family`, `config`
(the PyTorch constructor's arguments, or those of what was run), `state_files`, `data_file` and
`noise_floor_f32_vs_f64`: per stage the largest error of the PyTorch program in float32 against itself in float64.
A data file has `in/<name>` inputs, `f32/<stage>` and `f64/<stage>` outputs, `grad.../<name>` gradients in float64 and
`after/<name>` trained parameters.
`examples/export_torch_stages.py` writes such a folder for any checkpoint.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumamba_jax.heads import ComputeDtype
from lumamba_jax.torch_architecture import Overrides
from lumamba_jax.torch_files import read_tensors
from lumamba_jax.torch_weights import ConvertedWeights, convert_tensors

FORMAT_VERSION = 1
NOISE_FLOOR_FACTOR = 4.0
"""Our float32 may be this many times as far from float64 as the reference's own float32."""
FLOAT64_TOLERANCE = 1e-9
ROUNDED_TOLERANCE = 1e-6
"""Of the stage's scale, where the file holds the float64 value rounded to float32."""
GRADIENT_TOLERANCE = 1e-8
"""Of gradients, gradient norms and trained parameters, absolute, in float64."""

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class ParityCase:
    """One case of a manifest; files are read when asked for.

    Attributes:
        name, family: as in the manifest.
        config: arguments of the PyTorch program.
        state_files: the weights, all of them together.
        data_file: inputs and stages.
        noise_floor: stage -> largest float32 error of the PyTorch program.
        state_prefix: where in the weights the module of this case lies (family mamba).
        parameter_order: published names in the order of per-parameter columns (family train).
        folder: of the manifest.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    state_files: tuple[Path, ...]
    data_file: Path
    noise_floor: Mapping[str, float]
    state_prefix: str = ""
    parameter_order: tuple[str, ...] = ()
    folder: Path = Path()

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights under their published names, int8 codes multiplied by their scales."""
        tensors = read_tensors(self.state_files)
        scales = {name.removesuffix("::scale"): tensors.pop(name) for name in list(tensors) if name.endswith("::scale")}
        return {name: t.astype(np.float32) * scales[name] if name in scales else t for name, t in tensors.items()}

    def data(self) -> dict[str, np.ndarray]:
        """Everything in the data file, by its stored name."""
        return read_tensors([self.data_file])

    def convert(self, compute_dtype: ComputeDtype = "float32") -> ConvertedWeights:
        """The model of this case; what weights cannot show is taken from `config`, or assumed where that is silent.

        Raises:
            ValueError: weights that do not convert.
        """
        config = self.config.get("model", self.config)
        per_channel = config.get("classification_type") in ("mc", "mmc")
        channels = config.get("classification_num_channels", config.get("num_channels"))
        overrides: dict[str, Any] = {"output_channels": channels if per_channel else None}
        if self.family != "femba":
            overrides["num_heads"] = config.get("num_heads")
        if self.family != "luna":
            strategy = config.get("bidirectional_strategy", "add") if config.get("bidirectional", True) else "none"
            overrides["bidirectional"] = strategy
        if self.family == "femba":
            strides = config.get("stride") or (None, None)
            overrides |= {"num_channels": config.get("num_channels"), "num_samples": config.get("seq_length")}
            overrides |= {"channel_stride": strides[0], "patch_stride": strides[1]}
        return convert_tensors(
            self.tensors(),
            source=f"case {self.name}",
            overrides=Overrides(**overrides),
            compute_dtype=compute_dtype,
        )


@dataclass(frozen=True)
class StageCheck:
    """One line of the table: a stage of our run against the stored one, or a group of tensors by its worst.

    `relative_error` is `max_error` over the largest absolute value of what is stored; `where` names the worst tensor of
    a group; `problem` says why a stage could not be compared at all; `skipped` why it need not be in this precision.
    """

    case: str
    stage: str
    max_error: float
    relative_error: float
    tolerance: float
    problem: str = ""
    where: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """The stage was compared, and the error (never NaN) is within the tolerance; or it was rightly skipped."""
        return bool(self.skipped) or (not self.problem and self.max_error <= self.tolerance)


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
        parameter_order=tuple(entry.get("param_order") or ()),
        folder=root,
    )


def inputs_of(data: Arrays, *, x64: bool) -> dict[str, np.ndarray]:
    """What lies under `in/`, floating point in the precision of the run, integers as int32."""
    floating = np.float64 if x64 else np.float32
    inputs = {name.removeprefix("in/"): np.asarray(array) for name, array in data.items() if name.startswith("in/")}
    return {
        name: x.astype(floating)
        if np.issubdtype(x.dtype, np.floating)
        else x
        if x.dtype == bool
        else x.astype(np.int32)
        for name, x in inputs.items()
    }


# --- comparisons ------------------------------------------------------------------------------------------------------


def compare(case: str, stage: str, ours: Any, stored: Any, tolerance: float) -> StageCheck:
    """One tensor: the largest absolute difference, in float64, may be `tolerance`."""
    nan = float("nan")
    if ours is None:
        return StageCheck(case, stage, nan, nan, tolerance, "our model has no such stage")
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    if ours.shape != stored.shape:
        return StageCheck(case, stage, nan, nan, tolerance, f"shape {ours.shape}, stored {stored.shape}")
    error = float(np.max(np.abs(ours - stored), initial=0.0))
    scale = float(np.max(np.abs(stored), initial=0.0))
    return StageCheck(case, stage, error, error / scale if scale else error, tolerance)


def compare_group(case: str, stage: str, ours: Arrays, stored: Arrays, tolerance: float) -> StageCheck:
    """Many tensors of one kind in one line, by the worst; a tensor that we lack is the worst of all.

    The relative error is the worst one's over the largest value of all tensors: a gradient that is zero but for
    rounding has no scale of its own.
    """
    checks = [compare(case, name, ours.get(name), x, tolerance) for name, x in stored.items()]
    title = f"{stage} ({len(checks)} tensors)"
    if not checks:
        return StageCheck(case, title, float("nan"), float("nan"), tolerance, "nothing of the kind is stored")
    # NaN is not above the tolerance; it must not hide behind a number either.
    unfit = next((check for check in checks if check.problem or not np.isfinite(check.max_error)), None)
    worst = unfit or max(checks, key=lambda check: check.max_error)
    scale = max(float(np.max(np.abs(x), initial=0.0)) for x in stored.values())
    relative = worst.max_error / scale if scale else worst.max_error
    return StageCheck(case, title, worst.max_error, relative, tolerance, worst.problem, where=worst.stage)


def float64_only(case: str, what: str) -> StageCheck:
    """The line that a float32 run has for what is compared in float64."""
    nan = float("nan")
    return StageCheck(case, what, nan, nan, nan, skipped="compared in float64 only")


def with_prefix(data: Arrays, prefix: str) -> dict[str, Any]:
    """The stored tensors under `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in data.items() if name.startswith(prefix)}


def stored_stages(data: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Every stage and its reference: the float64 value where there is one, otherwise the float32 one."""
    double, single = with_prefix(data, "f64/"), with_prefix(data, "f32/")
    yield from (single | double).items()
