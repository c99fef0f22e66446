"""LUNA: channel unification, then a pre-norm rotary transformer over time (arXiv 2510.22257).

x <- unify(tokens)                              (B, S, M)
x <- x + attention_i(LayerNorm(x))              rotary, num_heads*Q heads of width E/num_heads
x <- x + mlp_i(LayerNorm(x))                    hidden 4M with LayerNorm
x <- LayerNorm(x)
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.attention import attend
from lumamba_jax.layers import Dtypes, LayerNorm, Mlp, drop_path, linear, rematerialized
from lumamba_jax.montage_model import MontageConfig, MontageModel, make_head

ROTARY_BASE = 10000.0

Stages = dict[str, Array]


@dataclass(frozen=True)
class LunaConfig(MontageConfig):
    """Every size of the model; the defaults are LUNA base with its reconstruction head.

    Large is `embed_dim=96, num_queries=6, num_blocks=10`, huge `embed_dim=128, num_queries=8, num_blocks=24`.

    Attributes:
        drop_path: stochastic depth of both branches of every block, in training (0 in pre-training, 0.1 in
            fine-tuning as published).
    """

    architecture: Literal["LUNA"] = "LUNA"
    num_queries: int = 4
    num_blocks: int = 8
    drop_path: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model config: drop_path must lie in [0, 1), not {self.drop_path}")
        if self.embed_dim // self.num_heads % 2:
            raise ValueError(
                f"model config: rotary attention needs an even head width, embed_dim {self.embed_dim} / num_heads "
                f"{self.num_heads} is odd"
            )

    @property
    def temporal_heads(self) -> int:
        """Heads of the attention over time: num_heads * Q, each of width E / num_heads."""
        return self.num_heads * self.num_queries


class RotaryAttention(nnx.Module):
    """Self-attention over time with rotary positions (RoFormer, arXiv 2104.09864): `(B, S, M) -> (B, S, M)`.

    The frequencies are stored with the weights, because the published files hold them; they are never trained.
    """

    def __init__(self, config: LunaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        width, head_width = config.width, config.embed_dim // config.num_heads
        self.num_heads = config.temporal_heads
        self.qkv = linear(width, 3 * width, dtypes=dtypes, rngs=rngs)
        self.proj = linear(width, width, dtypes=dtypes, rngs=rngs)
        exponents = jnp.arange(0, head_width, 2, dtype=dtypes.params) / head_width
        self.rotary_frequencies = nnx.Param(1.0 / ROTARY_BASE**exponents)

    def __call__(self, x: Float[Array, "B S M"], patch_mask: Bool[Array, "B S"] | None = None) -> Float[Array, "B S M"]:
        """Padded patches get attention zero."""
        q, k, v = (part.reshape(*part.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        angles = self._angles(x.shape[1])
        attended, _ = attend(_rotate(q, angles), _rotate(k, angles), v, key_mask=patch_mask)
        return self.proj(attended)

    def _angles(self, length: int) -> Float[Array, "S R"]:
        frequencies = jax.lax.stop_gradient(self.rotary_frequencies[...])
        frequencies = frequencies.astype(jnp.promote_types(frequencies.dtype, jnp.float32))
        return jnp.arange(length, dtype=frequencies.dtype)[:, None] * frequencies[None, :]


def _rotate(x: Float[Array, "B S H W"], angles: Float[Array, "S R"]) -> Float[Array, "B S H W"]:
    """Rotate each pair of neighbouring features (0,1), (2,3), ... by its angle; float32 or better, then back."""
    pairs = x.astype(angles.dtype).reshape(*x.shape[:-1], -1, 2)
    cosine, sine = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class LunaBlock(nnx.Module):
    """One pre-norm block: attention, then MLP, each with a residual and stochastic depth."""

    def __init__(self, config: LunaConfig, index: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        width = config.width
        self.drop_path = config.drop_path
        self.norm1 = LayerNorm(width, dtypes=dtypes, rngs=rngs)
        self.attn = RotaryAttention(config, dtypes=dtypes, rngs=rngs)
        self.norm2 = LayerNorm(width, dtypes=dtypes, rngs=rngs)
        hidden = int(config.mlp_ratio * width)
        self.mlp = Mlp(width, hidden, width, hidden_norm=True, dtypes=dtypes, rngs=rngs)
        for output in (self.attn.proj, self.mlp.fc2):  # depth-scaled initialisation of what enters the residual stream
            output.kernel[...] = output.kernel[...] / math.sqrt(2.0 * (index + 1))

    def __call__(
        self,
        x: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
        prefix: str = "",
    ) -> Float[Array, "B S M"]:
        """`patch_mask` False marks padded patches."""
        attended = self.attn(self.norm1(x), patch_mask)
        x = x + drop_path(attended, self.drop_path, rngs)
        transformed = self.mlp(self.norm2(x))
        x = x + drop_path(transformed, self.drop_path, rngs)
        if stages is not None:
            stages.update({f"{prefix}attn": attended, f"{prefix}mlp": transformed, f"{prefix}out": x})
        return x


def _apply(
    block: LunaBlock, x: Float[Array, "B S M"], patch_mask: Bool[Array, "B S"] | None, rngs: nnx.Rngs | None
) -> Float[Array, "B S M"]:
    return block(x, patch_mask, rngs=rngs)


class Luna(MontageModel):
    """The full model; calling convention in `MontageModel`."""

    def __init__(self, config: LunaConfig, *, rngs: nnx.Rngs):
        dtypes = Dtypes.from_name(config.compute_dtype)
        super().__init__(config, dtypes=dtypes, rngs=rngs)
        self.blocks = nnx.List([LunaBlock(config, i, dtypes=dtypes, rngs=rngs) for i in range(config.num_blocks)])
        self.norm = LayerNorm(config.width, dtypes=dtypes, rngs=rngs)
        self.head = make_head(config, dtypes=dtypes, rngs=rngs)

    def temporal(
        self,
        x: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None,
        *,
        rngs: nnx.Rngs | None,
        stages: Stages | None,
    ) -> Float[Array, "B S M"]:
        """Blocks over time, then the final LayerNorm."""
        for i, block in enumerate(self.blocks):
            if stages is None:
                x = rematerialized(_apply, self.config.remat)(block, x, patch_mask, rngs)
            else:
                x = block(x, patch_mask, rngs=rngs, stages=stages, prefix=f"block{i}.")
        return self.norm(x)
