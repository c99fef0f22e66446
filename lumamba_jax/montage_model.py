"""What LuMamba and LUNA share: any montage in, one latent per patch, a temporal encoder, a head.

x <- tokens(signal, positions)            (B, S, C, E)
x <- unify(x)                             (B, S, M),  M = Q*E, feature q*E + e
x <- temporal encoder over S              LuMamba: bidirectional Mamba; LUNA: rotary transformer
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lumamba_jax.channel_unifier import ChannelUnifier
from lumamba_jax.heads import (
    AttentionClassifier,
    EncoderOutput,
    HeadConfig,
    LinearClassifier,
    MambaClassifier,
    ModelOutput,
    ReconstructionHead,
    classifier,
)
from lumamba_jax.layers import Dtypes
from lumamba_jax.tokens import Tokenizer

Stages = dict[str, Array]


@dataclass(frozen=True)
class MontageConfig(HeadConfig):
    """Sizes that LuMamba and LUNA have in common; the fields of `HeadConfig` besides.

    Attributes:
        patch_size: P, samples per patch, a multiple of 4.
        num_queries: Q, learned queries of the channel unification.
        embed_dim: E, token width, a multiple of 16 and of `num_heads`.
        num_heads: attention heads over channels and queries.
        num_blocks: blocks of the temporal encoder.
        mlp_ratio: hidden over width in the encoder's MLPs (4 in the reconstruction head, as published).
        vocab_size: rows of the channel embedding (reconstruction head).
        dropout: of the channel unification, in training.
        head_dropout: of the attention classifier, in training.
    """

    patch_size: int = 40
    num_queries: int = 6
    embed_dim: int = 64
    num_heads: int = 2
    num_blocks: int = 2
    mlp_ratio: float = 4.0
    vocab_size: int = 90
    dropout: float = 0.1
    head_dropout: float = 0.15

    normalization: ClassVar = "channel_zscore"  # of the input of the published models

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("patch_size", "num_queries", "embed_dim", "num_heads", "num_blocks", "vocab_size")
        if self.embed_dim % 16 or self.embed_dim % self.num_heads or self.patch_size % 4 or self.patch_size < 8:
            raise ValueError(
                f"model config: embed_dim {self.embed_dim} must be a multiple of 16 and of num_heads {self.num_heads}, "
                f"and patch_size {self.patch_size} a multiple of 4 (at least 8)"
            )

    @property
    def width(self) -> int:
        """Model width M = Q*E."""
        return self.num_queries * self.embed_dim

    def num_patches(self, num_samples: int) -> int:
        """Patches S of a window of `num_samples`. Raises ValueError when it is not a whole number of patches."""
        if num_samples == 0 or num_samples % self.patch_size:
            below = max(self.patch_size, num_samples // self.patch_size * self.patch_size)
            raise ValueError(
                f"the window has {num_samples} samples, not a multiple of the patch size {self.patch_size}: "
                f"pad or crop it to {below} or {(num_samples // self.patch_size + 1) * self.patch_size}"
            )
        return num_samples // self.patch_size

    def check_window(self, num_channels: int, num_samples: int) -> None:  # noqa: ARG002  (FEMBA's is fixed)
        """Raise ValueError when a window of this shape does not fit; any number of channels does."""
        self.num_patches(num_samples)


class MontageModel(nnx.Module):
    """Tokenizer, channel unification and head; the temporal encoder is the subclass's `temporal`.

    Holds parameters only: `graphdef, params = nnx.split(model)`.
    """

    def __init__(self, config: MontageConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
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

    @abstractmethod
    def temporal(
        self,
        x: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None,
        *,
        rngs: nnx.Rngs | None,
        stages: Stages | None,
    ) -> Float[Array, "B S M"]:
        """The temporal encoder; `patch_mask` False marks padded patches."""

    def encode(
        self,
        signal: Float[Array, "B C T"],
        locations: Float[Array, "B C 3"],
        *,
        mask: Bool[Array, "B C T"] | None = None,
        channel_mask: Bool[Array, "B C"] | None = None,
        patch_mask: Bool[Array, "B S"] | None = None,
        position_noise: Float[Array, "B C 3"] | None = None,
        position_encoding: Float[Array, "B C E"] | None = None,
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
            position_encoding: what `tokens.position_encoding` made of the locations on the host; takes their place,
                noise included.
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
        positions = self.tokenizer.embed_positions(
            locations, channel_mask, position_noise, encoding=position_encoding, stages=stages
        )
        tiled = _tile_over_patches(positions, num_patches, reference=reference_position_tiling)
        x = tokens.transpose(0, 2, 1, 3) + tiled  # (B, S, C, E)
        if stages is not None:
            stages["tokens"] = x
        latents, scores = self.unifier(x, channel_mask, rngs=rngs, stages=stages)
        x = latents.reshape(batch, num_patches, -1)  # (B, S, M), feature q*E + e
        x = self.temporal(x, patch_mask, rngs=rngs, stages=stages)
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
        position_encoding: Float[Array, "B C E"] | None = None,
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
            position_encoding=position_encoding,
            reference_position_tiling=reference_position_tiling,
            rngs=rngs,
            stages=stages,
        )
        reconstruction = logits = None
        if isinstance(self.head, ReconstructionHead):
            assert encoded.positions is not None
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
        expected = {
            "locations": (locations, (batch, channels, 3)),
            "mask": (mask, (batch, channels, samples)),
            "channel_mask": (channel_mask, (batch, channels)),
            "patch_mask": (patch_mask, (batch, self.config.num_patches(samples))),
        }
        for name, (array, shape) in expected.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, but a signal {signal.shape} asks for {shape}")


def make_head(
    config: MontageConfig, *, dtypes: Dtypes, rngs: nnx.Rngs
) -> ReconstructionHead | AttentionClassifier | MambaClassifier | LinearClassifier | None:
    """The head that `config` names, or None."""
    if config.head == "reconstruction":
        return ReconstructionHead(
            config.patch_size, config.embed_dim, config.num_heads, config.vocab_size, dtypes=dtypes, rngs=rngs
        )
    if config.head == "attention":
        outputs = config.num_outputs or 1
        return AttentionClassifier(
            config.width, config.num_heads, outputs, dropout=config.head_dropout, dtypes=dtypes, rngs=rngs
        )
    return classifier(config, config.width, dtypes=dtypes, rngs=rngs)


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
