"""Draw `benchmarks/results/speed.json` as `docs/speed.svg`: each case's variants as multiples of our fastest."""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from benchmarks.speed import RESULTS, ROOT

PICTURE = ROOT / "docs" / "speed.svg"


def comparisons(results: dict) -> list[tuple[str, dict[str, float]]]:
    """(case, ratio of each timed variant to the fastest of ours), for cases that have both; what failed is left out."""
    found = []
    for case in results["cases"]:
        times = {name: facts["median_ms"] for name, facts in case.get("variants", {}).items() if "median_ms" in facts}
        ours = [milliseconds for name, milliseconds in times.items() if name.startswith("jax")]
        if ours and len(ours) < len(times):
            found.append((case["name"], {name: milliseconds / min(ours) for name, milliseconds in times.items()}))
    return found


def draw(results: dict, path: Path) -> None:
    """Horizontal bars on a logarithmic axis."""
    cases = comparisons(results)
    figure, axes = plt.subplots(figsize=(8, 0.75 * len(cases) + 1), layout="constrained")
    names = sorted({name for _, ratios in cases for name in ratios})
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    for row, (_, ratios) in enumerate(cases):
        height = 0.8 / len(ratios)
        for i, (name, ratio) in enumerate(ratios.items()):
            place = row - 0.4 + (i + 0.5) * height
            axes.barh(place, ratio, height, left=0, color=colours[name], label=name)
            axes.text(ratio * 1.03, place, f"{ratio:.1f}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [name for name, _ in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of our fastest, median of turns (lower is faster)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Read the last run, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
