"""The signal chain against MNE's own methods on a Raw, and the policies for names, flat channels, gaps and units."""

import dataclasses
import re

import mne
import numpy as np
import pytest

from data_pipeline import preprocess as chain
from data_pipeline.corpora import CORPORA
from data_pipeline.montages import CHANNEL_ORDERS, electrode_positions, named_montage
from data_pipeline.preprocess import PreprocessConfig, preprocess
from data_pipeline.recording import Recording

RNG = np.random.default_rng(0)


def recording(names=("FP1", "C3", "OZ"), *, sfreq=250.0, seconds=40.0, scale=20.0, **changes):
    signal = scale * RNG.normal(size=(len(names), int(seconds * sfreq)))
    return Recording(**({"signal_uv": signal, "sfreq": sfreq, "ch_names": tuple(names)} | changes))


@pytest.mark.parametrize("sfreq", [250.0, 200.0, 512.0])
def test_chain_equals_mne_on_a_raw(sfreq):
    source = recording(sfreq=sfreq)
    raw = mne.io.RawArray(
        source.signal_uv.copy(), mne.create_info(list(source.ch_names), sfreq, "eeg"), verbose="ERROR"
    )
    raw.filter(0.1, 75.0, verbose="ERROR")
    raw.notch_filter(60.0, verbose="ERROR")
    raw.resample(256.0, verbose="ERROR")
    found, _ = preprocess(source, PreprocessConfig(notch=60.0))
    assert found.sfreq == 256.0
    assert found.signal_uv.dtype == np.float32
    assert found.n_times == round(source.n_times * 256 / sfreq)
    np.testing.assert_allclose(found.signal_uv, raw.get_data(), rtol=0, atol=1e-6 * np.abs(raw.get_data()).max())


TUH = (0.1, 75.0, 60.0, 256.0)
CHAINS = {  # what the specification says of each corpus: rates of its files, then band, notch and rate of its windows
    "tueg": ((250.0, 256.0, 400.0, 512.0, 1000.0), *TUH),
    "tuab": ((250.0, 400.0), *TUH),
    "tuar": ((250.0, 256.0), *TUH),
    "tusl": ((250.0, 1000.0), *TUH),
    "siena": ((512.0,), 0.1, 75.0, 50.0, 256.0),
    "mumtaz2016": ((256.0,), 0.1, 75.0, 50.0, 256.0),
    "tdbrain": ((500.0,), 0.1, 75.0, 50.0, 256.0),
    "eegmat": ((500.0,), 0.1, 75.0, 50.0, 256.0),
    "bids": ((1000.0,), 0.1, 75.0, 50.0, 256.0),
    "apava": ((256.0,), 0.1, 75.0, 50.0, 256.0),
    "modma": ((250.0,), 0.1, 75.0, 50.0, 250.0),
    "seed-v": ((1000.0, 200.0), 1.0, 75.0, None, 200.0),  # 200: where every fifth sample was taken before
    "mobi": ((100.0,), None, None, None, 100.0),
}


def by_mne(signal_uv, sfreq, l_freq, h_freq, notch, out):
    """Filter, notch and resample with the methods of a Raw, at their defaults."""
    raw = mne.io.RawArray(signal_uv.copy(), mne.create_info(len(signal_uv), sfreq, "eeg"), verbose="ERROR")
    if l_freq is not None:
        raw.filter(l_freq, h_freq, verbose="ERROR")
    if notch is not None:
        raw.notch_filter(notch, verbose="ERROR")
    if out != sfreq:
        raw.resample(out, verbose="ERROR")
    return raw.get_data()


def assert_chain_equals_mne(corpus, signal_uv, sfreq, *settings):
    """A millionth of the largest value, at the edges too."""
    config = dataclasses.replace(CORPORA[corpus]().common_chain(), montage="auto")
    names = CHANNEL_ORDERS["mumtaz-19"][: len(signal_uv)]
    found, _ = preprocess(Recording(signal_uv=signal_uv, sfreq=sfreq, ch_names=names), config)
    expected = by_mne(signal_uv, sfreq, *settings)
    assert found.sfreq == settings[-1]
    np.testing.assert_allclose(found.signal_uv, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("corpus", "sfreq"), [(name, rate) for name, (rates, *_) in CHAINS.items() for rate in rates])
def test_the_chain_of_every_corpus_equals_mne_on_noise(corpus, sfreq):
    signal = 20 * np.random.default_rng(1).normal(size=(3, int(45 * sfreq)))
    assert_chain_equals_mne(corpus, signal, sfreq, *CHAINS[corpus][1:])


@pytest.mark.parametrize("corpus", CHAINS)
def test_the_chain_of_every_corpus_equals_mne_on_real_eeg(data_dir, corpus):
    """Rest of 60 s, three electrodes, taken as if it had the rate of the corpus."""
    raw = mne.io.read_raw_edf(data_dir / "eegmat" / "Subject05_1.edf", preload=True, verbose="ERROR")
    signal = raw.get_data(picks=["EEG Fp1", "EEG C3", "EEG O2"]) * 1e6
    assert_chain_equals_mne(corpus, signal, CHAINS[corpus][0][0], *CHAINS[corpus][1:])


