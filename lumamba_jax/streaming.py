"""A recording of hours as one window, in bounded memory: LuMamba's blocks carry their state from part to part.

The result is that of the whole window at once. What depends on the whole window is gathered first: the z-score of each
channel, then the three group norms of the time path (one pass over the signal each: the convolutions before are cheap).
Tokens and channel unification then go part by part, and each Mamba direction runs through the parts with its carry.

Memory: the latents of the window, 4 (M + M) bytes per patch and direction, and the activations of one part.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.compilation import compiler_options
from lumamba_jax.lumamba import LuMamba, LuMambaBlock, LuMambaConfig
from lumamba_jax.mamba import MambaCarry, join
from lumamba_jax.normalization import EPS
from lumamba_jax.tokens import FoldedNorm, NormSums, fold_norm, position_encoding

DEFAULT_PART = 512

Normalizer = tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]
"""Mean and standard deviation of every channel, microvolts."""


class Recording(NamedTuple):
    """A signal read part by part.

    Attributes:
        signal: `(C, T)`, microvolts; anything that slices like an array (NumPy, memory map, HDF5 data set).
        patch_size: P.
        part: patches per part.
    """

    signal: Any
    patch_size: int
    part: int

    @property
    def num_patches(self) -> int:
        """Patches S of the window."""
        return self.signal.shape[1] // self.patch_size

    def masks(self) -> list[Bool[np.ndarray, "1 R"]]:
        """Which patches of each part are real."""
        starts = range(0, self.num_patches, self.part)
        return [np.arange(self.part)[None] < self.num_patches - first for first in starts]

    def parts(self) -> Iterator[tuple[Float[np.ndarray, "1 C R P"], Bool[np.ndarray, "1 R"]]]:
        """Patches of each part, the last one padded with zeros, and which of them are real."""
        channels, size = self.signal.shape[0], self.patch_size
        for first in range(0, self.num_patches, self.part):
            count = min(self.part, self.num_patches - first)
            patches = np.zeros((1, channels, self.part, size), np.float32)
            raw = np.asarray(self.signal[:, first * size : (first + count) * size], np.float32)
            if not np.isfinite(raw).all():
                seconds = f"samples {first * size} to {(first + count) * size}"
                raise ValueError(f"the signal holds NaN or infinite values in {seconds}: interpolate them first")
            patches[0, :, :count] = raw.reshape(channels, count, size)
            yield patches, np.arange(self.part)[None] < count


def encode_recording(
    model: LuMamba,
    signal_uv: Any,
    locations: Float[np.ndarray, "C 3"],
    *,
    position_dtype: type[np.floating] = np.float32,
    part: int = DEFAULT_PART,
) -> list[Float[Array, "1 R M"]]:
    """Encode `(C, T)` microvolts as one window, z-scored per channel over the whole of it.

    Args:
        model: LuMamba; the other architectures cannot be run in parts (LUNA attends over all patches at once, FEMBA's
            window is fixed).
        signal_uv: anything that slices like an array; T a multiple of the patch size.
        locations: electrode positions in metres, head frame.
        position_dtype: see `tokens.position_encoding`.
        part: patches per part, at least as many as the Mamba convolution is wide.

    Returns: the latents of each part, in order; the last one has padding behind its real patches.
    Raises: ValueError for shapes that do not fit, NaN, or a part that is too short.
    """
    config = model.config
    assert isinstance(config, LuMambaConfig)
    if part < config.d_conv:
        raise ValueError(f"parts of {part} patches are too short: give at least {config.d_conv}")
    config.check_window(*signal_uv.shape)
    if np.shape(locations) != (signal_uv.shape[0], 3):
        raise ValueError(f"locations must be {(signal_uv.shape[0], 3)} for this signal, not {np.shape(locations)}")
    recording = Recording(signal_uv, config.patch_size, part)
    normalizer = _channel_statistics(recording)
    encoding = position_encoding(np.asarray(locations)[None], config.embed_dim, dtype=position_dtype)
    parts = _tokens_of(model, recording, normalizer, encoding.astype(np.float32))
    masks = recording.masks()
    for block in model.blocks:
        parts = _through_block(block, parts, masks)
    return parts


def _channel_statistics(recording: Recording) -> Normalizer:
    """Mean and unbiased standard deviation of every channel over the whole window, in two passes in float64."""
    count, channels = recording.num_patches * recording.patch_size, recording.signal.shape[0]
    mean, squares = np.zeros(channels), np.zeros(channels)
    for patches, _ in recording.parts():
        mean += patches.sum(axis=(0, 2, 3), dtype=np.float64) / count
    for patches, mask in recording.parts():
        centred = np.where(mask[:, None, :, None], patches - mean.astype(np.float32)[None, :, None, None], 0)
        squares += np.square(centred).sum(axis=(0, 2, 3), dtype=np.float64)
    return mean.astype(np.float32), np.sqrt(squares / max(count - 1, 1)).astype(np.float32)


def _tokens_of(
    model: LuMamba, recording: Recording, normalizer: Normalizer, encoding: Float[np.ndarray, "1 C E"]
) -> list[Float[Array, "1 R M"]]:
    """Tokens, channel unification; the norms of the time path are gathered one after the other before."""
    front, params = nnx.split((model.tokenizer, model.unifier))
    folded: tuple[FoldedNorm, ...] = ()
    time_path = model.tokenizer.time_path
    for conv, norm in zip(time_path.convs, time_path.norms, strict=True):
        sums = [_compiled(_sums)(front, params, *piece, normalizer, folded) for piece in recording.parts()]
        folded = (*folded, fold_norm(_added(sums), conv, norm))
    tokens = _compiled(_tokens)
    return [tokens(front, params, *piece, normalizer, folded, encoding) for piece in recording.parts()]


def _added(sums: list[NormSums]) -> NormSums:
    """The sums of all parts, added in float64: there may be thousands."""
    columns = zip(*sums, strict=True)
    return NormSums(*(jnp.asarray(np.sum(np.asarray(column, np.float64), axis=0), jnp.float32) for column in columns))


def _through_block(block: LuMambaBlock, parts: list[Array], masks: list[np.ndarray]) -> list[Array]:
    """x + BiMamba(LayerNorm(x)): forwards through the parts, then backwards, each way with its carry."""
    static, params = nnx.split(block)
    beginning = block.mamba.fwd.beginning(1)
    forward, carry = [], beginning
    for x, mask in zip(parts, masks, strict=True):
        out, carry = _compiled(_forward)(static, params, x, mask, carry)
        forward.append(out)
    carry = beginning
    for i in reversed(range(len(parts))):
        if block.mamba.rev is None:
            parts[i] = parts[i] + forward[i]
        else:
            parts[i], carry = _compiled(_backward)(static, params, parts[i], forward[i], masks[i], carry)
        forward[i] = None
    return parts


# --- the compiled steps: every part has the same shape, so each compiles once -----------------------------------------


@functools.cache
def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(step, static_argnums=0, compiler_options=compiler_options())


def _normalized(patches: Array, mask: Array, normalizer: Normalizer) -> tuple[Array, Array]:
    mean, deviation = (x[None, :, None, None] for x in normalizer)
    valid = jnp.broadcast_to(mask[:, None, :], patches.shape[:3])
    return jnp.where(valid[..., None], (patches - mean) / (deviation + EPS), 0), valid


def _sums(
    front: nnx.GraphDef,
    params: nnx.State,
    patches: Array,
    mask: Array,
    normalizer: Normalizer,
    folded: Sequence[FoldedNorm],
) -> NormSums:
    tokenizer, _ = nnx.merge(front, params)
    return tokenizer.time_path.sums(*_normalized(patches, mask, normalizer), folded)


def _tokens(
    front: nnx.GraphDef,
    params: nnx.State,
    patches: Array,
    mask: Array,
    normalizer: Normalizer,
    folded: Sequence[FoldedNorm],
    encoding: Array,
) -> Float[Array, "1 R M"]:
    tokenizer, unifier = nnx.merge(front, params)
    patches, valid = _normalized(patches, mask, normalizer)
    positions = tokenizer.embed_positions(jnp.zeros((*patches.shape[:2], 3)), encoding=encoding)

    tokens = tokenizer.embed_patches(patches, valid=valid, folded=folded)
    latents, _ = unifier(tokens.transpose(0, 2, 1, 3) + positions[:, None])  # (1, R, Q, E)
    return latents.reshape(1, latents.shape[1], -1)


def _forward(
    static: nnx.GraphDef, params: nnx.State, x: Array, mask: Array, carry: MambaCarry
) -> tuple[Array, MambaCarry]:
    block: LuMambaBlock = nnx.merge(static, params)
    return block.mamba.fwd.advance(block.norm(x), carry, valid=mask)


def _backward(
    static: nnx.GraphDef, params: nnx.State, x: Array, forward: Array, mask: Array, carry: MambaCarry
) -> tuple[Array, MambaCarry]:
    block: LuMambaBlock = nnx.merge(static, params)
    assert block.mamba.rev is not None
    out, carry = block.mamba.rev.advance(block.norm(x), carry, valid=mask, reverse=True)
    return x + join(block.mamba.strategy, forward, out), carry
