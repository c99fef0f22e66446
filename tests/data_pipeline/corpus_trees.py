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
