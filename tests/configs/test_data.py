"""The windows of an experiment: parts by subject, folds that cover everyone, labels permuted only where asked."""

import dataclasses

import h5py
import numpy as np
import pytest

from configs import DataConfig, cli, from_mapping, load, to_mapping
from configs.data import open_windows, resolve
from data_pipeline.montages import montage_of, named_montage
from data_pipeline.splits import save_split, split_random_windows
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
    asked = cli(["finetune_classify", "--data.old-files.channel-order", "as_reference"], "train.py")
    assert to_mapping(asked)["data"]["old_files"]["channel_order"] == "as_reference"
    mismatched = open_windows(dataclasses.replace(asked.data, **names), labelled=True)
    np.testing.assert_array_equal(mismatched.stores[0][0]["signal"], (x + 5)[0].astype(np.float32))
    with pytest.raises(ValueError, match=r"data\.old_files\.non_finite must be one of 'zero', 'keep'"):
        from_mapping({"data": {"old_files": {"non_finite": "drop"}}}, load("finetune_classify"))


def test_one_subject_is_left_out_and_a_few_of_its_windows_come_back(tmp_path):
    path = tmp_path / "w.h5"
    rng = np.random.default_rng(0)
    with create_store(path, StoreInfo(256.0, 80, 80 / 256, class_names=["rest", "task"])) as writer:
        for subject in "abcd":
            writer.add(
                subject,
                rng.normal(0, 20, (20, 29, 80)),
                named_montage("siena-29"),
                subject=subject,
                recording=f"{subject}_1",
                start_samples=80 * np.arange(20),
                labels=np.arange(20) // 10,
            )
    config = DataConfig(train=(str(path),), leave_out="c", validation_fraction=0.34)
    whole = open_windows(config, labelled=True)
    assert whole.subjects.unique(whole.parts["test"]).tolist() == ["c"]
    assert "c" not in whole.subjects[np.concatenate([whole.parts["train"], whole.parts["validation"]])]
    few = open_windows(dataclasses.replace(config, few_shot=3), labelled=True)
    own = few.parts["train"][few.subjects[few.parts["train"]] == "c"]
    assert np.bincount(few.labels[own]).tolist() == [3, 3]
    assert set(few.parts["train"]) - set(own) == set(whole.parts["train"])
    assert set(few.parts["test"]) < set(whole.parts["test"])
    few.save_split(tmp_path / "split.json")
    again = open_windows(DataConfig(train=(str(path),), split_file=str(tmp_path / "split.json")), labelled=True)
    for part, rows in few.parts.items():
        np.testing.assert_array_equal(rows, again.parts[part])
    alone = open_windows(dataclasses.replace(config, few_shot=3, few_shot_others=False), labelled=True)
    assert alone.subjects.unique(alone.parts["train"]).tolist() == ["c"]
    with pytest.raises(ValueError, match="few_shot is a number of windows per class of the subject named by leave_out"):
        DataConfig(train=(str(path),), few_shot=3)


def test_equal_signal_under_other_names_is_refused(tmp_path):
    first = make_store(tmp_path / "a.h5", first=0, subjects=3)
    with h5py.File(first) as source, h5py.File(tmp_path / "b.h5", "w") as copy:
        copy.attrs.update(source.attrs)
        for name in source:
            source.copy(name, copy)
            copy[name].attrs.update({"subject_id": f"other{name}", "recording_id": f"other{name}"})
    config = DataConfig(train=(first,), test=(str(tmp_path / "b.h5"),), validation_fraction=0.34)
    with pytest.raises(ValueError, match=r"S00_1 of subject S00 in train holds the same signal as recording other"):
        open_windows(config, labelled=True)
    open_windows(dataclasses.replace(config, compare_windows="none"), labelled=True)
    with h5py.File(tmp_path / "b.h5", "a") as copy:
        for name in copy:
            del copy[name]["window_hash"]
    open_windows(config, labelled=True)  # nothing is known without reading
    with pytest.raises(ValueError, match="holds the same signal"):
        open_windows(dataclasses.replace(config, compare_windows="all"), labelled=True)


