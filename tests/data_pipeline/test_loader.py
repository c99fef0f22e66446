"""Batches: a function of (data, seed, step) alone; complete evaluation; one montage per batch; exact padding."""

import dataclasses

import numpy as np
import pytest

from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store

THREE = montage_of(("FP1", "CZ", "O2"), name="three")
FIVE = montage_of(("F3", "F4", "T9", "P3", "P4"), name="five")  # T9 is not in the vocabulary


def make_store(path, groups, *, n_times=80, sfreq=256.0, labelled=True, spoil=None):
    """A store of `groups` [(montage, n), ...]; window i of the file holds the constant-plus-ramp signature of i."""
    info = StoreInfo(sfreq, n_times, n_times / sfreq, class_names=["a", "b", "c"] if labelled else None)
    first = 0
    with create_store(path, info) as writer:
        for g, (montage, n) in enumerate(groups):
            number = first + np.arange(n)
            ramp = np.arange(n_times) / n_times
            signal = number[:, None, None] + 0.25 * np.arange(len(montage))[:, None] / len(montage) + 0.1 * ramp
            if spoil is not None:
                signal[np.isin(number, spoil)] = 7.0
            writer.add(
                f"g{g}",
                signal,
                montage,
                subject=f"s{g}",
                recording=f"r{g}",
                start_samples=number * n_times,
                labels=number % 3 if labelled else None,
            )
            first += n
    return WindowStore(path)


@pytest.fixture
def mixed(tmp_path):
    """17 windows of THREE and 31 of FIVE in one file."""
    return make_store(tmp_path / "mixed.h5", [(THREE, 8), (FIVE, 31), (THREE, 9)])


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_keys_shapes_and_dtypes_are_the_contract(mixed):
    data = make_dataset(mixed, None, LoaderConfig(batch_size=4))
    for step in range(len(data)):
        batch = data.batch(step)
        c = batch["signal"].shape[1]
        found = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
        assert found == {
            "signal": ((4, c, 80), "float32"),
            "locations": ((4, c, 3), "float32"),
            "channel_ids": ((4, c), "int32"),
            "channel_mask": ((4, c), "bool"),
            "patch_mask": ((4, 2), "bool"),
            "window_mask": ((4,), "bool"),
            "window_id": ((4,), "int32"),
            "label": ((4,), "int32"),
        }
    assert data.shapes == [(4, 3, 80), (4, 5, 80)]


def test_rows_carry_the_window_they_name(mixed):
    data = make_dataset(mixed, None, LoaderConfig(batch_size=4))
    for step in range(len(data)):
        batch = data.batch(step)
        montage = {3: THREE, 5: FIVE}[batch["signal"].shape[1]]
        for row, number in enumerate(batch["window_id"]):
            np.testing.assert_array_equal(batch["signal"][row], mixed[number]["signal"])
            np.testing.assert_array_equal(batch["locations"][row], montage.locations)
            np.testing.assert_array_equal(batch["channel_ids"][row], montage.channel_ids)
            assert batch["label"][row] == mixed.labels[number] == number % 3
        assert batch["window_mask"].all()
        assert batch["channel_mask"].all()
        assert batch["patch_mask"].all()


