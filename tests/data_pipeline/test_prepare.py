"""The whole job: folders of recordings to a window store, interrupted, resumed, and fed every kind of bad input."""

import errno
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from edfio import Edf, EdfAnnotation, EdfSignal

from data_pipeline import prepare as module
from data_pipeline.montages import named_montage
from data_pipeline.prepare import main
from data_pipeline.store import WindowStore

NAMES = ("Fp1", "C3", "O1", "ECG")
FAST = ("--window", "1", "--sfreq", "128", "--jobs", "1")


def write_edf(path, seed=0, *, seconds=10, names=NAMES, scale=20.0, annotations=()):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = [
        EdfSignal(
            scale * rng.normal(size=seconds * 256),
            256,
            label=f"EEG {name}-REF" if name != "ECG" else name,
            physical_dimension="uV",
            physical_range=(-6 * scale, 6 * scale),
        )
        for name in names
    ]
    Edf(signals, annotations=annotations).write(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_edf(tmp_path / "in" / f"S{i}" / "eeg.edf", i)
    return tmp_path / "in"


def run(*arguments):
    return main([str(a) for a in arguments])


def litter(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name != "in")


def fails_with(capsys, message, *arguments):
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err, err
    assert "Traceback" not in err


def test_folder_becomes_a_store_with_a_manifest(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "w.h5", *FAST) == 0
    store = WindowStore(tmp_path / "w.h5")
    assert len(store) == 30
    assert (store.sfreq, store.n_times, store.labels) == (128.0, 128, None)
    assert list(np.unique(store.recordings)) == ["S0/eeg.edf", "S1/eeg.edf", "S2/eeg.edf"]
    assert len(np.unique(store.subjects)) == 3
    (montage,) = store.montages.values()
    assert montage.ch_names == ("FP1", "C3", "O1")
    assert 10 < store[0]["signal"].std() < 30
    manifest = json.loads((tmp_path / "w.manifest.json").read_text())
    assert manifest["counts"] == {"windows": 3, "rejected": 0, "skipped": 0, "total_windows": 30}
    entry = manifest["files"]["S1/eeg.edf"]
    assert entry["dropped_channels"] == {"ECG": "not EEG"}
    assert (entry["sfreq"], entry["unit"], entry["montage"]) == (256.0, "uV (header)", montage.name)
    assert litter(tmp_path) == ["w.h5", "w.manifest.json"]  # no cache left
    assert "30 windows from 3 files of 3 subjects" in capsys.readouterr().out


def test_parallel_and_serial_runs_write_the_same_store(folder, tmp_path):
    assert run(folder, tmp_path / "a.h5", *FAST) == 0
    assert run(folder, tmp_path / "b.h5", *FAST[:-1], "2") == 0
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        assert list(a) == list(b)
        for group in a:
            np.testing.assert_array_equal(a[group]["X"], b[group]["X"])


def test_labels_subjects_and_class_order(folder, tmp_path):
    (tmp_path / "l.csv").write_text(
        "file,start,stop,label,subject\nS0/eeg.edf,0,4,task,A\nS0/eeg.edf,5,,rest,A\nS1/eeg.edf,,,rest,B\nS2/eeg.edf,,,task,B\n"
    )
    assert run(folder, tmp_path / "w.h5", *FAST, "--labels", tmp_path / "l.csv", "--class-names", "task", "rest") == 0
    store = WindowStore(tmp_path / "w.h5")
    assert store.class_names == ["task", "rest"]
    first = store.recordings == "S0/eeg.edf"
    assert list(store.labels[first]) == [0] * 4 + [1] * 5
    assert list(store.start_samples[first]) == [0, 128, 256, 384, *(128 * i for i in range(5, 10))]
    assert set(store.subjects) == {"A", "B"}


def test_regression_targets_and_annotations(folder, tmp_path):
    (tmp_path / "l.csv").write_text("file,age,score\n" + "".join(f"S{i}/eeg.edf,{20 + i},{i / 2}\n" for i in range(3)))
    assert run(folder, tmp_path / "w.h5", *FAST, "--labels", tmp_path / "l.csv") == 0
    np.testing.assert_allclose(WindowStore(tmp_path / "w.h5").labels[::10], [[20, 0], [21, 0.5], [22, 1]])
    write_edf(tmp_path / "in2" / "a.edf", annotations=[EdfAnnotation(1, 3, "T1"), EdfAnnotation(5, None, "T2")])
    options = ("--annotations", "T1=left", "T2", "--subject-pattern", "(a)")
    assert run(tmp_path / "in2", tmp_path / "x.h5", *FAST, *options) == 0
    store = WindowStore(tmp_path / "x.h5")
    assert store.class_names == ["T2", "left"]
    assert list(store.labels) == [1, 1, 1, 0]
    assert set(store.subjects) == {"a"}


def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    real, seen = module._windows_of, []

    def interrupted(task, cached):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(task.name)
        return real(task, cached)

    monkeypatch.setattr(module, "_windows_of", interrupted)
    assert run(folder, tmp_path / "w.h5", *FAST) == 130
    assert litter(tmp_path) == [".w.h5.cache"]
    assert "run the same command to go on" in capsys.readouterr().err
    resumed = []
    monkeypatch.setattr(module, "_windows_of", lambda task, cached: resumed.append(task.name) or real(task, cached))
    assert run(folder, tmp_path / "w.h5", *FAST) == 0
    assert resumed == ["S2/eeg.edf"]
    assert len(WindowStore(tmp_path / "w.h5")) == 30
    assert litter(tmp_path) == ["w.h5", "w.manifest.json"]


def test_a_cached_result_is_not_used_after_the_file_or_the_settings_change(folder, tmp_path):
    config = module.PrepareConfig(folder, tmp_path / "w.h5", window=1.0, sfreq=128.0)
    (tmp_path / "cache").mkdir()

    def name(config):
        task = module.FileTask(folder / "S0" / "eeg.edf", "S0/eeg.edf", tmp_path / "cache", config, (), "s")
        return module._cache_name(task, module._digest(task.path))

    before = name(config)
    assert name(module.PrepareConfig(folder, tmp_path / "w.h5", window=1.0, sfreq=128.0, jobs=7)) == before
    assert name(module.PrepareConfig(folder, tmp_path / "w.h5", window=1.0, sfreq=128.0, notch="60")) != before
    write_edf(folder / "S0" / "eeg.edf", 99)
    assert name(config) != before


def test_wrong_units_reject_the_file_and_scale_takes_it(folder, tmp_path, capsys):
    write_edf(folder / "S9.edf", 9, scale=20_000.0)
    assert run(folder, tmp_path / "w.h5", *FAST) == 0
    manifest = json.loads((tmp_path / "w.manifest.json").read_text())
    assert "--scale 0.001" in manifest["files"]["S9.edf"]["reason"]
    assert manifest["counts"]["rejected"] == 1
    assert run(folder, tmp_path / "w.h5", *FAST, "--include", "S9.edf", "--scale", "0.001") == 0
    assert len(WindowStore(tmp_path / "w.h5")) == 10


def test_bad_settings_and_folders(folder, tmp_path, capsys):
    out = tmp_path / "w.h5"
    (tmp_path / "in" / "empty").mkdir()
    fails_with(capsys, "is not a folder", tmp_path / "no", out)
    fails_with(capsys, "holds no files", folder / "empty", out)
    fails_with(capsys, "is a folder: the output must be a file", folder, folder)
    fails_with(capsys, "not a whole number", folder, out, "--window", "1.001", "--sfreq", "128")
    fails_with(capsys, "not a whole number above 0", folder, out, "--window", "-1")
    fails_with(capsys, "--jobs must be at least 1", folder, out, "--jobs", "0")
    fails_with(capsys, "is not 'auto', a known order", folder, out, "--montage", "tuh22")
    fails_with(capsys, "LABEL=NAME", folder, out, "--rename", "x")
    fails_with(capsys, "0 < l_freq < h_freq", folder, out, "--l-freq", "80")
    fails_with(capsys, "l_freq must be a frequency above 0 Hz", folder, out, "--l-freq", "0", "--h-freq", "None")
    fails_with(capsys, "sfreq must be positive and at most", folder, out, "--sfreq", "inf")
    fails_with(capsys, "--window of nan s", folder, out, "--window", "nan")
    fails_with(capsys, "--event-seconds must be positive", folder, out, "--event-seconds", "0")
    fails_with(capsys, "not a regular expression", folder, out, "--subject-pattern", "(")
    fails_with(capsys, "exactly one group", folder, out, "--subject-pattern", "S.")
    fails_with(capsys, "does not match S0/eeg.edf", folder, out, "--subject-pattern", "(X)")
    fails_with(capsys, "there are no classes", folder, out, "--class-names", "a", "b")
    (folder / "empty" / "note.json").write_text("{}")
    fails_with(capsys, "1 files, none of which is a recording", folder / "empty", out)
    assert litter(tmp_path) == []


def test_bad_labels(folder, tmp_path, capsys):
    out, labels = tmp_path / "w.h5", tmp_path / "in" / "l.csv"
    every = "".join(f"S{i}/eeg.edf,x\n" for i in range(3))
    options = (folder, out, *FAST, "--labels", labels)
    fails_with(capsys, "does not exist", *options)
    for text, message in {
        "file,label\nS7.edf,x\n" + every: "names 1 files that are no recordings in",
        "file,label\nS0/eeg.edf,x\n": "2 recordings have no row in",
        "file,label\neeg.edf,x\n": "'eeg.edf' means 3 files",
        "file,label\nS0/eeg.edf,x\n./S0/eeg.edf,y\n": "both mean S0/eeg.edf",
        "name,label\nS0/eeg.edf,x\n": "needs the columns file and label",
    }.items():
        labels.write_text(text)
        fails_with(capsys, message, *options)
    labels.write_text("file,label\n" + every)
    fails_with(capsys, "not listed: x", *options, "--class-names", "y", "z")
    fails_with(capsys, "exclude each other", *options, "--annotations", "T1")
    assert litter(tmp_path) == []
    labels.write_text("file,label\nS0/eeg.edf,x\n")
    assert run(*options, "--unlabelled", "skip") == 0
    assert len(WindowStore(out)) == 10


def test_nothing_usable_says_why_for_each_file_and_leaves_nothing(tmp_path, capsys):
    write_edf(tmp_path / "in" / "short.edf", seconds=2)
    write_edf(tmp_path / "in" / "other.edf", names=("ECG",))
    fails_with(capsys, "other.edf: no channel has a known electrode", tmp_path / "in", tmp_path / "w.h5", "--jobs", "1")
    fails_with(capsys, "short.edf: no window of 5 s fits", tmp_path / "in", tmp_path / "w.h5", "--jobs", "1")
    assert litter(tmp_path) == []


@pytest.mark.parametrize("where", ["cache", "store"])
def test_full_disk_is_one_message_and_the_old_output_stays(folder, tmp_path, capsys, monkeypatch, where):
    out = tmp_path / "w.h5"
    out.write_bytes(b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_args, **_kwargs):
        raise full

    monkeypatch.setattr(np, "savez", refuse) if where == "cache" else monkeypatch.setattr(
        h5py.Group, "create_dataset", refuse
    )
    fails_with(capsys, "the disk is full", folder, out, *FAST)
    assert out.read_bytes() == b"old"
    assert litter(tmp_path) == [".w.h5.cache", "w.h5"]
    assert not [p for p in (tmp_path / ".w.h5.cache").iterdir() if "partial" in p.name]
    monkeypatch.undo()
    assert run(folder, out, *FAST) == 0
    assert litter(tmp_path) == ["w.h5", "w.manifest.json"]


def test_one_file_with_an_unexpected_error_does_not_stop_the_others(folder, tmp_path, monkeypatch):
    real = module._windows_of

    def fragile(task, cached):
        if task.name.startswith("S1"):
            raise RuntimeError("first line\nsecond line")
        return real(task, cached)

    monkeypatch.setattr(module, "_windows_of", fragile)
    assert run(folder, tmp_path / "w.h5", *FAST) == 0
    entry = json.loads((tmp_path / "w.manifest.json").read_text())["files"]["S1/eeg.edf"]
    assert entry["reason"] == "unexpected RuntimeError: first line second line"


def test_command_line_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.prepare", str(tmp_path), str(tmp_path / "w.h5")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr == f"prepare: {tmp_path} holds no files: expected EDF, BDF, FIF, BrainVision, EEGLAB or CSV files\n"
    )


