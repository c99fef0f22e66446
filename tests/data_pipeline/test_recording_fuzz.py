"""Damaged recordings give one clear outcome each: windows, or one sentence; no crash, no hang, bounded memory."""

import json

import numpy as np
import pytest
from corpus_trees import tueg_tree
from fuzz_recordings import damaged, run

from data_pipeline.prepare import main


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_mutation_gives_windows_or_a_sentence(count):
    """`python tests/data_pipeline/fuzz_recordings.py --count 2500` does more."""
    outcomes, wrong = run(count, seed=0)
    assert not wrong
    assert sum(outcomes.values()) == count
    assert outcomes["refused"] > count // 10  # the mutations do hit
    assert outcomes["windows"] > count // 10


def test_damaged_recordings_never_stop_the_others(tmp_path):
    """One run over a corpus and 24 damaged copies: the others give what they give without them."""
    raw = tueg_tree(tmp_path / "raw")
    assert main(["tueg", "--raw", str(raw), "--out", str(tmp_path / "alone"), "--jobs", "1"]) == 0
    good = next(raw.rglob("aaaaaaaa_s001_t000.edf"))
    for i in range(24):
        content = damaged(good.name, good.read_bytes(), np.random.default_rng((7, i)))
        good.with_name(f"zzzzzzzz_s001_t{i:03d}.edf").write_bytes(content)
    assert main(["tueg", "--raw", str(raw), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    alone, manifest = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("alone", "out"))
    assert {name: entry for name, entry in manifest["files"].items() if "zzzzzzzz" not in name} == alone["files"]
    others = {name: entry for name, entry in manifest["files"].items() if "zzzzzzzz" in name}
    assert len(others) == 24
    assert {entry["status"] for entry in others.values()} == {"windows", "rejected"}
    page = (tmp_path / "out" / "report.html").read_text()
    for entry in others.values():
        assert entry["status"] == "windows" or not entry["reason"].startswith("unexpected")
    assert "zzzzzzzz_s001_t" in page
