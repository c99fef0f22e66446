"""The cases of `benchmarks.speed`, and what each has to reach (the table of the speed issue).

A variant is named "library: name"; the libraries are "jax" (one XLA device), "jax devices" (one per core) and "torch".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.workers.sizes import STATES, WIDTH

CaseResults = Mapping[str, dict]
"""The JSON of each case, by its name."""


@dataclass(frozen=True)
class Case:
    """Variants that compute the same.

    Attributes:
        name: as printed.
        kind: what the workers prepare: "evaluate", "train", "scan", "scan_gradient", "long", "long_train", "rate".
        size: as the kind wants it: (batch,), (batch, length), (patches,).
        variants: ours first.
        rounds: turns of each.
        model: a published size.
        dtype: of activations.
        pause, fill: seconds of rest before a turn, and of timed calls in it.
    """

    name: str
    kind: str
    size: Sequence[int]
    variants: Sequence[str]
    rounds: int = 5
    model: str = "LuMamba tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    pause: float = 0.3
    fill: float = 0.3


@dataclass(frozen=True)
class Target:
    """One figure of the issue's table.

    Attributes:
        what: the row.
        floor, goal: what it must and should reach.
        read: the figure from the results, None where it was not measured.
        unit: behind the figure; "x" are multiples of our time.
        less: whether less is better.
    """

    what: str
    floor: float
    goal: float
    read: Callable[[CaseResults], float | None]
    unit: str = "x"
    less: bool = False

    def verdict(self, value: float | None) -> str:
        """ "goal", "floor", "below the floor" or "not measured"."""
        if value is None:
            return "not measured"
        sign = -1 if self.less else 1
        if sign * value >= sign * self.goal:
            return "goal"
        return "floor" if sign * value >= sign * self.floor else "below the floor"


OURS = ("jax: ours", "jax devices: ours")
COMPILED = ("torch: compiled", "torch: chunk")
SCANS = ((64, 32), (8, 512), (1, 4096), (1, 20480))
LONG = 20480
RATES = ("gemm", "exp", "silu", "softplus", "gelu")
"""GEMM peak, and elements per second of each transcendental function on all cores."""


def cpu_cases() -> list[Case]:
    """Every timed case on a CPU."""
    models = ("torch: plain", *COMPILED)
    cases = [
        Case(f"LuMamba tiny, evaluation, batch {n}", "evaluate", (n,), (*_devices(n), *models), 9 if n < 64 else 7)
        for n in (1, 16, 64)
    ]
    cases.append(Case("rates", "rate", (), tuple(f"jax: {name}" for name in RATES), 7))
    cases += [
        Case(f"LuMamba tiny, training step, batch {n}", "train", (n,), (*_devices(n), *models), 5 if n < 64 else 3)
        for n in (16, 64)
    ]
    cases += [
        Case(_scan_name("forward", *size), "scan", size, ("jax: auto", "jax: associative", *_scan_peers(size)))
        for size in SCANS
    ]
    cases += [
        Case(
            _scan_name("forward + backward", *size),
            "scan_gradient",
            size,
            ("jax: auto", "torch: pscan", "torch: chunk"),
            3,
        )
        for size in SCANS[1:3]
    ]
    peers = ("torch: plain", "torch: compiled", "torch: braindecode")
    cases += [
        Case(f"LUNA base, evaluation, batch {n}", "evaluate", (n,), (*_devices(n), *peers), 5, "LUNA base")
        for n in (16, 64)
    ]
    window = ("jax: streamed", "jax: at once", "torch: plain", "torch: chunk")
    cases.append(Case(f"one window of {LONG} patches", "long", (LONG,), window, 3))
    cases.append(Case("training on a window of 4096 patches", "long_train", (4096,), ("jax: ours",), 3))
    return cases


def gpu_cases() -> list[Case]:
    """The same on a GPU, in bfloat16 and float32; "mamba_ssm" where it can be imported."""
    cases = []
    for dtype in ("bfloat16", "float32"):
        peers = ("torch: plain", *COMPILED, "torch: mamba_ssm")
        note = f", {dtype}"
        cases += [
            Case(f"LuMamba tiny, evaluation, batch {n}{note}", "evaluate", (n,), ("jax: ours", *peers), 7, dtype=dtype)
            for n in (1, 64, 512)
        ]
        cases.append(
            Case(f"LuMamba tiny, training step, batch 64{note}", "train", (64,), ("jax: ours", *peers), 3, dtype=dtype)
        )
        implementations = ("jax: auto", "jax: pallas", "jax: associative")
        scan_peers = ("torch: plain", "torch: chunk", "torch: mamba_ssm")
        for size in ((64, 32), (8, 512), (1, 4096)):
            name = _scan_name("forward", *size) + note
            cases.append(Case(name, "scan", size, (*implementations, *scan_peers), 5, dtype=dtype))
            name = _scan_name("forward + backward", *size) + note
            cases.append(Case(name, "scan_gradient", size, (*implementations, *scan_peers), 5, dtype=dtype))
        luna = ("jax: ours", "torch: plain", "torch: compiled", "torch: braindecode")
        cases.append(Case(f"LUNA base, evaluation, batch 64{note}", "evaluate", (64,), luna, 5, "LUNA base", dtype))
    cases.append(Case("rates", "rate", (), ("jax: gemm", "jax: copy"), 7))
    return cases


def cpu_targets() -> list[Target]:
    """The issue's table for a CPU."""
    plain, best = ("torch: plain",), COMPILED
    targets = []
    for n, floor, goal in ((1, 3.5, 5), (16, 5, 6.5), (64, 6, 8)):
        name = f"LuMamba tiny, evaluation, batch {n}"
        targets.append(Target(f"{name}, against PyTorch plain", floor, goal, times(name, plain)))
    for n, floor, goal in ((1, 2, 3), (16, 1.6, 2.2), (64, 1.8, 2.5)):
        name = f"LuMamba tiny, evaluation, batch {n}"
        targets.append(Target(f"{name}, against the best compiled", floor, goal, times(name, best)))
    targets.append(Target("share of the roofline, batch 64", 70, 85, value("roofline", "share"), "%"))
    for n, floor, goal, peers in ((16, 5, 9, plain), (64, 12, 20, plain), (64, 1.6, 2.5, best)):
        name = f"LuMamba tiny, training step, batch {n}"
        against = "PyTorch plain" if peers is plain else "the best compiled"
        targets.append(Target(f"{name}, against {against}", floor, goal, times(name, peers)))
    for size, floor in zip(SCANS, (8, 7, 9, 10), strict=True):
        name = _scan_name("forward", *size)
        targets.append(Target(f"{name}, against the plain loop", floor, 13, times(name, plain, SCAN)))
    for size in SCANS[1:3]:
        name = _scan_name("forward + backward", *size)
        targets.append(Target(f"{name}, against mamba.py's", 8, 13, times(name, ("torch: pscan",), SCAN)))
        memory = per_item(name, "jax: auto", size[0] * size[1])
        targets.append(Target(f"{name}, temporaries", 32, 32, memory, "KB/token", less=True))
    name = f"one window of {LONG} patches"
    window = ("jax: streamed", "jax: at once")
    targets.append(Target(f"{name}, against PyTorch plain", 11, 18, times(name, plain, window)))
    targets.append(Target(f"{name}, against the best compiled", 4, 7, times(name, best, window)))
    limit = LONG * 8 / 1024 + 64
    streamed = fact(name, "jax: streamed", "peak_growth_mb")
    targets.append(Target(f"{name}, memory", limit, limit, streamed, "MB", less=True))
    targets.append(Target("8-hour night, peak memory", 4, 2, value("night", "peak GB"), "GB", less=True))
    targets.append(Target("8-hour night", 1500, 3000, value("night", "times real time"), "times real time"))
    long_train = per_item("training on a window of 4096 patches", "jax: ours", 4096)
    targets.append(Target("training on long windows, memory", 20, 12, long_train, "KB/patch", less=True))
    for n in (16, 64):
        name = f"LUNA base, evaluation, batch {n}"
        targets.append(Target(f"{name}, against PyTorch", 2, 3, times(name, ("torch: plain", "torch: compiled"))))
        targets.append(Target(f"{name}, against braindecode", 2, 3, times(name, ("torch: braindecode",))))
    targets.append(
        Target("first result, warm cache", 6, 3, seconds("first result", "load, warm cache"), "s", less=True)
    )
    targets.append(Target("FLOPs by formula, furthest from XLA's", 10, 3, value("FLOPs", "furthest"), "%", less=True))
    return targets


