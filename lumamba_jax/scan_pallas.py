"""The selective scan as one fused kernel: discretise, scan, contract with C, skip and gate, forward and backward.

The contract and the formulas are those of `lumamba_jax.scan`; here the state is `(N, D)`: states on sublanes, channels
on lanes. Nothing of size `B L D N` reaches main memory: the forward pass leaves one state per tile of L behind (only
when a gradient is wanted), the backward pass recomputes the states of a tile from it on the chip.

Gradients, `d_t` being the step after bias and softplus, `a_t = exp(d_t A)`, `o_t = C_t . h_t + D u_t`,
`y_t = o_t silu(z_t)`:

    p_t  = gy_t silu(z_t)                 dz_t = gy_t o_t silu'(z_t)
    g_t  = C_t p_t + a_{t+1} g_{t+1}      (dL/dh_t; beyond the last step stands the gradient of h_last)
    dC_t = sum_d h_t p_t                  dB_t = sum_d g_t d_t u_t      s_t = sum_n g_t B_t      e_t = a_t g_t h_{t-1}
    du_t = s_t d_t + D p_t                dd_t = s_t u_t + sum_n e_t A  dA  = sum_t e_t d_t      dh0 = a_1 g_1

Two kernels share this, one for TPU (Mosaic) and one for GPU (Triton). Neither has run on a device yet: the TPU kernel
is compiled ahead of time for v4, v5e, v5p and v6e (`benchmarks/scan_tpu_cost.py`), the GPU kernel is lowered to Triton
IR, and the arithmetic of both is tested in interpret mode. Both walk along L step by step and are parallel over
directions, batch rows and channels; a single long recording fills a TPU core, but only part of a large GPU.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

Backend = Literal["auto", "tpu", "gpu"]

LANES = 128  # of a TPU register, and the steps of a TPU tile: time lies on lanes in B and C
SUBLANES = 8
TPU_SCRATCH_BYTES = 13_000_000  # of the 16 MB that a kernel gets on every generation; the compiler needs the rest
GPU_STEPS = 8  # per tile: its states stay in registers in the backward pass
GPU_CHANNELS = 64  # per program
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Plan:
    """What a kernel knows when it is compiled. The leading axis of every operand counts directions (G)."""

    backend: Literal["tpu", "gpu"]
    interpret: bool
    backwards: tuple[bool, ...]  # per direction: the recurrence runs from the last step to the first
    softplus: bool
    gated: bool
    carried: bool  # a state comes in from outside; otherwise the recurrence begins at zero
    length: int  # steps that count; an operand may be longer
    tile: int  # steps between two stored states
    rows: int  # steps per register tile (TPU)
    channels: int  # per program

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.tile)


class _Operands(NamedTuple):
    """What both passes read: references in a kernel, (G, ...) arrays outside."""

    u: Any
    delta: Any
    z: Any  # None without a gate
    bc: Any  # B and C behind each other: (G, B, 2N, L) for TPU, (G, B, L, 2N) for GPU
    A: Any  # (G, N, D)
    skip: Any  # (G, 1, D)
    bias: Any  # (G, 1, D)

    @classmethod
    def take(cls, plan: _Plan, refs) -> tuple["_Operands", tuple]:
        """The operands at the head of a kernel's references, and the other references."""
        count = len(cls._fields) - (not plan.gated)
        u, delta, *gate, bc, A, skip, bias = refs[:count]
        return cls(u, delta, gate[0] if gate else None, bc, A, skip, bias), refs[count:]

    def present(self) -> list:
        return [x for x in self if x is not None]


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _silu_and_slope(z: Array) -> tuple[Array, Array]:
    s = jax.nn.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


# ---- TPU: inside a tile -------------------------------------------------------------------------------------------


