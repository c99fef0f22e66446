"""The selective scan of Mamba-1: one contract, several implementations.

    delta'_t = softplus(delta_t + delta_bias)                    (softplus and bias optional; 0 where padded)
    h_t      = exp(delta'_t A) * h_{t-1} + (delta'_t u_t) B_t    h (D, N)
    y_t      = sum_n h_t[:, n] C_t[n] + D u_t                    then * silu(z_t) when a gate is given

(Mamba, arXiv 2312.00752, eq. 2a-2b with the discretisation of section 3.3, Euler for B as in its implementation.)
The recurrence is associative in pairs `(a, b)`: `(a1, b1) . (a2, b2) = (a1 a2, a2 b1 + b2)`.

State and sums are float32 whatever the inputs' dtype (float64 when they are float64). Inside, the state is (N, D) with
D along the vector lanes. The figures behind the choices made here are in `docs/performance.md`.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ScanImplementation = Literal["auto", "associative", "sequential", "chunked", "pallas"]

# Steps between two saved states of `chunked`: a chunk's decays and states (2 x 49 KB per step at D = 768, N = 16) stay
# in cache, and the saved states cost 3 KB per step.
_CHUNK = 16
# From this size on XLA's CPU backend splits a step over threads anyway, and a polynomial for the decay is 1.4 times
# faster than its exp. Below it the polynomial would make XLA split steps of a few microseconds, which costs more.
_LARGE_STEP = 65536
# On a GPU one associative scan up to this length; beyond it chunks of this length, so that memory does not grow with L.
_ASSOCIATIVE_LENGTH = 512


class ScanInputs(NamedTuple):
    """What one direction of a block feeds to the scan; meanings and shapes as in `selective_scan`."""

    u: Float[Array, "B L D"]
    delta: Float[Array, "B L D"]
    A: Float[Array, "D N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " D"] | None = None
    z: Float[Array, "B L D"] | None = None
    delta_bias: Float[Array, " D"] | None = None


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
        implementation: `sequential` (`jax.lax.scan`; derivatives of any order and mode), `associative` (one
            `jax.lax.associative_scan`, parallel over L, `O(B L D N)` memory), `chunked` (sequential and in place; its
            gradient recomputes the states chunk by chunk from one saved state per chunk), `pallas` (one fused kernel on
            TPU and GPU; interpreted, so slow, on a CPU) or `auto`: `chunked` on a CPU, `pallas` on a TPU, on a GPU
            `associative` in chunks that are recomputed in the gradient. `auto` is resolved when the program is lowered,
            so one that is lowered on a CPU host for a TPU gets the TPU's kernel. `chunked`, `pallas` and `auto` have
            reverse-mode first derivatives only.

    Returns:
        `(y, h_last)`: y `(B, L, D)` in u's dtype; the state after the last step taken, float32 (float64 for float64).

    Raises:
        ValueError: unknown implementation, L = 0, or shapes that do not fit together.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    _check(inputs, implementation)
    h0 = _no_state(inputs) if h0 is None else jnp.asarray(h0, _state_dtype(inputs)).transpose(0, 2, 1)
    y, h_last = _RUN[implementation](inputs, valid, h0, delta_softplus=delta_softplus, reverse=reverse)
    return y, h_last.transpose(0, 2, 1)


def bidirectional_scan(
    forward: ScanInputs,
    backward: ScanInputs,
    *,
    delta_softplus: bool = False,
    valid: Bool[Array, "B L"] | None = None,
    implementation: ScanImplementation = "auto",
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Both directions of a bidirectional block: `forward` from the first step to the last, `backward` the other way.

    Both are given, and both outputs `(y_forward, y_backward)` are returned, in the order of time. Arguments and errors
    otherwise as in `selective_scan`. A kernel runs both in one launch where their shapes and dtypes agree; elsewhere
    they are two scans one after the other, on a CPU faster than one over a doubled batch.
    """
    for inputs in (forward, backward):
        _check(inputs, implementation)
    run = _both(_RUN[implementation])
    if _alike(forward, backward):
        run = {"pallas": _pallas_both, "auto": _auto_both}.get(implementation, run)
    return run(forward, backward, valid, delta_softplus=delta_softplus)


