"""Splits: disjoint, complete, stratified, reproducible; leakage and damaged files are refused by name."""

import json

import numpy as np
import pytest

from data_pipeline.splits import (
    Split,
    check_disjoint,
    check_leakage,
    load_split,
    save_split,
    split_by_lists,
    split_by_subject,
    split_random_windows,
    subject_folds,
)


def windows_of(n_subjects, per_subject=4, *, positive_every=2):
    """Subject ids and labels of the windows: every `positive_every`-th subject has class 1, the others class 0."""
    ids = np.array([f"s{i:02d}" for i in range(n_subjects)])
    labels = (np.arange(n_subjects) % positive_every == 0).astype(np.int32)
    return np.repeat(ids, per_subject), np.repeat(labels, per_subject)


@pytest.mark.parametrize("n_subjects", [3, 7, 20])
def test_every_window_is_in_one_part_and_no_subject_is_divided(n_subjects):
    subjects, labels = windows_of(n_subjects)
    split = split_by_subject(subjects, labels, val_fraction=0.2, test_fraction=0.2, seed=3)
    rows = np.concatenate(list(split.parts.values()))
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(subjects)))
    check_leakage(split, subjects, subjects)
    assert all(len(ids) for ids in split.subjects.values())


def test_the_split_does_not_depend_on_the_order_of_the_windows():
    subjects, labels = windows_of(15)
    order = np.random.default_rng(0).permutation(len(subjects))
    first = split_by_subject(subjects, labels, test_fraction=0.2, seed=1)
    second = split_by_subject(subjects[order], labels[order], test_fraction=0.2, seed=1)
    assert first.subjects == second.subjects
    assert first.digest == second.digest
    assert first.subjects != split_by_subject(subjects, labels, test_fraction=0.2, seed=2).subjects


