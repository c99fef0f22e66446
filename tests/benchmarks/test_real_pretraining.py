"""Division of recordings, simple predictors and rank of benchmarks/real_pretraining.py on arrays with known answers."""

import gzip

import numpy as np
import pytest

from benchmarks.real_pretraining import (
    between_in_time,
    difference,
    effective_rank,
    end_of_recording,
    nearest_electrode,
    uci_to_csv,
)


@pytest.mark.parametrize(("count", "train", "held"), [(9, 9, 0), (10, 7, 2), (47, 37, 9)])
def test_the_end_of_a_recording_is_held_out_behind_a_gap(count, train, held):
    first, last = end_of_recording(count)
    assert first.tolist() == list(range(train))
    assert last.tolist() == list(range(count - held, count))


def test_hidden_samples_lie_on_the_line_between_their_neighbours_in_time():
    x = np.array([[[0.0, 9, 9, 3], [9, 2, 9, 9], [9, 9, 9, 9]]])
    mask = np.array([[[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]], bool)
    assert between_in_time(x, mask).tolist() == [[[0, 1, 2, 3], [2, 2, 2, 2], [0, 0, 0, 0]]]


def test_hidden_samples_come_from_the_nearest_electrode_that_is_visible_then():
    locations = np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    x = np.array([[[9.0, 9, 9], [1, 9, 9], [5, 6, 9]]])
    mask = np.array([[[1, 1, 1], [0, 1, 1], [0, 0, 1]]], bool)
    assert nearest_electrode(x, mask, locations).tolist() == [[[1, 6, 0], [1, 6, 0], [5, 6, 0]]]


def test_effective_rank_counts_directions_of_equal_variance():
    corners = np.array([[a, b, 0.0] for a in (-1, 1) for b in (-1, 1)])
    assert effective_rank(corners) == pytest.approx(2)
    assert effective_rank(corners @ np.diag([1, 0, 0]) + 7) == pytest.approx(1)


def test_a_score_that_is_never_worse_has_an_interval_above_zero():
    labels, subjects = np.tile([0, 1], 8), np.repeat(np.arange(4), 4).astype(str)
    chance = np.zeros(16)
    assert difference(labels, chance, labels, subjects) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_a_uci_trial_becomes_one_column_for_each_channel(tmp_path):
    trial = tmp_path / "data" / "co2a0000001" / "co2a0000001.rd.000.gz"
    trial.parent.mkdir(parents=True)
    with gzip.open(trial, "wt") as file:
        file.write("# header\n# FP1 chan 0\n0 FP1 0 -8.9\n0 FP1 1 1.5\n# CZ chan 1\n0 CZ 0 2.0\n0 CZ 1 3.0\n")
    uci_to_csv(tmp_path / "data", tmp_path / "csv")
    written = (tmp_path / "csv" / "co2a0000001" / "co2a0000001.rd.000.csv").read_text()
    assert written.split() == ["FP1,CZ", "-8.9,2.0", "1.5,3.0"]
