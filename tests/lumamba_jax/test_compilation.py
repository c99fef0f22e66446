"""Windows spread over devices give the numbers of one device; cores and the store of compiled programs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax.compilation import in_blocks, on_local_devices, over_windows


def scaled(params, batch):
    """Depends on the window alone."""
    return {"sum": (batch["x"] * params["w"][None]).sum(1), "square": batch["x"] ** 2}


@pytest.mark.parametrize("rows", [1, 6, 8, 64])
def test_windows_over_devices_and_blocks_are_those_of_one_device(rows):
    batch = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((rows, 3), np.float32))}
    params = on_local_devices({"w": jnp.arange(3.0)})
    out = jax.jit(lambda p, b: over_windows(scaled, p, b))(params, batch)
    expected = scaled({"w": jnp.arange(3.0)}, batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), out, expected)
    assert len(out["sum"].sharding.device_set) == jax.local_device_count()
    assert out["sum"].sharding.is_fully_replicated == (rows % jax.local_device_count() != 0)


def test_devices_exchange_nothing():
    batch = {"x": jnp.zeros((64, 3))}
    program = jax.jit(lambda p, b: over_windows(scaled, p, b)).lower(on_local_devices({"w": jnp.zeros(3)}), batch)
    text = program.compile().as_text()
    assert not [op for op in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if op in text]


def test_blocks_hold_activations_of_one_block_only():
    def wide(batch):
        return jnp.sin(jnp.tile(batch["x"], (1, 1000)).cumsum(1)).sum(1)

    batch = {"x": jnp.zeros((64, 3))}
    sizes = [
        jax.jit(lambda b, n=n: in_blocks(wide, b, block=n)).lower(batch).compile().memory_analysis().temp_size_in_bytes
        for n in (8, 64)
    ]
    assert sizes[0] < sizes[1] / 4


PROCESS = """
import json, sys, jax
from lumamba_jax.compilation import enable_compilation_cache, use_cpu_cores
use_cpu_cores(3)
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
problem = ""
try:
    use_cpu_cores(2)
except RuntimeError as error:
    problem = str(error)
print(json.dumps([jax.local_device_count(), jax.config.jax_compilation_cache_dir, problem]))
"""


@pytest.mark.parametrize("chosen", [False, True])
def test_a_fresh_process_takes_the_cores_and_keeps_its_programs(tmp_path, chosen):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    done = subprocess.run([sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True)
    devices, directory, problem = json.loads(done.stdout.splitlines()[-1])
    assert devices == 3
    expected = tmp_path / "own" if chosen else tmp_path / "cache" / "lumamba_jax"
    assert directory.startswith(str(expected))
    assert any(path.is_file() for path in expected.rglob("*"))
    assert problem, "the number of devices was changed under a running JAX"
