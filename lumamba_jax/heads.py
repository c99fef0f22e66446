"""Heads: channel-wise reconstruction, and attention, mamba and linear classifiers (model specification 4).

A regression head is a classification head with as many outputs as targets.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lumamba_jax.attention import MultiHeadAttention, TransformerLayer
from lumamba_jax.layers import Dtypes, LayerNorm, Mlp, Remat, gelu, linear
from lumamba_jax.mamba import MambaBlock, MambaConfig
from lumamba_jax.scan import ScanImplementation

MAMBA_HEAD_WIDTH = 256
DECODER_MLP_RATIO = 4  # fixed in the published models, whatever the encoder's ratio is

Head = Literal["reconstruction", "attention", "mamba", "linear", "none"]
ComputeDtype = Literal["float32", "bfloat16", "float64"]
Stages = dict[str, Array]


@dataclass(frozen=True)
class HeadConfig:
    """What every architecture of the family is asked: which head, and how to compute.

    Attributes:
        head: "reconstruction" for pre-training; "attention", "mamba", "linear" classify or regress; "none" encodes.
        num_outputs: classes or regression targets (classifier heads).
        output_channels: mamba head only: one output per channel, `(B, channels)`, or with `num_outputs` one row of
            classes per channel, `(B, channels, num_outputs)`.
        compute_dtype: activations and products. Scan, softmax, norms and positions stay in float32 under bfloat16.
        scan_implementation: see `selective_scan`.
        remat: what the backward pass computes again instead of keeping it (`layers.rematerialized`).
    """

    head: Head = "reconstruction"
    num_outputs: int | None = None
    output_channels: int | None = None
    compute_dtype: ComputeDtype = "float32"
    scan_implementation: ScanImplementation = "auto"
    remat: Remat = "none"

    def __post_init__(self):
        if self.remat not in get_args(Remat):
            raise ValueError(f"model config: remat {self.remat!r} is unknown: choose one of {get_args(Remat)}")
        if self.head not in get_args(Head):
            raise ValueError(f"model config: head {self.head!r} is unknown: choose one of {get_args(Head)}")
        if self.classifies and self.num_outputs is None and self.output_channels is None:
            raise ValueError(f"model config: head {self.head!r} needs num_outputs (classes or regression targets)")
        if self.output_channels is not None and self.head != "mamba":
            raise ValueError("model config: output_channels belongs to the mamba head only")

    @property
    def classifies(self) -> bool:
        """Whether the head gives logits (or the values of a regression)."""
        return self.head in ("attention", "mamba", "linear")

    def replace(self, **changes: object) -> Self:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} must be at least 1, not {getattr(self, name)}")


class EncoderOutput(NamedTuple):
    """Latent `(B, S, M)`; LuMamba and LUNA: attention scores averaged over heads `(B, S, Q, C)`, position embeddings
    `(B, S, C, E)`."""

    latent: Array
    attention_scores: Array | None = None
    positions: Array | None = None


class ModelOutput(NamedTuple):
    """What the full model returns; what an architecture or head does not have is None.

    Attributes:
        latent: `(B, S, M)`.
        attention_scores: `(B, S, Q, C)`, not for FEMBA.
        reconstruction: `(B, C, T)`, in normalised units.
        logits: `(B, K)`, `(B, channels)` or `(B, channels, K)`.
    """

    latent: Array
    attention_scores: Array | None = None
    reconstruction: Array | None = None
    logits: Array | None = None


class ReconstructionHead(nnx.Module):
    """Each channel asks the Q latents of a patch for its samples (LUNA, arXiv 2510.22257, section 3.4).

    Queries are position embedding + channel embedding; one pre-norm decoder layer, LayerNorm, MLP to P samples.
    """

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        num_heads: int,
        vocab_size: int,
        *,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        self.dtypes = dtypes
        self.channel_embedding = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), (vocab_size, embed_dim), dtypes.params)
        )
        self.layer = TransformerLayer(
            embed_dim, num_heads, mlp_ratio=DECODER_MLP_RATIO, cross=True, dropout=0.0, dtypes=dtypes, rngs=rngs
        )
        self.norm = LayerNorm(embed_dim, dtypes=dtypes, rngs=rngs)
        self.mlp = Mlp(embed_dim, 4 * embed_dim, patch_size, dtypes=dtypes, rngs=rngs)

    def embed_channels(self, channel_ids: Int[Array, "B C"]) -> Float[Array, "B C E"]:
        """Rows of the channel vocabulary; an id below 0 (a name outside it) has no embedding: zeros."""
        table = self.channel_embedding[...].astype(self.dtypes.compute)
        known = channel_ids >= 0
        rows = jnp.take(table, jnp.where(known, channel_ids, 0), axis=0, mode="clip")
        return jnp.where(known[..., None], rows, 0)

    def __call__(
        self,
        latents: Float[Array, "B S Q E"],
        queries: Float[Array, "B S C E"],
        channel_mask: Bool[Array, "B C"] | None = None,
        *,
        stages: Stages | None = None,
    ) -> Float[Array, "B C T"]:
        """Decode every channel of every patch; `queries` are position plus channel embeddings."""
        batch, patches, channels, _ = queries.shape
        mask = None
        if channel_mask is not None:
            mask = jnp.broadcast_to(channel_mask[:, None, :], (batch, patches, channels))
        decoded = self.layer(queries, latents, mask=mask)
        normed = self.norm(decoded)
        samples = self.mlp(normed)  # (B, S, C, P)
        if stages is not None:
            stages.update({"decoder_queries": queries, "decoder.transformer_out": decoded, "decoder.norm": normed})
        return samples.transpose(0, 2, 1, 3).reshape(batch, channels, -1)


class AttentionClassifier(nnx.Module):
    """One learned query attends over the patches, then an MLP of 4M (LUNA's classifier)."""

    def __init__(self, width: int, num_heads: int, num_outputs: int, *, dropout: float, dtypes: Dtypes, rngs: nnx.Rngs):
        self.dtypes = dtypes
        truncated = nnx.initializers.truncated_normal(stddev=0.02, lower=-1.0, upper=1.0)
        self.query = nnx.Param(truncated(rngs.params(), (width,), dtypes.params))
        self.attention = MultiHeadAttention(width, num_heads, dropout=dropout, dtypes=dtypes, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, num_outputs, dropout=dropout, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        latent: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
    ) -> Float[Array, "B K"]:
        """Padded patches get attention zero."""
        query = self.query[...].astype(self.dtypes.compute)
        attended, scores = self.attention.pool(query[None], latent, key_mask=patch_mask, rngs=rngs)
        if stages is not None:
            stages.update({"classifier.attn_out": attended, "classifier.attn_weights": scores})
        return self.mlp(attended, rngs=rngs)[:, 0]


class MambaClassifier(nnx.Module):
    """fc1 to 256, GELU, one forward Mamba block, mean over patches, fc3."""

    def __init__(
        self,
        width: int,
        num_outputs: int,
        output_channels: int | None,
        *,
        per_channel_classes: bool,
        scan_implementation: ScanImplementation,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        config = MambaConfig(d_model=MAMBA_HEAD_WIDTH, expand=2, scan_implementation=scan_implementation)
        self.output_shape = (num_outputs,)
        if output_channels is not None:
            self.output_shape = (output_channels, num_outputs) if per_channel_classes else (output_channels,)
        outputs = 1
        for size in self.output_shape:
            outputs *= size
        self.fc1 = linear(width, MAMBA_HEAD_WIDTH, init="torch", dtypes=dtypes, rngs=rngs)
        self.mamba = MambaBlock(config, dtypes=dtypes, rngs=rngs)
        self.fc3 = linear(MAMBA_HEAD_WIDTH, outputs, init="torch", dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        latent: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,  # noqa: ARG002  (one calling convention for every head; this one has no dropout)
        stages: Stages | None = None,
    ) -> Float[Array, "B ..."]:
        """Logits `(B, K)`, `(B, channels)` or `(B, channels, K)`."""
        projected = self.fc1(latent)
        hidden = self.mamba(gelu(projected), valid=patch_mask)
        pooled = masked_mean(hidden, patch_mask)
        if stages is not None:
            stages.update({"classifier.fc1": projected, "classifier.mamba_1": hidden, "classifier.pooled": pooled})
        return self.fc3(pooled).reshape(-1, *self.output_shape)


class LinearClassifier(nnx.Module):
    """Mean over patches, linear, GELU (the published model applies a GELU to the logits; so does this one)."""

    def __init__(self, width: int, num_outputs: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.fc1 = linear(width, num_outputs, init="torch", dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        latent: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,  # noqa: ARG002  (one calling convention for every head; this one has no dropout)
        stages: Stages | None = None,
    ) -> Float[Array, "B K"]:
        """Padded patches are left out of the mean."""
        pooled = masked_mean(latent, patch_mask)
        projected = self.fc1(pooled)
        if stages is not None:
            stages.update({"classifier.pooled": pooled, "classifier.fc1": projected})
        return gelu(projected)


def classifier(
    config: HeadConfig, width: int, *, dtypes: Dtypes, rngs: nnx.Rngs
) -> MambaClassifier | LinearClassifier | None:
    """The mamba or linear classifier that `config` names, over latents of `width`; None for "none"."""
    if config.head == "linear":
        return LinearClassifier(width, config.num_outputs or 1, dtypes=dtypes, rngs=rngs)
    if config.head == "mamba":
        return MambaClassifier(
            width,
            config.num_outputs or 1,
            config.output_channels,
            per_channel_classes=config.num_outputs is not None,
            scan_implementation=config.scan_implementation,
            dtypes=dtypes,
            rngs=rngs,
        )
    return None


def masked_mean(x: Float[Array, "B S M"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B M"]:
    """Mean over the valid patches, summed in float32 or better."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    where = None if mask is None else mask[:, :, None]
    return jnp.mean(x, axis=1, where=where, dtype=dtype).astype(x.dtype)
