"""The selective scan of Mamba-1: one contract, several implementations.

    delta'_t = softplus(delta_t + delta_bias)                    (softplus and bias optional; 0 where padded)
    h_t      = exp(delta'_t A) * h_{t-1} + (delta'_t u_t) B_t    h (D, N)
    y_t      = sum_n h_t[:, n] C_t[n] + D u_t                    then * silu(z_t) when a gate is given

(Mamba, arXiv 2312.00752, eq. 2a-2b with the discretisation of section 3.3, Euler for B as in its implementation.)
The recurrence is associative in pairs `(a, b)`: `(a1, b1) . (a2, b2) = (a1 a2, a2 b1 + b2)`.

State and sums are float32 whatever the inputs' dtype (float64 when they are float64).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ScanImplementation = Literal["auto", "associative", "sequential"]


def selective_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    *,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    valid: Bool[Array, "B L"] | None = None,
    h0: Float[Array, "B D N"] | None = None,
    reverse: bool = False,
    implementation: ScanImplementation = "auto",
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """Run the recurrence over axis 1.

    Args:
        u: input of the recurrence.
        delta: step sizes before bias and softplus.
        A: state matrix, negative for a stable recurrence.
        B: input projection per step.
        C: output projection per step.
        D: skip weight; None leaves the skip out.
        z: gate; None leaves the gate out.
        delta_bias: added to `delta` before the softplus.
        delta_softplus: pass `delta + delta_bias` through a softplus.
        valid: False marks padding: such a step leaves the state as it is (its own output is meaningless).
        h0: state before the first step (before the last one with `reverse`); zeros when None.
        reverse: run from the last step to the first; outputs stay in the order of the inputs.
        implementation: `associative` (one `jax.lax.associative_scan`, parallel over L, `O(B L D N)` memory),
            `sequential` (`jax.lax.scan`, the carry stays in cache) or `auto` (sequential on a CPU, else associative).

    Returns:
        `(y, h_last)`: y `(B, L, D)` in u's dtype; the state after the last step taken, float32 (float64 for float64).

    Raises:
        ValueError: unknown implementation, L = 0, or shapes that do not fit together.
    """
    _check_shapes(u, delta, A, B, C)
    if implementation not in get_args(ScanImplementation):
        raise ValueError(
            f"scan implementation {implementation!r} is unknown: choose one of {get_args(ScanImplementation)}"
        )
    state_dtype = jnp.promote_types(u.dtype, jnp.float32)
    u_, delta_, A_, B_, C_ = (jnp.asarray(x, state_dtype) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta_ = delta_ + delta_bias.astype(state_dtype)[None, None, :]
    if delta_softplus:
        delta_ = jax.nn.softplus(delta_)
    if valid is not None:
        delta_ = jnp.where(valid[:, :, None], delta_, 0)
    if h0 is None:
        h0 = jnp.zeros((u.shape[0], *A.shape), state_dtype)
    if implementation == "auto":
        implementation = "sequential" if jax.default_backend() == "cpu" else "associative"
    run = _associative if implementation == "associative" else _sequential
    y, h_last = run(u_, delta_, A_.T, B_, C_, jnp.asarray(h0, state_dtype).transpose(0, 2, 1), reverse=reverse)
    if D is not None:
        y = y + u_ * D.astype(state_dtype)[None, None, :]
    if z is not None:
        y = y * jax.nn.silu(z.astype(state_dtype))
    return y.astype(u.dtype), h_last.transpose(0, 2, 1)


def _check_shapes(u: Array, delta: Array, A: Array, B: Array, C: Array) -> None:
    batch, length, width = u.shape
    expected = {"delta": (batch, length, width), "A": (width, A.shape[-1]), "B": (batch, length, A.shape[-1])}
    expected["C"] = expected["B"]
    for name, array in (("delta", delta), ("A", A), ("B", B), ("C", C)):
        if array.shape != expected[name]:
            raise ValueError(f"selective_scan: {name} has shape {array.shape}, u {u.shape} asks for {expected[name]}")
    if length == 0:
        raise ValueError("selective_scan: the sequence is empty (L = 0); pass at least one step")


def _associative(u, delta, A, B, C, h0, *, reverse: bool):  # A (N, D), h0 (B, N, D)
    decay = jnp.exp(delta[:, :, None, :] * A[None, None])  # (B, L, N, D)
    drive = (delta * u)[:, :, None, :] * B[:, :, :, None]  # (B, L, N, D)
    first = -1 if reverse else 0
    drive = drive.at[:, first].add(decay[:, first] * h0)
    _, h = jax.lax.associative_scan(_compose, (decay, drive), reverse=reverse, axis=1)
    y = jnp.einsum("BLND,BLN->BLD", h, C)
    return y, h[:, 0 if reverse else -1]


def _compose(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    (a1, b1), (a2, b2) = left, right
    return a1 * a2, a2 * b1 + b2


def _sequential(u, delta, A, B, C, h0, *, reverse: bool):  # A (N, D), h0 (B, N, D)
    def step(h, inputs):
        u_t, delta_t, B_t, C_t = inputs  # (B, D), (B, D), (B, N), (B, N)
        h = jnp.exp(delta_t[:, None, :] * A[None]) * h + (delta_t * u_t)[:, None, :] * B_t[:, :, None]
        # A dot: written as `(h * C).sum(1)` XLA's CPU backend makes it a strided scalar loop, several times slower.
        return h, jnp.einsum("BND,BN->BD", h, C_t)

    time_major = tuple(x.swapaxes(0, 1) for x in (u, delta, B, C))
    h_last, y = jax.lax.scan(step, h0, time_major, reverse=reverse)
    return y.swapaxes(0, 1), h_last


def selective_scan_oracle(
    u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, h0: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The bare recurrence, step by step in NumPy float64: what the implementations are tested against.

    Shapes as in `selective_scan`; no skip, gate, softplus or bias. Returns `(y (B, L, D), h_last (B, D, N))`.
    """
    u, delta, A, B, C = (np.asarray(x, np.float64) for x in (u, delta, A, B, C))
    h = np.zeros((u.shape[0], *A.shape)) if h0 is None else np.asarray(h0, np.float64)
    y = np.empty(u.shape)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1)
    return y, h