def _state_dtype(x: ScanInputs) -> jnp.dtype:
    return jnp.promote_types(x.u.dtype, jnp.float32)


def _no_state(x: ScanInputs) -> Array:
    width, states = x.A.shape
    return jnp.zeros((x.u.shape[0], states, width), _state_dtype(x))


def _check(x: ScanInputs, implementation: str) -> None:
    if implementation not in get_args(ScanImplementation):
        raise ValueError(
            f"scan implementation {implementation!r} is unknown: choose one of {get_args(ScanImplementation)}"
        )
    batch, length, width = x.u.shape
    states = x.A.shape[-1]
    expected = {"delta": (batch, length, width), "A": (width, states), "B": (batch, length, states)}
    expected["C"] = expected["B"]
    for name, shape in expected.items():
        if getattr(x, name).shape != shape:
            raise ValueError(
                f"selective_scan: {name} has shape {getattr(x, name).shape}, u {x.u.shape} asks for {shape}"
            )
    if length == 0:
        raise ValueError("selective_scan: the sequence is empty (L = 0); pass at least one step")


# ---- discretisation, skip and gate, around any of the cores -------------------------------------------------------


def _around(core):
    """`core`: u, delta (B, L, D), A (N, D), B, C (B, L, N), h0 (B, N, D), reverse -> y and the last state."""

    def run(x: ScanInputs, valid: Array | None, h0: Array, *, delta_softplus: bool, reverse: bool):
        u, delta, A, B, C = (jnp.asarray(v, h0.dtype) for v in x[:5])
        if x.delta_bias is not None:
            delta = delta + x.delta_bias.astype(h0.dtype)[None, None, :]
        if delta_softplus:
            delta = softplus(delta)
        if valid is not None:
            delta = jnp.where(valid[:, :, None], delta, 0)
        y, h_last = core(u, delta, A.T, B, C, h0, reverse=reverse)
        if x.D is not None:
            y = y + u * x.D.astype(h0.dtype)[None, None, :]
        if x.z is not None:
            y = y * jax.nn.silu(x.z.astype(h0.dtype))
        return y.astype(x.u.dtype), h_last

    return run


