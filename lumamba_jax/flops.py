"""Floating-point operations of one forward pass, counted from the sizes alone (one multiply-add = 2).

Matrix products, convolutions, attention and the scan; norms, activations and other elementwise work are left out. A
Mamba block of width M over S patches, D = expand*M, N states, R = dt_rank, per direction:

    S * (2*M*2D + 2*K*D + 2*D*(R+2N) + 2*R*D + 9*D*N + 2*D*M)          K = d_conv
"""

from itertools import pairwise

from lumamba_jax.architectures import ModelConfig
from lumamba_jax.channel_unifier import NUM_REFINEMENT_LAYERS
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import DECODER_MLP_RATIO, MAMBA_HEAD_WIDTH
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.mamba import MambaConfig
from lumamba_jax.montage_model import MontageConfig
from lumamba_jax.tokens import first_convolution


def forward_flops(config: ModelConfig, num_channels: int, num_samples: int) -> dict[str, int]:
    """FLOPs per window by stage: "tokens", "channel unification", "temporal encoder", "head".

    Args:
        config: the model.
        num_channels: C.
        num_samples: T; a whole number of patches (FEMBA: exactly its window).

    Raises: ValueError when the window does not fit the model.
    """
    config.check_window(num_channels, num_samples)
    patches = config.num_patches(num_samples)
    if isinstance(config, FembaConfig):
        return _femba(config)
    temporal = _luna_blocks(config, patches) if isinstance(config, LunaConfig) else _mamba_blocks(config, patches)
    return {
        "tokens": _tokens(config, num_channels, patches),
        "channel unification": patches * _unify(config, num_channels),
        "temporal encoder": temporal,
        "head": _montage_head(config, num_channels, patches),
    }


def mamba_flops(config: MambaConfig, length: int) -> int:
    """One direction of one Mamba block over `length` steps, the formula above."""
    width, inner, states, rank = config.d_model, config.d_inner, config.d_state, config.dt_rank
    per_step = 2 * width * 2 * inner + 2 * config.d_conv * inner + 2 * inner * (rank + 2 * states) + 2 * rank * inner
    return length * (per_step + 9 * inner * states + 2 * inner * width)


def _dense(*sizes: int) -> int:
    """A chain of linear layers for one vector."""
    return sum(2 * a * b for a, b in pairwise(sizes))


def _attention(queries: int, keys: int, width: int) -> int:
    """Projections of queries, keys, values and output, scores and weighted sum."""
    return 2 * width * width * (2 * queries + 2 * keys) + 4 * queries * keys * width


def _tokens(config: MontageConfig, channels: int, patches: int) -> int:
    size, width, features = config.patch_size, config.embed_dim, config.embed_dim // 4
    first = first_convolution(size)
    steps, bins = first.out_width(size), size // 2 + 1
    time = steps * (2 * first.kernel * features + 2 * 2 * 3 * features * features)
    frequency = 2 * 2 * size * bins + _dense(2 * bins, 8 * bins, width)
    return channels * (patches * (time + frequency) + _dense(width, 2 * width, width))


def _unify(config: MontageConfig, channels: int) -> int:
    queries, width = config.num_queries, config.embed_dim
    mlp = queries * _dense(width, int(config.mlp_ratio * width), width)
    refinement = _attention(queries, queries, width) + mlp
    return _attention(queries, channels, width) + mlp + NUM_REFINEMENT_LAYERS * refinement


def _mamba_blocks(config: LuMambaConfig | FembaConfig, patches: int) -> int:
    directions = 1 if config.bidirectional == "none" else 2
    return config.num_blocks * directions * mamba_flops(config.mamba, patches)


def _luna_blocks(config: LunaConfig, patches: int) -> int:
    mlp = patches * _dense(config.width, int(config.mlp_ratio * config.width), config.width)
    return config.num_blocks * (_attention(patches, patches, config.width) + mlp)


def _montage_head(config: MontageConfig, channels: int, patches: int) -> int:
    width = config.embed_dim
    if config.head == "reconstruction":
        layer = _attention(channels, channels, width) + _attention(channels, config.num_queries, width)
        layer += channels * _dense(width, DECODER_MLP_RATIO * width, width)
        return patches * (layer + channels * _dense(width, 4 * width, config.patch_size))
    if config.head == "attention":
        outputs = config.num_outputs or 1
        return _attention(1, patches, config.width) + _dense(config.width, 4 * config.width, outputs)
    return _classifier(config, config.width, patches)


def _classifier(config: ModelConfig, width: int, patches: int) -> int:
    outputs = (config.num_outputs or 1) * (config.output_channels or 1)
    if config.head == "mamba":
        block = mamba_flops(MambaConfig(MAMBA_HEAD_WIDTH), patches)
        return patches * _dense(width, MAMBA_HEAD_WIDTH) + block + _dense(MAMBA_HEAD_WIDTH, outputs)
    return _dense(width, outputs) if config.head == "linear" else 0


def _femba(config: FembaConfig) -> dict[str, int]:
    grid, steps = config.grid
    patch = 2 * config.channel_patch_size * config.patch_size * config.embed_dim * grid * steps
    kernel = config.decoder_kernel[0] * config.decoder_kernel[1]
    reconstruction = 2 * kernel * steps * config.width + patch  # the transposed convolution costs as much
    head = reconstruction if config.head == "reconstruction" else _classifier(config, config.width, steps)
    return {"tokens": patch, "channel unification": 0, "temporal encoder": _mamba_blocks(config, steps), "head": head}
