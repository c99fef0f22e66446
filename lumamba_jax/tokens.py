"""EEG patches to tokens: time path, frequency path, mask token and electrode positions (model specification 1;
LUNA, arXiv 2510.22257, section 3.1).

    token = time_path(patch) + frequency_path(patch)        (or the mask token)        + position(channel)

Group-norm statistics run over all channels and patches of a window, so a token depends on the whole window; padded
channels and patches are left out of every statistic, which makes padding exact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.layers import NORM_EPSILON, Dtypes, Mlp, gelu, uniform_fan_in

NUM_GROUPS = 4
POSITION_NOISE_STD = 0.02
POSITION_EPSILON = 1e-8
# arctan(t) / t in powers of t^2 on [0, 1]: least squares at Chebyshev nodes, error 1.2e-8 before float32 rounding.
_ARCTANGENT = (
    1.0,
    -0.333330661,
    0.199924842,
    -0.142025709,
    0.106367543,
    -0.0749544576,
    0.0425876081,
    -0.0160050299,
    0.00283406419,
)

Stages = dict[str, Array]


class ConvGeometry(NamedTuple):
    """Kernel width, stride and zero padding of a convolution along the samples of one patch."""

    kernel: int
    stride: int
    padding: int

    def out_width(self, width: int) -> int:
        """Output width for an input of `width` samples."""
        return (width + 2 * self.padding - self.kernel) // self.stride + 1


def first_convolution(patch_size: int) -> ConvGeometry:
    """The strided convolution that begins the time path."""
    half = patch_size // 2
    return ConvGeometry(kernel=half - 1, stride=half // 2, padding=half // 2 - 1)


class PatchConv(nnx.Module):
    """1-D convolution inside each patch, zero-padded at both ends, never across a patch border."""

    def __init__(self, geometry: ConvGeometry, inputs: int, outputs: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.geometry = geometry
        init = uniform_fan_in(geometry.kernel * inputs)
        self.kernel = nnx.Param(init(rngs.params(), (geometry.kernel, inputs, outputs), dtypes.params))
        self.bias = nnx.Param(init(rngs.params(), (outputs,), dtypes.params))

    def as_matrix(self, width: int) -> Float[Array, "WI VO"]:
        """The convolution of a patch of `width` positions as a banded matrix, (position, input) -> (position, output).

        Most of it is zeros, and still it is several times faster than a convolution of so few positions.
        """
        kernel, (size, stride, padding) = self.kernel[...], self.geometry
        columns = []
        for i in range(self.geometry.out_width(width)):
            start = i * stride - padding
            first, last = max(0, start), min(width, start + size)
            columns.append(jnp.pad(kernel[first - start : last - start], ((first, width - last), (0, 0), (0, 0))))
        return jnp.stack(columns, axis=2).reshape(width * kernel.shape[1], -1)


class WindowGroupNorm(nnx.Module):
    """Scale and bias of a GroupNorm whose statistics run over every valid channel and patch of a window."""

    def __init__(self, features: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones_init()(rngs.params(), (features,), dtypes.params))
        self.bias = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (features,), dtypes.params))


class NormSums(NamedTuple):
    """GroupNorm statistics that add up over parts of a window: sums `(B, F)` of values and squares, rows `(B, 1)`."""

    first: Array
    second: Array
    count: Array


class FoldedNorm(NamedTuple):
    """Bias of a convolution and the GroupNorm after it as one `x * slope + offset`, `(B, F)` each; bias `(F,)`."""

    slope: Array
    offset: Array
    bias: Array


class TimePath(nnx.Module):
    """Three small convolutions with GroupNorm and GELU per patch: `(B, C, S, P) -> (B, C, S, E)`.

    Token features are width-major: feature `w * O + o` with O = E/4, in every layer.
    """

    def __init__(self, patch_size: int, embed_dim: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        first = first_convolution(patch_size)
        features = embed_dim // 4
        if embed_dim % 16 or patch_size % 4 or patch_size < 8 or first.out_width(patch_size) * features != embed_dim:
            raise ValueError(
                f"embed_dim {embed_dim} and patch_size {patch_size} do not fit the patch convolutions: "
                "embed_dim must be a multiple of 16 and patch_size a multiple of 4 (at least 8)"
            )
        later = ConvGeometry(kernel=3, stride=1, padding=1)
        self.dtype = dtypes.compute
        self.convs = nnx.List(
            [PatchConv(first, 1, features, dtypes=dtypes, rngs=rngs)]
            + [PatchConv(later, features, features, dtypes=dtypes, rngs=rngs) for _ in range(2)]
        )
        self.norms = nnx.List([WindowGroupNorm(features, dtypes=dtypes, rngs=rngs) for _ in range(3)])

    def __call__(
        self,
        patches: Float[Array, "B C S P"],
        valid: Bool[Array, "B C S"] | None = None,
        *,
        folded: Sequence[FoldedNorm] | None = None,
        stages: Stages | None = None,
    ) -> Float[Array, "B C S E"]:
        """`valid` False marks padded patches. `folded` are the three norms, when their statistics are known already."""
        x, weights = self._rows(patches), None if valid is None else valid.reshape(valid.shape[0], -1, 1)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            product = self._product(i, x)
            fold = fold_norm(norm_sums(product, weights), conv, norm) if folded is None else folded[i]
            normed = self._apply(fold, product)
            x = gelu(normed)
            if stages is not None:
                for layer, value in enumerate((product + fold.bias[None, None], normed, x)):
                    shape = (*patches.shape[:3], -1, conv.kernel[...].shape[2])
                    stages[f"patch_embed.proj_in.{3 * i + layer}"] = value.reshape(shape)
        return x.reshape(*patches.shape[:3], -1)

    def sums(
        self, patches: Float[Array, "B C S P"], valid: Bool[Array, "B C S"], folded: Sequence[FoldedNorm]
    ) -> NormSums:
        """What a part of a window adds to the statistics of norm `len(folded)`, given the norms before it."""
        x = self._rows(patches)
        for i, fold in enumerate(folded):
            x = gelu(self._apply(fold, self._product(i, x)))
        return norm_sums(self._product(len(folded), x), valid.reshape(valid.shape[0], -1, 1))

    def _rows(self, patches: Float[Array, "B C S P"]) -> Float[Array, "B R P"]:
        return patches.reshape(patches.shape[0], -1, patches.shape[-1]).astype(self.dtype)

    def _product(self, i: int, x: Float[Array, "B R I"]) -> Float[Array, "B R F"]:
        """Convolution i without its bias; features are width-major."""
        matrix = self.convs[i].as_matrix(x.shape[-1] // self.convs[i].kernel[...].shape[1]).astype(self.dtype)
        return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:2], -1)

    def _apply(self, fold: FoldedNorm, product: Float[Array, "B R F"]) -> Float[Array, "B R F"]:
        return (product * fold.slope[:, None] + fold.offset[:, None]).astype(self.dtype)


def norm_sums(product: Float[Array, "B R F"], weights: Bool[Array, "B R 1"] | None) -> NormSums:
    """Sums and sums of squares over the (valid) rows, in one pass, float32 or better."""
    x = product.astype(jnp.promote_types(product.dtype, jnp.float32))
    if weights is None:
        count = jnp.full((x.shape[0], 1), x.shape[1], x.dtype)
    else:
        count, x = weights.sum(axis=1).astype(x.dtype), jnp.where(weights, x, 0)
    return NormSums(x.sum(axis=1), jnp.square(x).sum(axis=1), count)


def fold_norm(sums: NormSums, conv: PatchConv, norm: WindowGroupNorm) -> FoldedNorm:
    """The GroupNorm of `product + bias` as `product * slope + offset`.

    Sums over positions and over the features of a group, and the repetition of parameters over positions, are products
    with constant 0/1 matrices: they end a fusion, so that XLA does not compute slope and offset anew for every element.
    """
    features, repeated, dtype = norm.scale[...].shape[0], sums.first.shape[1], sums.first.dtype
    group = np.arange(repeated) % features // (features // NUM_GROUPS)
    same_group = jnp.asarray(group[:, None] == group[None, :], dtype)
    repeat = jnp.asarray(np.tile(np.eye(features), repeated // features), dtype)
    parameters = jnp.stack([conv.bias[...], norm.scale[...], norm.bias[...]]).astype(dtype)
    bias, scale, shift = exact_matmul(parameters, repeat)
    row_bias, count = bias[None, :], sums.count
    first = sums.first + count * row_bias
    second = sums.second + row_bias * (2 * sums.first + count * row_bias)
    elements = count * float(np.count_nonzero(group == 0))
    mean, square = jnp.split(exact_matmul(jnp.concatenate([first, second]), same_group), 2)
    mean, square = mean / elements, square / elements
    slope = scale[None, :] / jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0) + NORM_EPSILON)
    offset = shift[None, :] + (row_bias - mean) * slope
    slope, offset = jnp.split(exact_matmul(jnp.concatenate([slope, offset]), jnp.eye(repeated, dtype=dtype)), 2)
    return FoldedNorm(slope, offset, bias)


def exact_matmul(x: Float[Array, "*batch I"], constant: Float[Array, "I O"]) -> Float[Array, "*batch O"]:
    """A product that keeps float32 on every backend (TPUs round the factors to bfloat16 by default)."""
    return jnp.matmul(x, constant, precision="highest")


def spectral_features(patches: Float[Array, "... P"]) -> Float[Array, "... F"]:
    """Magnitudes, then phases, of the unnormalised real FFT of each patch: F = 2 (P/2 + 1) (model specification 1.2).

    Computed as one matrix product whose sine columns are exactly zero at DC and Nyquist, so that the phase there is
    exactly 0 or pi by the sign of the real part, on every backend. Float32 or better.
    """
    size = patches.shape[-1]
    bins = size // 2 + 1
    turns = (np.arange(size)[:, None] * np.arange(bins)[None, :]) % size  # exact integer phase, in units of 1/size turn
    angle = 2.0 * np.pi * turns / size
    cosine, sine = np.cos(angle), -np.sin(angle)
    sine[:, 0] = 0.0
    if size % 2 == 0:
        sine[:, -1] = 0.0
    dtype = jnp.promote_types(patches.dtype, jnp.float32)
    basis = jnp.asarray(np.concatenate([cosine, sine], axis=1), dtype)
    real, imaginary = jnp.split(exact_matmul(patches.astype(dtype), basis), 2, axis=-1)
    power = jnp.square(real) + jnp.square(imaginary)
    positive = power > 0
    magnitude = jnp.where(positive, jnp.sqrt(jnp.where(positive, power, 1.0)), 0.0)  # finite gradient at 0
    phase = _arctan2(jnp.where(positive, imaginary, 0.0), jnp.where(positive, real, 1.0))
    return jnp.concatenate([magnitude, phase], axis=-1)


def _arctan2(y: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """arctan2 for arguments that are not both 0; in float32 by a polynomial, which vectorises where libm's does not."""
    if y.dtype != jnp.float32:
        return jnp.arctan2(y, x)
    steep = jnp.abs(y) > jnp.abs(x)
    ratio = jnp.where(steep, jnp.abs(x) / jnp.where(steep, jnp.abs(y), 1), jnp.abs(y) / jnp.where(steep, 1, jnp.abs(x)))
    square = jnp.square(ratio)
    angle = jnp.full_like(square, _ARCTANGENT[-1])
    for coefficient in _ARCTANGENT[-2::-1]:
        angle = angle * square + coefficient
    angle = angle * ratio
    angle = jnp.where(steep, np.float32(np.pi / 2) - angle, angle)
    angle = jnp.where(x < 0, np.float32(np.pi) - angle, angle)
    return jnp.where(y < 0, -angle, angle)


