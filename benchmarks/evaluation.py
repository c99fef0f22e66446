"""Evaluation of a store: `python -m benchmarks.evaluation [--windows 1000] [--json FILE]`.

Windows of 5 s and 256 Hz, 19, 32 and 61 channels, through LuMamba tiny with two classes: our side reads an HDF5 store
in padded batches as `eval.py predict` does, PyTorch (the twin, with its scan as a loop, and under `torch.compile`)
reads memory-mapped arrays, a batch of one montage at a time. Both have the same weights; the answers are compared.
Whole passes take turns (`turns.measure`): reading and normalisation are in the time, compilation is not.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import softmax

from benchmarks.peers import install_peers
from benchmarks.speed import load_average, machine
from benchmarks.speed_cases import Case
from benchmarks.turns import ROOT, Worker, WorkerError, measure
from data_pipeline.montages import CHANNEL_ORDERS, montage_of
from data_pipeline.store import StoreInfo, create_store
from lumamba_jax.architectures import SIZES, build
from lumamba_jax.checkpoint import package_versions, save_pretrained
from lumamba_jax.run_log import write_json
from lumamba_jax.torch_weights import to_torch_tensors

RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
SFREQ, SAMPLES, BATCH = 256, 1280, 64
SHARES = {19: 0.4, 32: 0.35, 61: 0.25}
"""Channels -> share of the windows."""


def names_of(count: int) -> tuple[str, ...]:
    """So many electrodes of the 10-05 system, of the largest order that is published."""
    every = max((order for order in CHANNEL_ORDERS.values() if all("-" not in n for n in order)), key=len)
    return tuple(every[:count])


def make_store(folder: Path, windows: int) -> None:
    """The store, the same windows as arrays, and the model in both formats."""
    rng = np.random.default_rng(0)
    counts = [round(share * windows) for share in SHARES.values()]
    counts[-1] = windows - sum(counts[:-1])
    with create_store(folder / "windows.h5", StoreInfo(SFREQ, SAMPLES, SAMPLES / SFREQ)) as writer:
        for channels, count in zip(SHARES, counts, strict=True):
            montage = montage_of(names_of(channels))
            signal = np.cumsum(rng.standard_normal((count, channels, SAMPLES), np.float32), axis=-1)
            writer.add(f"montage_{channels}", signal, montage, subject="s", recording="r",
                       start_samples=np.arange(count) * SAMPLES)  # fmt: skip
            np.save(folder / f"montage_{channels}.npy", signal)
            np.save(folder / f"places_{channels}.npy", np.asarray(montage.locations, np.float32))
    config = SIZES["LuMamba tiny"].replace(head="attention", num_outputs=2)
    params = nnx.split(build(config, seed=0))[1]
    save_pretrained(folder / "model", config, params, {"sfreq": SFREQ})
    save_file(to_torch_tensors(config, params), folder / "weights.safetensors")


def run(windows: int, rounds: int) -> dict:
    """The figures. Raises WorkerError when a library is not there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, windows)
        environment = {"BENCHMARK_STORE": str(folder), "BENCHMARK_BATCH": str(BATCH), "JAX_PLATFORMS": "cpu"}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax_worker = [sys.executable, "-m", "benchmarks.workers.jax_worker", str(cores)]
        torch_worker = [str(install_peers()), "-m", "benchmarks.workers.torch_worker"]
        workers = {"jax": Worker("jax", jax_worker, environment, 900.0)}
        workers["torch"] = Worker("torch", torch_worker, environment | {"BENCHMARK_DEVICE": "cpu"}, 1800.0)
        case = Case("store", "store", (windows,), ("jax: ours", "torch: plain", "torch: compiled"), rounds)
        try:
            versions = {library: worker.ask(do="versions") for library, worker in workers.items()}
            found = measure(case, workers)
        finally:
            for worker in workers.values():
                worker.close()
        found["difference"] = differences(folder)
    for facts in found["variants"].values():
        if "median_ms" in facts:
            facts["windows_per_s"] = 1e3 * windows / facts["median_ms"]
    return {
        "machine": machine("") | {"load after": load_average()},
        "versions": versions | package_versions(),
        "windows": windows,
        "channels": list(SHARES),
        **found,
    }


def differences(folder: Path) -> dict[str, float]:
    """Largest difference of probabilities between ours and each of PyTorch's."""
    (ours,) = folder.glob("jax_*.npy")
    found = {}
    for path in sorted(folder.glob("torch_*.npy")):
        theirs = softmax(np.load(path).astype(np.float64), axis=1)
        found[path.stem] = float(np.abs(theirs - np.load(ours)).max())
    return found


def table(result: dict) -> str:
    """The result as Markdown."""
    ours = result["variants"]["jax: ours"]
    lines = ["| | windows/s | seconds for all | times ours |", "|---|---|---|---|"]
    for name, facts in result["variants"].items():
        if "windows_per_s" not in facts:
            lines.append(f"| {name} | {facts.get('problem', 'not timed')} | | |")
            continue
        ratio = facts["median_ms"] / ours["median_ms"]
        lines.append(f"| {name} | {facts['windows_per_s']:.0f} | {facts['median_ms'] / 1e3:.2f} | {ratio:.2f} |")
    shown = ", ".join(f"{name} {value:.1e}" for name, value in result["difference"].items())
    channels = ", ".join(map(str, result["channels"]))
    return "\n".join(
        [
            f"{result['windows']:,} windows of {channels} channels: {ours['programs']} programs compiled for "
            f"{ours['buckets']} shapes; largest difference of a probability: {shown}.",
            "",
            *lines,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="passes of each, taking turns")
    parser.add_argument("--json", type=Path, default=RESULTS, help="figures to write")
    options = parser.parse_args()
    try:
        result = run(options.windows, options.rounds)
    except WorkerError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    write_json(result, options.json)
    print(table(json.loads(options.json.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
