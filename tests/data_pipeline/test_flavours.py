"""The reference's files, from a writer of their own: read right, repaired bit for bit, or read as the reference."""

import h5py
import numpy as np
import pytest
from flavour_files import (
    DISK,
    LOADER,
    MISPLACED,
    brain_noise,
    cut,
    flavour_a,
    flavour_b,
    flavour_c,
    flavour_d,
    scramble,
)

from data_pipeline.formats import open_store
from data_pipeline.montages import CHANNEL_VOCABULARY, electrode_positions
from data_pipeline.old_files import OldFiles, measure_seams, subject_of_group
from data_pipeline.store import WindowStore

RNG = np.random.default_rng(3)


def blocks_of(n, channels, samples, groups=("data_group_0",), scale=20.0):
    return {name: cut(brain_noise(RNG, channels, n * samples, scale), samples) for name in groups}


def by_name(store, row, name):
    """The signal that the store says belongs to a channel."""
    montage = store.montages[store.montage_names[row]]
    return store[row]["signal"][montage.ch_names.index(name)]


def test_flavour_a_rows_are_found_by_name_in_the_order_of_the_pretrained_models(tmp_path):
    groups = ("data_group_2", "data_group_10", "data_group_0")
    blocks = blocks_of(2, 22, 1280, groups)
    labels = {name: np.array([i, 1], np.int64) for i, name in enumerate(groups)}
    path = flavour_a(tmp_path / "train.h5", blocks, labels)
    with h5py.File(path, "a") as f:
        f["index_map"] = np.arange(6)
    store = WindowStore(path)
    assert (store.flavour.letter, store.sfreq, len(store)) == ("A", 256.0, 6)
    assert list(store.labels) == [2, 1, 1, 1, 0, 1]  # data_group_0, _10, _2: the order of h5py
    assert list(store.montages["tuh-bipolar-22"].ch_names) == LOADER
    for row, group in enumerate(("data_group_0", "data_group_10", "data_group_2")):
        for name in DISK:
            true = blocks[group][1][DISK.index(name)].astype(np.float32)
            np.testing.assert_array_equal(by_name(store, 2 * row + 1, name), true)


def test_flavour_a_as_the_reference_reads_it_has_its_mismatch(tmp_path):
    blocks = blocks_of(1, 22, 1280)
    path = flavour_a(tmp_path / "train.h5", blocks, {"data_group_0": np.zeros(1, np.int8)})
    store = WindowStore(path, OldFiles.as_reference())
    np.testing.assert_array_equal(store[0]["signal"], blocks["data_group_0"][0].astype(np.float32))  # rows untouched
    montage = store.montages[store[0]["montage"]]
    assert list(montage.ch_names) == LOADER
    for row, true in enumerate(DISK):
        placed = MISPLACED.get(true, true)
        expected = electrode_positions([placed])[0].astype(np.float32)
        np.testing.assert_array_equal(montage.locations[row], expected)
        assert CHANNEL_VOCABULARY[montage.channel_ids[row]] == placed


def test_labels_of_every_shape_are_read_and_missing_ones_refused_at_once(tmp_path):
    blocks = blocks_of(3, 22, 1280)
    per_channel = RNG.integers(0, 6, (3, 22)).astype(np.int8)
    store = WindowStore(flavour_a(tmp_path / "tuar.h5", blocks, {"data_group_0": per_channel}))
    assert store.labels.dtype == np.int32
    for name in DISK:  # labels of channels move with their channels
        np.testing.assert_array_equal(store.labels[:, LOADER.index(name)], per_channel[:, DISK.index(name)])
    reference = WindowStore(tmp_path / "tuar.h5", OldFiles.as_reference())
    np.testing.assert_array_equal(reference.labels, per_channel)
    assert WindowStore(flavour_a(tmp_path / "bare.h5", blocks)).labels is None
    two = blocks_of(1, 22, 1280, ("data_group_0", "data_group_1"))
    with pytest.raises(ValueError, match=r"1 groups have no labels .the first: 'data_group_1'"):
        WindowStore(flavour_a(tmp_path / "half.h5", two, {"data_group_0": np.zeros(1, np.int64)}))
    mixed = {"data_group_0": np.zeros(1, np.int64), "data_group_1": np.zeros((1, 22), np.int8)}
    with pytest.raises(ValueError, match=r"mixed\.h5: .*labels of different kinds"):
        WindowStore(flavour_a(tmp_path / "mixed.h5", two, mixed))
    with pytest.raises(ValueError, match=r"short\.h5: data_group_0/y has shape .2,., which does not fit 3 windows"):
        WindowStore(flavour_a(tmp_path / "short.h5", blocks, {"data_group_0": np.zeros(2, np.int64)}))


