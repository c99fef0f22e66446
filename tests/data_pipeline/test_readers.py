"""Every reader on files written here (with known samples) and on real files; every damage with its sentence."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from edfio import Edf, EdfAnnotation, EdfSignal

from data_pipeline.readers import companions, read_recording, why_not_a_recording
from data_pipeline.readers.matlab5 import check_matlab5

RNG = np.random.default_rng(0)


def signal(label, n=512, rate=256, dimension="uV", data=None):
    data = RNG.normal(scale=20, size=n) if data is None else data
    return EdfSignal(data, rate, label=label, physical_dimension=dimension, physical_range=(-500, 500))


def write_edf(path, *signals, annotations=()):
    Edf(signals, annotations=annotations).write(path)
    return path


def test_edf_samples_names_units_and_annotations(tmp_path):
    x = 100 * np.sin(np.linspace(0, 20, 512))
    path = write_edf(
        tmp_path / "sub-07_ses-2_eeg.edf",
        signal("EEG Fp1-REF", data=x),
        signal("ECG", dimension="mV"),
        annotations=[EdfAnnotation(0.5, 1.0, "eyes closed")],
    )
    found = read_recording(path)
    assert found.ch_names == ("EEG Fp1-REF", "ECG")
    assert found.sfreq == 256.0
    np.testing.assert_allclose(found.signal_uv[0], x, atol=1000 / 2**16)  # one step of the 16-bit scale
    assert (found.subject, found.session, found.unit) == ("sub-07", "2", "uV (header)")
    assert [(a.onset, a.duration, a.description) for a in found.annotations] == [(0.5, 1.0, "eyes closed")]


def test_edf_units_are_converted(tmp_path):
    x = RNG.uniform(-400, 400, 512)
    path = write_edf(tmp_path / "a.edf", signal("C3", data=x), signal("C4", data=x, dimension="mV"))
    found = read_recording(path)
    np.testing.assert_allclose(found.signal_uv[1], 1000 * found.signal_uv[0], rtol=1e-9)


def test_edf_channels_at_another_rate_are_dropped_not_interpolated(tmp_path):
    path = write_edf(tmp_path / "a.edf", signal("C3"), signal("C4"), signal("RESP", n=64, rate=32))
    found = read_recording(path)
    assert found.ch_names == ("C3", "C4")
    assert found.sfreq == 256.0
    assert found.dropped == {"RESP": "sampled at 32 Hz, the others at 256 Hz"}
    fast = write_edf(tmp_path / "b.edf", signal("C3"), signal("ECG", n=1024, rate=512))
    assert read_recording(fast).sfreq == 256.0  # the electrode decides, not the fastest channel


def test_edf_repeated_labels(tmp_path):
    x = RNG.uniform(-100, 100, 512)
    same = write_edf(tmp_path / "a.edf", signal("T8-P8", data=x), signal("CZ-PZ"), signal("T8-P8", data=x))
    assert read_recording(same).ch_names == ("T8-P8", "CZ-PZ")
    different = write_edf(tmp_path / "b.edf", signal("T8-P8"), signal("CZ-PZ"), signal("T8-P8"))
    found = read_recording(different)
    assert found.ch_names == ("CZ-PZ",)
    assert len(found.dropped) == 2


def test_edf_damages_each_have_their_sentence(tmp_path):
    whole = write_edf(tmp_path / "a.edf", signal("C3"), signal("C4")).read_bytes()
    damaged = {
        "empty": (b"", "truncated: 0 bytes"),
        "header": (whole[:300], "truncated: the header of 3 signals"),
        "no_record": (whole[:1100], "not one whole data record"),
        "foreign": (b"PNG" + whole[3:], "not an EDF or BDF file"),
        "number": (whole[:252] + b"x   " + whole[256:], "number of signals is 'x'"),
        "text_copy": (whole.decode("utf-8", errors="replace").encode(), "ruined by a text-mode copy"),
    }
    for name, (content, message) in damaged.items():
        (tmp_path / f"{name}.edf").write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_recording(tmp_path / f"{name}.edf")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{name}.edf: ")


def test_edf_cut_short_keeps_the_whole_records_and_says_so(tmp_path):
    path = write_edf(tmp_path / "a.edf", *(signal("C3", n=2560) for _ in range(1)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 1000])
    found = read_recording(path)
    assert found.duration < 10
    assert "cut short" in found.notes[0]


def test_discontinuous_edf_is_refused_and_a_continuous_one_so_called_is_read(tmp_path):
    path = write_edf(tmp_path / "a.edf", signal("C3", n=1280), annotations=[EdfAnnotation(0, None, "start")])
    whole = path.read_bytes().replace(b"EDF+C", b"EDF+D", 1)
    path.write_bytes(whole)
    assert read_recording(path).n_times == 1280
    path.write_bytes(whole.replace(b"+3\x14\x14", b"+9\x14\x14", 1))
    with pytest.raises(ValueError, match="discontinuous"):
        read_recording(path)


def test_fif_positions_types_and_annotation_times(tmp_path):
    import mne

    info = mne.create_info(["site A", "site B", "EOG x"], 200.0, ["eeg", "eeg", "eog"])
    x = RNG.normal(scale=2e-5, size=(3, 400))
    raw = mne.io.RawArray(x, info, first_samp=1000, verbose="ERROR")
    montage = mne.channels.make_dig_montage({"site A": [0.0, 0.1, 0.0], "site B": [0.0, 0.0, 0.1]}, coord_frame="head")
    raw.set_montage(montage)
    raw.set_meas_date(0)
    raw.set_annotations(mne.Annotations([5.5], [0.25], ["go"], orig_time=raw.info["meas_date"]))
    raw.save(tmp_path / "a_raw.fif", fmt="double", verbose="ERROR")
    found = read_recording(tmp_path / "a_raw.fif")
    assert found.ch_names == ("site A", "site B")
    assert found.dropped == {"EOG x": "not EEG (eog)"}
    np.testing.assert_allclose(found.signal_uv, x[:2] * 1e6)
    np.testing.assert_allclose(found.positions, [[0, 0.1, 0], [0, 0, 0.1]], atol=1e-6)
    assert found.annotations[0].onset == pytest.approx(0.5)  # 5.5 s of measurement time, which began at sample 1000


def test_plain_csv_with_time_units_and_labels(tmp_path):
    rows = "".join(f"{i / 100},{i},{2 * i},{'rest' if i < 150 else 'task'}\n" for i in range(300))
    (tmp_path / "a.csv").write_text("time,C3,C4 [mV],label\n" + rows)
    found = read_recording(tmp_path / "a.csv")
    assert (found.ch_names, found.sfreq) == (("C3", "C4"), 100.0)
    np.testing.assert_allclose(found.signal_uv[:, 7], [7, 14000])
    assert [(a.onset, a.duration, a.description) for a in found.annotations] == [
        (0.0, 1.5, "label=rest"),
        (1.5, 1.5, "label=task"),
    ]


@pytest.mark.parametrize(("column", "step"), [("time_ms", 4.0), ("timestamp", 4.0 + 0.0), ("t", 0.004)])
def test_time_columns_in_seconds_and_milliseconds(tmp_path, column, step):
    start = 1.6e12 if column == "timestamp" else 0.0  # a clock in milliseconds since 1970 is told by its size
    rows = "".join(f"{start + i * step:.3f}\t{i}\n" for i in range(100))
    (tmp_path / "a.tsv").write_text(f"{column}\tCz\n{rows}")
    assert read_recording(tmp_path / "a.tsv").sfreq == 250.0


def test_csv_blank_cells_are_missing_samples(tmp_path):
    (tmp_path / "a.csv").write_text("C3;C4\n1;2\n;4\n5;x\n")
    found = read_recording(tmp_path / "a.csv", text_sfreq=250)
    np.testing.assert_array_equal(found.signal_uv, [[1, np.nan, 5], [2, 4, np.nan]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "without a table"),
        ("C3,C4\n1,2\n3,4\n", "--text-sfreq"),
        ("name,age\na,3\nb,4\n", "without columns of EEG channels"),
        ("1,2\n3,4\n5,6\n", "without a header"),
        ("time,C3\n0,1\n1,2\n2,3\n", "log of features"),
        ("time,C3\n0,a\n0.01,b\n0.02,c\n", "no numbers"),
        ("time,C3\n5,1\n5,2\n5,3\n", "does not increase"),
        ("C3,C4\n\x00\x01", "binary"),
    ],
)
def test_text_that_is_no_recording(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_recording(tmp_path / "a.csv")


def test_openbci_log(data_dir):
    found = read_recording(data_dir / "openbci" / "OpenBCI_GUI-v6-blinks-jawClench-alpha.txt")
    assert found.ch_names == tuple(f"EXG Channel {i}" for i in range(8))
    assert (found.sfreq, found.n_times) == (250.0, 22490)
    assert found.signal_uv[0, 0] == 61379.36
    assert found.signal_uv[7, 1] == 2118.70


def test_emotiv_table(data_dir):
    found = read_recording(data_dir / "emotiv_eye_state" / "eeg-eye-state.csv")
    assert found.ch_names[5] == "P7"  # the header says "P"
    assert (found.sfreq, found.signal_uv.shape) == (128.0, (14, 14980))
    assert sum(a.duration for a in found.annotations) == pytest.approx(14980 / 128)
    assert {a.description for a in found.annotations} == {"class=0", "class=1"}


def test_mind_monitor_export_at_a_signal_rate(tmp_path):
    header = "TimeStamp,Delta_TP9,RAW_TP9,RAW_AF7,RAW_AF8,RAW_TP10,AUX_RIGHT,Elements\n"
    rows = [f"2024-01-01 10:00:{i / 256:09.6f},0.1,{800 + i},801,802,803,1,\n" for i in range(512)]
    rows.insert(100, "2024-01-01 10:00:00.390000,,,,,,,/muse/elements/blink\n")
    (tmp_path / "m.csv").write_text(header + "".join(rows))
    found = read_recording(tmp_path / "m.csv")
    assert found.ch_names == ("TP9", "AF7", "AF8", "TP10")
    assert found.n_times == 512
    assert found.sfreq == 256.0
    np.testing.assert_array_equal(found.signal_uv[0, :3], [800, 801, 802])


def test_brainvision_units_agree_across_headers(data_dir):
    folder = data_dir / "mne_test_files"
    plain, mixed = read_recording(folder / "test.vhdr"), read_recording(folder / "test_units.vhdr")
    assert plain.ch_names == mixed.ch_names
    np.testing.assert_allclose(plain.signal_uv, mixed.signal_uv, rtol=1e-9)
    assert set(plain.dropped) == {"CP5", "CP6", "HL", "HR", "Vb", "ReRef"}  # their units are no voltages
    assert "nV" in mixed.unit


def test_eeglab_positions_are_in_the_head_frame(data_dir):
    found = read_recording(data_dir / "eeglab" / "eeglab_data.set")
    assert found.positions is not None
    radius = np.linalg.norm(found.positions[np.isfinite(found.positions).all(axis=1)], axis=1)
    assert (radius > 0.04).all()
    assert (radius < 0.2).all()


def test_files_that_are_no_recordings_are_told_what_they_are(tmp_path):
    for name, words in {
        "x.vmrk": "belong to a .vhdr",
        "x.fdt": "belong to a .set",
        "x.locs": "positions",
        "x.json": "not a format",
    }.items():
        (tmp_path / name).write_text("something")
        assert words in why_not_a_recording(tmp_path / name)


@pytest.mark.parametrize("suffix", [".fif", ".set", ".vhdr", ".bdf"])
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 20])
def test_rubbish_with_a_known_suffix_is_one_sentence(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^x\.[a-z]+: (damaged|truncated|not an EDF)") as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (slice(252, 256), b"-1  ", "number of signals is '-1'"),
        (slice(252, 256), b"inf ", "number of signals is 'inf', not a number"),
        (slice(244, 252), b"nan     ", "record duration is 'nan', not a number"),
        (slice(244, 252), b"0       ", "record of zero length"),
    ],
)
def test_edf_numbers_that_cannot_be_are_refused(tmp_path, field, value, message):
    content = bytearray(write_edf(tmp_path / "a.edf", signal("C3")).read_bytes())
    content[field] = value
    (tmp_path / "a.edf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_recording(tmp_path / "a.edf")


def test_edf_labels_that_were_wiped_out_are_no_repeated_ones(tmp_path):
    path = write_edf(tmp_path / "a.edf", signal("C3"), signal("C4"), signal("CZ"))
    content = bytearray(path.read_bytes())
    content[256 + 16 : 256 + 48] = bytes(32)
    path.write_bytes(content)
    assert read_recording(path).ch_names[0] == "C3"


@pytest.mark.parametrize("damaged", ["a_raw.fif", "a_raw-1.fif"])
def test_fif_tags_in_a_circle_are_one_sentence(tmp_path, damaged):
    import mne

    raw = mne.io.RawArray(np.zeros((1, 300_000)), mne.create_info(["C3"], 100.0, "eeg"), verbose="ERROR")
    raw.save(tmp_path / "a_raw.fif", fmt="double", split_size="2MB", verbose="ERROR")
    content = bytearray((tmp_path / damaged).read_bytes())
    third = 36 + 16 + int.from_bytes(content[44:48], "big")  # the second, the place of a directory, begins at byte 36
    content[third + 12 : third + 16] = (36).to_bytes(4, "big")  # behind the third comes the second
    (tmp_path / damaged).write_bytes(content)
    with pytest.raises(ValueError, match=r"^a_raw\.fif: damaged: the tags of " + damaged.replace(".", r"\.")):
        read_recording(tmp_path / "a_raw.fif")


def test_fif_channels_of_no_kind_are_one_sentence(tmp_path):
    import mne

    raw = mne.io.RawArray(np.zeros((2, 500)), mne.create_info(["C3", "C4"], 250.0, "eeg"), verbose="ERROR")
    raw.save(tmp_path / "a_raw.fif", verbose="ERROR")
    content = (tmp_path / "a_raw.fif").read_bytes()
    at = content.index(b"\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x02")  # first channel: numbers 1, 1, kind EEG
    (tmp_path / "a_raw.fif").write_bytes(content[: at + 8] + b"\xff" * 4 + content[at + 12 :])
    with pytest.raises(ValueError, match=r"^a_raw\.fif: damaged"):
        read_recording(tmp_path / "a_raw.fif")


def write_set(path, **changes):
    """An EEGLAB file of two channels, uncompressed."""
    about = {"setname": "a", "nbchan": 2.0, "trials": 1.0, "pnts": 500.0, "srate": 250.0, "xmin": 0.0, "xmax": 1.996}
    names = np.array([("Cz",), ("Pz",)], dtype=[("labels", object)])
    data = RNG.normal(scale=20, size=(2, 500)).astype(np.float32)
    about |= {"data": data, "chanlocs": names, "event": [], "icawinv": []}
    scipy.io.savemat(path, {"EEG": about | changes})
    return path


def test_eeglab_is_read_and_its_damages_are_found_before_they_crash_the_reader(tmp_path):
    whole = write_set(tmp_path / "a.set").read_bytes()
    assert read_recording(tmp_path / "a.set").ch_names == ("Cz", "Pz")
    place = whole.index(b"Cz\0\0")
    for damaged in (
        whole[:-100],
        whole[: place - 60] + bytes(64) + whole[place + 4 :],
        whole[:144] + b"\0" + whole[145:],
    ):
        (tmp_path / "b.set").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^b\.set: damaged MATLAB file: .*(cut short|unknown|without|no matrix)"):
            read_recording(tmp_path / "b.set")


def test_every_kind_of_matlab_variable_passes_the_check(tmp_path):
    cells = np.empty((2, 2), dtype=object)
    cells[:] = [[np.zeros((0, 0)), "text"], [np.arange(3.0) + 1j, scipy.sparse.eye_array(3).tocsc()]]
    nested = {"a": cells, "b": {"c": np.uint8([[1, 2]]), "d": np.array([[True]])}, "e": np.zeros((2, 3, 4), np.int16)}
    for compressed in (False, True):
        scipy.io.savemat(tmp_path / "x.mat", {"s": nested, "t": "", "u": 1.5}, do_compression=compressed)
        check_matlab5(tmp_path / "x.mat")
    whole = (tmp_path / "x.mat").read_bytes()
    (tmp_path / "x.mat").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cut short"):
        check_matlab5(tmp_path / "x.mat")


def test_a_matlab_text_whose_letters_are_its_name_is_refused(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"s": {"label": "trials"}})
    whole = bytearray((tmp_path / "x.mat").read_bytes())
    letters = whole.index(b"trials") - 8  # the tag of the letters; before it the name, which is empty
    whole[letters - 4 : letters] = (16).to_bytes(4, "little")
    (tmp_path / "x.mat").write_bytes(whole)
    with pytest.raises(ValueError, match="an element lacks"):
        check_matlab5(tmp_path / "x.mat")


def test_errors_of_mne_do_not_say_where_the_file_lies(tmp_path):
    for name, folder in {"a": tmp_path / "one", "b": tmp_path / "two" / "three"}.items():
        folder.mkdir(parents=True)
        (folder / "x_raw.fif").write_bytes(b"\0" * 100)
        with pytest.raises(ValueError, match="damaged") as caught:
            read_recording(folder / "x_raw.fif")
        assert str(tmp_path) not in str(caught.value), name


def test_text_with_a_rate_or_a_cell_that_cannot_be(tmp_path):
    rows = "".join(f"{i},1,2\n" for i in range(40))
    (tmp_path / "a.txt").write_text("%Sample Rate = 0 Hz\nIndex, EXG Channel 0, EXG Channel 1\n" + rows)
    with pytest.raises(ValueError, match="its rows come at 0 Hz"):
        read_recording(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("C3,C4\n1,2\n3," + "4" * 200_000 + "\n5,6\n")
    with pytest.raises(ValueError, match=r"a\.txt: a damaged table"):
        read_recording(tmp_path / "a.txt", text_sfreq=100)


def test_names_in_a_header_that_no_file_can_have_are_no_companions(tmp_path):
    names = ["a.eeg", "x" * 400, "a\0b", "sub/b.eeg"]
    (tmp_path / "a.vhdr").write_text("".join(f"DataFile={name}\n" for name in names))
    (tmp_path / "a.eeg").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.eeg").write_bytes(b"")
    assert companions(tmp_path / "a.vhdr") == [tmp_path / "a.eeg", tmp_path / "sub" / "b.eeg"]
