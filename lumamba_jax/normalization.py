"""Input normalisation: microvolts in, dimensionless numbers out, padding exact.

The model sees every channel of every window on its own scale (LuMamba arXiv 2603.19100, LUNA arXiv 2510.22257: z-score;
FEMBA arXiv 2502.06438: quartiles). The statistics are taken over the real samples of one channel of one window only, so
neither padding nor the other windows of the batch can change them, and padded positions come out as exactly 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lumamba_jax.masking import valid_samples

EPS = 1e-8
"""Added to the standard deviation or the quartile range (the reference's constant): a flat channel gives 0, not NaN."""

FEMBA_LOW_UV, FEMBA_HIGH_UV = -20.0, 20.0
"""The two "quartiles" the released FEMBA code uses as constants; nothing is estimated from the data."""


def channel_zscore(
    signal: Float[Array, "B C T"],
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B C T"]:
    """Normalise each channel of each window to `(x - mean) / (std + 1e-8)`, unbiased std (golden/README quirk 30).

    Args:
        signal: microvolts (any unit gives the same result up to the 1e-8).
        channel_mask: True = real channel.
        patch_mask: True = real patch.

    Returns:
        Dimensionless, same shape and dtype, 0 at every padded position.
    """
    valid = valid_samples(signal, channel_mask, patch_mask)
    count = jnp.sum(valid, axis=2, keepdims=True).astype(signal.dtype)

    def mean(values: Float[Array, "B C T"]) -> Float[Array, "B C 1"]:
        return jnp.sum(jnp.where(valid, values, 0), axis=2, keepdims=True) / jnp.maximum(count, 1)

    centred = signal - mean(signal)
    # The float32 mean of a flat channel misses its value by an ulp, and dividing that by a std of the same size would
    # turn "flat" into +-1. Centring once more removes the rounding error; elsewhere it changes the last digit only.
    centred = jnp.where(valid, centred - mean(centred), 0)
    variance = jnp.sum(centred**2, axis=2, keepdims=True) / jnp.maximum(count - 1, 1)
    return centred / (jnp.sqrt(variance) + EPS)


def fixed_affine(
    signal: Float[Array, "B C T"],
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
    *,
    low: float = FEMBA_LOW_UV,
    high: float = FEMBA_HIGH_UV,
) -> Float[Array, "B C T"]:
    """Apply `(x - low) / (high - low + 1e-8)` with constants in microvolts: what the released FEMBA code runs.

    Padded positions become 0. See `iqr` for the normalisation its paper describes.
    """
    valid = valid_samples(signal, channel_mask, patch_mask)
    return jnp.where(valid, (signal - low) / ((high - low) + EPS), 0)


def iqr(
    signal: Float[Array, "B C T"],
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B C T"]:
    """Normalise by the quartiles of each channel of each window: `(x - q25) / (q75 - q25 + 1e-8)`.

    The normalisation of the FEMBA paper (arXiv 2502.06438, quartile-based); quantiles are interpolated linearly, as
    `numpy.quantile` does, over real samples only. Padded positions become 0.
    """
    valid = valid_samples(signal, channel_mask, patch_mask)
    ordered = jnp.sort(jnp.where(valid, signal, jnp.inf), axis=2)  # padding is sorted behind the real samples
    last = jnp.maximum(jnp.sum(valid, axis=2, keepdims=True) - 1, 0)

    def quantile(q: float) -> Float[Array, "B C 1"]:
        position = last.astype(signal.dtype) * q
        lower = jnp.floor(position).astype(last.dtype)
        below = jnp.take_along_axis(ordered, lower, axis=2)
        above = jnp.take_along_axis(ordered, jnp.minimum(lower + 1, last), axis=2)
        return below + (position - jnp.floor(position)) * (above - below)

    any_valid = jnp.any(valid, axis=2, keepdims=True)
    q25, q75 = (jnp.where(any_valid, quantile(q), 0) for q in (0.25, 0.75))
    return jnp.where(valid, (signal - q25) / (q75 - q25 + EPS), 0)
