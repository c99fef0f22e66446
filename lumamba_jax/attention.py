"""Multi-head attention with packed projections and optional head-averaged scores; pre-norm transformer layers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.layers import Dtypes, LayerNorm, dropout, gelu, linear


def attend(
    q: Float[Array, "*batch L H W"],
    k: Float[Array, "*batch K H W"],
    v: Float[Array, "*batch K H W"],
    *,
    key_mask: Bool[Array, "*batch K"] | None = None,
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs | None = None,
) -> tuple[Float[Array, "*batch L M"], Float[Array, "*batch L K"]]:
    """Scaled dot-product attention of H heads of width W, M = H*W.

    Returns the attended values and the probabilities averaged over heads (before dropout). Keys where `key_mask` is
    False get probability zero. The softmax runs in float32 (float64 stays) under bfloat16 compute.
    """
    softmax_dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("...lhd,...khd->...hlk", q / math.sqrt(q.shape[-1]), k).astype(softmax_dtype)
    if key_mask is not None:
        logits = jnp.where(key_mask[..., None, None, :], logits, jnp.finfo(softmax_dtype).min)
    probabilities = jax.nn.softmax(logits, axis=-1)  # (.., H, L, K)
    scores = probabilities.mean(axis=-3)
    attended = jnp.einsum("...hlk,...khd->...lhd", dropout(probabilities, dropout_rate, rngs).astype(v.dtype), v)
    return attended.reshape(*attended.shape[:-2], -1), scores


class MultiHeadAttention(nnx.Module):
    """Scaled dot-product attention, `(.., L, E)` queries over `(.., K, E)` keys and values.

    The three input projections are packed in one `in_proj` `(E, 3E)` in the order query, key, value.
    """

    def __init__(self, width: int, num_heads: int, *, dropout: float, dtypes: Dtypes, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"attention width {width} cannot be split over {num_heads} heads: choose a divisor of it")
        self.num_heads = num_heads
        self.dropout = dropout
        # PyTorch initialises the packed matrix as one Xavier-uniform (3E, E) matrix with zero bias.
        self.in_proj = nnx.Linear(
            width,
            3 * width,
            kernel_init=nnx.initializers.glorot_uniform(),
            dtype=dtypes.compute,
            param_dtype=dtypes.params,
            rngs=rngs,
        )
        self.out_proj = linear(width, width, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        query: Float[Array, "*batch L E"],
        key: Float[Array, "*batch K E"] | None = None,
        value: Float[Array, "*batch K E"] | None = None,
        *,
        key_mask: Bool[Array, "*batch K"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch L E"], Float[Array, "*batch L K"]]:
        """Return the attended values and the probabilities averaged over heads (before dropout).

        `key` None means self-attention, `value` None means that keys serve as values. Keys where `key_mask` is False
        get probability zero.
        """
        q, k, v = self._project(query, key, value)
        q, k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in (q, k, v))
        attended, scores = attend(q, k, v, key_mask=key_mask, dropout_rate=self.dropout, rngs=rngs)
        return self.out_proj(attended), scores

    def _project(self, query: Array, key: Array | None, value: Array | None) -> tuple[Array, Array, Array]:
        if key is None:
            q, k, v = jnp.split(self.in_proj(query), 3, axis=-1)
            return q, k, v
        dtype = self.in_proj.dtype
        kernels = jnp.split(self.in_proj.kernel[...].astype(dtype), 3, axis=1)
        assert self.in_proj.bias is not None, "built with a bias"
        biases = jnp.split(self.in_proj.bias[...].astype(dtype), 3)
        inputs = (query, key, key if value is None else value)
        q, k, v = (
            x.astype(dtype) @ kernel + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
            for x, kernel, bias in zip(inputs, kernels, biases, strict=True)
        )
        return q, k, v


class TransformerLayer(nnx.Module):
    """Pre-norm layer: self-attention, optional cross-attention to a memory, feed-forward of 4E with GELU."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        cross: bool,
        dropout: float,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        hidden = int(mlp_ratio * width)
        self.dropout = dropout
        self.norm1 = LayerNorm(width, dtypes=dtypes, rngs=rngs)
        self.self_attn = MultiHeadAttention(width, num_heads, dropout=dropout, dtypes=dtypes, rngs=rngs)
        self.cross_norm = LayerNorm(width, dtypes=dtypes, rngs=rngs) if cross else None
        self.cross_attn = (
            MultiHeadAttention(width, num_heads, dropout=dropout, dtypes=dtypes, rngs=rngs) if cross else None
        )
        self.ffn_norm = LayerNorm(width, dtypes=dtypes, rngs=rngs)
        self.linear1 = linear(width, hidden, dtypes=dtypes, rngs=rngs)
        self.linear2 = linear(hidden, width, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*batch L E"],
        memory: Float[Array, "*batch K E"] | None = None,
        *,
        mask: Bool[Array, "*batch L"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*batch L E"]:
        """`mask` False hides positions of x from self-attention; `memory` is what cross-attention looks at."""
        normed = self.norm1(x)
        x = x + dropout(self.self_attn(normed, key_mask=mask, rngs=rngs)[0], self.dropout, rngs)
        if self.cross_attn is not None and self.cross_norm is not None:
            attended, _ = self.cross_attn(self.cross_norm(x), memory, rngs=rngs)
            x = x + dropout(attended, self.dropout, rngs)
        hidden = dropout(gelu(self.linear1(self.ffn_norm(x))), self.dropout, rngs)
        return x + dropout(self.linear2(hidden), self.dropout, rngs)
