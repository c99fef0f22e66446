"""Write the table of docs/parity.md: `python tests/parity/make_parity_table.py [PARITY_FOLDER ...]`.

Runs every case of the given folders (the committed one by default) in float32 and in float64.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from lumamba_jax.parity import CHECKED_FAMILIES, ParityCase, StageCheck, check_case, read_manifest

COMMITTED = Path(__file__).parent / "golden"
DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = (
    "| case | stages | float32: closest to its limit | error | of the limit | float64: largest error | result |\n"
    "|---|---|---|---|---|---|---|"
)


def row(case: ParityCase) -> str:
    """One line of the table."""
    single, double = check_case(case), check_case(case, x64=True)
    worst = max(single, key=_share)
    data = case.data()
    # A stage that was rounded to float32 in the file would hide how close a float64 run is.
    exact = [check for check in double if data[f"f64/{check.stage}"].dtype == "float64"]
    largest = max((check.max_error for check in exact), default=float("nan"))
    passed = all(check.passed for check in single + double)
    return (
        f"| `{case.name}` | {len(single)} | `{worst.stage}` | {worst.max_error:.1e} | {_share(worst):.0%} "
        f"| {largest:.1e} | {'pass' if passed else 'FAIL'} |"
    )


def _share(check: StageCheck) -> float:
    return check.max_error / check.tolerance if check.tolerance else float(check.max_error > 0)


def main(folders: Iterable[str]) -> None:
    """Replace what stands between the markers of the document."""
    cases = [case for folder in folders for case in read_manifest(folder) if case.family in CHECKED_FAMILIES]
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    lines = [HEADER]
    for case in cases:
        lines.append(row(case))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:] or [str(COMMITTED)])
