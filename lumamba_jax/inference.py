"""Signals in, embeddings or predictions out: `load`, `embed`, `predict`, `run_batches`.

Arrays may have any number of windows, channels and patches. Each is padded to the next size of a short ladder
(2^k and 1.5 * 2^k) with exact masks, so that few programs are compiled and the padding changes no result.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lumamba_jax.architectures import Model, ModelConfig, abstract_model
from lumamba_jax.checkpoint import describe, is_export, load_pretrained
from lumamba_jax.compilation import (
    CPU_BATCH_BLOCK,
    compiler_options,
    enable_compilation_cache,
    on_local_devices,
    over_windows,
)
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import ComputeDtype
from lumamba_jax.losses import view_embeddings
from lumamba_jax.lumamba import LuMamba
from lumamba_jax.streaming import DEFAULT_PART, encode_recording
from lumamba_jax.tasks import Normalization, forward, normalize
from lumamba_jax.tokens import position_encoding
from lumamba_jax.torch_architecture import NO_OVERRIDES, Overrides
from lumamba_jax.torch_files import files_at
from lumamba_jax.torch_weights import load_torch_weights
from lumamba_jax.weight_sources import resolve

Program = Callable[[nnx.GraphDef, Normalization, nnx.State, Mapping[str, Array]], Array]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, from `load`.

    Attributes:
        config: sizes and head.
        graphdef, params: `nnx.merge(graphdef, params)` is the module.
        metadata: the export's JSON: provenance (task, class names, sampling rate, training run), versions. For
            published weights, provenance holds where they came from and what the conversion assumed.
        position_dtype: precision of the electrode positions' encoding, see `load`.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    metadata: dict[str, Any]
    position_dtype: Literal["float32", "float64"] = "float32"

    @property
    def task(self) -> dict[str, Any]:
        """The task it was trained for, as stored (`tasks.TaskConfig`); empty for a converted checkpoint."""
        return self.metadata["provenance"].get("task", {})

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of the outputs."""
        return self.metadata["provenance"].get("class_names")

    @property
    def normalization(self) -> Normalization:
        """How its input is normalised; as the architecture was published unless the training said otherwise."""
        return self.task.get("normalization", self.config.normalization)

    @functools.cached_property
    def replicated_params(self) -> nnx.State:
        """`params` on every local device."""
        return on_local_devices(self.params)

    def module(self) -> Model:
        """The module itself, for intermediates, attention scores and reconstructions."""
        return nnx.merge(self.graphdef, self.params)


def load(
    source: str | Path,
    *,
    sha256: str | None = None,
    overrides: Overrides | None = None,
    compute_dtype: ComputeDtype | None = None,
    position_dtype: Literal["float32", "float64"] = "float32",
) -> LoadedModel:
    """Load a model of the family from wherever its weights are; what it compiles is kept on disk from then on.

    Args:
        source: an exported model (`save_pretrained`, `convert_torch_weights.py`), a training run (its best model), a
            published weight file (`.safetensors`, an index of shards, `.pt`, `.ckpt`) or a folder with one,
            `hf://owner/repo[@revision]/file`, or a known name (`weight_sources.ALIASES`).
        sha256: the checksum the file must have.
        overrides: published files: what weights cannot show (`torch_architecture.Overrides`).
        compute_dtype: None = as exported; float32 for published files.
        position_dtype: "float32" encodes electrode positions in the arithmetic the published weights were trained
            with; "float64" is more exact and moves outputs by about 1e-5 (E = 64) to 1e-1 (E = 128).

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, of none of the architectures, or tensors that do not fit.
        ImportError, PermissionError, ConnectionError: of the hub, see `weight_sources.resolve`.
    """
    if position_dtype not in ("float32", "float64"):
        raise ValueError(f"position_dtype must be 'float32' or 'float64', not {position_dtype!r}")
    enable_compilation_cache()
    found = resolve(source, sha256=sha256)
    if is_export(found.path):
        if overrides is not None:
            raise ValueError(f"{source} is an exported model, which overrides nothing: they are for published files")
        config, params, metadata = load_pretrained(found.path)
        graphdef = abstract_model(config)[0]
    else:
        converted = load_torch_weights(files_at(found.path), overrides=overrides or NO_OVERRIDES)
        config, graphdef, params = converted.config, converted.graphdef, converted.params
        metadata = describe(config, {**found.provenance, **converted.report()})
    if compute_dtype is not None and compute_dtype != config.compute_dtype:
        config = config.replace(compute_dtype=compute_dtype)
        graphdef, expected = abstract_model(config)
        params = jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, expected)
    return LoadedModel(config, graphdef, jax.device_put(params), metadata, position_dtype)


