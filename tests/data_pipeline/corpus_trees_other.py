"""Small corpora in the original layouts of SEED-V, APAVA, TDBrain, Mumtaz2016, MODMA, MoBI, EEGMAT and BIDS-EEG.

Written from the published descriptions, with the faults that real ones have; nothing here imports the code under test.
Every writer fills a folder; what it wrote is returned where tests compare values.
"""

import json
import struct
from pathlib import Path

import h5py
import mne
import numpy as np
import scipy.io
from corpus_trees import write_edf

_SEED_V = """
FP1 FPZ FP2 AF3 AF4 F7 F5 F3 F1 FZ F2 F4 F6 F8 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 T7 C5 C3 C1 CZ C2 C4 C6 T8 TP7 CP5
CP3 CP1 CPZ CP2 CP4 CP6 TP8 P7 P5 P3 P1 PZ P2 P4 P6 P8 PO7 PO5 PO3 POZ PO4 PO6 PO8 CB1 O1 OZ O2 CB2
"""
SEED_V_62 = tuple(_SEED_V.split())
SEED_V_66 = (*SEED_V_62[:40], "M1", "M2", *SEED_V_62[40:], "VEO", "HEO")


def noise(rng, channels, samples, scale=20.0):
    return scale * rng.normal(size=(channels, samples))


# --- SEED-V -----------------------------------------------------------------------------------------------------------


def write_cnt(path: Path, ch_names, counts, *, sfreq=1000, uv_per_count=0.1, samples_in_header=None) -> Path:
    """Neuroscan CNT (SETUP 900 bytes, ELECTLOC 75 each, multiplexed integers, empty event table); int16 or int32."""
    head = bytearray(900)
    head[:20] = b"Version 3.0".ljust(20, b"\0")
    head[225:235], head[235:247] = b"08/04/18\0\0", b"12:00:00\0\0\0\0"
    struct.pack_into("<H", head, 370, len(ch_names))
    struct.pack_into("<H", head, 376, sfreq)
    struct.pack_into("<i", head, 864, counts.shape[1] if samples_in_header is None else samples_in_header)
    struct.pack_into("<i", head, 886, 900 + 75 * len(ch_names) + counts.nbytes)
    channels = bytearray()
    for i, name in enumerate(ch_names):
        channel = bytearray(75)
        channel[: len(name)] = name.encode()
        struct.pack_into("<ff", channel, 19, np.cos(i / 10), np.sin(i / 10))
        struct.pack_into("<f", channel, 59, 204.8 * uv_per_count)
        struct.pack_into("<f", channel, 71, 1.0)
        channels += channel
    events = struct.pack("<Bll", 1, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(head) + bytes(channels) + np.ascontiguousarray(counts.T).tobytes() + events)
    return path


