"""The invariants of a recording."""

import numpy as np
import pytest

from data_pipeline.recording import Recording


def recording(**changes):
    return Recording(**({"signal_uv": np.zeros((2, 100)), "sfreq": 50.0, "ch_names": ("C3", "C4")} | changes))


def test_pick_keeps_rows_names_and_positions_together():
    source = recording(signal_uv=np.arange(6.0).reshape(3, 2), ch_names="abc", positions=np.arange(9.0).reshape(3, 3))
    picked = source.pick([2, 0], dropped={"b": "not EEG"})
    assert picked.ch_names == ("c", "a")
    np.testing.assert_array_equal(picked.signal_uv, [[4, 5], [0, 1]])
    np.testing.assert_array_equal(picked.positions, [[6, 7, 8], [0, 1, 2]])
    assert picked.dropped == {"b": "not EEG"}
    assert source.dropped == {}


def test_duration_and_notes():
    assert recording().duration == 2.0
    assert recording().noting("a").noting("b", "c").notes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signal_uv": np.zeros(5)}, r"\(C,T\)"),
        ({"signal_uv": np.zeros((2, 5), dtype=np.int16)}, "int16"),
        ({"ch_names": ("C3",)}, "2 channels of signal, 1 channel names"),
        ({"ch_names": ("C3", "C3")}, "repeat: C3"),
        ({"sfreq": 0.0}, "must be positive"),
        ({"sfreq": np.nan}, "must be positive"),
        ({"positions": np.zeros((3, 3))}, r"positions must be \(2, 3\)"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recording(**changes)
