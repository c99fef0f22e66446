"""The audit: what it says of each kind of file, its exit status, and that what it repairs is right and clean."""

import json

import h5py
import numpy as np
import pytest
from flavour_files import DISK, LOADER, brain_noise, cut, flavour_a, flavour_b, flavour_c

from configs.data import open_windows
from configs.schema import DataConfig
from data_pipeline.audit import audit, main, repair, table_of
from data_pipeline.montages import montage_of
from data_pipeline.old_files import OldFiles
from data_pipeline.store import StoreInfo, WindowStore, create_store

RNG = np.random.default_rng(11)
SMALL = OldFiles(unit="uV", sfreq=100.0)  # for windows that are shorter than the reference's


def own_store(path, signals, *, labels=None):
    with create_store(path, StoreInfo(100.0, signals[0].shape[2], 1.0)) as writer:
        for i, x in enumerate(signals):
            who = {"subject": f"s{i}", "recording": f"r{i}"}
            y = None if labels is None else labels[i]
            writer.add(f"g{i}", x, montage_of(["C3", "C4"]), **who, start_samples=np.arange(len(x)) * 100, labels=y)
    return path


def test_a_store_of_ours_is_clean(tmp_path, capsys):
    path = own_store(tmp_path / "w.h5", [RNG.normal(size=(5, 2, 100)) for _ in range(3)])
    assert main([str(path), "--json", str(tmp_path / "found.json")]) == 0
    assert "nothing to act on" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "found.json").read_text())["files"]
    assert (found["windows"], found["groups"], found["subjects"], found["status"]) == (15, 3, 3, 0)
    assert found["duplicates"]["windows"] == found["values_not_finite"] == found["windows_flat"] == 0
    assert main([str(path), "--repair", str(tmp_path / "never.h5")]) == 0
    assert not (tmp_path / "never.h5").exists()


def test_flavour_a_is_described_and_repaired(tmp_path):
    blocks = {f"data_group_{i}": cut(brain_noise(RNG, 22, 4 * 64), 64) for i in (0, 10, 2)}
    blocks["data_group_2"][1] = 3.0
    labels = {name: np.array([0, 0, 1, 5], np.int8) for name in blocks}
    path = flavour_a(tmp_path / "train.h5", blocks, labels)
    found = audit([path], SMALL)
    (report,) = found.reports
    assert found.status == 1
    assert report.facts["format"] == "flavour A of the reference (TUAB, TUAR or TUSL)"
    assert report.facts["orders that fit"] == ["tuh-bipolar-22", "tuh-bipolar-22-disk"]
    assert report.facts["labels"]["counts"] == {"0": 6, "1": 3, "5": 3}
    assert report.facts["subjects"] == "unknown"
    assert report.facts["windows_flat"] == 1
    assert any("14 of 22" in sentence for sentence in report.to_act)
    (out,) = repair(found, tmp_path / "clean.h5", SMALL)
    store = WindowStore(out)  # says everything itself
    (montage,) = store.montages.values()
    assert list(montage.ch_names) == LOADER
    for row, (name, i) in enumerate([(n, i) for n in sorted(blocks) for i in range(4)]):
        expected = blocks[name][i][[DISK.index(c) for c in LOADER]].astype(np.float32)
        np.testing.assert_array_equal(store[row]["signal"], expected)
    assert store.labels.tolist() == [0, 0, 1, 5] * 3
    done = store.info.provenance["repaired_from"]
    assert (done["file"], done["duplicates_dropped"], done["unscrambled"]) == ("train.h5", 0, False)
    assert audit([out]).status == 0


def test_scrambled_windows_are_told_by_number_and_repaired_bit_for_bit(tmp_path):
    signals = {f"aaaaaaa{c}_s001_t000": brain_noise(RNG, 22, 6 * 1280) for c in "ab"}
    signals["aaaaaaaa_s001_t000"][3, 1285] = 40_000.0  # a writer that clips leaves 32,000 and more
    signals["aaaaaaab_s001_t000"][5, 2570] = np.inf
    path = flavour_b(tmp_path / "TUEG_22_channels_0.h5", signals, 1280, LOADER)
    found = audit([path])
    facts = found.reports[0].facts
    assert facts["layout"]["scrambled"]
    assert facts["layout"]["ratio"] < 0.5
    assert set(facts["layout"]["ratio_of_groups"]) == set(signals)
    assert max(facts["layout"]["ratio_of_groups"].values()) < 0.6
    assert (facts["values_not_finite"], facts["windows_not_finite"], facts["values_clipped"]) == (1, 1, 1)
    assert facts["subjects"] == 2
    (out,) = repair(found, tmp_path / "clean.h5", OldFiles())
    expected = np.concatenate([cut(s, 1280).astype(np.float16).astype(np.float32) for s in signals.values()])
    expected[~np.isfinite(expected)] = 0
    store = WindowStore(out)
    np.testing.assert_array_equal(store.read(np.arange(12)), expected)
    assert store.subjects.unique().tolist() == ["aaaaaaaa", "aaaaaaab"]
    assert store.start_samples.tolist() == [1280 * i for i in range(6)] * 2
    assert audit([out]).status == 0


