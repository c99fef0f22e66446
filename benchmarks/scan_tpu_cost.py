"""What the fused scan moves on TPUs that are not there: `python benchmarks/scan_tpu_cost.py [--json FILE]`.

Needs the `libtpu` package (the `tpu` extra), no TPU: the kernels are compiled ahead of time for one chip of each
generation. Printed per chip, shape (B x L), dtype and pass (`forward`, and `training` = forward that keeps the tile
states, then backward), in bytes per token:

- floor: every input and output once. Forward: u, delta, z, y of D values and B, C of N; training adds u, delta, z, gy,
  du, ddelta, dz of D and B, C, dB, dC of N. A, the vectors and the states before and after are not in it.
- kernel: what the pipeline of the kernels copies between HBM and VMEM: each block index map is walked over the grid,
  and a block is charged when its index changes, in whole (8, 128) tiles. This is exact for the program as it is
  written, whatever the compiler does around it.
- module: HBM traffic of the compiled module: operands and results of every instruction of its entry computation that
  lie in HBM, in their tiled layout (a kernel's once), and what the compiler copies ahead into a memory on the chip
  (VMEM; CMEM on v4) once. It contains the joining and transposing of B and C and the sums after the backward kernel;
  what stays on the chip between two kernels costs nothing here, which is why it may lie under the other figures.
- XLA: `bytes accessed` of its cost analysis. It trusts the estimate that the kernel states for itself and charges
  copies into VMEM and their use separately, so it is an upper bound where the compiler prefetches.

Nothing is timed: these are counts. `python -m json.tool` of the JSON shows the buffers' sizes as well.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server: there is none
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from lumamba_jax.scan_pallas import pallas_scan

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTH, STATES = 768, 16  # of a LuMamba-tiny block
ITEM_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant", "iota", "copy-start", "slice-start"}


def forward(u, delta, z, A, B, C, skip, bias) -> tuple[jax.Array, jax.Array]:
    return pallas_scan(
        u, delta, A, B, C, D=skip, z=z, delta_bias=bias, delta_softplus=True, backend="tpu", interpret=False
    )


def training(gy, gh, *inputs) -> tuple:
    out, pull = jax.vjp(forward, *inputs)
    return out, pull((gy, gh))


def arguments(batch: int, length: int, dtype, sharding) -> list[jax.ShapeDtypeStruct]:
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    per_step = [array(batch, length, WIDTH, dtype=dtype)] * 3
    per_state = [array(batch, length, STATES, dtype=dtype)] * 2
    return [*per_step, array(STATES, WIDTH), *per_state, array(WIDTH), array(WIDTH)]


def floor_per_token(step: str, item: int) -> int:
    width, states = (4, 2) if step == "forward" else (11, 6)
    return item * (width * WIDTH + states * STATES)


# ---- what the kernels copy ----------------------------------------------------------------------------------------


def kernel_bytes(jaxpr) -> int:
    """Bytes copied by all pallas_calls of a jaxpr, nested ones included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            total += sum(_block_traffic(block, mapping.grid) for block in mapping.block_mappings)
        else:
            total += sum(kernel_bytes(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def _block_traffic(block, grid: tuple[int, ...]) -> int:
    """Copies of one operand over the grid in its order: one each time that its block index changes."""
    points = jnp.asarray(list(itertools.product(*(range(n) for n in grid))), jnp.int32)
    closed = block.index_map_jaxpr
    walk = jax.vmap(lambda point: jnp.stack([jnp.int32(i) for i in _evaluate(closed, point)]))
    indices = np.asarray(walk(points))
    copies = 1 + int((indices[1:] != indices[:-1]).any(1).sum())
    shape = [1 if not isinstance(n, int) else n for n in (getattr(d, "block_size", d) for d in block.block_shape)]
    dtype = block.array_aval.dtype
    whole = [min(n, max(size, 1)) for n, size in zip(shape, block.array_aval.shape, strict=True)]
    return copies * _tiled_bytes(whole[::-1], (8 * 4 // dtype.itemsize, 128), dtype.itemsize)


def _evaluate(closed, point):
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *point)


def _tiled_bytes(minor_first: list[int], tile: tuple[int, ...], item: int) -> int:
    """Size with the most minor dimensions rounded up to the tile (rows, lanes)."""
    padded = list(minor_first)
    for i, n in enumerate(reversed(tile)):
        if i < len(padded):
            padded[i] = math.ceil(padded[i] / n) * n
    return math.prod(padded) * item


# ---- what the compiled module moves -------------------------------------------------------------------------------

SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?([^}]*)\})?")


