"""A recording of hours as one window, in bounded memory: LuMamba's blocks carry their state from part to part.

The result is that of the whole window at once. What depends on the whole window is gathered first, in three passes over
the signal: covariances within a patch, which give the z-score of each channel and the first group norm of the time path
(a convolution is linear), then its other two group norms (the convolutions before them are cheap). Tokens and channel
unification then go part by part, and each Mamba direction runs through the parts with its carry.

Parts that do not depend on each other are computed in threads, and the two directions of a block at the same time: on a
CPU, one part's program cannot keep several cores busy.

Memory: the latents of the window and those of one direction, 4 (M + M) bytes per patch, and the activations of one part
per thread.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.channel_unifier import ChannelUnifier
from lumamba_jax.compilation import compiler_options
from lumamba_jax.layers import LayerNorm
from lumamba_jax.lumamba import LuMamba, LuMambaBlock, LuMambaConfig
from lumamba_jax.mamba import Bidirectional, MambaBlock, MambaCarry, join
from lumamba_jax.normalization import EPS
from lumamba_jax.tokens import FoldedNorm, NormSums, Tokenizer, fold_norm, position_encoding

DEFAULT_PART = 512
MAX_THREADS = 8

Result = TypeVar("Result")


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

    @property
    def num_parts(self) -> int:
        """Parts of the window; the last one may be padded."""
        return -(-self.num_patches // self.part)

    def mask(self, i: int) -> Bool[np.ndarray, "1 R"]:
        """Which patches of part i are real."""
        return np.arange(self.part)[None] < self.num_patches - i * self.part

    def patches(self, i: int) -> Float[np.ndarray, "1 C R P"]:
        """Patches of part i, with zeros behind the window's end. Raises ValueError for NaN."""
        first, last = i * self.part * self.patch_size, min((i + 1) * self.part, self.num_patches) * self.patch_size
        samples = np.asarray(self.signal[:, first:last], np.float32)
        if not np.isfinite(samples).all():
            raise ValueError(
                f"the signal holds NaN or infinite values in samples {first} to {last}: interpolate them first"
            )
        padded = np.zeros((1, len(samples), self.part, self.patch_size), np.float32)
        padded.reshape(len(samples), -1)[:, : samples.shape[1]] = samples
        return padded


class Normalizer(NamedTuple):
    """Mean of every channel, what float32 rounding took from it, and the standard deviation: `(C,)`, microvolts."""

    mean: np.ndarray
    rest: np.ndarray
    deviation: np.ndarray


class PatchMoments(NamedTuple):
    """Over the patches of every channel: mean `(C, P)`, sum of outer products about it `(C, P, P)`, their number."""

    mean: np.ndarray
    products: np.ndarray
    count: int

    def normalizer(self) -> Normalizer:
        """Mean and unbiased standard deviation of every channel."""
        mean = self.mean.mean(axis=1)
        squares = np.trace(self._about(mean), axis1=1, axis2=2)
        deviation = np.sqrt(squares / max(self.count * self.mean.shape[1] - 1, 1))
        rounded = mean.astype(np.float32)
        return Normalizer(rounded, (mean - rounded).astype(np.float32), deviation.astype(np.float32))

    def sums(self, matrix: Float[np.ndarray, "P F"]) -> NormSums:
        """The statistics of `z @ matrix` over all patches z of all z-scored channels."""
        mean, deviation = self.mean.mean(axis=1), self.normalizer().deviation.astype(np.float64)
        weights = matrix[None] / (deviation + EPS)[:, None, None]  # (C, P, F)
        first = self.count * np.einsum("cp,cpf->f", self.mean - mean[:, None], weights)
        second = np.sum(weights * (self._about(mean) @ weights), axis=(0, 1))
        count = np.array([self.count * len(mean)])
        return NormSums(*(jnp.asarray(x[None], jnp.float32) for x in (first, second, count)))

    def _about(self, centre: Float[np.ndarray, " C"]) -> Float[np.ndarray, "C P P"]:
        shift = self.mean - centre[:, None]
        return self.products + self.count * shift[:, :, None] * shift[:, None, :]


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
    encoding = position_encoding(np.asarray(locations)[None], config.embed_dim, dtype=position_dtype)
    parts = _tokens_of(model, recording, encoding.astype(np.float32))
    masks = [recording.mask(i) for i in range(recording.num_parts)]
    for block in model.blocks:
        _through_block(block, parts, masks)
    return parts