@jax.custom_jvp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(x)) to 3e-7 relative in float32, for any x, from functions that XLA's CPU backend vectorises.

    max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 atanh(e / (2 + e)) (Abramowitz and Stegun 4.6.22); the
    argument is at most 1/3, so eight terms of the series leave 2e-9. `jax.nn.softplus` calls a scalar log1p there and
    is several times slower; it serves the other dtypes.
    """
    if x.dtype != jnp.float32:
        return jax.nn.softplus(x)
    e = jnp.exp(-jnp.abs(x))
    twice = 2 * e / (2 + e)  # twice the argument: e / (2 + e) itself would be subnormal before e is
    square, series = twice * twice / 4, jnp.full_like(twice, 1 / 15)
    for n in range(13, 0, -2):
        series = series * square + 1 / n
    return jnp.maximum(x, 0) + twice * series


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


# ---- associative and sequential -----------------------------------------------------------------------------------


def _associative(u, delta, A, B, C, h0, *, reverse: bool):
    decay = jnp.exp(delta[:, :, None, :] * A[None, None])  # (B, L, N, D)
    drive = (delta * u)[:, :, None, :] * B[:, :, :, None]  # (B, L, N, D)
    first = -1 if reverse else 0
    drive = drive.at[:, first].add(decay[:, first] * h0)
    _, h = jax.lax.associative_scan(_compose, (decay, drive), reverse=reverse, axis=1)
    y = jnp.einsum("BLND,BLN->BLD", h, C, precision="highest")
    return y, h[:, 0 if reverse else -1]


def _compose(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    (a1, b1), (a2, b2) = left, right
    return a1 * a2, a2 * b1 + b2


def _associative_in_chunks(u, delta, A, B, C, h0, *, reverse: bool):
    """One associative scan per `_ASSOCIATIVE_LENGTH` steps; the gradient recomputes what is inside."""
    batch, length, _ = u.shape
    if length <= _ASSOCIATIVE_LENGTH:
        return jax.checkpoint(partial(_associative, reverse=reverse))(u, delta, A, B, C, h0)
    chunks = -(-length // _ASSOCIATIVE_LENGTH)
    missing = chunks * _ASSOCIATIVE_LENGTH - length  # steps of size zero leave the state as it is

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
        return x.reshape(batch, chunks, _ASSOCIATIVE_LENGTH, -1).swapaxes(0, 1)

    @jax.checkpoint
    def chunk(h, x):
        u, delta, B, C = x
        y, h = _associative(u, delta, A, B, C, h, reverse=reverse)
        return h, y

    h_last, y = jax.lax.scan(chunk, h0, tuple(split(x) for x in (u, delta, B, C)), reverse=reverse)
    return y.swapaxes(0, 1).reshape(batch, length + missing, -1)[:, :length], h_last


def _sequential(u, delta, A, B, C, h0, *, reverse: bool):
    def step(h, x):
        u_t, delta_t, B_t, C_t = x  # (B, D), (B, D), (B, N), (B, N)
        h = jnp.exp(delta_t[:, None, :] * A[None]) * h + (delta_t * u_t)[:, None, :] * B_t[:, :, None]
        return h, _sum_over_states(h, C_t)

    time_major = tuple(x.swapaxes(0, 1) for x in (u, delta, B, C))
    h_last, y = jax.lax.scan(step, h0, time_major, reverse=reverse)
    return y.swapaxes(0, 1), h_last


def _sum_over_states(h: Array, weights: Array) -> Array:
    # A dot: `(h * weights).sum(1)` becomes a strided scalar loop on a CPU, several times slower.
    return jnp.einsum("BND,BN->BD", h, weights, precision="highest")


# ---- chunked: in place, with a gradient that recomputes -----------------------------------------------------------


def _chunked(u, delta, A, B, C, h0, *, reverse: bool):
    return _recurrence(reverse, u, delta, A, B, C, h0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(reverse, u, delta, A, B, C, h0):
    y, h_last, _ = _run_steps(reverse, u, delta, A, B, C, h0, starts=None)
    return y, h_last


def _chunk_size(length: int) -> tuple[int, int]:
    """(number of chunks, steps per chunk); the last chunk may be shorter."""
    chunks = -(-length // _CHUNK)
    return chunks, -(-length // chunks)


def _recurrence_fwd(reverse, u, delta, A, B, C, h0):
    chunks, _ = _chunk_size(u.shape[1])
    y, h_last, starts = _run_steps(reverse, u, delta, A, B, C, h0, starts=jnp.zeros((chunks, *h0.shape), h0.dtype))
    return (y, h_last), (u, delta, A, B, C, starts)


def _run_steps(reverse, u, delta, A, B, C, h0, *, starts):
    """All steps with the whole batch in one; `starts` (K, B, N, D), unless None, receives the state before each chunk.

    Steps are read from and written to the arrays where they lie: a scan over time-major copies moves more memory than
    the recurrence itself.
    """
    length = u.shape[1]
    large = not isinstance(h0.size, int) or h0.size >= _LARGE_STEP  # a symbolic batch (jax.export) may be any

    def step(s, carry):
        h, y = carry
        t = length - 1 - s if reverse else s
        u_t, delta_t, B_t, C_t = (jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False) for x in (u, delta, B, C))
        h = _decay(delta_t, A, large=large) * h + (delta_t * u_t)[:, None, :] * B_t[:, :, None]
        return h, jax.lax.dynamic_update_index_in_dim(y, _sum_over_states(h, C_t), t, 1)

    if starts is None:
        h_last, y = jax.lax.fori_loop(0, length, step, (h0, jnp.zeros_like(u)))
        return y, h_last, None
    chunks, size = _chunk_size(length)

    def chunk(k, carry):
        h, y, starts = carry
        starts = jax.lax.dynamic_update_index_in_dim(starts, h, k, 0)
        return *jax.lax.fori_loop(k * size, jnp.minimum((k + 1) * size, length), step, (h, y)), starts

    h_last, y, starts = jax.lax.fori_loop(0, chunks, chunk, (h0, jnp.zeros_like(u), starts))
    return y, h_last, starts


def _recurrence_bwd(reverse, residuals, cotangents):
    """The gradient, with a_t = exp(delta_t A) and g_t the gradient of h_t (g_L begins with that of the last state):

        g_t   = C_t dy_t + a_{t+1} g_{t+1}        e_t = a_t g_t h_{t-1}       s_t = sum_n B_t g_t
        du_t  = delta_t s_t                       ddelta_t = u_t s_t + sum_n A e_t
        dB_t  = sum_d delta_t u_t g_t             dC_t = sum_d dy_t h_t       dA = sum_t delta_t e_t    dh_0 = a_1 g_1

    Row by row of the batch, so that one chunk's decays and states stay in a core's cache; chunk by chunk from the last
    one taken to the first.
    """
    u, delta, A, B, C, starts = residuals
    dy, dh = cotangents
    batch, length, _ = u.shape
    chunks, size = _chunk_size(length)

    def row(i, carry):
        dh, dA, steps, states = carry

        def chunk(k, carry):
            k = chunks - 1 - k
            view = _Chunk(i, k * size, jnp.minimum((k + 1) * size, length), size, length, reverse)
            h = jax.lax.dynamic_slice(starts, (k, i, 0, 0), (1, 1, *A.shape))[0, 0]
            return _chunk_gradient(view, u, delta, A, B, C, dy, h, carry)

        g = jax.lax.dynamic_index_in_dim(dh, i, 0, keepdims=False)
        g, dA, steps, states = jax.lax.fori_loop(0, chunks, chunk, (g, dA, steps, states))
        return jax.lax.dynamic_update_index_in_dim(dh, g, i, 0), dA, steps, states

    steps = tuple(jnp.zeros_like(x) for x in (u, delta, B, C))
    states = jnp.zeros((size, *A.shape), A.dtype)
    dh, dA, (du, ddelta, dB, dC), _ = jax.lax.fori_loop(0, batch, row, (dh, jnp.zeros_like(A), steps, states))
    return du, ddelta, dA, dB, dC, dh


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


class _Chunk(NamedTuple):
    """Steps `first` to `stop` (in the order in which they are taken) of one row of the batch."""

    row: Array
    first: Array
    stop: Array
    size: int
    length: int
    reverse: bool

    def time(self, s: Array) -> Array:
        return self.length - 1 - s if self.reverse else s

    def at(self, x: Array, s: Array) -> Array:
        return jax.lax.dynamic_slice(x, (self.row, self.time(s), 0), (1, 1, x.shape[2]))[0, 0]

    def put(self, x: Array, value: Array, s: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, value[None, None], (self.row, self.time(s), 0))

    def window(self, x: Array) -> tuple[Array, Array]:
        """`size` steps of x that hold this chunk (also the last one, which may be shorter), and where they begin."""
        begin = self.length - self.first - self.size if self.reverse else self.first
        begin = jnp.clip(begin, 0, self.length - self.size)
        return jax.lax.dynamic_slice(x, (self.row, begin, 0), (1, self.size, x.shape[2]))[0], begin


def _chunk_gradient(chunk: _Chunk, u, delta, A, B, C, dy, h, carry):
    """One chunk, forth and back; `carry`: g (N, D), dA, (du, ddelta, dB, dC), a buffer of states (size, N, D)."""
    window, begin = chunk.window(delta)
    decays = _decay(window, A, large=window.shape[0] * A.size >= _LARGE_STEP)  # (size, N, D): the only exp of the chunk

    def decay_at(s):
        return jax.lax.dynamic_index_in_dim(decays, chunk.time(s) - begin, 0, keepdims=False)

    def recompute(s, carry):
        h, states, dC = carry
        u_t, delta_t, B_t = (chunk.at(x, s) for x in (u, delta, B))
        states = jax.lax.dynamic_update_index_in_dim(states, h, s - chunk.first, 0)
        h = decay_at(s) * h + (delta_t * u_t)[None, :] * B_t[:, None]
        return h, states, chunk.put(dC, _dot(h, chunk.at(dy, s)), s)

    def step_back(n, carry):
        g, dA, du, ddelta, dB = carry
        s = chunk.stop - 1 - n
        u_t, delta_t, B_t, C_t, dy_t = (chunk.at(x, s) for x in (u, delta, B, C, dy))
        g = g + C_t[:, None] * dy_t[None, :]
        ds = _dot(B_t, g)
        dB = chunk.put(dB, _dot(g, delta_t * u_t), s)
        g = decay_at(s) * g
        before = jax.lax.dynamic_index_in_dim(states, s - chunk.first, 0, keepdims=False)
        dA = dA + g * before * delta_t[None, :]
        # Slices of `before` out of the buffer: a slice of the slice would make XLA write the products out first.
        parts = [g[n] * _state_row(states, s - chunk.first, n) * A[n] for n in range(A.shape[0])]
        return g, dA, chunk.put(du, ds * delta_t, s), chunk.put(ddelta, _tree_sum(parts) + ds * u_t, s), dB

    g, dA, (du, ddelta, dB, dC), states = carry
    _, states, dC = jax.lax.fori_loop(chunk.first, chunk.stop, recompute, (h, states, dC))
    back = (g, dA, du, ddelta, dB)
    g, dA, du, ddelta, dB = jax.lax.fori_loop(0, chunk.stop - chunk.first, step_back, back)
    return g, dA, (du, ddelta, dB, dC), states


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision="highest")


def _state_row(states: Array, index: Array, n: int) -> Array:
    return jax.lax.dynamic_slice(states, (index, n, 0), (1, 1, states.shape[2]))[0, 0]


def _tree_sum(parts: list[Array]) -> Array:
    """Pairwise: one vector loop over D on a CPU, where a reduction over N would be a strided scalar loop."""
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


# 2**f on [-1/2, 1/2], highest power first: least relative error, 1e-7 with the rounding of float32.
_EXP2 = (0.000153375775, 0.00133998599, 0.00961852, 0.0555032901, 0.240226462, 0.693147182, 1.0)


def _decay(delta: Float[Array, "K D"], A: Float[Array, "N D"], *, large: bool) -> Float[Array, "K N D"]:
    """exp(delta A). When `large`, in float32, as 2**(k + f): k goes into the exponent's bits, f into a polynomial.

    That form holds values between 2**-126 and 2**127; a decay is at most 1 and its effect below 1e-37 is none.
    """
    if not large or A.dtype != jnp.float32:
        return jnp.exp(delta[:, None, :] * A[None])
    x = jnp.clip(delta[:, None, :] * (A * np.float32(np.log2(np.e)))[None], -126, 127)
    k = jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    f, power = x - k, jnp.float32(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * f + jnp.float32(coefficient)
    # The low bits of 1.5 * 2**23 + k are the integer k.
    exponent = jax.lax.bitcast_convert_type(k + jnp.float32(1.5 * 2**23), jnp.int32) << 23
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(power, jnp.int32) + exponent, jnp.float32)


# ---- choice -------------------------------------------------------------------------------------------------------


def _pallas(x: ScanInputs, valid: Array | None, h0: Array, *, delta_softplus: bool, reverse: bool, **target):
    from lumamba_jax.scan_pallas import pallas_scan  # Pallas is imported only where a kernel is asked for

    operands, around = _kernel_operands(x, valid, h0, delta_softplus=delta_softplus)
    return pallas_scan(*operands, **around, delta_softplus=delta_softplus, reverse=reverse, **target)


def _kernel_operands(x: ScanInputs, valid: Array | None, h0: Array, *, delta_softplus: bool):
    u, delta, A, B, C, D, z, delta_bias = x
    if valid is not None:  # what bias and softplus turn into a step of size zero
        bias = 0 if delta_bias is None else delta_bias[None, None, :]
        delta = jnp.where(valid[:, :, None], delta, -1e9 if delta_softplus else -bias).astype(delta.dtype)
    return (u, delta, A.T, B, C, h0), {"D": D, "z": z, "delta_bias": delta_bias}


def _both(run):
    """The two directions one after the other."""

    def both(forward: ScanInputs, backward: ScanInputs, valid: Array | None, *, delta_softplus: bool):
        y_forward, _ = run(forward, valid, _no_state(forward), delta_softplus=delta_softplus, reverse=False)
        y_backward, _ = run(backward, valid, _no_state(backward), delta_softplus=delta_softplus, reverse=True)
        return y_forward, y_backward

    return both


def _alike(forward: ScanInputs, backward: ScanInputs) -> bool:
    def signature(x):
        return [None if v is None else (v.shape, v.dtype) for v in x]

    return signature(forward) == signature(backward)


def _pallas_both(forward: ScanInputs, backward: ScanInputs, valid: Array | None, *, delta_softplus: bool, **target):
    from lumamba_jax.scan_pallas import pallas_scan_bidirectional

    each = [_kernel_operands(x, valid, _no_state(x), delta_softplus=delta_softplus) for x in (forward, backward)]
    operands, around = jax.tree.map(lambda *pair: jnp.stack(pair), *each)
    y, _ = pallas_scan_bidirectional(*operands, **around, delta_softplus=delta_softplus, **target)
    return y[0], y[1]


# All branches of `auto` are traced, hence the two jits: once per shape and not once per call.
@partial(jax.jit, static_argnames=("delta_softplus", "reverse"))
def _auto(x: ScanInputs, valid: Array | None, h0: Array, *, delta_softplus: bool, reverse: bool):
    settings = {"delta_softplus": delta_softplus, "reverse": reverse}
    return _by_platform((x, valid, h0), _around(_chunked), _pallas, _around(_associative_in_chunks), **settings)


@partial(jax.jit, static_argnames="delta_softplus")
def _auto_both(forward: ScanInputs, backward: ScanInputs, valid: Array | None, *, delta_softplus: bool):
    cpu, other = (_both(_around(core)) for core in (_chunked, _associative_in_chunks))
    return _by_platform((forward, backward, valid), cpu, _pallas_both, other, delta_softplus=delta_softplus)


def _by_platform(operands, cpu, tpu, other, **settings):
    """The run for the platform that the program is lowered for.

    The kernel for TPU keeps a float32 state only, and its grid needs a batch that is a number (a symbol in `jax.export`
    is none).
    """
    branches = {"cpu": partial(cpu, **settings), "default": partial(other, **settings)}
    if _state_dtype(operands[0]) == jnp.float32 and isinstance(operands[0].u.shape[0], int):
        branches["tpu"] = partial(tpu, **settings, backend="tpu", interpret=False)
    return jax.lax.platform_dependent(*operands, **branches)


_RUN = {
    "auto": _auto,
    "associative": _around(_associative),
    "sequential": _around(_sequential),
    "chunked": _around(_chunked),
    "pallas": _pallas,
}


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
