"""The windows of an experiment: parts by subject, folds that cover everyone, labels permuted only where asked."""

import dataclasses

import h5py
import numpy as np
import pytest

from configs import DataConfig, from_mapping, load, to_mapping
from configs.data import open_windows, resolve
from data_pipeline.montages import named_montage
from data_pipeline.store import StoreInfo, create_store

SUBJECTS = 10
PER_SUBJECT = 4


def make_store(path, *, first: int = 0, subjects: int = SUBJECTS, labels: str | None = "classes"):
    montage = named_montage("siena-29")
    rng = np.random.default_rng(first)
    names = ["rest", "task"] if labels == "classes" else None
    with create_store(path, StoreInfo(sfreq=256.0, n_times=80, stride_seconds=0.3125, class_names=names)) as writer:
        for subject in range(first, first + subjects):
            own = {None: None, "classes": np.array([0, 0, 0, 1]), "targets": rng.normal(size=(PER_SUBJECT, 2))}[labels]
            writer.add(
                f"g{subject}",
                rng.normal(0, 20, (PER_SUBJECT, len(montage), 80)),
                montage,
                subject=f"S{subject:02d}",
                recording=f"S{subject:02d}_1",
                start_samples=80 * np.arange(PER_SUBJECT),
                labels=own,
            )
    return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "windows.h5")


