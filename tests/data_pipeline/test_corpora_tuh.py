"""TUAB, TUAR, TUSL, TUEG and Siena from synthetic trees in their original layouts, faults included."""

import json
from collections import Counter
from pathlib import Path

import corpus_trees as trees
import mne
import numpy as np
import pytest
from fuzzing import mutated, mutated_text

from data_pipeline.corpora.base import Catalogue, Source
from data_pipeline.corpora.siena import Siena
from data_pipeline.corpora.tuab import Tuab
from data_pipeline.corpora.tuar import Tuar
from data_pipeline.corpora.tueg import Tueg
from data_pipeline.corpora.tuh_annotations import Event, read_annotations, samples
from data_pipeline.corpora.tusl import Tusl
from data_pipeline.formats import open_stores
from data_pipeline.montages import named_montage
from data_pipeline.prepare import main
from data_pipeline.store import WindowStore

_PAIRS_L = (
    "FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 T3-C3 C3-CZ CZ-C4 C4-T4 FP1-F3 F3-C3 C3-P3 P3-O1 FP2-F4 F4-C4 "
    "C4-P4 P4-O2 A1-T3 T4-A2"
)
_PAIRS_D = (
    "FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 A1-T3 T3-C3 C3-CZ CZ-C4 C4-T4 T4-A2 FP1-F3 F3-C3 C3-P3 P3-O1 "
    "FP2-F4 F4-C4 C4-P4 P4-O2"
)
_SITES_OF_SIENA = "FP1 FP2 F3 C3 P3 O1 F7 T3 T5 FC1 FC5 CP1 CP5 F9 FZ CZ PZ F4 C4 P4 O2 F8 T4 T6 FC2 FC6 CP2 CP6 F10"
L, D, SIENA = tuple(_PAIRS_L.split()), tuple(_PAIRS_D.split()), tuple(_SITES_OF_SIENA.split())


def run(corpus, raw, out, *options):
    return main([corpus, "--raw", str(raw), "--out", str(out), "--jobs", "1", *map(str, options)])


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def reasons(manifest):
    return {name: entry["reason"] for name, entry in manifest["files"].items() if "reason" in entry}


@pytest.fixture(scope="module")
def tuab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuab")
    assert run("tuab", trees.tuab_tree(folder / "raw"), folder / "out") == 0
    return folder


@pytest.fixture(scope="module")
def tuar_raw(tmp_path_factory):
    return trees.tuar_tree(tmp_path_factory.mktemp("tuar_raw"))


@pytest.fixture(scope="module")
def tusl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tusl")
    assert run("tusl", trees.tusl_tree(folder / "raw"), folder / "out") == 0
    return folder


@pytest.fixture(scope="module")
def tueg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tueg")
    trees.tuab_tree(folder / "tuab")
    raw = trees.tueg_tree(folder / "raw")
    assert run("tueg", raw, folder / "out", "--exclude", folder / "tuab") == 0
    return folder


def filtered_by_mne(path, pairs, *, notch, sfreq=256):
    """The chain of the specification straight with MNE: filter, notch, resample, difference; microvolts."""
    raw = mne.io.read_raw_edf(path, preload=True, verbose="ERROR")
    sites = list(dict.fromkeys(site for pair in pairs for site in pair.split("-")))
    names = {ch.upper().removeprefix("EEG ").removesuffix("-REF").removesuffix("-LE"): ch for ch in raw.ch_names}
    raw.pick([names[site] for site in sites])
    raw.filter(0.1, 75.0, verbose="ERROR").notch_filter(notch, verbose="ERROR")
    if raw.info["sfreq"] != sfreq:
        raw.resample(sfreq, verbose="ERROR")
    data = dict(zip(sites, raw.get_data() * 1e6, strict=True))
    return np.stack([data[p.split("-")[0]] - data[p.split("-")[1]] if "-" in p else data[p] for p in pairs])


def test_a_tuab_window_is_what_mne_makes_of_it_in_order_l_and_d(tmp_path):
    path = trees.write_edf(
        tmp_path / "raw/edf/train/abnormal/01_tcp_ar/aaaaaaaa_s001_t000.edf", trees.tuh_labels(), seconds=37
    )
    for order, pairs in (("L", L), ("D", D)):
        assert run("tuab", tmp_path / "raw", tmp_path / order, "--validation", "0", "--channel-order", order) == 0
        store = WindowStore(tmp_path / order / "train.h5")
        (montage,) = store.montages.values()
        assert montage.ch_names == pairs
        expected = filtered_by_mne(path, pairs, notch=60)
        assert len(store) == 7
        for i in range(7):
            np.testing.assert_allclose(store[i]["signal"], expected[:, 1280 * i : 1280 * (i + 1)], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        montage.locations[D.index("A1-T3")], named_montage("tuh-bipolar-22").locations[L.index("A1-T3")]
    )