class _Steps:
    """The `plan.rows` consecutive steps of one register tile, in float32; (rows, channels) each.

    A ragged last block holds whatever lay in memory beyond the sequence's end, so that is replaced by zeros before
    anything is computed from it.
    """

    def __init__(self, plan: _Plan, x: _Operands, tile_index, group):
        start = group * plan.rows
        self.at = pl.ds(pl.multiple_of(start, plan.rows), plan.rows)
        row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.channels), 0)
        self._valid = None if plan.length % plan.tile == 0 else row < plan.length - tile_index * plan.tile - start
        self.u, self.raw = self.load(x.u), self.load(x.delta) + x.bias[...]
        self.d = self.masked(_softplus(self.raw) if plan.softplus else self.raw)
        self.driven = self.d * self.u
        # A lane can be picked at a constant place only, hence the rotation: these steps come to lie first.
        rotated = pltpu.roll(x.bc[...].astype(jnp.float32), jax.lax.rem(LANES - start, LANES), 1)
        states = x.A.shape[0]
        self._b, self._c = rotated[:states], rotated[states:]

    def load(self, ref) -> Array:
        return self.masked(ref[self.at, :].astype(jnp.float32))

    def masked(self, x: Array) -> Array:
        return x if self._valid is None else jnp.where(self._valid, x, 0.0)

    def B(self, row: int) -> Array:  # noqa: N802  the matrix's name
        return self._b[:, row : row + 1]  # (N, 1)

    def C(self, row: int) -> Array:  # noqa: N802
        return self._c[:, row : row + 1]

    def advance(self, A2: Array, h: Array, row: int) -> Array:
        """The recurrence; A2 is A log2(e), which saves a multiplication per element."""
        return jnp.exp2(self.d[row : row + 1] * A2) * h + self.driven[row : row + 1] * self.B(row)


def _sum_over_states(products: list[Array]) -> Array:
    """(rows, channels) whose row r is the sum over the sublanes of products[r] (N, channels).

    Eight sums at once along a butterfly: 4.2 operations a register instead of 7 for one sum after the other.
    """
    eights = [_sum_eight(products[first : first + SUBLANES]) for first in range(0, len(products), SUBLANES)]
    return eights[0] if len(eights) == 1 else jnp.concatenate(eights, axis=0)


def _sum_eight(products: list[Array]) -> Array:
    parts = [p.reshape(-1, SUBLANES, p.shape[1]).sum(0) for p in products]  # (8, channels) each
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    for stride in (1, 2):
        even = (row & stride) == 0
        parts = [
            jnp.where(even, p + pltpu.roll(p, SUBLANES - stride, 0), q + pltpu.roll(q, stride, 0))
            for p, q in zip(parts[::2], parts[1::2], strict=True)
        ]
    p, q = parts
    low = (row & 4) == 0
    return jnp.where(low, p, q) + pltpu.roll(jnp.where(low, q, p), 4, 0)  # by 4 both ways are the same


def _row_of(plan: _Plan, backwards, step: int) -> int:
    return plan.rows - 1 - step if backwards else step


def _group_of(plan: _Plan, backwards, i):
    return plan.tile // plan.rows - 1 - i if backwards else i


