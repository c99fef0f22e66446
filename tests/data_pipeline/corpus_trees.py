"""Synthetic corpora in their original layouts, with the faults that real ones have.

Written from the published descriptions of the corpora with edfio and text only: nothing here imports the code under
test. Every function takes a folder to fill and returns it.
"""

from pathlib import Path

import numpy as np
from edfio import Edf, EdfSignal

_SITES = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 A1 A2 FZ CZ PZ"
TUH_21 = tuple(_SITES.split())
TUH_EXTRAS = ("EEG EKG1-REF", "PHOTIC-REF", "IBI", "BURSTS", "SUPPR", "EEG 26-REF", "EEG LOC-REF")


def write_edf(path: Path, labels, *, sfreq=250, seconds=12, seed=0, scale=20.0) -> Path:
    """Noise of `scale` microvolts, another in every channel."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = [
        EdfSignal(
            np.clip(scale * rng.normal(size=round(seconds * sfreq)), -9 * scale, 9 * scale),
            sfreq,
            label=label,
            physical_dimension="uV",
            physical_range=(-10 * scale, 10 * scale),
        )
        for label in labels
    ]
    Edf(signals, data_record_duration=1.0 if float(seconds).is_integer() else seconds).write(path)
    return path


def tuh_labels(reference="REF", *, without=(), extras=TUH_EXTRAS):
    """EDF labels of a TUH recording, shuffled as files are, with channels that are no electrodes."""
    names = [name for name in TUH_21 if name not in without]
    names = names[3:] + names[:3]
    return [f"EEG {name}-{reference}" for name in names] + list(extras)


def tuab_tree(root: Path) -> Path:
    """TUAB v3 with: a subject in both classes, one in train and eval, a file that is too short, one without T6, one
    damaged, one of another name, and one outside the folders. 12 s are 2 windows.
    """
    train, evaluation = root / "edf" / "train", root / "edf" / "eval"
    for i in range(4):
        write_edf(train / "normal" / "01_tcp_ar" / f"aaaaaaa{i}_s001_t000.edf", tuh_labels(), seed=i)
        write_edf(train / "abnormal" / "01_tcp_ar" / f"aaaaabb{i}_s001_t000.edf", tuh_labels(), seed=10 + i)
    write_edf(train / "normal" / "01_tcp_ar" / "aaaaabb0_s002_t000.edf", tuh_labels(), seed=20)  # in both classes
    write_edf(train / "normal" / "01_tcp_ar" / "aaaaaezz_s001_t000.edf", tuh_labels(), seed=21)  # also in eval
    write_edf(train / "normal" / "01_tcp_ar" / "aaaaaaa0_s003_t000.edf", tuh_labels(), seconds=4)
    write_edf(train / "normal" / "01_tcp_ar" / "aaaaaaa1_s002_t000.edf", tuh_labels(without=("T6",)))
    (train / "normal" / "01_tcp_ar" / "aaaaaaa2_s009_t000.edf").write_bytes(b"0       " + b"x" * 300)
    write_edf(train / "normal" / "01_tcp_ar" / "notes.edf", tuh_labels())
    write_edf(root / "edf" / "spare" / "aaaaaaa3_s001_t001.edf", tuh_labels())
    write_edf(evaluation / "normal" / "01_tcp_ar" / "aaaaaezz_s002_t000.edf", tuh_labels("LE"), seed=31, sfreq=256)
    write_edf(evaluation / "abnormal" / "01_tcp_ar" / "aaaaaeyy_s001_t001.edf", tuh_labels(), seed=32, sfreq=400)
    (root / "AAREADME.txt").write_text("TUAB\n")
    (train / "normal" / "01_tcp_ar" / "._aaaaaaa0_s001_t000.edf").write_bytes(b"of a file system")
    return root


TUAR_HEADER = """# version = csv_v1.0.0
# bname = {stem}
# duration = {seconds:.2f} secs
# montage_file = $NEDC_NFC/lib/nedc_eas_default_montage.txt
#
"""
# One row or a few per window of 5 s; what they must become is written out in the tests.
TUAR_ROWS = """channel,start_time,stop_time,label,confidence
FP1-F7,0.0000,1.5000,musc,1.0000
FP1-F7,5.0000,6.4961,musc,1.0000
F7-T3,10.0000,11.0000,eyem,1.0000
T3-T5,10.5000,11.5000,eyem,1.0000
C3-CZ,15.0000,18.0000,elec,1.0000
C3-CZ,16.0000,20.0000,chew,1.0000
EKG1,20.0000,25.0000,musc,1.0000
FP1-F3,25.0000,30.0000,blah,1.0000
FP2-F8,30.0000,35.0000,FNSZ,1.0000
P4-O2,35.0000,40.0000,eyem_musc,1.0000
C4-P4,40.0000,45.0000,chew_shiv,1.0000
T4-T6,45.0000,50.0000,musc,1.0000
T4-T6,45.0000,49.0000,bckg,1.0000
F3-C3,50.0000,55.0000,elpp,1.0000
A1-T3,58.0000,90.0000,shiv,1.0000
A1-T3,70.0000,80.0000,musc,1.0000