def _of_every_part(compute: Callable[[int], Result], recording: Recording) -> Iterator[Result]:
    """`compute(i)` of every part: the first alone, as it may compile, then several at a time.

    Each thread waits for its result: calls that only queue would pile up arrays.
    """

    def finished(i: int) -> Result:
        return jax.block_until_ready(compute(i))

    yield finished(0)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        yield from threads.map(finished, range(1, recording.num_parts))


def _patch_moments(recording: Recording) -> PatchMoments:
    """Moments of the parts joined in float64 (Chan, Golub and LeVeque, 1979, updating formulae)."""

    def compute(i: int) -> tuple[Array, Array, Array]:
        return _moments(recording.patches(i), recording.mask(i))

    channels, size = recording.signal.shape[0], recording.patch_size
    count, mean, products = 0, np.zeros((channels, size)), np.zeros((channels, size, size))
    for i, moments in enumerate(_of_every_part(compute, recording)):
        begin, first, second = (np.asarray(x, np.float64) for x in moments)
        more = int(recording.mask(i).sum())
        shift = begin + first / more - mean
        products += second - first[:, :, None] * (first / more)[:, None, :]
        products += shift[:, :, None] * (shift * (count * more / (count + more)))[:, None, :]
        mean, count = mean + shift * (more / (count + more)), count + more
    return PatchMoments(mean, products, count)


def _tokens_of(
    model: LuMamba, recording: Recording, encoding: Float[np.ndarray, "1 C E"]
) -> list[Float[Array, "1 R M"]]:
    """Tokens, channel unification; the norms of the time path are gathered one after the other before."""
    front = (model.tokenizer, model.unifier)
    convs, norms = model.tokenizer.time_path.convs, model.tokenizer.time_path.norms
    moments = _patch_moments(recording)
    normalizer = jax.device_put(moments.normalizer())
    sums = moments.sums(np.asarray(convs[0].as_matrix(recording.patch_size), np.float64))
    folded = (fold_norm(sums, convs[0], norms[0]),)

    def run(step: Callable[..., Result], *more: Any) -> list[Result]:
        program = _program(step, front)

        def compute(i: int) -> Result:
            return program(recording.patches(i), recording.mask(i), normalizer, folded, *more)

        return list(_of_every_part(compute, recording))

    for conv, norm in zip(convs[1:], norms[1:], strict=True):
        folded = (*folded, fold_norm(_added(run(_sums)), conv, norm))
    return run(_tokens, encoding)


def _added(sums: list[NormSums]) -> NormSums:
    """The sums of all parts, added in float64: there may be thousands."""
    columns = zip(*sums, strict=True)
    return NormSums(*(jnp.asarray(np.sum(np.asarray(column, np.float64), axis=0), jnp.float32) for column in columns))


def _through_block(block: LuMambaBlock, parts: list[Array], masks: list[np.ndarray]) -> None:
    """x + BiMamba(LayerNorm(x)) in place of every part; one thread goes forwards, one backwards, each with its carry.

    The first direction to reach a part leaves its output, the second one joins the two.
    """
    outputs: dict[int, Array] = {}
    lock = threading.Lock()
    strategy = block.mamba.strategy

    def through(step: Callable[..., tuple[Array, MambaCarry]], mamba: MambaBlock, order: Sequence[int]) -> None:
        program, carry = _program(step, (block.norm, mamba)), mamba.beginning(1)
        for i in order:
            out, carry = jax.block_until_ready(program(parts[i], masks[i], carry))
            with lock:
                other = outputs.pop(i, None)
                if other is None and strategy != "none":
                    outputs[i] = out
                    continue
            parts[i] = _joined(strategy, parts[i], out, other)

    order = range(len(parts))
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(through, _forward, block.mamba.fwd, order)]
        if block.mamba.rev is not None:
            running.append(threads.submit(through, _backward, block.mamba.rev, order[::-1]))
    for direction in running:
        direction.result()


