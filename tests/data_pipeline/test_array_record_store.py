"""ArrayRecord stores: the same windows and batches as HDF5, bit for bit; damage is named; whole or not at all."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from configs.data import open_windows
from configs.schema import DataConfig
from data_pipeline import array_record_store, convert_store
from data_pipeline import store as hdf5_store
from data_pipeline.array_record_store import ArrayRecordStore, create_array_record_store
from data_pipeline.convert_store import convert
from data_pipeline.formats import open_store, open_stores
from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store

PAIR, TRIPLE = montage_of(["C3", "C4"], name="pair"), montage_of(["FZ", "CZ", "PZ"], name="triple")


def write(path, seed=0, *, subjects=4, labels="classes", stride=0.5, n=(7, 4)):
    """Recordings of two montages in turn, microvolts with every bit of float32 in use."""
    rng = np.random.default_rng(seed)
    names = ["rest", "task"] if labels == "classes" else None
    with create_store(path, StoreInfo(100.0, 40, stride, {"notch": 50}, {"seed": seed}, names)) as writer:
        for s in range(subjects):
            montage, count = ((PAIR, n[0]), (TRIPLE, n[1]))[s % 2]
            own = {"classes": np.arange(count) % 2, "targets": rng.normal(size=(count, 3)), None: None}[labels]
            signal = rng.normal(0, 30, (count, len(montage), 40))
            who = {"subject": f"sub-{seed}{s}", "recording": f"sub-{seed}{s}/rest run.edf"}
            writer.add(f"g{seed}{s}", signal, montage, **who, start_samples=np.arange(count) * 50, labels=own)
    return path


def assert_same_windows(first, second):
    assert len(first) == len(second)
    assert (first.sfreq, first.n_times, first.class_names) == (second.sfreq, second.n_times, second.class_names)
    assert first.montages == second.montages
    assert first.info == second.info
    for name in ("subjects", "recordings", "montage_names", "start_samples"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    if first.labels is None:
        assert second.labels is None
    else:
        np.testing.assert_array_equal(first.labels, second.labels)
        assert first.labels.dtype == second.labels.dtype
    for row in range(len(first)):
        assert first[row]["signal"].tobytes() == second[row]["signal"].tobytes()
        assert first[row]["montage"] == second[row]["montage"]


@pytest.fixture
def both(tmp_path):
    return WindowStore(write(tmp_path / "w.h5")), convert([tmp_path / "w.h5"], tmp_path / "w", shard_windows=5)


@pytest.mark.parametrize("labels", ["classes", "targets", None])
def test_there_and_back_every_bit_stays(tmp_path, labels):
    original = WindowStore(write(tmp_path / "w.h5", labels=labels))
    shards = convert([tmp_path / "w.h5"], tmp_path / "shards", shard_windows=6)
    assert isinstance(shards, ArrayRecordStore)
    assert_same_windows(original, shards)
    assert_same_windows(original, convert([tmp_path / "shards"], tmp_path / "back.h5"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.h5", "shards", "w.h5"]
    assert len(list((tmp_path / "shards").glob("*.arrayrecord"))) == -(-len(original) // 6)


def test_rows_are_read_in_the_order_asked_for_over_shards(both):
    hdf5, shards = both
    rows = np.flatnonzero(hdf5.montage_names == "pair")[[9, 2, 2, 13, 0]]
    np.testing.assert_array_equal(shards.read(rows), hdf5.read(rows))
    for store in both:
        with pytest.raises(ValueError, match="share one montage, found pair, triple"):
            store.read(np.arange(len(store)))
        np.testing.assert_array_equal(store[-1]["signal"], store[len(store) - 1]["signal"])


def test_batches_of_both_formats_are_the_same_bits(both):
    config = LoaderConfig(batch_size=4, seed=7, noise_uv=2.0, channel_dropout=0.3)
    first, second = (make_dataset(store, None, config) for store in both)
    for step in range(2 * len(first)):
        a, b = first.batch(step), second.batch(step)
        assert a.keys() == b.keys()
        assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_many_inputs_become_one_store_in_their_order(tmp_path):
    (tmp_path / "many").mkdir()
    paths = [write(tmp_path / "many" / f"{i}.h5", seed=i, n=(3, 2)) for i in (2, 0, 1)]
    convert([tmp_path / "many" / "2.h5"], tmp_path / "shards")
    joined = convert([tmp_path / "shards", tmp_path / "many" / "0.h5", tmp_path / "many" / "1.h5"], tmp_path / "all")
    signals = [window for path in paths for window in map(WindowStore(path).__getitem__, range(10))]
    assert len(joined) == len(signals) == 30
    for row, window in enumerate(signals):
        np.testing.assert_array_equal(joined[row]["signal"], window["signal"])
    assert joined.info.provenance["stores"]["0.h5"]["provenance"] == {"seed": 0}
    folder = convert([tmp_path / "many"], tmp_path / "folder.h5")
    np.testing.assert_array_equal(folder[0]["signal"], WindowStore(paths[1])[0]["signal"])


def test_inputs_that_do_not_fit_together_are_refused(tmp_path):
    first = write(tmp_path / "a.h5")
    for name, what in (("stride", {"stride": 1.0}), ("class names", {"labels": None})):
        other = write(tmp_path / f"{name}.h5", seed=1, **what)
        with pytest.raises(ValueError, match=rf"a\.h5 and .*differ in their {name}"):
            convert([first, other], tmp_path / "out")
    with pytest.raises(ValueError, match="named twice"):
        convert([first, first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written_stays(both, tmp_path, monkeypatch):
    before = {p: p.read_bytes() for p in (tmp_path / "w").iterdir()}
    for out in ("w", "w.h5"):
        with pytest.raises(ValueError, match="exists already"):
            convert([tmp_path / "w.h5"], tmp_path / out)
    assert before == {p: p.read_bytes() for p in (tmp_path / "w").iterdir()}
    info = StoreInfo(100.0, 40, 0.5)
    announced = create_array_record_store(tmp_path / "short", info, num_windows=3)
    with pytest.raises(ValueError, match="3 windows were announced, 0 came"), announced:
        pass

    def disk_full(*_args, **_kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: write() failed: No space left on device")

    monkeypatch.setattr("data_pipeline.array_record_store.ArrayRecordWriter._write", disk_full)
    with pytest.raises(OSError, match=r"the disk is full: .*again was not written"):
        convert([tmp_path / "w.h5"], tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w", "w.h5"]


def test_a_spoilt_signal_is_not_written(tmp_path):
    signal = np.zeros((2, 2, 40))
    signal[1, 0, 3] = np.nan
    known = {"subjects": PAIR_NAMES, "recordings": PAIR_NAMES, "start_samples": np.zeros(2), "labels": None}
    created = create_array_record_store(tmp_path / "s", StoreInfo(100.0, 40, 0.5), num_windows=2)
    with pytest.raises(ValueError, match="not finite"), created as writer:
        writer.add(signal, PAIR, **known)
    assert list(tmp_path.iterdir()) == []


PAIR_NAMES = hdf5_store.Names(["x"], np.zeros(2, int))


def test_missing_truncated_and_damaged_files_are_named(both, tmp_path):
    folder = tmp_path / "w"
    shard = folder / "windows-00001-of-00005.arrayrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"windows-00001-of-00005\.arrayrecord has .* bytes, not .*truncated"):
        ArrayRecordStore(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"windows-00001-of-00005\.arrayrecord is missing: the store has 5 shards"):
        ArrayRecordStore(folder)
    flipped = bytearray(whole)
    flipped[whole.index(both[0][6]["signal"].tobytes()) + 100] ^= 1
    shard.write_bytes(flipped)
    store = ArrayRecordStore(folder)
    with pytest.raises(ValueError, match=r"windows-00001-of-00005\.arrayrecord is damaged \(its checksum"):
        store.verify()
    array_record_store._READERS.close_all()
    assert store[4]["signal"].tobytes() == both[0][4]["signal"].tobytes()
    with pytest.raises(ValueError, match=r"windows-00001-of-00005\.arrayrecord cannot be read \(.*hash mismatch"):
        store[6]
    shard.write_bytes(whole)
    (folder / "index.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.npz is missing or damaged"):
        ArrayRecordStore(folder)
    (folder / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json cannot be read"):
        ArrayRecordStore(folder)


def test_what_is_no_store_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_store(tmp_path / "nothing.h5")
    with pytest.raises(ValueError, match="holds no window store"):
        open_stores([tmp_path])
    with pytest.raises(ValueError, match=r"holds no store\.json"):
        open_store(tmp_path)


def test_a_folder_of_stores_of_both_formats_is_opened_in_order(tmp_path):
    for i in (1, 0, 3):
        write(tmp_path / f"{i}.h5", seed=i)
    convert([tmp_path / "1.h5"], tmp_path / "2")
    (tmp_path / "notes.txt").write_text("not a store")
    (tmp_path / ".2.partial-1").mkdir()
    assert [s.path.name for s in open_stores([tmp_path])] == ["0.h5", "1.h5", "2", "3.h5"]
    windows = open_windows(DataConfig(train=(str(tmp_path / "0.h5"), str(tmp_path / "2"))), labelled=True)
    assert len(windows.subjects.unique()) == 8
    assert sum(len(rows) for rows in windows.parts.values()) == 44


def test_no_more_than_a_few_files_are_open_whatever_the_number_of_stores(tmp_path):
    paths = [write(tmp_path / f"{i:03d}.h5", seed=i, subjects=1, n=(2, 1)) for i in range(hdf5_store.MAX_OPEN + 30)]
    stores = open_stores(paths)
    with h5py.File(tmp_path / "chunked.h5", "w") as chunked, h5py.File(paths[0]) as plain:
        plain.copy("g00", chunked)
        chunked.attrs.update(plain.attrs)
        signal = chunked["g00/X"][:]
        del chunked["g00/X"]
        chunked["g00"].create_dataset("X", data=signal, chunks=(1, 2, 40), compression="gzip")
    own = Path("/proc/self/fd")
    if not own.is_dir():
        pytest.skip("open files are counted where /proc tells them")

    def count():
        return sum(str(tmp_path) in str(link.resolve()) for link in own.iterdir() if link.exists())

    assert count() == 0
    data = make_dataset(stores, None, LoaderConfig(batch_size=8, reader_threads=4))
    for batch in data.iterate(0, 2 * len(data)):
        for row, number in enumerate(batch["window_id"]):
            store, own_row = data.locate(int(number))
            np.testing.assert_array_equal(batch["signal"][row], stores[store][own_row]["signal"])
    assert count() <= hdf5_store.MAX_OPEN
    # what only HDF5 can read (chunks, compression) is the same window
    np.testing.assert_array_equal(WindowStore(tmp_path / "chunked.h5").read(np.array([1, 0])), signal[[1, 0]])


def test_a_file_that_is_replaced_under_an_open_store_is_noticed(tmp_path):
    store = WindowStore(write(tmp_path / "w.h5", seed=1))
    first = store[0]["signal"]
    write(tmp_path / "w.h5", seed=2, subjects=3)
    other = WindowStore(tmp_path / "w.h5")
    assert not np.array_equal(other[0]["signal"], first)
    hdf5_store._DESCRIPTORS.close_all()
    with pytest.raises(ValueError, match="was replaced while it was being read"):
        store[0]
    (tmp_path / "w.h5").unlink()
    hdf5_store._DESCRIPTORS.close_all()
    with pytest.raises(ValueError, match="was removed"):
        other[0]


def test_threads_and_pickled_copies_read_the_same(both):
    hdf5, _ = both
    expected = [hdf5[row]["signal"] for row in range(len(hdf5))]
    wrong = []

    def reads(store, seed):
        rows = np.random.default_rng(seed).integers(len(store), size=200).tolist()
        wrong.extend(row for row in rows if not np.array_equal(store[row]["signal"], expected[row]))

    copies = [pickle.loads(pickle.dumps(store)) for store in both]
    threads = [threading.Thread(target=reads, args=(s, i)) for i, s in enumerate([*both, *both, *copies])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os, sys
import numpy as np
from data_pipeline.formats import open_store
stores = [open_store(path) for path in sys.argv[1:]]
before = [[store[row]["signal"].tobytes() for row in range(len(store))] for store in stores]
child = os.fork()
after = [[store[row]["signal"].tobytes() for row in range(len(store))] for store in stores]
if child == 0:
    os._exit(0 if before == after else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), before == after)
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="processes are not made by fork here")
def test_a_forked_process_reads_the_same(both, tmp_path):
    words = [sys.executable, "-c", FORKED, str(tmp_path / "w.h5"), str(tmp_path / "w")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_command_line(tmp_path, capsys):
    write(tmp_path / "w.h5")
    assert convert_store.main([str(tmp_path / "w.h5"), str(tmp_path / "s"), "--shard-windows", "9"]) == 0
    assert "22 windows" in capsys.readouterr().out
    assert convert_store.main(["--check", str(tmp_path / "s")]) == 0
    assert convert_store.main([str(tmp_path / "w.h5"), str(tmp_path / "s")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert_store.main([str(tmp_path / "w.h5")]) == 2
    assert "then the one to write" in capsys.readouterr().err
