"""Splits: disjoint, complete, stratified, reproducible; leakage and damaged files are refused by name."""

import itertools
import json

import numpy as np
import pytest
from fuzzing import mutated, mutated_text

from data_pipeline.leakage import Times, check_content, check_disjoint, check_times
from data_pipeline.names import Names
from data_pipeline.split_lists import read_lists
from data_pipeline.splits import (
    Split,
    check_leakage,
    few_shot,
    leave_one_subject_out,
    leave_subject_out,
    load_split,
    save_split,
    split_by_lists,
    split_by_recording,
    split_by_subject,
    split_in_time,
    split_random_windows,
    subject_folds,
)
from data_pipeline.window_hashes import NO_SIGNAL, hash_windows, later_copies, repeated


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


def seconds(count, *, stride=1.0, length=1.0, recordings=1):
    """Places of `count` windows in each of some recordings, and the recordings' names."""
    starts = np.tile(np.arange(count) * stride, recordings)
    return Times(starts, np.asarray(length)), np.repeat([f"r{i}" for i in range(recordings)], count)


def test_everyone_is_left_out_once():
    subjects, labels = windows_of(7, per_subject=3)
    splits = leave_one_subject_out(subjects, labels, val_fraction=0.3, seed=2)
    assert [split.subjects["test"] for split in splits] == [(s,) for s in sorted(set(subjects.tolist()))]
    for split in splits:
        check_leakage(split, subjects, subjects)
        assert len(np.concatenate(list(split.parts.values()))) == len(subjects)
        assert len(split.subjects["val"]) == 2
    order = np.random.default_rng(0).permutation(len(subjects))
    again = leave_subject_out(subjects[order], "s03", labels[order], val_fraction=0.3, seed=2)
    assert again.digest == splits[3].digest
    with pytest.raises(ValueError, match="subject 's99' has no windows here; there are s00, s01"):
        leave_subject_out(subjects, "s99")
    with pytest.raises(ValueError, match="'a' is the only subject"):
        leave_subject_out(np.array(["a", "a"]), "a")


