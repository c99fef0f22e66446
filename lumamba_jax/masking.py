"""Random draws of a training step and the masks that describe a batch.

Every draw of step `k` is a function of `(seed, stream name, k)` and of nothing else: no generator state is kept, a
resumed run draws what the unbroken one would have drawn, and every host draws the same. All shapes are static under
`jit`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

STREAMS = ("dropout", "mask", "noise", "views", "slices")
"""Names of the streams. Their positions are part of every run's random numbers: append, never reorder."""

MaskScope = Literal["per_sample", "reference"]


def stream_key(seed: int, name: str, step: int | Int[Array, ""]) -> Key[Array, ""]:
    """Return the key of one stream at one step: `fold_in(fold_in(key(seed), stream), step)`.

    Raises:
        ValueError: `name` is not one of `STREAMS`.
    """
    if name not in STREAMS:
        raise ValueError(f"unknown random stream {name!r}: choose one of {', '.join(STREAMS)}")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(name)), step)


def valid_samples(
    signal: Float[Array, "B C T"],
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B C T"]:
    """Say which samples are real: those of real channels (`channel_mask`) in real patches (`patch_mask`).

    Raises:
        ValueError: T is not a multiple of the number of patches in `patch_mask`.
    """
    valid = jnp.ones(signal.shape, dtype=bool)
    if channel_mask is not None:
        valid = valid & channel_mask[:, :, None]
    if patch_mask is not None:
        n_times, n_patches = signal.shape[2], patch_mask.shape[1]
        if n_times % n_patches:
            raise ValueError(
                f"a signal of {n_times} samples cannot have {n_patches} patches of equal length: "
                "pass the patch mask of this signal"
            )
        valid = valid & jnp.repeat(patch_mask, n_times // n_patches, axis=1)[:, None, :]
    return valid


# --- hidden patches --------------------------------------------------------------------------------------------------


def draw_mask(
    key: Key[Array, ""],
    shape: tuple[int, int, int],
    *,
    ratio: float = 0.5,
    patch: tuple[int, int] = (1, 40),
    scope: MaskScope = "per_sample",
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B C T"]:
    """Hide a random set of rectangles of `patch` = (channels, samples); True = hidden, padding is never hidden.

    `scope="per_sample"`: every window has its own set of exactly `int(n * ratio)` rectangles, n the number of
    rectangles that hold a real sample. `scope="reference"`: one set for the whole batch (recipes R3), `int(n * ratio)`
    of the first `n = (C // h) * (T // w)` rectangles in row-major order, which leaves out the ragged last ones as the
    released code does; padding is then cut out of it.

    Args:
        key: of the stream "mask".
        shape: (B, C, T).
        ratio: share of rectangles to hide, 0 to 1.
        patch: height in channels and width in samples of a rectangle; LuMamba 1 x 40, FEMBA 2 x 16.
        scope: see above.
        channel_mask: True = real channel.
        patch_mask: True = real patch.

    Raises:
        ValueError: `ratio`, `patch` or `scope` is out of range.
    """
    _, n_channels, n_times = shape
    height, width = patch
    if not 0 <= ratio <= 1:
        raise ValueError(f"the mask ratio is {ratio}: choose a share between 0 and 1")
    if not (1 <= height <= n_channels and 1 <= width <= n_times):
        raise ValueError(f"mask rectangles of {height} channels x {width} samples do not fit a window of {shape[1:]}")
    if scope not in ("per_sample", "reference"):
        raise ValueError(f"unknown mask scope {scope!r}: choose per_sample or reference")
    rows, columns = -(-n_channels // height), -(-n_times // width)
    valid = valid_samples(jnp.zeros(shape), channel_mask, patch_mask)
    if scope == "reference":
        n_candidates = (n_channels // height) * (n_times // width)
        candidates = (jnp.arange(rows * columns) < n_candidates)[None, :]
    else:
        candidates = _cells_with_a_real_sample(valid, rows, columns, patch)
    hidden = _exact_share(key, candidates, ratio).reshape(-1, rows, columns)
    hidden = jnp.repeat(jnp.repeat(hidden, height, axis=1), width, axis=2)[:, :n_channels, :n_times]
    return jnp.broadcast_to(hidden, shape) & valid


def _cells_with_a_real_sample(
    valid: Bool[Array, "B C T"], rows: int, columns: int, patch: tuple[int, int]
) -> Bool[Array, "B cells"]:
    n_windows, n_channels, n_times = valid.shape
    height, width = patch
    padded = jnp.pad(valid, ((0, 0), (0, rows * height - n_channels), (0, columns * width - n_times)))
    cells = padded.reshape(n_windows, rows, height, columns, width)
    return jnp.any(cells, axis=(2, 4)).reshape(n_windows, rows * columns)


def _exact_share(key: Key[Array, ""], candidates: Bool[Array, "B N"], ratio: float) -> Bool[Array, "B N"]:
    """Choose exactly `int(n * ratio)` of the n candidates of each row, all sets equally likely."""
    n_cells = candidates.shape[1]
    order = jnp.where(candidates, jax.random.uniform(key, candidates.shape, jnp.float32), jnp.inf)
    rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
    # A table of Python's int(n * ratio): the product rounded in float32 would at times be one off.
    counts = jnp.asarray([int(n * ratio) for n in range(n_cells + 1)], jnp.int32)
    return rank < counts[jnp.sum(candidates, axis=1)][:, None]


def masked_patch_ratio(mask: Bool[Array, "B C T"], valid: Bool[Array, "B C T"], patch_size: int) -> Float[Array, ""]:
    """Share of the real patches the model sees as hidden (any hidden sample hides a patch); for the log."""
    n_windows, n_channels, n_times = mask.shape
    patches = (n_windows, n_channels, n_times // patch_size, patch_size)
    hidden = jnp.any((mask & valid).reshape(patches), axis=3)
    real = jnp.any(valid.reshape(patches), axis=3)
    return jnp.sum(hidden) / jnp.maximum(jnp.sum(real), 1)


def draw_position_noise(key: Key[Array, ""], n_windows: int, n_channels: int) -> Float[Array, "B C 3"]:
    """Draw standard normal float32 noise for electrode positions; the model scales it by 0.02. Stream "noise"."""
    return jax.random.normal(key, (n_windows, n_channels, 3), jnp.float32)


# --- views -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """How many views LeJEPA cuts from each window and how many patches each has (LuMamba arXiv 2603.19100)."""

    local_views: int = 4
    local_patches: int = 4
    global_views: int = 2
    global_patches: int = 16


def draw_view_starts(
    key: Key[Array, ""],
    config: ViewConfig,
    *,
    n_windows: int,
    n_times: int,
    patch_size: int,
    patch_mask: Bool[Array, "B S"] | None = None,
) -> tuple[Int[Array, "Vl B"], Int[Array, "Vg B"]]:
    """Draw the first sample of every local and global view, per window and view, from the stream "views".

    Uniform on 0 .. length - width, both included, at any sample (not patch-aligned, golden/README quirk 29); length is
    that of the real part of the window when `patch_mask` is given. A window shorter than the view starts at 0 and
    `view_patch_mask` marks the rest as padding.

    Raises:
        ValueError: the batch is shorter than a global or a local view.
    """
    widest = max(config.local_patches, config.global_patches)
    if widest * patch_size > n_times:
        raise ValueError(
            f"a view of {widest} patches of {patch_size} samples is longer than the window of {n_times} samples: "
            "use longer windows or fewer patches per view"
        )
    if patch_mask is None:
        length = jnp.full((n_windows,), n_times, jnp.int32)
    else:
        length = jnp.sum(patch_mask, axis=1, dtype=jnp.int32) * (n_times // patch_mask.shape[1])

    def draw(key: Key[Array, ""], n_views: int, n_patches: int) -> Int[Array, "V B"]:
        last = jnp.maximum(length - n_patches * patch_size, 0)
        return jax.random.randint(key, (n_views, n_windows), 0, last[None, :] + 1, jnp.int32)

    local_key, global_key = jax.random.split(key)
    return (
        draw(local_key, config.local_views, config.local_patches),
        draw(global_key, config.global_views, config.global_patches),
    )


def crop_views(signal: Float[Array, "B C T"], starts: Int[Array, "V B"], width: int) -> Float[Array, "V B C W"]:
    """Cut `width` samples of all channels from the (normalised) signal, from `starts[v, b]` of window b."""

    def crop(window: Float[Array, "C T"], start: Int[Array, ""]) -> Float[Array, "C W"]:
        return jax.lax.dynamic_slice_in_dim(window, start, width, axis=1)

    return jax.vmap(lambda view: jax.vmap(crop)(signal, view))(starts)


def view_patch_mask(
    starts: Int[Array, "V B"], n_patches: int, patch_size: int, patch_mask: Bool[Array, "B S"], n_times: int
) -> Bool[Array, "V B P"]:
    """Say which patches of each view lie entirely in the real part of their window of `n_times` samples."""
    length = jnp.sum(patch_mask, axis=1, dtype=jnp.int32) * (n_times // patch_mask.shape[1])
    ends = starts[:, :, None] + patch_size * (jnp.arange(n_patches, dtype=jnp.int32)[None, None, :] + 1)
    return ends <= length[None, :, None]


def draw_sigreg_directions(key: Key[Array, ""], width: int, n_directions: int) -> Float[Array, "M R"]:
    """Draw Gaussian float32 columns from the stream "slices", one draw per step; `losses.sigreg` normalises them."""
    return jax.random.normal(key, (width, n_directions), jnp.float32)
