"""Speed beside its peers on this machine: `python -m benchmarks.speed [--only NAME] [--quick] [--device gpu]`.

Every case (a model at a batch size, a scan at a shape, ...) has several variants: ours, and what a user could pick
instead (`speed_cases.py`, with what each case has to reach). Each library runs in a process of its own, and the
processes take turns in changing order: a pause, a call that is not timed, then calls for 0.3 s (one where a call is
long). A turn is the median of its calls, a variant the median of its turns, the spread their quartiles (`turns.py`).
Preparing or calling a variant may take `--limit` seconds; what takes longer or crashes is reported, the rest goes on.

Ours: "jax" is one XLA device whose threads share every operation, "jax devices" has one device per core and spreads
windows over them (`compilation.use_cpu_cores`). Ratios are to the faster of the two.

PyTorch peers: a twin of the model under the published parameter names (checked against the reference in the test suite)
with the plain scan loop, with a lean loop, with mamba.py's parallel scan, and under `torch.compile`; for LUNA also
braindecode's. They are installed into `.cache/benchmark-peers`, an environment of their own (`peers.py`).

The roofline is the time of the matrix products (`flops.folded_flops`) at the rate of a 2048^3 product plus that of the
transcendental functions (`flops.transcendentals`) at their rates in cache, both measured in the same run; each of these
rates includes the function's own elementwise operations, and a bin's magnitude and phase are charged as a GELU.

A full run is kept in `benchmarks/results/speed.json`, which `python -m benchmarks.plot_speed` draws; a run with
`--only` is kept where `--out` says.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cold import first_result, night
from benchmarks.peers import install_peers
from benchmarks.speed_cases import Target, cpu_cases, cpu_targets, gpu_cases, gpu_targets
from benchmarks.turns import ROOT, Worker, WorkerError, measure

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
SPECIAL = ("roofline", "FLOPs", "first result", "night")
"""Cases without variants that take turns."""
ROOFLINE_CASE, ROOFLINE_MODEL = "LuMamba tiny, evaluation, batch 64", "LuMamba tiny"


def make_workers(device: str, limit: float) -> dict[str, Worker]:
    """A process for each library; nothing is started before its first request."""
    jax_platform = {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda"}
    jax_worker = [sys.executable, "-m", "benchmarks.workers.jax_worker"]
    torch_worker = [str(install_peers()), "-m", "benchmarks.workers.torch_worker"]
    torch_device = {"BENCHMARK_DEVICE": "cpu" if device == "cpu" else "cuda"}
    workers = {
        "jax": Worker("jax", [*jax_worker, "1"], jax_platform, limit),
        "torch": Worker("torch", torch_worker, torch_device, limit),
    }
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers["jax devices"] = Worker("jax devices", [*jax_worker, str(cores)], jax_platform, limit)
    return workers


def machine(note: str) -> dict:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {"processor": model, "cores": os.cpu_count(), "load before": load_average(), "note": note}


def load_average() -> float | None:
    """Of the last minute, the benchmark included: on a machine of n cores, more than about n means company."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def special(name: str, results: Mapping[str, dict], workers: Mapping[str, Worker], args: argparse.Namespace) -> dict:
    """One of `SPECIAL`; a problem is a result too."""
    environment = workers["jax"].environment
    try:
        if name == "roofline":
            return roofline(results, workers["jax"].ask(do="work", model=ROOFLINE_MODEL, dtype="float32"))
        if name == "FLOPs":
            answer = workers["jax"].ask(do="flops")
            if "problem" in answer:
                return {"name": name, "kind": "count", "problem": answer["problem"]}
            furthest = max(abs(row["percent"]) for row in answer.values())
            return {"name": name, "kind": "count", "rows": answer, "values": {"furthest": furthest}}
        if name == "first result":
            return first_result(rounds=args.rounds or 3, limit=args.limit, environment=environment)
        return night(hours=args.hours, limit=2 * args.limit, environment=environment)
    except (WorkerError, RuntimeError, OSError, subprocess.TimeoutExpired) as problem:
        return {"name": name, "kind": "process", "problem": str(problem)}