@pytest.mark.parametrize(("shots", "others", "stride"), [(1, True, 1.0), (4, True, 1.0), (3, False, 0.5)])
def test_few_shots_are_contiguous_and_their_neighbours_are_not_tested(shots, others, stride):
    subjects = np.repeat(["s0", "s1", "s2", "s3"], 40)
    times, recordings = seconds(40, stride=stride, recordings=4)
    labels = np.tile(np.arange(40) // 10 % 2, 4)  # ten of one class, ten of the other, twice
    split = few_shot(subjects, labels, recordings, times, subject="s2", shots=shots, others=others, seed=5)
    check_leakage(split, subjects, recordings, times)
    own = split.train[subjects[split.train] == "s2"]
    assert [int((labels[own] == c).sum()) for c in (0, 1)] == [shots, shots]
    assert set(subjects[split.test].tolist()) == {"s2"}
    assert set(labels[split.test].tolist()) == {0, 1}
    assert ("s0" in split.subjects["train"] or "s1" in split.subjects["train"]) == others
    for label in (0, 1):  # the shots of a class follow each other among its windows
        of_class = np.flatnonzero((subjects == "s2") & (labels == label))
        places = np.searchsorted(of_class, own[labels[own] == label])
        assert np.diff(places).tolist() == [1] * (shots - 1)
    nearest = np.abs(times.starts[split.test][:, None] - times.starts[own][None]).min()
    assert nearest >= 2.0  # a window of one second, and a gap of one window
    drawn = [few_shot(subjects, labels, recordings, times, subject="s2", shots=shots, seed=s).digest for s in range(4)]
    assert len(set(drawn)) > 1


def test_few_shots_that_cannot_be_had_are_refused():
    subjects = np.repeat(["s0", "s1"], 10)
    times, recordings = seconds(10, recordings=2)
    labels = np.tile([0] * 5 + [1] * 5, 2)
    with pytest.raises(ValueError, match=r"'s1' has 5 of class 0, 5 of class 1: too few for 4 windows per class"):
        few_shot(subjects, labels, recordings, times, subject="s1", shots=4)
    with pytest.raises(ValueError, match="class labels"):
        few_shot(subjects, labels[:, None].astype(float), recordings, times, subject="s1", shots=1)
    unknown = Times.of_samples(np.full(20, -1), 100, 100.0)
    with pytest.raises(ValueError, match="recording r1: the file does not say when"):
        few_shot(subjects, labels, recordings, unknown, subject="s1", shots=1)


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_a_division_in_time_is_contiguous_with_a_gap(val_fraction):
    times, recordings = seconds(50, recordings=3)
    order = np.random.default_rng(1).permutation(150)  # the order of the rows does not matter
    times, recordings = Times(times.starts[order], times.lengths[order]), recordings[order]
    split = split_in_time(recordings, times, val_fraction=val_fraction, test_fraction=0.3)
    check_leakage(split, np.repeat("one subject", 150), recordings, times)
    for name in ("r0", "r1", "r2"):
        spans = [times.starts[rows[recordings[rows] == name]] for rows in split.parts.values()]
        ends = [(s.min(), s.max()) for s in spans if len(s)]
        assert all(later[0] - earlier[1] >= 2 for earlier, later in itertools.pairwise(ends))
        assert ends[0][0] == 0
        assert ends[-1] == (35, 49)
    with pytest.raises(ValueError, match="too short to be divided in time"):
        split_in_time(np.array(["r", "r"]), Times(np.arange(2.0), np.asarray(1.0)), test_fraction=0.3)


def test_windows_dealt_out_singly_are_refused_with_the_reason():
    times, recordings = seconds(60)
    subjects = np.repeat("one", 60)
    shuffled = split_random_windows(subjects, val_fraction=0.3, seed=0)
    with pytest.raises(
        ValueError, match=r"recording r0 \d+ windows touch their neighbour.*recognises the moment instead"
    ):
        check_leakage(shuffled, subjects, recordings, times)
    with pytest.raises(ValueError, match="touch their neighbour"):  # published rules may touch, but not like that
        check_times(shuffled.parts, recordings, times, gap=0.0)


def test_overlap_is_refused_and_touching_only_where_it_is_not_allowed():
    times, recordings = seconds(40, stride=0.25)
    parts = {"train": np.arange(20), "test": np.arange(20, 40)}  # the last window of train reaches into test
    with pytest.raises(
        ValueError, match=r"1 windows overlap their .*the window at 4\.75 s is in train, the one at 5 s in"
    ):
        check_times(parts, recordings, times, gap=0.0)
    parts["train"] = np.arange(17)  # ends at 5 s, where the test begins
    check_times(parts, recordings, times, gap=0.0)
    with pytest.raises(ValueError, match="touch their neighbour"):
        check_times(parts, recordings, times)
    parts["train"] = np.arange(13)
    check_times(parts, recordings, times)
    apart = np.array(["a"] * 20 + ["b"] * 20)
    check_times({"train": np.arange(20), "test": np.arange(20, 40)}, apart, times)  # other recordings do not matter


def test_recordings_may_be_the_unit():
    recordings = np.repeat([f"s{i % 3}_trial{i}" for i in range(12)], 5)
    subjects = np.array([name.split("_")[0] for name in recordings])
    split = split_by_recording(recordings, val_fraction=0.25, test_fraction=0.25, seed=1)
    assert [len(rows) for rows in split.parts.values()] == [30, 15, 15]
    check_leakage(split, subjects, recordings)
    broken = Split(split.train[:-1], split.train[-1:], split.test, unit="recording")
    with pytest.raises(ValueError, match=r"recording .* in both train and val"):
        check_leakage(broken, subjects, recordings)


def test_equal_windows_are_found_whatever_they_are_called():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(8, 3, 50)).astype(np.float32)
    signal[7] = signal[2]
    signal[[3, 6]] = 5.0  # no signal: that they are equal says nothing
    hashes = hash_windows(signal)
    assert hashes[3] == hashes[6] == NO_SIGNAL
    assert later_copies(hashes).tolist() == [False] * 7 + [True]
    assert [group.tolist() for group in repeated(hashes)] == [[2, 7]]
    subjects, recordings = np.array(list("aaaabbbb")), np.array(list("rrrrssst"))
    parts = {"train": np.arange(4), "test": np.arange(4, 8)}
    with pytest.raises(
        ValueError, match=r"recording r of subject a in train .* recording t of subject b in test .all 1 windows"
    ):
        check_content(parts, hashes, subjects, recordings)
    check_content({"train": np.arange(4), "test": np.arange(4, 7)}, hashes, subjects, recordings)
    nearly = signal[2].copy()
    nearly[0, 0] = np.nextafter(nearly[0, 0], np.float32(9))
    assert hash_windows(nearly[None])[0] != hashes[2]


