"""`x + BiMamba(LayerNorm(x))` over a long window, part by part: the same numbers in little memory per patch.

Each direction runs through the parts with its carry; only one part's activations exist at a time. The gradient goes
through the parts the other way round: it keeps the carry before each part and recomputes what is inside. Buffers are
updated where they lie: the second direction's output takes the place of the first one's, and the gradient of the input
that of the gradient of the output.

Kept per patch and direction, in float32: its input (4 M bytes) and a carry per part (4 D (N + K - 1) / part bytes).
First derivatives in reverse mode only.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lumamba_jax.layers import LayerNorm
from lumamba_jax.mamba import Bidirectional, BiMamba, MambaBlock, MambaCarry, join

LONG = 1024
"""Windows of more patches run part by part."""

_CPU_PART, _DEVICE_PART = 256, 2048  # patches: a part's activations near the cache; large enough to fill an accelerator


class _Direction(NamedTuple):
    """What is static about one run through the parts; of `(norm, mamba)` only the graph."""

    graphdef: nnx.GraphDef
    part: int
    reverse: bool
    strategy: Bidirectional

    @property
    def last(self) -> bool:
        """Whether the block's output is complete after this direction."""
        return self.reverse or self.strategy == "none"

    def step(
        self,
        params: nnx.State,
        carry: MambaCarry,
        x: Float[Array, "B R M"],
        before: Float[Array, "B R M"] | None,
        valid: Bool[Array, "B R"] | None,
    ) -> tuple[Float[Array, "B R M"], MambaCarry]:
        """One part; `before` is what the first direction made of it."""
        norm, mamba = nnx.merge(self.graphdef, params)
        out, carry = mamba.advance(norm(x), carry, valid=valid, reverse=self.reverse)
        out = out if before is None else join(self.strategy, before, out)
        return (x + out if self.last else out), carry

    def beginning(self, params: nnx.State, batch: int) -> MambaCarry:
        """The carry before the first part."""
        _, mamba = nnx.merge(self.graphdef, params)
        return mamba.beginning(batch)

    def parts(self, x: Array) -> int:
        """How many parts `(B, S, ..)` has."""
        return x.shape[1] // self.part

    def start(self, k: Array, parts: int) -> Array:
        """First patch of the k-th part in the order of this direction."""
        return self.part * (parts - 1 - k if self.reverse else k)


def block_in_parts(
    norm: LayerNorm, mamba: BiMamba, x: Float[Array, "B S M"], valid: Bool[Array, "B S"] | None, *, part: int
) -> Float[Array, "B S M"]:
    """`x + mamba(norm(x), valid=valid)`; S a multiple of `part`, and `part` at least d_conv - 1."""

    def through(block: MambaBlock, before: Array | None, *, reverse: bool) -> Array:
        graphdef, params = nnx.split((norm, block))
        return _through(_Direction(graphdef, part, reverse, mamba.strategy), params, x, before, valid)  # pyright: ignore

    forward = through(mamba.fwd, None, reverse=False)
    return forward if mamba.rev is None else through(mamba.rev, forward, reverse=True)


def pad_to_parts(
    x: Float[Array, "B S M"], valid: Bool[Array, "B S"] | None, part: int
) -> tuple[Float[Array, "B R M"], Bool[Array, "B R"] | None]:
    """Zeros behind the last patch, marked as padding, up to a multiple of `part`."""
    missing = -x.shape[1] % part
    if not missing:
        return x, valid
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))), jnp.pad(valid, ((0, 0), (0, missing)))


def part_size(num_patches: int) -> int:
    """Patches of one part: so many parts as the platform's size asks for, of nearly equal length."""
    largest = _CPU_PART if jax.default_backend() == "cpu" else _DEVICE_PART
    return -(-num_patches // -(-num_patches // largest))


# --- one direction through the parts ----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(
    direction: _Direction,
    params: nnx.State,
    x: Float[Array, "B S M"],
    before: Float[Array, "B S M"] | None,
    valid: Bool[Array, "B S"] | None,
) -> Float[Array, "B S M"]:
    return _forth(direction, params, x, before, valid, None)[0]


def _forth(
    direction: _Direction,
    params: nnx.State,
    x: Array,
    before: Array | None,
    valid: Array | None,
    kept: MambaCarry | None,
) -> tuple[Array, MambaCarry | None]:
    """Outputs of every part; `kept` (one carry per part), unless None, receives the carry before each."""
    parts = direction.parts(x)

    def body(k, state):
        carry, out, kept = state
        start = direction.start(k, parts)
        if kept is not None:
            kept = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, k, 0), kept, carry)
        here = [_part(v, start, direction.part) for v in (x, out, valid)]
        if before is None:
            here[1] = None
        y, carry = direction.step(params, carry, *here)
        return carry, _put(out, y, start), kept

    out = jnp.zeros_like(x) if before is None else before
    beginning = direction.beginning(params, x.shape[0])
    _, out, kept = jax.lax.fori_loop(0, parts, body, (beginning, out, kept))
    return out, kept


def _through_fwd(direction: _Direction, params: nnx.State, x: Array, before: Array | None, valid: Array | None):
    beginning = direction.beginning(params, x.shape[0])
    kept = jax.tree.map(lambda one: jnp.zeros((direction.parts(x), *one.shape), one.dtype), beginning)
    out, kept = _forth(direction, params, x, before, valid, kept)
    return out, (params, x, before, valid, kept)


def _through_bwd(direction: _Direction, residuals, gradient: Array):
    """From the last part to the first; each part's gradient of x takes the place of its gradient of the output."""
    params, x, before, valid, kept = residuals
    parts = direction.parts(x)

    def body(i, state):
        k = parts - 1 - i
        start = direction.start(k, parts)
        dcarry, dparams, dx, dbefore = state
        carry = jax.tree.map(lambda all_: jax.lax.dynamic_index_in_dim(all_, k, 0, keepdims=False), kept)
        here, there, mask = (_part(v, start, direction.part) for v in (x, before, valid))
        _, pull = jax.vjp(partial(direction.step, valid=mask), params, carry, here, there)
        more, dcarry, dhere, dthere = pull((_part(dx, start, direction.part), dcarry))
        dbefore = None if dbefore is None else _put(dbefore, dthere, start)
        return dcarry, jax.tree.map(jnp.add, dparams, more), _put(dx, dhere, start), dbefore

    nothing = jax.tree.map(jnp.zeros_like, (direction.beginning(params, x.shape[0]), params))
    dbefore = None if before is None else jnp.zeros_like(x)
    _, dparams, dx, dbefore = jax.lax.fori_loop(0, parts, body, (*nothing, gradient, dbefore))
    return dparams, dx, dbefore, None


_through.defvjp(_through_fwd, _through_bwd)


def _part(x: Any, start: Array, size: int) -> Any:
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=1)