def test_tuab_windows_labels_and_files_left_out(tuab):
    manifest = manifest_of(tuab / "out")
    assert manifest["counts"] == {"windows": 11, "rejected": 3, "skipped": 3, "total_windows": 22, "transient": 0}
    left = {name.rsplit("/", 1)[1]: reason for name, reason in reasons(manifest).items()}
    for name, part in {
        "aaaaaaa0_s003_t000.edf": "no window of 5 s fits: the file lasts 4 s",
        "aaaaaaa1_s002_t000.edf": "lacks T6 of the 21 electrodes",
        "aaaaaaa2_s009_t000.edf": "damaged header",
        "notes.edf": "is not <subject>_sNNN_tNNN",
        "aaaaaaa3_s001_t001.edf": "not in a folder train or eval",
        "aaaaaezz_s001_t000.edf": "its subject is in the official evaluation set",
    }.items():
        assert part in left.pop(name)
    assert not left
    test = WindowStore(tuab / "out" / "test.h5")
    by_recording = dict(zip(test.recordings, test.labels, strict=True))
    assert {name.rsplit("/", 1)[1]: int(label) for name, label in by_recording.items()} == {
        "aaaaaezz_s002_t000.edf": 0,
        "aaaaaeyy_s001_t001.edf": 1,
    }
    assert test.class_names == ["normal", "abnormal"]
    assert (test.sfreq, test.n_times, set(test.start_samples)) == (256.0, 1280, {0, 1280})
    train = WindowStore(tuab / "out" / "train.h5")
    assert train.labels.dtype == np.int32
    for name, label in zip(train.recordings, train.labels, strict=True):
        assert ("/abnormal/" in name) == label


def test_tuab_subjects_are_on_one_side_and_their_split_is_seeded(tuab, tmp_path):
    def subjects(out):
        split = json.loads((out / "split.json").read_text())
        return {part: set(split[part]) for part in ("train", "val", "test")}

    own = subjects(tuab / "out")
    assert own["test"] == {"aaaaaezz", "aaaaaeyy"}
    assert own["train"] | own["val"] == {f"aaaaaaa{i}" for i in range(4)} | {f"aaaaabb{i}" for i in range(4)}
    assert len(own["val"]) == 2  # 20 % of 8, one of each stratum
    assert {subject[:6] for subject in own["val"]} == {"aaaaaa", "aaaaab"}
    stored = {part: set(WindowStore(tuab / "out" / f"{part}.h5").subjects) for part in ("train", "validation", "test")}
    assert stored == {"train": own["train"], "validation": own["val"], "test": own["test"]}
    both = WindowStore(tuab / "out" / ("train.h5" if "aaaaabb0" in own["train"] else "validation.h5"))
    assert {int(label) for label in both.labels[both.subjects == "aaaaabb0"]} == {0, 1}
    catalogue = Tuab().find(tuab / "raw")
    drawn = [Tuab(seed=seed).split(catalogue).parts for seed in range(4)]
    assert drawn[0] == Tuab().split(catalogue).parts
    assert len({tuple(sorted(parts.items())) for parts in drawn}) > 1


