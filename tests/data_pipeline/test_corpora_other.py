"""SEED-V, APAVA, TDBrain, Mumtaz2016, MODMA, MoBI, EEGMAT and BIDS from synthetic trees, faults included."""

import json
import re
import shutil
from collections import Counter

import corpus_trees_other as trees
import h5py
import mne
import numpy as np
import pytest

from data_pipeline.corpora import CORPORA, seed_v
from data_pipeline.corpora.base import Catalogue, Source
from data_pipeline.corpora.bids import Bids
from data_pipeline.corpora.bids_files import electrode_table, parse_name, sidecar
from data_pipeline.corpora.matlab import read_numeric
from data_pipeline.corpora.mobi import Mobi
from data_pipeline.corpora.modma import Modma
from data_pipeline.corpora.mumtaz2016 import Mumtaz2016
from data_pipeline.corpora.seed_v import SeedV
from data_pipeline.corpora.tables import number, read_rows, read_samples
from data_pipeline.corpora.tdbrain import TdBrain
from data_pipeline.prepare import main
from data_pipeline.source_windows import SourceTask, process_source, read_blocks
from data_pipeline.store import WindowStore
from data_pipeline.windows import cut_windows

PARTS = ("train", "validation", "test")


def run(corpus, raw, out, *options):
    return main([corpus, "--raw", str(raw), "--out", str(out), "--jobs", "1", *map(str, options)])


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def reasons(manifest):
    return {name.rsplit("/", 1)[-1]: e["reason"] for name, e in manifest["files"].items() if "reason" in e}


def stores_of(out):
    return {part: WindowStore(out / f"{part}.h5") for part in PARTS if (out / f"{part}.h5").is_file()}


def rows_of(store, recording):
    """Rows of the windows of one recording, in the order of their starts."""
    rows = [i for i, name in enumerate(store.recordings) if str(name) == recording]
    return sorted(rows, key=lambda i: int(store.start_samples[i]))


def by_mne(signal_uv, sfreq, *, l_freq=0.1, h_freq=75.0, notch=50, out=None):
    """The chain of the specification straight with MNE: filter, notch, resample.

    The mean of a signal shorter than the high-pass goes first: beyond its reflection MNE pads with zeros.
    """
    signal = np.array(signal_uv, dtype=np.float64)
    if signal.shape[1] / sfreq < 3.3 / l_freq:
        signal -= signal.mean(axis=1, keepdims=True)
    raw = mne.io.RawArray(signal, mne.create_info(len(signal), sfreq, "eeg"), verbose="ERROR")
    raw.filter(l_freq, h_freq, verbose="ERROR")
    if notch:
        raw.notch_filter(notch, verbose="ERROR")
    if out is not None and out != sfreq:
        raw.resample(out, verbose="ERROR")
    return raw.get_data()


def same(store, row, expected):
    np.testing.assert_allclose(store[row]["signal"], expected, rtol=0, atol=1e-4)


def location(store, name):
    (montage,) = store.montages.values()
    return montage.locations[montage.ch_names.index(name)]


def fake(subjects, label):
    return [Source(None, f"{s}.x", s, label=label) for s in subjects]


def parts_by_label(division, sources):
    """(part, label) -> subjects in alphabetical order."""
    found = {}
    for source in sources:
        found.setdefault((division.parts.get(source.name, "none"), source.label), []).append(source.subject)
    return {key: sorted(value) for key, value in found.items()}


