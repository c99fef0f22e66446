"""Synthetic recordings: plausible EEG, reproducible files, and a condition effect at the stated electrodes only."""

import csv

import edfio
import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt, welch

from data_pipeline.montages import electrode_positions, normalize_name
from data_pipeline.synthetic import AMPLIFIERS, CONDITIONS, main, simulate_subject, write_recordings

SECONDS = 40


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    write_recordings(folder, subjects=8, seconds=SECONDS, seed=0)
    return folder


def read(path):
    """(C,T) microvolts of the EEG channels, their normalised names, rate."""
    edf = edfio.read_edf(path)
    eeg = [s for s in edf.signals if s.label != "ECG"]
    assert {s.physical_dimension for s in edf.signals} == {"uV"}
    return np.stack([s.data for s in eeg]), [normalize_name(s.label) for s in eeg], eeg[0].sampling_frequency


def rows_of(folder):
    with (folder / "labels.csv").open() as file:
        return list(csv.DictReader(file))


def test_labels_cover_every_recording_in_both_conditions(recordings):
    rows = rows_of(recordings)
    files = sorted(path.name for path in recordings.glob("*.edf"))
    assert len(files) == 8
    for name in files:
        own = [row for row in rows if row["file"] == name]
        assert sorted(row["label"] for row in own) == sorted(CONDITIONS)
        assert len({row["subject"] for row in own}) == 1
        assert [(float(r["start"]), float(r["stop"])) for r in own] == [(0, SECONDS), (SECONDS, 2 * SECONDS)]
        assert edfio.read_edf(recordings / name).duration == 2 * SECONDS
    assert len({row["subject"] for row in rows}) == 8
    assert {row["label"] for row in rows if row["start"] == "0"} == set(CONDITIONS), "order is counterbalanced"


def test_two_montages_with_names_of_their_own(recordings):
    found = [read(path)[1:] for path in sorted(recordings.glob("*.edf"))]
    assert {(len(names), rate) for names, rate in found} == {(19, 256), (22, 250)}
    assert all(tuple(n) in {a.ch_names for a in AMPLIFIERS} for n, _ in found)
    labels = {s.label for s in edfio.read_edf(recordings / "subject-02.edf").signals}
    assert {"EEG FP1-REF", "ECG"} <= labels


def test_amplitudes_are_those_of_scalp_eeg(recordings):
    for path in recordings.glob("*.edf"):
        signal, names, _ = read(path)
        spread = 1.4826 * np.median(np.abs(signal - np.median(signal, axis=1, keepdims=True)), axis=1)
        assert (spread > 5).all(), names[int(spread.argmin())]
        assert (spread < 60).all(), names[int(spread.argmax())]
        assert np.abs(signal).max() < 500, "nothing near the limit of the amplifier"
        frontal = np.abs(signal[names.index("FP1")]).max()
        assert frontal > 1.3 * np.abs(signal[names.index("PZ")]).max(), "blinks are frontal"


def test_spectrum_falls_with_frequency_and_has_alpha_and_line_noise(recordings):
    for path in sorted(recordings.glob("*.edf"))[:4]:
        signal, names, rate = read(path)
        hertz, density = welch(signal, rate, nperseg=2 * rate)

        def at(low, high, rows, hertz=hertz, density=density):
            return density[rows][:, (hertz >= low) & (hertz <= high)].mean()

        everywhere = slice(None)
        assert at(1, 4, everywhere) > 3 * at(13, 20, everywhere) > 3 * at(30, 45, everywhere)
        assert at(50, 50, everywhere) > 5 * at(53, 57, everywhere)
        back = [names.index("O1"), names.index("O2")]
        assert at(9, 11, back) > 2 * at(14, 18, back)


def test_neighbours_share_their_background():
    names = AMPLIFIERS[0].ch_names
    signal = simulate_subject(names, 256, ["rest"], 60, np.random.default_rng(0), 1.0)
    correlation = np.corrcoef(sosfiltfilt(butter(4, [1, 40], "bandpass", fs=256, output="sos"), signal))
    xyz = electrode_positions(names)
    distance = np.linalg.norm(xyz[:, None] - xyz[None], axis=-1)
    off = ~np.eye(len(names), dtype=bool)
    near, far = correlation[off & (distance < 0.06)].mean(), correlation[off & (distance > 0.13)].mean()
    assert near > 0.5 > 0.25 > abs(far)


def band_effect(folder, low, high):
    """Electrode -> mean over subjects of log(task power / rest power) in the band, and its standard error."""
    effects = {}
    for path in sorted(folder.glob("*.edf")):
        signal, names, rate = read(path)
        power = {}
        for row in (r for r in rows_of(folder) if r["file"] == path.name):
            part = signal[:, int(float(row["start"]) * rate) : int(float(row["stop"]) * rate)]
            hertz, density = welch(part, rate, nperseg=2 * rate)
            power[row["label"]] = density[:, (hertz >= low) & (hertz <= high)].mean(axis=1)
        for name, value in zip(names, np.log(power["task"] / power["rest"]), strict=True):
            effects.setdefault(name, []).append(value)
    return {name: np.mean(v) for name, v in effects.items() if len(v) == 8}


def test_conditions_differ_at_the_named_electrodes_only(recordings):
    alpha, theta = band_effect(recordings, 8.5, 12), band_effect(recordings, 5, 7)
    beta = band_effect(recordings, 15, 19)
    assert max(alpha[name] for name in ("O1", "O2", "PZ")) < -0.4
    assert theta["FZ"] > 0.3
    for name in ("FP1", "FP2", "F3", "F4", "FZ", "F7", "F8"):
        assert abs(alpha[name]) < 0.2, f"alpha at {name}: {alpha[name]:.2f}"
    for name in ("O1", "O2", "P3", "P4", "PZ"):
        assert abs(theta[name]) < 0.2, f"theta at {name}: {theta[name]:.2f}"
    assert max(abs(value) for value in beta.values()) < 0.2


def test_without_effect_the_conditions_are_alike(tmp_path):
    write_recordings(tmp_path, subjects=8, seconds=SECONDS, effect=0.0)
    assert max(abs(v) for v in band_effect(tmp_path, 8.5, 12).values()) < 0.3


def test_files_depend_on_the_arguments_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_recordings(tmp_path / name, subjects=2, seconds=6, seed=seed)
    files = {n: [p.read_bytes() for p in sorted((tmp_path / n).iterdir())] for n in "abc"}
    assert files["a"] == files["b"]
    assert files["a"][1] != files["c"][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"], "no partial folder is left"


def test_a_larger_study_begins_with_the_smaller_one(tmp_path):
    write_recordings(tmp_path / "small", subjects=1, seconds=6)
    write_recordings(tmp_path / "large", subjects=2, seconds=6)
    first = [(tmp_path / n / "subject-01.edf").read_bytes() for n in ("small", "large")]
    assert first[0] == first[1]


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--subjects", "2", "--seconds", "5"]) == 0
    assert "2 recordings" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), "--subjects", "0"]) == 2
    assert "error: at least 1 subject" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("in the way")
    assert main([str(tmp_path / "file"), "--subjects", "1", "--seconds", "5"]) == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
