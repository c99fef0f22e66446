"""The claims on the input of large runs: the same batches for any hosts, threads and restarts, in both formats."""

import numpy as np
import pytest

from data_pipeline.convert_store import convert
from data_pipeline.formats import open_stores
from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, create_store

MONTAGES = [
    montage_of(("FP1", "CZ", "O2"), name="three"),
    montage_of(("F3", "F4", "T7", "P3", "P4"), name="five"),
    montage_of(("C3", "C4"), name="two"),
]
SIZES = (61, 93, 30)  # windows of each montage, over both stores
FLAT, BROKEN = {3, 40, 77, 101}, {8, 55, 90}  # rows of the first store


def write(path, sizes, seed):
    rng = np.random.default_rng(seed)
    first = 0
    with create_store(path, StoreInfo(128.0, 80, 0.625)) as writer:
        for i, n in enumerate(sizes):
            signal = rng.normal(0, 20, (n, len(MONTAGES[i]), 80))
            rows = first + np.arange(n)
            signal[np.isin(rows, list(FLAT))] = 4.0
            who = {"subject": f"s{seed}{i}", "recording": f"r{seed}{i}"}
            writer.add(f"g{i}", signal, MONTAGES[i], **who, start_samples=80 * np.arange(n))
            first += n
    return path


@pytest.fixture(scope="module", params=["hdf5", "array_record"])
def stores(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    files = [write(folder / "a.h5", (41, 63, 14), 1), write(folder / "b.h5", (20, 30, 16), 2)]
    if request.param == "array_record":
        shards = folder / "shards"
        shards.mkdir()
        for file in files:
            convert([file], shards / file.stem, shard_windows=7)
        return open_stores([shards])
    return open_stores(files)


@pytest.fixture
def broken(stores, monkeypatch):
    """Values that are not finite in some rows of the first store: no writer lets them in, a failing disk does."""
    kind, bad = type(stores[0]), stores[0]
    read_into = kind.read_into

    def spoilt(self, rows, windows):
        read_into(self, rows, windows)
        for row, window in zip(np.asarray(rows).tolist(), windows, strict=True):
            if self is bad and row in BROKEN:
                window[0, 5] = np.nan

    monkeypatch.setattr(kind, "read_into", spoilt)
    return stores


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].tobytes() == second[key].tobytes(), key


def settings(**what):
    return LoaderConfig(batch_size=8, seed=11, noise_uv=1.5, channel_dropout=0.2, **what)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("grouping", ["montage", "padded"])
def test_the_rows_of_the_hosts_are_those_of_one_host_disjoint_and_complete(broken, hosts, grouping):
    config = settings(grouping=grouping)
    whole = make_dataset(broken, None, config)
    parts = [make_dataset(broken, None, config, host_index=h, host_count=hosts) for h in range(hosts)]
    for step in range(len(whole)):
        found = [part.batch(step) for part in parts]
        assert all(len(f["window_id"]) == 8 // hosts for f in found)
        assert_same({key: np.concatenate([f[key] for f in found]) for key in found[0]}, whole.batch(step))
    # each host replaces and counts the bad windows of its own rows: together they met those that one host meets
    assert set().union(*(part._bad for part in parts)) == whole._bad
    assert sum(part.num_bad_windows for part in parts) == whole.num_bad_windows > 0


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_the_hosts_together_see_every_window_of_an_epoch_once(stores, hosts):
    config = LoaderConfig(batch_size=8, seed=3, drop_remainder=False, shuffle=False)
    seen = []
    for host in range(hosts):
        for batch in make_dataset(stores, None, config, host_index=host, host_count=hosts):
            seen += batch["window_id"][batch["window_mask"]].tolist()
    assert sorted(seen) == list(range(sum(SIZES)))


@pytest.mark.parametrize("threads", [0, 2, 4])
def test_threads_and_restarts_at_any_step_change_no_bit(broken, threads):
    expected = make_dataset(broken, None, settings())
    length = 3 * len(expected)
    batches = [expected.batch(step) for step in range(length)]
    for start in (0, *np.random.default_rng(threads).integers(1, length, size=3).tolist()):
        fresh = make_dataset(broken, None, settings(reader_threads=threads))  # as after a restart
        for step, batch in enumerate(fresh.iterate(start, length), start):
            assert_same(batch, batches[step])


def test_montages_come_in_proportion_at_every_moment_of_an_epoch(stores):
    data = make_dataset(stores, None, LoaderConfig(batch_size=4))
    steps = np.array([size // 4 for size in SIZES])
    channels = [data.batch(step)["signal"].shape[1] for step in range(len(data))]
    came = np.array([[c == len(montage) for montage in MONTAGES] for c in channels])
    np.testing.assert_array_equal(came.sum(axis=0), steps)
    progress = np.arange(1, len(data) + 1)[:, None] / len(data)
    assert np.abs(np.cumsum(came, axis=0) - progress * steps).max() <= 1.0, "a montage is never a batch ahead or behind"


def test_bad_windows_are_counted_once_and_replaced_by_the_same_usable_ones(broken):
    bad = FLAT | BROKEN

    def epoch(number):
        data = make_dataset(broken, None, LoaderConfig(batch_size=1, seed=4))
        steps = range(number * len(data), (number + 1) * len(data))
        rows = [data.batch(step) for step in steps]
        for batch in rows:
            signal = batch["signal"][0]
            assert np.isfinite(signal).all()
            assert np.ptp(signal, axis=1).max() > 0
            store, row = data.locate(int(batch["window_id"][0]))
            assert not (store == 0 and row in bad)
        assert data.num_bad_windows == len(bad) + len(FLAT & set(range(66)))  # the second store has flat rows too
        return sorted(int(batch["window_id"][0]) for batch in rows)

    assert epoch(0) == epoch(1), "a window's replacement does not depend on when it comes"