def test_a_second_run_of_the_reference_is_found_and_undone(tmp_path):
    blocks = [RNG.normal(size=(5, 16, 1280)), RNG.normal(size=(3, 16, 1280))]
    for _ in range(2):
        flavour_c(tmp_path / "val.h5", blocks, [np.zeros(5), np.ones(3)])
    found = audit([tmp_path / "val.h5"])
    duplicates = found.reports[0].facts["duplicates"]
    assert duplicates["windows"] == 8
    pairs = {(p["group"], p["repeats"].rsplit(":")[-1], p["windows"]) for p in duplicates["pairs"]}
    assert pairs == {("data_group_2", "data_group_0", 5), ("data_group_3", "data_group_1", 3)}
    (out,) = repair(found, tmp_path / "clean.h5", OldFiles())
    np.testing.assert_array_equal(WindowStore(out).read(np.arange(8)), np.concatenate(blocks).astype(np.float32))
    assert WindowStore(out).labels.tolist() == [0] * 5 + [1] * 3


def test_windows_in_two_files_stay_in_the_first(tmp_path):
    first, second, shared = (RNG.normal(size=(4, 16, 1280)) for _ in range(3))
    train = flavour_c(tmp_path / "train.h5", [first, shared], [np.zeros(4), np.ones(4)])
    test = flavour_c(tmp_path / "test.h5", [shared[::-1], second], [np.ones(4), np.zeros(4)])
    found = audit([train, test])
    assert "4 windows occur before, 4 of them in another file" in found.reports[1].to_act[-1]
    assert found.reports[0].facts["duplicates"]["windows"] == 0
    names = {"train": (str(train),), "test": (str(test),), "validation_fraction": 0.0}
    with pytest.raises(ValueError, match="holds the same signal"):
        open_windows(DataConfig(**names, compare_windows="all"), labelled=True)
    repair(found, tmp_path / "clean", OldFiles())
    names |= {part: (str(tmp_path / "clean" / f"{part}.h5"),) for part in ("train", "test")}
    windows = open_windows(DataConfig(**names), labelled=True)
    assert {part: len(rows) for part, rows in windows.parts.items()} == {"train": 8, "validation": 0, "test": 4}
    np.testing.assert_array_equal(windows.stores[1].read(np.arange(4)), second.astype(np.float32))


def test_files_that_need_to_be_told_something_are_described_and_not_repaired(tmp_path, capsys):
    path = flavour_b(tmp_path / "SIENA_29_channels.h5", {"PN00-1": brain_noise(RNG, 29, 4 * 1280)}, 1280)
    assert main([str(path), "--repair", str(tmp_path / "clean.h5")]) == 2
    captured = capsys.readouterr()
    assert "flavour B of the reference (Siena)" in captured.out
    assert "prepare the corpus again" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "clean.h5").exists()
    told = ["--old.channel-order", "siena-29", "--repair", str(tmp_path / "clean.h5")]
    assert main([str(path), *told]) == 0
    assert list(WindowStore(tmp_path / "clean.h5").montages) == ["siena-29"]
    half = {f"data_group_{i}": RNG.normal(size=(2, 22, 1280)) for i in range(2)}
    found = audit([flavour_a(tmp_path / "half.h5", half, {"data_group_0": np.zeros(2, np.int64)})])
    assert found.status == 1
    assert "1 groups have no labels" in found.reports[0].to_act[-1]
    with h5py.File(tmp_path / "u.h5", "w") as f:
        f["mine/X"] = RNG.normal(size=(2, 5, 100))
    (report,) = audit([tmp_path / "u.h5"]).reports
    assert (report.status, report.facts["format"]) == (1, "HDF5 of unknown origin")
    assert "does not say its unit and sfreq" in report.to_act[-1]


def test_what_cannot_be_read_is_one_sentence_and_the_others_are_looked_at(tmp_path, capsys):
    good = own_store(tmp_path / "good.h5", [RNG.normal(size=(3, 2, 100))])
    (tmp_path / "bad.h5").write_bytes(good.read_bytes()[:900])
    (tmp_path / "text.h5").write_text("windows")
    paths = [str(tmp_path / name) for name in ("bad.h5", "good.h5", "text.h5", "absent.h5")]
    assert main([*paths, "--json", str(tmp_path / "f.json")]) == 2
    capsys.readouterr()
    files = json.loads((tmp_path / "f.json").read_text())["files"]
    assert [f["status"] for f in files] == [2, 0, 2, 2]
    assert all("\n" not in f["unreadable"] for f in files)
    assert "does not exist" in files[3]["unreadable"]
    assert main([*paths, "--repair", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main([str(good), str(good)]) == 2
    assert "named twice" in capsys.readouterr().err


def test_an_archive_is_audited_and_its_damage_named(tmp_path):
    from data_pipeline.convert_store import convert

    x = RNG.normal(size=(6, 2, 100))
    x[4] = x[1]
    own_store(tmp_path / "w.h5", [x])
    convert([tmp_path / "w.h5"], tmp_path / "w")
    found = audit([tmp_path / "w"])
    assert found.reports[0].facts["duplicates"]["windows"] == 1
    (out,) = repair(found, tmp_path / "clean", OldFiles())
    assert out == tmp_path / "clean"
    assert audit([out]).status == 0
    shard = next((tmp_path / "w").glob("*.arrayrecord"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (report,) = audit([tmp_path / "w"]).reports
    assert report.status == 2
    assert "damaged" in report.unreadable


def test_the_table_names_every_file(tmp_path):
    from rich.console import Console

    paths = [own_store(tmp_path / f"{name}.h5", [RNG.normal(size=(2, 2, 100))]) for name in "ab"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table_of(audit(paths).reports))
    text = console.export_text()
    assert all(str(path) in text for path in paths)
    assert text.count("nothing to act on") == 2