def write_fif(path: Path, ch_names, signal_uv, *, sfreq=1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(signal_uv * 1e-6, mne.create_info(list(ch_names), sfreq, "eeg"), verbose="ERROR")
    raw.save(path, fmt="double", overwrite=True, verbose="ERROR")
    return path


def seed_v_tree(root: Path, *, seconds=24) -> np.ndarray:
    """A session in CNT of 32 bits with a wrong count in its header, a conversion of the same, and a file of another
    name. Returns (62, n) microvolts.
    """
    rng = np.random.default_rng(0)
    counts = np.round(noise(rng, 66, seconds * 1000) * 10).astype("<i4")
    write_cnt(root / "EEG_raw/1_1_20180804.cnt", SEED_V_66, counts, samples_in_header=-732)
    write_fif(root / "EEG_raw/converted/1_1_20180804_raw.fif", SEED_V_66[:3], counts[:3, :1000] * 0.1)
    (root / "EEG_raw/readme_raw.fif").write_bytes(b"no")
    return counts[[SEED_V_66.index(name) for name in SEED_V_62]] * 0.1


# --- APAVA ------------------------------------------------------------------------------------------------------------

_APAVA_FILE = "Fp1 Fp2 F7 F3 F4 F8 T3 C3 C4 T4 T5 P3 P4 T6 O1 O2"
APAVA_FILE_ORDER = tuple(_APAVA_FILE.split())


def _cells(values, shape):
    cells = np.empty(len(values), dtype=object)
    cells[:] = values
    return cells.reshape(shape)


def apava_tree(root: Path) -> dict:
    """Subjects 16, 1, 3 and 2, written in that order, with 1, 3, 1 and 1 trials; a stranger, a damaged file, and one
    whose structure has another name. Returns subject -> list of (16, 1280).
    """
    rng = np.random.default_rng(1)
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for subject, trials in ((16, 1), (1, 3), (3, 1), (2, 1)):
        signals = [noise(rng, 16, 1280) for _ in range(trials)]
        data = {
            "hdr": {"Fs": 256.0},
            "label": _cells(APAVA_FILE_ORDER, (16, 1)),
            "trial": _cells(signals, (1, trials)),
            "fsample": 256.0,
            "time": _cells([np.arange(1280) / 256.0] * trials, (1, trials)),
        }
        scipy.io.savemat(root / f"preproctrials{subject:02d}.mat", {"data": data})
        written[subject] = signals
    scipy.io.savemat(root / "preproctrials24.mat", {"data": 1.0})
    scipy.io.savemat(root / "preproctrials04.mat", {"signal": np.zeros((16, 1280))})
    (root / "preproctrials05.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut short")
    return written


# --- TDBrain ----------------------------------------------------------------------------------------------------------

_TDBRAIN_EEG = "Fp1 Fp2 F7 F3 Fz F4 F8 FC3 FCz FC4 T7 C3 Cz C4 T8 CP3 CPz CP4 P7 P3 Pz P4 P8 O1 Oz O2"
TDBRAIN_26 = tuple(_TDBRAIN_EEG.split())
_TDBRAIN_OTHER = "VPVA VNVB HPHL HNHR Erbs OrbOcc Mass"
TDBRAIN_TSV = "TDBRAIN_participants_V2.tsv"


def tdbrain_tree(root: Path, *, seconds=1.5) -> dict:
    """25 subjects with Parkinson's disease, 47 healthy ones, and rows of everything that can be wrong; files of few.

    Returns subject -> (pseudo-id, (26, n) microvolts) of the files there are.
    """
    rng = np.random.default_rng(2)
    root.mkdir(parents=True, exist_ok=True)
    rows = ["participants_ID\tDISC/REP\tindication\tformal_status\tsessID\tEC\tEO\tage\tgender"]
    spellings = ("PARKINSON", " PARKINSON ", "parkinson", "Parkinson ")
    for k in range(25):
        name = f"sub-1{k:03d}"
        rows.append(f"{name}\tDISC\t{spellings[k % 4]}\tPARKINSON\t1\t{('1', '1.0', '1,0')[k % 3]}\t1\t6{k % 10},5\t1")
        rows.append(f"{name}\tDISC\tPARKINSON\tPARKINSON\t2\t1\t1\t65\t1")  # a second session
    rows.append("sub-9000\tDISC\tPARKINSON\tUNKNOWN\t1\t0\t1\t70,1\t0")  # no eyes closed
    rows.append("sub-9001\tREP\tREPLICATION\tREPLICATION\t1\tREPLICATION\tREPLICATION\t\t")
    rows.append("sub-9002\tDISC\t\t\t1\t1\t1\t30,0\t1")
    rows.append("sub-9003\tDISC\tHEALTHY")  # cut short
    rows += [f"sub-2{k:03d}\tDISC\thealthy\tHEALTHY\t1\t1.0\t1.0\t3{k % 10},25\t0" for k in range(46)]
    rows.append("2046\tDISC\tHEALTHY\tHEALTHY\t1\t1\t1\t31\t0")  # an id without sub-
    (root / TDBRAIN_TSV).write_bytes(("\r\n".join(rows) + "\r\n\r\n").encode("utf-8-sig"))
    written = {}
    present = {
        1: "1000",
        17: "1016",
        18: "1017",
        22: "1021",
        26: "2000",
        29: "2003",
        46: "2020",
        50: "2024",
        72: "2046",
    }
    for pseudo_id, digits in present.items():
        signal = np.round(noise(rng, 26, round(500 * seconds)), 3)
        order = rng.permutation(26)
        columns = [*(TDBRAIN_26[i] for i in order), *_TDBRAIN_OTHER.split()]
        table = np.vstack([signal[order], noise(rng, 7, signal.shape[1])])
        path = root / f"derivatives/sub-{digits}/ses-1/eeg/sub-{digits}_ses-1_task-restEC_eeg.csv"
        path.parent.mkdir(parents=True)
        np.savetxt(path, table.T, fmt="%.3f", delimiter=",", header=",".join(columns), comments="")
        written[f"sub-{digits}"] = (pseudo_id, signal)
    path = root / "derivatives/sub-1001/ses-1/eeg/sub-1001_ses-1_task-restEC_eeg.csv"
    path.parent.mkdir(parents=True)
    path.write_text("Fp1,Fp2\n1,2\n3,4\n")
    return written


# --- Mumtaz2016 -------------------------------------------------------------------------------------------------------

_MUMTAZ = "Fp1 F3 C3 P3 O1 F7 T3 T5 Fz Fp2 F4 C4 P4 O2 F8 T4 T6 Cz Pz"


def mumtaz_tree(root: Path) -> Path:
    """Names of every kind; the last pair of extra channels in some files only; a file without T6."""
    names = _MUMTAZ.split()
    labels = [f"EEG {name}-LE" for name in names[5:] + names[:5]]
    extras = ["EEG A2-A1", "EEG 23A-23R"]
    for i, name in enumerate(
        ["H S1 EC", "H S2 EO", "h s10 ec", "MDD S11  EC", "MDD S2 EC", "6921143_H S15 EO", "6921959_H S15 EO"]
    ):
        more = [*extras, "EEG 24A-24R"] if i % 2 else extras
        write_edf(root / f"{name}.edf", labels + more, sfreq=256, seconds=6, seed=i)
    write_edf(root / "H S2 TASK.edf", labels, sfreq=256, seconds=6)
    write_edf(root / "notes.edf", labels, sfreq=256, seconds=6)
    write_edf(root / "MDD S3 EC.edf", [label for label in labels if "T6" not in label], sfreq=256, seconds=6)
    return root


# --- MODMA ------------------------------------------------------------------------------------------------------------


def modma_tree(root: Path) -> dict:
    """Version 5 with other variables first, version 7.3, names of a stranger, a file with two such matrices, and one
    of 128 rows. Returns subject -> (129, n).
    """
    rng = np.random.default_rng(3)
    root.mkdir(parents=True, exist_ok=True)
    written = {s: noise(rng, 129, 1400) for s in ("02010002", "02020008", "02030020", "02010033", "02010034")}
    for signal in written.values():
        signal[128] = 0.0
    first = {"rest_Impedances_0": np.ones((129, 1)), "samplingRate": 250.0, "EEG_mat_info": "resting"}
    scipy.io.savemat(
        root / "02010002rest 20150416 1017..mat", first | {"a02010002rest_20150416_1017mat": written["02010002"]}
    )
    scipy.io.savemat(
        root / "02020008_rest 20150701 1000.mat", {"DIN_1": np.ones((4, 3)), "a02020008mat": written["02020008"]}
    )
    with h5py.File(root / "02030020rest 20151230 1416.mat", "w", userblock_size=512) as file:
        file["Impedances_0"] = np.ones((1, 129))
        file["a02030020rest_20151230_1416mat"] = written["02030020"].T  # columns first, as MATLAB stores it
    with (root / "02030020rest 20151230 1416.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: PCWIN64".ljust(124) + b"\x00\x02IM")
    scipy.io.savemat(root / "02010033rest.mat", {"a": written["02010033"], "b": written["02010033"]})
    scipy.io.savemat(root / "02010034rest.mat", {"a": written["02010034"][:128]})
    scipy.io.savemat(root / "02990001rest.mat", {"a": written["02010033"]})
    (root / "subjects_information_EEG_128channels_resting_lanzhou_2015.xlsx").write_bytes(b"PK")
    return written


# --- MoBI -------------------------------------------------------------------------------------------------------------

MOBI_PERIODS = (997, 991)  # rows of signal and of angles repeat, so that long files are quickly written and checked


def mobi_tree(root: Path, *, minutes=(25, 20)) -> tuple[np.ndarray, np.ndarray]:
    """One session per length, a session without angles. Returns the repeated rows: (997, 64) and (991, 12)."""
    rng = np.random.default_rng(4)
    signal, angles = (rng.integers(-90, 91, size=(period, k)) for period, k in zip(MOBI_PERIODS, (64, 12), strict=True))
    lines = [["\t".join(map(str, row)) for row in table.tolist()] for table in (signal, angles)]
    for i, length in enumerate(minutes):
        folder = root / f"SL01-T{i + 1:02d}"
        folder.mkdir(parents=True)
        n = length * 60 * 100
        for name, rows, header in (("eeg", lines[0], "Time\tchannels\n"), ("joints", lines[1], "a\tb\nTime\tGHR\n")):
            body = "\n".join(f"{t / 100:.2f}\t{rows[t % len(rows)]}" for t in range(n))
            (folder / f"{name}.txt").write_text(header + body + "\n")
        (folder / "conductor.txt").write_text("Time\tevent\n")
    (root / "SL01-T01" / "impedances-before.txt").write_text("Channel\tkOhm\nFp2\t5\nFp1\t7\n")
    spare = root / "SL02-T01"
    spare.mkdir()
    (spare / "eeg.txt").write_text("Time\tchannels\n" + "0.00\t" + lines[0][0] + "\n")
    return signal, angles


# --- EEGMAT -----------------------------------------------------------------------------------------------------------

_EEGMAT = "Fp1 Fp2 F3 F4 F7 F8 T3 T4 C3 C4 T5 T6 P3 P4 O1 O2 Fz Cz Pz"


def eegmat_tree(root: Path) -> Path:
    """Four subjects, two recordings each; a copy of one in a folder; a table without the last subject."""
    labels = [*(f"EEG {name}" for name in _EEGMAT.split()), "EEG A2-A1", "ECG ECG"]
    for subject in range(4):
        for condition in (1, 2):
            name = f"Subject{subject:02d}_{condition}.edf"
            write_edf(root / name, labels, sfreq=500, seconds=6, seed=2 * subject + condition)
    write_edf(root / "full_length" / "Subject00_1.edf", labels, sfreq=500, seconds=6)
    rows = [f"Subject{s:02d},{17 + s},F,2011,{10.5 + s},{s % 2}" for s in range(3)]
    header = "Subject,Age,Gender,Recording year,Number of subtractions,Count quality"
    (root / "subject-info.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


# --- BIDS -------------------------------------------------------------------------------------------------------------


def bids_tree(root: Path) -> Path:
    """Six subjects of two groups and one of none: EDF, and FIF with names of its own at measured positions; inherited
    and own sidecars; events; a second part of a divided recording; derivatives.
    """
    labels = ["Fp1", "Cz", "O1", "O2", "HEOG"]
    for s in range(1, 6):
        eeg = root / f"sub-{s:02d}" / "ses-1" / "eeg"
        write_edf(eeg / f"sub-{s:02d}_ses-1_task-rest_run-1_eeg.edf", labels, sfreq=256, seconds=11, seed=s)
    first, second = (root / f"sub-{s:02d}" / "ses-1" / "eeg" for s in (1, 2))
    write_edf(first / "sub-01_ses-1_task-count_eeg.edf", labels, sfreq=256, seconds=11, seed=11)
    (root / "task-rest_channels.tsv").write_text(
        "name\ttype\tunits\tstatus\nFp1\tEEG\tuV\tgood\nCz\tEEG\tuV\tgood\nO1\tEEG\tuV\tgood\nHEOG\tEOG\tuV\tn/a\n"
    )
    (second / "sub-02_ses-1_task-rest_run-1_channels.tsv").write_text(
        "name\ttype\tunits\tstatus\nFp1\tEEG\tuV\tgood\nCz\tEEG\tuV\tbad\nO1\tMISC\tuV\tn/a\nO2\tEEG\tuV\tgood\n"
        "HEOG\tHEOG\tuV\tgood\n"
    )
    (second / "sub-02_ses-1_task-rest_run-1_events.tsv").write_text(
        "onset\tduration\ttrial_type\tvalue\n0.5\t5\topen\t1\n5.6\tn/a\tclosed\t2\nn/a\tn/a\topen\t1\n6.0\t1\tblink\t3\n"
    )
    (root / "task-rest_eeg.json").write_text(json.dumps({"TaskName": "rest", "PowerLineFrequency": 60}))
    write_edf(root / "sub-05/ses-1/eeg/sub-05_ses-1_task-rest_run-2_split-02_eeg.edf", labels, sfreq=256)
    write_edf(root / "derivatives/clean/sub-01/eeg/sub-01_task-rest_eeg.edf", labels, sfreq=256)
    own = root / "sub-06" / "eeg"
    rng = np.random.default_rng(9)
    write_fif(own / "sub-06_task-rest_eeg.fif", ["X1", "X2", "X3"], noise(rng, 3, 11 * 256), sfreq=256)
    (own / "sub-06_space-Other_electrodes.tsv").write_text(
        "name\tx\ty\tz\nX1\t0\t110\t10\nX2\t60\t10\t60\nX3\tn/a\tn/a\tn/a\n"
    )
    landmarks = {"NAS": [0, 110, 10], "LPA": [-80, 10, 10], "RPA": [80, 10, 10]}
    about = {"EEGCoordinateSystem": "Other", "EEGCoordinateUnits": "mm"}
    about |= {"AnatomicalLandmarkCoordinates": landmarks, "AnatomicalLandmarkCoordinateUnits": "mm"}
    (own / "sub-06_space-Other_coordsystem.json").write_text(json.dumps(about))
    groups = ["patient", "control", "patient", "control", "n/a", "control"]
    rows = [f"sub-{s:02d}\t{20 + s}\t{group}" for s, group in enumerate(groups, 1)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tage\tgroup", *rows]) + "\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "made up", "BIDSVersion": "1.10.0"}))
    return root