def normalized_positions(
    locations: Float[Array, "B C 3"], channel_mask: Bool[Array, "B C"] | None = None
) -> Float[Array, "B C 3"]:
    """Min-max normalise each axis over the (valid) channels of each sample: `(x - min) / (max - min + 1e-8)`.

    Same IEEE operations as the reference, because the encoding's top octave magnifies each rounding step. That holds on
    a CPU; where a device's division is not correctly rounded, `position_encoding` on the host is.
    """
    locations = locations.astype(jnp.promote_types(locations.dtype, jnp.float32))
    where = None if channel_mask is None else channel_mask[:, :, None]
    low = jnp.min(locations, axis=1, keepdims=True, initial=jnp.inf, where=where)
    high = jnp.max(locations, axis=1, keepdims=True, initial=-jnp.inf, where=where)
    span = jnp.broadcast_to(high - low + POSITION_EPSILON, locations.shape)
    # XLA turns a division by a broadcast value into a product with its reciprocal, which rounds twice; the barrier
    # hides the broadcast.
    normalized = jnp.divide(*jax.lax.optimization_barrier((locations - low, span)))
    return normalized if where is None else jnp.where(where, normalized, 0.0)


def encode_positions(positions: Float[Array, "B C 3"], embed_dim: int) -> Float[Array, "B C E"]:
    """Sines and cosines of `2^f * position` for f < E//6 octaves, no factor pi (model specification 1.4).

    Feature order: octave, then axis, then (sin, cos); the last `E - 6 (E//6)` features are 0.
    """
    octaves = embed_dim // 6
    scaled = positions[:, :, None, :] * (2.0 ** jnp.arange(octaves, dtype=positions.dtype))[None, None, :, None]
    pairs = jnp.stack([jnp.sin(scaled), jnp.cos(scaled)], axis=-1)  # (B, C, F, 3, 2)
    encoding = pairs.reshape(*positions.shape[:2], -1)
    return jnp.pad(encoding, ((0, 0), (0, 0), (0, embed_dim - encoding.shape[-1])))


