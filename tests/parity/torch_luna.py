"""LUNA in plain PyTorch: a twin with the published parameter names, and the parts that LuMamba shares with it.

Written from the model specification, without fused kernels, so that it runs on any device and in float64. Names, shapes
and quirks are those of the published files: `load_state_dict(..., strict=True)` accepts them. No dropout.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from torch import Tensor, nn

from examples.export_torch_stages import Mlp, RotaryEmbedding

VOCABULARY = 90  # channel names


class PatchEmbed(nn.Module):
    """Time path: convolutions along each patch, group norms over the whole window: `(B, C, T) -> (B, C*S, E)`."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size, features, half = patch_size, embed_dim // 4, patch_size // 2
        layers: list[nn.Module] = []
        for inputs, kernel, stride, padding in (
            (1, half - 1, half // 2, half // 2 - 1),
            (features, 3, 1, 1),
            (features, 3, 1, 1),
        ):
            conv = nn.Conv2d(inputs, features, (1, kernel), (1, stride), (0, padding))
            layers += [conv, nn.GroupNorm(4, features), nn.GELU()]
        self.proj_in = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Token features are width-major."""
        patches = x.unflatten(2, (-1, self.patch_size)).flatten(1, 2)  # (B, C*S, P)
        return self.proj_in(patches[:, None]).permute(0, 2, 3, 1).flatten(2)


class FrequencyEmbed(nn.Module):
    """Frequency path: magnitudes and phases of the real FFT of each patch: `(B, C, T) -> (B, C*S, E)`."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        features = 2 * (patch_size // 2 + 1)
        self.frequency_to_embed = Mlp(features, 4 * features, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Unnormalised transform."""
        spectrum = torch.fft.rfft(x.unflatten(2, (-1, self.patch_size)), dim=-1)
        return self.frequency_to_embed(torch.cat([spectrum.abs(), spectrum.angle()], dim=-1)).flatten(1, 2)


class TransformerLayer(nn.Module):
    """Pre-norm layer with the names of PyTorch's encoder (`cross=False`) or decoder layer."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, cross: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        if cross:
            self.multihead_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
            self.norm3 = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """`memory` is what cross-attention looks at."""
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        norm = self.norm2
        if memory is not None:
            x = x + self.multihead_attn(self.norm2(x), memory, memory, need_weights=False)[0]
            norm = self.norm3
        return x + self.linear2(F.gelu(self.linear1(norm(x))))


class Layers(nn.Module):
    """A stack without a final norm."""

    def __init__(self, layers: list[TransformerLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Every layer sees the same memory."""
        for layer in self.layers:
            x = layer(x, memory)
        return x


class CrossAttention(nn.Module):
    """Channel unification: `(B*S, C, E) -> (B*S, Q, E)` and head-averaged scores."""

    def __init__(self, num_queries: int, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.query_embed = nn.Parameter(torch.randn(1, num_queries, width))
        self.temparature = nn.Parameter(torch.tensor(1.0), requires_grad=False)  # as published: never read
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ffn = Mlp(width, hidden, width, norm_layer=nn.LayerNorm)
        self.keys_norm, self.values_norm, self.queries_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_self_attn = Layers([TransformerLayer(width, num_heads, hidden, cross=False) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """No residual from the queries."""
        queries = self.queries_norm(self.query_embed.expand(len(x), -1, -1))
        attended, scores = self.cross_attention(queries, self.keys_norm(x), self.values_norm(x))
        return self.query_self_attn(attended + self.ffn(attended)), scores


class ReconstructionHead(nn.Module):
    """Channel queries decode their samples from the latents of their patch."""

    def __init__(self, patch_size: int, width: int, num_heads: int):
        super().__init__()
        self.width = width
        self.decoder_pred = Layers([TransformerLayer(width, num_heads, 4 * width, cross=True)])
        self.norm = nn.LayerNorm(width)
        self.decoder_linear = Mlp(width, 4 * width, patch_size)

    def forward(self, latent: Tensor, queries: Tensor) -> Tensor:
        """`(B, S, Q*E)`, `(B*S, C, E)` -> `(B, C, S*P)`."""
        patches = latent.shape[1]
        memory = latent.flatten(0, 1).unflatten(1, (-1, self.width))  # (B*S, Q, E)
        decoded = self.decoder_linear(self.norm(self.decoder_pred(queries, memory)))  # (B*S, C, P)
        return decoded.unflatten(0, (-1, patches)).transpose(1, 2).flatten(2)


class AttentionClassifier(nn.Module):
    """One learned query over the patches."""

    def __init__(self, width: int, num_heads: int, outputs: int):
        super().__init__()
        self.learned_agg = nn.Parameter(torch.randn(1, 1, width))
        self.decoder_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.decoder_ffn = Mlp(width, 4 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, M) -> (B, K)`."""
        attended, _ = self.decoder_attn(self.learned_agg.expand(len(x), -1, -1), x, x)
        return self.decoder_ffn(attended)[:, 0]


class ChannelEmbedding(nn.Module):
    """Rows of the channel vocabulary."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, width)

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, C) -> (B, C, E)`."""
        return self.embeddings(ids)


class MontageModel(nn.Module, ABC):
    """What LUNA and LuMamba share: tokens, channel unification, the reconstruction head, and the course of a call.

    A subclass adds its temporal encoder as `encode((B, S, M)) -> (B, S, M)`. Without classes the model reconstructs;
    with classes it sets `classifier`, and the mask token is not trained.

    `forward(x (B, C, T), channel_locations (B, C, 3), channel_names (B, C) | None, mask (B, C, T) | None,
    loc_noise (B, C, 3) | None)` returns the reconstruction `(B, C, T)` or the logits. `loc_noise`, standard
    normal, stands for the draw that the published code makes whenever a mask is given.
    """

    classifier: nn.Module

    def __init__(
        self, *, patch_size: int, num_queries: int, embed_dim: int, num_heads: int, mlp_ratio: float, num_classes: int
    ):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim), requires_grad=num_classes == 0)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.freq_embed = FrequencyEmbed(patch_size, embed_dim)
        self.channel_location_embedder = nn.Sequential(
            Mlp(embed_dim, 2 * embed_dim, embed_dim, norm_layer=nn.LayerNorm)
        )
        self.cross_attn = CrossAttention(num_queries, embed_dim, num_heads, int(mlp_ratio * embed_dim))
        if num_classes == 0:
            self.decoder_head = ReconstructionHead(patch_size, embed_dim, num_heads)
            self.channel_emb = ChannelEmbedding(VOCABULARY, embed_dim)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The temporal encoder."""

    def forward(
        self,
        x: Tensor,
        channel_locations: Tensor,
        channel_names: Tensor | None = None,
        mask: Tensor | None = None,
        loc_noise: Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        patches = x.shape[2] // self.patch_size
        tokens = self.patch_embed(x) + self.freq_embed(x)  # (B, C*S, E)
        if mask is not None:
            masked = mask.unflatten(2, (patches, -1)).any(-1).flatten(1)
            tokens = torch.where(masked[..., None], self.mask_token, tokens)
        positions = self.embed_positions(channel_locations, loc_noise)
        tokens = tokens.unflatten(1, (-1, patches)).transpose(1, 2).flatten(0, 1)  # (B*S, C, E), row b*S + s
        positions = positions.repeat(patches, 1, 1)  # row s*B + b: the published quirk
        unified, _ = self.cross_attn(tokens + positions)
        latent = self.encode(unified.flatten(1).unflatten(0, (-1, patches)))  # (B, S, Q*E)
        if not hasattr(self, "decoder_head"):
            return self.classifier(latent)
        assert channel_names is not None, "the reconstruction head needs channel_names"
        return self.decoder_head(latent, positions + self.channel_emb(channel_names).repeat(patches, 1, 1))

    def embed_positions(self, locations: Tensor, noise: Tensor | None) -> Tensor:
        """Min-max normalised positions, sines and cosines of octaves, MLP: `(B, C, 3) -> (B, C, E)`."""
        low, high = locations.amin(1, keepdim=True), locations.amax(1, keepdim=True)
        positions = (locations - low) / (high - low + 1e-8)
        if noise is not None:
            positions = positions + 0.02 * noise
        octaves = 2.0 ** torch.arange(self.embed_dim // 6, dtype=locations.dtype, device=locations.device)
        scaled = positions[:, :, None, :] * octaves[:, None]  # (B, C, F, 3)
        encoding = torch.stack([scaled.sin(), scaled.cos()], dim=-1).flatten(2)
        return self.channel_location_embedder(F.pad(encoding, (0, self.embed_dim - encoding.shape[-1])))


class RotaryAttention(nn.Module):
    """Self-attention over patches, `(B, S, M) -> (B, S, M)`; the rotary frequencies are a stored tensor."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.rotary_emb = RotaryEmbedding(width // num_heads)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, S, width/H)
        q, k = self.rotary_emb.rotate_queries_or_keys(q), self.rotary_emb.rotate_queries_or_keys(k)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """Pre-norm attention, then a pre-norm MLP with a norm of its own."""

    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = RotaryAttention(width, num_heads)
        self.mlp = Mlp(width, hidden, width, norm_layer=nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, M) -> (B, S, M)`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LUNA(MontageModel):
    """The full model; the constructor takes the published arguments."""

    def __init__(
        self,
        patch_size: int = 40,
        num_queries: int = 4,
        embed_dim: int = 64,
        depth: int = 8,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,  # a published argument without effect at inference
        num_classes: int = 0,
    ):
        super().__init__(
            patch_size=patch_size,
            num_queries=num_queries,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
        )
        width, heads = num_queries * embed_dim, num_heads * num_queries
        self.blocks = nn.ModuleList([RotaryBlock(width, heads, int(mlp_ratio * width)) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        if num_classes:
            self.classifier = AttentionClassifier(width, num_heads, num_classes)

    def encode(self, x: Tensor) -> Tensor:
        """The blocks and the final norm."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