def test_every_corpus_says_what_it_is(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("apava", "bids", "eegmat", "mobi", "modma", "mumtaz2016", "seed-v", "tdbrain"):
        corpus = CORPORA[name]
        assert f"{name}  {corpus.title}" in text
        assert corpus.source in text
        assert corpus.licence in text
        assert corpus.layout in text


@pytest.mark.parametrize("name", ["apava", "bids", "eegmat", "mobi", "modma", "mumtaz2016", "seed-v", "tdbrain"])
def test_an_empty_folder_gets_one_sentence(name, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert run(name, tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "expected" in error
    assert not (tmp_path / "out").exists()


# --- SEED-V -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "windows"),
    [("as_reference", (43_328, 43_360, 31_056)), ("equal", (34_432, 42_960, 40_352))],
)
def test_seed_v_trial_table_gives_the_published_counts(trials, windows):
    last = {"as_reference": (6, 11), "equal": (5, 10)}[trials]
    counts = Counter()
    for session in (1, 2, 3):
        assert [trial.number for trial in seed_v.TRIALS[session]] == list(range(1, 16))
        assert Counter(trial.label for trial in seed_v.TRIALS[session]) == dict.fromkeys(range(5), 3)
        for trial in seed_v.TRIALS[session]:
            part = PARTS[sum(trial.number > n for n in last)]
            counts[part] += 16 * int(trial.stop - trial.start)
    assert tuple(counts[part] for part in PARTS) == windows
    if trials == "as_reference":
        assert SeedV.expected.windows == dict(zip(PARTS, windows, strict=True))


@pytest.fixture
def short_trials(monkeypatch):
    """15 trials of 1.2 s each in 24 s, 0.3 s between them; labels as published."""
    table = {
        session: tuple(
            seed_v.Trial(trial.number, 1.5 * trial.number, 1.5 * trial.number + 1.2, trial.label) for trial in trials
        )
        for session, trials in seed_v.TRIALS.items()
    }
    monkeypatch.setattr(seed_v, "TRIALS", table)
    return table


@pytest.fixture(scope="module")
def seed_v_raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("seed_v")
    return root, trees.seed_v_tree(root)


def test_seed_v_divides_trials_and_filters_within_them(seed_v_raw, short_trials, tmp_path):
    raw, signal = seed_v_raw
    assert run("seed-v", raw, tmp_path) == 0
    manifest, stores = manifest_of(tmp_path), stores_of(tmp_path)
    assert {part: len(store) for part, store in stores.items()} == dict.fromkeys(PARTS, 5)
    assert manifest["split"]["unit"] == "trial"
    left = reasons(manifest)
    assert left.pop("1_1_20180804_raw.fif") == "the same session as EEG_raw/1_1_20180804.cnt"
    assert "is not <subject>_<session>_<date>" in left.pop("readme_raw.fif")
    assert not left
    for trial in short_trials[1]:
        store = stores[PARTS[(trial.number - 1) // 5]]
        (row,) = rows_of(store, f"EEG_raw/1_1_20180804.cnt#trial{trial.number:02d}")
        assert int(store.start_samples[row]) == 300 * trial.number
        assert int(store[row]["label"]) == trial.label
        assert str(store.subjects[row]) == "01"
        if trial.number in (1, 8):
            cut = signal[:, 1500 * trial.number : 1500 * trial.number + 1200]
            same(store, row, by_mne(cut, 1000, l_freq=1.0, notch=None, out=200)[:, :200])
    (montage,) = stores["train"].montages.values()
    assert montage.ch_names == trees.SEED_V_62
    np.testing.assert_allclose(location(stores["train"], "CB1"), [-0.04512, -0.07475, 0.05139], atol=1e-5)
    np.testing.assert_allclose(location(stores["train"], "CB2"), [0.04153, -0.07516, 0.05135], atol=1e-5)
    np.testing.assert_allclose(location(stores["train"], "FP1"), [-0.03090, 0.11459, 0.02787], atol=1e-5)


def test_seed_v_as_the_reference(seed_v_raw, short_trials, tmp_path):
    raw, signal = seed_v_raw
    assert run("seed-v", raw, tmp_path, "--trials", "as_reference", "--decimate", "stride") == 0
    stores = stores_of(tmp_path)
    assert [len(stores[part]) for part in PARTS] == [6, 5, 4]
    cut = signal[:, 1500 * 7 : 1500 * 7 + 1200 : 5]
    cut -= cut.mean(axis=1, keepdims=True)  # of a trial shorter than the filter
    expected = mne.filter.filter_data(cut, 200, 1, 75, verbose="ERROR")
    (row,) = rows_of(stores["validation"], "EEG_raw/1_1_20180804.cnt#trial07")
    same(stores["validation"], row, expected[:, :200])
    (used,) = [entry for entry in manifest_of(tmp_path)["files"].values() if entry["status"] == "windows"]
    assert "every 5th sample taken, without an anti-alias filter" in used["notes"]


@pytest.mark.parametrize("width", ["<i2", "<i4"])
@pytest.mark.parametrize("in_header", [None, -732])
def test_seed_v_sessions_in_neuroscan_files(tmp_path, short_trials, width, in_header):
    """16 and 32 bits, with the count of samples in the header and with a wrong one, as some files have it."""
    counts = np.random.default_rng(0).integers(-999, 999, size=(66, 24_000)).astype(width)
    path = trees.write_cnt(tmp_path / "2_2_20180805.cnt", trees.SEED_V_66, counts, samples_in_header=in_header)
    pieces = list(SeedV(decimate="stride").read(Source(path, path.name, "02", "2")))
    assert [piece.label for piece in pieces] == [2, 1, 3, 0, 4, 4, 0, 3, 2, 1, 3, 4, 1, 2, 0]
    assert [piece.part for piece in pieces] == ["train"] * 5 + ["validation"] * 5 + ["test"] * 5
    rows = [trees.SEED_V_66.index(name) for name in trees.SEED_V_62]
    expected = 0.1 * counts[rows][:, 1500 * 9 : 1500 * 9 + 1200 : 5]
    np.testing.assert_allclose(pieces[8].recording.signal_uv, expected, rtol=1e-5)
    assert set(pieces[8].recording.dropped) == {"M1", "M2", "VEO", "HEO"}


def test_seed_v_by_subject_converted_and_ending_early(tmp_path):
    rng = np.random.default_rng(0)
    signal, order = trees.noise(rng, 66, 200 * 140), rng.permutation(66)
    names = [trees.SEED_V_66[i] for i in order]
    trees.write_fif(tmp_path / "raw/3_1_20180804_raw.fif", names, signal[order], sfreq=200)
    trees.write_fif(tmp_path / "raw/14_1_20180804_raw.fif", trees.SEED_V_66[:60], signal[:60, :2000], sfreq=200)
    assert run("seed-v", tmp_path / "raw", tmp_path / "out", "--trials", "by_subject") == 0
    manifest = manifest_of(tmp_path / "out")
    (store,) = stores_of(tmp_path / "out").values()
    assert [str(name)[-7:] for name in store.recordings] == ["trial01"] * 72 + ["trial02"] * 8
    rows = [trees.SEED_V_66.index(name) for name in trees.SEED_V_62]
    expected = by_mne(signal[rows, 132 * 200 :], 200, l_freq=1.0, notch=None)
    same(store, 79, expected[:, 7 * 200 :])
    assert manifest["split"]["unit"] == "subject"
    assert "ends after 140 s: trials 2, 3," in " ".join(manifest["files"]["3_1_20180804_raw.fif"]["notes"])
    assert reasons(manifest)["14_1_20180804_raw.fif"].startswith("lacks ")


# --- APAVA ------------------------------------------------------------------------------------------------------------


def test_apava_counts_of_trials_fit_the_published_subjects():
    trials = [35, 25, 10, 33, 1, 22, 3, 32, 18, 38, 47, 37, 29, 39, 46, 28, 59, 40, 46, 37, 19, 17, 2]
    sources = [source for i in range(1, 24) for source in fake([f"{i:02d}"], None)]
    parts = CORPORA["apava"]().split(Catalogue(sources)).parts
    counts = Counter()
    for source in sources:
        counts[parts[source.name]] += trials[int(source.subject) - 1]
    assert counts == {"train": 347, "validation": 157, "test": 159} == CORPORA["apava"].expected.windows


def test_apava_labels_parts_and_values(tmp_path):
    written = trees.apava_tree(tmp_path / "raw")
    assert run("apava", tmp_path / "raw", tmp_path / "out") == 0
    manifest, stores = manifest_of(tmp_path / "out"), stores_of(tmp_path / "out")
    about = {p: sorted(zip(map(str, s.subjects), map(int, s.labels), strict=True)) for p, s in stores.items()}
    assert about == {"train": [("03", 1)], "validation": [("16", 0)], "test": [("01", 1)] * 3 + [("02", 0)]}
    assert stores["test"].class_names == ["healthy", "alzheimer"]
    left = reasons(manifest)
    assert "holds no 1x1 structure 'data' but signal" in left["preproctrials04.mat"]
    assert "damaged: not a MATLAB file" in left["preproctrials05.mat"]
    assert "is not preproctrials01 to preproctrials23" in left["preproctrials24.mat"]
    (montage,) = stores["test"].montages.values()
    assert montage.name == "apava-16"
    order = [[n.upper() for n in trees.APAVA_FILE_ORDER].index(name) for name in montage.ch_names]
    for trial in range(3):
        (row,) = rows_of(stores["test"], f"preproctrials01.mat#trial{trial + 1:02d}")
        same(stores["test"], row, by_mne(written[1][trial], 256)[order])
    for name, xyz in {"T3": (-0.08598, 0.01487, 0.03117), "T6": (0.07103, -0.04226, 0.04120)}.items():
        np.testing.assert_allclose(location(stores["test"], name), xyz, atol=1e-5)


def test_apava_without_filters(tmp_path):
    written = trees.apava_tree(tmp_path / "raw")
    for filtering in ("none", "detrend"):
        assert run("apava", tmp_path / "raw", tmp_path / filtering, "--filtering", filtering) == 0
        store = WindowStore(tmp_path / filtering / "validation.h5")
        (montage,) = store.montages.values()
        order = [[n.upper() for n in trees.APAVA_FILE_ORDER].index(name) for name in montage.ch_names]
        expected = written[16][0][order]
        if filtering == "detrend":
            line = np.polynomial.polynomial.polyfit(np.arange(1280), expected.T, 1)
            expected = expected - line[0][:, None] - line[1][:, None] * np.arange(1280)
        same(store, 0, expected)
        assert manifest_of(tmp_path / filtering)["options"]["filtering"] == filtering
        with h5py.File(tmp_path / filtering / "validation.h5") as file:
            assert json.loads(file.attrs["filters"])["h_freq"] is None


# --- TDBrain ----------------------------------------------------------------------------------------------------------


def test_tdbrain_selection_pseudo_ids_and_values(tmp_path):
    written = trees.tdbrain_tree(tmp_path / "raw")
    assert run("tdbrain", tmp_path / "raw", tmp_path / "out") == 0
    manifest, stores = manifest_of(tmp_path / "out"), stores_of(tmp_path / "out")
    about = {p: sorted(zip(map(str, s.subjects), map(int, s.labels), strict=True)) for p, s in stores.items()}
    assert about == {
        "train": [("sub-1000", 1), ("sub-1016", 1), ("sub-2003", 0)],
        "validation": [("sub-1017", 1), ("sub-2020", 0)],
        "test": [("sub-1021", 1), ("sub-2024", 0)],
    }
    left = reasons(manifest)
    ending = "_ses-1_task-restEC_eeg.csv"
    assert left.pop(f"sub-2000{ending}") == "pseudo-id 26 is in no part of the published split"
    assert left.pop(f"sub-2046{ending}") == "pseudo-id 72 is in no part of the published split"
    assert left.pop(f"sub-1001{ending}").startswith("lacks F7, F3, FZ")
    assert set(left.values()) == {
        f"{trees.TDBRAIN_TSV} names {name.removesuffix(ending)}, and the file does not exist" for name in left
    }
    assert len(left) == 25 + 47 - len(written) - 1
    assert not manifest["warnings"]  # as many subjects as published, whatever their spelling
    for entry in manifest["files"].values():
        if "subject" in entry and entry["subject"] in written:
            assert entry["session"] == f"ses-1, pseudo-id {written[entry['subject']][0]}"
    for part, subject in (("train", "sub-1016"), ("test", "sub-2024")):
        (row,) = [i for i, name in enumerate(stores[part].subjects) if str(name) == subject]
        same(stores[part], row, by_mne(written[subject][1], 500, out=256)[:, :320])
    (montage,) = stores["train"].montages.values()
    assert montage.ch_names == tuple(name.upper() for name in trees.TDBRAIN_26)


def test_tdbrain_a_patient_beyond_the_published_25_is_in_no_part():
    sources = [Source(None, f"{i}.x", f"s{i}", f"ses-1, pseudo-id {i}", label=1) for i in (25, 29, 46)]
    division = TdBrain().split(Catalogue([*sources, Source(None, "h.x", "h", "ses-1, pseudo-id 29", label=0)]))
    assert division.parts == {"25.x": "test", "h.x": "train"}  # 29 and 46 are places of healthy subjects


def test_tdbrain_table_that_is_none(tmp_path, capsys):
    (tmp_path / trees.TDBRAIN_TSV).write_text("id\tindication\n")
    assert run("tdbrain", tmp_path, tmp_path / "out") == 2
    assert "has no column ec, indication, participants_id, or no rows" in capsys.readouterr().err


def test_tables_are_read_tolerantly(tmp_path):
    text = '\ufeffname\t"age" \r\n\r\n m\u00fcller \t63,5\r\nx\r\n'
    for data in (text.encode(), text[1:].encode("latin-1")):
        (tmp_path / "a.tsv").write_bytes(data)
        assert read_rows(tmp_path / "a.tsv") == [{"name": "m\u00fcller", "age": "63,5"}, {"name": "x", "age": ""}]
    assert [number(text) for text in ("63,5", " 1.0 ", "n/a", "", "inf")] == [63.5, 1.0, None, None, None]
    (tmp_path / "b.txt").write_text("h\n1 2 3\n4 5\n")
    with pytest.raises(ValueError, match=r"b.txt is not the table that"):
        read_samples(tmp_path / "b.txt", [0, 2], delimiter=" ", header_lines=1)
    (tmp_path / "c.txt").write_text("h\n")
    with pytest.raises(ValueError, match="no rows below the header"):
        read_samples(tmp_path / "c.txt", [0], delimiter=" ", header_lines=1)


# --- Mumtaz2016 -------------------------------------------------------------------------------------------------------


def test_mumtaz_names_and_values(tmp_path):
    raw = trees.mumtaz_tree(tmp_path / "raw")
    assert run("mumtaz2016", raw, tmp_path / "out") == 0
    manifest = manifest_of(tmp_path / "out")
    (store,) = stores_of(tmp_path / "out").values()
    about = sorted(zip(map(str, store.recordings), map(str, store.subjects), map(int, store.labels), strict=True))
    assert about == [
        ("6921143_H S15 EO.edf", "H S15", 0),
        ("H S1 EC.edf", "H S1", 0),
        ("H S2 EO.edf", "H S2", 0),
        ("MDD S11  EC.edf", "MDD S11", 1),
        ("MDD S2 EC.edf", "MDD S2", 1),
        ("h s10 ec.edf", "H S10", 0),
    ]
    left = reasons(manifest)
    assert left["6921959_H S15 EO.edf"] == "a second file of H S15 EO, beside 6921143_H S15 EO.edf"
    assert left["H S2 TASK.edf"].startswith("recorded during a task")
    assert "is not `H S<number>" in left["notes.edf"]
    assert left["MDD S3 EC.edf"] == "lacks T6 of the 19 electrodes that are required"
    (montage,) = store.montages.values()
    assert montage.name == "mumtaz-19"
    raw_mne = mne.io.read_raw_edf(raw / "MDD S11  EC.edf", preload=True, verbose="ERROR")
    labels = [label.upper() for label in raw_mne.ch_names]
    signal = raw_mne.get_data()[[labels.index(f"EEG {name}-LE") for name in montage.ch_names]] * 1e6
    (row,) = rows_of(store, "MDD S11  EC.edf")
    same(store, row, by_mne(signal, 256)[:, :1280])
    assert run("mumtaz2016", raw, tmp_path / "lost", "--names", "as_reference") == 0
    assert "two blanks" in reasons(manifest_of(tmp_path / "lost"))["MDD S11  EC.edf"]


def test_mumtaz_split_is_by_number_within_the_class():
    sources = fake([f"MDD S{i}" for i in range(1, 34)], 1) + fake([f"H S{i}" for i in range(1, 31)], 0)
    division = Mumtaz2016().split(Catalogue(sources))
    sizes = {key: len(value) for key, value in parts_by_label(division, sources).items()}
    assert sizes == {
        ("train", 1): 23,
        ("validation", 1): 5,
        ("test", 1): 5,
        ("train", 0): 19,
        ("validation", 0): 4,
        ("test", 0): 4,
        ("none", 0): 3,
    }
    assert {division.parts[f"MDD S{i}.x"] for i in (1, 2, 23)} == {"train"}
    assert division.parts["MDD S24.x"] == "validation"
    assert division.parts["H S24.x"] == "test"
    assert sorted(division.left_out) == ["H S28.x", "H S29.x", "H S30.x"]


@pytest.mark.parametrize("corpus", ["mumtaz2016", "modma"])
def test_a_split_by_places_warns_when_subjects_are_lacking(tmp_path, corpus):
    """One file less and everybody behind it moves up a place: not the published split any more."""

    def warnings(lacking):
        root = tmp_path / f"{lacking}"
        root.mkdir()
        names = {
            "mumtaz2016": [f"MDD S{i} EC.edf" for i in range(1, 34)] + [f"H S{i} EO.edf" for i in range(1, 31)],
            "modma": [f"0201{i:04d}rest.mat" for i in range(24)] + [f"0203{i:04d}rest.mat" for i in range(29)],
        }[corpus]
        for name in names[lacking:]:
            (root / name).touch()
        return list(CORPORA[corpus]().find(root).warnings)

    assert warnings(0) == []
    (sentence,) = warnings(1)
    count = {"mumtaz2016": 33, "modma": 24}[corpus]
    assert sentence.startswith(f"{count - 1} subjects are of class depression, {count} were expected")


# --- MODMA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modma")
    written = trees.modma_tree(folder / "raw")
    assert run("modma", folder / "raw", folder / "out") == 0
    return folder, written


def test_names_in_matlab_files_of_version_7_3_may_be_in_any_encoding(tmp_path):
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file[b"a\xe4"] = np.ones((3, 2))
        file["name"] = np.frombuffer(b"text", np.uint8)
    with (tmp_path / "a.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    assert {name: value.shape for name, value in read_numeric(tmp_path / "a.mat").items()} == {
        "a\xe4": (2, 3),
        "name": (4,),
    }


def test_modma_key_rule_labels_and_values(modma):
    folder, written = modma
    manifest = manifest_of(folder / "out")
    (store,) = stores_of(folder / "out").values()
    about = sorted(zip(map(str, store.subjects), map(int, store.labels), strict=True))
    assert about == [("02010002", 1), ("02020008", 0), ("02030020", 0)]
    left = reasons(manifest)
    assert left["02010033rest.mat"].startswith("expected one matrix of 129 channels by samples, found 2")
    assert left["02010034rest.mat"].startswith("expected one matrix of 129 channels by samples, found 0")
    assert "does not begin with 0201, 0202 or 0203" in left["02990001rest.mat"]
    for row, subject in enumerate(map(str, store.subjects)):  # version 5 and version 7.3
        same(store, row, by_mne(written[subject][:128], 250)[:, :1280])
    assert (store.sfreq, store.n_times) == (250.0, 1280)


def test_modma_positions_in_both_frames_and_13_channels(modma, tmp_path):
    folder, written = modma
    (template,) = stores_of(folder / "out").values()
    expected = {
        "E1": (0.06266, 0.05977, -0.02791),
        "E55": (0, -0.02315, 0.09519),
        "E128": (-0.06624, 0.04898, -0.04774),
    }
    for name, xyz in expected.items():
        np.testing.assert_allclose(location(template, name), xyz, atol=1e-5)
    assert run("modma", folder / "raw", tmp_path / "head", "--positions", "head", "--channels", "13") == 0
    (store,) = stores_of(tmp_path / "head").values()
    (montage,) = store.montages.values()
    assert montage.ch_names == (
        "E3",
        "E4",
        "E9",
        "E11",
        "E36",
        "E37",
        "E45",
        "E83",
        "E92",
        "E94",
        "E104",
        "E108",
        "E116",
    )
    head = Modma(positions="head").placed(store.montages["modma-13"])
    assert head == montage
    full = mne.channels.montage.transform_to_head(mne.channels.make_standard_montage("GSN-HydroCel-129"))
    np.testing.assert_allclose(location(store, "E36"), full.get_positions()["ch_pos"]["E36"], atol=1e-6)
    rows = [int(name[1:]) - 1 for name in montage.ch_names]
    same(store, 0, by_mne(written[str(store.subjects[0])][rows], 250)[:, :1280])


def test_modma_split_is_by_the_last_digits():
    depressed = [f"0201{i:04d}" for i in range(1, 25)]
    healthy = [f"020{2 + i % 2}{i:04d}" for i in range(1, 30)]
    sources = fake(depressed, 1) + fake(healthy, 0)
    found = parts_by_label(Modma().split(Catalogue(sources)), sources)
    assert {key: len(value) for key, value in found.items()} == {
        ("train", 1): 14,
        ("validation", 1): 5,
        ("test", 1): 5,
        ("train", 0): 15,
        ("validation", 0): 7,
        ("test", 0): 7,
    }
    assert sorted(s[4:] for s in found["train", 0]) == [f"{i:04d}" for i in range(1, 16)]  # not by the whole id


# --- MoBI -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobi_raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("mobi")
    return root, *trees.mobi_tree(root)


def repeated(rows, start, stop):
    return rows[np.arange(start, stop) % len(rows)]


def test_mobi_parts_targets_and_values(mobi_raw, tmp_path):
    raw, signal, angles = mobi_raw
    assert run("mobi", raw, tmp_path, "--channels", "19", "--step", "200") == 0
    stores, manifest = stores_of(tmp_path), manifest_of(tmp_path)
    counts = {part: Counter(map(str, store.recordings)) for part, store in stores.items()}
    expected = {
        part: {f"SL01-T0{i + 1}/eeg.txt#{part}": n for i, n in enumerate(both)}
        for part, both in {"train": (300, 300), "validation": (150, 150), "test": (150, 90)}.items()
    }
    assert counts == expected
    assert reasons(manifest) == {"eeg.txt": "no joints.txt beside it"}
    assert manifest["split"]["unit"] == "time"
    assert manifest["class_names"] is None
    columns = [0, 1, 2, 3, 4, 5, 6, 12, 13, 14, 23, 24, 25, 11, 15, 22, 26, 28, 30]  # of 64, written out by hand
    for part, begin in (("train", 12_000), ("validation", 72_000), ("test", 102_000)):
        store = stores[part]
        for recording in expected[part]:
            rows = rows_of(store, recording)
            for k in (0, 7, len(rows) - 1):
                start = begin + 200 * k
                assert int(store.start_samples[rows[k]]) == start
                same(store, rows[k], repeated(signal, start, start + 200)[:, columns].T)
                target = repeated(angles, start + 195, start + 200).mean(axis=0) / 90
                np.testing.assert_allclose(store[rows[k]]["label"], target, atol=1e-6)
    (montage,) = stores["test"].montages.values()
    assert montage.name == "mobi-19"


def test_mobi_published_counts_of_windows_and_measured_targets(mobi_raw):
    raw, signal, angles = mobi_raw
    corpus = Mobi(targets=6)
    windows = {}
    for source in corpus.find(raw).sources:
        for piece in corpus.read(source):
            assert len(piece.recording.ch_names) == 60
            one = piece.recording.pick([59])
            cut = cut_windows(one, n_times=corpus.n_times, stride=corpus.stride_samples, keep_flat=True)
            windows[source.session, piece.part] = len(cut.signal)
            if (source.session, piece.part) == ("T02", "test"):
                labels = piece.label_windows(cut.start_samples, piece.recording.n_times)
                start = 102_000 + 5 * 3560
                np.testing.assert_array_equal(cut.signal[-1, 0], repeated(signal, start, start + 200)[:, 63])
                last = repeated(angles, start + 195, start + 200)[:, :6].mean(axis=0) / 90
                np.testing.assert_allclose(labels[-1], last)
    assert windows == {
        ("T01", "train"): 11_961,
        ("T01", "validation"): 5_961,
        ("T01", "test"): 5_961,
        ("T02", "train"): 11_961,
        ("T02", "validation"): 5_961,
        ("T02", "test"): 3_561,
    }


def short_session(root):
    """A session of 4 minutes: (folder, lines of eeg.txt, lines of joints.txt)."""
    trees.mobi_tree(root, minutes=(4,))
    folder = root / "SL01-T01"
    return folder, *((folder / name).read_text().splitlines() for name in ("eeg.txt", "joints.txt"))


def mobi_windows(root, **options):
    """What becomes of the only session: (labels (n,K), manifest entry)."""
    corpus = Mobi(step=200, **options)
    (source,) = (source for source in corpus.find(root).sources if source.subject == "SL01")
    task = SourceTask(source, corpus, root / "results")
    entry = process_source(task)
    blocks = list(read_blocks(task.files(entry["key"])[1])) if "windows" in entry else []
    return [block.labels for block in blocks], entry


@pytest.mark.parametrize("angle", ["nan", "inf", "1e308", "-1e9"])
def test_mobi_windows_without_an_angle_are_left_out(tmp_path, angle):
    folder, _, joints = short_session(tmp_path)
    row = 2 + 12_000 + 5 * 200 - 1  # the last sample of the fifth window of training
    time, _, *others = joints[row].split("\t")
    joints[row] = "\t".join([time, angle, *others])
    (folder / "joints.txt").write_text("\n".join(joints) + "\n")
    (labels,), entry = mobi_windows(tmp_path)
    assert (entry["windows"], entry["rejected_windows"]) == (59, {"no angle": 1})
    assert np.isfinite(labels).all()
    assert "ends after 240 s: there is nothing of it to test on" in entry["notes"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("eeg.txt", lambda line: line + "\t3", "eeg.txt .*its first row has 66 columns, 65 were expected"),
        ("eeg.txt", lambda line: line.rpartition("\t")[0], "its first row has 64 columns, 65 were expected"),
        ("joints.txt", lambda line: "7\t" + line, "joints.txt .*its first row has 14 columns, 13 were expected"),
        ("joints.txt", lambda line: line.replace("\t", ","), "its first row has 1 columns, 13 were expected"),
    ],
)
def test_mobi_columns_that_nothing_names_must_be_as_many_as_documented(tmp_path, name, change, reason):
    folder, eeg, joints = short_session(tmp_path)
    lines, header = (eeg, 1) if name == "eeg.txt" else (joints, 2)
    (folder / name).write_text("\n".join([*lines[:header], *map(change, lines[header:])]) + "\n")
    _, entry = mobi_windows(tmp_path)
    assert entry["status"] == "rejected"
    assert re.search(reason, entry["reason"])


def test_mobi_files_as_other_systems_save_them(tmp_path):
    folder, eeg, _ = short_session(tmp_path)
    (expected,), _ = mobi_windows(tmp_path)
    text = "\r\n".join([eeg[0].replace("channels", "\xb5V"), *(line + "\t" for line in eeg[1:])])
    (folder / "eeg.txt").write_bytes(text.encode("latin-1"))
    (labels,), entry = mobi_windows(tmp_path)
    assert entry["windows"] == 60
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"", b"Time\n", b"h\n" + b"1\t" * 300_000])
def test_mobi_files_that_are_no_tables_get_one_sentence(tmp_path, content):
    folder, _, _ = short_session(tmp_path)
    (folder / "eeg.txt").write_bytes(content)
    _, entry = mobi_windows(tmp_path)
    assert entry["reason"].startswith("eeg.txt is not the table that it should be: ")


# --- EEGMAT -----------------------------------------------------------------------------------------------------------


def test_eegmat_task_and_quality(tmp_path):
    raw = trees.eegmat_tree(tmp_path / "raw")
    assert run("eegmat", raw, tmp_path / "task") == 0
    stores = stores_of(tmp_path / "task")
    subjects = {part: {str(name) for name in store.subjects} for part, store in stores.items()}
    assert sorted(len(own) for own in subjects.values()) == [1, 1, 2]
    assert set.union(*subjects.values()) == {f"Subject{s:02d}" for s in range(4)}
    for store in stores.values():
        for name, label in zip(map(str, store.recordings), store.labels, strict=True):
            assert int(label) == (name[-5] == "2")
        assert store.class_names == ["rest", "arithmetic"]
    assert reasons(manifest_of(tmp_path / "task")) == {"Subject00_1.edf": "the same recording as Subject00_1.edf"}
    catalogue = CORPORA["eegmat"](target="quality").find(raw)
    labels = {(source.subject, source.session): source.label for source in catalogue.sources}
    assert labels == {(f"Subject{s:02d}", str(k)): s % 2 for s in range(3) for k in (1, 2)}
    assert "gives no Count quality" in catalogue.left_out["Subject03_2.edf"]
    assert CORPORA["eegmat"](target="quality").class_names() == ("bad", "good")


def test_eegmat_of_physionet(data_dir, tmp_path):
    raw = tmp_path / "raw"
    (raw / "full_length").mkdir(parents=True)
    names = ["Subject02_1.edf", "Subject02_2.edf", "Subject03_1.edf", "Subject03_2.edf", "subject-info.csv"]
    for name in [*names, "full_length/Subject02_1.edf"]:
        shutil.copy(data_dir / "eegmat" / name, raw / name)
    assert run("eegmat", raw, tmp_path / "out", "--validation", "0", "--test", "0.5") == 0
    stores, manifest = stores_of(tmp_path / "out"), manifest_of(tmp_path / "out")
    assert {part: Counter(map(int, store.labels)) for part, store in stores.items()} == {
        "train": {0: 12, 1: 12},
        "test": {0: 12, 1: 12},
    }
    store = next(s for s in stores.values() if "Subject03" in str(s.subjects[0]))
    (montage,) = store.montages.values()
    raw_mne = mne.io.read_raw_edf(raw / "Subject03_2.edf", preload=True, verbose="ERROR")
    labels = [label.upper() for label in raw_mne.ch_names]
    signal = raw_mne.get_data()[[labels.index(f"EEG {name}") for name in montage.ch_names]] * 1e6
    expected = by_mne(signal, 500, out=256)
    rows = rows_of(store, "Subject03_2.edf")
    same(store, rows[3], expected[:, 3 * 1280 : 4 * 1280])
    assert all(5 < e["robust_amplitude_uv"] < 100 for e in manifest["files"].values() if e.get("windows"))


# --- BIDS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bids_raw(tmp_path_factory):
    return trees.bids_tree(tmp_path_factory.mktemp("bids"))


def test_bids_labels_by_participant(bids_raw, tmp_path):
    assert run("bids", bids_raw, tmp_path, "--label-column", "group", "--task", "rest", "--notch", "50") == 0
    stores, manifest = stores_of(tmp_path), manifest_of(tmp_path)
    assert manifest["class_names"] == ["control", "patient"] == manifest["options"]["classes"]
    found = {str(s): int(y) for store in stores.values() for s, y in zip(store.subjects, store.labels, strict=True)}
    assert found == {"sub-01": 1, "sub-02": 0, "sub-03": 1, "sub-04": 0, "sub-06": 0}
    assert set(stores) == set(PARTS)
    files = manifest["files"]
    first = files["sub-01/ses-1/eeg/sub-01_ses-1_task-rest_run-1_eeg.edf"]  # the table beside participants.tsv
    assert first["dropped_channels"] == ["HEOG"]
    assert first["session"] == "ses-1 task-rest run-1"
    assert "channels.tsv does not list 1 channels of the file: O2" in first["notes"]
    second = files["sub-02/ses-1/eeg/sub-02_ses-1_task-rest_run-1_eeg.edf"]  # its own table
    assert second["dropped_channels"] == ["HEOG", "O1"]
    assert second["channels"] == 3
    assert "bad in channels.tsv, and kept: Cz" in second["notes"]
    left = reasons(manifest)
    assert left["sub-05_ses-1_task-rest_run-1_eeg.edf"] == "participants.tsv gives no group of sub-05"
    assert left["sub-01_ses-1_task-count_eeg.edf"] == "task count, not one of --task"
    assert left["sub-05_ses-1_task-rest_run-2_split-02_eeg.edf"].startswith("a later part")
    assert left["sub-01_task-rest_eeg.edf"] == "below derivatives/: not raw data"
    assert manifest["warnings"] == ["the sidecars state mains of 60 Hz, the notch is at 50 Hz"]
    store = next(s for s in stores.values() if "sub-02" in set(map(str, s.subjects)))
    rows = rows_of(store, "sub-02/ses-1/eeg/sub-02_ses-1_task-rest_run-1_eeg.edf")
    raw = mne.io.read_raw_edf(
        bids_raw / "sub-02/ses-1/eeg/sub-02_ses-1_task-rest_run-1_eeg.edf", preload=True, verbose="ERROR"
    )
    same(store, rows[1], by_mne(raw.get_data(["Fp1", "Cz", "O2"]) * 1e6, 256)[:, 1280:2560])


def test_bids_positions_of_electrodes_are_moved_to_the_head_frame(bids_raw, tmp_path):
    assert run("bids", bids_raw, tmp_path, "--task", "rest") == 0  # no labels: everything is for training
    store = WindowStore(tmp_path / "train.h5")
    assert store.labels is None
    (montage,) = [montage for montage in store.montages.values() if "X1" in montage.ch_names]
    assert montage.ch_names == ("X1", "X2")  # X3 has no position and a name that means nothing
    # Ears on the x axis at y = 10, z = 10 mm and the nasion straight ahead: the head frame is a shift.
    np.testing.assert_allclose(montage.locations, [[0, 0.1, 0], [0.06, 0, 0.05]], atol=1e-6)


def test_bids_labels_by_event_and_by_entity(bids_raw, tmp_path):
    options = ("--validation", "0", "--test", "0", "--window", "2", "--stride", "1")
    assert run("bids", bids_raw, tmp_path / "events", "--events", "open", "closed=shut", *options) == 0
    (store,) = stores_of(tmp_path / "events").values()
    assert store.class_names == ["open", "shut"]
    found = list(zip(map(int, store.start_samples), map(int, store.labels), strict=True))
    assert found == [(128, 0), (384, 0), (640, 0), (896, 0), (1434, 1)]  # 0.5 to 5.5 s, and 2 s from 5.6 s
    left = reasons(manifest_of(tmp_path / "events"))
    assert left["sub-01_ses-1_task-rest_run-1_eeg.edf"] == "none of its 0 events is one of open, closed"
    options = ("--classes", "rest", "count", *options)
    assert run("bids", bids_raw, tmp_path / "task", "--label-entity", "task", *options) == 0
    (store,) = stores_of(tmp_path / "task").values()
    tasks = [str(name).split("task-")[1].split("_")[0] for name in store.recordings]
    assert set(zip(tasks, map(int, store.labels), strict=True)) == {("rest", 0), ("count", 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label-column", "colour"), "has no column colour beside participant_id: participant_id, age, group"),
        (("--label-column", "group", "--classes", "patient"), "--classes does not list control"),
        (("--label-column", "group", "--validation", "0.5", "--test", "0.6"), "cannot be divided"),
        (("--label-column", "group", "--seed", "-1"), "--seed must be 0 or above, found -1"),
    ],
)
def test_bids_refuses_in_one_sentence(bids_raw, tmp_path, capsys, options, message):
    assert run("bids", bids_raw, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0.0}, "--stride of 0 s is 0 samples"),
        ({"window": float("nan")}, "--window of nan s"),
        ({"window": float("inf")}, "--window of inf s"),
        ({"sfreq": float("nan")}, "sfreq must be positive and at most"),
        ({"sfreq": float("inf")}, "sfreq must be positive and at most"),
        ({"l_freq": 0.0, "h_freq": None}, "l_freq must be a frequency above 0 Hz"),
        ({"l_freq": None, "h_freq": -3.0}, "h_freq must be a frequency above 0 Hz"),
        ({"event_seconds": -1.0}, "--event-seconds must be positive"),
    ],
)
def test_bids_options_that_mean_nothing_are_refused_before_any_file(options, message):
    with pytest.raises(ValueError, match=message):
        Bids(**options)