REAL_FOLDERS = ("mne_test_files", "edf_special", "eeglab", "emotiv_eye_state", "openbci")
WINDOWED_AT_5_S = {  # file -> (windows, channels, rate of the file); what is not here must be left out with a reason
    "mne_test_files/duplicate_channel_labels.edf": (2, 1, 250),
    "mne_test_files/test.vhdr": (1, 26, 1000),
    "mne_test_files/test_units.vhdr": (1, 26, 1000),
    "mne_test_files/test_bdf_stim_channel.bdf": (2, 3, 500),
    "mne_test_files/test_edf_stim_channel.edf": (1, 19, 128),
    "edf_special/short_psg.edf": (60, 2, 100),
    "edf_special/test_subsecond.edf": (139, 1, 128),
    "eeglab/eeglab_data.set": (47, 30, 128),
    "eeglab/test.edf": (12, 16, 256),
    "eeglab/BIDS_test/sub-S1/ses-01/eeg/sub-S1_ses-01_task-Experiment_run-01_eeg.edf": (12, 16, 256),
    "eeglab/BIDS_test/derivatives/eeglab/sub-S1/ses-01/eeg/sub-S1_ses-01_task-Experiment_run-01_eeg.set": (12, 15, 256),
    "emotiv_eye_state/eeg-eye-state.csv": (23, 14, 128),
}
WINDOWED_AT_1_S = WINDOWED_AT_5_S | {"mne_test_files/test.bdf": (1, 64, 2048)}
REASONS = {
    "mne_test_files/test_bin_raw.fif": "no channel has a known electrode name",
    "mne_test_files/test_stim_channel.edf": "no channel has a known electrode name",
    "mne_test_files/test_uneven_samp.edf": "that of EEG",
    "mne_test_files/test_elp.txt": "without a header of channel names",
    "mne_test_files/test.eeg": "belong to a .vhdr file",
    "edf_special/SC4001EC-Hypnogram.edf": "annotations only",
    "edf_special/corrupt_utf8_S001R01.edf": "ruined by a text-mode copy",
    "eeglab/eeglab_data_epochs_ica.set": "epoched: the file holds 80 separate trials",
    "eeglab/testmusemonitor.csv": "log of features",
    "openbci/OpenBCI_GUI-v6-blinks-jawClench-alpha.txt": "--rename",
}


