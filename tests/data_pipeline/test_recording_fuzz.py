"""Damaged recordings give one clear outcome each: windows, or one sentence; no crash, no hang, bounded memory."""

import pytest
from fuzz_recordings import run


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_mutation_gives_windows_or_a_sentence(count):
    """`python tests/data_pipeline/fuzz_recordings.py --count 2500` does more."""
    outcomes, wrong = run(count, seed=0)
    assert not wrong
    assert sum(outcomes.values()) == count
    assert outcomes["refused"] > count // 10  # the mutations do hit
    assert outcomes["windows"] > count // 10
