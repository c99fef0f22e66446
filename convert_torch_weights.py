"""Published PyTorch weights of LuMamba, LUNA and FEMBA: convert, convert back, inspect, and prove the numbers.

python convert_torch_weights.py WEIGHTS OUT                        write a checkpoint of ours
python convert_torch_weights.py --export CHECKPOINT OUT.safetensors  and back, for the PyTorch code
python convert_torch_weights.py --inspect WEIGHTS                  what is in a file or checkpoint, on one page
python convert_torch_weights.py --counts                           parameters of every published size
python convert_torch_weights.py --check MANIFEST [--case NAME]     compare with stored stages; status 1: one fails

WEIGHTS: .safetensors, an index of shards, .pt, .ckpt (read without running pickles), several files that together hold
one model, a folder, hf://owner/repo[@revision]/file, or a known name such as lumamba-tiny-mixed.
"""

import argparse
import difflib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lumamba_jax.architecture_summary import STAGES, count_parameters, summarize
from lumamba_jax.architectures import SIZES, ModelConfig
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.parity import CHECKED_FAMILIES, ParityCase, StageCheck, check_case, read_manifest
from lumamba_jax.parity_cases import compare, compare_group
from lumamba_jax.torch_architecture import Overrides
from lumamba_jax.torch_export import export
from lumamba_jax.torch_files import files_at
from lumamba_jax.torch_weights import ConvertedWeights, load_torch_weights, replace_head
from lumamba_jax.weight_sources import resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.check:
            return _check(args.check, args.case, x64=args.x64)
        if args.counts:
            return _counts()
        if args.inspect:
            print(summarize(args.inspect, overrides=_overrides(args)))
            return 0
        if args.export:
            return _export(args)
        if len(args.paths) < 2:
            raise ValueError("give WEIGHTS (one or more) and OUT, or one of --export, --inspect, --counts, --check")
        return _convert(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"convert_torch_weights: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="WEIGHTS ... OUT", help="what to convert, then the folder to write")
    parser.add_argument("--sha256", help="the checksum that the (only) weight file must have")
    shown = parser.add_argument_group("what weights cannot show (the assumption is printed)")
    shown.add_argument("--num-heads", type=int, help="attention heads of LuMamba (default 2)")
    shown.add_argument("--bidirectional", choices=("add", "ew_multiply"), help="join of directions (default add)")
    shown.add_argument("--output-channels", type=int, help="Mamba head with outputs per channel: number of channels")
    shown.add_argument("--num-channels", type=int, help="FEMBA: channels of the window")
    shown.add_argument("--num-samples", type=int, help="FEMBA: samples of the window")
    shown.add_argument("--channel-stride", type=int, help="FEMBA: distance of patches over channels")
    shown.add_argument("--patch-stride", type=int, help="FEMBA: distance of patches over samples")
    written = parser.add_argument_group("the checkpoint")
    written.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="its compute dtype")
    written.add_argument("--new-head", choices=("attention", "mamba", "linear", "none"), help="start another head")
    written.add_argument("--num-outputs", type=int, help="outputs of the new head: classes or regression targets")
    written.add_argument("--seed", type=int, default=0, help="of the new head's initial values")
    other = parser.add_argument_group("instead of converting")
    other.add_argument("--export", metavar="CHECKPOINT", help="write it as the safetensors file OUT for PyTorch")
    other.add_argument("--prefix", default="", help='export: put before every name, for instance "model."')
    other.add_argument("--inspect", metavar="WEIGHTS", help="describe a weight file or checkpoint")
    other.add_argument("--counts", action="store_true", help="table of the parameters of every published size")
    other.add_argument("--check", type=Path, metavar="MANIFEST", help="manifest.json of a parity folder")
    other.add_argument("--case", action="append", help="check this case only (may be repeated)")
    other.add_argument("--x64", action="store_true", help="check in float64")
    return parser


def _overrides(args: argparse.Namespace) -> Overrides:
    return Overrides(
        num_heads=args.num_heads,
        bidirectional=args.bidirectional,
        output_channels=args.output_channels,
        num_channels=args.num_channels,
        num_samples=args.num_samples,
        channel_stride=args.channel_stride,
        patch_stride=args.patch_stride,
    )