@pytest.mark.parametrize("unit", ["recording", "time"])
def test_stored_splits_of_other_units_come_back(tmp_path, unit):
    times, recordings = seconds(20, recordings=5)
    subjects = np.repeat("one", 100)
    if unit == "time":
        split = split_in_time(recordings, times, test_fraction=0.3, subjects=subjects)
    else:
        split = split_by_recording(recordings, seed=2)
    save_split(split, tmp_path / "split.json")
    back = load_split(tmp_path / "split.json", subjects, recordings)
    assert (back.unit, back.digest) == (split.unit, split.digest)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(back.parts[part], split.parts[part])
    with pytest.raises(ValueError, match=r"this store has 99|where recordings other"):
        load_split(tmp_path / "split.json", subjects[:99], np.array([*recordings[:98], "other"]))


LISTS = {
    "lists.txt": "# published\ntrain: s00 s01\ns02\n\nvalidation:\ns03\n[test]\ns04\n",
    "lists.csv": "subject,age,split\ns00,30,train\ns00,30,train\ns01,3,train\ns02,4,Train\ns03,9,dev\ns04,8,eval\n",
    "lists.tsv": "participant_id\tset\ns00\ttrain\ns01\ttrain\ns02\ttrain\ns03\tval\ns04\ttest\n",
    "lists.json": '{"train": ["s00", "s01", "s02"], "valid": ["s03"], "test": ["s04"]}',
    "map.json": '{"s00": "train", "s01": "train", "s02": "train", "s03": "val", "s04": "test"}',
}


@pytest.mark.parametrize("name", [*LISTS, "folder"])
def test_published_lists_in_every_form(tmp_path, name):
    subjects, _ = windows_of(6, per_subject=2)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for part, entries in (("train", "s00\ns01\ns02\n"), ("val", "s03\n"), ("test", "s04")):
            (path / f"{part}.txt").write_text(entries)
    else:
        path.write_text(LISTS[name])
    split = load_split(path, subjects)
    assert split.subjects == {"train": ("s00", "s01", "s02"), "val": ("s03",), "test": ("s04",)}
    assert split.train.tolist() == [0, 1, 2, 3, 4, 5]
    assert 10 not in np.concatenate(list(split.parts.values()))  # s05 is in no list


def test_published_lists_of_recordings_by_path_or_stem(tmp_path):
    recordings = np.array(["edf/train/a_s001_t000.edf", "edf/train/b_s001_t000.edf#2", "edf/eval/c_s001_t000.edf"])
    subjects = Names.of(np.array(["a", "b", "c"]))
    (tmp_path / "l.csv").write_text(
        "file;part\na_s001_t000;train\nb_s001_t000.edf;val\nedf/eval/c_s001_t000.edf;test\n"
    )
    split = load_split(tmp_path / "l.csv", subjects, recordings)
    assert [rows.tolist() for rows in split.parts.values()] == [[0], [1], [2]]
    same = Names.of(np.array(["a", "b", "a"]))  # a subject in two parts is refused, though its recordings are not
    with pytest.raises(ValueError, match="leakage: subject a in both train and test"):
        load_split(tmp_path / "l.csv", same, recordings)


@pytest.mark.parametrize("name", ["l.txt", "l.csv"])
def test_published_lists_of_trials_are_not_cut_at_their_numbers(tmp_path, name):
    """`#trial01` is part of a recording's name, a comment stands behind a blank."""
    recordings = Names.of(np.array([f"{s}/1.cnt#trial{i:02d}" for s in "abc" for i in (1, 2)]))
    subjects = Names.of(np.repeat(["a", "b", "c"], 2))
    text = "train:\na/1.cnt#trial02 # the second\nval:\nb/1.cnt#trial01\ntest:\nc/1.cnt\n"
    table = "recording,split\na/1.cnt#trial02,train\n# a comment\nb/1.cnt#trial01,val\nc/1.cnt,test\n"
    (tmp_path / name).write_text({"l.txt": text, "l.csv": table}[name])
    split = load_split(tmp_path / name, subjects, recordings)
    assert [rows.tolist() for rows in split.parts.values()] == [[1], [2], [4, 5]]