def test_groups_of_up_to_1999_windows_and_other_window_lengths_need_a_rate(tmp_path):
    x = RNG.normal(size=(1999, 22, 8))
    path = flavour_a(tmp_path / "test.h5", {"data_group_0": x}, {"data_group_0": np.zeros(1999, np.int64)})
    with pytest.raises(ValueError, match=r"test\.h5 does not say its unit and sfreq"):
        WindowStore(path)
    store = WindowStore(path, OldFiles(unit="uV", sfreq=100))
    assert len(store) == 1999
    np.testing.assert_array_equal(by_name(store, 1998, "T4-A2"), x[1998, 13].astype(np.float32))
    np.testing.assert_array_equal(store.read(np.array([5, 1700]))[1, 21], x[1700, 13].astype(np.float32))


@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_flavour_b_is_repaired_bit_for_bit(tmp_path, n):
    recordings = {f"aaaaaa{c}a_s001_t000": brain_noise(RNG, 22, n * 1280 + 500) for c in "cb"}
    path = flavour_b(tmp_path / "TUEG_22_channels_0.h5", recordings, 1280, LOADER)
    store = WindowStore(path)
    assert (store.flavour.corpora, store.scrambled, store.sfreq) == ("TUEG", True, 256.0)
    right = [cut(recordings[stem], 1280).astype(np.float16).astype(np.float32) for stem in sorted(recordings)]
    np.testing.assert_array_equal(store.read(np.arange(2 * n)), np.concatenate(right))  # whole runs
    rows = RNG.permutation(2 * n)[:5]
    np.testing.assert_array_equal(store.read(rows), np.concatenate(right)[rows])  # single windows
    assert store.subjects.unique().tolist() == ["aaaaaaba", "aaaaaaca"]
    assert list(store.start_samples[: n + 1]) == [*(1280 * i for i in range(n)), 0]
    assert store.seams().ratio < 0.6
    reference = WindowStore(path, OldFiles.as_reference())
    scrambled = scramble(recordings["aaaaaaba_s001_t000"], 1280).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(reference.read(np.arange(n)), scrambled)


def test_right_windows_in_a_file_like_b_are_left_alone(tmp_path):
    signal = brain_noise(RNG, 20, 6 * 1280)
    with h5py.File(tmp_path / "w.h5", "w") as f:
        f["aaaaaaaa_s001_t000/X"] = cut(signal, 1280).astype(np.float16)
        f.attrs["channel_names"] = LOADER[:20]
    store = WindowStore(tmp_path / "w.h5")
    assert not store.scrambled
    assert store.seams().ratio > 2
    np.testing.assert_array_equal(store[4]["signal"], cut(signal, 1280)[4].astype(np.float16).astype(np.float32))
    forced = WindowStore(tmp_path / "w.h5", OldFiles(windows="scrambled"))
    assert not np.array_equal(forced[4]["signal"], store[4]["signal"])


