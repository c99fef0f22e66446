"""LuMamba in plain PyTorch: LUNA's tokens and channel unification, FEMBA's bidirectional Mamba blocks.

Names, shapes and quirks are those of the published files: `load_state_dict(..., strict=True)` accepts them.
"""

from typing import Literal

import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from torch import Tensor, nn
from torch_femba import BiMamba, ClassificationType, MambaClassifier
from torch_luna import AttentionClassifier, MontageModel


class LinearClassifier(nn.Module):
    """Mean over patches, linear, GELU."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.fc1 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, M) -> (B, K)`."""
        return F.gelu(self.fc1(x.mean(1)))


class LuMamba(MontageModel):
    """The full model; the constructor takes the published arguments."""

    def __init__(
        self,
        patch_size: int = 40,
        num_queries: int = 4,
        embed_dim: int = 64,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,  # a published argument without effect at inference
        exp: int = 2,
        num_blocks: int = 2,
        bidirectional: bool = True,
        bidirectional_strategy: Literal["add", "ew_multiply"] = "add",
        num_classes: int = 0,
        classifier_option: Literal["luna", "mamba", "linear"] = "luna",
        classification_type: ClassificationType = "bc",
        classification_num_channels: int = 22,
    ):
        super().__init__(
            patch_size=patch_size,
            num_queries=num_queries,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
        )
        width = num_queries * embed_dim
        strategy = bidirectional_strategy if bidirectional else None
        self.mamba_blocks = nn.ModuleList([BiMamba(width, exp, strategy) for _ in range(num_blocks)])
        self.norm_layers = nn.ModuleList([nn.LayerNorm(width) for _ in range(num_blocks)])
        if num_classes == 0:
            return
        if classifier_option == "mamba":
            self.classifier = MambaClassifier(width, num_classes, classification_num_channels, classification_type)
        elif classifier_option == "linear":
            self.classifier = LinearClassifier(width, num_classes)
        else:
            self.classifier = AttentionClassifier(width, num_heads, num_classes)

    def encode(self, x: Tensor) -> Tensor:
        """Pre-norm residual blocks, no final norm."""
        for norm, block in zip(self.norm_layers, self.mamba_blocks, strict=True):
            x = x + block(norm(x))
        return x