def position_encoding(
    locations: np.ndarray,
    embed_dim: int,
    channel_mask: np.ndarray | None = None,
    *,
    dtype: type[np.floating] = np.float32,
) -> np.ndarray:
    """`encode_positions(normalized_positions(...))` in NumPy on the host, the same on every machine.

    The normalised positions and the angles are bit for bit those of the reference: float32 subtraction, division and
    multiplication by a power of two, all correctly rounded. Sine and cosine are the correctly rounded ones (computed in
    float64), where the library of the reference is off by one rounding step (6e-8) in a few per cent of the values.

    Args:
        locations: `(.., C, 3)` in metres, head frame.
        embed_dim: E.
        channel_mask: `(.., C)`, False marks padded channels.
        dtype: of the angles; float64 is more exact than what the published weights were trained on.

    Returns: float32 `(.., C, E)` (float64 for float64).
    """
    locations = np.asarray(locations, dtype)
    where = np.ones((*locations.shape[:-1], 1), bool) if channel_mask is None else np.asarray(channel_mask)[..., None]
    low = np.min(locations, axis=-2, keepdims=True, initial=np.inf, where=where)
    high = np.max(locations, axis=-2, keepdims=True, initial=-np.inf, where=where)
    positions = np.where(where, (locations - low) / (high - low + dtype(POSITION_EPSILON)), dtype(0))
    octaves = embed_dim // 6
    angles = positions[..., None, :] * (dtype(2) ** np.arange(octaves, dtype=dtype))[:, None]  # (.., C, F, 3)
    exact = angles.astype(np.float64)
    pairs = np.stack([np.sin(exact), np.cos(exact)], axis=-1).astype(dtype)
    encoding = np.zeros((*locations.shape[:-1], embed_dim), dtype)
    encoding[..., : 6 * octaves] = pairs.reshape(*locations.shape[:-1], -1)
    return encoding


