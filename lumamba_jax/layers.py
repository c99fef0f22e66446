"""Dense building blocks shared by every architecture: dtype policy, linear layers, LayerNorm, MLP, dropout.

Every LayerNorm of the family has eps 1e-5 and every GELU is the exact (erf) form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

NORM_EPSILON = 1e-5

Initializer = Callable[..., Array]
Remat = Literal["none", "blocks", "products"]
"""What the backward pass computes again: nothing, whole blocks, or all of a block but its products of matrices."""


@dataclass(frozen=True)
class Dtypes:
    """`compute` is the dtype of activations and products, `params` that of the stored parameters."""

    compute: jnp.dtype
    params: jnp.dtype

    @classmethod
    def from_name(cls, compute_dtype: str) -> "Dtypes":
        """Parameters are float32, except float64 for float64.

        Raises:
            ValueError: unknown name, or float64 asked for while JAX has x64 switched off.
        """
        if compute_dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"compute_dtype {compute_dtype!r} is unknown: choose float32, bfloat16 or float64")
        if compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                "compute_dtype 'float64' needs JAX's x64 mode: set jax_enable_x64 before building the model"
            )
        params = jnp.float64 if compute_dtype == "float64" else jnp.float32
        return cls(jnp.dtype(compute_dtype), jnp.dtype(params))


def rematerialized(call: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """`call(block, x, ...)`, positional, of a temporal block, which keeps for its backward pass what `remat` says.

    "none" keeps all activations; "blocks" keeps only the input of the block and computes the rest again (about a third
    more work, memory no longer grows with what is inside a block); "products" keeps the results of products with
    weights too, and computes again what is cheap: norms, activations, gates, the scan.
    """
    if remat == "none":
        return call
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "products" else None
    return nnx.remat(lambda *arguments: call(*arguments), policy=policy)  # NNX takes no keyword-only parameters


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear and convolution weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    in_features: int, out_features: int, *, dtypes: Dtypes, rngs: nnx.Rngs, bias: bool = True, init: str = "xavier"
) -> nnx.Linear:
    """A linear layer `(.., in) -> (.., out)`.

    `init="xavier"`: Xavier-normal weight, zero bias (LUNA's modules). `init="torch"`: PyTorch's default, uniform in
    +-1/sqrt(in) for weight and bias (Mamba blocks and the Mamba and linear heads of the published models).
    """
    torch_default = uniform_fan_in(in_features)
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        kernel_init=torch_default if init == "torch" else nnx.initializers.glorot_normal(),
        bias_init=torch_default if init == "torch" else nnx.initializers.zeros_init(),
        dtype=dtypes.compute,
        param_dtype=dtypes.params,
        rngs=rngs,
    )


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, eps 1e-5: centred variance, statistics in float32 or better.

    Divides by the square root where a generic implementation multiplies by an approximate reciprocal square root,
    which costs several float32 rounding steps on some backends.
    """

    def __init__(self, features: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        self.dtype = dtypes.compute
        self.scale = nnx.Param(nnx.initializers.ones_init()(rngs.params(), (features,), dtypes.params))
        self.bias = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (features,), dtypes.params))

    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Normalise each vector of the last axis."""
        normed = self.normalize(x)
        scale, bias = (p[...].reshape((1,) * (x.ndim - 1) + (-1,)) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(self.dtype)

    @staticmethod
    def normalize(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Before scale and bias: mean 0 and variance 1, float32 or better."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPSILON)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU (erf). The tanh form is off by 4.5e-4 end to end."""
    return jax.nn.gelu(x, approximate=False)


def dropout(x: Float[Array, "..."], rate: float, rngs: nnx.Rngs | None) -> Float[Array, "..."]:
    """Inverted dropout drawn from the stream `dropout`; the identity when `rngs` is None (inference)."""
    return x if rngs is None else _drop(x, rate, x.shape, rngs)


def drop_path(branch: Float[Array, "B ..."], rate: float, rngs: nnx.Rngs | None) -> Float[Array, "B ..."]:
    """Stochastic depth (arXiv 1603.09382): drop the branch of whole windows; the identity when `rngs` is None."""
    return branch if rngs is None else _drop(branch, rate, (branch.shape[0],) + (1,) * (branch.ndim - 1), rngs)


def _drop(x: Array, rate: float, shape: tuple[int, ...], rngs: nnx.Rngs) -> Array:
    """Zeros for a share `rate` of the entries of `shape`, the others scaled so that the mean stays.

    Sixteen random bits decide an entry, half the work of a uniform number: the rate is kept to 1/65536.
    """
    dropped = round(rate * 2**16)
    if dropped == 0:
        return x
    keep = jax.random.bits(rngs.dropout(), shape, jnp.uint16) >= dropped
    return jnp.where(keep, x / (1 - dropped / 2**16), jnp.zeros_like(x))


def pairwise_linear(layer: nnx.Linear, x: Float[Array, "... I"], parts: int = 4) -> Float[Array, "... O"]:
    """Apply `layer` as a tree of `parts` partial products: a third of the rounding error of one running sum.

    For small layers whose input is exact, where the order of summation is the error (electrode positions).
    """
    kernel = layer.kernel[...].astype(x.dtype).reshape(parts, -1, layer.out_features)
    split = x.reshape(*x.shape[:-1], parts, -1)
    sums = list(jnp.einsum("...gi,gio->g...o", split, kernel))
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
    out = sums[0]
    if layer.bias is not None:
        out = out + layer.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return out


class Mlp(nnx.Module):
    """fc1, GELU, dropout, optional LayerNorm on the hidden layer, fc2, dropout: `(.., in) -> (.., out)`.

    With `pairwise` both layers are summed as trees (`pairwise_linear`).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
        hidden_norm: bool = False,
        dropout: float = 0.0,
        pairwise: bool = False,
    ):
        self.fc1 = linear(in_features, hidden_features, dtypes=dtypes, rngs=rngs)
        self.norm = LayerNorm(hidden_features, dtypes=dtypes, rngs=rngs) if hidden_norm else None
        self.fc2 = linear(hidden_features, out_features, dtypes=dtypes, rngs=rngs)
        self.dropout = dropout
        self.pairwise = pairwise

    def __call__(self, x: Float[Array, "... I"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "... O"]:
        """Apply to the last axis; dropout only with `rngs`."""
        x = dropout(gelu(self._apply(self.fc1, x)), self.dropout, rngs)
        if self.norm is not None:
            x = self.norm(x)
        return dropout(self._apply(self.fc2, x), self.dropout, rngs)

    def _apply(self, layer: nnx.Linear, x: Array) -> Array:
        return pairwise_linear(layer, x) if self.pairwise else layer(x)
