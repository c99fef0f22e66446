"""FEMBA in plain PyTorch: a twin with the published parameter names, and the parts that LuMamba shares with it.

Written from the model specification; `load_state_dict(..., strict=True)` accepts the published files. No dropout.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from torch import Tensor, nn

from examples.export_torch_stages import Mamba

ClassificationType = Literal["bc", "mcc", "ml", "mc", "mmc"]


class BiMamba(nn.Module):
    """Two directions with separate parameters, or the forward one alone."""

    def __init__(self, width: int, expand: int, strategy: Literal["add", "ew_multiply"] | None = "add"):
        super().__init__()
        self.strategy = strategy
        self.mamba_fwd = Mamba(width, expand=expand)
        if strategy:
            self.mamba_rev = Mamba(width, expand=expand)

    def forward(self, u: Tensor) -> Tensor:
        """Only time is flipped for the reverse direction."""
        out = self.mamba_fwd(u)
        if self.strategy:
            reverse = self.mamba_rev(u.flip(1)).flip(1)
            out = out + reverse if self.strategy == "add" else out * reverse
        return out


class MambaClassifier(nn.Module):
    """fc1, GELU, one Mamba block, mean over patches, fc3; its outputs are classes, channels, or both (by type)."""

    def __init__(self, width: int, num_classes: int, num_channels: int, classification_type: ClassificationType):
        super().__init__()
        per_channel = {"mc": (num_channels,), "mmc": (num_channels, num_classes)}
        self.output_shape = per_channel.get(classification_type, (num_classes,))
        self.fc1 = nn.Linear(width, 256)
        self.mamba_1 = Mamba(256)
        self.fc3 = nn.Linear(256, math.prod(self.output_shape))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, M) -> (B, *output_shape)`."""
        return self.fc3(self.mamba_1(F.gelu(self.fc1(x))).mean(1)).unflatten(1, self.output_shape)


class PatchEmbed(nn.Module):
    """One convolution over channels and time: `(B, C, T) -> (B, S, E*G)`, feature `e*G + g`."""

    def __init__(self, embed_dim: int, patch_size: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.proj(x[:, None]).flatten(1, 2).transpose(1, 2)


class Decoder(nn.Module):
    """`(B, S, E*G) -> (B, C, T)`: a convolution over the (time, feature) plane, then the patches' transpose.

    With a stride that leaves a remainder the result is shorter than the input was.
    """

    def __init__(
        self, embed_dim: int, patch_size: tuple[int, int], stride: tuple[int, int], kernel_dec: tuple[int, int]
    ):
        super().__init__()
        self.embed_dim = embed_dim
        padding = ((kernel_dec[0] - 1) // 2, (kernel_dec[1] - 1) // 2)
        self.dec_conv = nn.Conv2d(1, 1, kernel_dec, padding=padding, bias=False)
        self.conv_transpose = nn.ConvTranspose2d(embed_dim, 1, patch_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        plane = self.dec_conv(x[:, None])[:, 0]
        return self.conv_transpose(plane.transpose(1, 2).unflatten(1, (self.embed_dim, -1)))[:, 0]


class FEMBA(nn.Module):
    """The full model; the constructor takes the published arguments.

    `forward(x (B, C, T), mask (B, C, T) bool)` returns the reconstruction or the logits. Masked samples become 0.
    """

    def __init__(
        self,
        seq_length: int = 1280,
        num_channels: int = 22,
        num_classes: int = 0,
        kernel_dec: tuple[int, int] = (31, 31),
        exp: int = 4,
        patch_size: tuple[int, int] = (2, 16),
        stride: tuple[int, int] = (2, 16),
        embed_dim: int = 79,
        num_blocks: int = 1,
        classification_type: ClassificationType = "bc",
    ):
        super().__init__()
        sizes = zip((num_channels, seq_length), patch_size, stride, strict=True)
        rows, patches = ((size - patch) // step + 1 for size, patch, step in sizes)
        width = rows * embed_dim
        self.patch_embed = PatchEmbed(embed_dim, patch_size, stride)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.mamba_blocks = nn.ModuleList([BiMamba(width, exp) for _ in range(num_blocks)])
        self.norm_layers = nn.ModuleList([nn.LayerNorm(width) for _ in range(num_blocks)])
        if num_classes:
            self.classifier = MambaClassifier(width, num_classes, num_channels, classification_type)
        else:
            self.decoder = Decoder(embed_dim, patch_size, stride, kernel_dec)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        x = self.patch_embed(x.masked_fill(mask, 0.0)) + self.pos_embed
        for block, norm in zip(self.mamba_blocks, self.norm_layers, strict=True):
            x = norm(x + block(x))  # post-norm
        return self.classifier(x) if hasattr(self, "classifier") else self.decoder(x)
