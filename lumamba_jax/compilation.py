"""How programs are compiled for the platform at hand: measured options and batch blocks (docs/performance.md)."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
from jaxtyping import Array

CPU_BATCH_BLOCK = 8
"""Windows of one block on a CPU: their activations stay in its cache."""

Result = TypeVar("Result")


def compiler_options(platform: str | None = None) -> dict[str, bool | int | str] | None:
    """Options for `jax.jit(..., compiler_options=...)` on a platform ("cpu", "gpu", "tpu"; None = the default one)."""
    if (platform or jax.default_backend()) == "cpu":
        # Without it XLA keeps to 256-bit vectors even where the processor has 512-bit ones: 1.1 to 1.5 times slower.
        return {"xla_cpu_prefer_vector_width": 512}
    return None


def in_blocks(
    run: Callable[[Mapping[str, Array]], Result], batch: Mapping[str, Array], *, block: int | None = None
) -> Result:
    """`run(batch)` over blocks of the batch, one after the other, for a `run` that treats each window by itself.

    Args:
        run: arrays `(b, ...)` by name -> an array or tree of arrays `(b, ...)`.
        batch: arrays `(B, ...)`.
        block: windows per block; None = `CPU_BATCH_BLOCK` on a CPU, the whole batch elsewhere. A batch that is not a
            multiple of the block runs as a whole.
    """
    rows = next(iter(batch.values())).shape[0]
    if block is None:
        block = CPU_BATCH_BLOCK if jax.default_backend() == "cpu" else rows
    if rows <= block or rows % block:
        return run(batch)
    blocked = {name: array.reshape(rows // block, block, *array.shape[1:]) for name, array in batch.items()}
    results = jax.lax.map(run, blocked)
    return jax.tree.map(lambda array: array.reshape(rows, *array.shape[2:]), results)
