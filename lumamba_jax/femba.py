"""FEMBA: patches of a fixed grid of channels and time, then bidirectional Mamba over time (arXiv 2502.06438).

x <- conv2d(signal), kernel (2,16)        grid (G, S), feature e*G + g, so (B, S, E*G)
x <- x + pos_embed
x <- LayerNorm_i(x + BiMamba_i(x))        i < num_blocks (post-norm)

There is no channel unification: the number of channels, their order and the length of the window are those of the
weights, and nothing can be padded.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lumamba_jax.heads import EncoderOutput, HeadConfig, ModelOutput, classifier
from lumamba_jax.layers import Dtypes, LayerNorm, rematerialized, uniform_fan_in
from lumamba_jax.mamba import Bidirectional, BiMamba, MambaConfig

Stages = dict[str, Array]


@dataclass(frozen=True)
class FembaConfig(HeadConfig):
    """Every size of the model; the defaults are FEMBA tiny with its reconstruction head.

    Base is `num_blocks=12`, large `num_blocks=4, embed_dim=79`, huge `num_blocks=20, embed_dim=79`. The fields of
    `HeadConfig` besides; heads are "reconstruction", "mamba", "linear" and "none".

    Attributes:
        num_channels, num_samples: the window, C x T.
        channel_patch_size, patch_size: channels and samples of one patch.
        channel_stride, patch_stride: distance of neighbouring patches; smaller than the patch means overlap.
        embed_dim: E, features of one patch.
        num_blocks: bidirectional Mamba blocks.
        expand, d_state, d_conv: of the Mamba blocks, over the width E*G.
        bidirectional: how the two directions are joined; "none" runs forward only.
        decoder_kernel: of the decoder's convolution over (time, feature), odd sizes.
    """

    architecture: Literal["FEMBA"] = "FEMBA"
    num_channels: int = 22
    num_samples: int = 1280
    channel_patch_size: int = 2
    patch_size: int = 16
    channel_stride: int = 2
    patch_stride: int = 16
    embed_dim: int = 35
    num_blocks: int = 2
    expand: int = 4
    d_state: int = 16
    d_conv: int = 4
    bidirectional: Bidirectional = "add"
    decoder_kernel: tuple[int, int] = (31, 31)

    normalization: ClassVar = "fixed_affine"  # of the input of the published models

    def __post_init__(self):
        object.__setattr__(self, "decoder_kernel", tuple(self.decoder_kernel))  # JSON has lists only
        super().__post_init__()
        self._require_positive("num_channels", "num_samples", "channel_patch_size", "patch_size", "channel_stride")
        self._require_positive("patch_stride", "embed_dim", "num_blocks", "expand", "d_state", "d_conv")
        if self.head == "attention":
            raise ValueError("model config: FEMBA has the heads reconstruction, mamba, linear and none, not attention")
        if self.num_channels < self.channel_patch_size or self.num_samples < self.patch_size:
            raise ValueError(
                f"model config: a window of {self.num_channels} x {self.num_samples} holds no patch of "
                f"{self.channel_patch_size} x {self.patch_size}"
            )
        if self.bidirectional not in get_args(Bidirectional):
            raise ValueError(
                f"model config: bidirectional {self.bidirectional!r} is unknown: {get_args(Bidirectional)}"
            )
        if len(self.decoder_kernel) != 2 or any(size < 1 or size % 2 == 0 for size in self.decoder_kernel):
            raise ValueError(f"model config: decoder_kernel must be two odd sizes, not {self.decoder_kernel}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along channels and along time, (G, S)."""
        return (
            (self.num_channels - self.channel_patch_size) // self.channel_stride + 1,
            (self.num_samples - self.patch_size) // self.patch_stride + 1,
        )

    @property
    def covered(self) -> tuple[int, int]:
        """Channels and samples that the decoder reconstructs: less than C x T where the strides leave a remainder."""
        grid, steps = self.grid
        return (
            (grid - 1) * self.channel_stride + self.channel_patch_size,
            (steps - 1) * self.patch_stride + self.patch_size,
        )

    @property
    def width(self) -> int:
        """Model width E*G."""
        return self.embed_dim * self.grid[0]

    @property
    def mamba(self) -> MambaConfig:
        """Sizes of one direction of a block."""
        return MambaConfig(
            self.width, self.d_state, self.d_conv, self.expand, scan_implementation=self.scan_implementation
        )

    def num_patches(self, num_samples: int) -> int:
        """Patches S of the window. Raises ValueError for any other length than `num_samples` of the weights."""
        self.check_window(self.num_channels, num_samples)
        return self.grid[1]

    def check_window(self, num_channels: int, num_samples: int) -> None:
        """Raise ValueError when a window is not exactly C x T."""
        if (num_channels, num_samples) != (self.num_channels, self.num_samples):
            raise ValueError(
                f"this FEMBA has a fixed grid: windows must be {self.num_channels} channels x {self.num_samples} "
                f"samples in the order of its training, without padding, not {num_channels} x {num_samples}; "
                "LuMamba and LUNA take any montage"
            )