_30 = [1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]  # 30 %: 384 samples are enough, 383 are not
_ANY = [1, 1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1]
MODES = {  # mode, further options -> labels of the twelve windows (None: left out)
    ("binary_30", "reference"): _30,
    ("binary_30", "artifacts"): [1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1],
    ("binary_any13", "reference"): _ANY,
    ("binary_any13", "artifacts"): [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1],
    ("multi_class_6", "reference"): [4, 0, 3, None, 0, 0, 0, None, 0, 4, 0, 5],
    ("multi_class_6", "largest"): [4, 0, 3, 1, 0, 0, 0, 3, 0, 4, 0, 5],
    ("multi_class_6", "artifacts"): [4, 0, 3, None, 0, 0, 0, None, None, 4, 2, 5],
    ("multi_class_5", "reference"): [3, None, 2, None, None, None, None, None, None, 3, None, 4],
}
PER_CHANNEL = {  # mode -> {window: {channel: label}}, all others 0
    ("multi_binary", "reference"): {
        0: {"FP1-F7": 1},
        3: {"C3-CZ": 1},
        6: {"FP2-F8": 1},
        7: {"P4-O2": 1},
        9: {"T4-T6": 1},
        10: {"F3-C3": 1},
        11: {"A1-T3": 1},
    },
    # 11: 40 % shivering, but 60 % nothing; 9: the later row is background; 3: the later row is chewing
    ("multi_label", "reference"): {3: {"C3-CZ": 1}, 7: {"P4-O2": 3}},
    ("multi_label", "artifacts"): {3: {"C3-CZ": 1}, 7: {"P4-O2": 3}, 8: {"C4-P4": 1}, 10: {"F3-C3": 2}},
}


def tuar_labels(out):
    """{recording stem: (start samples, labels)} over all parts."""
    found = {}
    for path in sorted(out.glob("*.h5")):
        store = WindowStore(path)
        for name in store.recordings.unique():
            rows = np.flatnonzero(store.recordings == name)
            found[name.rsplit("/", 1)[1].removesuffix(".edf")] = (store.start_samples[rows], store.labels[rows])
    return found


def tuar_options(mode, choice):
    options = ["--labels", mode, "--label-set", "artifacts" if choice == "artifacts" else "reference"]
    return [*options, "--several", "largest" if choice == "largest" else "drop"]


