"""Plans of the published pre-trainings on TPU slices, and the tables of docs/pods.md.

`python -m benchmarks.pod_plans [--only TEXT] [--again]` compiles what has no file in `benchmarks/results` yet, one
after the other, each in a process of its own (minutes and gigabytes each), and writes the tables.
`python -m benchmarks.pod_plans --tables` only writes the tables.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- tables of benchmarks/pod_plans.py -->", "<!-- end of tables -->"

TOPOLOGIES = ("v5e:16x16", "v5p:8x8x8", "v6e:8x8", "v4:4x4x4")
HUGE = ("--model.embed-dim", "128", "--model.num-queries", "8", "--model.num-blocks", "24")
BFLOAT16 = ("--model.compute-dtype", "bfloat16", "--trainer.non-finite", "stop")
# Name -> preset and overrides; the batches are the published ones (32,640 and 8,160) as the next powers of 2.
MODELS = {
    "lumamba_tiny": ("pretrain_lumamba_tiny", *BFLOAT16, "--loader.batch-size", "32768"),
    "luna_huge": ("pretrain_luna_base", *HUGE, *BFLOAT16, "--loader.batch-size", "8192"),
    "luna_huge_40960": ("pretrain_luna_base", *HUGE, *BFLOAT16, "--loader.batch-size", "40960"),
}
ONLY_ON = {"luna_huge_40960": ("v5e:16x16",)}  # as many windows per chip as scale with 90 %


def result_file(model: str, topology: str) -> Path:
    """Where the figures of one plan lie."""
    return RESULTS / f"pod_plan_{model}_{topology.replace(':', '_')}.json"


def plan(model: str, topology: str) -> None:
    """Compile one plan and keep its figures."""
    preset, *overrides = MODELS[model]
    command = [sys.executable, "-m", "lumamba_jax.pod_plan", preset, "--topology", topology, "--weak-scaling"]
    print(f"{model} on {topology}", flush=True)
    done = subprocess.run([*command, "--json", str(result_file(model, topology)), *overrides], cwd=ROOT)
    if done.returncode:
        print(f"  exit status {done.returncode}", flush=True)


def tables() -> str:
    """Markdown of all results that exist."""
    found = [
        (model, json.loads(path.read_text()))
        for model in MODELS
        for topology in ONLY_ON.get(model, TOPOLOGIES)
        if (path := result_file(model, topology)).is_file()
    ]
    parts = [_table(SUMMARY, found), _table(COLLECTIVES, found)]
    return "\n\n".join(parts)


def _row_of_summary(model: str, p: dict) -> list[str]:
    step, seconds = p["step"], p["estimate_seconds"]
    return [
        f"{model} {p['topology']}",
        f"{p['config']['loader']['batch_size']:,} ({p['rows_per_chip']})",
        f"{step['memory_bytes'] / 2**30:.2f} of {p['hbm_bytes'] / 2**30:.0f}",
        f"{p['model_flops_per_chip'] / 1e12:.2f}",
        f"{step['hbm_bytes'] / 1e9:.1f}",
        " / ".join(f"{seconds[name] * 1e3:.1f}" for name in ("compute", "memory", "program", "send", "step")),
        f"{p['windows_per_second']:,.0f}",
        f"{p['mfu']:.1%}",
        f"{24 * p['days']:.2f}",
        "{least:.1%} ({expected:.1%})".format(**list(p["weak_scaling"].values())[-1]),
        f"{step['compile_seconds']:.0f}",
    ]


def _row_of_collectives(model: str, p: dict) -> list[str]:
    collectives = p["step"]["collectives"]
    shown = "; ".join(f"{c['count']} x {c['kind']} of {c['size']:,} over {c['group']}" for c in collectives[:6])
    rest = collectives[6:]
    if rest:
        shown += f"; {sum(c['count'] for c in rest)} more, {sum(c['size'] * c['count'] for c in rest):,} bytes together"
    return [f"{model} {p['topology']}", shown]


SUMMARY = (
    "model and slice | batch (per chip) | HBM GiB per chip | model TFLOP | HBM GB | "
    "compute / memory / program / send / step, ms | windows/s | MFU | run, hours | "
    "weak scaling to 256 chips, least (expected) | "
    "compiled in, s",
    _row_of_summary,
)
COLLECTIVES = ("model and slice | collectives of one step, bytes per chip", _row_of_collectives)


def _table(kind: tuple, found: list[tuple[str, dict]]) -> str:
    head, row = kind
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join(lines + [f"| {' | '.join(row(model, p))} |" for model, p in found])


def write_tables() -> None:
    """Put the tables between their marks in the page."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN, 1)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only plans whose name, 'lumamba_tiny v5e:16x16', contains this")
    parser.add_argument("--again", action="store_true", help="also what has a file already")
    parser.add_argument("--tables", action="store_true", help="compile nothing")
    options = parser.parse_args()
    for model in () if options.tables else MODELS:
        for topology in ONLY_ON.get(model, TOPOLOGIES):
            missing = options.again or not result_file(model, topology).is_file()
            if missing and options.only in f"{model} {topology}":
                plan(model, topology)
    write_tables()


if __name__ == "__main__":
    main()
