"""How programs are compiled and spread for the platform at hand: measured options, batch blocks, local devices
(docs/performance.md)."""

import functools
import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

CPU_BATCH_BLOCK = 8
"""Windows of one block on a CPU: their activations stay in its cache."""

MOST_CPU_DEVICES = 8
"""Beyond it a batch of 64 windows has no whole block left for each device."""
WINDOWS = "windows"
"""Mesh axis of `local_mesh`."""

Result = TypeVar("Result")


def compiler_options(target: str | None = None) -> dict[str, bool | int | str] | None:
    """Options for `jax.jit(..., compiler_options=...)` on a platform ("cpu", "gpu", "tpu"; None = the default one)."""
    if (target or jax.default_backend()) == "cpu":
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


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next process starts at once: unless the user chose otherwise.

    `JAX_COMPILATION_CACHE_DIR` names another directory than `lumamba_jax/xla-*` in the user's cache, and
    `JAX_ENABLE_COMPILATION_CACHE=false` switches it off. A program for a CPU uses its instructions, so that every kind
    of CPU has a directory of its own.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if not jax.config.jax_compilation_cache_dir:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "lumamba_jax" / f"xla-{_kind_of_cpu()}"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _kind_of_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def use_cpu_cores(count: int | None = None) -> int:
    """Let JAX see one CPU device per core, so that windows are spread over them: call it before JAX is first used.

    A device works on its own windows without waiting for the others, where the threads of one device share every small
    operation (two cores: 1.25 times faster). Without effect on GPUs and TPUs, and where `XLA_FLAGS` says how many
    devices a CPU has.

    Args:
        count: devices; None = the cores this process may use, at most `MOST_CPU_DEVICES`.

    Returns: the number asked for.
    Raises: RuntimeError when JAX has been used already.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count or min(_usable_cores(), MOST_CPU_DEVICES))
    return jax.config.jax_num_cpu_devices


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def local_mesh() -> Mesh:
    """This process's devices along the axis `WINDOWS`."""
    return Mesh(np.asarray(jax.local_devices()), (WINDOWS,))


def on_local_devices(params: Any) -> Any:
    """A tree of arrays, on every local device."""
    mesh = local_mesh()
    return params if mesh.size == 1 else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


def over_windows(run: Callable[[Any, Mapping[str, Array]], Result], params: Any, batch: Mapping[str, Array]) -> Result:
    """`run(params, batch)` with the windows of the batch spread over the local devices, on each of them in blocks.

    A batch that does not divide by the number of devices runs on one of them.

    Args:
        run: (params, arrays `(b, ...)` by name) -> an array or tree of arrays `(b, ...)`, each window by itself.
        params: best from `on_local_devices`.
        batch: arrays `(B, ...)`.
    """
    mesh, rows = local_mesh(), next(iter(batch.values())).shape[0]

    def blocks(params: Any, batch: Mapping[str, Array]) -> Result:
        return in_blocks(functools.partial(run, params), batch)

    if mesh.size == 1 or not isinstance(rows, int) or rows % mesh.size:
        return blocks(params, batch)
    windows = PartitionSpec(WINDOWS)
    spread = jax.shard_map(blocks, mesh=mesh, in_specs=(PartitionSpec(), windows), out_specs=windows, check_vma=False)
    return spread(params, batch)