@pytest.mark.parametrize(("window", "expected"), [("5", WINDOWED_AT_5_S), ("1", WINDOWED_AT_1_S)])
def test_every_real_file_gives_windows_or_one_clear_sentence(data_dir, tmp_path, window, expected):
    patterns = [f"{name}/*" for name in REAL_FOLDERS]
    assert run(data_dir, tmp_path / "w.h5", "--window", window, "--jobs", "1", "--include", *patterns) == 0
    files = json.loads((tmp_path / "w.manifest.json").read_text())["files"]
    on_disk = [p for name in REAL_FOLDERS for p in (data_dir / name).rglob("*") if p.is_file()]
    assert len(files) == len(on_disk)
    assert {name for name, entry in files.items() if entry.get("windows")} == set(expected)
    for name, entry in files.items():
        if entry.get("windows"):
            assert entry["montage"]
            assert entry["unit"]
            assert (entry["channels"], entry["sfreq"]) == expected[name][1:]
            assert 0.5 <= entry["robust_amplitude_uv"] <= 500
        else:
            assert 10 < len(entry["reason"]) < 400
            assert "\n" not in entry["reason"]
            assert "unexpected" not in entry["reason"]
            assert REASONS.get(name, "") in entry["reason"]
    if window == "5":
        assert {name: entry["windows"] for name, entry in files.items() if entry.get("windows")} == {
            name: found[0] for name, found in expected.items()
        }
        assert "no window of 5 s fits" in files["mne_test_files/test.bdf"]["reason"]


