"""Mamba-1 block and its bidirectional form (model specification 3.1, 3.2; Mamba, arXiv 2312.00752, figure 3).

    x, z   = split(in_proj(u))
    x      = silu(causal depthwise conv1d(x) + bias)
    dt,B,C = split(x_proj(x));  delta = softplus(dt_proj(dt))
    out    = out_proj(selective_scan(x, delta, -exp(A_log), B, C, D) * silu(z))

The reverse direction needs no flips: an anti-causal convolution and a scan that runs backwards give the same numbers.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.layers import Dtypes, linear, uniform_fan_in
from lumamba_jax.scan import ScanImplementation, ScanInputs, bidirectional_scan, selective_scan

Bidirectional = Literal["add", "ew_multiply", "none"]
Stages = dict[str, Array]


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of one Mamba block of width `d_model`; `dt_rank` 0 means ceil(d_model / 16)."""

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0
    scan_implementation: ScanImplementation = "auto"

    def __post_init__(self):
        if self.dt_rank == 0:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))

    @property
    def d_inner(self) -> int:
        """Inner width D."""
        return self.expand * self.d_model


def _a_log_init(_key, shape, dtype) -> Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def _dt_bias_init(key, shape, dtype) -> Array:
    # softplus^-1 of a step size that is log-uniform in [1e-3, 0.1], floored at 1e-4.
    low, high = math.log(1e-3), math.log(0.1)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype) * (high - low) + low), 1e-4)
    return step + jnp.log(-jnp.expm1(-step))


class MambaCarry(NamedTuple):
    """What one part of a sequence hands to the next in the direction of the scan.

    Attributes:
        inputs: `(B, K-1, D)`, the last inputs of the convolution.
        state: `(B, D, N)`, the state of the scan; float32 or better.
    """

    inputs: Array
    state: Array


class MambaBlock(nnx.Module):
    """One direction of a Mamba-1 block: `(B, S, M) -> (B, S, M)`, no norm, no residual."""

    def __init__(self, config: MambaConfig, *, dtypes: Dtypes, rngs: nnx.Rngs):
        inner, rank = config.d_inner, config.dt_rank
        self.config = config
        self.in_proj = linear(config.d_model, 2 * inner, bias=False, init="torch", dtypes=dtypes, rngs=rngs)
        conv_init = uniform_fan_in(config.d_conv)
        self.conv_kernel = nnx.Param(conv_init(rngs.params(), (config.d_conv, inner), dtypes.params))
        self.conv_bias = nnx.Param(conv_init(rngs.params(), (inner,), dtypes.params))
        self.x_proj = linear(inner, rank + 2 * config.d_state, bias=False, init="torch", dtypes=dtypes, rngs=rngs)
        self.dt_proj = linear(rank, inner, bias=False, dtypes=dtypes, rngs=rngs)
        self.dt_proj.kernel[...] = uniform_fan_in(rank)(rngs.params(), (rank, inner), dtypes.params)
        self.dt_bias = nnx.Param(_dt_bias_init(rngs.params(), (inner,), dtypes.params))
        self.A_log = nnx.Param(_a_log_init(None, (inner, config.d_state), dtypes.params))
        self.D = nnx.Param(jnp.ones((inner,), dtypes.params))
        self.out_proj = linear(inner, config.d_model, bias=False, init="torch", dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        u: Float[Array, "B S M"],
        *,
        valid: Bool[Array, "B S"] | None = None,
        reverse: bool = False,
        stages: Stages | None = None,
    ) -> Float[Array, "B S M"]:
        """Run over axis 1, backwards with `reverse`; `valid` False marks padding, which leaves no trace elsewhere."""
        return self.advance(u, None, valid=valid, reverse=reverse, stages=stages)[0]

    def advance(
        self,
        u: Float[Array, "B S M"],
        carry: MambaCarry | None,
        *,
        valid: Bool[Array, "B S"] | None = None,
        reverse: bool = False,
        stages: Stages | None = None,
    ) -> tuple[Float[Array, "B S M"], MambaCarry]:
        """The same over one part of a longer sequence: takes the carry of the part before (after it, with `reverse`)
        and returns that for the next; None begins the sequence. Parts are at least d_conv - 1 long."""
        inputs, halo = self.prepare(u, carry, valid=valid, reverse=reverse, stages=stages)
        y, last_state = selective_scan(
            **inputs._asdict(),
            delta_softplus=True,
            valid=valid,
            h0=None if carry is None else carry.state,
            reverse=reverse,
            implementation=self.config.scan_implementation,
        )
        if stages is not None:
            stages.update(scan_out=y, last_state=last_state)
        return self.out_proj(y), MambaCarry(halo, last_state)

    def beginning(self, batch: int) -> MambaCarry:
        """The carry before a sequence's first part: zeros."""
        config = self.config
        inputs = jnp.zeros((batch, config.d_conv - 1, config.d_inner), self.in_proj.dtype)
        state_dtype = jnp.promote_types(inputs.dtype, jnp.float32)
        return MambaCarry(inputs, jnp.zeros((batch, config.d_inner, config.d_state), state_dtype))

    def prepare(
        self,
        u: Float[Array, "B S M"],
        carry: MambaCarry | None = None,
        *,
        valid: Bool[Array, "B S"] | None = None,
        reverse: bool = False,
        stages: Stages | None = None,
    ) -> tuple[ScanInputs, Float[Array, "B H D"]]:
        """Everything before the scan (its softplus included in it), and the convolution's inputs for the next part."""
        config = self.config
        x, z = jnp.split(self.in_proj(u), 2, axis=-1)  # (B, S, D) each
        if valid is not None:
            x = jnp.where(valid[:, :, None], x, 0)  # the convolution must see zeros beyond the sequence's end
        size = config.d_conv - 1
        before = jnp.zeros((x.shape[0], size, x.shape[2]), x.dtype) if carry is None else carry.inputs
        halo = x[:, :size] if reverse else x[:, x.shape[1] - size :]
        x = jax.nn.silu(_depthwise_conv(x, before, self.conv_kernel[...], self.conv_bias[...], reverse=reverse))
        projected = self.x_proj(x)
        dt, B, C = jnp.split(projected, [config.dt_rank, config.dt_rank + config.d_state], axis=-1)
        delta = self.dt_proj(dt)  # (B, S, D), before bias and softplus
        A = -jnp.exp(self.A_log[...].astype(jnp.promote_types(self.A_log[...].dtype, jnp.float32)))
        if stages is not None:
            stages.update(conv_act=x, x_dbl=projected, dt_raw=delta)
        return ScanInputs(x, delta, A, B, C, self.D[...], z, self.dt_bias[...]), halo