def test_where_the_signal_does_not_decide_b_is_scrambled_and_others_are_not(tmp_path):
    noise = RNG.normal(size=(22, 40 * 1280))
    path = flavour_b(tmp_path / "n.h5", {"aaaaaaaa_s001_t000": noise}, 1280, LOADER)
    store = WindowStore(path)
    assert store.seams().unclear
    assert store.scrambled
    np.testing.assert_array_equal(store.read(np.arange(40)), cut(noise, 1280).astype(np.float16).astype(np.float32))
    shuffled = blocks_of(40, 22, 1280)["data_group_0"][RNG.permutation(40)]  # windows of A are in no order of time
    labelled = flavour_a(tmp_path / "a.h5", {"data_group_0": shuffled}, {"data_group_0": np.zeros(40, np.int64)})
    assert not WindowStore(labelled).scrambled


def test_the_seams_of_a_known_block():
    """Two channels of two windows of two samples, written out by hand."""
    stored = np.array([[[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]])  # as scrambled: 0..3 is channel 0
    seams = measure_seams([(stored, 2)])
    assert (seams.scrambled, seams.stored) == (1.0, 9.0)  # 1->2 and 11->12; 1->10 and 3->12
    assert np.isnan(measure_seams([(stored[:1], 1)]).ratio)


def test_siena_rows_are_in_no_known_order(tmp_path):
    signal = brain_noise(RNG, 29, 3 * 1280)
    path = flavour_b(tmp_path / "SIENA_29_channels.h5", {"PN00-1": signal}, 1280)
    with pytest.raises(ValueError, match=r"looks like Siena.*differs from run to run.*prepare the corpus again"):
        WindowStore(path)
    store = WindowStore(path, OldFiles("siena-29"))
    assert store.scrambled
    assert list(store.subjects) == ["PN00"] * 3
    np.testing.assert_array_equal(store[1]["signal"], signal[:, 1280:2560].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("channels", "samples", "order", "sfreq", "factor"),
    [
        (16, 1280, "apava-16", 256.0, 1),
        (26, 320, "tdbrain-26", 256.0, 1),
        (19, 1280, "mumtaz-19", 256.0, 1e6),
        (13, 1280, "modma-13-template", 250.0, 1),
    ],
)
def test_flavour_c(tmp_path, channels, samples, order, sfreq, factor):
    blocks = [20 / factor * RNG.normal(size=(3, channels, samples)) for _ in range(2)]
    path = flavour_c(tmp_path / "val.h5", blocks, [np.zeros(3), np.ones(3)])
    store = WindowStore(path)
    assert (store.flavour.letter, list(store.montages), store.sfreq) == ("C", [order], sfreq)
    np.testing.assert_allclose(store[4]["signal"], blocks[1][1] * factor, rtol=3e-7)
    assert list(store.labels) == [0, 0, 0, 1, 1, 1]
    as_is = WindowStore(path, OldFiles.as_reference())
    np.testing.assert_array_equal(as_is[4]["signal"], blocks[1][1].astype(np.float32))


def test_modma_positions_are_the_templates_own_unless_asked_otherwise(tmp_path):
    path = flavour_c(tmp_path / "m.h5", [RNG.normal(size=(1, 128, 1280))], [np.zeros(1)])
    (montage,) = WindowStore(path).montages.values()
    np.testing.assert_allclose(
        montage.locations[[0, 54]], [[0.06266, 0.05977, -0.02791], [0, -0.02315, 0.09519]], atol=1e-5
    )
    (head,) = WindowStore(path, OldFiles("modma-128")).montages.values()
    np.testing.assert_allclose(
        head.locations[[0, 54]], [[0.06266, 0.05977, 0.00143], [0, -0.01066, 0.13208]], atol=1e-5
    )


def test_flavour_d_and_the_other_file_of_19_channels(tmp_path):
    x, y = RNG.normal(161, 547, size=(4, 60, 200)), RNG.normal(size=(4, 12))
    store = WindowStore(flavour_d(tmp_path / "d.h5", [x], [y]))
    assert (store.flavour.corpora, store.sfreq, list(store.montages)) == ("MoBI", 100.0, ["mobi-60"])
    np.testing.assert_array_equal(store.labels, y.astype(np.float32))
    np.testing.assert_array_equal(store[3]["signal"], x[3].astype(np.float32))
    small = WindowStore(flavour_d(tmp_path / "e.h5", [x[:, :19]], [y]))
    assert list(small.montages) == ["mobi-19"]  # not Mumtaz, whose labels are classes


def test_subjects_of_numbered_groups_are_unknown_and_not_divided(tmp_path):
    from data_pipeline.splits import check_disjoint, split_by_subject

    blocks = blocks_of(2, 22, 1280, ("data_group_0", "data_group_1"))
    labels = {name: np.zeros(2, np.int64) for name in blocks}
    train, test = (WindowStore(flavour_a(tmp_path / f"{part}.h5", blocks, labels)) for part in ("train", "test"))
    check_disjoint({"train": train.subjects.unique().tolist(), "test": test.subjects.unique().tolist()})
    check_disjoint({"train": train.recordings.unique().tolist(), "test": test.recordings.unique().tolist()})
    with pytest.raises(ValueError, match="1 subjects cannot be divided"):
        split_by_subject(train.subjects, train.labels)


@pytest.mark.parametrize(
    ("group", "subject"),
    [
        ("aaaaaahl_s002_t000", "aaaaaahl"),
        ("00000258_s003_t001", "00000258"),
        ("extra_aaaaaajy_s001_t001", "aaaaaajy"),
        ("PN14-3", "PN14"),
        ("data_group_3", None),
        ("recording", None),
    ],
)
def test_subjects_in_group_names(group, subject):
    assert subject_of_group(group) == subject


def test_unknown_files_say_which_orders_would_fit(tmp_path):
    with h5py.File(tmp_path / "u.h5", "w") as f:
        f["mine/X"] = RNG.normal(size=(2, 19, 1280))
    with pytest.raises(ValueError, match=r"u\.h5 does not say its unit and sfreq"):
        open_store(tmp_path / "u.h5")
    with pytest.raises(ValueError, match=r"19 channels fit mumtaz-19 and mobi-19.*channel_order"):
        open_store(tmp_path / "u.h5", OldFiles(unit="uV", sfreq=250))
    named = OldFiles("mumtaz-19", unit="uV", sfreq=250)
    assert list(open_store(tmp_path / "u.h5", named).montages) == ["mumtaz-19"]


def test_names_in_the_file_decide_whatever_the_order(tmp_path):
    order = [str(name) for name in RNG.permutation(LOADER)]
    x = RNG.normal(size=(1, 22, 1280))
    with h5py.File(tmp_path / "p.h5", "w") as f:
        f["data_group_0/X"] = x
        f.attrs["channel_names"] = [f"EEG {name}" for name in order]
    store = WindowStore(tmp_path / "p.h5")
    assert list(store.montages["tuh-bipolar-22"].ch_names) == LOADER
    np.testing.assert_array_equal(by_name(store, 0, "C3-P3"), x[0, order.index("C3-P3")].astype(np.float32))


def test_values_that_are_not_finite_are_zeros_or_kept(tmp_path):
    signal = brain_noise(RNG, 22, 2 * 1280)
    signal[4, 1300] = 1e6  # becomes inf in float16
    path = flavour_b(tmp_path / "o.h5", {"aaaaaaaa_s001_t000": signal}, 1280, LOADER)
    store = WindowStore(path)
    with pytest.warns(UserWarning, match="1 values are not finite"):
        assert store[1]["signal"][4, 20] == 0
    assert store.num_replaced == 1
    assert np.isinf(WindowStore(path, OldFiles(non_finite="keep"))[1]["signal"][4, 20])


def test_headers_that_promise_more_than_the_file_holds_are_refused(tmp_path):
    with h5py.File(tmp_path / "h.h5", "w") as f:
        f.create_dataset("data_group_0/X", shape=(1 << 32, 22, 1280), dtype="f8", chunks=(1, 22, 1280))
    with pytest.raises(
        ValueError, match=r"data_group_0/X declares \(4294967296, 22, 1280\) values, which the file does"
    ):
        WindowStore(tmp_path / "h.h5")