def test_bids_names_and_sidecars(tmp_path):
    found = parse_name("sub-01_ses-02_task-rest_run-1_eeg")
    assert found is not None
    assert found.suffix == "eeg"
    assert found.entities == {"sub": "01", "ses": "02", "task": "rest", "run": "1"}
    assert parse_name("sub-01_resting_eeg") is None
    folder = tmp_path / "sub-01" / "eeg"
    folder.mkdir(parents=True)
    recording = folder / "sub-01_task-rest_run-1_eeg.edf"
    for path in (tmp_path / "task-rest_events.tsv", tmp_path / "events.tsv", tmp_path / "sub-01" / "sub-01_events.tsv"):
        path.write_text("onset\tduration\n")
    assert sidecar(tmp_path, recording, "events.tsv") == tmp_path / "sub-01" / "sub-01_events.tsv"
    (tmp_path / "sub-01" / "sub-01_events.tsv").unlink()
    assert sidecar(tmp_path, recording, "events.tsv") == tmp_path / "task-rest_events.tsv"
    (folder / "sub-01_task-rest_run-2_events.tsv").write_text("onset\tduration\n")  # of another run
    assert sidecar(tmp_path, recording, "events.tsv") == tmp_path / "task-rest_events.tsv"
    assert sidecar(tmp_path, recording, "channels.tsv") is None