def _convert(args: argparse.Namespace) -> int:
    *sources, out = args.paths
    if args.sha256 and len(sources) > 1:
        raise ValueError("--sha256 is the checksum of one file: give one")
    found = [resolve(source, sha256=args.sha256) for source in sources]
    paths = [path for one in found for path in files_at(one.path)]
    converted = load_torch_weights(paths, overrides=_overrides(args), compute_dtype=args.dtype)
    if args.new_head:
        converted = replace_head(
            converted,
            args.new_head,
            num_outputs=args.num_outputs,
            output_channels=args.output_channels if args.new_head == "mamba" else None,
            seed=args.seed,
        )
    origin = found[0].provenance if len(found) == 1 else {"sources": [one.provenance for one in found]}
    notes = list(dict.fromkeys(one.provenance["licence_note"] for one in found))
    save_pretrained(Path(out), converted.config, converted.params, {**origin, **converted.report()})
    _print_conversion(converted, Path(out))
    print("\n".join(notes))
    return 0


def _print_conversion(converted: ConvertedWeights, out: Path) -> None:
    stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(converted.dtypes.items()))
    print(f"{converted.config.architecture}: {sum(converted.dtypes.values())} tensors ({stored})")
    for part, count in Counter(row.path.split("/")[0] for row in converted.mapped).items():
        print(f"  mapped   {count:4d} tensors to {part}")
    for name, value in converted.kept.items():
        print(f"  kept     {name} = {value:g}, which no computation reads")
    for title, names in (("dropped", converted.dropped), ("fresh", converted.fresh)):
        for name in names:
            print(f"  {title:<8} {name}")
    for sentence in converted.assumed:
        print(f"  assumed  {sentence}")
    print(f"sizes: {converted.config}")
    print(f"wrote {out} (every tensor and its new place: metadata.json, provenance.mapped)")


def _export(args: argparse.Namespace) -> int:
    if len(args.paths) != 1:
        raise ValueError("--export CHECKPOINT needs one OUT.safetensors to write")
    out = Path(args.paths[0])
    tensors = export(args.export, out, prefix=args.prefix)
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in sorted(Counter(str(t.dtype) for t in tensors.values()).items()))
    print(f"wrote {out}: {len(tensors)} tensors ({dtypes}), with config.json and provenance.json beside it")
    print("If they come from published weights: CC BY-ND 4.0, name the authors, and do not share adapted weights.")
    return 0


def _counts() -> int:
    print(f"{'size':<14} {'head':<22} " + " ".join(f"{stage:>19}" for stage in STAGES) + f" {'total':>12}")
    for name, config in SIZES.items():
        encoder = count_parameters(config)
        for head, counts in (("reconstruction", encoder), *_with_classifiers(config, encoder)):
            columns = " ".join(f"{counts[stage]:>19,}" for stage in STAGES)
            print(f"{name:<14} {head:<22} {columns} {sum(counts.values()):>12,}")
    return 0