def _depthwise_conv(
    x: Float[Array, "B S D"],
    before: Float[Array, "B H D"],
    kernel: Float[Array, "K D"],
    bias: Float[Array, " D"],
    *,
    reverse: bool,
) -> Float[Array, "B S D"]:
    """y_t = bias + sum_j kernel[j] x_{t-(K-1)+j}, with the signs of time swapped for `reverse`.

    `before` are the H = K-1 inputs next to the first one taken.
    """
    width, length = kernel.shape[0], x.shape[1]
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    padded = jnp.concatenate([x, before] if reverse else [before, x], axis=1)
    shifts = [width - 1 - j if reverse else j for j in range(width)]
    return bias[None, None, :] + sum(
        kernel[j][None, None, :] * jax.lax.slice_in_dim(padded, shift, shift + length, axis=1)
        for j, shift in enumerate(shifts)
    )


class BiMamba(nnx.Module):
    """`fwd(u) + rev(u)` ("add"), their element-wise product ("ew_multiply"), or fwd alone ("none")."""

    def __init__(self, config: MambaConfig, strategy: Bidirectional, *, dtypes: Dtypes, rngs: nnx.Rngs):
        if strategy not in get_args(Bidirectional):
            raise ValueError(f"bidirectional {strategy!r} is unknown: choose one of {get_args(Bidirectional)}")
        self.strategy: Bidirectional = strategy
        self.fwd = MambaBlock(config, dtypes=dtypes, rngs=rngs)
        self.rev = None if strategy == "none" else MambaBlock(config, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        u: Float[Array, "B S M"],
        *,
        valid: Bool[Array, "B S"] | None = None,
        stages: Stages | None = None,
        prefix: str = "",
    ) -> Float[Array, "B S M"]:
        """Stages `<prefix>mamba_fwd`, `<prefix>mamba_rev_raw` (in reversed time) and `<prefix>mamba_out`."""
        if self.rev is None:
            out = forward = self.fwd(u, valid=valid)
        else:
            ahead, _ = self.fwd.prepare(u, valid=valid)
            behind, _ = self.rev.prepare(u, valid=valid, reverse=True)
            implementation = self.fwd.config.scan_implementation
            scanned = bidirectional_scan(ahead, behind, delta_softplus=True, valid=valid, implementation=implementation)
            forward, backward = self.fwd.out_proj(scanned[0]), self.rev.out_proj(scanned[1])
            out = join(self.strategy, forward, backward)
            if stages is not None:
                stages[f"{prefix}mamba_rev_raw"] = jnp.flip(backward, axis=1)
        if stages is not None:
            stages[f"{prefix}mamba_fwd"] = forward
            stages[f"{prefix}mamba_out"] = out
        return out


def join(
    strategy: Bidirectional, forward: Float[Array, "B S M"], backward: Float[Array, "B S M"]
) -> Float[Array, "B S M"]:
    """The outputs of both directions as one."""
    return forward + backward if strategy == "add" else forward * backward
