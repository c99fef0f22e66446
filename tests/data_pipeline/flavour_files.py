"""Files as the reference pipeline leaves them (data specification, section 5), written with h5py and NumPy alone.

Nothing of the package is used here: orders, shapes and the scrambling are written down a second time, so that the
reader is compared with something that does not share its mistakes.
"""

import h5py
import numpy as np

# TUAB, TUAR, TUSL: what the writer stores ("D") and what every reader takes the rows for ("L")
DISK = """
FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 A1-T3 T3-C3 C3-CZ CZ-C4 C4-T4 T4-A2 FP1-F3 F3-C3 C3-P3 P3-O1
FP2-F4 F4-C4 C4-P4 P4-O2
""".split()  # noqa: SIM905
LOADER = """
FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 T3-C3 C3-CZ CZ-C4 C4-T4 FP1-F3 F3-C3 C3-P3 P3-O1 FP2-F4
F4-C4 C4-P4 P4-O2 A1-T3 T4-A2
""".split()  # noqa: SIM905
# "A1-T3 is placed as T3-C3, T3-C3 as C3-CZ, ...": true name -> name whose position it gets (register of quirks, 1)
MISPLACED = {
    "A1-T3": "T3-C3", "T3-C3": "C3-CZ", "C3-CZ": "CZ-C4", "CZ-C4": "C4-T4", "C4-T4": "FP1-F3", "T4-A2": "F3-C3",
    "FP1-F3": "C3-P3", "F3-C3": "P3-O1", "C3-P3": "FP2-F4", "P3-O1": "F4-C4", "FP2-F4": "C4-P4", "F4-C4": "P4-O2",
    "C4-P4": "A1-T3", "P4-O2": "T4-A2",
}  # fmt: skip


def brain_noise(rng, channels, samples, scale=20.0):
    """(channels, samples) float64 with the 1/f look of EEG: neighbouring samples are alike, distant ones are not."""
    white = rng.normal(size=(channels, samples + 256))
    kernel = np.exp(-np.arange(256) / 12.0)
    smooth = np.stack([np.convolve(row, kernel, mode="valid")[:samples] for row in white])
    return scale * smooth / smooth.std()


def cut(signal, samples):
    """The right way: (C, n*T) -> (n, C, T)."""
    return np.stack([signal[:, i : i + samples] for i in range(0, signal.shape[1] - samples + 1, samples)])


def scramble(signal, samples):
    """The reference's way: reshaped as it lies in memory, nothing transposed."""
    n = signal.shape[1] // samples
    return np.ascontiguousarray(signal[:, : n * samples]).reshape(n, signal.shape[0], samples)


def flavour_a(path, blocks, labels=None):
    """TUAB, TUAR, TUSL: numbered groups, X float64 plain, y as given; no attribute at all.

    `blocks` {group name: (n,22,T) in DISK order}, `labels` {group name: y}; a group without an entry has no y.
    """
    with h5py.File(path, "w") as f:
        for name, x in blocks.items():
            group = f.create_group(name)
            group.create_dataset("X", data=np.asarray(x, np.float64))
            if labels and name in labels:
                group.create_dataset("y", data=labels[name])
    return path


def flavour_b(path, recordings, samples, names=None, montage="01_tcp_ar"):
    """TUEG and Siena: groups by EDF stem, float16, scrambled. `recordings` {stem: (C,T_total)}; `names` for TUEG."""
    with h5py.File(path, "a") as f:
        for stem, signal in recordings.items():
            group = f.create_group(stem)
            group.create_dataset("X", data=scramble(signal, samples).astype(np.float16))
            if names is not None:
                group.attrs["montage_name"] = montage
        if names is not None:
            f.attrs["channel_names"] = list(names)
    return path


def flavour_c(path, blocks, labels):
    """APAVA, TDBrain, Mumtaz2016, MODMA: numbered groups, X float64 gzip in chunks that h5py chooses, y int64.

    Opened for appending, and numbered on: a second call doubles the file, as a second run of the reference does.
    """
    with h5py.File(path, "a") as f:
        first = len(f)
        for i, (x, y) in enumerate(zip(blocks, labels, strict=True), start=first):
            group = f.create_group(f"data_group_{i}")
            group.create_dataset("X", data=np.asarray(x, np.float64), compression="gzip", compression_opts=4)
            group.create_dataset("y", data=np.asarray(y, np.int64))
    return path


def flavour_d(path, blocks, targets):
    """MoBI: as C, with 12 targets for each window, gzip."""
    with h5py.File(path, "a") as f:
        for i, (x, y) in enumerate(zip(blocks, targets, strict=True), start=len(f)):
            group = f.create_group(f"data_group_{i}")
            group.create_dataset("X", data=np.asarray(x, np.float64), compression="gzip")
            group.create_dataset("y", data=np.asarray(y, np.float64), compression="gzip")
    return path
