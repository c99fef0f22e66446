"""Multi-head attention with packed projections and optional head-averaged scores; pre-norm transformer layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
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
    # Heads beside the batch first: left to themselves, the products below transpose keys, values and result as well.
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (q / math.sqrt(q.shape[-1]), k, v))  # (.., H, L or K, W)
    mask = None if key_mask is None else key_mask[..., None, None, :]
    probabilities = _probabilities(q @ k.mT, mask)  # (.., H, L, K)
    scores = probabilities.mean(axis=-3)
    attended = dropout(probabilities, dropout_rate, rngs).astype(v.dtype) @ v
    attended = jnp.moveaxis(attended, -3, -2)
    return attended.reshape(*attended.shape[:-2], -1), scores


def _probabilities(logits: Float[Array, "..."], mask: Bool[Array, "..."] | None) -> Float[Array, "..."]:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


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
        memory: Float[Array, "*batch K E"] | None = None,
        *,
        key_mask: Bool[Array, "*batch K"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch L E"], Float[Array, "*batch L K"]]:
        """Return the attended values and the probabilities averaged over heads (before dropout).

        `memory` None means self-attention. Keys where `key_mask` is False get probability zero.
        """
        q, k, v = self._project(query, memory)
        q, k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in (q, k, v))
        attended, scores = attend(q, k, v, key_mask=key_mask, dropout_rate=self.dropout, rngs=rngs)
        return self.out_proj(attended), scores

    def pool(
        self,
        query: Float[Array, "L E"],
        memory: Float[Array, "*batch K E"],
        *,
        key_norm: LayerNorm | None = None,
        value_norm: LayerNorm | None = None,
        key_mask: Bool[Array, "*batch K"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*batch L E"], Float[Array, "*batch L K"]]:
        """The same for queries that all rows share, with the norms of keys and values (both or none) taken in.

        Then neither keys nor values need a projection of their own: a logit is linear in its key, so that the key's
        scale and projection fold into the queries, (x s_k) W_k . q = x . (s_k W_k q), and what is the same for every
        key (its biases) drops out of the softmax; values are scaled and projected after they were pooled, L*H vectors
        in place of K.
        """
        width, heads = self.out_proj.in_features, self.num_heads
        (q_kernel, k_kernel, v_kernel), (q_bias, _, v_bias) = self._parts()
        q = (query.astype(q_kernel.dtype) @ q_kernel + q_bias[None]).reshape(-1, heads, width // heads)
        q = q / math.sqrt(width // heads)
        folded = jnp.einsum("ehw,lhw->elh", k_kernel.reshape(width, heads, -1), q).reshape(width, -1)  # (E, L*H)
        if key_norm is not None:
            folded = folded * key_norm.scale[...].astype(folded.dtype)[:, None]
        memory = memory.astype(folded.dtype) if key_norm is None else key_norm.normalize(memory).astype(folded.dtype)
        mask = None if key_mask is None else key_mask[..., None, :]
        probabilities = _probabilities((memory @ folded).mT, mask)  # (.., L*H, K)
        scores = probabilities.reshape(*probabilities.shape[:-2], -1, heads, memory.shape[-2]).mean(axis=-2)
        probabilities = dropout(probabilities, self.dropout, rngs).astype(memory.dtype)
        # 1 without dropout, but for its rounding: the sum keeps the constant terms exact in both cases.
        total = probabilities.sum(axis=-1, keepdims=True) if rngs is not None else jnp.ones((), memory.dtype)
        pooled = probabilities @ memory  # (.., L*H, E)
        if value_norm is not None:
            scale, bias = (p[...].astype(pooled.dtype) for p in (value_norm.scale, value_norm.bias))
            pooled = pooled * scale.reshape(_last(pooled)) + total * bias.reshape(_last(pooled))
        return self.out_proj(self._project_pooled(pooled, v_kernel, v_bias, total)), scores

    def _project_pooled(self, pooled: Array, kernel: Array, bias: Array, total: Array) -> Float[Array, "*batch L E"]:
        """Every head's value projection of its own pooled vector, as one product with a matrix that is zero elsewhere:
        cheaper for the few features of a token than a product per head with its transposes."""
        heads, width = self.num_heads, kernel.shape[0]
        own = np.repeat(np.eye(heads, dtype=bool), width // heads, axis=1)  # (H, E): the features of each head
        blocks = jnp.where(own[:, None, :], kernel[None], 0).reshape(heads * width, width)
        rows = pooled.reshape(*pooled.shape[:-2], -1, heads * width)  # (.., L, H*E)
        if total.ndim:
            total = jnp.repeat(total.reshape(*rows.shape[:-1], heads), width // heads, axis=-1)
        return rows @ blocks + total * bias.reshape(_last(rows))

    def _parts(self) -> tuple[list[Array], list[Array]]:
        """Kernels and biases of query, key and value."""
        dtype = self.in_proj.dtype
        assert self.in_proj.bias is not None, "built with a bias"
        kernels = jnp.split(self.in_proj.kernel[...].astype(dtype), 3, axis=1)
        return kernels, jnp.split(self.in_proj.bias[...].astype(dtype), 3)

    def _project(self, query: Array, memory: Array | None) -> tuple[Array, Array, Array]:
        if memory is None:
            q, k, v = jnp.split(self.in_proj(query), 3, axis=-1)
            return q, k, v
        parts = zip((query, memory, memory), *self._parts(), strict=True)
        q, k, v = (x.astype(kernel.dtype) @ kernel + bias.reshape(_last(x)) for x, kernel, bias in parts)
        return q, k, v


def _last(x: Array) -> tuple[int, ...]:
    """The shape that lays a vector along the last axis of `x`."""
    return (1,) * (x.ndim - 1) + (-1,)


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