def test_parts_are_divided_by_subject(store):
    windows = open_windows(DataConfig(train=(store,), validation_fraction=0.2, test_fraction=0.3), labelled=True)
    sizes = {part: len(rows) // PER_SUBJECT for part, rows in windows.parts.items()}
    assert sizes == {"train": 5, "validation": 2, "test": 3}
    subjects = [set(windows.subjects[rows]) for rows in windows.parts.values()]
    assert len(set.union(*subjects)) == sum(map(len, subjects)) == SUBJECTS


def test_every_subject_is_tested_in_exactly_one_fold_with_or_without_labels(store):
    tested = []
    for fold in range(5):
        config = DataConfig(train=(store,), num_folds=5, fold=fold)
        windows = open_windows(config, labelled=True)
        unlabelled = open_windows(config, labelled=False)  # pre-training for the same fold
        assert unlabelled.labels is None
        for part, rows in windows.parts.items():
            np.testing.assert_array_equal(rows, unlabelled.parts[part])
        tested += sorted(set(windows.subjects[windows.parts["test"]]))
    assert sorted(tested) == [f"S{i:02d}" for i in range(SUBJECTS)]


def test_permutation_moves_training_labels_and_leaves_the_test_alone(store):
    config = DataConfig(train=(store,), test_fraction=0.3)
    honest = open_windows(config, labelled=True)
    shuffled, again = (open_windows(dataclasses.replace(config, permute_labels=True), labelled=True) for _ in range(2))
    np.testing.assert_array_equal(shuffled.labels, again.labels)
    test = honest.parts["test"]
    np.testing.assert_array_equal(shuffled.labels[test], honest.labels[test])
    trained = np.concatenate([honest.parts["train"], honest.parts["validation"]])
    assert not np.array_equal(shuffled.labels[trained], honest.labels[trained])
    assert shuffled.labels[trained].sum() == honest.labels[trained].sum()
    loader = dataclasses.replace(load("debug").loader, grouping="montage").for_evaluation()
    for batch in shuffled.batches("train", loader):  # the batches hold the shuffled labels, not the stored ones
        real = batch["window_mask"]
        np.testing.assert_array_equal(batch["label"][real], shuffled.labels[batch["window_id"][real]])


def test_other_stores_are_numbered_through_and_checked_for_leakage(store, tmp_path):
    other = make_store(tmp_path / "other.h5", first=50, subjects=2)
    windows = open_windows(DataConfig(train=(store,), test=(other,)), labelled=True)
    assert windows.parts["test"].tolist() == list(range(SUBJECTS * PER_SUBJECT, (SUBJECTS + 2) * PER_SUBJECT))
    assert [len(rows) for _, rows in windows.pairs("test")] == [2 * PER_SUBJECT]
    overlapping = make_store(tmp_path / "overlap.h5", first=SUBJECTS - 1, subjects=2)
    with pytest.raises(ValueError, match="leakage: subject S09"):
        open_windows(DataConfig(train=(store,), test=(overlapping,), validation_fraction=0.0), labelled=True)


def test_a_saved_split_reproduces_the_parts(store, tmp_path):
    windows = open_windows(DataConfig(train=(store,), test_fraction=0.3, split_seed=5), labelled=True)
    windows.save_split(tmp_path / "split.json")
    again = open_windows(DataConfig(train=(store,), split_file=str(tmp_path / "split.json")), labelled=True)
    for part, rows in windows.parts.items():
        np.testing.assert_array_equal(rows, again.parts[part])


def test_class_weights_balance_the_training_windows(store):
    windows = open_windows(DataConfig(train=(store,)), labelled=True)
    weights = windows.class_weights()
    labels = windows.labels[windows.parts["train"]]
    assert weights[0] * np.sum(labels == 0) == pytest.approx(weights[1] * np.sum(labels == 1))
    assert weights[labels].mean() == pytest.approx(1)


def test_the_data_decide_the_number_of_outputs(store, tmp_path):
    config = dataclasses.replace(load("finetune_classify"), data=DataConfig(train=(store,)))
    windows = open_windows(config.data, labelled=True)
    assert resolve(config, windows).model.num_outputs == 2
    with pytest.raises(ValueError, match=r"num_outputs is 3, but the labels have 2 .rest, task"):
        resolve(dataclasses.replace(config, model=config.model.replace(num_outputs=3)), windows)
    targets = open_windows(DataConfig(train=(make_store(tmp_path / "t.h5", labels="targets"),)), labelled=True)
    regression = load("finetune_regress")
    assert resolve(regression, targets).model.num_outputs == 2
    with pytest.raises(ValueError, match="hold class labels"):
        resolve(regression, windows)


def test_missing_labels_and_missing_stores_are_said(tmp_path):
    bare = make_store(tmp_path / "bare.h5", labels=None)
    assert open_windows(DataConfig(train=(bare,)), labelled=False).labels is None
    with pytest.raises(ValueError, match="has no labels"):
        open_windows(DataConfig(train=(bare,)), labelled=True)
    with pytest.raises(ValueError, match="no training data"):
        open_windows(DataConfig(), labelled=False)
    with pytest.raises(ValueError, match="leave validation, test and split_file empty"):
        DataConfig(train=(bare,), test=(bare,), num_folds=5, fold=0)


def test_old_files_are_read_as_the_configuration_says_and_it_says_so(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 22, 1280))
    for part in ("train", "val"):
        with h5py.File(tmp_path / f"{part}.h5", "w") as f:
            f["data_group_0/X"], f["data_group_0/y"] = x + len(part), np.array([0, 1])
    names = {"train": (str(tmp_path / "train.h5"),), "validation": (str(tmp_path / "val.h5"),)}
    true = open_windows(DataConfig(**names), labelled=True)
    np.testing.assert_array_equal(true.stores[0][0]["signal"][20], (x + 5)[0, 8].astype(np.float32))  # A1-T3
    asked = from_mapping({"data": {"old_files": {"channel_order": "as_reference"}}}, load("finetune_classify"))
    assert to_mapping(asked)["data"]["old_files"]["channel_order"] == "as_reference"
    mismatched = open_windows(dataclasses.replace(asked.data, **names), labelled=True)
    np.testing.assert_array_equal(mismatched.stores[0][0]["signal"], (x + 5)[0].astype(np.float32))
    with pytest.raises(ValueError, match=r"data\.old_files\.non_finite must be one of 'zero', 'keep'"):
        from_mapping({"data": {"old_files": {"non_finite": "drop"}}}, load("finetune_classify"))