def _with_classifiers(config: ModelConfig, encoder: dict[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    for head in ("mamba", "linear") if config.architecture == "FEMBA" else ("attention", "mamba", "linear"):
        # A head does not depend on the number of blocks, so one block is enough to count it.
        small = config.replace(head=head, num_outputs=2, num_blocks=1)
        yield f"{head}, 2 classes", encoder | {"head": count_parameters(small)["head"]}


def _check(manifest: Path, names: list[str] | None, *, x64: bool) -> int:
    cases = _select(read_manifest(manifest), names)
    checked = [case for case in cases if case.family in CHECKED_FAMILIES]
    unknown = Counter(case.family for case in cases if case.family not in CHECKED_FAMILIES)
    if not checked:
        raise ValueError(f"{manifest}: nothing to check, the families are {', '.join(unknown) or 'none'}")
    results = {case.name: _print_case(case, x64=x64) for case in checked}
    failed = [name for name, checks in results.items() if not _passes(checks)]
    _print_overview(checked, results)
    print(f"\n{len(checked) - len(failed)} of {len(checked)} cases pass in {'float64' if x64 else 'float32'}")
    elsewhere = [name for name, checks in results.items() if checks and all(check.skipped for check in checks)]
    if elsewhere:
        print(f"{len(elsewhere)} of them hold float64 numbers only (check with --x64): {', '.join(elsewhere)}")
    if unknown:
        counts = ", ".join(f"{count} {family}" for family, count in unknown.items())
        print(f"of families unknown here, not checked: {counts}")
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


def _passes(checks: Sequence[StageCheck]) -> bool:
    return bool(checks) and all(check.passed for check in checks)


def _print_case(case: ParityCase, *, x64: bool) -> list[StageCheck]:
    print(f"\n{case.name}")
    try:
        checks = check_case(case, x64=x64)
        checks += montage_checks(case) if case.family == "channels" else []
    except (ValueError, OSError) as error:
        print(f"  FAIL {error}")
        return []
    print(f"  {'stage':<58} {'max abs error':>13} {'relative':>10} {'tolerance':>10}")
    for check in checks:
        print(_line(check))
    return checks


def montage_checks(case: ParityCase) -> list[StageCheck]:
    """The channel vocabulary and the electrode positions (metres) of our montages against the stored tables."""
    from data_pipeline.montages import CHANNEL_ORDERS, CHANNEL_VOCABULARY, electrode_positions, named_montage

    names = json.loads((case.folder / "tables" / "channels.json").read_text())
    data = case.data()
    vocabulary = {name: np.asarray(row) for row, name in enumerate(CHANNEL_VOCABULARY)}
    checks = [compare_group(case.name, "vocabulary", vocabulary, names["channel_names_to_idx"], 0.0)]
    for key, order in {"tueg": "tuh-bipolar-22", "siena": "siena-29", "seed": "seed-v-62"}.items():
        montage = named_montage(order)
        rows = [CHANNEL_VOCABULARY.index(name) for name in names[key]]
        exact = electrode_positions(CHANNEL_ORDERS[order])
        checks += [
            compare(case.name, f"{key}, order of channels", rows, data[f"{key}/indices"], 0.0),
            compare(case.name, f"{key}, rows of the vocabulary", montage.channel_ids, data[f"{key}/indices"], 0.0),
            compare(case.name, f"{key}, positions, float64", exact, data[f"{key}/locations_f64"], 1e-12),
            compare(case.name, f"{key}, positions, float32", montage.locations, data[f"{key}/locations_f32"], 0.0),
        ]
    return checks


def _line(check: StageCheck) -> str:
    if check.skipped:
        return f"  {check.stage:<58} {check.skipped}"
    numbers = f"{check.max_error:13.2e} {check.relative_error:10.2e} {check.tolerance:10.2e}"
    verdict = "pass" if check.passed else f"FAIL {check.problem}".rstrip()
    worst = f" (worst: {check.where})" if check.where and check.max_error else ""
    return f"  {check.stage:<58} {numbers}  {verdict}{worst}"


def _print_overview(cases: Sequence[ParityCase], results: dict[str, list[StageCheck]]) -> None:
    print(f"\n{'case':<58} {'family':<15} stages {'worst stage':<42} of limit")
    for case in cases:
        checks = results[case.name]
        shares = {check.stage: _share(check) for check in checks}
        worst = max(shares, key=lambda stage: shares[stage]) if shares else "-"
        share = f"{shares[worst]:8.0%}" if shares else ""
        elsewhere = bool(checks) and all(check.skipped for check in checks)
        verdict = "float64 only" if elsewhere else "pass" if _passes(checks) else "FAIL"
        print(f"{case.name:<58} {case.family:<15} {len(checks):6d} {worst[:42]:<42} {share}  {verdict}")


def _share(check: StageCheck) -> float:
    if check.skipped:
        return 0.0
    if check.problem or not check.tolerance or math.isnan(check.max_error):
        return 0.0 if check.passed else math.inf
    return check.max_error / check.tolerance


if __name__ == "__main__":
    sys.exit(main())
