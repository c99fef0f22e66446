"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): fine-tuning by a few numbers beside a fixed encoder.

The kernel W `(in, out)` of a chosen linear layer acts as

    W + alpha/rank * A B          A (in, rank) ~ N(0, 1/in),  B (rank, out) = 0 at first

and only A, B and the head are trained. The adapters are leaves of the parameter tree of a train state, under
`adapters/` and the path of their layer; `merged` turns such a tree into the plain parameters of the model. So no model
code knows of them, every path through it works with them, and what is exported is a model like any other.

Which layers: those that hold most of the weights, in the blocks of the temporal encoder. Hu et al. adapt attention;
adapting all linear layers of a block does better at the same number of weights (Dettmers et al., arXiv 2305.14314). Of
a Mamba block in_proj and out_proj: adapters of x_proj and dt_proj, which make the inputs of the scan, do not pay (Galim
et al., arXiv 2410.09016).
"""

import functools
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lumamba_jax.architectures import ModelConfig, abstract_model
from lumamba_jax.manifest import named_leaves

ADAPTERS = "adapters"
"""First part of the paths of A and B, as in `adapters/blocks/0/mamba/fwd/in_proj/A`."""
_MAMBA = r"^blocks/\d+/mamba/(fwd|rev)/(in_proj|out_proj)$"
_TRANSFORMER = r"^blocks/\d+/(attn/(qkv|proj)|mlp/fc[12])$"
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {"LuMamba": (_MAMBA,), "LUNA": (_TRANSFORMER,), "FEMBA": (_MAMBA,)}
"""By architecture."""


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters of a fine-tuning: with them the encoder's own weights stay, A, B and the head are trained.

    Attributes:
        rank: of A B; 0 = no adapters.
        alpha: A B is scaled by alpha / rank, so that another rank needs no other learning rate.
        targets: which linear layers: regular expressions, each to be found in the path of a layer
            ("mamba/fwd/in_proj", "^unifier/"). Empty = those of the architecture (`DEFAULT_TARGETS`).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"adapters: rank must be 0 (none) or more, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"adapters: alpha must be positive, not {self.alpha}")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"adapters: target {target!r} is not a regular expression: {error}") from error


NO_ADAPTERS = AdapterConfig()


def is_adapter(name: str) -> bool:
    """Whether a parameter path is that of an A or B."""
    return name.split("/", 1)[0] == ADAPTERS


@functools.lru_cache(maxsize=16)
def adapted_layers(model: ModelConfig, config: AdapterConfig) -> tuple[str, ...]:
    """Paths of the layers of the encoder whose kernels are adapted, in the order of the tree; none for rank 0.

    Raises: ValueError when a target names no linear layer of the encoder, or the rank exceeds what a kernel can have.
    """
    if not config.rank:
        return ()
    kernels = _kernels(model)
    targets = config.targets or DEFAULT_TARGETS[model.architecture]
    for target in targets:
        if not any(re.search(target, layer) for layer in kernels):
            known = sorted({re.sub(r"\d+", "*", layer) for layer in kernels})
            raise ValueError(f"adapters: target {target!r} is no linear layer of the {model.architecture} encoder; "
                             f"there are {', '.join(known)}")  # fmt: skip
    chosen = tuple(layer for layer in kernels if any(re.search(target, layer) for target in targets))
    for layer in chosen:
        if config.rank > min(kernels[layer].shape):
            raise ValueError(f"adapters: rank {config.rank} is more than the kernel {tuple(kernels[layer].shape)} of "
                             f"{layer} can have: choose {min(kernels[layer].shape)} or less")  # fmt: skip
    return chosen


def with_adapters(params: nnx.State, model: ModelConfig, config: AdapterConfig, *, seed: int) -> nnx.State:
    """The parameters of a model, and those of its adapters, with B = 0: the model computes what it did.

    Each A is a function of the seed and its path, whatever else is adapted. A and B have the dtype of the kernel. The
    same tree without adapters.
    """
    layers = adapted_layers(model, config)
    if not layers:
        return params
    leaves, flat = named_leaves(params), dict(nnx.to_flat_state(params))
    for layer in layers:
        kernel = leaves[f"{layer}/kernel"]
        fan_in, fan_out = kernel.shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.encode()))
        a = jax.random.normal(key, (fan_in, config.rank), kernel.dtype) / math.sqrt(fan_in)
        place = (ADAPTERS, *(int(part) if part.isdigit() else part for part in layer.split("/")))
        flat[*place, "A"] = nnx.Param(a)
        flat[*place, "B"] = nnx.Param(jnp.zeros((config.rank, fan_out), kernel.dtype))
    return nnx.from_flat_state(flat)


def abstract_adapted(model: ModelConfig, config: AdapterConfig) -> nnx.State:
    """The tree of `with_adapters` as `jax.ShapeDtypeStruct`s."""
    params = abstract_model(model)[1]
    return jax.eval_shape(lambda params: with_adapters(params, model, config, seed=0), params)


def merged(params: nnx.State, config: AdapterConfig) -> nnx.State:
    """The plain parameters of the model: W + alpha/rank A B in place of W, and no adapters."""
    if not config.rank:
        return params
    leaves = named_leaves(params)
    adapters, plain = nnx.split_state(params, lambda path, _: path[0] == ADAPTERS, ...)
    del adapters

    def effective(name: str, kernel: Array) -> Array:
        layer = f"{ADAPTERS}/{name.removesuffix('/kernel')}"
        if not name.endswith("/kernel") or f"{layer}/A" not in leaves:
            return kernel
        return effective_kernel(kernel, leaves[f"{layer}/A"], leaves[f"{layer}/B"], config)

    values = [effective(name, leaf) for name, leaf in named_leaves(plain).items()]
    return jax.tree.unflatten(jax.tree.structure(plain), values)


def effective_kernel(
    kernel: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"], config: AdapterConfig
) -> Float[Array, "I O"]:
    """W + alpha/rank A B, the product in full precision: it is small, and what is exported must be what was trained."""
    return kernel + config.alpha / config.rank * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _kernels(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Kernels of the encoder's linear layers by the path of the layer."""
    leaves = named_leaves(abstract_model(model)[1])
    return {
        name.removesuffix("/kernel"): leaf
        for name, leaf in leaves.items()
        if name.endswith("/kernel") and leaf.ndim == 2 and not name.startswith("head/")
    }