C3-P3,3.0000,2.0000,musc,1.0000
"""
TUAR_LBL = """version = lbl_v1.0.0

montage =  0, FP1-F7: EEG FP1-LE -- EEG F7-LE
montage =  1, F7-T3: EEG F7-LE -- EEG T3-LE

number_of_levels = 1
level[0] = 3
symbols[0] = {0: 'bckg', 1: 'musc', 2: 'eyem'}

label = {0, 0, 0.0000, 2.0000, 1, [0.0, 0.1, 0.9]}
label = {0, 0, 5.0000, 10.0000, 0, [0.2, 0.7, 0.1]}
"""


def write_csv(recording: Path, rows: str, suffix=".csv", seconds=60.0) -> Path:
    path = recording.with_suffix(suffix)
    path.write_text(TUAR_HEADER.format(stem=recording.stem, seconds=seconds) + rows)
    return path


def tuar_tree(root: Path) -> Path:
    """TUAR: one recording of a minute with every kind of row, one without csv, one with a version 1 `.lbl`, a subject
    with two files, one damaged csv, and a recording of the folder without ears (with a seizure file).
    """
    ar, le = root / "edf" / "01_tcp_ar", root / "edf" / "02_tcp_le"
    write_csv(write_edf(ar / "aaaaaaaa_s001_t000.edf", tuh_labels(), seconds=60, seed=1), TUAR_ROWS)
    write_csv(
        write_edf(ar / "aaaaaaaa_s002_t000.edf", tuh_labels(), seed=2),
        "channel,start_time,stop_time,label,confidence\n",
    )
    write_edf(ar / "aaaaaaab_s001_t000.edf", tuh_labels(), seed=3)
    write_edf(le / "aaaaaaac_s001_t000.edf", tuh_labels("LE"), seed=4).with_suffix(".lbl").write_text(TUAR_LBL)
    bad = write_edf(le / "aaaaaaad_s001_t000.edf", tuh_labels("LE"), seed=5)
    write_csv(bad, "channel,start_time,stop_time,label,confidence\nFP1-F7,zero,1.0,musc,1.0\n")
    spare = write_edf(root / "edf" / "03_tcp_ar_a" / "aaaaaaae_s001_t000.edf", tuh_labels(without=("A1", "A2")))
    write_csv(spare.with_name(f"{spare.stem}_seiz.edf"), TUAR_ROWS)
    return root


TUSL_ROWS = """channel,start_time,stop_time,label,confidence
TERM,0.0000,10.0000,bckg,1.0000
TERM,12.5000,22.5000,slow,1.0000
FP1-F7,10.0000,12.5000,seiz,1.0000
TERM,20.0000,30.0000,seiz,1.0000
TERM,27.0000,28.0000,odd,1.0000
"""  # windows: bckg bckg, a tie of seiz and slow, slow, seiz (the later row), seiz


def tusl_tree(root: Path) -> Path:
    """TUSL: csv, tse_agg and no annotations; a prefixed stem; a session with two montage folders, one without ears."""
    session = root / "edf" / "aaaaaaaa" / "s001_2010"
    ar = session / "01_tcp_ar"
    write_csv(write_edf(ar / "aaaaaaaa_s001_t000.edf", tuh_labels(), seconds=30, seed=1), TUSL_ROWS)
    spare = write_edf(session / "03_tcp_ar_a" / "aaaaaaaa_s001_t001.edf", tuh_labels(without=("A1", "A2")), seed=2)
    write_csv(spare, TUSL_ROWS)
    second = root / "edf" / "aaaaaaab" / "s002_2011" / "02_tcp_le"
    old = write_edf(second / "x01_aaaaaaab_s002_t003.edf", tuh_labels("LE"), seconds=15, seed=3)
    old.with_suffix(".tse_agg").write_text(
        "version = tse_v1.0.0\n\n0.0000 4.0000 slow 1.0000\n4.0000 15.0000 bckg 1.0000\n"
    )
    write_edf(second / "x01_aaaaaaab_s002_t004.edf", tuh_labels("LE"), seed=4)
    third = root / "edf" / "aaaaaaac" / "s001_2012" / "01_tcp_ar"
    write_csv(write_edf(third / "aaaaaaac_s001_t000.edf", tuh_labels(), seed=5), TUSL_ROWS)
    return root


def tueg_tree(root: Path) -> Path:
    """TUEG v2 and v1 paths; all four montages; 250, 256, 512 and 150 Hz; without T6; too short; a subject of TUAB."""
    edf = root / "v2.0.1" / "edf"
    write_edf(edf / "000/aaaaaaaa/s001_2015_12_30/01_tcp_ar/aaaaaaaa_s001_t000.edf", tuh_labels(), seed=1)
    two = edf / "000/aaaaaaab/s001_2003/02_tcp_le/aaaaaaab_s001_t000.edf"
    write_edf(two, tuh_labels("LE", extras=("EEG T1-LE", "EEG T2-LE", "DC1-DC")), seed=2, sfreq=256)
    three = edf / "001/aaaaaaac/s002_2009/03_tcp_ar_a/aaaaaaac_s002_t001.edf"
    write_edf(three, tuh_labels(without=("A1", "A2", "FZ", "PZ")), seed=3, sfreq=512)
    four = edf / "001/aaaaaaad/s001_2009/04_tcp_le_a/aaaaaaad_s001_t000.edf"
    write_edf(four, tuh_labels("LE", without=("A1", "A2")), seed=4)
    old = root / "v1.0.0/edf/01_tcp_ar/002/00000254/s005_2010_11_15/00000254_s005_t000.edf"
    write_edf(old, tuh_labels(), seed=5)
    write_edf(edf / "002/aaaaaaae/s001_2010/01_tcp_ar/aaaaaaae_s001_t000.edf", tuh_labels(without=("T6",)))
    write_edf(edf / "002/aaaaaaae/s001_2010/01_tcp_ar/aaaaaaae_s001_t001.edf", tuh_labels(), sfreq=150)
    write_edf(edf / "002/aaaaaaae/s001_2010/01_tcp_ar/aaaaaaae_s001_t002.edf", tuh_labels(), seconds=4)
    write_edf(edf / "003/aaaaabb0/s001_2010/01_tcp_ar/aaaaabb0_s001_t000.edf", tuh_labels())  # in TUAB
    write_edf(edf / "004/aaaaaaaf/s001_2010/aaaaaaaf_s001_t000.edf", tuh_labels())
    return root


SIENA_29 = (
    "Fp1 F3 C3 P3 O1 F7 T3 T5 Fc1 Fc5 Cp1 Cp5 F9 Fz Cz Pz Fp2 F4 C4 P4 O2 F8 T4 T6 Fc2 Fc6 Cp2 Cp6 F10"  # file order
)


def siena_tree(root: Path) -> Path:
    """Siena: names in several cases, channels that are no EEG, a recording without F10, a file of another name."""
    labels = [f"EEG {name}" for name in SIENA_29.split()]
    extras = ["EKG EKG", "SPO2", "HR", "1", "2", "MK"]
    write_edf(root / "PN00" / "PN00-1.edf", labels + extras, sfreq=512, seed=1)
    write_edf(root / "PN00" / "PN00-2.edf", [label.upper() for label in labels], sfreq=512, seed=2)
    write_edf(root / "PN12" / "PN12-1.2.edf", labels, sfreq=512, seed=3)
    write_edf(root / "PN17" / "PN17-1.edf", labels[:-1], sfreq=512, seed=4)
    write_edf(root / "PN17" / "seizure.edf", labels, sfreq=512)
    (root / "PN00" / "Seizures-list-PN00.txt").write_text("PN00\n")
    return root