def test_an_epoch_visits_no_window_twice_and_the_next_in_another_order(mixed):
    data = make_dataset(mixed, None, LoaderConfig(batch_size=4, seed=5))
    assert len(data) == 17 // 4 + 31 // 4
    epochs = [
        np.concatenate([data.batch(e * len(data) + k)["window_id"] for k in range(len(data))]).tolist()
        for e in range(3)
    ]
    assert all(len(set(e)) == 4 * len(data) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert set().union(*epochs) == set(range(48)), "windows left out as remainder must come in other epochs"


def test_buckets_alternate_in_proportion_or_follow_each_other(mixed):
    def channels(interleave):
        data = make_dataset(mixed, None, LoaderConfig(batch_size=4, interleave=interleave))
        return [data.batch(k)["signal"].shape[1] for k in range(2 * len(data))]

    proportional = channels("proportional")
    assert proportional == [5, 3, 5, 5, 3, 5, 3, 5, 5, 3, 5] * 2
    assert channels("sequential") == ([3] * 4 + [5] * 7) * 2


def test_the_batch_depends_on_data_seed_and_step_only(mixed):
    config = LoaderConfig(batch_size=4, seed=9, channel_dropout=0.4, noise_uv=3.0)
    data = make_dataset(mixed, None, config)
    forward = [data.batch(k) for k in range(25)]
    fresh = make_dataset(WindowStore(mixed.path), None, config)
    for k in reversed(range(25)):
        assert_same(fresh.batch(k), forward[k])
    other_seed = make_dataset(mixed, None, dataclasses.replace(config, seed=10))
    assert any((other_seed.batch(k)["window_id"] != forward[k]["window_id"]).any() for k in range(3))


@pytest.mark.parametrize("threads", [0, 3])
def test_reading_ahead_and_restarting_change_nothing(mixed, threads):
    config = LoaderConfig(batch_size=4, seed=2, noise_uv=1.0, reader_threads=threads)
    data = make_dataset(mixed, None, config)
    for start in (0, 7, 13):
        stream = data.iterate(start)
        for step in range(start, start + 15):
            assert_same(next(stream), data.batch(step))
    assert len(list(data.iterate(5, 9))) == 4
    assert list(data.iterate(5, 5)) == []


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batch_of_one_host(mixed, hosts):
    config = LoaderConfig(batch_size=4, seed=3, channel_dropout=0.3, noise_uv=2.0)
    whole = make_dataset(mixed, None, config)
    parts = [make_dataset(mixed, None, config, host_index=h, host_count=hosts) for h in range(hosts)]
    assert all(len(part) == len(whole) for part in parts)
    for step in range(20):
        expected = whole.batch(step)
        found = [part.batch(step) for part in parts]
        joined = {key: np.concatenate([f[key] for f in found]) for key in expected}
        assert_same(joined, expected)


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("grouping", ["montage", "padded"])
def test_evaluation_sees_every_window_once(mixed, hosts, grouping):
    rows = np.array([3, 0, 40, 9, 12, 11, 30, 47, 20])
    config = LoaderConfig(batch_size=4, grouping=grouping, channel_dropout=0.5, noise_uv=5.0).for_evaluation()
    seen = []
    for host in range(hosts):
        for batch in make_dataset(mixed, rows, config, host_index=host, host_count=hosts):
            real = batch["window_mask"]
            seen += batch["window_id"][real].tolist()
            assert (batch["window_id"][~real] == -1).all()
            assert not batch["signal"][~real].any()
            assert batch["channel_mask"].any(axis=1).all()
            assert batch["patch_mask"].any(axis=1).all()
            for row in np.flatnonzero(real):
                window = mixed[batch["window_id"][row]]
                np.testing.assert_array_equal(batch["signal"][row, : len(window["signal"])], window["signal"])
                assert batch["label"][row] == window["label"]
    assert sorted(seen) == sorted(rows.tolist())


def test_evaluation_keeps_the_order_asked_for(mixed):
    rows = np.array([30, 10, 20, 3, 35, 9, 46])
    config = LoaderConfig(batch_size=4, grouping="padded").for_evaluation()
    batches = list(make_dataset(mixed, rows, config))
    assert np.concatenate([b["window_id"] for b in batches]).tolist() == [*rows.tolist(), -1]


def test_padding_is_zero_masked_and_at_the_end(tmp_path):
    short = make_store(tmp_path / "short.h5", [(THREE, 6)], n_times=80)
    long = make_store(tmp_path / "long.h5", [(FIVE, 6)], n_times=160)
    config = LoaderConfig(batch_size=6, grouping="padded", channel_buckets=(8,), time_buckets=(200,), noise_uv=1.0)
    data = make_dataset([short, long], None, config)
    assert (len(data), data.shapes) == (2, [(6, 8, 200)])
    montages_met = set()
    for batch in (data.batch(0), data.batch(1)):
        for row in range(6):
            store, own = data.locate(batch["window_id"][row])
            montage, samples = [(THREE, 80), (FIVE, 160)][store]
            c = len(montage)
            montages_met.add(store)
            assert batch["channel_mask"][row].tolist() == [True] * c + [False] * (8 - c)
            assert batch["patch_mask"][row].tolist() == [True] * (samples // 40) + [False] * (5 - samples // 40)
            assert not batch["signal"][row, c:].any()
            assert not batch["signal"][row, :, samples:].any()
            assert not batch["locations"][row, c:].any()
            assert (batch["channel_ids"][row, c:] == -1).all()
            clean = [short, long][store][own]
            assert batch["label"][row] == clean["label"]
            difference = batch["signal"][row, :c, :samples] - clean["signal"]
            assert 0.5 < difference.std() < 1.5, "noise of one microvolt on the real part only"
    assert montages_met == {0, 1}


def test_channel_buckets_take_the_smallest_that_holds(mixed):
    config = LoaderConfig(batch_size=4, grouping="padded", channel_buckets=(16, 4, 8))
    assert make_dataset(mixed, None, config).shapes == [(4, 4, 80), (4, 8, 80)]
    with pytest.raises(ValueError, match=r"5 channels \(montage five\) do not fit the largest bucket, 4"):
        make_dataset(mixed, None, dataclasses.replace(config, channel_buckets=(4,)))


def test_same_montage_of_two_stores_shares_batches_but_not_same_count(tmp_path):
    other = montage_of(("FP1", "CZ", "O1"), name="three")  # same name and count, other electrodes
    a, b = make_store(tmp_path / "a.h5", [(THREE, 3)]), make_store(tmp_path / "b.h5", [(THREE, 5)])
    c = make_store(tmp_path / "c.h5", [(other, 4)])
    data = make_dataset([a, b, c], None, LoaderConfig(batch_size=4))
    assert len(data) == 3
    for step in range(3):
        stores = {data.locate(i)[0] for i in data.batch(step)["window_id"]}
        assert stores <= {0, 1} or stores == {2}


def test_channel_dropout_hides_whole_channels_and_keeps_one(tmp_path):
    store = make_store(tmp_path / "s.h5", [(FIVE, 40)])
    batch = make_dataset(store, None, LoaderConfig(batch_size=40, channel_dropout=0.9)).batch(0)
    kept = batch["channel_mask"].sum(axis=1)
    assert kept.min() == 1
    assert 1.0 < kept.mean() < 2.0  # one is spared, each of the other four stays with probability 0.1
    assert not batch["signal"][~batch["channel_mask"]].any()
    assert batch["signal"][batch["channel_mask"]].any(axis=-1).all()


def test_flat_windows_are_replaced_in_training_always_by_the_same(tmp_path):
    spoil = [1, 5, 6]
    store = make_store(tmp_path / "s.h5", [(THREE, 12)], spoil=spoil)
    data = make_dataset(store, None, LoaderConfig(batch_size=4, seed=1))
    epochs = [[data.batch(3 * e + k) for k in range(3)] for e in range(2)]
    for batches in epochs:
        numbers = np.concatenate([b["window_id"] for b in batches])
        assert not set(numbers.tolist()) & set(spoil)
        assert all(b["window_mask"].all() for b in batches)
        for batch in batches:
            for row, number in enumerate(batch["window_id"]):
                np.testing.assert_array_equal(batch["signal"][row], store[number]["signal"])
                assert batch["label"][row] == store.labels[number]
    totals = [sorted(np.concatenate([b["window_id"] for b in batches]).tolist()) for batches in epochs]
    assert totals[0] == totals[1], "the replacement of a window does not depend on the step"
    assert data.num_bad_windows == 3


def spoiling(read_into, *bad):
    """`read_into` of a file whose windows `bad` have a value that is not finite."""

    def spoilt(self, rows, windows):
        read_into(self, rows, windows)
        for row, window in zip(rows.tolist(), windows, strict=True):
            if row in bad:
                window[-1, 5] = np.nan if row % 2 else -np.inf

    return spoilt


def test_evaluation_keeps_flat_windows_and_masks_those_that_are_not_finite(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s.h5", [(THREE, 5)], spoil=[2])
    monkeypatch.setattr(WindowStore, "read_into", spoiling(WindowStore.read_into, 3))
    (batch,) = make_dataset(store, None, LoaderConfig(batch_size=5).for_evaluation())
    assert batch["window_mask"].tolist() == [True, True, True, False, True]
    assert batch["window_id"].tolist() == [0, 1, 2, 3, 4]
    assert (batch["signal"][2] == 7.0).all()
    assert not batch["signal"][3].any()


def test_a_store_of_flat_windows_is_refused(tmp_path):
    store = make_store(tmp_path / "flat.h5", [(THREE, 4)], spoil=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"flat\.h5 is flat or not finite"):
        make_dataset(store, None, LoaderConfig(batch_size=2)).batch(0)


def test_labels_are_given_when_all_stores_agree_on_them(tmp_path):
    bare = make_store(tmp_path / "bare.h5", [(THREE, 4)], labelled=False)
    labelled = make_store(tmp_path / "labelled.h5", [(THREE, 4)])
    data = make_dataset([labelled, bare], None, LoaderConfig(batch_size=4))
    assert "label" not in data.batch(0)
    assert "bare.h5 has no labels" in data.label_problem
    targets = make_store(tmp_path / "targets.h5", [(THREE, 4)])
    targets.labels = np.arange(8, dtype=np.float32).reshape(4, 2)
    targets.class_names = None
    batch = make_dataset(targets, None, LoaderConfig(batch_size=4)).batch(0)
    np.testing.assert_array_equal(batch["label"], targets.labels[batch["window_id"]])
    assert batch["label"].dtype == np.float32


def test_shuffled_without_dropping_sees_every_window_each_epoch(tmp_path):
    store = make_store(tmp_path / "s.h5", [(THREE, 10)])
    data = make_dataset(store, None, LoaderConfig(batch_size=4, drop_remainder=False))
    assert len(data) == 3
    orders = []
    for epoch in range(2):
        batches = [data.batch(3 * epoch + k) for k in range(3)]
        numbers = np.concatenate([b["window_id"][b["window_mask"]] for b in batches])
        assert sorted(numbers.tolist()) == list(range(10))
        assert [int(b["window_mask"].sum()) for b in batches] == [4, 4, 2]
        orders.append(numbers.tolist())
    assert orders[0] != orders[1]


def test_contradictions_are_refused(mixed, tmp_path):
    with pytest.raises(ValueError, match="80 samples, not a multiple of the patch size 48"):
        make_dataset(mixed, None, LoaderConfig(batch_size=2, patch_size=48))
    with pytest.raises(ValueError, match="montage three has 17 windows, fewer than one batch of 20"):
        make_dataset(mixed, None, LoaderConfig(batch_size=20))
    with pytest.raises(ValueError, match="no windows selected"):
        make_dataset(mixed, np.zeros(0, int), LoaderConfig(batch_size=2))
    with pytest.raises(ValueError, match="has 48 windows"):
        make_dataset(mixed, np.array([48]), LoaderConfig(batch_size=1))
    with pytest.raises(ValueError, match="3 hosts"):
        make_dataset(mixed, None, LoaderConfig(batch_size=4), host_count=3)
    slow = make_store(tmp_path / "slow.h5", [(THREE, 4)], sfreq=200.0)
    with pytest.raises(ValueError, match="200, 256 Hz"):
        make_dataset([mixed, slow], None, LoaderConfig(batch_size=2))
    with pytest.raises(IndexError, match="negative"):
        make_dataset(mixed, None, LoaderConfig(batch_size=2)).batch(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"grouping": "count"},
        {"interleave": "random"},
        {"seed": -1},
        {"channel_dropout": 1.0},
        {"channel_buckets": (4,)},
        {"grouping": "padded", "time_buckets": (100,)},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="loader:"):
        LoaderConfig(**wrong)