def test_real_rest_and_arithmetic_recordings(data_dir, tmp_path):
    """Two subjects of the 23 (all of them: 552 windows, docs/data.md)."""
    rows = [f"Subject0{i}_{k}.edf,{label},Subject0{i}" for i in (2, 3) for k, label in ((1, "rest"), (2, "arithmetic"))]
    (tmp_path / "l.csv").write_text("file,label,subject\n" + "\n".join(rows) + "\n")
    options = ("--labels", tmp_path / "l.csv", "--class-names", "rest", "arithmetic", "--include", "Subject0[23]_*.edf")
    assert run(data_dir / "eegmat", tmp_path / "w.h5", *options, "--jobs", "1") == 0
    store = WindowStore(tmp_path / "w.h5")
    assert (len(store), store.sfreq, store.n_times) == (48, 256.0, 1280)
    (montage,) = store.montages.values()
    assert set(montage.ch_names) == set(named_montage("mumtaz-19").ch_names)
    assert (montage.channel_ids >= 0).all()
    assert list(np.bincount(store.labels)) == [24, 24]
    dropped = json.loads((tmp_path / "w.manifest.json").read_text())["files"]["Subject02_1.edf"]["dropped_channels"]
    assert set(dropped) == {"EEG A2-A1", "ECG ECG"}