def test_fractions_hold_within_each_stratum():
    subjects, labels = windows_of(40, positive_every=4)  # 10 of 40 subjects are positive
    for seed in range(5):
        split = split_by_subject(subjects, labels, val_fraction=0.2, test_fraction=0.2, seed=seed)
        assert [len(split.subjects[p]) for p in ("train", "val", "test")] == [24, 8, 8]
        positive = {p: int(labels[rows].sum()) // 4 for p, rows in split.parts.items()}
        assert abs(positive["test"] - 2) <= 1
        assert abs(positive["val"] - 2) <= 1


def test_a_subject_of_both_classes_stays_whole():
    subjects = np.repeat(["a", "b", "c", "d"], 10)
    labels = np.tile([0, 1], 20)
    labels[:10] = 0
    split = split_by_subject(subjects, labels, val_fraction=0.25, seed=0)
    check_leakage(split, subjects)


@pytest.mark.parametrize(("n_subjects", "n_folds"), [(23, 5), (5, 5), (6, 2)])
def test_folds_test_every_subject_once_and_are_balanced(n_subjects, n_folds):
    subjects, labels = windows_of(n_subjects)
    folds = subject_folds(subjects, labels, n_folds, seed=7)
    tested = [s for fold in folds for s in fold.subjects["test"]]
    assert sorted(tested) == sorted(set(subjects.tolist()))
    sizes = [len(fold.subjects["test"]) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for fold in folds:
        check_leakage(fold, subjects)
        assert len(np.concatenate(list(fold.parts.values()))) == len(subjects)
    again = subject_folds(subjects, labels, n_folds, seed=7)
    assert [f.digest for f in folds] == [f.digest for f in again]


def test_folds_are_stratified():
    subjects, labels = windows_of(20, positive_every=4)  # 5 positive subjects, 5 folds
    for fold in subject_folds(subjects, labels, 5, seed=0):
        assert len({s for s in fold.subjects["test"] if labels[subjects == s].any()}) == 1


@pytest.mark.parametrize("labels", [None, np.zeros((12, 3), np.float32)])
def test_unlabelled_and_regression_windows_are_split_without_strata(labels):
    subjects, _ = windows_of(6, per_subject=2)
    check_leakage(split_by_subject(subjects, labels, seed=0), subjects)


def test_impossible_splits_are_refused():
    subjects, labels = windows_of(2)
    with pytest.raises(ValueError, match="3 folds of 2 subjects"):
        subject_folds(subjects, labels, 3)
    with pytest.raises(ValueError, match="2 subjects cannot be divided"):
        split_by_subject(subjects, labels, val_fraction=0.3, test_fraction=0.3)
    with pytest.raises(ValueError, match="no windows"):
        split_by_subject(np.array([], dtype=str))
    with pytest.raises(ValueError, match="test_fraction"):
        split_by_subject(subjects, test_fraction=1.5)


def test_explicit_lists_take_published_subjects_and_leave_the_others_out():
    subjects, _ = windows_of(5, per_subject=2)
    split = split_by_lists(subjects, train=["s03", "s00"], test=["s04"])
    assert split.train.tolist() == [0, 1, 6, 7]
    assert split.val.size == 0
    assert split.test.tolist() == [8, 9]
    with pytest.raises(ValueError, match="subject s00 in both train and test"):
        split_by_lists(subjects, train=["s00"], test=["s00"])
    with pytest.raises(ValueError, match="s99"):
        split_by_lists(subjects, train=["s00"], test=["s99"])


def test_leakage_is_refused_and_named():
    subjects = np.array(["a", "a", "b", "c"])
    empty = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="subject a in both train and val"):
        check_leakage(Split(np.array([0]), np.array([1]), empty), subjects)
    with pytest.raises(ValueError, match="window 2 in both train and test"):
        check_leakage(Split(np.array([0, 2]), empty, np.array([2])), subjects)
    recordings = np.array(["r0", "r1", "r2", "r2"])
    with pytest.raises(ValueError, match="recording r2 in both val and test"):
        check_leakage(Split(empty, np.array([2]), np.array([3])), subjects, recordings)
    with pytest.raises(ValueError, match="subjects x, y in both train file and test file"):
        check_disjoint({"train file": ["x", "y", "z"], "test file": ["y", "x"]})


def test_the_random_window_rule_divides_windows_and_fails_the_leakage_check():
    subjects, _ = windows_of(4, per_subject=50)
    split = split_random_windows(subjects, val_fraction=0.2, seed=0)
    assert len(split.val) == 40
    assert sorted([*split.train, *split.val]) == list(range(200))
    assert split.unit == "window"
    with pytest.raises(ValueError, match="leakage"):
        check_leakage(split, subjects)


@pytest.mark.parametrize("make", [split_by_subject, split_random_windows])
def test_a_stored_split_comes_back(tmp_path, make):
    subjects, _ = windows_of(9)
    split = make(subjects, seed=4)
    save_split(split, tmp_path / "splits" / "split.json")
    back = load_split(tmp_path / "splits" / "split.json", subjects)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(back.parts[part], split.parts[part])
        assert back.subjects[part] == split.subjects[part]
    assert (back.unit, back.digest) == (split.unit, split.digest)
    assert [p.name for p in (tmp_path / "splits").iterdir()] == ["split.json"]


def test_a_stored_split_follows_subjects_to_another_store_but_not_unknown_ones(tmp_path):
    subjects, _ = windows_of(9)
    split = split_by_subject(subjects, seed=4)
    save_split(split, tmp_path / "split.json")
    other = np.repeat(sorted(set(subjects.tolist()))[:8], 11)  # other windows, one subject has none
    there = load_split(tmp_path / "split.json", other)
    assert set(other[there.val].tolist()) == set(split.subjects["val"]) & set(other.tolist())
    with pytest.raises(ValueError, match="stranger"):
        load_split(tmp_path / "split.json", np.array([*subjects, "stranger"]))


def test_an_edited_or_broken_file_is_refused(tmp_path):
    subjects, _ = windows_of(9)
    path = tmp_path / "split.json"
    save_split(split_by_subject(subjects, test_fraction=0.3, seed=4), path)
    edited = json.loads(path.read_text())
    edited["train"].append(edited["test"].pop())
    path.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="digest"):
        load_split(path, subjects)
    path.write_text('{"unit": ')
    with pytest.raises(ValueError, match="cannot be read as a split"):
        load_split(path, subjects)
    with pytest.raises(ValueError, match=r"absent\.json"):
        load_split(tmp_path / "absent.json", subjects)
