"""LuMamba: tokens -> channel unification -> bidirectional Mamba over time -> head (arXiv 2603.19100).

x <- tokens(signal, positions)            (B, S, C, E)
x <- unify(x)                             (B, S, M),  M = Q*E, feature q*E + e
x <- x + BiMamba_i(LayerNorm_i(x))        i < num_blocks, no final norm
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lumamba_jax.channel_unifier import ChannelUnifier
from lumamba_jax.heads import AttentionClassifier, LinearClassifier, MambaClassifier, ReconstructionHead
from lumamba_jax.layers import Dtypes, LayerNorm
from lumamba_jax.mamba import Bidirectional, BiMamba, MambaConfig
from lumamba_jax.scan import ScanImplementation
from lumamba_jax.tokens import Tokenizer

Head = Literal["reconstruction", "attention", "mamba", "linear", "none"]
ComputeDtype = Literal["float32", "bfloat16", "float64"]
Stages = dict[str, Array]


@dataclass(frozen=True)
class LuMambaConfig:
    """Every size of the model; the defaults are the published tiny model with its reconstruction head.

    Attributes:
        patch_size: P, samples per patch, a multiple of 4.
        num_queries: Q, learned queries of the channel unification.
        embed_dim: E, token width, a multiple of 16 and of `num_heads`.
        num_heads: attention heads, everywhere.
        num_blocks: bidirectional Mamba blocks.
        expand: inner width of a Mamba block over M.
        d_state: states per inner feature.
        d_conv: width of the causal convolution.
        mlp_ratio: hidden over width in the channel unification (4 in the reconstruction head, as published).
        bidirectional: how the two directions are joined; "none" runs forward only.
        head: "reconstruction" for pre-training; "attention", "mamba", "linear" classify or regress; "none" encodes.
        num_outputs: classes or regression targets (classifier heads).
        output_channels: mamba head only: one output per channel, `(B, channels)`, or with `num_outputs` one row of
            classes per channel, `(B, channels, num_outputs)`.
        vocab_size: rows of the channel embedding (reconstruction head).
        dropout: of the channel unification, in training.
        head_dropout: of the attention classifier, in training.
        compute_dtype: activations and products. Scan, softmax, norms and positions stay in float32 under bfloat16.
        scan_implementation: see `selective_scan`.
    """

    patch_size: int = 40
    num_queries: int = 6
    embed_dim: int = 64
    num_heads: int = 2
    num_blocks: int = 2
    expand: int = 2
    d_state: int = 16
    d_conv: int = 4
    mlp_ratio: float = 4.0
    bidirectional: Bidirectional = "add"
    head: Head = "reconstruction"
    num_outputs: int | None = None
    output_channels: int | None = None
    vocab_size: int = 90
    dropout: float = 0.1
    head_dropout: float = 0.15
    compute_dtype: ComputeDtype = "float32"
    scan_implementation: ScanImplementation = "auto"

    def __post_init__(self):
        for name in (
            "patch_size",
            "num_queries",
            "embed_dim",
            "num_heads",
            "num_blocks",
            "expand",
            "d_state",
            "d_conv",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} must be at least 1, not {getattr(self, name)}")
        if self.head not in get_args(Head):
            raise ValueError(f"model config: head {self.head!r} is unknown: choose one of {get_args(Head)}")
        if self.bidirectional not in get_args(Bidirectional):
            raise ValueError(
                f"model config: bidirectional {self.bidirectional!r} is unknown: {get_args(Bidirectional)}"
            )
        if self.embed_dim % 16 or self.embed_dim % self.num_heads or self.patch_size % 4 or self.patch_size < 8:
            raise ValueError(
                f"model config: embed_dim {self.embed_dim} must be a multiple of 16 and of num_heads {self.num_heads}, "
                f"and patch_size {self.patch_size} a multiple of 4 (at least 8)"
            )
        classifies = self.head in ("attention", "mamba", "linear")
        if classifies and self.num_outputs is None and self.output_channels is None:
            raise ValueError(f"model config: head {self.head!r} needs num_outputs (classes or regression targets)")
        if self.output_channels is not None and self.head != "mamba":
            raise ValueError("model config: output_channels belongs to the mamba head only")

    @property
    def width(self) -> int:
        """Model width M = Q*E."""
        return self.num_queries * self.embed_dim

    def replace(self, **changes: object) -> "LuMambaConfig":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]


class EncoderOutput(NamedTuple):
    """Latent `(B, S, M)`, head-averaged attention scores `(B, S, Q, C)`, position embeddings `(B, S, C, E)`."""

    latent: Array
    attention_scores: Array
    positions: Array


class ModelOutput(NamedTuple):
    """What the full model returns; the fields of other heads are None.

    Attributes:
        latent: `(B, S, M)`.
        attention_scores: `(B, S, Q, C)`.
        reconstruction: `(B, C, T)`, in normalised units, or None.
        logits: `(B, K)`, `(B, channels)` or `(B, channels, K)`, or None.
    """

    latent: Array
    attention_scores: Array
    reconstruction: Array | None = None
    logits: Array | None = None


class LuMambaBlock(nnx.Module):
    """`x + BiMamba(LayerNorm(x))`."""

    def __init__(self, config: MambaConfig, strategy: Bidirectional, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.norm = LayerNorm(config.d_model, dtypes=dtypes, rngs=rngs)
        self.mamba = BiMamba(config, strategy, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S M"],
        valid: Bool[Array, "B S"] | None = None,
        *,
        stages: Stages | None = None,
        prefix: str = "",
    ) -> Float[Array, "B S M"]:
        """`valid` False marks padded patches."""
        normed = self.norm(x)
        out = x + self.mamba(normed, valid=valid, stages=stages, prefix=prefix)
        if stages is not None:
            stages[f"{prefix}norm"] = normed
            stages[f"{prefix}out"] = out
        return out


class LuMamba(nnx.Module):
    """The full model. Holds parameters only: `graphdef, params = nnx.split(model)`."""

    def __init__(self, config: LuMambaConfig, *, rngs: nnx.Rngs):
        dtypes = Dtypes.from_name(config.compute_dtype)
        self.config = config
        self.tokenizer = Tokenizer(config.patch_size, config.embed_dim, dtypes=dtypes, rngs=rngs)
        self.unifier = ChannelUnifier(
            config.embed_dim,
            config.num_queries,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            dtypes=dtypes,
            rngs=rngs,
        )
        mamba = MambaConfig(
            config.width, config.d_state, config.d_conv, config.expand, scan_implementation=config.scan_implementation
        )
        self.blocks = nnx.List(
            [LuMambaBlock(mamba, config.bidirectional, dtypes=dtypes, rngs=rngs) for _ in range(config.num_blocks)]
        )
        self.head = _make_head(config, dtypes=dtypes, rngs=rngs)

    def encode(
        self,
        signal: Float[Array, "B C T"],
        locations: Float[Array, "B C 3"],
        *,
        mask: Bool[Array, "B C T"] | None = None,
        channel_mask: Bool[Array, "B C"] | None = None,
        patch_mask: Bool[Array, "B S"] | None = None,
        position_noise: Float[Array, "B C 3"] | None = None,
        reference_position_tiling: bool = False,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
    ) -> EncoderOutput:
        """Encode normalised windows.

        Args:
            signal: normalised signal (`normalization.channel_zscore`), any number of channels, T a multiple of P.
            locations: electrode positions in metres, head frame.
            mask: True hides samples: every patch that holds one becomes the mask token.
            channel_mask: False marks padded channels.
            patch_mask: False marks padded patches; padding comes after the recording's end.
            position_noise: standard normal draws, scaled by 0.02 on the normalised positions (training).
            reference_position_tiling: give token row r = b*S + s the position of sample r mod B, as the published
                code does; for parity checks only.
            rngs: stream `dropout`; None means inference.
            stages: a dict that is filled with intermediate arrays.

        Raises:
            ValueError: shapes that do not fit, or T not a multiple of the patch size.
        """
        self._check_inputs(signal, locations, mask, channel_mask, patch_mask)
        batch, channels, _ = signal.shape
        size = self.config.patch_size
        patches = signal.reshape(batch, channels, -1, size)  # (B, C, S, P)
        num_patches = patches.shape[2]
        valid = _valid_patches(channel_mask, patch_mask, (batch, channels, num_patches))
        if valid is not None:
            patches = jnp.where(valid[..., None], patches, 0)
        masked = None if mask is None else mask.reshape(batch, channels, num_patches, size).any(axis=-1)
        tokens = self.tokenizer.embed_patches(patches, masked=masked, valid=valid, stages=stages)
        positions = self.tokenizer.embed_positions(locations, channel_mask, position_noise, stages=stages)
        tiled = _tile_over_patches(positions, num_patches, reference=reference_position_tiling)
        x = tokens.transpose(0, 2, 1, 3) + tiled  # (B, S, C, E)
        if stages is not None:
            stages["tokens"] = x
        latents, scores = self.unifier(x, channel_mask, rngs=rngs, stages=stages)
        x = latents.reshape(batch, num_patches, -1)  # (B, S, M), feature q*E + e
        for i, block in enumerate(self.blocks):
            x = block(x, patch_mask, stages=stages, prefix=f"block{i}.")
        if stages is not None:
            stages["latent"] = x
        return EncoderOutput(x, scores, tiled)

    def __call__(
        self,
        signal: Float[Array, "B C T"],
        locations: Float[Array, "B C 3"],
        *,
        channel_ids: Int[Array, "B C"] | None = None,
        mask: Bool[Array, "B C T"] | None = None,
        channel_mask: Bool[Array, "B C"] | None = None,
        patch_mask: Bool[Array, "B S"] | None = None,
        position_noise: Float[Array, "B C 3"] | None = None,
        reference_position_tiling: bool = False,
        rngs: nnx.Rngs | None = None,
        stages: Stages | None = None,
    ) -> ModelOutput:
        """Encode, then apply the head. Arguments as in `encode`.

        `channel_ids` are rows of the channel vocabulary, for the reconstruction head; -1 (or None) means a name
        outside it, reconstructed from its position alone.
        """
        encoded = self.encode(
            signal,
            locations,
            mask=mask,
            channel_mask=channel_mask,
            patch_mask=patch_mask,
            position_noise=position_noise,
            reference_position_tiling=reference_position_tiling,
            rngs=rngs,
            stages=stages,
        )
        reconstruction = logits = None
        if isinstance(self.head, ReconstructionHead):
            queries = encoded.positions
            if channel_ids is not None:
                names = self.head.embed_channels(channel_ids)
                queries = queries + _tile_over_patches(names, queries.shape[1], reference=reference_position_tiling)
            latents = encoded.latent.reshape(*encoded.latent.shape[:2], -1, self.config.embed_dim)
            reconstruction = self.head(latents, queries, channel_mask, stages=stages)
        elif self.head is not None:
            logits = self.head(encoded.latent, patch_mask, rngs=rngs, stages=stages)
        if stages is not None:
            stages.update({k: v for k, v in (("recon", reconstruction), ("logits", logits)) if v is not None})
        return ModelOutput(encoded.latent, encoded.attention_scores, reconstruction, logits)

    def _check_inputs(
        self, signal: Array, locations: Array, mask: Array | None, channel_mask: Array | None, patch_mask: Array | None
    ) -> None:
        if signal.ndim != 3:
            raise ValueError(f"signal must be (batch, channels, samples), not an array of shape {signal.shape}")
        batch, channels, samples = signal.shape
        size = self.config.patch_size
        if samples == 0 or samples % size:
            raise ValueError(
                f"the window has {samples} samples, not a multiple of the patch size {size}: "
                f"pad or crop it to {max(size, samples // size * size)} or {(samples // size + 1) * size}"
            )
        expected = {
            "locations": (locations, (batch, channels, 3)),
            "mask": (mask, (batch, channels, samples)),
            "channel_mask": (channel_mask, (batch, channels)),
            "patch_mask": (patch_mask, (batch, samples // size)),
        }
        for name, (array, shape) in expected.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, but a signal {signal.shape} asks for {shape}")


def _make_head(
    config: LuMambaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs
) -> ReconstructionHead | AttentionClassifier | MambaClassifier | LinearClassifier | None:
    if config.head == "none":
        return None
    if config.head == "reconstruction":
        return ReconstructionHead(
            config.patch_size,
            config.embed_dim,
            config.num_heads,
            config.vocab_size,
            dtypes=dtypes,
            rngs=rngs,
        )
    outputs = config.num_outputs or 1
    if config.head == "attention":
        return AttentionClassifier(
            config.width, config.num_heads, outputs, dropout=config.head_dropout, dtypes=dtypes, rngs=rngs
        )
    if config.head == "linear":
        return LinearClassifier(config.width, outputs, dtypes=dtypes, rngs=rngs)
    return MambaClassifier(
        config.width,
        outputs,
        config.output_channels,
        per_channel_classes=config.num_outputs is not None,
        scan_implementation=config.scan_implementation,
        dtypes=dtypes,
        rngs=rngs,
    )


def _valid_patches(
    channel_mask: Array | None, patch_mask: Array | None, shape: tuple[int, int, int]
) -> Bool[Array, "B C S"] | None:
    if channel_mask is None and patch_mask is None:
        return None
    valid = jnp.ones(shape, bool)
    if channel_mask is not None:
        valid &= channel_mask[:, :, None]
    if patch_mask is not None:
        valid &= patch_mask[:, None, :]
    return valid


def _tile_over_patches(
    embedding: Float[Array, "B C E"], num_patches: int, *, reference: bool
) -> Float[Array, "B S C E"]:
    batch = embedding.shape[0]
    if reference:
        # The published code repeats with the patch index outermost, so row b*S + s gets sample (b*S + s) mod B.
        rows = jnp.arange(batch * num_patches) % batch
        return embedding[rows].reshape(batch, num_patches, *embedding.shape[1:])
    return jnp.broadcast_to(embedding[:, None], (batch, num_patches, *embedding.shape[1:]))
