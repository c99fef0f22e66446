"""Copy the small parity cases into this repository: `python tests/parity/select_cases.py GOLDEN_FOLDER`.

The full set of reference tensors (PyTorch runs of models with random weights) is tens of megabytes; `CASES` is the part
that travels with the code: every head family and joining strategy, 1, 16, 22 and 26 channels, with and without a mask,
the selective scan and a Mamba block with their gradients, and five optimizer steps. At most 8 MB.
"""

import json
import shutil
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "golden"
LIMIT_BYTES = 8_000_000
CASES = (
    "lumamba_micro_pretrain__c22_t200_masked_noise",
    "lumamba_micro_pretrain__c1_t640",
    "lumamba_micro_pretrain__c26_t640_masked_noise",
    "lumamba_micro_pretrain__mixed_locations",
    "lumamba_micro_pretrain__t40",
    "lumamba_micro_1block_ewmul__c16_t200",
    "lumamba_micro_unidir__c16_t200",
    "lumamba_micro_head_luna5__c22_t200_allfalse_mask_noise",
    "lumamba_micro_head_linear__c22_t200",
    "lumamba_micro_head_mamba_bc__c22_t200",
    "lumamba_micro_head_mamba_mmc__c22_t200",
    "scan_L1",
    "scan_L31",
    "scan_bare_L31",
    "scan_nosoftplus_bias_L31",
    "mamba_d16_L13",
    "mamba_d24_n8_k3_L9",
    "train5_pretrain_adamw",
)


def main(source: Path) -> None:
    """Copy the files of `CASES` and write the manifest that lists only them."""
    manifest = json.loads((source / "manifest.json").read_text())
    cases = [case for case in manifest["cases"] if case["name"] in CASES]
    files = {name for case in cases for name in (*case.get("state_files", ()), case["data_file"])}
    for name in sorted(files):
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, TARGET / name)
    kept = {key: manifest[key] for key in ("format", "versions", "upstream_commits", "encodings")}
    text = json.dumps(kept | {"cases": [_without_listing(case) for case in cases]}, indent=1)
    (TARGET / "manifest.json").write_text(text + "\n")
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{len(cases)} cases, {len(files)} files, {size / 1e6:.2f} MB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_BYTES / 1e6:.0f} MB: take a case out")


def _without_listing(case: dict) -> dict:
    return {key: value for key, value in case.items() if key != "tensors"}  # the data file itself says what it holds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
