"""Convert published PyTorch LuMamba weights, or prove that our model computes the same numbers.

python convert_torch_weights.py WEIGHTS.safetensors OUT            write a checkpoint
python convert_torch_weights.py --check MANIFEST [--case NAME]    compare with stored stages; status 1: one fails
"""

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.parity import CHECKED_FAMILIES, ParityCase, StageCheck, check_case, read_manifest
from lumamba_jax.torch_weights import ConvertedWeights, load_torch_weights, replace_head

LICENCE = (
    "The published LuMamba weights (arXiv 2603.19100) are CC BY-ND 4.0: name their authors, do not redistribute them "
    "from here, and do not share weights adapted from them."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.check:
            return _check(args.check, args.case, x64=args.x64)
        if len(args.paths) < 2:
            raise ValueError("give WEIGHTS (one or more .safetensors files) and OUT, or --check MANIFEST")
        return _convert(args)
    except (ValueError, OSError) as error:
        print(f"convert_torch_weights: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", metavar="WEIGHTS ... OUT", help="state files that together hold one model, then OUT"
    )
    parser.add_argument("--num-heads", type=int, help="attention heads (not visible in the weights; default 2)")
    parser.add_argument(
        "--bidirectional", choices=("add", "ew_multiply"), help="how directions are joined (default add)"
    )
    parser.add_argument("--output-channels", type=int, help="Mamba head with outputs per channel: number of channels")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype of the checkpoint"
    )
    parser.add_argument(
        "--new-head", choices=("attention", "mamba", "linear", "none"), help="drop the head, start another"
    )
    parser.add_argument("--num-outputs", type=int, help="outputs of the new head: classes or regression targets")
    parser.add_argument("--seed", type=int, default=0, help="of the new head's initial values")
    parser.add_argument("--check", type=Path, metavar="MANIFEST", help="manifest.json of a parity folder")
    parser.add_argument("--case", action="append", help="check this case only (may be repeated)")
    parser.add_argument("--x64", action="store_true", help="check in float64")
    return parser


def _convert(args: argparse.Namespace) -> int:
    *weights, out = map(Path, args.paths)
    converted = load_torch_weights(
        weights,
        num_heads=args.num_heads,
        bidirectional=args.bidirectional,
        output_channels=args.output_channels,
        compute_dtype=args.dtype,
    )
    if args.new_head:
        converted = replace_head(converted, args.new_head, num_outputs=args.num_outputs, seed=args.seed)
    provenance = {
        "source": [path.name for path in weights],
        "stored_dtypes": dict(converted.dtypes),
        "mapped": {row.torch_name: row.path for row in converted.mapped},
        "assumed": list(converted.assumed),
        "kept": dict(converted.kept),
        "dropped": list(converted.dropped),
        "fresh": list(converted.fresh),
        "licence": LICENCE,
    }
    save_pretrained(out, converted.config, converted.params, provenance)
    _print_conversion(converted, out)
    return 0


def _print_conversion(converted: ConvertedWeights, out: Path) -> None:
    stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(converted.dtypes.items()))
    print(f"read {sum(converted.dtypes.values())} tensors ({stored})")
    for part, count in Counter(row.path.split("/")[0] for row in converted.mapped).items():
        print(f"  mapped   {count:4d} tensors to {part}")
    for name, value in converted.kept.items():
        print(f"  kept     {name} = {value:g}, which no computation reads")
    for title, names in (("dropped", converted.dropped), ("fresh", converted.fresh)):
        for name in names:
            print(f"  {title:<8} {name}")
    for sentence in converted.assumed:
        print(f"  assumed  {sentence}")
    print(f"architecture: {converted.config}")
    print(f"wrote {out} (every tensor and its new place: metadata.json, provenance.mapped)")
    print(LICENCE)


def _check(manifest: Path, names: list[str] | None, *, x64: bool) -> int:
    cases = _select(read_manifest(manifest), names)
    checked = [case for case in cases if case.family in CHECKED_FAMILIES]
    skipped = Counter(case.family for case in cases if case.family not in CHECKED_FAMILIES)
    if not checked:
        raise ValueError(f"{manifest}: nothing to check, the families are {', '.join(skipped) or 'none'}")
    failed = [case.name for case in checked if not _print_case(case, x64=x64)]
    print(f"\n{len(checked) - len(failed)} of {len(checked)} cases pass in {'float64' if x64 else 'float32'}")
    if skipped:
        counts = ", ".join(f"{count} {family}" for family, count in skipped.items())
        print(f"not a LuMamba model, not checked: {counts}")
    if failed:
        print("FAILED: " + ", ".join(failed))
    return 1 if failed else 0


def _select(cases: list[ParityCase], names: list[str] | None) -> list[ParityCase]:
    by_name = {case.name: case for case in cases}
    for name in names or ():
        if name not in by_name:
            close = ", ".join(difflib.get_close_matches(name, by_name, n=3)) or ", ".join(list(by_name)[:5])
            raise ValueError(f"no case {name!r} in the manifest; closest: {close}")
    return [by_name[name] for name in names] if names else cases


def _print_case(case: ParityCase, *, x64: bool) -> bool:
    print(f"\n{case.name}")
    try:
        checks = check_case(case, x64=x64)
    except (ValueError, OSError) as error:
        print(f"  FAIL {error}")
        return False
    print(f"  {'stage':<34} {'max abs error':>13} {'relative':>10} {'tolerance':>10}")
    for check in checks:
        print(_line(check))
    return bool(checks) and all(check.passed for check in checks)


def _line(check: StageCheck) -> str:
    numbers = f"{check.max_error:13.2e} {check.relative_error:10.2e} {check.tolerance:10.2e}"
    return f"  {check.stage:<34} {numbers}  {'pass' if check.passed else f'FAIL {check.problem}'.rstrip()}"


if __name__ == "__main__":
    sys.exit(main())