def embed(
    model: LoadedModel,
    signal_uv: Float[np.ndarray, "*N C T"],
    locations: Float[np.ndarray, "*N C 3"] | None = None,
    *,
    per_patch: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """Embed windows (or one window).

    Args:
        model: from `load`.
        signal_uv: microvolts, `(N, C, T)` or `(C, T)`; T a multiple of the patch size, rate as in training. FEMBA:
            exactly the channels, in their order, and the length of its training.
        locations: electrode positions in metres, head frame, `(N, C, 3)`, or `(C, 3)` for all windows; FEMBA does
            not use them.
        per_patch: the latent of every patch instead of its mean over time.
        batch_size: windows per forward pass.

    Returns: float32 `(N, M)`, or `(N, S, M)` with `per_patch`; without the first axis for a single window.
    Raises: ValueError for shapes that do not fit, values that are not finite, T not a multiple of the patch size.
    """
    latents = _in_batches(model, signal_uv, locations, batch_size, _encode if per_patch else _pool)
    return latents[..., : model.config.num_patches(np.shape(signal_uv)[-1]), :] if per_patch else latents


def embed_recording(
    model: LoadedModel,
    signal_uv: Any,
    locations: Float[np.ndarray, "C 3"],
    *,
    per_patch: bool = False,
    part: int = DEFAULT_PART,
) -> np.ndarray:
    """Embed a recording of any length as one window, in bounded memory (`streaming`); LuMamba only.

    Args:
        model: from `load`, a LuMamba.
        signal_uv: microvolts, `(C, T)`; NumPy, a memory map or an HDF5 data set, read part by part. T a multiple of the
            patch size, rate as in training.
        locations: electrode positions in metres, head frame.
        per_patch: the latent of every patch instead of its mean over time.
        part: patches that are held at once.

    Returns: float32 `(M,)`, or `(S, M)` with `per_patch`; what `embed` gives for the same window.
    Raises: ValueError for another architecture or normalisation, shapes that do not fit, values that are not finite.
    """
    module = model.module()
    if not isinstance(module, LuMamba):
        raise ValueError(
            f"a {model.config.architecture} cannot encode a recording part by part: LUNA attends over all patches at "
            "once, FEMBA's window is fixed; cut the recording into windows and use embed"
        )
    if model.normalization != "channel_zscore":
        raise ValueError(
            f"this model normalises with {model.normalization}, but only channel_zscore runs part by part: "
            "cut the recording into windows and use embed"
        )
    dtype = np.float64 if model.position_dtype == "float64" else np.float32
    parts = encode_recording(module, signal_uv, locations, position_dtype=dtype, part=part)
    patches = model.config.num_patches(signal_uv.shape[1])
    if per_patch:
        return np.concatenate([np.asarray(x[0], np.float32) for x in parts])[:patches]
    last = patches - (len(parts) - 1) * part
    totals = [np.asarray(x[0, : last if i == len(parts) - 1 else part].sum(axis=0)) for i, x in enumerate(parts)]
    return (np.sum(totals, axis=0, dtype=np.float64) / patches).astype(np.float32)


def evaluation(
    model: LoadedModel, output: Literal["embedding", "prediction"]
) -> Callable[[nnx.State, dict[str, Array]], Array]:
    """The pure function `(params, {"signal": (N, C, T), "locations": (N, C, 3)}) -> (N, M) or (N, K)` to compile.

    Windows without padding, in microvolts; what `embed` and `predict` return.
    Raises: ValueError as `predict` for a model without a classifier.
    """
    if output == "embedding":
        return functools.partial(_pool, model.graphdef, model.normalization)
    finish = _finish(model)

    def run(params: nnx.State, batch: dict[str, Array]) -> Array:
        return finish(_classify(model.graphdef, model.normalization, params, batch))

    return run


def _finish(model: LoadedModel) -> Callable[[Array], Array]:
    """What makes probabilities (or predicted values) of logits."""
    if not model.config.classifies:
        raise ValueError(f"this model has the head {model.config.head!r}, which predicts nothing: fine-tune it first")
    if model.task.get("kind") == "regress":
        return lambda logits: logits
    independent = model.config.output_channels is not None and model.config.num_outputs is None
    return jax.nn.sigmoid if independent else functools.partial(jax.nn.softmax, axis=-1)


def predict(
    model: LoadedModel,
    signal_uv: Float[np.ndarray, "*N C T"],
    locations: Float[np.ndarray, "*N C 3"] | None = None,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Class probabilities `(N, K)`, or the predicted values `(N, K)` of a regression. Arguments as in `embed`.

    Raises: ValueError when the model has no classification or regression head.
    """
    finish = _finish(model)
    return np.asarray(finish(_in_batches(model, signal_uv, locations, batch_size, _classify)))


def run_batches(
    model: LoadedModel, batches: Iterable[Mapping[str, np.ndarray]], output: Literal["embedding", "prediction"]
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n D"]]:
    """Embed or predict the windows of padded batches of any montages and lengths: what `embed` and `predict` give.

    One program is compiled for each shape of batch. The next batch is read while one is computed. On a CPU, batches of
    `whole_blocks` windows give every window the same bits, whatever the size of the batch.

    Args:
        model: from `load`.
        batches: each `signal` (B, C, T) microvolts, `locations` (B, C, 3) metres, `channel_mask` (B, C), `patch_mask`
            (B, S), `window_mask` (B,), False in rows that are left out, `window_id` (B,) (docs/architecture.md).
        output: embeddings `(n, M)`, or probabilities (values of a regression) `(n, K)`.

    Returns: (window ids, float32 outputs), in the order of the batches.
    Raises: ValueError as `predict`, and when there is no window.
    """
    finish = _finish(model) if output == "prediction" else None
    program, static = _compiled(_classify if finish else _pool), (model.graphdef, model.normalization)
    encoded: dict[bytes, np.ndarray] = {}
    waiting: deque[tuple[np.ndarray, Array]] = deque()
    ids, outputs = [], []

    def collect() -> None:
        real, values = waiting.popleft()
        outputs.append(np.asarray(values if finish is None else finish(values), np.float32)[real])

    for batch in batches:
        real = np.asarray(batch["window_mask"])
        waiting.append((real, program(*static, model.replicated_params, _inputs(model, batch, encoded))))
        ids.append(np.asarray(batch["window_id"])[real])
        if len(waiting) > 1:
            collect()
    while waiting:
        collect()
    if not sum(map(len, ids)):
        raise ValueError("there is no window to evaluate")
    return np.concatenate(ids), np.concatenate(outputs)


def whole_blocks(batch_size: int) -> int:
    """The next batch size that the local devices divide into whole blocks of windows."""
    block = jax.local_device_count() * (CPU_BATCH_BLOCK if jax.default_backend() == "cpu" else 1)
    return -(-batch_size // block) * block


def _inputs(
    model: LoadedModel, batch: Mapping[str, np.ndarray], encoded: dict[bytes, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the programs take of a batch, with the encoding of each montage made once (`encoded`)."""
    if isinstance(model.config, FembaConfig):
        return {"signal": np.asarray(batch["signal"])}
    locations, masks = np.asarray(batch["locations"], np.float32), np.asarray(batch["channel_mask"])
    dtype = np.float64 if model.position_dtype == "float64" else np.float32
    rows = []
    for own, mask in zip(locations, masks, strict=True):
        key = own.tobytes() + mask.tobytes()
        if key not in encoded:
            encoded[key] = position_encoding(own, model.config.embed_dim, mask, dtype=dtype).astype(np.float32)
        rows.append(encoded[key])
    names = ("signal", "locations", "channel_mask", "patch_mask")
    return {name: np.asarray(batch[name]) for name in names} | {"position_encoding": np.stack(rows)}


def _in_batches(model: LoadedModel, signal_uv: Any, locations: Any, batch_size: int, program: Program) -> np.ndarray:
    signal, locations, single = _checked(model.config, signal_uv, locations)
    static = (model.graphdef, model.normalization)
    outputs = []
    for start in range(0, len(signal), batch_size):
        rows = slice(start, start + batch_size)
        batch = _padded(model, signal[rows], locations[rows])
        outputs.append(np.asarray(_compiled(program)(*static, model.replicated_params, batch))[: len(signal[rows])])
    joined = np.concatenate(outputs)
    return joined[0] if single else joined


def _checked(config: ModelConfig, signal_uv: Any, locations: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    signal = np.asarray(signal_uv, np.float32)
    single = signal.ndim == 2
    signal = signal[None] if single else signal
    if signal.ndim != 3 or 0 in signal.shape:
        raise ValueError(f"signal must be (windows, channels, samples) or (channels, samples), not {signal.shape}")
    config.check_window(*signal.shape[1:])
    expected = (*signal.shape[:2], 3)
    if locations is None and isinstance(config, FembaConfig):
        locations = np.zeros(expected, np.float32)
    if locations is None:
        raise ValueError(f"{config.architecture} needs the electrode positions: give locations {expected} in metres")
    locations = np.asarray(locations, np.float32)
    if locations.shape not in (expected, expected[1:]):
        raise ValueError(f"locations must be {expected} or {expected[1:]} for this signal, not {locations.shape}")
    if not (np.isfinite(signal).all() and np.isfinite(locations).all()):
        raise ValueError("the signal or the locations hold NaN or infinite values: remove or interpolate them first")
    return signal, np.broadcast_to(locations, expected), single


def _padded(model: LoadedModel, signal: np.ndarray, locations: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of bucket shape (docs/architecture.md, "The batch") whose first entries are the given windows."""
    rows, channels, samples = signal.shape
    size = model.config.patch_size
    patches = samples // size
    b, c, s = (bucket_size(size) for size in (rows, channels, patches))
    if isinstance(model.config, FembaConfig):
        return {"signal": np.pad(signal, ((0, b - rows), (0, 0), (0, 0)))}  # a fixed grid: rows only
    batch = {
        "signal": np.zeros((b, c, s * size), np.float32),
        "locations": np.zeros((b, c, 3), np.float32),
        "channel_mask": np.zeros((b, c), bool),
        "patch_mask": np.zeros((b, s), bool),
    }
    batch["signal"][:rows, :channels, :samples] = signal
    batch["locations"][:rows, :channels] = locations
    # Filler rows keep one real channel and patch, so that nothing is a mean over nothing.
    batch["channel_mask"][:, :channels] = True
    batch["patch_mask"][:, :patches] = True
    dtype = np.float64 if model.position_dtype == "float64" else np.float32
    encoding = position_encoding(batch["locations"], model.config.embed_dim, batch["channel_mask"], dtype=dtype)
    return batch | {"position_encoding": encoding.astype(np.float32)}


def bucket_size(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def _encode(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: Mapping[str, Array]
) -> Float[Array, "B S M"]:
    inputs = {key: batch.get(key) for key in ("channel_mask", "patch_mask", "position_encoding")}
    model: Model = nnx.merge(graphdef, params)
    return model.encode(normalize(batch, normalization), batch.get("locations"), **inputs).latent


def _pool(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: Mapping[str, Array]
) -> Float[Array, "B M"]:
    latent = _encode(graphdef, normalization, params, batch)
    patch_mask = batch.get("patch_mask", jnp.ones(latent.shape[:2], bool))
    return view_embeddings(latent[None], patch_mask[None])[0]


def _classify(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: Mapping[str, Array]
) -> Float[Array, "B K"]:
    logits = forward(nnx.merge(graphdef, params), batch, normalization)[0].logits
    assert logits is not None, "predict refuses models without a classification or regression head"
    return logits


@functools.cache
def _compiled(run: Program) -> Program:
    """`run` over the batch on all local devices, compiled; made at the first use, when the platform is known."""

    def whole(
        graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: dict[str, Array]
    ) -> Array:
        return over_windows(functools.partial(run, graphdef, normalization), params, batch)

    return jax.jit(whole, static_argnums=(0, 1), compiler_options=compiler_options())
