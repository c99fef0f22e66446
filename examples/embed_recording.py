"""Embeddings of one recording in a few lines: `python examples/embed_recording.py RECORDING MODEL [OUT.npz]`.

RECORDING is any file MNE reads (EDF, BDF, FIF, BrainVision, EEGLAB) or a CSV with electrode names as header; MODEL is a
converted checkpoint or a run of `train.py`. Prints one line per window and writes the embeddings `(windows, M)`.
"""

import sys
from pathlib import Path

import numpy as np

import lumamba_jax
from data_pipeline.preprocess import PreprocessConfig, preprocess
from data_pipeline.readers import read_recording
from data_pipeline.windows import cut_windows

WINDOW_SECONDS = 5.0
SFREQ = 256.0


def main(recording_path: str, model_path: str, out: str = "embeddings.npz") -> None:
    """Read, filter, cut, embed, save."""
    recording, montage = preprocess(read_recording(Path(recording_path)), PreprocessConfig(sfreq=SFREQ))
    n_times = round(WINDOW_SECONDS * SFREQ)
    windows = cut_windows(recording, n_times=n_times, stride=n_times)
    if not len(windows.signal):
        raise ValueError(f"{recording_path} holds no window of {WINDOW_SECONDS:g} s")

    model = lumamba_jax.load(model_path)
    embeddings = lumamba_jax.embed(model, windows.signal, montage.locations)  # microvolts in, (windows, M) out

    np.savez(out, embeddings=embeddings, start_seconds=windows.start_samples / SFREQ, ch_names=montage.ch_names)
    print(f"{recording_path}: {len(montage.ch_names)} channels, {len(embeddings)} windows of {WINDOW_SECONDS:g} s")
    print(f"{out}: embeddings {embeddings.shape}, mean norm {np.linalg.norm(embeddings, axis=1).mean():.2f}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"embed_recording: {error}", file=sys.stderr)
        sys.exit(2)
