"""Floating-point operations of one forward pass, counted from the sizes alone (one multiply-add = 2).

`forward_flops` is the nominal work of the published formulation, the convention of "model FLOPs": matrix products,
convolutions, attention and the scan; norms, activations and other elementwise work are left out. A Mamba block of width
M over S patches, D = expand*M, N states, R = dt_rank, per direction:

    S * (2*M*2D + 2*K*D + 2*D*(R+2N) + 2*R*D + 9*D*N + 2*D*M)          K = d_conv

`applications` counts the elementwise work: how many elements go through each function (GELU, LayerNorm, ...);
`transcendentals` and `elementwise_flops` follow from it. `program_flops` adds up what XLA's cost analysis says of the
compiled program: that is the check of all these formulas (tests, `python -m benchmarks.speed --only FLOPs`).
"""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from lumamba_jax.architectures import ModelConfig
from lumamba_jax.channel_unifier import NUM_REFINEMENT_LAYERS
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import DECODER_MLP_RATIO, MAMBA_HEAD_WIDTH, HeadConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.mamba import MambaConfig
from lumamba_jax.montage_model import MontageConfig
from lumamba_jax.tokens import first_convolution

Applications = Counter[str]
"""Elements that go through each function of `OPERATIONS`."""

OPERATIONS: Mapping[str, int] = {
    "gelu": 64,  # exact: erfc as two rational functions
    "silu": 4,
    "softplus": 24,  # `scan.softplus`
    "softmax": 4,
    "exp": 0,  # decays of the scan; their other operations are part of the recurrence
    "spectrum": 42,  # magnitude and phase of one bin
    "layer norm": 7,  # two sums, difference, square, quotient, scale, shift
    "group norm": 5,  # sum, square, sum of squares, slope, offset
    "other": 1,  # biases, residuals, gates, rotations
}
"""Operations of one element as XLA counts them (JAX 0.10), besides the transcendental ones, which it counts apart."""

TRANSCENDENTAL = ("gelu", "silu", "softplus", "softmax", "exp", "spectrum")
"""Functions with one transcendental operation per element (exp; spectrum: square root, and a polynomial arctangent)."""


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


def stage_of(path: str) -> str:
    """The stage of `forward_flops` that a parameter belongs to."""
    tokens = dict.fromkeys(("tokenizer", "patch_embed", "pos_embed"), "tokens")
    stages = tokens | {"unifier": "channel unification", "head": "head"}
    return stages.get(path.split("/", 1)[0], "temporal encoder")


def folded_flops(config: ModelConfig, num_channels: int, num_samples: int) -> dict[str, int]:
    """`forward_flops` with constant queries folded into keys and values: what inference has to multiply at least.

    The learned queries of the channel unification and of the attention classifier are the same for every window. Per
    head, query and key projection are then one vector, and values are projected after they were averaged.
    """
    flops = forward_flops(config, num_channels, num_samples)
    if isinstance(config, FembaConfig):
        return flops
    patches, heads = config.num_patches(num_samples), config.num_heads
    saved = _folding_saves(config.num_queries, num_channels, config.embed_dim, heads)
    flops["channel unification"] -= patches * saved
    if config.head == "attention":
        flops["head"] -= _folding_saves(1, patches, config.width, heads)
    return flops


def applications(config: ModelConfig, num_channels: int, num_samples: int) -> dict[str, Applications]:
    """Elementwise work per window by stage (as `forward_flops`): elements through each function of `OPERATIONS`."""
    config.check_window(num_channels, num_samples)
    patches = config.num_patches(num_samples)
    if isinstance(config, FembaConfig):
        return _femba_applications(config, patches)
    if isinstance(config, LunaConfig):
        temporal = _luna_applications(config, patches)
    else:
        temporal = _mamba_applications(config, patches)
    return {
        "tokens": _token_applications(config, num_channels, patches),
        "channel unification": _times(_unify_applications(config, num_channels), patches),
        "temporal encoder": temporal,
        "head": _head_applications(config, num_channels, patches),
    }


def transcendentals(config: ModelConfig, num_channels: int, num_samples: int) -> Applications:
    """Transcendental operations per window, by function (`TRANSCENDENTAL`)."""
    total = sum(applications(config, num_channels, num_samples).values(), Counter())
    return Counter({name: total[name] for name in TRANSCENDENTAL if total[name]})


def elementwise_flops(config: ModelConfig, num_channels: int, num_samples: int) -> dict[str, int]:
    """Elementwise operations per window by stage, as XLA counts them: `applications` times `OPERATIONS`."""
    return {
        stage: sum(OPERATIONS[name] * count for name, count in counts.items())
        for stage, counts in applications(config, num_channels, num_samples).items()
    }