class FembaBlock(nnx.Module):
    """`LayerNorm(x + BiMamba(x))`."""

    def __init__(self, config: MambaConfig, strategy: Bidirectional, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.mamba = BiMamba(config, strategy, dtypes=dtypes, rngs=rngs)
        self.norm = LayerNorm(config.d_model, dtypes=dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S M"], *, stages: Stages | None = None, prefix: str = ""
    ) -> Float[Array, "B S M"]:
        """Post-norm block."""
        residual = x + self.mamba(x, stages=stages, prefix=prefix)
        out = self.norm(residual)
        if stages is not None:
            stages.update({f"{prefix}in": x, f"{prefix}residual": residual, f"{prefix}out": out})
        return out


class GridEmbed(nnx.Module):
    """2-D convolution 1 -> E over (channels, time): `(B, C, T) -> (B, S, E*G)`, feature `e*G + g`."""

    def __init__(self, config: FembaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtypes.compute
        size = (config.channel_patch_size, config.patch_size)
        init = uniform_fan_in(size[0] * size[1])
        self.kernel = nnx.Param(init(rngs.params(), (*size, config.embed_dim), dtypes.params))
        self.bias = nnx.Param(init(rngs.params(), (config.embed_dim,), dtypes.params))

    def __call__(self, signal: Float[Array, "B C T"]) -> Float[Array, "B S M"]:
        """Samples that fill no whole patch at the end are left out."""
        patches = jax.lax.conv_general_dilated(
            signal[..., None].astype(self.dtype),
            self.kernel[...].astype(self.dtype)[:, :, None],
            window_strides=(self.config.channel_stride, self.config.patch_stride),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # (B, G, S, E)
        patches = patches + self.bias[...].astype(self.dtype)[None, None, None]
        return patches.transpose(0, 2, 3, 1).reshape(signal.shape[0], *_latent_shape(self.config))


class GridDecoder(nnx.Module):
    """Latents back to the signal: a convolution over the (time, feature) plane, then a transposed one per patch."""

    def __init__(self, config: FembaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtypes.compute
        plane, size = config.decoder_kernel, (config.channel_patch_size, config.patch_size)
        self.plane_kernel = nnx.Param(uniform_fan_in(plane[0] * plane[1])(rngs.params(), plane, dtypes.params))
        # PyTorch counts the fan of a transposed convolution from its output side: one channel times the kernel.
        init = uniform_fan_in(size[0] * size[1])
        self.kernel = nnx.Param(init(rngs.params(), (*size, config.embed_dim), dtypes.params))
        self.bias = nnx.Param(init(rngs.params(), (1,), dtypes.params))

    def __call__(self, latent: Float[Array, "B S M"], *, stages: Stages | None = None) -> Float[Array, "B C T"]:
        """`(B, C', T')`, shorter than the window where the strides leave a remainder."""
        grid, steps = self.config.grid
        plane = jax.lax.conv_general_dilated(
            latent[..., None],
            self.plane_kernel[...].astype(self.dtype)[:, :, None, None],
            window_strides=(1, 1),
            padding=[(size // 2, size // 2) for size in self.config.decoder_kernel],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[..., 0]
        if stages is not None:
            stages["decoder.dec_conv"] = plane
        patches = plane.reshape(-1, steps, self.config.embed_dim, grid).transpose(0, 3, 1, 2)  # (B, G, S, E)
        height, width = self.config.channel_patch_size, self.config.patch_size
        signal = jax.lax.conv_general_dilated(
            patches,
            jnp.flip(self.kernel[...].astype(self.dtype), axis=(0, 1))[..., None],
            window_strides=(1, 1),
            padding=[(height - 1, height - 1), (width - 1, width - 1)],
            lhs_dilation=(self.config.channel_stride, self.config.patch_stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[..., 0]
        return signal + self.bias[...].astype(self.dtype)[None, None]


class Femba(nnx.Module):
    """The full model. Holds parameters only: `graphdef, params = nnx.split(model)`."""

    def __init__(self, config: FembaConfig, *, rngs: nnx.Rngs):
        dtypes = Dtypes.from_name(config.compute_dtype)
        self.config, self.dtype = config, dtypes.compute
        self.patch_embed = GridEmbed(config, dtypes=dtypes, rngs=rngs)
        truncated = nnx.initializers.truncated_normal(stddev=0.02)
        self.pos_embed = nnx.Param(truncated(rngs.params(), _latent_shape(config), dtypes.params))
        self.blocks = nnx.List(
            [FembaBlock(config.mamba, config.bidirectional, dtypes=dtypes, rngs=rngs) for _ in range(config.num_blocks)]
        )
        if config.head == "reconstruction":
            self.head = GridDecoder(config, dtypes=dtypes, rngs=rngs)
        else:
            self.head = classifier(config, config.width, dtypes=dtypes, rngs=rngs)

    def encode(
        self,
        signal: Float[Array, "B C T"],
        locations: Float[Array, "B C 3"] | None = None,  # noqa: ARG002  (the family's convention; the grid is fixed)
        *,
        mask: Bool[Array, "B C T"] | None = None,
        channel_mask: Bool[Array, "B C"] | None = None,
        patch_mask: Bool[Array, "B S"] | None = None,
        position_noise: Float[Array, "B C 3"] | None = None,  # noqa: ARG002
        position_encoding: Float[Array, "B C E"] | None = None,  # noqa: ARG002
        reference_position_tiling: bool = False,  # noqa: ARG002
        rngs: nnx.Rngs | None = None,  # noqa: ARG002  (no dropout)
        stages: Stages | None = None,
    ) -> EncoderOutput:
        """Encode normalised windows (`normalization.fixed_affine`) of exactly C x T.

        Args:
            signal: normalised signal.
            locations, position_noise, position_encoding, reference_position_tiling, rngs: unused; the calling
                convention is that of the whole family.
            mask: True hides samples, which are set to 0. (The published code, given no mask at all, zeroes the whole
                signal; here None hides nothing.)
            channel_mask, patch_mask: must be True throughout: a fixed grid cannot be padded.
            stages: a dict that is filled with intermediate arrays.

        Raises:
            ValueError: another window, or padding (where the masks are concrete arrays).
        """
        if signal.ndim != 3:
            raise ValueError(f"signal must be (batch, channels, samples), not an array of shape {signal.shape}")
        self.config.check_window(*signal.shape[1:])
        for name, padding in (("channel_mask", channel_mask), ("patch_mask", patch_mask)):
            if padding is not None and not isinstance(padding, jax.core.Tracer) and not np.all(padding):
                raise ValueError(f"{name} marks padding, but FEMBA's grid is fixed: give whole windows only")
        x = signal if mask is None else jnp.where(mask, 0, signal)
        x = self.patch_embed(x)
        if stages is not None:
            stages["patch_embed"] = x
        x = x + self.pos_embed[...].astype(x.dtype)[None]
        for i, block in enumerate(self.blocks):
            if stages is None:
                x = rematerialized(FembaBlock.__call__, self.config.remat)(block, x)
            else:
                x = block(x, stages=stages, prefix=f"block{i}.")
        if stages is not None:
            stages["latent"] = x
        return EncoderOutput(x)

    def __call__(
        self,
        signal: Float[Array, "B C T"],
        locations: Float[Array, "B C 3"] | None = None,
        *,
        channel_ids: Int[Array, "B C"] | None = None,  # noqa: ARG002  (the family's convention)
        mask: Bool[Array, "B C T"] | None = None,
        channel_mask: Bool[Array, "B C"] | None = None,
        patch_mask: Bool[Array, "B S"] | None = None,
        position_noise: Float[Array, "B C 3"] | None = None,
        position_encoding: Float[Array, "B C E"] | None = None,
        reference_position_tiling: bool = False,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
    ) -> ModelOutput:
        """Encode, then apply the head. Arguments as in `encode`."""
        latent = self.encode(
            signal,
            locations,
            mask=mask,
            channel_mask=channel_mask,
            patch_mask=patch_mask,
            position_noise=position_noise,
            position_encoding=position_encoding,
            reference_position_tiling=reference_position_tiling,
            rngs=rngs,
            stages=stages,
        ).latent
        reconstruction = logits = None
        if isinstance(self.head, GridDecoder):
            reconstruction = self.head(latent, stages=stages)
        elif self.head is not None:
            logits = self.head(latent, stages=stages)
        if stages is not None:
            stages.update({k: v for k, v in (("recon", reconstruction), ("logits", logits)) if v is not None})
        return ModelOutput(latent, None, reconstruction, logits)


def _latent_shape(config: FembaConfig) -> tuple[int, int]:
    return config.grid[1], config.width