def test_subjects_may_be_shared_only_where_it_is_asked_for(tmp_path):
    """As in SEED-V (trials of each session) and MoBI (minutes of each session)."""
    montage, rng = named_montage("siena-29"), np.random.default_rng(0)

    def part(name, recording, first):
        with create_store(tmp_path / f"{name}.h5", StoreInfo(100.0, 80, 0.8)) as writer:
            x, starts = rng.normal(size=(10, 29, 80)), 80 * np.arange(first, first + 10)
            writer.add("g", x, montage, subject="s", recording=recording, start_samples=starts)
        return (str(tmp_path / f"{name}.h5"),)

    trials = {"train": part("t", "s.cnt#1", 0), "test": part("e", "s.cnt#2", 50), "validation_fraction": 0.0}
    minutes = {"train": part("t2", "s.txt#train", 0), "test": part("e2", "s.txt#test", 10), "validation_fraction": 0.0}
    overlapping = {**minutes, "test": part("e3", "s.txt#test", 9)}
    with pytest.raises(ValueError, match="leakage: subject s in both train and test"):
        open_windows(DataConfig(**trials), labelled=False)
    open_windows(DataConfig(**trials, split_unit="recording"), labelled=False)
    open_windows(DataConfig(**minutes, split_unit="time"), labelled=False)
    with pytest.raises(ValueError, match=r"leakage: in recording s\.txt 1 windows overlap their neighbour"):
        open_windows(DataConfig(**overlapping, split_unit="time"), labelled=False)


@pytest.mark.parametrize("source", ["emotiv", "noise"])
def test_a_shuffled_division_of_one_recording_is_refused_and_says_why(tmp_path, source, request):
    """The leakage demonstration: eyes open or closed, one person, two minutes, neighbouring rows alike."""
    if source == "emotiv":
        path = request.getfixturevalue("data_dir") / "emotiv_eye_state" / "eeg-eye-state.csv"
        table = np.loadtxt(path, delimiter=",", skiprows=1)
    else:
        table = np.random.default_rng(0).normal(size=(128 * 117, 15))
        table[:, 14] = np.arange(len(table)) // 2560 % 2
    n = len(table) // 128
    windows = table[: n * 128].reshape(n, 128, 15)
    names = "AF3 F7 F3 FC5 T7 P7 O1 O2 P8 T8 FC6 F4 F8 AF4".split()  # noqa: SIM905
    with create_store(tmp_path / "w.h5", StoreInfo(128.0, 128, 1.0, class_names=["open", "closed"])) as writer:
        writer.add(
            "g",
            windows[..., :14].transpose(0, 2, 1),
            montage_of(names),
            subject="one",
            recording="eye-state",
            start_samples=128 * np.arange(n),
            labels=(windows[..., 14].mean(1) > 0.5).astype(int),
        )
    store = str(tmp_path / "w.h5")
    with pytest.raises(ValueError, match="1 subjects cannot be divided"):
        open_windows(DataConfig(train=(store,), test_fraction=0.3), labelled=True)
    save_split(split_random_windows(np.repeat("one", n), val_fraction=0.3), tmp_path / "shuffled.json")
    with pytest.raises(ValueError, match=r"eye-state \d+ windows touch their .*the moment instead of the state"):
        open_windows(DataConfig(train=(store,), split_file=str(tmp_path / "shuffled.json")), labelled=True)
    config = DataConfig(train=(store,), split_unit="time", validation_fraction=0.0, test_fraction=0.3)
    honest = open_windows(config, labelled=True)
    assert honest.parts["train"].max() + 2 == honest.parts["test"].min()  # one window between them belongs to none
    assert len(honest.parts["test"]) == round(0.3 * n)