def test_every_corpus_has_a_chain_here():
    assert set(CHAINS) == set(CORPORA)


def test_a_low_rate_lowers_the_band_and_nothing_else():
    signal = 20 * np.random.default_rng(2).normal(size=(3, 45 * 150))
    assert_chain_equals_mne("tueg", signal, 150.0, 0.1, 67.5, 60.0, 256.0)


def test_band_is_kept_and_mains_and_drift_are_removed():
    time = np.arange(60 * 250) / 250
    parts = {0.02: 5.0, 10.0: 10.0, 50.0: 100.0, 95.0: 100.0}
    waves = {f: a * np.sin(2 * np.pi * f * time) for f, a in parts.items()}
    source = recording(["CZ"], signal_uv=100.0 + sum(waves.values())[None])
    found, _ = preprocess(source, PreprocessConfig(sfreq=250.0))
    middle = slice(20 * 250, 40 * 250)
    np.testing.assert_allclose(found.signal_uv[0, middle], waves[10.0][middle], atol=0.8)


def test_nyquist_lowers_the_upper_edge_and_says_so():
    found, _ = preprocess(recording(sfreq=128.0), PreprocessConfig())
    assert "upper band edge lowered from 75 to 57.6 Hz: the Nyquist frequency is 64 Hz" in found.notes
    slow, _ = preprocess(recording(sfreq=100.0), PreprocessConfig())
    assert "no 50 Hz notch: the Nyquist frequency is 50 Hz" in slow.notes
    assert preprocess(recording(), PreprocessConfig())[0].notes == ()


def test_short_recording_with_an_offset_has_no_transient():
    source = recording(seconds=8.0)
    shifted = dataclasses.replace(source, signal_uv=source.signal_uv + 10_000.0)
    plain, _ = preprocess(source, PreprocessConfig())
    found, _ = preprocess(shifted, PreprocessConfig())
    assert any("shorter (8 s) than the high-pass filter" in note for note in found.notes)
    np.testing.assert_allclose(found.signal_uv, plain.signal_uv, atol=1e-3)


def test_channels_are_renamed_kept_and_dropped_with_reasons():
    names = ("EEG Fp1-REF", "EEG A1-REF", "ECG ECG", "Status", "weird", "my Cz", "C3", "EEG C3-LE", "EEG A2-A1")
    found = chain.select_channels(recording(names), PreprocessConfig(rename={"my Cz": "Cz", "absent": "Pz"}))
    assert found.ch_names == ("FP1", "CZ", "C3")
    assert found.dropped == {
        "EEG A1-REF": "ear or mastoid reference, not a scalp channel",
        "ECG ECG": "not EEG",
        "Status": "not EEG",
        "weird": "unknown name and no position in the file",
        "EEG C3-LE": "a second channel called C3",
        "EEG A2-A1": "ear or mastoid reference, not a scalp channel",
    }
    assert found.notes == ("--rename names labels the file lacks: absent",)


def test_nothing_left_is_one_sentence():
    with pytest.raises(ValueError, match=r"no channel has a known electrode name .*EXG 0.*--rename") as caught:
        preprocess(recording(("EXG 0", "weird")), PreprocessConfig())
    assert "\n" not in str(caught.value)


def test_file_positions_serve_only_unknown_names_and_never_make_an_eog_channel_eeg():
    xyz = np.array([[0.0, 0.1, 0.0], [0.01, 0.02, 0.03], [0.05, 0.0, 0.0]])
    found, montage = preprocess(recording(("CZ", "site 17", "EOG1"), positions=xyz), PreprocessConfig())
    assert montage.ch_names == ("CZ", "SITE 17")
    np.testing.assert_allclose(montage.locations[0], electrode_positions(["CZ"])[0], atol=1e-7)
    np.testing.assert_allclose(montage.locations[1], xyz[1], atol=1e-7)
    np.testing.assert_array_equal(montage.channel_ids, [22, -1])
    assert found.dropped == {"EOG1": "not EEG"}


def test_bipolar_order_is_the_difference_of_its_electrodes():
    electrodes = sorted({site for pair in CHANNEL_ORDERS["tuh-bipolar-22"] for site in pair.split("-")})
    source = recording([f"EEG {site}-REF" for site in reversed(electrodes)], seconds=5.0)
    config = PreprocessConfig(montage="tuh-bipolar-22", l_freq=None, h_freq=None, notch=None, sfreq=250.0)
    found, montage = preprocess(source, config)
    assert montage == named_montage("tuh-bipolar-22")
    row = {
        name.removeprefix("EEG ").removesuffix("-REF"): x
        for name, x in zip(source.ch_names, source.signal_uv, strict=True)
    }
    for pair, x in zip(montage.ch_names, found.signal_uv, strict=True):
        first, second = pair.split("-")
        np.testing.assert_allclose(x, row[first] - row[second], atol=1e-4)
    with pytest.raises(ValueError, match="neither recorded nor derivable: C3-CZ, CZ-C4"):
        preprocess(source.pick([i for i, n in enumerate(source.ch_names) if "CZ" not in n]), config)