def roofline(results: Mapping[str, dict], work: dict[str, Any]) -> dict:
    """Predicted time of one window from the rates of the same run, over the measured one.

    Args:
        results: with the cases "rates" and `ROOFLINE_CASE`.
        work: FLOPs and transcendental operations of one window (`jax_worker.work`).
    """
    rates = results.get("rates", {}).get("variants", {})
    batch = results.get(ROOFLINE_CASE, {"variants": {}, "size": [64]})
    measured = [v["median_ms"] for k, v in batch["variants"].items() if k.startswith("jax") and "median_ms" in v]
    needed = ("gemm", "exp", "silu", "softplus", "gelu")
    if not measured or any("per_second" not in rates.get(f"jax: {name}", {}) for name in needed):
        return {"name": "roofline", "kind": "count", "problem": f"needs the cases rates and {ROOFLINE_CASE}"}
    per_second = {name: rates[f"jax: {name}"]["per_second"] for name in needed}
    charged_as: dict[str, str] = {"softmax": "exp", "spectrum": "gelu"}
    parts = {"gemm": 1e6 * work["flops"] / per_second["gemm"]}
    counts: dict[str, float] = work["transcendentals"]
    for function, count in counts.items():
        name = charged_as.get(function, function)
        parts[name] = parts.get(name, 0.0) + 1e6 * count / per_second[name]
    per_window = 1e3 * min(measured) / batch["size"][0]
    values = {"predicted us": sum(parts.values()), "measured us": per_window}
    values |= {f"{name} us": microseconds for name, microseconds in parts.items()}
    values |= {"share": 100 * values["predicted us"] / per_window, "GFLOP/s": per_second["gemm"] / 1e9}
    values["MFU of nominal FLOPs"] = 100 * 1e6 * work["nominal_flops"] / per_second["gemm"] / per_window
    return {"name": "roofline", "kind": "count", "values": values}


def with_rates(case: dict) -> dict:
    """What a call does ("work") per second, where a worker said it."""
    for facts in case["variants"].values():
        if "work" in facts and "median_ms" in facts:
            facts["per_second"] = 1e3 * facts["work"] / facts["median_ms"]
    return case


# ---- printing -------------------------------------------------------------------------------------------------------


def case_lines(case: dict) -> list[str]:
    """Markdown of one case."""
    load = f" (load {case['load']:.1f})" if case.get("load") is not None else ""
    lines = ["", f"**{case['name']}**{load}", ""]
    if "problem" in case:
        return [*lines, case["problem"]]
    if "values" in case:
        lines += [f"- {name}: {number:,.4g}" for name, number in case["values"].items()]
        rows = case.get("rows", {})
        lines += [
            f"- {k}: formula {v['formula']:,.0f}, XLA {v['xla']:,.0f}, {v['percent']:+.1f} %" for k, v in rows.items()
        ]
        return lines
    variants = case["variants"]
    ours = [facts["median_ms"] for name, facts in variants.items() if name.startswith("jax") and "median_ms" in facts]
    lines += ["| variant | median, ms | quartiles | times ours | memory |", "|---|---|---|---|---|"]
    for name, facts in variants.items():
        if "median_ms" not in facts:
            lines.append(f"| {name} | {facts.get('problem', 'not timed')} | | | |")
            continue
        low, high = facts["quartiles_ms"]
        ratio = f"{facts['median_ms'] / min(ours):.2f}" if ours and case["kind"] != "rate" else ""
        spread = f"{low:,.1f} to {high:,.1f}"
        lines.append(f"| {name} | {facts['median_ms']:,.1f} | {spread} | {ratio} | {_notes(facts)} |")
    return lines


def _notes(facts: Mapping[str, float]) -> str:
    notes = []
    if "temporary_mb" in facts:
        notes.append(f"temporaries {facts['temporary_mb']:,.1f} MB")
    if "peak_growth_mb" in facts:
        notes.append(f"peak +{facts['peak_growth_mb']:,.0f} MB")
    if "per_second" in facts:
        notes.append(f"{facts['per_second'] / 1e9:,.2f} G/s")
    notes += [f"{part} {facts[f'{part}_s']:.2f} s" for part in ("import", "load", "first") if f"{part}_s" in facts]
    return ", ".join(notes)