def program_flops(config: ModelConfig, num_channels: int, num_samples: int, *, folded: bool = False) -> int:
    """What XLA's cost analysis (`compiled.cost_analysis()["flops"]`) says of the program of one window on a CPU.

    Matrix products and elementwise work, with the differences between a formulation and a program: convolutions within
    a patch are banded matrices whose zeros count, as do those of the projection of pooled values; the zero padding of
    FEMBA's decoder does not count; a step of the scan is 6 D N operations and an exp; and XLA counts the body of a loop
    once, so that each scan counts one step. What XLA computes twice in two fusions (up to 3 %) is not modelled.

    Args:
        config, num_channels, num_samples: as in `forward_flops`.
        folded: whether the program folds constant queries (`folded_flops`), as inference does.
    """
    count = folded_flops if folded else forward_flops
    flops = sum(count(config, num_channels, num_samples).values())
    flops += sum(elementwise_flops(config, num_channels, num_samples).values())
    for block, scans, steps in _scans(config, num_samples):
        flops += scans * block.d_inner * block.d_state * (6 - 9 * steps)
    if isinstance(config, FembaConfig):
        return flops - (_padding_of_decoder(config) if config.head == "reconstruction" else 0)
    patches = config.num_patches(num_samples)
    if folded:
        flops += patches * _zeros_of_heads(config.num_queries, config.embed_dim, config.num_heads)
        flops += _zeros_of_heads(1, config.width, config.num_heads) if config.head == "attention" else 0
    return flops + num_channels * patches * _zeros_of_bands(config)


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


def _classifier(config: HeadConfig, width: int, patches: int) -> int:
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


# ---- constant queries, and what a program does differently ----------------------------------------------------------


def _folding_saves(queries: int, keys: int, width: int, heads: int) -> int:
    """Of `_attention`: per head scores and sums over all features, then values and output projected per query."""
    folded = 4 * heads * queries * keys * width + 2 * queries * width * width + 2 * queries * width * width
    return _attention(queries, keys, width) - folded


def _zeros_of_heads(queries: int, width: int, heads: int) -> int:
    """Products with zeros where pooled values of all heads are projected at once (`MultiHeadAttention.pool`)."""
    return 2 * queries * (heads - 1) * width * width


def _scans(config: ModelConfig, num_samples: int) -> list[tuple[MambaConfig, int, int]]:
    """(sizes, number of scans, steps of each) of the encoder and the head."""
    patches, scans = config.num_patches(num_samples), []
    if not isinstance(config, LunaConfig):
        directions = 1 if config.bidirectional == "none" else 2
        scans.append((config.mamba, directions * config.num_blocks, patches))
    if config.head == "mamba":
        scans.append((MambaConfig(MAMBA_HEAD_WIDTH), 1, patches))
    return scans


def _zeros_of_bands(config: MontageConfig) -> int:
    """Products with the zeros of the three banded matrices (`tokens.PatchConv`), per patch of one channel."""
    size, width, features = config.patch_size, config.embed_dim, config.embed_dim // 4
    first = first_convolution(size)
    dense = 2 * (size * width + 2 * width * width)
    return dense - first.out_width(size) * (2 * first.kernel * features + 2 * 2 * 3 * features * features)


