"""Signals in, embeddings or predictions out: `load`, `embed`, `predict`.

Arrays may have any number of windows, channels and patches. Each is padded to the next size of a short ladder
(2^k and 1.5 * 2^k) with exact masks, so that few programs are compiled and the padding changes no result.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lumamba_jax.checkpoint import load_pretrained
from lumamba_jax.losses import view_embeddings
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.tasks import Normalization, forward, normalize


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, from `load`.

    Attributes:
        config: sizes and head.
        graphdef, params: `nnx.merge(graphdef, params)` is the `LuMamba` module.
        metadata: the export's JSON: provenance (task, class names, sampling rate, training run), versions.
    """

    config: LuMambaConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    metadata: dict[str, Any]

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
        """How its input is normalised; LuMamba's z-score unless the training said otherwise."""
        return self.task.get("normalization", "channel_zscore")

    def module(self) -> LuMamba:
        """The module itself, for intermediates, attention scores and reconstructions."""
        return nnx.merge(self.graphdef, self.params)


def load(path: str | Path) -> LoadedModel:
    """Load an exported model (`save_pretrained`, `convert_torch_weights.py`) or the best model of a training run.

    Raises: FileNotFoundError or ValueError as `checkpoint.load_pretrained`.
    """
    config, params, metadata = load_pretrained(path)
    graphdef = nnx.split(nnx.eval_shape(lambda: LuMamba(config, rngs=nnx.Rngs(0))))[0]
    return LoadedModel(config, graphdef, jax.tree.map(jnp.asarray, params), metadata)


def embed(
    model: LoadedModel,
    signal_uv: Float[np.ndarray, "*N C T"],
    locations: Float[np.ndarray, "*N C 3"],
    *,
    per_patch: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """Embed windows (or one window).

    Args:
        model: from `load`.
        signal_uv: microvolts, `(N, C, T)` or `(C, T)`; T a multiple of the patch size, rate as in training.
        locations: electrode positions in metres, head frame, `(N, C, 3)`, or `(C, 3)` for all windows.
        per_patch: the latent of every patch instead of its mean over time.
        batch_size: windows per forward pass.

    Returns: float32 `(N, M)`, or `(N, S, M)` with `per_patch`; without the first axis for a single window.
    Raises: ValueError for shapes that do not fit, values that are not finite, T not a multiple of the patch size.
    """
    latents = _in_batches(model, signal_uv, locations, batch_size, _pooled_latent if not per_patch else _latent)
    patches = np.shape(signal_uv)[-1] // model.config.patch_size
    return latents[..., :patches, :] if per_patch else latents


def predict(
    model: LoadedModel,
    signal_uv: Float[np.ndarray, "*N C T"],
    locations: Float[np.ndarray, "*N C 3"],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Class probabilities `(N, K)`, or the predicted values `(N, K)` of a regression. Arguments as in `embed`.

    Raises: ValueError when the model has no classification or regression head.
    """
    if model.config.head in ("reconstruction", "none"):
        raise ValueError(f"this model has the head {model.config.head!r}, which predicts nothing: fine-tune it first")
    logits = _in_batches(model, signal_uv, locations, batch_size, _logits)
    if model.task.get("kind") == "regress":
        return logits
    independent = model.config.output_channels is not None and model.config.num_outputs is None
    return np.asarray(jax.nn.sigmoid(logits) if independent else jax.nn.softmax(logits, axis=-1))


def _in_batches(model: LoadedModel, signal_uv: Any, locations: Any, batch_size: int, program: Any) -> np.ndarray:
    signal, locations, single = _checked(model.config, signal_uv, locations)
    static = (model.graphdef, model.normalization)
    outputs = []
    for start in range(0, len(signal), batch_size):
        rows = slice(start, start + batch_size)
        batch = _padded(signal[rows], locations[rows], model.config.patch_size)
        outputs.append(np.asarray(program(*static, model.params, batch))[: len(signal[rows])])
    joined = np.concatenate(outputs)
    return joined[0] if single else joined


def _checked(config: LuMambaConfig, signal_uv: Any, locations: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    signal, locations = np.asarray(signal_uv, np.float32), np.asarray(locations, np.float32)
    single = signal.ndim == 2
    signal = signal[None] if single else signal
    if signal.ndim != 3 or 0 in signal.shape:
        raise ValueError(f"signal must be (windows, channels, samples) or (channels, samples), not {signal.shape}")
    expected = (*signal.shape[:2], 3)
    if locations.shape not in (expected, expected[1:]):
        raise ValueError(f"locations must be {expected} or {expected[1:]} for this signal, not {locations.shape}")
    if signal.shape[2] % config.patch_size:
        raise ValueError(
            f"a window has {signal.shape[2]} samples, not a multiple of the patch size {config.patch_size}: crop it"
        )
    if not (np.isfinite(signal).all() and np.isfinite(locations).all()):
        raise ValueError("the signal or the locations hold NaN or infinite values: remove or interpolate them first")
    return signal, np.broadcast_to(locations, expected), single


def _padded(signal: np.ndarray, locations: np.ndarray, patch_size: int) -> dict[str, np.ndarray]:
    """A batch of bucket shape (docs/architecture.md, "The batch") whose first entries are the given windows."""
    rows, channels, samples = signal.shape
    patches = samples // patch_size
    b, c, s = (_ladder(size) for size in (rows, channels, patches))
    batch = {
        "signal": np.zeros((b, c, s * patch_size), np.float32),
        "locations": np.zeros((b, c, 3), np.float32),
        "channel_mask": np.zeros((b, c), bool),
        "patch_mask": np.zeros((b, s), bool),
    }
    batch["signal"][:rows, :channels, :samples] = signal
    batch["locations"][:rows, :channels] = locations
    # Filler rows keep one real channel and patch, so that nothing is a mean over nothing.
    batch["channel_mask"][:, :channels] = True
    batch["patch_mask"][:, :patches] = True
    return batch


def _ladder(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def _encode(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: dict[str, Array]
) -> Float[Array, "B S M"]:
    masks = {key: batch[key] for key in ("channel_mask", "patch_mask")}
    return nnx.merge(graphdef, params).encode(normalize(batch, normalization), batch["locations"], **masks).latent


_latent = jax.jit(_encode, static_argnums=(0, 1))


@jax.jit(static_argnums=(0, 1))
def _pooled_latent(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: dict[str, Array]
) -> Float[Array, "B M"]:
    latent = _encode(graphdef, normalization, params, batch)
    return view_embeddings(latent[None], batch["patch_mask"][None])[0]


@jax.jit(static_argnums=(0, 1))
def _logits(
    graphdef: nnx.GraphDef, normalization: Normalization, params: nnx.State, batch: dict[str, Array]
) -> Float[Array, "B K"]:
    logits = forward(nnx.merge(graphdef, params), batch, normalization)[0].logits
    assert logits is not None, "predict refuses models without a classification or regression head"
    return logits
