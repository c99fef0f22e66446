"""LuMamba: channel unification, then bidirectional Mamba over time (arXiv 2603.19100).

x <- unify(tokens)                        (B, S, M)
x <- x + BiMamba_i(LayerNorm_i(x))        i < num_blocks, no final norm
"""

from dataclasses import dataclass
from typing import Literal, get_args

from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.layers import Dtypes, LayerNorm, rematerialized
from lumamba_jax.long_windows import LONG, block_in_parts, pad_to_parts, part_size
from lumamba_jax.mamba import Bidirectional, BiMamba, MambaConfig
from lumamba_jax.montage_model import MontageConfig, MontageModel, make_head

Stages = dict[str, Array]


@dataclass(frozen=True)
class LuMambaConfig(MontageConfig):
    """Every size of the model; the defaults are the published tiny model with its reconstruction head.

    Attributes:
        expand: inner width of a Mamba block over M.
        d_state: states per inner feature.
        d_conv: width of the causal convolution.
        bidirectional: how the two directions are joined; "none" runs forward only.
    """

    architecture: Literal["LuMamba"] = "LuMamba"
    expand: int = 2
    d_state: int = 16
    d_conv: int = 4
    bidirectional: Bidirectional = "add"

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("expand", "d_state", "d_conv")
        if self.bidirectional not in get_args(Bidirectional):
            raise ValueError(
                f"model config: bidirectional {self.bidirectional!r} is unknown: {get_args(Bidirectional)}"
            )

    @property
    def mamba(self) -> MambaConfig:
        """Sizes of one direction of a block."""
        return MambaConfig(
            self.width, self.d_state, self.d_conv, self.expand, scan_implementation=self.scan_implementation
        )


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


class LuMamba(MontageModel):
    """The full model; calling convention in `MontageModel`."""

    def __init__(self, config: LuMambaConfig, *, rngs: nnx.Rngs):
        dtypes = Dtypes.from_name(config.compute_dtype)
        super().__init__(config, dtypes=dtypes, rngs=rngs)
        self.blocks = nnx.List(
            [
                LuMambaBlock(config.mamba, config.bidirectional, dtypes=dtypes, rngs=rngs)
                for _ in range(config.num_blocks)
            ]
        )
        self.head = make_head(config, dtypes=dtypes, rngs=rngs)

    def temporal(
        self,
        x: Float[Array, "B S M"],
        patch_mask: Bool[Array, "B S"] | None,
        *,
        rngs: nnx.Rngs | None,  # noqa: ARG002  (one calling convention for every temporal encoder; no dropout here)
        stages: Stages | None,
    ) -> Float[Array, "B S M"]:
        """Blocks over time; a long window goes part by part, unless its stages are asked for."""
        patches = x.shape[1]
        if patches > LONG and stages is None:
            part = part_size(patches)
            x, valid = pad_to_parts(x, patch_mask, part)
            for block in self.blocks:
                x = block_in_parts(block.norm, block.mamba, x, valid, part=part)
            return x[:, :patches]
        for i, block in enumerate(self.blocks):
            if stages is None:
                x = rematerialized(LuMambaBlock.__call__, self.config.remat)(block, x, patch_mask)
            else:
                x = block(x, patch_mask, stages=stages, prefix=f"block{i}.")
        return x