def _padding_of_decoder(config: FembaConfig) -> int:
    """Products with the zero padding of the convolution over the (time, feature) plane."""
    plane, kernel = (config.grid[1], config.width), config.decoder_kernel
    full = plane[0] * plane[1] * kernel[0] * kernel[1]
    real = 1
    for size, taps in zip(plane, kernel, strict=True):
        real *= sum(max(0, size - abs(offset)) for offset in range(-(taps // 2), taps // 2 + 1))
    return 2 * (full - real)


# ---- elementwise work -----------------------------------------------------------------------------------------------


def _times(counts: Applications, factor: int) -> Applications:
    return Counter({name: factor * count for name, count in counts.items()})


def _mlp_applications(hidden: int, outputs: int, *, norm: bool) -> Applications:
    """Of one vector: biases, GELU, norm of the hidden layer."""
    return Counter({"gelu": hidden, "layer norm": hidden * norm, "other": hidden + outputs})


def _attention_applications(queries: int, keys: int, width: int, heads: int) -> Applications:
    """Biases, scaling of the queries, softmax, mean of the scores over heads."""
    pairs = heads * queries * keys
    return Counter({"softmax": pairs, "other": pairs + width * (3 * queries + 2 * keys)})


def _token_applications(config: MontageConfig, channels: int, patches: int) -> Applications:
    width, bins = config.embed_dim, config.patch_size // 2 + 1
    time = Counter({"group norm": 3 * width, "gelu": 3 * width})
    frequency = Counter({"spectrum": bins}) + _mlp_applications(8 * bins, width, norm=False)
    sums = Counter({"other": 2 * width})  # time + frequency + position
    positions = _mlp_applications(2 * width, width, norm=True)
    return _times(time + frequency + sums, channels * patches) + _times(positions, channels)


def _transformer_applications(config: MontageConfig, length: int, width: int, hidden: int) -> Applications:
    """A pre-norm layer of self-attention: two norms, two residuals."""
    attention = _attention_applications(length, length, width, config.num_heads)
    return attention + _times(
        Counter({"layer norm": 2 * width, "other": 2 * width}) + _mlp_applications(hidden, width, norm=False), length
    )


def _unify_applications(config: MontageConfig, channels: int) -> Applications:
    """Of one patch. Norms of keys and values share their statistics: two of seven operations are done twice."""
    queries, width = config.num_queries, config.embed_dim
    hidden = int(config.mlp_ratio * width)
    norms = Counter({"layer norm": channels * width, "other": 2 * channels * width})
    cross = _attention_applications(queries, channels, width, config.num_heads)
    mlp = _times(_mlp_applications(hidden, width, norm=True) + Counter({"other": width}), queries)
    refinement = _transformer_applications(config, queries, width, hidden)
    return norms + cross + mlp + _times(refinement, NUM_REFINEMENT_LAYERS)


def _block_applications(config: MambaConfig, length: int) -> Applications:
    """One direction of one Mamba block; the convolution counts as a product, the decays once per state."""
    inner = config.d_inner
    step = {"silu": 2 * inner, "softplus": inner, "exp": inner * config.d_state, "other": 4 * inner}
    return _times(Counter(step), length)


def _mamba_applications(config: LuMambaConfig | FembaConfig, patches: int) -> Applications:
    directions = 1 if config.bidirectional == "none" else 2
    around = Counter({"layer norm": config.width, "other": directions * config.width})
    block = _times(_block_applications(config.mamba, patches), directions) + _times(around, patches)
    return _times(block, config.num_blocks)


def _luna_applications(config: LunaConfig, patches: int) -> Applications:
    width, hidden = config.width, int(config.mlp_ratio * config.width)
    attention = _attention_applications(patches, patches, width, config.temporal_heads)
    rotation = Counter({"other": patches * 2 * 3 * width})
    mlp = _mlp_applications(hidden, width, norm=True)
    norms = Counter({"layer norm": 2 * width, "other": 2 * width})
    block = attention + rotation + _times(mlp + norms, patches)
    return _times(block, config.num_blocks) + Counter({"layer norm": patches * width})


def _head_applications(config: MontageConfig, channels: int, patches: int) -> Applications:
    width = config.embed_dim
    if config.head == "reconstruction":
        layer = _transformer_applications(config, channels, width, DECODER_MLP_RATIO * width)
        layer += _attention_applications(channels, config.num_queries, width, config.num_heads)
        outside = Counter({"layer norm": 2 * width, "other": 2 * width})
        outside += _mlp_applications(4 * width, config.patch_size, norm=False)
        return _times(layer + _times(outside, channels), patches)
    if config.head == "attention":
        attention = _attention_applications(1, patches, config.width, config.num_heads)
        return attention + _mlp_applications(4 * config.width, config.num_outputs or 1, norm=False)
    return _classifier_applications(config, config.width, patches)


def _classifier_applications(config: HeadConfig, width: int, patches: int) -> Applications:
    outputs = (config.num_outputs or 1) * (config.output_channels or 1)
    if config.head == "mamba":
        step = Counter({"gelu": MAMBA_HEAD_WIDTH, "other": 2 * MAMBA_HEAD_WIDTH})
        return _block_applications(MambaConfig(MAMBA_HEAD_WIDTH), patches) + _times(step, patches)
    return Counter({"gelu": outputs, "other": width * patches}) if config.head == "linear" else Counter()


def _femba_applications(config: FembaConfig, patches: int) -> dict[str, Applications]:
    if config.head == "reconstruction":
        head = Counter({"other": config.num_channels * config.num_samples})
    else:
        head = _classifier_applications(config, config.width, patches)
    return {
        "tokens": Counter({"other": 2 * patches * config.width}),
        "channel unification": Counter(),
        "temporal encoder": _mamba_applications(config, patches),
        "head": head,
    }