def target_lines(targets: list[Target], results: Mapping[str, dict], *, only_measured: bool) -> list[str]:
    """Markdown of what had to be reached."""
    lines = ["", "| what | floor | goal | measured | verdict |", "|---|---|---|---|---|"]
    for target in targets:
        figure = target.read(results)
        if figure is None and only_measured:
            continue
        shown = "-" if figure is None else f"{figure:,.3g} {target.unit}"
        bounds = f"{target.floor:,.4g} | {target.goal:,.4g}"
        lines.append(f"| {target.what} | {bounds} | {shown} | {target.verdict(figure)} |")
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, help="turns of each variant, instead of each case's own number")
    parser.add_argument("--quick", action="store_true", help="two turns of each")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that preparing or a turn may take")
    parser.add_argument("--hours", type=float, default=8.0, help="of the night")
    parser.add_argument("--out", type=Path, help="where the results go; a full run has a place of its own")
    parser.add_argument("--device-note", default="", help="what else is to be known about the machine")
    args = parser.parse_args(arguments)
    if (args.rounds is not None and args.rounds < 1) or args.limit <= 0 or args.hours <= 0:
        parser.error("--rounds, --limit and --hours must be positive")
    args.rounds = 2 if args.quick else args.rounds
    if args.out is None and not args.only:
        args.out = RESULTS if args.device == "cpu" else RESULTS.with_name("speed-gpu.json")
    return args


def chosen(args: argparse.Namespace) -> tuple[list, list[str]]:
    """The cases and the names of `SPECIAL` to run; the roofline brings what it is made of."""
    cases = cpu_cases() if args.device == "cpu" else gpu_cases()
    names = SPECIAL if args.device == "cpu" else ()
    if not args.only:
        return cases, list(names)
    extra = [name for name in names if any(part in name for part in args.only)]
    parts = [*args.only, *(("rates", ROOFLINE_CASE) if "roofline" in extra else ())]
    return [case for case in cases if any(part in case.name for part in parts)], extra


def main(arguments: list[str] | None = None) -> int:
    """Run, print, save. Exit status 0, or 2 where nothing could be run (one sentence)."""
    args = parse(arguments)
    cases, extra = chosen(args)
    if not cases and not extra:
        print(f"no case is called {' or '.join(args.only)}", file=sys.stderr)
        return 2
    workers = make_workers(args.device, args.limit)
    try:
        needed = {variant.split(": ")[0] for case in cases for variant in case.variants} | {"jax"}
        versions = {key: value for name in sorted(needed) for key, value in workers[name].ask(do="versions").items()}
        if "problem" in versions:
            raise WorkerError(f"a library finds no device or is not there ({versions['problem']})")
        report = run(cases, extra, workers, args, {"machine": machine(args.device_note), "versions": versions})
    except WorkerError as problem:
        print(f"the benchmark could not start on {args.device}: {problem}", file=sys.stderr)
        return 2
    finally:
        for worker in workers.values():
            worker.close()
    targets = cpu_targets() if args.device == "cpu" else gpu_targets()
    by_name = {case["name"]: case for case in report["cases"]}
    print("\n".join(target_lines(targets, by_name, only_measured=bool(args.only))))
    return 0


def run(cases: list, extra: list[str], workers: Mapping[str, Worker], args: argparse.Namespace, report: dict) -> dict:
    """Every case, printed and kept as it is done; `report` grows by "cases"."""
    print(json.dumps(report, indent=2), flush=True)
    report = {**report, "cases": []}
    partial = None if args.out is None else args.out.with_suffix(".partial.json")
    steps = [(case.name, case) for case in cases] + [(name, None) for name in extra]
    for name, case in steps:
        if case is not None:
            result = with_rates(measure(case, workers, rounds=args.rounds))
        else:
            result = special(name, {done["name"]: done for done in report["cases"]}, workers, args)
        report["cases"].append({**result, "load": load_average()})
        print("\n".join(case_lines(report["cases"][-1])), flush=True)
        if partial is not None:
            partial.write_text(json.dumps(report, indent=2) + "\n")
    if args.out is not None and partial is not None:
        partial.replace(args.out)
        print(f"\nkept in {args.out}")
    return report


if __name__ == "__main__":
    sys.exit(main())