def test_named_list_reorders_and_bridges_old_names():
    source = recording(("T7", "CZ", "P7"), seconds=5.0)
    config = PreprocessConfig(montage="T5,cz,T3", l_freq=None, h_freq=None, notch=None, sfreq=250.0)
    found, montage = preprocess(source, config)
    assert montage.ch_names == ("T5", "CZ", "T3")
    np.testing.assert_allclose(found.signal_uv, source.signal_uv[[2, 1, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="XX has no standard position"):
        PreprocessConfig(montage="CZ,XX")


def test_references():
    plain = {"l_freq": None, "h_freq": None, "notch": None, "sfreq": 250.0}
    source = recording(("C3", "C4", "A1", "A2"), seconds=5.0)
    average, _ = preprocess(source, PreprocessConfig(reference="average", **plain))
    np.testing.assert_allclose(average.signal_uv.sum(axis=0), 0, atol=1e-3)
    ears, montage = preprocess(source, PreprocessConfig(reference="M1,A2", **plain))
    assert montage.ch_names == ("C3", "C4")
    np.testing.assert_allclose(ears.signal_uv[0], source.signal_uv[0] - source.signal_uv[2:].mean(axis=0), atol=1e-4)
    with pytest.raises(ValueError, match="asks for electrodes the file lacks"):
        preprocess(source, PreprocessConfig(reference="TP9", **plain))


def test_flat_channels_are_dropped_or_kept():
    source = recording()
    source.signal_uv[1] = 4000.0
    found, montage = preprocess(source, PreprocessConfig())
    assert montage.ch_names == ("FP1", "OZ")
    assert found.dropped == {"C3": "flat over the whole recording"}
    assert preprocess(source, PreprocessConfig(flat="keep"))[1].ch_names == ("FP1", "C3", "OZ")
    with pytest.raises(ValueError, match="every channel is constant"):
        preprocess(recording(scale=0.0), PreprocessConfig())


def test_gaps_are_bridged_remembered_and_do_not_spread():
    source = recording()
    whole, _ = preprocess(source, PreprocessConfig())
    source.signal_uv[0, 5000:5025] = np.nan
    source.signal_uv[2] = np.inf
    found, montage = preprocess(source, PreprocessConfig())
    assert montage.ch_names == ("FP1", "C3")
    assert found.dropped == {"OZ": "no finite sample"}
    assert found.gaps == ((20.0, 20.1),)
    assert np.isfinite(found.signal_uv).all()
    np.testing.assert_allclose(found.signal_uv[1], whole.signal_uv[1], atol=1e-4)


def test_one_absurd_number_does_not_spoil_the_recording():
    source = recording()
    whole, _ = preprocess(source, PreprocessConfig())
    source.signal_uv[0, 5000] = 1e300
    source.signal_uv[1, 100] = -np.inf
    found, _ = preprocess(source, PreprocessConfig())
    assert found.gaps == ((0.4, 0.404), (20.0, 20.004))
    np.testing.assert_allclose(found.signal_uv[2], whole.signal_uv[2], atol=1e-4)
    assert 5 < chain.robust_amplitude(found) < 40


@pytest.mark.parametrize("sfreq", [0.94, 3e6])
def test_rates_that_are_not_of_eeg_are_refused_before_filters_grow_with_them(sfreq):
    source = recording(signal_uv=np.zeros((3, 1000)), sfreq=sfreq, seconds=0)
    with pytest.raises(ValueError, match=r"sampling rate of .* Hz is not that of EEG \(20 to 100000 Hz\)"):
        preprocess(source, PreprocessConfig())


@pytest.mark.parametrize("factor", [1e6, 1e-6, 1e3, 1e-3, 1e9])
def test_wrong_units_are_refused_with_the_factor_that_repairs_them(factor):
    source = recording(scale=20.0 / factor)
    config = PreprocessConfig()
    with pytest.raises(
        ValueError, match=f"not plausible for EEG .* --scale {re.escape(f'{factor:g}')} if so"
    ) as caught:
        preprocess(source, config)
    assert "\n" not in str(caught.value)
    repaired, _ = preprocess(source, dataclasses.replace(config, scale=factor))
    assert 5 < chain.robust_amplitude(repaired) < 40
    accepted, _ = preprocess(source, dataclasses.replace(config, accept_units=True))
    assert chain.robust_amplitude(accepted) == pytest.approx(chain.robust_amplitude(repaired) / factor, rel=1e-4)


def test_robust_amplitude_is_the_standard_deviation_of_gaussian_noise_despite_offsets_and_spikes():
    source = recording(scale=30.0)
    source.signal_uv[:, ::100] = 1e6
    source.signal_uv[0] += 4200.0
    assert chain.robust_amplitude(source) == pytest.approx(30.0, rel=0.05)


@pytest.mark.parametrize(
    "settings", [{"l_freq": 80.0}, {"sfreq": 0.0}, {"flat": "x"}, {"scale": 0.0}, {"montage": ","}, {"l_freq": -1.0}]
)
def test_contradictory_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"must|not 'auto'"):
        PreprocessConfig(**settings)
