"""Speed beside its peers on this machine: `python -m benchmarks.speed [--quick] [--only NAME] [--device-note TEXT]`.

Every case (a model at a batch size, a scan at a shape, ...) has several variants: ours, and what a user could pick
instead. Each library runs in a process of its own (`workers/jax_worker.py`, `workers/torch_worker.py`), and the
processes take turns: one call of each variant per round, in changing order, so that outside load meets all of them.
Printed are medians, the spread (quartiles), ratios of the medians to ours, and temporaries where the compiler tells
them.

PyTorch peers: a twin of the model under the published parameter names (checked against the reference in the test suite)
with the plain scan loop, with a lean loop, with mamba.py's parallel scan, and under `torch.compile`. They are installed
into `.cache/benchmark-peers`, an environment of their own. Results go to `benchmarks/results/speed.json`, which `python
-m benchmarks.plot_speed` draws.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PEERS = ROOT / ".cache" / "benchmark-peers"
PEER_PACKAGES = ("torch==2.13.0", "mambapy", "numpy", "safetensors")


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as printed.
        kind: what the workers run: "evaluate", "train", "scan", "scan_gradient", "long".
        size: of the case, as the kind wants it: a batch, or (batch, length).
        ours: variants of the JAX worker; the first is the one that ratios are taken to.
        peers: variants of the PyTorch worker.
        rounds: calls of each variant.
    """

    name: str
    kind: str
    size: Sequence[int]
    ours: Sequence[str]
    peers: Sequence[str]
    rounds: int = 9
    model: str = "LuMamba tiny"


def cases() -> list[Case]:
    """The table of the speed issue."""
    models = ("plain", "compiled")
    evaluations = [
        Case(f"LuMamba tiny, evaluation, batch {n}", "evaluate", (n,), ("ours",), models, 9 if n < 64 else 5)
        for n in (1, 16, 64)
    ]
    training = [Case(f"LuMamba tiny, training step, batch {n}", "train", (n,), ("ours",), models, 3) for n in (16, 64)]
    scans = [
        Case(
            f"scan forward, {b} x {length}", "scan", (b, length), ("auto", "associative"), ("plain", "lean", "pscan"), 5
        )
        for b, length in ((64, 32), (8, 512), (1, 4096))
    ]
    scans.append(Case("scan forward, 1 x 20480", "scan", (1, 20480), ("auto",), ("plain",), 3))
    gradients = [
        Case(f"scan forward + backward, {b} x {length}", "scan_gradient", (b, length), ("auto",), ("pscan",), 3)
        for b, length in ((8, 512), (1, 4096))
    ]
    luna = [
        Case(f"LUNA base, evaluation, batch {n}", "evaluate", (n,), ("ours",), ("plain",), 5, "LUNA base")
        for n in (16, 64)
    ]
    long = [Case("one window of 20480 patches", "long", (20480,), ("streamed", "at once"), ("plain",), 3)]
    return [*evaluations, *training, *scans, *gradients, *luna, *long]


@dataclass
class Worker:
    """A process that prepares a variant once and then times calls of it."""

    command: Sequence[str]
    process: subprocess.Popen[str] | None = None
    prepared: set[str] = field(default_factory=set)

    def ask(self, **request: object) -> dict:
        """One request, one answer (JSON lines)."""
        if self.process is None:
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'parity'}", "JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.command[-1]} ended while it ran {request}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def install_peers() -> Path:
    """The Python of the peers' environment, made when it is not there."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(PEER_PACKAGES)} into {PEERS.relative_to(ROOT)}")
        venv.create(PEERS, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
    return python


def measure(case: Case, jax_worker: Worker, torch_worker: Worker, *, rounds: int | None = None) -> dict:
    """Prepare every variant (compiling, first call), then time them in turns."""
    variants = [(jax_worker, "jax", name) for name in case.ours] + [
        (torch_worker, "torch", name) for name in case.peers
    ]
    request = {"kind": case.kind, "size": list(case.size), "model": case.model}
    facts, times = {}, {}
    for worker, library, name in variants:
        answer = worker.ask(do="prepare", variant=name, **request)
        facts[f"{library}: {name}"] = answer
        if "problem" not in answer:
            times[f"{library}: {name}"] = []
    usable = [variant for variant in variants if f"{variant[1]}: {variant[2]}" in times]
    for _ in range(rounds or case.rounds):
        for worker, library, name in random.sample(usable, len(usable)):
            times[f"{library}: {name}"].append(worker.ask(do="time", variant=name, **request)["seconds"])
    for worker in (jax_worker, torch_worker):
        worker.ask(do="forget")
    return {"name": case.name, "kind": case.kind, "variants": {k: _summary(times.get(k), facts[k]) for k in facts}}


def _summary(seconds: list[float] | None, facts: dict) -> dict:
    if not seconds:
        return {"problem": facts["problem"]}
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {**facts, "median_ms": 1e3 * statistics.median(seconds), "quartiles_ms": [1e3 * q for q in quartiles[::2]]}


def print_case(result: dict) -> None:
    """The lines of one case."""
    print(f"\n{result['name']}")
    first = next(iter(result["variants"].values()))["median_ms"]
    for name, facts in result["variants"].items():
        if "problem" in facts:
            print(f"  {name:<20} {facts['problem']}")
            continue
        low, high = facts["quartiles_ms"]
        extra = f"  temporaries {facts['temporary_mb']:,.0f} MB" if "temporary_mb" in facts else ""
        ratio = facts["median_ms"] / first
        print(f"  {name:<20} {facts['median_ms']:>10,.1f} ms  ({low:,.1f} to {high:,.1f})  {ratio:>6.2f} x ours{extra}")
    sys.stdout.flush()


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="two rounds of each")
    parser.add_argument("--device-note", default="", help="what else is to be known about the machine")
    args = parser.parse_args()
    chosen = [case for case in cases() if not args.only or any(part in case.name for part in args.only)]
    workers = [
        Worker([sys.executable, "-m", "benchmarks.workers.jax_worker"]),
        Worker([str(install_peers()), "-m", "benchmarks.workers.torch_worker"]),
    ]
    results = {"machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}}
    results["machine"]["note"] = args.device_note
    results["versions"] = {key: value for worker in workers for key, value in worker.ask(do="versions").items()}
    print(json.dumps(results, indent=2))
    results["cases"] = []
    for case in chosen:
        results["cases"].append(measure(case, *workers, rounds=2 if args.quick else None))
        print_case(results["cases"][-1])
    for worker in workers:
        worker.close()
    if not args.only:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\n{RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