def _hbm_bytes(text: str) -> int:
    """Bytes of all arrays of a type that lie in HBM, the memory space without a number."""
    total = 0
    for kind, dims, order, tile, rest in SHAPE.findall(text):
        if kind not in ITEM_BYTES or "S(" in rest:
            continue
        sizes = [int(n) for n in dims.split(",") if n]
        minor_first = [sizes[int(i)] for i in order.split(",") if i] or sizes
        total += _tiled_bytes(minor_first, tuple(int(n) for n in tile.split(",")) if tile else (), ITEM_BYTES[kind])
    return total


def module_bytes(hlo: str) -> int:
    """HBM bytes read and written by the entry computation."""
    entry = hlo[hlo.index("\nENTRY") :]
    types, total = {}, 0
    for name, result, operation, operands in re.findall(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\((.*)$", entry, re.M):
        types[name] = result
        if operation in FREE or 'custom_call_target="ConcatBitcast"' in operands:
            continue
        if operation.endswith("-done"):  # a copy between HBM and a memory on the chip: one side of it is in HBM
            total += _hbm_bytes(re.sub(r"S\(\d+\)", "", result))
            continue
        read = re.findall(r"%([\w.-]+)", operands.split("), ")[0])
        total += _hbm_bytes(result) + sum(_hbm_bytes(types[n]) for n in read if n in types)
    return total


# ---- the table ----------------------------------------------------------------------------------------------------


def measure(chip: str, batch: int, length: int, dtype: str, step: str) -> dict:
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    inputs = arguments(batch, length, jnp.dtype(dtype), jax.sharding.SingleDeviceSharding(device))
    if step == "forward":
        function = forward
    else:
        gh = jax.ShapeDtypeStruct((batch, STATES, WIDTH), jnp.float32, sharding=inputs[0].sharding)
        function, inputs = training, [inputs[0], gh, *inputs]
    traced = jax.jit(function).trace(*inputs)
    started = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory, tokens = compiled.memory_analysis(), batch * length
    return {
        "chip": chip,
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "pass": step,
        "floor_bytes_per_token": floor_per_token(step, jnp.dtype(dtype).itemsize),
        "kernel_bytes_per_token": kernel_bytes(traced.jaxpr.jaxpr) / tokens,
        "module_bytes_per_token": module_bytes(compiled.as_text()) / tokens,
        "xla_bytes_per_token": compiled.cost_analysis()["bytes accessed"] / tokens,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "compile_seconds": seconds,
    }


def row(m: dict) -> str:
    floor = m["floor_bytes_per_token"]
    kinds = [m[f"{kind}_bytes_per_token"] for kind in ("kernel", "module", "xla")]
    figures = " | ".join(f"{bytes_:,.0f} ({bytes_ / floor:.2f}x)" for bytes_ in kinds)
    shape = f"{m['batch']} x {m['length']}"
    return f"| {m['chip']} | {shape} | {m['dtype']} | {m['pass']} | {floor:,} | {figures} | {m['temporary_bytes']:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", default=["64x32", "8x512", "1x4096"], help="BATCHxLENGTH")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    options = parser.parse_args()
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("libtpu is not installed: `pip install 'lumamba-jax[tpu]'` brings it; it compiles without a TPU")

    print(f"jax {jax.__version__}, libtpu {libtpu}, D = {WIDTH}, N = {STATES}; bytes per token (ratio to the floor)\n")
    print("| chip | B x L | dtype | pass | floor | kernel | module | XLA | temporaries, bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for chip, shape, dtype in itertools.product(options.chips, options.shapes, options.dtypes):
        batch, length = (int(n) for n in shape.split("x"))
        for step in ("forward", "training"):
            rows.append(measure(chip, batch, length, dtype, step))
            print(row(rows[-1]), flush=True)
    if options.json:
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({"jax": jax.__version__, "libtpu": libtpu, "rows": rows}, indent=1) + "\n")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
