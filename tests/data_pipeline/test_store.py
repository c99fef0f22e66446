"""The window store: atomic writing, random access, and files of the reference that lack our attributes."""

import errno
import json
import pickle

import h5py
import numpy as np
import pytest

from data_pipeline.montages import CHANNEL_ORDERS, Montage, montage_of, named_montage
from data_pipeline.old_files import OldFiles
from data_pipeline.store import StoreInfo, WindowStore, create_store

RNG = np.random.default_rng(0)
INFO = StoreInfo(sfreq=100.0, n_times=50, stride_seconds=0.5, class_names=["rest", "task"])
PAIR, TRIPLE = montage_of(["C3", "C4"]), montage_of(["FZ", "CZ", "PZ"])


def write(path, info=INFO, labels=True):
    """Two recordings of two montages; returns the windows in store order (group names are sorted)."""
    blocks = {"b": (PAIR, RNG.normal(size=(4, 2, 50))), "a": (TRIPLE, RNG.normal(size=(3, 3, 50)))}
    with create_store(path, info) as store:
        for name, (montage, x) in blocks.items():
            store.add(
                name,
                x,
                montage,
                subject=f"sub-{name}",
                recording=f"rec-{name}",
                start_samples=np.arange(len(x)) * 50,
                labels=np.arange(len(x)) % 2 if labels else None,
            )
    return {name: x.astype(np.float32) for name, (_, x) in blocks.items()}


def test_what_is_written_is_read_back(tmp_path):
    blocks = write(tmp_path / "w.h5")
    store = WindowStore(tmp_path / "w.h5")
    assert len(store) == 7
    assert (store.sfreq, store.n_times, store.class_names) == (100.0, 50, ["rest", "task"])
    assert store.montages == {PAIR.name: PAIR, TRIPLE.name: TRIPLE}
    assert list(store.subjects) == ["sub-a"] * 3 + ["sub-b"] * 4
    assert list(store.recordings)[2:4] == ["rec-a", "rec-b"]
    assert list(store.start_samples) == [0, 50, 100, 0, 50, 100, 150]
    assert store.labels.dtype == np.int32
    assert list(store.labels) == [0, 1, 0, 0, 1, 0, 1]
    window = store[5]
    assert (window["montage"], window["label"], window["signal"].dtype) == (PAIR.name, 0, np.float32)
    np.testing.assert_array_equal(window["signal"], blocks["b"][2])
    np.testing.assert_array_equal(store.read(np.array([6, 3, 6])), blocks["b"][[3, 0, 3]])
    np.testing.assert_array_equal(store.read(np.array([0, 2])), blocks["a"][[0, 2]])
    with pytest.raises(ValueError, match="share one montage"):
        store.read(np.array([0, 5]))
    with pytest.raises(IndexError):
        store[7]


