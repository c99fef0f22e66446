"""Columns of names: they read like an array of strings, at one small number for each window."""

import pickle

import numpy as np
import pytest

from data_pipeline.names import Names
from data_pipeline.open_files import OpenFiles

VALUES = np.array(["s2", "s1", "s2", "s10", "s1"])


def test_names_read_like_the_array_they_stand_for():
    names = Names.of(VALUES)
    assert (len(names), names[0], names[-1], list(names)) == (5, "s2", "s1", VALUES.tolist())
    np.testing.assert_array_equal(names[[3, 0]], ["s10", "s2"])
    np.testing.assert_array_equal(names == "s1", VALUES == "s1")
    np.testing.assert_array_equal(names != "s1", VALUES != "s1")
    np.testing.assert_array_equal(names < "s2", VALUES < "s2")
    np.testing.assert_array_equal(names == VALUES, [True] * 5)
    np.testing.assert_array_equal(VALUES[::-1] == names, VALUES[::-1] == VALUES)
    np.testing.assert_array_equal(np.unique(names), ["s1", "s10", "s2"])
    np.testing.assert_array_equal(names.unique(np.array([0, 3])), ["s10", "s2"])
    np.testing.assert_array_equal(names.isin(["s10", "s1", "nobody"]), [False, True, False, True, True])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(names)), VALUES)
    assert not (names == "nobody").any()
    with pytest.raises(IndexError):
        names[5]


def test_columns_join_and_shrink():
    first, second = Names(["b", "a"], np.array([0, 1, 1])), Names.repeated(["c", "b"], [2, 1])
    joined = Names.concatenate([first, second, np.array(["a"])])
    np.testing.assert_array_equal(joined, ["b", "a", "a", "c", "c", "b", "a"])
    part = joined.take(np.array([3, 0]))
    assert (list(part), sorted(part.table)) == (["c", "b"], ["b", "c"])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        Names(["a", "b"], np.array([2]))


@pytest.mark.parametrize(("different", "size"), [(2, 1), (256, 1), (257, 2), (70_000, 4)])
def test_a_window_costs_the_bytes_that_the_table_needs(different, size):
    names = Names.of(np.array([f"recording-{i}" for i in range(different)]))
    assert names.codes.itemsize == size


def test_files_in_use_stay_open_and_the_oldest_is_closed_first():
    closed = []
    files = OpenFiles(2, closed.append)

    def use(key):
        return files.use(key, lambda: key)

    with use("a"):
        for key in "bcd":
            with use(key) as handle:
                assert handle == key
                assert "a" not in closed
        assert closed == ["b", "c"]
        with use("d"):
            pass
    with use("e"):
        pass
    assert closed == ["b", "c", "a"]
    assert len(files) == 2
    files.close_all()
    assert closed == ["b", "c", "a", "d", "e"]