def gpu_targets() -> list[Target]:
    """What the issue asks of a GPU."""
    targets = []
    for dtype in ("bfloat16", "float32"):
        for size in ((64, 32), (8, 512), (1, 4096)):
            name = f"{_scan_name('forward', *size)}, {dtype}"
            what = f"{name}, share of the copy bandwidth"
            targets.append(Target(what, 70, 70, copy_share(name, size, 2 if dtype == "bfloat16" else 4), "%"))
    name = "LuMamba tiny, evaluation, batch 64, bfloat16"
    everyone = ("torch: plain", *COMPILED, "torch: mamba_ssm")
    targets.append(Target(f"{name}, against the best of PyTorch", 2, 2, times(name, everyone)))
    return targets


# ---- figures from results -------------------------------------------------------------------------------------------

SCAN = ("jax: auto", "jax: pallas", "jax: associative")


def times(case: str, peers: Sequence[str], ours: Sequence[str] = OURS) -> Callable[[CaseResults], float | None]:
    """The fastest of the peers over the fastest of ours."""

    def read(results: CaseResults) -> float | None:
        variants = results.get(case, {}).get("variants", {})
        own, theirs = (_fastest(variants, names) for names in (ours, peers))
        return theirs / own if own and theirs else None

    return read


def fact(case: str, variant: str, key: str) -> Callable[[CaseResults], float | None]:
    """A number of one variant."""
    return lambda results: results.get(case, {}).get("variants", {}).get(variant, {}).get(key)


