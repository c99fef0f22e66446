"""The page of measured errors: built from saved numbers, the rest of the document untouched, failures visible."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import parity as page
from lumamba_jax.parity import COMPARISONS, FinalOutput, StageCheck
from lumamba_jax.parity_cases import float64_only

NAMES = ("luna_base_pretrain__nomask", "luna_micro_pretrain__t40", "luna_micro_cls__t40")


def _result(name, error):
    single = [
        StageCheck(name, "block0.attn", error, 1e-7, 4e-6),
        StageCheck(name, "block1.attn", error / 2, 1e-7, 8e-6),
        StageCheck(name, "positions compiled, in/channel_locations", 0.0, 0.0, 0.0),
        float64_only(name, "gradients"),
    ]
    double = [
        StageCheck(name, "block0.attn", 3e-15, 1e-15, 1e-9),
        StageCheck(name, "block1.attn", 2e-8, 5e-8, 4e-7),
        StageCheck(name, "gradients (7 tensors)", 2e-14, 1e-15, 1e-8, where="grad/norm.bias"),
    ]
    outputs = [FinalOutput(name, "recon", run, 1e-5, 3e-6, 3e-6 if run == "ours" else 4e-7, 0.5) for run in COMPARISONS]
    return page.Result(name, "luna", single, double, outputs)


@pytest.fixture
def document(tmp_path, monkeypatch):
    path = tmp_path / "parity.md"
    path.write_text(f"before\n{page.BEGIN}\nstale numbers\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "DOCUMENT", path)
    return path


def _write(tmp_path, results):
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps([dataclasses.asdict(result) for result in results]))
    return page.main(["--load", str(saved)])


def test_groups_take_the_worst_of_their_cases(document, tmp_path):
    assert _write(tmp_path, [_result(name, error) for name, error in zip(NAMES, (1e-6, 2e-6, 3e-6), strict=True)]) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n3 of 3 cases pass")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "stale" not in text
    assert "#### LUNA base (1 case)\n" in text
    assert "| `blockN.attn` | 2 | 3.0e-06 | 2.0e-06 | 75% | 3.0e-15 |" in text  # the micro cases, both blocks
    assert "| against the float64 reference | 3.0e-06 (within) | 3.0e-06 (above) |" in text
    assert "| against the reference's own float32 | 3.0e-06 (within) | 4.0e-07 (within) |" in text
    assert "| `luna_base_pretrain__nomask` | gradients (7 tensors) | - | 2.0e-14 | `grad/norm.bias` |" in text


def test_a_failing_case_is_shown_and_sets_the_status(document, tmp_path):
    assert _write(tmp_path, [_result(NAMES[0], 5e-6), _result(NAMES[1], 1e-6)]) == 1
    text = document.read_text()
    assert "1 of 2 cases pass" in text
    assert text.count("**FAIL**") == 1


def test_the_committed_page_has_the_markers_once():
    text = (Path(page.__file__).parents[1] / "docs" / "parity.md").read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1
