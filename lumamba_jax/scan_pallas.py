"""The selective scan as one fused kernel: discretise, scan, contract with C, skip and gate, forward and backward.

The contract and the formulas are those of `lumamba_jax.scan`; here the state is `(N, D)`: states on sublanes, channels on
lanes. Nothing of size `B L D N` reaches main memory: the forward pass leaves one state per tile of `L` behind (only when
a gradient is wanted), the backward pass recomputes the states of a tile from it in on-chip memory.

Gradients, with `a_t = exp(d_t A)`, `d_t` the step after bias and softplus, `o_t = C_t . h_t + D u_t` and `y_t = o_t silu(z_t)`:

    p_t    = gy_t silu(z_t)                               dz_t = gy_t o_t silu'(z_t)
    g_t    = C_t p_t + a_{t+1} g_{t+1}                    (dL/dh_t; begins with the gradient of h_last)
    dC_t   = sum_d h_t p_t        dB_t = sum_d g_t d_t u_t        s_t = sum_n g_t B_t        e_t = a_t g_t h_{t-1}
    du_t   = s_t d_t + D p_t      dd_t = s_t u_t + sum_n e_t A    dA   = sum_t e_t d_t       dh0 = a_1 g_1

Two kernels share this: one for TPU (Mosaic) and one for GPU (Triton). The TPU kernel is compiled ahead of time for v4,
v5e, v5p and v6e by `benchmarks/scan_tpu_cost.py`; neither kernel has run on a device yet, both run in interpret mode.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128  # of a vector register, and of the time axis of B and C, which lies on lanes
SUBLANES = 8
MAX_STATE_TILE = 8192  # N x channels of one tile: the states of 128 steps then take 4 MB of VMEM in the backward pass


@dataclass(frozen=True)
class _Plan:
    """What a kernel knows when it is compiled. The leading axis of all operands counts directions."""

    backwards: tuple[bool, ...]  # per direction: the recurrence runs from the last step to the first
    softplus: bool
    gated: bool
    length: int
    tile: int  # steps per grid step
    rows: int  # steps unrolled: the rows of one register tile
    lanes: int  # channels per grid step
    interpret: bool

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.tile)


# ---- what both passes do inside a tile ----------------------------------------------------------------------------


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


class _Rows:
    """`plan.rows` consecutive steps of a tile in float32; steps beyond the sequence's end are zeros.

    A ragged last block holds whatever lay in memory, so it is replaced before anything is computed from it.
    """

    def __init__(self, plan: _Plan, tile_index, row_index, lanes: int):
        self.at = pl.ds(pl.multiple_of(row_index * plan.rows, plan.rows), plan.rows)
        self.row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, lanes), 0)
        first = tile_index * plan.tile + row_index * plan.rows
        self.valid = None if plan.length % plan.tile == 0 else self.row < plan.length - first

    def load(self, ref) -> Array:
        return self.masked(ref[self.at, :].astype(jnp.float32))

    def masked(self, x: Array) -> Array:
        return x if self.valid is None else jnp.where(self.valid, x, 0.0)

    def put(self, rows: Array, index: int, row: Array) -> Array:
        return jnp.where(self.row == index, row, rows)


def _columns(ref, row_index, plan: _Plan) -> Array:
    """(2N, 128) whose first `plan.rows` lanes are B (upper half) and C of these steps.

    Lanes can be picked at constant places only, hence the rotation."""
    shift = jax.lax.rem(LANES - row_index * plan.rows, LANES)
    return pltpu.roll(ref[...].astype(jnp.float32), shift, 1)


def _tile_of(plan: _Plan, step, backwards: bool):
    return plan.tiles - 1 - step if backwards else step


# ---- forward ------------------------------------------------------------------------------------------------------


def _forward_tile(plan: _Plan, backwards: bool, inputs, h, y_ref, tile_index):
    """Run one tile from state h (N, lanes), write its outputs, return the state after it."""
    u_ref, delta_ref, *z_ref, bc_ref, A_ref, skip_ref, bias_ref = inputs
    A, states = A_ref[...], A_ref.shape[0]
    groups = plan.tile // plan.rows

    def group(i, h):
        row_index = groups - 1 - i if backwards else i
        rows = _Rows(plan, tile_index, row_index, A.shape[1])
        u, d = rows.load(u_ref), rows.load(delta_ref) + bias_ref[...]
        d = rows.masked(_softplus(d) if plan.softplus else d)
        driven, bc = d * u, _columns(bc_ref, row_index, plan)
        y = jnp.zeros_like(u)
        for r in reversed(range(plan.rows)) if backwards else range(plan.rows):
            h = jnp.exp(d[r : r + 1] * A) * h + driven[r : r + 1] * bc[:states, r : r + 1]
            y = rows.put(y, r, jnp.sum(h * bc[states:, r : r + 1], axis=0, keepdims=True))
        y = y + skip_ref[...] * u
        if plan.gated:
            z = rows.load(z_ref[0])
            y = y * (z * jax.nn.sigmoid(z))
        y_ref[rows.at, :] = y.astype(y_ref.dtype)
        return h

    return jax.lax.fori_loop(0, groups, group, h)


def _forward_kernel(plan: _Plan, *refs):
    count = 7 + plan.gated
    inputs, h0_ref, y_ref, h_ref, *starts = *[refs[: count - 1]], *refs[count - 1 :]
    direction, step = pl.program_id(0), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        h_ref[...] = h0_ref[...]

    for start_ref in starts:
        start_ref[...] = h_ref[...]
    for k, backwards in enumerate(plan.backwards):

        @pl.when(direction == k)
        def _(backwards=backwards):
            tile_index = _tile_of(plan, step, backwards)
            h_ref[...] = _forward_tile(plan, backwards, inputs, h_ref[...], y_ref, tile_index)


# ---- backward -----------------------------------------------------------------------------------------------------


def _recompute_tile(plan: _Plan, backwards: bool, inputs, gy_ref, dz_ref, h, states_ref, tile_index):
    """Fill states_ref (tile + 1, N, lanes) with the states of a tile in order of time, h the first; write dz."""
    u_ref, delta_ref, *z_ref, bc_ref, A_ref, skip_ref, bias_ref = inputs
    A, states = A_ref[...], A_ref.shape[0]
    groups = plan.tile // plan.rows
    states_ref[0] = h

    def group(i, h):
        row_index = groups - 1 - i if backwards else i
        rows = _Rows(plan, tile_index, row_index, A.shape[1])
        u, d = rows.load(u_ref), rows.load(delta_ref) + bias_ref[...]
        d = rows.masked(_softplus(d) if plan.softplus else d)
        driven, bc = d * u, _columns(bc_ref, row_index, plan)
        y = jnp.zeros_like(u)
        for j in range(plan.rows):
            r = plan.rows - 1 - j if backwards else j
            h = jnp.exp(d[r : r + 1] * A) * h + driven[r : r + 1] * bc[:states, r : r + 1]
            states_ref[i * plan.rows + j + 1] = h
            if plan.gated:
                y = rows.put(y, r, jnp.sum(h * bc[states:, r : r + 1], axis=0, keepdims=True))
        if plan.gated:
            z, gy = rows.load(z_ref[0]), rows.load(gy_ref)
            s = jax.nn.sigmoid(z)
            dz = gy * (y + skip_ref[...] * u) * s * (1 + z * (1 - s))
            dz_ref[0][rows.at, :] = dz.astype(dz_ref[0].dtype)
        return h

    jax.lax.fori_loop(0, groups, group, h)


def _backward_tile(plan: _Plan, backwards: bool, inputs, gy_ref, outputs, g, states_ref, tile_index):
    """Take a tile's steps against the order of time; g (N, lanes) is the gradient of the state after it.

    Returns the gradient of the state before the tile; adds to dA, dskip, dbias and writes the rest."""
    u_ref, delta_ref, *z_ref, bc_ref, A_ref, skip_ref, bias_ref = inputs
    du_ref, ddelta_ref, *_, dbc_ref, dA_ref, dskip_ref, dbias_ref = outputs
    A, states = A_ref[...], A_ref.shape[0]
    groups = plan.tile // plan.rows
    lane = jax.lax.broadcasted_iota(jnp.int32, (states, LANES), 1)

    def group(i, carry):
        g, dA, dB, dC, dskip, dbias = carry
        i = groups - 1 - i
        row_index = groups - 1 - i if backwards else i
        rows = _Rows(plan, tile_index, row_index, A.shape[1])
        u, raw = rows.load(u_ref), rows.load(delta_ref) + bias_ref[...]
        d = rows.masked(_softplus(raw) if plan.softplus else raw)
        p = rows.load(gy_ref)
        if plan.gated:
            z = rows.load(z_ref[0])
            p = p * (z * jax.nn.sigmoid(z))
        driven, bc = d * u, _columns(bc_ref, row_index, plan)
        ddriven, dd = jnp.zeros_like(u), jnp.zeros_like(u)
        h = states_ref[(i + 1) * plan.rows]
        for j in reversed(range(plan.rows)):
            r = plan.rows - 1 - j if backwards else j
            here = lane == row_index * plan.rows + r
            before = states_ref[i * plan.rows + j]
            g = g + bc[states:, r : r + 1] * p[r : r + 1]
            dC = jnp.where(here, jnp.sum(h * p[r : r + 1], axis=1, keepdims=True), dC)
            dB = jnp.where(here, jnp.sum(g * driven[r : r + 1], axis=1, keepdims=True), dB)
            ddriven = rows.put(ddriven, r, jnp.sum(g * bc[:states, r : r + 1], axis=0, keepdims=True))
            g = g * jnp.exp(d[r : r + 1] * A)
            e = g * before
            dA = dA + e * d[r : r + 1]
            dd = rows.put(dd, r, jnp.sum(e * A, axis=0, keepdims=True))
            h = before
        du = ddriven * d + skip_ref[...] * p
        dd = rows.masked((dd + ddriven * u) * (jax.nn.sigmoid(raw) if plan.softplus else 1.0))
        du_ref[rows.at, :] = du.astype(du_ref.dtype)
        ddelta_ref[rows.at, :] = dd.astype(ddelta_ref.dtype)
        dskip = dskip + jnp.sum(p * u, axis=0, keepdims=True)
        dbias = dbias + jnp.sum(dd, axis=0, keepdims=True)
        return g, dA, dB, dC, dskip, dbias

    column = jnp.zeros((states, LANES), jnp.float32)
    carry = (g, dA_ref[...], column, column, dskip_ref[...], dbias_ref[...])
    g, dA_ref[...], dB, dC, dskip_ref[...], dbias_ref[...] = jax.lax.fori_loop(0, groups, group, carry)
    dbc_ref[:states, :] = dB
    dbc_ref[states:, :] = dC
    return g


def _backward_kernel(plan: _Plan, *refs):
    count = 6 + plan.gated
    inputs, (start_ref, gy_ref, gh_ref), outputs = refs[:count], refs[count : count + 3], refs[count + 3 : -1]
    *outputs, dh_ref = outputs
    states_ref = refs[-1]
    direction, batch, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        dh_ref[...] = gh_ref[...]

    @pl.when((step == 0) & (batch == 0))
    def _():
        for ref in outputs[-3:]:
            ref[...] = jnp.zeros_like(ref)

    for k, backwards in enumerate(plan.backwards):

        @pl.when(direction == k)
        def _(backwards=backwards):
            tile_index = _tile_of(plan, step, not backwards)
            dz_ref = outputs[2:3] if plan.gated else ()
            _recompute_tile(plan, backwards, inputs, gy_ref, dz_ref, start_ref[...], states_ref, tile_index)
            dh_ref[...] = _backward_tile(plan, backwards, inputs, gy_ref, outputs, dh_ref[...], states_ref, tile_index)


# ---- the calls ----------------------------------------------------------------------------------------------------


class _Specs:
    """Blocks of every operand over the grid (direction, channel tile, batch row, time tile)."""

    def __init__(self, plan: _Plan, states: int, *, against_time: bool):
        def tile(g, step):
            order = [backwards != against_time for backwards in plan.backwards]
            if len(order) == 1:
                return _tile_of(plan, step, order[0])
            return jax.lax.select(g == 0, _tile_of(plan, step, order[0]), _tile_of(plan, step, order[1]))

        def spec(shape, place):
            return pl.BlockSpec(shape, lambda g, d, b, step: place(g, d, b, tile(g, step)))

        N, T, W = states, plan.tile, plan.lanes
        self.steps = spec((None, None, T, W), lambda g, d, b, t: (g, b, t, d))  # (G, B, L, D)
        self.columns = spec((None, None, 2 * N, LANES), lambda g, d, b, t: (g, b, 0, t))  # (G, B, 2N, L)
        self.partial_columns = spec((None, None, None, 2 * N, LANES), lambda g, d, b, t: (g, d, b, 0, t))
        self.matrix = spec((None, N, W), lambda g, d, b, t: (g, 0, d))  # (G, N, D)
        self.vector = spec((None, 1, W), lambda g, d, b, t: (g, 0, d))  # (G, 1, D)
        self.state = spec((None, None, N, W), lambda g, d, b, t: (g, b, 0, d))  # (G, B, N, D)
        self.starts = spec((None, None, None, N, W), lambda g, d, b, t: (g, b, t, 0, d))  # (G, B, tiles, N, D)


def _grid(plan: _Plan, u: Array) -> tuple[int, int, int, int]:
    return u.shape[0], u.shape[3] // plan.lanes, u.shape[1], plan.tiles


def _shape(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _tpu_forward(plan: _Plan, u, delta, z, bc, A, skip, bias, h0, *, save: bool):
    G, batch, length, width = u.shape
    N = A.shape[1]
    specs = _Specs(plan, N, against_time=False)
    gate = [z] if plan.gated else []
    out_shape = [_shape(*u.shape, dtype=u.dtype), _shape(G, batch, N, width)]
    out_specs = [specs.steps, specs.state]
    if save:
        out_shape.append(_shape(G, batch, plan.tiles, N, width))
        out_specs.append(specs.starts)
    return pl.pallas_call(
        partial(_forward_kernel, plan),
        grid=_grid(plan, u),
        in_specs=[specs.steps] * (2 + plan.gated)
        + [specs.columns, specs.matrix, specs.vector, specs.vector, specs.state],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=plan.interpret,
        name="selective_scan",
    )(u, delta, *gate, bc, A, skip, bias, h0)


def _tpu_backward(plan: _Plan, u, delta, z, bc, A, skip, bias, starts, gy, gh):
    G, batch, length, width = u.shape
    N = A.shape[1]
    specs = _Specs(plan, N, against_time=True)
    gate = [z] if plan.gated else []
    grid = _grid(plan, u)
    step_shapes = [_shape(*x.shape, dtype=x.dtype) for x in (u, delta, *gate)]
    columns = _shape(G, grid[1], batch, *bc.shape[2:])
    du, ddelta, *dz, dbc, dA, dskip, dbias, dh0 = pl.pallas_call(
        partial(_backward_kernel, plan),
        grid=grid,
        in_specs=[specs.steps] * (2 + plan.gated)
        + [specs.columns, specs.matrix, specs.vector, specs.vector]
        + [specs.starts, specs.steps, specs.state],
        out_specs=[specs.steps] * (2 + plan.gated)
        + [specs.partial_columns, specs.matrix, specs.vector, specs.vector, specs.state],
        out_shape=[
            *step_shapes,
            columns,
            _shape(*A.shape),
            _shape(*skip.shape),
            _shape(*bias.shape),
            _shape(*gh.shape),
        ],
        scratch_shapes=[pltpu.VMEM((plan.tile + 1, N, plan.lanes), jnp.float32)],
        # Rows of the batch add to the same dA, so they follow each other; channel tiles and directions do not meet.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=plan.interpret,
        name="selective_scan_backward",
    )(u, delta, *gate, bc, A, skip, bias, starts, gy, gh)
    dz = dz[0] if plan.gated else None
    return du, ddelta, dz, dbc.sum(1).astype(bc.dtype), dA, dskip, dbias, dh0


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: _Plan, u, delta, z, bc, A, skip, bias, h0):
    y, h_last = _tpu_forward(plan, u, delta, z, bc, A, skip, bias, h0, save=False)
    return y, h_last


def _scan_fwd(plan: _Plan, u, delta, z, bc, A, skip, bias, h0):
    y, h_last, starts = _tpu_forward(plan, u, delta, z, bc, A, skip, bias, h0, save=True)
    return (y, h_last), (u, delta, z, bc, A, skip, bias, starts)


def _scan_bwd(plan: _Plan, residuals, cotangents):
    return _tpu_backward(plan, *residuals, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


# ---- the public function ------------------------------------------------------------------------------------------


def _round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, size - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return x if size == x.shape[axis] else jnp.pad(x, widths)


def _channel_tile(width: int, states: int) -> int:
    tiles = [w for w in range(LANES, width + 1, LANES) if width % w == 0 and w * states <= MAX_STATE_TILE]
    return max(tiles, default=LANES)


Backend = Literal["auto", "tpu", "gpu"]


def pallas_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "N D"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    h0: Float[Array, "B N D"],
    *,
    D: Float[Array, " D"] | None = None,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: Backend = "auto",
    interpret: bool | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B N D"]]:
    """Run the recurrence over axis 1 in one kernel; differentiable in every array.

    A step is padding, and leaves the state as it is, where delta is 0 without softplus, or -1e9 with it.

    Args:
        u: input of the recurrence, float32 or bfloat16; delta, z, B and C may differ from it in dtype.
        delta: step sizes before bias and softplus.
        A: state matrix, negative for a stable recurrence.
        B: input projection per step.
        C: output projection per step.
        h0: state before the first step (before the last one with `reverse`).
        D: skip weight; None leaves the skip out.
        z: gate; None leaves the gate out.
        delta_bias: added to `delta` before the softplus.
        delta_softplus: pass `delta + delta_bias` through a softplus.
        reverse: run from the last step to the first; outputs stay in the order of the inputs.
        backend: the kernel for `tpu` (Mosaic) or `gpu` (Triton); `auto` asks JAX's default backend, a CPU gets `tpu`.
        interpret: evaluate the kernel with ordinary XLA operations (for tests, slow); None means so on a CPU only.

    Returns:
        `(y, h_last)`: y `(B, L, D)` in u's dtype and the state after the last step taken, `(B, N, D)` float32.

    Raises:
        ValueError: unknown backend, float64 input, L = 0, or shapes that do not fit together.
    """
    operands = [None if x is None else x[None] for x in (u, delta, A, B, C, h0, D, z, delta_bias)]
    y, h_last = _run(*operands, delta_softplus, (reverse,), backend, interpret)
    return y[0], h_last[0]


def _run(u, delta, A, B, C, h0, skip, z, bias, softplus, backwards, backend, interpret):
    """All operands with the leading axis of directions: bring them to the kernel's sizes and back."""
    G, _, length, width = u.shape
    states, channels = _round_up(A.shape[1], SUBLANES), _round_up(width, LANES)
    rows = SUBLANES * max(4 // x.dtype.itemsize for x in (u, delta, z) if x is not None)
    plan = _Plan(
        backwards=backwards,
        softplus=softplus,
        gated=z is not None,
        length=length,
        tile=min(LANES, _round_up(length, rows)),
        rows=rows,
        lanes=_channel_tile(channels, states),
        interpret=jax.default_backend() == "cpu" if interpret is None else interpret,
    )

    def vector(x):
        return jnp.zeros((G, 1, channels)) if x is None else _pad(x.astype(jnp.float32), -1, channels)[:, None]

    def matrix(x):
        return _pad(_pad(x.astype(jnp.float32), -1, channels), -2, states)

    u, delta, z = (None if x is None else _pad(x, -1, channels) for x in (u, delta, z))
    # Time on lanes: a row of N values would occupy a row of 128 in memory.
    bc = jnp.concatenate([_pad(B, -1, states), _pad(C, -1, states)], axis=-1).swapaxes(-1, -2)
    bc = _pad(bc, -1, _round_up(length, LANES))
    y, h_last = _scan(plan, u, delta, z, bc, matrix(A), vector(skip), vector(bias), matrix(h0))
    return y[..., :width], h_last[..., : A.shape[1], :width]