def _forward_tile(plan: _Plan, backwards, x: _Operands, h, y_ref, tile_index) -> Array:
    """Write a tile's outputs; h (N, channels) is the state before it, returned is the one after it."""
    A2 = x.A[...] * LOG2_E

    def group(i, h):
        steps = _Steps(plan, x, tile_index, _group_of(plan, backwards, i))
        products = [h] * plan.rows
        for step in range(plan.rows):
            row = _row_of(plan, backwards, step)
            h = steps.advance(A2, h, row)
            products[row] = h * steps.C(row)
        y = _sum_over_states(products) + x.skip[...] * steps.u
        if plan.gated:
            y = y * _silu_and_slope(steps.load(x.z))[0]
        y_ref[steps.at, :] = y.astype(y_ref.dtype)
        return h

    return jax.lax.fori_loop(0, plan.tile // plan.rows, group, h)


def _recompute_tile(plan: _Plan, backwards, x: _Operands, h, gy_ref, dz_ref, states_ref, tile_index) -> None:
    """Fill states_ref (tile + 1, N, channels) in order of time, h first; write dz, which needs the outputs."""
    A2 = x.A[...] * LOG2_E
    states_ref[0] = h

    def group(i, h):
        steps = _Steps(plan, x, tile_index, _group_of(plan, backwards, i))
        products = [h] * plan.rows
        for step in range(plan.rows):
            row = _row_of(plan, backwards, step)
            h = steps.advance(A2, h, row)
            states_ref[i * plan.rows + step + 1] = h
            products[row] = h * steps.C(row)
        if plan.gated:
            _, slope = _silu_and_slope(steps.load(x.z))
            dz = steps.load(gy_ref) * (_sum_over_states(products) + x.skip[...] * steps.u) * slope
            dz_ref[steps.at, :] = dz.astype(dz_ref.dtype)
        return h

    jax.lax.fori_loop(0, plan.tile // plan.rows, group, h)


class _Gradients(NamedTuple):
    """What the backward pass writes, but dz."""

    u: Any
    delta: Any
    bc: Any  # per channel tile: (G, D tiles, B, 2N, L) for TPU, (G, D tiles, B, L, 2N) for GPU
    A: Any  # per batch row: (G, B, N, D)
    skip: Any  # (G, B, 1, D)
    bias: Any  # (G, B, 1, D)


def _backward_tile(plan: _Plan, backwards, x: _Operands, g, gy_ref, grads: _Gradients, states_ref, tile_index) -> Array:
    """Take a tile's steps against the order of time; g (N, channels) is the gradient of the state after it.

    Returns the gradient of the state before the tile, adds to those of A, skip and bias, writes the others.
    """
    A2, states = x.A[...] * LOG2_E, x.A.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (states, LANES), 1)

    def group(i, carry):
        g, dB, dC = carry
        i = plan.tile // plan.rows - 1 - i
        place = _group_of(plan, backwards, i)
        steps = _Steps(plan, x, tile_index, place)
        p = steps.load(gy_ref)
        if plan.gated:
            p = p * _silu_and_slope(steps.load(x.z))[0]
        dA, d_driven, d_decay = grads.A[...], [g] * plan.rows, [g] * plan.rows
        h = states_ref[(i + 1) * plan.rows]
        for step in reversed(range(plan.rows)):
            row = _row_of(plan, backwards, step)
            here, before = lane == place * plan.rows + row, states_ref[i * plan.rows + step]
            p_t, d_t = p[row : row + 1], steps.d[row : row + 1]
            g = g + steps.C(row) * p_t
            dC = jnp.where(here, jnp.sum(h * p_t, axis=1, keepdims=True), dC)
            dB = jnp.where(here, jnp.sum(g * steps.driven[row : row + 1], axis=1, keepdims=True), dB)
            d_driven[row] = g * steps.B(row)
            g = g * jnp.exp2(d_t * A2)
            e = g * before
            dA = dA + e * d_t
            d_decay[row] = e * A2
            h = before
        s = _sum_over_states(d_driven)
        dd = s * steps.u + _sum_over_states(d_decay) * (1 / LOG2_E)
        dd = steps.masked(dd * jax.nn.sigmoid(steps.raw) if plan.softplus else dd)
        grads.u[steps.at, :] = (s * steps.d + x.skip[...] * p).astype(grads.u.dtype)
        grads.delta[steps.at, :] = dd.astype(grads.delta.dtype)
        grads.A[...] = dA
        grads.skip[...] += jnp.sum(p * steps.u, axis=0, keepdims=True)
        grads.bias[...] += jnp.sum(dd, axis=0, keepdims=True)
        return g, dB, dC

    zeros = jnp.zeros((states, LANES), jnp.float32)
    g, grads.bc[:states, :], grads.bc[states:, :] = jax.lax.fori_loop(
        0, plan.tile // plan.rows, group, (g, zeros, zeros)
    )
    return g


# ---- TPU: the grid (direction, channel tile, batch row, tile of L) ------------------------------------------------


def _tile_at(plan: _Plan, step, *, from_the_end):
    return plan.tiles - 1 - step if from_the_end else step


def _tpu_forward_kernel(plan: _Plan, *refs):
    x, refs = _Operands.take(plan, refs)
    h0, (y_ref, h_ref, *starts) = refs[: plan.carried], refs[plan.carried :]
    direction, step = pl.program_id(0), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        h_ref[...] = h0[0][...] if plan.carried else jnp.zeros_like(h_ref)

    for start_ref in starts:
        start_ref[...] = h_ref[...]
    for k, backwards in enumerate(plan.backwards):

        @pl.when(direction == k)
        def _(backwards=backwards):
            tile_index = _tile_at(plan, step, from_the_end=backwards)
            h_ref[...] = _forward_tile(plan, backwards, x, h_ref[...], y_ref, tile_index)


def _tpu_backward_kernel(plan: _Plan, *refs):
    x, (start_ref, gy_ref, gh_ref, *refs, dh_ref, states_ref) = _Operands.take(plan, refs)
    grads, dz_ref = _Gradients(*refs[:6]), refs[-1]  # without a gate, not used
    direction, step = pl.program_id(0), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        dh_ref[...] = gh_ref[...]
        for ref in (grads.A, grads.skip, grads.bias):
            ref[...] = jnp.zeros_like(ref)

    for k, backwards in enumerate(plan.backwards):

        @pl.when(direction == k)
        def _(backwards=backwards):
            tile_index = _tile_at(plan, step, from_the_end=not backwards)
            _recompute_tile(plan, backwards, x, start_ref[...], gy_ref, dz_ref, states_ref, tile_index)
            dh_ref[...] = _backward_tile(plan, backwards, x, dh_ref[...], gy_ref, grads, states_ref, tile_index)


class _TpuSpecs:
    """The block of each kind of operand, at the place of the grid where it is needed."""

    def __init__(self, plan: _Plan, states: int, *, against_time: bool):
        def tile_at(g, step):
            tiles = [_tile_at(plan, step, from_the_end=back != against_time) for back in plan.backwards]
            return tiles[0] if len(tiles) == 1 else jax.lax.select(g == 0, *tiles)

        def spec(shape, axes):
            def place(g, d, b, step):
                at = {"g": g, "d": d, "b": b, "t": tile_at(g, step), "0": 0}
                return tuple(at[axis] for axis in axes)

            return pl.BlockSpec(shape, place)

        N, T, W = states, plan.tile, plan.channels
        self.steps = spec((None, None, T, W), "gbtd")
        self.bc = spec((None, None, 2 * N, LANES), "gb0t")
        self.partial_bc = spec((None, None, None, 2 * N, LANES), "gdb0t")
        self.matrix = spec((None, N, W), "g0d")
        self.vector = spec((None, 1, W), "g0d")
        self.partial_vector = spec((None, None, 1, W), "gb0d")
        self.state = spec((None, None, N, W), "gb0d")
        self.starts = spec((None, None, None, N, W), "gbt0d")

    def operands(self, plan: _Plan) -> list[pl.BlockSpec]:
        return [self.steps] * (2 + plan.gated) + [self.bc, self.matrix, self.vector, self.vector]


# ---- GPU: one program per (channel tile, batch row, direction), the state in registers ------------------------------


class _GpuStep:
    """One step: vectors of channels, and B and C of the states."""

    def __init__(self, plan: _Plan, x: _Operands, at):
        states = x.A.shape[0]
        self.at = at
        self.u, raw = x.u[at, :].astype(jnp.float32), x.delta[at, :].astype(jnp.float32)
        self.raw = raw + x.bias[0, :]
        d = _softplus(self.raw) if plan.softplus else self.raw
        self.counts = at < plan.length
        self.d = jnp.where(self.counts, d, 0.0)
        self.driven = self.d * self.u
        self.B = x.bc[at, pl.ds(0, states)].astype(jnp.float32)[:, None]  # (N, 1)
        self.C = x.bc[at, pl.ds(states, states)].astype(jnp.float32)[:, None]
        self.z: Any = x.z[at, :].astype(jnp.float32) if plan.gated else None

    def advance(self, A: Array, h: Array) -> Array:
        return jnp.exp(self.d[None, :] * A) * h + self.driven[None, :] * self.B


def _gpu_steps(plan: _Plan, x: _Operands, direction, tile) -> list[_GpuStep]:
    """The steps of a tile in order of time; all loads come first, so that they are in flight together."""
    last = plan.tiles * plan.tile - 1
    steps = []
    for j in range(plan.tile):
        time = tile * plan.tile + j
        places = [last - time if backwards else time for backwards in plan.backwards]
        at = places[0] if len(places) == 1 else jnp.where(direction == 0, *places)
        steps.append(_GpuStep(plan, x, at))
    return steps


def _gpu_forward_kernel(plan: _Plan, *refs):
    x, refs = _Operands.take(plan, refs)
    h0, (y_ref, h_ref, *starts) = refs[: plan.carried], refs[plan.carried :]
    A, skip, direction = x.A[...], x.skip[0, :], pl.program_id(2)

    def tile(k, h):
        for start_ref in starts:
            start_ref[k] = h
        for step in _gpu_steps(plan, x, direction, k):
            h = step.advance(A, h)
            y = jnp.sum(h * step.C, axis=0) + skip * step.u
            if plan.gated:
                y = y * _silu_and_slope(step.z)[0]
            y_ref[step.at, :] = y.astype(y_ref.dtype)
        return h

    h_ref[...] = jax.lax.fori_loop(0, plan.tiles, tile, h0[0][...] if plan.carried else jnp.zeros_like(A))


def _gpu_backward_kernel(plan: _Plan, *refs):
    x, (starts_ref, gy_ref, gh_ref, *refs) = _Operands.take(plan, refs)
    grads, dz_ref, dh_ref = _Gradients(*refs[:6]), refs[6 if plan.gated else 0], refs[-1]  # the last two if there
    A, skip, states, direction = x.A[...], x.skip[0, :], x.A.shape[0], pl.program_id(2)

    def tile(i, carry):
        g, dA, dskip, dbias = carry
        k = plan.tiles - 1 - i
        steps, h = _gpu_steps(plan, x, direction, k), [starts_ref[k]]
        for step in steps:
            h.append(step.advance(A, h[-1]))
        for step, before, after in reversed(list(zip(steps, h[:-1], h[1:], strict=True))):
            p = gy_ref[step.at, :].astype(jnp.float32)
            if plan.gated:
                silu, slope = _silu_and_slope(step.z)
                dz = p * (jnp.sum(after * step.C, axis=0) + skip * step.u) * slope
                dz_ref[step.at, :] = dz.astype(dz_ref.dtype)
                p = p * silu
            g = g + step.C * p[None, :]
            grads.bc[step.at, pl.ds(states, states)] = jnp.sum(after * p[None, :], axis=1)
            grads.bc[step.at, pl.ds(0, states)] = jnp.sum(g * step.driven[None, :], axis=1)
            s = jnp.sum(g * step.B, axis=0)
            g = g * jnp.exp(step.d[None, :] * A)
            e = g * before
            dA = dA + e * step.d[None, :]
            dd = s * step.u + jnp.sum(e * A, axis=0)
            dd = jnp.where(step.counts, dd * jax.nn.sigmoid(step.raw) if plan.softplus else dd, 0.0)
            grads.u[step.at, :] = (s * step.d + skip * p).astype(grads.u.dtype)
            grads.delta[step.at, :] = dd.astype(grads.delta.dtype)
            dskip, dbias = dskip + p * step.u, dbias + dd
        return g, dA, dskip, dbias

    zeros = jnp.zeros_like(skip)
    start = (gh_ref[...], jnp.zeros_like(A), zeros, zeros)
    g, grads.A[...], grads.skip[0, :], grads.bias[0, :] = jax.lax.fori_loop(0, plan.tiles, tile, start)
    if plan.carried:
        dh_ref[...] = g


class _GpuSpecs:
    """What a program sees of each kind of operand: all of L for its channels."""

    def __init__(self, plan: _Plan, x: _Operands):
        length, N, W = x.u.shape[2], x.A.shape[1], plan.channels
        self.steps = pl.BlockSpec((None, None, length, W), lambda d, b, g: (g, b, 0, d))
        self.bc = pl.BlockSpec((None, None, length, 2 * N), lambda d, b, g: (g, b, 0, 0))  # noqa: ARG005
        self.partial_bc = pl.BlockSpec((None, None, None, length, 2 * N), lambda d, b, g: (g, d, b, 0, 0))
        self.matrix = pl.BlockSpec((None, N, W), lambda d, b, g: (g, 0, d))  # noqa: ARG005
        self.vector = pl.BlockSpec((None, 1, W), lambda d, b, g: (g, 0, d))  # noqa: ARG005
        self.partial_vector = pl.BlockSpec((None, None, 1, W), lambda d, b, g: (g, b, 0, d))
        self.state = pl.BlockSpec((None, None, N, W), lambda d, b, g: (g, b, 0, d))
        self.starts = pl.BlockSpec((None, None, plan.tiles, N, W), lambda d, b, g: (g, b, 0, 0, d))

    def operands(self, plan: _Plan) -> list[pl.BlockSpec]:
        return [self.steps] * (2 + plan.gated) + [self.bc, self.matrix, self.vector, self.vector]


# ---- the calls ----------------------------------------------------------------------------------------------------


def _shape(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _launch(plan: _Plan, kernel, x: _Operands, others, results, in_specs, out_specs, *, scratch=(), name, passes):
    """Call a kernel; the cost that XLA is told is every operand and result once and `passes` over (B, L, D, N)."""
    G, batch, _, width = x.u.shape
    operands = [*x.present(), *others]
    elements = passes * math.prod(x.u.shape) * x.A.shape[1]
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in [*operands, *results])
    if plan.backend == "tpu":
        grid = (G, width // plan.channels, batch, plan.tiles)
        params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
    else:
        grid = (width // plan.channels, batch, G)
        params = plgpu.CompilerParams(num_warps=4, num_stages=1)
    return pl.pallas_call(
        partial(kernel, plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=params,
        cost_estimate=pl.CostEstimate(flops=5 * elements, transcendentals=elements, bytes_accessed=moved),
        interpret=plan.interpret,
        name=name,
    )(*operands)


def _forward(plan: _Plan, x: _Operands, h0, *, save: bool):
    """`(y, h_last)`, and with `save` the state before each tile."""
    (G, batch, _, width), N = x.u.shape, x.A.shape[1]
    tpu = plan.backend == "tpu"
    specs = _TpuSpecs(plan, N, against_time=False) if tpu else _GpuSpecs(plan, x)
    results = [_shape(*x.u.shape, dtype=x.u.dtype), _shape(G, batch, N, width), _shape(G, batch, plan.tiles, N, width)]
    out_specs = [specs.steps, specs.state, specs.starts]
    kept, carried = 3 if save else 2, [h0] if plan.carried else []
    in_specs = [*specs.operands(plan), *[specs.state] * len(carried)]
    kernel = _tpu_forward_kernel if tpu else _gpu_forward_kernel
    return _launch(
        plan, kernel, x, carried, results[:kept], in_specs, out_specs[:kept], name="selective_scan", passes=1
    )


def _backward(plan: _Plan, x: _Operands, starts, gy, gh):
    """The arrays of `_Gradients`, dz with a gate, dh0 with a carried state."""
    (G, batch, _, width), N = x.u.shape, x.A.shape[1]
    tpu = plan.backend == "tpu"
    specs = _TpuSpecs(plan, N, against_time=True) if tpu else _GpuSpecs(plan, x)
    state, vector = _shape(G, batch, N, width), _shape(G, batch, 1, width)
    du, ddelta, *dz = (_shape(*a.shape, dtype=a.dtype) for a in (x.u, x.delta, x.z) if a is not None)
    results = [du, ddelta, _shape(G, width // plan.channels, *x.bc.shape[1:]), state, vector, vector, *dz]
    out_specs = [specs.steps, specs.steps, specs.partial_bc, specs.state, specs.partial_vector, specs.partial_vector]
    out_specs += [specs.steps] * len(dz)
    scratch = []
    if plan.carried:
        results, out_specs = [*results, state], [*out_specs, specs.state]
    elif tpu:  # the gradient of the state is carried along all the same
        scratch.append(pltpu.VMEM((N, plan.channels), jnp.float32))
    if tpu:
        scratch.append(pltpu.VMEM((plan.tile + 1, N, plan.channels), jnp.float32))
    in_specs = [*specs.operands(plan), specs.starts, specs.steps, specs.state]
    kernel, name = _tpu_backward_kernel if tpu else _gpu_backward_kernel, "selective_scan_backward"
    others = [starts, gy, gh]
    return _launch(plan, kernel, x, others, results, in_specs, out_specs, scratch=scratch, name=name, passes=3)


# ---- differentiation ----------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: _Plan, x: _Operands, h0):
    y, h_last = _forward(plan, x, h0, save=False)
    return y, h_last


def _scan_fwd(plan: _Plan, x: _Operands, h0):
    y, h_last, starts = _forward(plan, x, h0, save=True)
    return (y, h_last), (x, starts)


def _scan_bwd(plan: _Plan, residuals, cotangents):
    x, starts = residuals
    results = _backward(plan, x, starts, *cotangents)
    grads, dz = _Gradients(*results[:6]), results[6] if plan.gated else None
    dbc = grads.bc.sum(1).astype(x.bc.dtype)
    dA, dskip, dbias = (g.sum(1) for g in (grads.A, grads.skip, grads.bias))
    return _Operands(grads.u, grads.delta, dz, dbc, dA, dskip, dbias), results[-1] if plan.carried else None


_scan.defvjp(_scan_fwd, _scan_bwd)


# ---- the public functions -----------------------------------------------------------------------------------------


def pallas_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "N D"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    h0: Float[Array, "B N D"] | None = None,
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

    A step leaves the state as it is (padding) where `delta + delta_bias` is 0, or -1e9 under the softplus.

    Args:
        u: input of the recurrence, float32 or bfloat16; delta, z, B and C may differ from it in dtype.
        delta: step sizes before bias and softplus.
        A: state matrix, negative for a stable recurrence.
        B: input projection per step.
        C: output projection per step.
        h0: state before the first step (before the last one with `reverse`); None is zeros, which are then not read.
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
        ValueError: unknown backend, float64 input, L = 0, more states than the kernel holds, or shapes that do not
            fit together.
    """
    operands = [None if x is None else x[None] for x in (u, delta, A, B, C, h0, D, z, delta_bias)]
    y, h_last = _run(*operands, softplus=delta_softplus, backwards=(reverse,), backend=backend, interpret=interpret)
    return y[0], h_last[0]


def pallas_scan_bidirectional(
    u: Float[Array, "G B L D"],
    delta: Float[Array, "G B L D"],
    A: Float[Array, "G N D"],
    B: Float[Array, "G B L N"],
    C: Float[Array, "G B L N"],
    h0: Float[Array, "G B N D"] | None = None,
    *,
    D: Float[Array, "G D"] | None = None,
    z: Float[Array, "G B L D"] | None = None,
    delta_bias: Float[Array, "G D"] | None = None,
    delta_softplus: bool = False,
    backend: Backend = "auto",
    interpret: bool | None = None,
) -> tuple[Float[Array, "G B L D"], Float[Array, "G B N D"]]:
    """`pallas_scan` of both directions of a bidirectional block in one launch.

    The leading axis G is 2: index 0 runs from the first step to the last, index 1 from the last to the first; both are
    in the order of time. Arguments, results and errors otherwise as in `pallas_scan`.
    """
    if u.shape[0] != 2:
        raise ValueError(f"pallas_scan_bidirectional: u has {u.shape[0]} directions on its first axis, not 2")
    operands = (u, delta, A, B, C, h0, D, z, delta_bias)
    return _run(*operands, softplus=delta_softplus, backwards=(False, True), backend=backend, interpret=interpret)


def _run(u, delta, A, B, C, h0, skip, z, bias, *, softplus, backwards, backend, interpret):
    """All operands with the leading axis of directions: bring them to the kernel's sizes and back."""
    _check(u, delta, A, B, C, h0, skip, z, bias)
    plan = _plan(u, delta, A, h0, z, softplus=softplus, backwards=backwards, backend=backend, interpret=interpret)
    _, _, length, width = u.shape
    channels, states = _round_up(width, plan.channels), _padded_states(plan.backend, A.shape[1])
    # The TPU kernel takes ragged blocks of L; only what is shorter than its smallest block is padded.
    steps = max(length, plan.rows) if plan.backend == "tpu" else _round_up(length, plan.tile)

    def over_time(x):
        return None if x is None else _pad(_pad(x, 3, channels), 2, steps)

    def matrix(x):
        return _pad(_pad(x.astype(jnp.float32), x.ndim - 1, channels), x.ndim - 2, states)

    def vector(x):
        x = jnp.zeros((u.shape[0], width), jnp.float32) if x is None else x.astype(jnp.float32)
        return _pad(x, 1, channels)[:, None]

    bc = jnp.concatenate([_pad(B, 3, states), _pad(C, 3, states)], axis=3)
    bc = _pad(bc, 2, _round_up(length, LANES) if plan.backend == "tpu" else steps)
    if plan.backend == "tpu":  # time on lanes: a row of 2N values would occupy a row of 128 in memory
        bc = bc.swapaxes(2, 3)
    x = _Operands(over_time(u), over_time(delta), over_time(z), bc, matrix(A), vector(skip), vector(bias))
    results: Any = _scan(plan, x, None if h0 is None else matrix(h0))
    y, h_last = results
    return y[:, :, :length, :width], h_last[:, :, : A.shape[1], :width]


def _check(u, delta, A, B, C, h0, skip, z, bias) -> None:
    G, batch, length, width = u.shape
    per_step, per_state, vector = (G, batch, length, width), (G, batch, length, A.shape[1]), (G, width)
    expected: dict[str, tuple] = {
        "delta": (delta, per_step),
        "A": (A, (G, A.shape[1], width)),
        "B": (B, per_state),
        "C": (C, per_state),
        "h0": (h0, (G, batch, A.shape[1], width)),
        "D": (skip, vector),
        "z": (z, per_step),
        "delta_bias": (bias, vector),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"pallas_scan: {name} has shape {array.shape[-len(shape) + 1 :]}, u asks for {shape[1:]}")
    if length == 0:
        raise ValueError("pallas_scan: the sequence is empty (L = 0); pass at least one step")
    if any(x is not None and x.dtype == jnp.float64 for x in (u, delta, z, A, B, C, h0)):
        raise ValueError("pallas_scan: the kernel computes in float32; use another implementation for float64")


def _plan(u, delta, A, h0, z, *, softplus, backwards, backend, interpret) -> _Plan:
    if backend not in ("auto", "tpu", "gpu"):
        raise ValueError(f"pallas_scan: backend {backend!r} is unknown: choose auto, tpu or gpu")
    platform = jax.default_backend()
    if backend == "auto":
        backend = "gpu" if platform in ("gpu", "cuda", "rocm") else "tpu"
    length, width, states = u.shape[2], u.shape[3], _padded_states(backend, A.shape[1])
    # A register tile of 16-bit values has 16 rows.
    rows = SUBLANES * max(4 // x.dtype.itemsize for x in (u, delta, z) if x is not None)
    return _Plan(
        backend=backend,
        interpret=platform == "cpu" if interpret is None else interpret,
        backwards=backwards,
        softplus=softplus,
        gated=z is not None,
        carried=h0 is not None,
        length=length,
        tile=min(LANES, _round_up(length, rows)) if backend == "tpu" else GPU_STEPS,
        rows=rows,
        channels=_tpu_channels(_round_up(width, LANES), states) if backend == "tpu" else GPU_CHANNELS,
    )


def _padded_states(backend: str, states: int) -> int:
    """Full registers on TPU; a power of two on GPU, as Triton asks for."""
    return _round_up(states, SUBLANES) if backend == "tpu" else 1 << (states - 1).bit_length()


def _tpu_channels(width: int, states: int) -> int:
    """The widest tile whose backward pass fits: a tile's states and two of each of its seven blocks."""
    per_channel = 4 * ((LANES + 1) * states + 14 * LANES)
    fitting = [w for w in range(LANES, width + 1, LANES) if width % w == 0 and w * per_channel <= TPU_SCRATCH_BYTES]
    if not fitting:
        raise ValueError(
            f"pallas_scan: {states} states are more than the TPU kernel holds; use implementation 'chunked'"
        )
    return max(fitting)


def _round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _pad(x: Array, axis: int, size: int) -> Array:
    return x if x.shape[axis] == size else jnp.pad(x, [(0, (size - n) * (i == axis)) for i, n in enumerate(x.shape)])