def test_schema_fields_of_the_contract(tmp_path):
    write(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5") as f:
        assert {"schema_version", "sfreq", "unit", "window_seconds", "stride_seconds", "window_layout"} <= set(f.attrs)
        assert (f.attrs["unit"], f.attrs["window_layout"], f.attrs["schema_version"]) == ("uV", "nct", "1")
        assert set(json.loads(f.attrs["montages"])) == {PAIR.name, TRIPLE.name}
        assert "channel_names" not in f.attrs  # only a file of one montage has one list of names
        assert set(f["a"].attrs) == {"subject_id", "recording_id", "montage"}
        assert f["a/X"].dtype == np.float32


@pytest.mark.parametrize(
    ("order", "letter"),
    [("tuh-bipolar-22", "L"), ("tuh-bipolar-20", "L"), ("tuh-bipolar-22-disk", "D"), ("apava-16", None)],
)
def test_the_order_of_tuh_pairs_is_stated(tmp_path, order, letter):
    montage = named_montage(order)
    with create_store(tmp_path / "w.h5", INFO) as store:
        store.add(
            "g", np.ones((1, len(montage), 50)), montage, subject="s", recording="r", start_samples=[0], labels=[0]
        )
    with h5py.File(tmp_path / "w.h5") as f:
        assert f.attrs.get("channel_order") == letter
        assert tuple(f.attrs["channel_names"]) == montage.ch_names


def test_regression_targets_and_unlabelled_files(tmp_path):
    with create_store(tmp_path / "r.h5", StoreInfo(100.0, 50, 0.5)) as store:
        store.add(
            "g",
            np.ones((2, 2, 50)),
            PAIR,
            subject="s",
            recording="r",
            start_samples=np.arange(2),
            labels=np.array([[1.5, 2.0, 3.0]] * 2),
        )
    labels = WindowStore(tmp_path / "r.h5").labels
    assert labels.dtype == np.float32
    assert labels.shape == (2, 3)
    write(tmp_path / "u.h5", labels=False)
    store = WindowStore(tmp_path / "u.h5")
    assert store.labels is None
    assert "label" not in store[0]


def test_many_large_montages_fit_the_attributes(tmp_path):
    names = CHANNEL_ORDERS["modma-128"]
    with create_store(tmp_path / "m.h5", StoreInfo(100.0, 4, 1.0)) as store:
        for i in range(12):
            montage = montage_of(names, locations=named_montage("modma-128").locations + i / 1000)
            store.add(
                f"g{i}", np.zeros((1, 128, 4)), montage, subject="s", recording="r", start_samples=np.zeros(1, int)
            )
    assert len(WindowStore(tmp_path / "m.h5").montages) == 12


def test_store_survives_pickling_and_keeps_no_handle(tmp_path):
    write(tmp_path / "w.h5")
    store = WindowStore(tmp_path / "w.h5")
    expected = store[1]["signal"]
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy[1]["signal"], expected)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path, failure):
    path = tmp_path / "w.h5"
    write(path)
    before = path.read_bytes()

    def interrupted():
        with create_store(path, INFO) as store:
            store.add("g", np.zeros((1, 2, 50)), PAIR, subject="s", recording="r", start_samples=np.zeros(1, int))
            raise failure

    with pytest.raises(type(failure)) as caught:
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.h5"]
    if isinstance(failure, OSError):
        assert "the disk is full" in str(caught.value)