class Tokenizer(nnx.Module):
    """Normalised signal and electrode positions to tokens, padding-exact."""

    def __init__(self, patch_size: int, embed_dim: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.patch_size, self.embed_dim, self.dtypes = patch_size, embed_dim, dtypes
        features = 2 * (patch_size // 2 + 1)
        self.time_path = TimePath(patch_size, embed_dim, dtypes=dtypes, rngs=rngs)
        self.frequency_path = Mlp(features, 4 * features, embed_dim, dtypes=dtypes, rngs=rngs)
        self.position_mlp = Mlp(
            embed_dim, 2 * embed_dim, embed_dim, hidden_norm=True, pairwise=True, dtypes=dtypes, rngs=rngs
        )
        truncated = nnx.initializers.truncated_normal(stddev=0.02, lower=-1.0, upper=1.0)
        self.mask_token = nnx.Param(truncated(rngs.params(), (embed_dim,), dtypes.params))

    def embed_positions(
        self,
        locations: Float[Array, "B C 3"],
        channel_mask: Bool[Array, "B C"] | None = None,
        noise: Float[Array, "B C 3"] | None = None,
        *,
        encoding: Float[Array, "B C E"] | None = None,
        stages: Stages | None = None,
    ) -> Float[Array, "B C E"]:
        """Embed electrode positions (metres). `noise` is standard normal and scaled by 0.02 after normalisation.

        An `encoding` from `position_encoding` takes the place of locations and noise.
        """
        if encoding is None:
            positions = normalized_positions(locations, channel_mask)
            if noise is not None:
                positions = positions + POSITION_NOISE_STD * noise.astype(positions.dtype)
            encoding = encode_positions(positions, self.embed_dim)
        embedding = self.position_mlp(encoding.astype(self.dtypes.compute))
        if stages is not None:
            stages.update(nerf_encoding=encoding, channel_location_emb=embedding)
        return embedding

    def embed_patches(
        self,
        patches: Float[Array, "B C S P"],
        *,
        masked: Bool[Array, "B C S"] | None = None,
        valid: Bool[Array, "B C S"] | None = None,
        folded: Sequence[FoldedNorm] | None = None,
        stages: Stages | None = None,
    ) -> Float[Array, "B C S E"]:
        """Time plus frequency path; `masked` patches become the mask token, after the statistics were taken.

        `folded` as in `TimePath`.
        """
        time = self.time_path(patches, valid, folded=folded, stages=stages)
        features = spectral_features(patches)
        frequency = self.frequency_path(features.astype(self.dtypes.compute))
        tokens = time + frequency
        if masked is not None:
            mask_token = self.mask_token[...].astype(tokens.dtype).reshape(1, 1, 1, -1)
            tokens = jnp.where(masked[..., None], mask_token, tokens)
        if stages is not None:
            stages.update(freq_features=features, patch_embed=time, freq_embed=frequency)
        return tokens
