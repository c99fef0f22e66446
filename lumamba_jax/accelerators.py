"""Documented figures of accelerators, and how long a collective takes on their interconnect.

TPUs of one slice form a torus or mesh of the given shape with one link each way between neighbours; GPUs of one node
reach each other through a switch. Nothing here was measured by us.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GIB = 2**30
HOP_SECONDS = 1e-6
"""Latency between neighbours; about a microsecond ("How To Scale Your Model", jax-ml.github.io/scaling-book/tpus)."""


@dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
        name: as in a topology, "v5e".
        kind: "tpu" or "gpu".
        bfloat16_flops: peak of dense bfloat16 products, FLOP/s.
        float32_flops: peak of float32 products at JAX's default precision (one bfloat16 pass on a TPU, TF32 on a GPU).
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s.
        links: to neighbours (TPU), or 1 to the switch (GPU).
        link_bandwidth: bytes/s of one link in one direction.
        wraps_at: a side of a slice is closed to a ring when it is a multiple of this (TPU).
        clock: Hz; None where it is not needed (GPU).
    """

    name: str
    kind: Literal["tpu", "gpu"]
    bfloat16_flops: float
    float32_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    wraps_at: int = 1
    clock: float | None = None


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables of key specifications, read in 2026. The interconnect is
# given there per chip and in both directions together (v5e 400 GB/s, v5p 1200, v6e 800), here per link (4, 6, 4 of
# them) and direction. v4: six links of 50 GB/s (Jouppi et al., arXiv 2304.01433, table 4). Sides of 16 close in v5e and
# v6e, multiples of 4 in v4 and v5p (scaling-book, as above). The clock follows from the peak and the matrix units,
# which multiply 128 x 128 numbers in a cycle: 8 units in a chip of v4 and v5p, 4 in v5e; 4 of 256 x 256 in v6e.
# GPU: the data sheets of the SXM modules, without sparsity: nvidia.com/en-us/data-center/{a100,h100,h200}. NVLink's 600
# and 900 GB/s are both directions together.
ACCELERATORS: Mapping[str, Accelerator] = {
    chip.name: chip
    for chip in (
        Accelerator("v4", "tpu", 275e12, 275e12, 32 * GIB, 1200e9, 6, 50e9, wraps_at=4, clock=1.05e9),
        Accelerator("v5e", "tpu", 197e12, 197e12, 16 * GIB, 819e9, 4, 50e9, wraps_at=16, clock=1.5e9),
        Accelerator("v5p", "tpu", 459e12, 459e12, 95 * GIB, 2765e9, 6, 100e9, wraps_at=4, clock=1.75e9),
        Accelerator("v6e", "tpu", 918e12, 918e12, 32 * GIB, 1600e9, 4, 100e9, wraps_at=16, clock=1.75e9),
        Accelerator("a100", "gpu", 312e12, 156e12, 80e9, 2039e9, 1, 300e9),
        Accelerator("h100", "gpu", 989e12, 494e12, 80e9, 3350e9, 1, 450e9),
        Accelerator("h200", "gpu", 989e12, 494e12, 141e9, 4800e9, 1, 450e9),
    )
}


# `jax.Device.device_kind` -> name; JAX calls v5e and v6e "lite".
_KINDS = (
    (r"tpu v4\b", "v4"),
    (r"tpu v5 ?(lite|e)\b", "v5e"),
    (r"tpu v5p?\b", "v5p"),
    (r"tpu v6 ?(lite|e)\b", "v6e"),
    (r"\ba100\b", "a100"),
    (r"\bh100\b", "h100"),
    (r"\bh200\b", "h200"),
)


def documented(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `device_kind` ("TPU v5 lite", "NVIDIA H200"); None when it is not in the table."""
    found = (name for pattern, name in _KINDS if re.search(pattern, device_kind.lower()))
    name = next(found, None)
    return None if name is None else ACCELERATORS[name]


@dataclass(frozen=True)
class Topology:
    """Chips of one kind, connected: `shape` is the slice's for TPUs, `(n,)` for n GPUs of one node."""

    chip: Accelerator
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """`v5e:16x16`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a chip can send in a collective over all chips: its links that lead to another chip.

        A side that is not closed to a ring counts one link, since its ends have no more.
        """
        if self.chip.kind == "gpu":
            return self.chip.link_bandwidth
        sides = [n for n in self.shape if n > 1]
        return self.chip.link_bandwidth * sum(2 if self._is_ring(n) else 1 for n in sides)

    @property
    def hops(self) -> int:
        """Steps between neighbours that a value needs to reach every chip."""
        if self.chip.kind == "gpu":
            return 1
        return sum(n // 2 if self._is_ring(n) else n - 1 for n in self.shape)

    def collective_seconds(self, kind: str, size: float, group: int) -> float:
        """Time of one collective, alone on the interconnect: bytes over bandwidth, and the latency of its hops.

        An all-reduce of `size` bytes over n chips sends 2 (n-1)/n of them from each chip (reduce-scatter, then
        all-gather), an all-gather (or reduce-scatter) whose result (or operand) has `size` bytes half of that, and an
        all-to-all as much again, of which a quarter crosses the middle of a ring. A group is taken to have the whole
        slice's links: it is an optimist's figure where it lies along one side.

        Args:
            kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
            size: bytes per chip, the larger of operand and result.
            group: chips that take part.
        """
        if group < 2:
            return 0.0
        sent = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}.get(kind, (group - 1) / group)
        passes = 2 if kind == "all-reduce" else 1
        share = self.hops * min(1.0, group / self.size)
        return sent * size / self.bandwidth + passes * max(1.0, share) * HOP_SECONDS

    def _is_ring(self, side: int) -> bool:
        return side > 2 and side % self.chip.wraps_at == 0


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:8x8x8`, `h100:8`. Raises ValueError that says what is wrong and what is known."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    known = ", ".join(ACCELERATORS)
    if not match:
        raise ValueError(f"topology {text!r} must be ACCELERATOR:SHAPE, as in v5e:16x16 or h100:8 (known: {known})")
    name, shape = match[1], tuple(int(n) for n in match[2].split("x"))
    if name not in ACCELERATORS:
        raise ValueError(f"topology {text!r}: accelerator {name!r} is unknown; known are {known}")
    chip = ACCELERATORS[name]
    wanted = 1 if chip.kind == "gpu" else chip.links // 2
    if len(shape) != wanted or min(shape) < 1:
        example = {1: f"{name}:8", 2: f"{name}:4x4", 3: f"{name}:4x4x4"}[wanted]
        raise ValueError(f"topology {text!r}: {name} has {wanted} positive side(s), as in {example}")
    return Topology(chip, shape)