@pytest.mark.parametrize(("mode", "choice"), MODES, ids="-".join)
def test_tuar_labels_of_windows(tuar_raw, tmp_path, mode, choice):
    assert run("tuar", tuar_raw, tmp_path / "o", *tuar_options(mode, choice)) == 0
    expected = MODES[mode, choice]
    starts, labels = tuar_labels(tmp_path / "o")["aaaaaaaa_s001_t000"]
    kept = [i for i, label in enumerate(expected) if label is not None]
    assert (starts // 1280).tolist() == kept
    assert labels.tolist() == [expected[i] for i in kept]
    entry = manifest_of(tmp_path / "o")["files"]["edf/01_tcp_ar/aaaaaaaa_s001_t000.edf"]
    assert sum(entry["rejected_windows"].values()) == expected.count(None)


@pytest.mark.parametrize(("mode", "choice"), PER_CHANNEL, ids="-".join)
@pytest.mark.parametrize("order", ["L", "D"])
def test_tuar_labels_of_channels_follow_the_stored_order(tuar_raw, tmp_path, mode, choice, order):
    assert run("tuar", tuar_raw, tmp_path / "o", *tuar_options(mode, choice), "--channel-order", order) == 0
    pairs = {"L": L, "D": D}[order]
    expected = np.zeros((12, 22), int)
    for window, channels in PER_CHANNEL[mode, choice].items():
        for channel, label in channels.items():
            expected[window, pairs.index(channel)] = label
    _, labels = tuar_labels(tmp_path / "o")["aaaaaaaa_s001_t000"]
    np.testing.assert_array_equal(labels, expected)


def test_tuar_other_files(tuar_raw, tmp_path):
    assert run("tuar", tuar_raw, tmp_path / "o", "--labels", "multi_class_6") == 0
    labels = {stem: own.tolist() for stem, (_, own) in tuar_labels(tmp_path / "o").items()}
    assert labels["aaaaaaaa_s002_t000"] == [0, 0]  # a csv without rows
    assert labels["aaaaaaab_s001_t000"] == [0, 0]  # no csv
    assert labels["aaaaaaac_s001_t000"] == [3, 4]  # version 1: the most probable symbol, by channel number
    manifest = manifest_of(tmp_path / "o")
    assert manifest["warnings"][0].startswith("1 recordings have no annotation file")
    assert reasons(manifest) == {
        "edf/02_tcp_le/aaaaaaad_s001_t000.edf": "aaaaaaad_s001_t000.csv, line 7: start 'zero' and stop '1.0' must be "
        "seconds",
        "edf/03_tcp_ar_a/aaaaaaae_s001_t000.edf": "03_tcp_ar_a has no ear electrodes, 22 pairs need them",
    }
    notes = manifest["files"]["edf/01_tcp_ar/aaaaaaaa_s001_t000.edf"]["notes"]
    assert "1 annotations have a label that is none of the corpus" in notes
    assert "1 annotations are on a channel that is none of the 22" in notes
    entries = [entry for entry in manifest["files"].values() if entry.get("windows")]
    parts = Counter((entry["subject"], part) for entry in entries for part in entry["parts"])
    assert parts["aaaaaaaa", next(p for s, p in parts if s == "aaaaaaaa")] == 2  # both files of the subject


def test_tuar_rows_of_a_csv_without_one_of_the_22_channels_label_nothing(tmp_path):
    """TERM is the whole montage in files without channels; in a csv the reference ignores it like any other name."""
    head = "channel,start_time,stop_time,label,confidence\n"
    (tmp_path / "a.csv").write_text(head + "TERM,0.0,5.0,musc,1.0\nFP1-F7,5.0,10.0,musc,1.0\n")
    (tmp_path / "a.tse").write_text("version = tse_v1.0.0\n\n0.0 5.0 musc 1.0\n")
    path = trees.write_edf(tmp_path / "a.edf", trees.tuh_labels(), seconds=10)
    for suffix, expected in ((".csv", [0, 1]), (".tse", [1, 0])):
        (piece,) = Tuar().read(Source(path, "a.edf", "a", companions=(tmp_path / f"a{suffix}",)))
        assert piece.label_windows(np.array([0, 1280]), 2560) == expected
        assert ("1 annotations are on a channel that is none of the 22" in piece.recording.notes) == (suffix == ".csv")


def test_tuar_split_of_eighty_ten_ten_by_subject_or_by_file(tmp_path):

    sources = [
        Source(tmp_path, f"{subject:03}_{i}", f"{subject:03}", classes=(subject % 3,))
        for subject in range(213)
        for i in range(1 + subject % 2)
    ]
    by_subject = Tuar().split(Catalogue(sources))
    parts = {
        part: {s.subject for s in sources if by_subject.parts[s.name] == part}
        for part in set(by_subject.parts.values())
    }
    assert {part: len(own) for part, own in parts.items()} == {"train": 171, "validation": 21, "test": 21}
    assert sum(map(len, parts.values())) == 213
    for own in (parts["validation"], parts["test"]):  # proportional in the three sets of families
        assert max(Counter(int(s) % 3 for s in own).values()) == min(Counter(int(s) % 3 for s in own).values()) == 7
    assert Tuar().split(Catalogue(sources[::-1])).parts == by_subject.parts
    by_file = Tuar(split_unit="file").split(Catalogue(sources))
    assert by_file.unit == "recording"
    leaked = {s.subject for s in sources if by_file.parts[s.name] == "test"} & {
        s.subject for s in sources if by_file.parts[s.name] == "train"
    }
    assert leaked


def test_tusl_labels_files_and_split(tusl, tmp_path):
    out = tusl / "out"
    labels = {stem: own.tolist() for stem, (_, own) in tuar_labels(out).items()}
    assert labels == {
        "aaaaaaaa_s001_t000": [1, 1, 2, 3, 2, 2],
        "x01_aaaaaaab_s002_t003": [3, 1, 1],
        "aaaaaaac_s001_t000": [1, 1],
    }
    manifest = manifest_of(out)
    assert {name.rsplit("/", 1)[1]: reason for name, reason in reasons(manifest).items()} == {
        "aaaaaaaa_s001_t001.edf": "lacks A1, A2 of the 21 electrodes that are required",
        "x01_aaaaaaab_s002_t004.edf": "no annotation file (.csv, .csv_bi, .tse_agg, .tse) beside it",
    }
    assert {part: own["subjects"] for part, own in manifest["parts"].items()}.keys() == {"train", "validation", "test"}
    assert manifest["class_names"] == ["normal", "background", "seizure", "slowing"]
    assert run("tusl", tusl / "raw", tmp_path / "o", "--unannotated", "normal") == 0
    assert tuar_labels(tmp_path / "o")["x01_aaaaaaab_s002_t004"][1].tolist() == [0, 0]


def test_tusl_split_gives_thirty_four_four(tmp_path):

    division = Tusl().split(
        Catalogue([Source(tmp_path, f"s{i:02}", f"s{i:02}", classes=(1 + i % 3,)) for i in range(38)])
    )
    assert Counter(division.parts.values()) == {"train": 30, "validation": 4, "test": 4}


def test_tueg_montages_rates_rejections_and_exclusion(tueg):
    manifest = manifest_of(tueg / "out")
    left = {name.rsplit("/", 1)[1]: reason for name, reason in reasons(manifest).items()}
    assert left == {
        "aaaaaaae_s001_t000.edf": "lacks T6 of the 19 electrodes that are required",
        "aaaaaaae_s001_t001.edf": "sampled at 150 Hz: the band to 75 Hz reaches its Nyquist frequency "
        "(--low-rate lower keeps such files)",
        "aaaaaaae_s001_t002.edf": "no window of 5 s fits: the file lasts 4 s",
        "aaaaabb0_s001_t000.edf": "its subject is in tuab (--exclude)",
        "aaaaaaaf_s001_t000.edf": "in no montage folder 01_tcp_ar, 02_tcp_le, 03_tcp_ar_a or 04_tcp_le_a",
    }
    store = WindowStore(tueg / "out" / "train.h5")
    assert store.labels is None
    assert len(store) == 10
    by_subject = dict(zip(store.subjects, store.montage_names, strict=True))
    assert by_subject == {
        "aaaaaaaa": "tuh-bipolar-22",
        "aaaaaaab": "tuh-bipolar-22",
        "aaaaaaac": "tuh-bipolar-20",
        "aaaaaaad": "tuh-bipolar-20",
        "00000254": "tuh-bipolar-22",
    }
    assert store.montages["tuh-bipolar-22"].ch_names == L
    assert store.montages["tuh-bipolar-20"].ch_names == L[:20]
    assert manifest["warnings"] == []
    assert sorted(p.name for p in (tueg / "out").iterdir()) == [
        "manifest.json",
        "report.html",
        "split.json",
        "train.h5",
    ]


def test_tueg_windows_are_not_scrambled(tmp_path):
    raw = tmp_path / "raw"
    path = trees.write_edf(
        raw / "edf/000/aaaaaaaa/s001_2015/03_tcp_ar_a/aaaaaaaa_s001_t000.edf",
        trees.tuh_labels(without=("A1", "A2")),
        seconds=40,
        sfreq=512,
    )
    assert run("tueg", raw, tmp_path / "o") == 0
    store = WindowStore(tmp_path / "o" / "train.h5")
    expected = filtered_by_mne(path, L[:20], notch=60)
    signal = np.concatenate([store[i]["signal"] for i in range(len(store))], axis=1)
    np.testing.assert_allclose(signal, expected[:, : 8 * 1280], rtol=0, atol=1e-4)
    assert "no --exclude: subjects of TUAB, TUAR and TUSL may be" in manifest_of(tmp_path / "o")["warnings"][0]


def test_tueg_excludes_subjects_of_folders_prepared_or_raw_and_of_lists(tueg, tuab, tmp_path, capsys):
    def left(*exclude):
        assert run("tueg", tueg / "raw", tmp_path / "o", "--exclude", *exclude) == 0
        found = reasons(manifest_of(tmp_path / "o"))
        return {name.rsplit("/", 1)[1][:8] for name, reason in found.items() if "--exclude" in reason}

    assert left(tuab / "out") == {"aaaaabb0"}
    (tmp_path / "ids.txt").write_text("AAAAAAAB\n# a comment\n00000254\n")
    assert left(tmp_path / "ids.txt", tuab / "raw") == {"aaaaabb0", "aaaaaaab", "00000254"}
    (tmp_path / "empty").mkdir()
    for bad, message in {"empty": "names no subject", "nowhere": "does not exist"}.items():
        assert run("tueg", tueg / "raw", tmp_path / "x", "--exclude", tmp_path / bad) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("zzzzzzzz\n")
    assert left(tmp_path / "other.txt") == set()
    assert "none of the 1 subjects to exclude is in this corpus" in manifest_of(tmp_path / "o")["warnings"][0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfaaaaabb0\n",
        b"aaaaabb0\r\n",
        b"edf/eval/aaaaabb0_s001_t000.edf\n",
        b"aaaaabb0_s003_t000 # a file\n",
    ],
)
def test_a_list_of_subjects_to_exclude_is_never_silently_misread(tueg, tmp_path, content):
    """A byte order mark or the name of a file instead of an id would leave a test subject in pre-training."""
    (tmp_path / "ids.txt").write_bytes(content)
    catalogue = Tueg(exclude=(tmp_path / "ids.txt",)).find(tueg / "raw")
    assert {name.rsplit("/", 1)[1][:8] for name, why in catalogue.left_out.items() if "--exclude" in why} == {
        "aaaaabb0"
    }
    assert not catalogue.warnings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.txt", bytes(range(256)), "ids.txt is not a text in UTF-8"),
        ("ids.txt", "aaaaabb0\n".encode("utf-16"), "ids.txt is not a text in UTF-8"),
        ("ids.txt", b"subject,files\naaaaabb0,3\n", "line 1: 'subject,files' is no subject"),
        ("manifest.json", b'{"files"', "manifest.json is not that of a prepared corpus"),
        ("manifest.json", b'{"counts": 1}', "manifest.json is not that of a prepared corpus"),
        ("manifest.json", b'{"files": {"a.edf": 1}}', "manifest.json is not that of a prepared corpus"),
        ("manifest.json", b"[" * 200_000, "manifest.json is not that of a prepared corpus"),
    ],
)
def test_what_cannot_be_excluded_is_refused_in_one_sentence(tueg, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        Tueg(exclude=(tmp_path / name if name == "ids.txt" else tmp_path,)).find(tueg / "raw")
    assert len(str(refusal.value).splitlines()) == 1


def test_damaged_lists_of_subjects_are_understood_or_refused(tueg, tmp_path):
    content = b"# of TUAB\naaaaabb0\naaaaaaab_s001_t000.edf\r\n\n00000254\n"
    refusals = []
    for case in range(200):
        rng = np.random.default_rng((12, case))
        (tmp_path / "ids.txt").write_bytes((mutated if case % 2 else mutated_text)(content, rng))
        try:
            Tueg(exclude=(tmp_path / "ids.txt",)).find(tueg / "raw")
        except ValueError as error:
            refusals.append(str(error))
    assert 20 < len(refusals) < 180
    assert all("ids.txt" in text and len(text.splitlines()) == 1 for text in refusals)


def test_low_rates_are_kept_with_a_lower_band_when_asked(tueg, tmp_path):
    assert run("tueg", tueg / "raw", tmp_path / "o", "--low-rate", "lower") == 0
    (entry,) = [
        e for name, e in manifest_of(tmp_path / "o")["files"].items() if name.endswith("aaaaaaae_s001_t001.edf")
    ]
    assert entry["windows"] == 2
    assert "lowered from 75 to 67.5 Hz" in entry["notes"][0]


def test_many_recordings_become_a_folder_of_stores(tueg, tmp_path, monkeypatch):

    monkeypatch.setattr(Tueg, "recordings_per_store", 3)
    assert run("tueg", tueg / "raw", tmp_path / "o") == 0
    stores = open_stores([tmp_path / "o" / "train"])
    assert [store.path.name for store in stores] == ["train-00000.h5", "train-00001.h5", "train-00002.h5"]
    names = [name for store in stores for name in store.recordings]
    whole = WindowStore(tueg / "out" / "train.h5")
    assert set(whole.recordings) <= set(names)
    assert not (tmp_path / "o" / ".prepare").exists()
    monkeypatch.setattr(Tueg, "recordings_per_store", 100)
    assert run("tueg", tueg / "raw", tmp_path / "o", "--exclude", tueg / "tuab") == 0
    assert (tmp_path / "o" / "train.h5").read_bytes() == (tueg / "out" / "train.h5").read_bytes()
    assert not (tmp_path / "o" / "train").exists()  # the stores of the earlier run are gone


def test_siena_order_rates_and_files(tmp_path):
    raw = trees.siena_tree(tmp_path / "raw")
    trees.write_edf(raw / "PN01" / "PN01-1.edf", [f"EEG {n}" for n in trees.SIENA_29.split()], sfreq=512, seconds=36)
    assert run("siena", raw, tmp_path / "o") == 0
    store = WindowStore(tmp_path / "o" / "train.h5")
    assert store.montages["siena-29"].ch_names == SIENA
    assert Counter(store.subjects) == {"PN00": 4, "PN01": 7, "PN12": 2}
    assert reasons(manifest_of(tmp_path / "o")) == {
        "PN17/PN17-1.edf": "lacks F10 of the 29 electrodes that are required",
        "PN17/seizure.edf": "its name 'seizure' is not PNxx-N",
    }
    expected = filtered_by_mne(raw / "PN01" / "PN01-1.edf", SIENA, notch=50)
    rows = np.flatnonzero(store.subjects == "PN01")
    np.testing.assert_allclose(store[rows[1]]["signal"], expected[:, 1280:2560], rtol=0, atol=1e-4)


def test_an_annotation_without_end_reaches_to_the_end():
    assert samples(Event(1.0, 1e308, "seiz"), 256.0, 1000) == slice(256, 1000)


def test_annotation_formats(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("# version\n#\nchannel,start_time,stop_time,label,confidence\nfp1-f7,-1.0,2.0,MUSC,1\n")
    assert read_annotations(path) == [Event(-1.0, 2.0, "musc", "FP1-F7")]
    path.write_text("channel,start_time,stop_time\n")
    with pytest.raises(ValueError, match="line 1: expected the columns channel, start_time, stop_time, label"):
        read_annotations(path)
    path.write_text('channel,start_time,stop_time,label\nFP1-F7,0,1,musc\n"F7-T3,1,2,musc\nT3-T5,2,3,musc\n')
    with pytest.raises(ValueError, match=r"a.csv, line 3: 1 columns"):  # the quote does not swallow line 4
        read_annotations(path)
    path.write_text("channel,start_time,stop_time,label\n" + "x" * 200_000 + ",1,2,musc\n")
    with pytest.raises(ValueError, match=r"a.csv, line 2: cannot be read as cells"):
        read_annotations(path)
    path = tmp_path / "a.tse_bi"
    path.write_text("version = tse_v1.0.0\n\n0.0000 5.0000 bckg 1.0000\n5.0 7.5 seiz 0.5\n")
    assert read_annotations(path) == [Event(0, 5, "bckg"), Event(5, 7.5, "seiz")]
    path.write_text("version = tse_v1.0.0\n0.0 5.0\n")
    with pytest.raises(ValueError, match=r"a.tse_bi, line 2: expected `start stop label"):
        read_annotations(path)
    path = tmp_path / "a.lbl_agg"
    path.write_text(trees.TUAR_LBL)
    assert read_annotations(path) == [Event(0, 2, "eyem", "F7-T3"), Event(5, 10, "musc", "FP1-F7")]
    path.write_text("label = {0, 0, 0.0, 2.0, 1, [1.0}\n")
    with pytest.raises(ValueError, match="line 1: cannot be read as an event"):
        read_annotations(path)


def test_layouts_of_other_releases(tmp_path):
    """Versions 1 and 2: numbers of eight digits, folders of subject and session; only names are looked at."""
    for name in (
        "tuab/v1.1.2/edf/eval/abnormal/01_tcp_ar/007/00000768/s003_2012_04_06/00000768_s003_t000.edf",
        "tuab/v2.0.0/edf/train/normal/01_tcp_ar/000/00000021/s004_2013_08_15/00000021_s004_t000.EDF",
        "tuar/v1.0.0/edf/02_tcp_le/002/00000254/s005_2010_11_15/00000254_s005_t000.edf",
        "tusl/v1.5.0/data/01_tcp_ar/004/00000492/s003_2003_10_18/00000492_s003_t001.edf",
        "tueg/v1.2.0/edf/04_tcp_le_a/000/00000003/s002_2010/00000003_s002_t001.edf",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "tusl/v1.5.0/data/01_tcp_ar/004/00000492/s003_2003_10_18/00000492_s003_t001.tse_agg").touch()
    found = {
        name: [(s.subject, s.session, s.part, s.label) for s in corpus.find(tmp_path / name).sources]
        for name, corpus in {"tuab": Tuab(), "tuar": Tuar(), "tusl": Tusl(), "tueg": Tueg()}.items()
    }
    assert found == {
        "tuab": [("00000768", "s003", "test", 1), ("00000021", "s004", "train", 0)],
        "tuar": [("00000254", "s005", "", None)],
        "tusl": [("00000492", "s003", "", None)],
        "tueg": [("00000003", "s002", "", None)],
    }
    (tueg,) = Tueg().find(tmp_path / "tueg").sources
    assert Tueg().chain(tueg).montage == "tuh-bipolar-20"


@pytest.mark.parametrize("corpus", ["tuab", "tuar", "tusl", "tueg", "siena"])
def test_an_unknown_layout_is_one_sentence(corpus, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert run(corpus, tmp_path / "raw", tmp_path / "o") == 2
    found = capsys.readouterr().err
    assert "expected " in found
    assert "found no such files" in found
    trees.write_edf(tmp_path / "raw" / "somewhere" / "a.edf", ["EEG FP1-REF"], seconds=1)
    assert run(corpus, tmp_path / "raw", tmp_path / "o") == 2
    assert "all 1 files were left out, the first, somewhere/a.edf" in capsys.readouterr().err
    assert run(corpus, tmp_path / "nowhere", tmp_path / "o") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_real_tuh_layout(data_dir, tmp_path, capsys):
    """Real TUSZ headers and folders; the signals are 2 s of noise, so nothing is long enough: the only reason."""
    if not (data_dir / "tuh_layout").is_dir():
        pytest.skip("the TUH layout is not beside this repository")
    assert run("tueg", data_dir / "tuh_layout" / "tuh", tmp_path / "o") == 2
    message = capsys.readouterr().err
    files = sorted((data_dir / "tuh_layout" / "tuh").rglob("*.edf"))
    short = "no window of 5 s fits: the file lasts 2 s"
    assert f"{len(files)} files: {short}" in message
    assert run("siena", data_dir / "tuh_layout" / "siena", tmp_path / "o") == 2
    assert f"2 files: {short}" in capsys.readouterr().err


def labels_of_seconds(path, seconds):
    """What an annotation file says of most of each of the first seconds: 0 nothing, 1 background, 2 seizure."""
    time, number = (np.arange(256 * seconds) + 0.5) / 256, np.zeros(256 * seconds, int)
    for line in path.read_text().splitlines():
        if line.startswith("TERM"):
            _, start, stop, label, _ = line.split(",")
            number[(time > float(start)) & (time < float(stop))] = {"bckg": 1, "seiz": 2}[label]
    return [int(np.bincount(own).argmax()) for own in number.reshape(seconds, 256)]


def test_windows_from_the_real_tuh_layout(data_dir, tmp_path, monkeypatch):
    """The same folders with windows of 1 s: two of each file, in the pairs of its montage folder; real annotations."""
    if not (data_dir / "tuh_layout").is_dir():
        pytest.skip("the TUH layout is not beside this repository")
    raw = data_dir / "tuh_layout" / "tuh"
    for corpus in (Tueg, Tusl, Siena):
        monkeypatch.setattr(corpus, "window", 1.0)
        monkeypatch.setattr(corpus, "stride", 1.0)
    assert run("tueg", raw, tmp_path / "tueg") == 0
    files = manifest_of(tmp_path / "tueg")["files"]
    assert {name: (e["windows"], e["channels"], e["subject"]) for name, e in files.items()} == {
        path.relative_to(raw).as_posix(): (
            2,
            20 if path.parent.name[:2] in ("03", "04") else 22,
            path.stem.split("_")[0],
        )
        for path in raw.rglob("*.edf")
    }
    assert run("tusl", raw, tmp_path / "tusl") == 0
    files = manifest_of(tmp_path / "tusl")["files"]
    for name, entry in files.items():
        if Path(name).parent.name.startswith("03"):
            assert "lacks A1, A2" in entry["reason"]
        else:
            (labels,) = entry["labels"].values()
            assert labels == Counter(str(label) for label in labels_of_seconds((raw / name).with_suffix(".csv_bi"), 2))
    assert run("siena", data_dir / "tuh_layout" / "siena", tmp_path / "siena") == 0
    files = manifest_of(tmp_path / "siena")["files"]
    assert {name: (e["windows"], e["channels"], e["subject"]) for name, e in files.items()} == {
        f"PN00/PN00-{i}.edf": (2, 29, "PN00") for i in (1, 2)
    }


def test_real_headers_have_the_electrodes(data_dir):

    if not (data_dir / "tuh_layout").is_dir():
        pytest.skip("the TUH layout is not beside this repository")
    catalogue = Tueg().find(data_dir / "tuh_layout" / "tuh")
    assert {source.subject for source in catalogue.sources} == {"aaaaahln", "aaaaapks", "aaaaarnq"}
    counts = Counter()
    for source in catalogue.sources:
        (piece,) = Tueg().read(source)
        counts[len(piece.recording.ch_names)] += 1
    assert set(counts) == {17, 19}  # without and with A1 and A2
    for source in Siena().find(data_dir / "tuh_layout" / "siena").sources:
        (piece,) = Siena().read(source)
        assert len(piece.recording.ch_names) == 29