@pytest.mark.parametrize("name", ["lists.txt", "lists.csv", "lists.json", "map.json"])
def test_published_lists_as_other_systems_save_them(tmp_path, name):
    subjects, _ = windows_of(6)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + LISTS[name].replace("\n", "\r\n").encode())
    assert load_split(tmp_path / name, subjects).subjects["train"] == ("s00", "s01", "s02")


BROKEN_LISTS = {
    "garbage.txt": bytes(range(256)),
    "garbage.csv": bytes(range(256)) * 4,
    "garbage.json": bytes(range(256)),
    "empty.txt": b"",
    "empty.csv": b"",
    "empty.json": b"",
    "deep.json": b'{"train": ' + b"[" * 200_000,
    "cut.json": b'{"train": ["s00"], "va',
    "number.json": b'{"train": [' + b"9" * 5000 + b"]}",
    "null.json": b'{"train": null}',
    "latin.txt": "train:\ns00\xe9\n".encode("latin-1"),
    "wide.csv": b"subject,split\ns00,train,x,y\ns01\n",
    "quote.csv": b'subject,split\n"' + b"x" * 200_000 + b",train\n",
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_broken_lists_get_one_sentence_with_their_name(tmp_path, name):
    subjects, _ = windows_of(4)
    (tmp_path / name).write_bytes(BROKEN_LISTS[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refusal:
        load_split(tmp_path / name, subjects, subjects)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", LISTS)
def test_damaged_lists_are_read_or_refused_in_one_sentence(tmp_path, name):
    subjects, _ = windows_of(6)
    refusals, read = [], 0
    for case in range(150):
        rng = np.random.default_rng((11, case))
        change = mutated if case % 2 else mutated_text
        (tmp_path / name).write_bytes(change(LISTS[name].encode(), rng))
        try:
            load_split(tmp_path / name, subjects)
            read += 1
        except ValueError as error:
            refusals.append(str(error))
    assert read + len(refusals) == 150
    assert len(refusals) > 30
    assert all(str(tmp_path / name) in text or "leakage" in text for text in refusals)
    assert {len(text.splitlines()) for text in refusals} == {1}


@pytest.mark.parametrize(("name", "head", "line"), [("l.txt", "train:", "{}"), ("l.csv", "subject,split", "{},train")])
def test_lists_as_long_as_a_corpus_are_read(tmp_path, name, head, line):
    """Looking every entry up among all the others would take half an hour."""
    entries = [f"s{i:06d}" for i in range(300_000)]
    (tmp_path / name).write_text("\n".join([head, *(line.format(entry) for entry in entries)]))
    assert read_lists(tmp_path / name)["train"] == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: s00\nval: s00\n", "entry s00 in both train and val"),
        ("train: s00 s77 s78\n", r"2 of 3 entries have no windows in the stores .s77, s78"),
        ("train: x y\n", r"no entry is a subject or a recording .*in the lists: x, y; in the stores: s00"),
        ("s00\ntrain: s01\n", r"line 1: 's00' stands before the first part"),
        ("val: s00\n", "lists nobody for training"),
        ("train: s00 s00\n", "lists s00 twice in train"),
    ],
)
def test_lists_that_cannot_be_used_are_refused_by_name(tmp_path, content, message):
    subjects, _ = windows_of(4)
    (tmp_path / "l.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path / "l.txt", subjects, subjects)


def test_tables_without_ids_or_parts_are_refused(tmp_path):
    (tmp_path / "l.csv").write_text("who,where\ns00,train\n")
    with pytest.raises(ValueError, match=r"needs a column of ids .* found who, where"):
        load_split(tmp_path / "l.csv", np.array(["s00"]))
    (tmp_path / "l.csv").write_text("subject,split\ns00,holdout\n")
    with pytest.raises(ValueError, match="row 2: part 'holdout' of 's00'"):
        load_split(tmp_path / "l.csv", np.array(["s00"]))