def test_disk_full_inside_hdf5_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")

    monkeypatch.setattr(h5py.Group, "create_dataset", refuse)
    with pytest.raises(OSError, match=r"the disk is full: .*w\.h5 was not written"):
        write(tmp_path / "w.h5")
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_what_contradicts_the_store(tmp_path):
    rest = {"subject": "s", "recording": "r", "start_samples": np.zeros(1, int)}

    def add(x, montage=PAIR, *, second=None, **kwargs):
        with create_store(tmp_path / "w.h5", INFO) as store:
            store.add("g", x, montage, **(rest | kwargs))
            if second is not None:
                store.add("h", x, **(rest | second))

    with pytest.raises(ValueError, match=r"\(n > 0, 2, 50\), found \(1, 2, 40\)"):
        add(np.zeros((1, 2, 40)))
    with pytest.raises(ValueError, match="not finite"):
        add(np.full((1, 2, 50), np.nan))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        add(np.zeros((1, 2, 50)), labels=np.array([2]))
    with pytest.raises(ValueError, match="integers"):
        add(np.zeros((1, 2, 50)), labels=np.array([0.5]))
    with pytest.raises(ValueError, match="start samples"):
        add(np.zeros((1, 2, 50)), start_samples=np.zeros(3, int))
    with pytest.raises(ValueError, match="no window"), create_store(tmp_path / "w.h5", INFO):
        pass
    other = Montage(PAIR.name, PAIR.ch_names, PAIR.locations + 1)
    with pytest.raises(ValueError, match="two montages"):
        add(np.zeros((1, 2, 50)), second={"montage": other})
    with pytest.raises(ValueError, match="every window"):
        add(np.zeros((1, 2, 50)), second={"montage": PAIR, "labels": np.array([0])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file_is_one_clear_message(tmp_path, kept):
    write(tmp_path / "w.h5")
    whole = (tmp_path / "w.h5").read_bytes()
    (tmp_path / "t.h5").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="truncated or not HDF5"):
        WindowStore(tmp_path / "t.h5")


def test_missing_or_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        WindowStore(tmp_path / "no.h5")
    with h5py.File(tmp_path / "f.h5", "w") as f:
        f["table"] = np.zeros(3)
    with pytest.raises(ValueError, match="group 'table' has no dataset X"):
        WindowStore(tmp_path / "f.h5")


def legacy_tuab(path):
    x = RNG.normal(size=(3, 22, 80))
    with h5py.File(path, "w") as f:
        for name in ("data_group_2", "data_group_10"):
            f[f"{name}/X"], f[f"{name}/y"] = x, np.array([0, 1, 1])
        f["index_map"] = np.zeros(2)
    return x


def test_reference_file_without_attributes_says_what_is_missing(tmp_path):
    x = legacy_tuab(tmp_path / "t.h5")
    with pytest.raises(ValueError, match=r"does not say its unit and sfreq .TUAB.* files have windows of 1280"):
        WindowStore(tmp_path / "t.h5")
    store = WindowStore(tmp_path / "t.h5", OldFiles("tuh-bipolar-22-disk", unit="V", sfreq=256))
    assert [name.rsplit("/")[-1] for name in store.recordings] == ["data_group_10"] * 3 + ["data_group_2"] * 3
    np.testing.assert_allclose(store[4]["signal"], x[1] * 1e6, rtol=1e-6)
    assert list(store.start_samples) == [-1] * 6
    with pytest.raises(ValueError, match="has 22 channels"):
        WindowStore(tmp_path / "t.h5", OldFiles("siena-29", unit="V", sfreq=256))
    with pytest.raises(ValueError, match="unknown channel order 'nope'"):
        WindowStore(tmp_path / "t.h5", OldFiles("nope", unit="V", sfreq=256))


def test_float16_overflow_is_read_as_zero_with_a_warning(tmp_path):
    with h5py.File(tmp_path / "o.h5", "w") as f:
        f["rec/X"] = np.array([[[1.0, np.inf, -np.inf, 2.0]]], dtype=np.float16)
    store = WindowStore(tmp_path / "o.h5", OldFiles("Cz", unit="uV", sfreq=256))
    with pytest.warns(UserWarning, match="2 values are not finite"):
        np.testing.assert_array_equal(store[0]["signal"], [[1.0, 0.0, 0.0, 2.0]])


def test_a_damaged_heap_of_texts_is_refused_and_does_not_hang_the_library(tmp_path):
    path = tmp_path / "w.h5"
    write(path)
    whole = path.read_bytes()
    heap = whole.index(b"GCOL")
    size = slice(heap + 24, heap + 32)  # of its first text
    for value in (2**64 - 1, 2**64 - 16, 1 << 40):
        damaged = bytearray(whole)
        damaged[size] = value.to_bytes(8, "little")
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.h5 cannot be read as a window store.*texts are damaged"):
            WindowStore(path)


@pytest.mark.parametrize(
    ("place", "value", "message"), [(1, 0xFB, "does not exist"), (35, 0x40, "longer than the file")]
)
def test_a_text_that_would_crash_the_library_or_take_all_memory_is_refused(tmp_path, place, value, message):
    path = tmp_path / "w.h5"
    write(path)
    whole = bytearray(path.read_bytes())
    text = whole.index(b"schema_version\0\0") + 16  # its datatype of 24 bytes, dataspace of 8, then its length
    assert whole[text : text + 2] == b"\x19\x01"
    whole[text + place] = value
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"w\.h5 cannot be read as a window store.*{message}"):
        WindowStore(path)