# --- the compiled steps: every part has the same shape, so each compiles once -----------------------------------------


def _program(step: Callable[..., Result], modules: tuple[nnx.Module, ...]) -> Callable[..., Result]:
    """`step(modules, ...)` compiled. What a call would spend on hashing and flattening modules is spent once."""
    graphdef, params = nnx.split(modules)
    leaves, structure = jax.tree.flatten(params)
    return functools.partial(_compiled(step, graphdef, structure), leaves)


@functools.cache
def _compiled(step: Callable[..., Any], graphdef: nnx.GraphDef, structure: Any) -> Callable[..., Any]:
    def run(leaves: list[Array], *args: Any) -> Any:
        return step(nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), *args)

    return jax.jit(run, compiler_options=compiler_options())


@jax.jit
def _moments(patches: Array, mask: Array) -> tuple[Array, Array, Array]:
    """About the mean but for rounding: that point, first and second moments; exact where a channel is flat."""
    valid, begin = mask[0, None, :, None], patches[0, :, :1]
    mean = begin + jnp.where(valid, patches[0] - begin, 0).sum(axis=1, keepdims=True) / mask.sum()  # (C, 1, P)
    centred = jnp.where(valid, patches[0] - mean, 0)
    return mean[:, 0], centred.sum(axis=1), jnp.einsum("crp,crq->cpq", centred, centred, precision="highest")


def _normalized(patches: Array, mask: Array, normalizer: Normalizer) -> tuple[Array, Array]:
    mean, rest, deviation = (x[None, :, None, None] for x in normalizer)
    valid = jnp.broadcast_to(mask[:, None, :], patches.shape[:3])
    return jnp.where(valid[..., None], (patches - mean - rest) / (deviation + EPS), 0), valid


def _sums(
    front: tuple[Tokenizer, ChannelUnifier],
    patches: Array,
    mask: Array,
    normalizer: Normalizer,
    folded: Sequence[FoldedNorm],
) -> NormSums:
    return front[0].time_path.sums(*_normalized(patches, mask, normalizer), folded)


def _tokens(
    front: tuple[Tokenizer, ChannelUnifier],
    patches: Array,
    mask: Array,
    normalizer: Normalizer,
    folded: Sequence[FoldedNorm],
    encoding: Array,
) -> Float[Array, "1 R M"]:
    tokenizer, unifier = front
    patches, valid = _normalized(patches, mask, normalizer)
    positions = tokenizer.embed_positions(jnp.zeros((*patches.shape[:2], 3)), encoding=encoding)
    tokens = tokenizer.embed_patches(patches, valid=valid, folded=folded)
    latents, _ = unifier(tokens.transpose(0, 2, 1, 3) + positions[:, None])  # (1, R, Q, E)
    return latents.reshape(1, latents.shape[1], -1)


def _forward(
    modules: tuple[LayerNorm, MambaBlock], x: Array, mask: Array, carry: MambaCarry
) -> tuple[Array, MambaCarry]:
    norm, mamba = modules
    return mamba.advance(norm(x), carry, valid=mask)


def _backward(
    modules: tuple[LayerNorm, MambaBlock], x: Array, mask: Array, carry: MambaCarry
) -> tuple[Array, MambaCarry]:
    norm, mamba = modules
    return mamba.advance(norm(x), carry, valid=mask, reverse=True)


@functools.partial(jax.jit, static_argnums=0)
def _joined(strategy: Bidirectional, x: Array, out: Array, other: Array | None) -> Array:
    return x + (out if other is None else join(strategy, out, other))
