"""Channel unification: learned queries cross-attend over the channels of each patch (model specification 2; LUNA,
arXiv 2510.22257, section 3.2). Any montage becomes Q latents of width E per patch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.attention import MultiHeadAttention, TransformerLayer
from lumamba_jax.layers import Dtypes, LayerNorm, Mlp

NUM_REFINEMENT_LAYERS = 3

Stages = dict[str, Array]


def _query_init(key, shape, dtype) -> Array:
    # The reference's orthogonal initialisation acts on the (1, Q*E) view: one unit-norm vector over all queries.
    queries = jax.random.normal(key, shape, dtype)
    return queries / jnp.linalg.norm(queries)


class ChannelUnifier(nnx.Module):
    """`(B, S, C, E)` tokens to `(B, S, Q, E)` latents and head-averaged attention scores `(B, S, Q, C)`."""

    def __init__(
        self,
        embed_dim: int,
        num_queries: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        dropout: float,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        self.dtypes = dtypes
        self.queries = nnx.Param(_query_init(rngs.params(), (num_queries, embed_dim), dtypes.params))
        self.queries_norm = LayerNorm(embed_dim, dtypes=dtypes, rngs=rngs)
        self.keys_norm = LayerNorm(embed_dim, dtypes=dtypes, rngs=rngs)
        self.values_norm = LayerNorm(embed_dim, dtypes=dtypes, rngs=rngs)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dropout=dropout, dtypes=dtypes, rngs=rngs)
        hidden = int(mlp_ratio * embed_dim)
        self.ffn = Mlp(embed_dim, hidden, embed_dim, hidden_norm=True, dropout=dropout, dtypes=dtypes, rngs=rngs)
        self.refinement = nnx.List(
            [
                TransformerLayer(
                    embed_dim, num_heads, mlp_ratio=mlp_ratio, cross=False, dropout=dropout, dtypes=dtypes, rngs=rngs
                )
                for _ in range(NUM_REFINEMENT_LAYERS)
            ]
        )

    def __call__(
        self,
        tokens: Float[Array, "B S C E"],
        channel_mask: Bool[Array, "B C"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
    ) -> tuple[Float[Array, "B S Q E"], Float[Array, "B S Q C"]]:
        """`channel_mask` False marks padded channels, which get attention zero."""
        batch, patches, channels, _ = tokens.shape
        queries = self.queries_norm(self.queries[...].astype(self.dtypes.compute))
        key_mask = None
        if channel_mask is not None:
            key_mask = jnp.broadcast_to(channel_mask[:, None, :], (batch, patches, channels))
        attended, scores = self.attention.pool(
            queries, tokens, key_norm=self.keys_norm, value_norm=self.values_norm, key_mask=key_mask, rngs=rngs
        )
        ffn = self.ffn(attended, rngs=rngs)
        x = attended + ffn  # no residual from the queries
        if stages is not None:
            stages.update(
                {
                    "cross_attn.queries_norm": jnp.broadcast_to(queries[None, None], attended.shape),
                    "cross_attn.keys_norm": self.keys_norm(tokens),
                    "cross_attn.values_norm": self.values_norm(tokens),
                    "cross_attn.mha_out": attended,
                    "cross_attn.ffn": ffn,
                    "attention_scores": scores,
                }
            )
        for i, layer in enumerate(self.refinement):
            x = layer(x, rngs=rngs)
            if stages is not None:
                stages[f"cross_attn.query_self_attn.{i}"] = x
        if stages is not None:
            stages["cross_attn_out"] = x
        return x, scores