@pytest.mark.parametrize(
    ("about", "x", "note"),
    [
        ({"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "cm"}, 0.01, "taken as the head frame"),
        ({"EEGCoordinateSystem": "Other", "EEGCoordinateUnits": "mm"}, None, "not used: frame Other, without nasion"),
        ({"EEGCoordinateSystem": "CapTrak", "EEGCoordinateUnits": "pixels"}, None, "not used: unit 'pixels'"),
    ],
)
def test_bids_coordinate_systems(tmp_path, about, x, note):
    (tmp_path / "electrodes.tsv").write_text("name\tx\ty\tz\nA\t1\t2\t3\nB\tn/a\t0\t0\n")
    (tmp_path / "coordsystem.json").write_text(json.dumps(about))
    positions = electrode_table(tmp_path / "electrodes.tsv", tmp_path / "coordsystem.json")
    assert note in positions.note
    assert set(positions.of) == (set() if x is None else {"A"})
    if x is not None:
        np.testing.assert_allclose(positions.of["A"], [x, 2 * x, 3 * x])


def test_bids_tree_of_eeglab(data_dir, tmp_path):
    raw = data_dir / "eeglab" / "BIDS_test"
    assert run("bids", raw, tmp_path, "--label-column", "Gender", "--validation", "0", "--test", "0") == 0
    store, manifest = WindowStore(tmp_path / "train.h5"), manifest_of(tmp_path)
    assert store.class_names == ["M"]
    assert set(map(str, store.subjects)) == {"sub-S1"}
    (used,) = [entry for entry in manifest["files"].values() if entry["status"] == "windows"]
    assert used["windows"] == len(store) == int(used["duration_seconds"] // 5)
    assert "below derivatives/: not raw data" in reasons(manifest).values()
