"""Damaged stores give one clear outcome each: read, or refused in one sentence; no crash, no hang, bounded memory."""

import pytest
from fuzz_stores import run


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_mutation_is_read_or_refused(count):
    """`python tests/data_pipeline/fuzz_stores.py --count 2500` does more."""
    outcomes, wrong = run(count, seed=0)
    assert not wrong
    assert sum(outcomes.values()) == count
    assert outcomes["refused"] > count // 10  # the mutations do hit
    assert outcomes["read"] > 0