def per_item(case: str, variant: str, items: int) -> Callable[[CaseResults], float | None]:
    """Temporaries in KB for each of `items`."""
    read = fact(case, variant, "temporary_mb")
    return lambda results: None if (megabytes := read(results)) is None else megabytes * 1024 / items


def seconds(case: str, variant: str) -> Callable[[CaseResults], float | None]:
    """The median in seconds."""
    read = fact(case, variant, "median_ms")
    return lambda results: None if (milliseconds := read(results)) is None else milliseconds / 1e3


def value(case: str, key: str) -> Callable[[CaseResults], float | None]:
    """A number of a case without variants."""
    return lambda results: results.get(case, {}).get("values", {}).get(key)


def copy_share(case: str, size: tuple[int, int], itemsize: int) -> Callable[[CaseResults], float | None]:
    """Bytes of the scan's inputs and outputs over its time, in % of the rate of a copy."""
    rate = fact("rates", "jax: copy", "per_second")
    traffic = size[0] * size[1] * (4 * WIDTH + 2 * STATES) * itemsize

    def read(results: CaseResults) -> float | None:
        own = _fastest(results.get(case, {}).get("variants", {}), SCAN)
        copied = rate(results)
        return 100 * traffic / (own / 1e3) / copied if own and copied else None

    return read


def _fastest(variants: Mapping[str, dict], names: Sequence[str]) -> float | None:
    found = [variants[name]["median_ms"] for name in names if "median_ms" in variants.get(name, {})]
    return min(found, default=None)


def _devices(batch: int) -> tuple[str, ...]:
    return OURS if batch > 1 else OURS[:1]


def _scan_name(what: str, batch: int, length: int) -> str:
    return f"scan {what}, {batch} x {length}"


def _scan_peers(size: tuple[int, int]) -> tuple[str, ...]:
    rest = () if size[1] == LONG else ("torch: lean", "torch: pscan")
    return ("torch: plain", "torch: chunk", *rest)
