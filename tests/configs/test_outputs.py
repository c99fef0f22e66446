"""Windows of any montages and lengths through a model: the order, the numbers, the shapes that are compiled."""

import dataclasses
import resource
import time

import h5py
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from configs import outputs, scoring
from configs.recordings import RecordingSettings, prepare_windows, recording_config, say_of_recordings
from configs.results import check_output, is_input, print_predictions, save_columns, save_table
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax import inference
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.lumamba import LuMamba, LuMambaConfig

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)
SFREQ = 100
MONTAGES = (["C3", "C4"], ["FP1", "FP2", "O1", "O2"])
COUNTS = {80: (5, 21), 200: (18, 2)}  # samples -> windows of each montage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params = nnx.split(LuMamba(MICRO, rngs=nnx.Rngs(0)))[1]
    return inference.load(save_pretrained(tmp_path_factory.mktemp("model") / "m", MICRO, params, {"sfreq": SFREQ}))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder, rng, opened = tmp_path_factory.mktemp("stores"), np.random.default_rng(0), []
    for samples, counts in COUNTS.items():
        with create_store(folder / f"{samples}.h5", StoreInfo(SFREQ, samples, samples / SFREQ)) as writer:
            for number, (names, count) in enumerate(zip(MONTAGES, counts, strict=True)):
                signal = rng.normal(0, 20, (count, len(names), samples)).astype(np.float32)
                who = {"subject": f"s{number}", "recording": f"r{number}"}
                writer.add(f"g{number}", signal, montage_of(names), start_samples=np.arange(count) * samples, **who)
        if samples == 80:  # the writer refuses what a damaged disk may hold
            with h5py.File(folder / "80.h5", "r+") as file:
                file["g1/X"][4, 0, 3] = np.nan
        opened.append(WindowStore(folder / f"{samples}.h5"))
    return opened


@pytest.fixture(scope="module")
def columns(model, stores):
    return outputs.store_columns(model, stores, "prediction")


def test_every_window_has_the_prediction_of_its_own_array(model, stores, columns):
    first = 0
    for store in stores:
        for name, montage in store.montages.items():
            rows = np.flatnonzero(np.asarray(store.montage_names) == name)
            usable = rows[np.isfinite(store.read(rows)).all((1, 2))]
            expected = inference.predict(model, store.read(usable), montage.locations)
            np.testing.assert_allclose(columns["predictions"][first + usable], expected, atol=1e-5)
            assert set(columns["montage"][first + rows]) == {name}
        first += len(store)
    assert np.flatnonzero(np.isnan(columns["predictions"]).any(1)).tolist() == [COUNTS[80][0] + 4]


def test_the_size_of_the_batch_changes_no_bit(model, stores, columns):
    for batch_size in (1, 24):
        again = outputs.store_columns(model, stores, "prediction", batch_size=batch_size)
        np.testing.assert_array_equal(again["predictions"], columns["predictions"])


def test_scores_are_of_the_same_predictions_whatever_the_montages(tmp_path, model):
    rng, path = np.random.default_rng(1), tmp_path / "labelled.h5"
    with create_store(path, StoreInfo(SFREQ, 80, 0.8, class_names=["a", "b", "c"])) as writer:
        for number, names in enumerate(MONTAGES):
            signal, labels = rng.normal(0, 20, (7, len(names), 80)).astype(np.float32), np.arange(7) % 3
            who = {"subject": f"s{number}", "recording": f"r{number}", "start_samples": np.arange(7) * 80}
            writer.add(f"g{number}", signal, montage_of(names), labels=labels, **who)
    about = {"sfreq": SFREQ, "task": {"kind": "classify"}, "class_names": ["a", "b", "c"]}
    save_pretrained(tmp_path / "model", MICRO, model.params, about)
    scored = scoring.score_model(tmp_path / "model", data=(path,), part="test", batch_size=4, resamples=0)
    found = softmax(scored.predictions.logits, axis=1)
    expected = outputs.store_columns(model, [WindowStore(path)], "prediction")["predictions"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scored.predictions.window_id.tolist() == list(range(14))


def test_one_program_for_each_shape(model, stores):
    assert outputs.padded_sizes([19, 62, 19, 22]) == (19, 22, 62)
    assert outputs.padded_sizes([4, 19, 20, 22, 23, 61]) == (4, 24, 64)
    batches = outputs.evaluation_batches(model, stores)
    assert {(channels, samples) for _, channels, samples in batches.shapes} == {
        (channels, samples) for channels in (2, 4) for samples in COUNTS
    }
    program = inference._compiled(inference._pool)
    before = program._cache_size()
    inference.run_batches(model, batches, "embedding")
    assert program._cache_size() - before == len(batches.shapes)
    inference.run_batches(model, batches, "embedding")
    assert program._cache_size() - before == len(batches.shapes)


def test_recordings_have_the_mean_of_their_windows(columns):
    found = outputs.by_recording(columns)
    own = columns["predictions"][columns["recording"] == "r1"]
    assert found["windows"].tolist() == [5 + 18, 20 + 2]
    np.testing.assert_allclose(found["predictions"][1], np.nanmean(own, axis=0), rtol=1e-6)


def test_recordings_of_one_name_are_kept_apart_by_their_subjects():
    columns = {
        "recording": np.array(["rest", "rest", "task", "rest"]),
        "subject": np.array(["a", "b", "a", "a"]),
        "predictions": np.array([[1.0], [0.0], [0.25], [0.5]]),
    }
    found = outputs.by_recording(columns)
    assert found["recording"].tolist() == ["a/rest", "b/rest", "task"]
    assert found["predictions"].ravel().tolist() == [0.75, 0.0, 0.25]


def test_what_does_not_fit_is_refused(model, stores):
    other = dataclasses.replace(model, metadata={"provenance": {"sfreq": 256.0}})
    with pytest.raises(ValueError, match="trained at 256 Hz"):
        outputs.store_columns(other, stores, "embedding")
    other = dataclasses.replace(model, config=MICRO.replace(patch_size=64))
    with pytest.raises(ValueError, match="80 samples"):
        outputs.store_columns(other, stores, "embedding")


PER_CHANNEL = {"class_names": ["clean", "artefact"], "channels": ["F3", "FZ", "F4"]}


@pytest.fixture(scope="module")
def per_channel(tmp_path_factory):
    config = MICRO.replace(head="mamba", output_channels=3, num_outputs=2)
    params = nnx.split(LuMamba(config, rngs=nnx.Rngs(1)))[1]
    return inference.load(save_pretrained(tmp_path_factory.mktemp("model") / "m", config, params, PER_CHANNEL))


def one_montage(path, names):
    signal = np.random.default_rng(3).normal(0, 20, (6, len(names), 80)).astype(np.float32)
    with create_store(path, StoreInfo(SFREQ, 80, 0.8)) as writer:
        for k in range(2):
            own = {"subject": f"s{k}", "recording": f"r{k}", "start_samples": np.arange(3) * 80}
            writer.add(f"g{k}", signal[3 * k : 3 * k + 3], montage_of(names), **own)
    return WindowStore(path)


def test_classes_of_each_channel_are_saved_and_shown(per_channel, tmp_path, capsys):
    store = one_montage(tmp_path / "three.h5", ["F3", "FZ", "F4"])
    columns = outputs.store_columns(per_channel, [store], "prediction")
    expected = inference.predict(per_channel, store.read(np.arange(6)), next(iter(store.montages.values())).locations)
    assert expected.shape == (6, 3, 2)
    np.testing.assert_allclose(columns["predictions"], expected, atol=1e-5)
    found = outputs.by_recording(columns)
    np.testing.assert_allclose(found["predictions"][1], expected[3:].mean(0), rtol=1e-4)

    channels = outputs.channels_of(per_channel, [store])
    save_table(tmp_path / "table.csv", columns, per_channel.class_names, channels)
    header, first, *_ = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()]
    assert header[-6:] == [f"{site} {name}" for site in PER_CHANNEL["channels"] for name in PER_CHANNEL["class_names"]]
    np.testing.assert_allclose(np.array(first[-6:], float), expected[0].ravel(), atol=1e-5)
    save_table(tmp_path / "table.csv", columns, None, None)
    assert (tmp_path / "table.csv").read_text().splitlines()[0].endswith("channel_2 output_0,channel_2 output_1")

    print_predictions(found, per_channel.class_names, channels)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "r1" in line and "FZ" in line]
    assert all(f"{value:.3f}" in row for value in expected[3:, 1].mean(0))


def test_other_channels_than_those_with_outputs_are_refused(per_channel, tmp_path):
    with pytest.raises(ValueError, match=r"outputs for 3 channels, .* has 2"):
        outputs.store_columns(per_channel, [one_montage(tmp_path / "two.h5", MONTAGES[0])], "prediction")
    with pytest.raises(ValueError, match="trained on the channels F3, FZ, F4 in this order"):
        outputs.store_columns(per_channel, [one_montage(tmp_path / "order.h5", ["F4", "FZ", "F3"])], "prediction")


BIPOLAR = ["FP1-F7", "F7-T3"]
FILTERS = {"l_freq": None, "h_freq": 45.0, "notch": 60.0, "reference": "average"}


@pytest.mark.parametrize(
    ("provenance", "asked", "expected", "assumed"),
    [
        ({}, {}, ("auto", "none", 0.1, 75.0, "50", 256.0, 5.0), True),
        ({"sfreq": 100, "n_times": 80, "filters": FILTERS}, {}, ("auto", "average", None, 45.0, "60", 100, 0.8), True),
        (
            {"sfreq": 100, "n_times": 80, "filters": FILTERS, "channels": BIPOLAR},
            {},
            ("FP1-F7,F7-T3", "average", None, 45.0, "60", 100, 0.8),
            False,
        ),
        (
            {"sfreq": 100, "n_times": 80, "filters": FILTERS, "channels": BIPOLAR},
            {"montage": "auto", "notch": "none", "l_freq": 0.5, "h_freq": "none", "window": 2.0, "reference": "none"},
            ("auto", "none", 0.5, None, "none", 100, 2.0),
            False,
        ),
    ],
)
def test_recordings_are_prepared_as_the_model_was_trained(model, tmp_path, provenance, asked, expected, assumed):
    said = []
    own = dataclasses.replace(model, config=MICRO.replace(patch_size=8), metadata={"provenance": provenance})
    found = recording_config(tmp_path, tmp_path / "w.h5", own, RecordingSettings(**asked), said.append)
    names = ("montage", "reference", "l_freq", "h_freq", "notch", "sfreq", "window")
    assert tuple(getattr(found, name) for name in names) == expected
    (line,) = said
    assert ("assumed" in line) == assumed


@pytest.mark.parametrize(
    ("asked", "provenance", "message"),
    [
        ({"window": 0.5}, {}, "not a multiple of the patch size"),
        ({"montage": "nowhere"}, {}, "'nowhere' is not 'auto'"),
        ({"l_freq": 50.0}, {"filters": FILTERS}, "0 < l_freq < h_freq"),
        ({}, {"filters": {"notch": 55.0}}, "choose --notch 50, 60 or none"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_work(model, tmp_path, asked, provenance, message):
    own = dataclasses.replace(model, metadata={"provenance": {"sfreq": SFREQ, "n_times": 80, **provenance}})
    with pytest.raises(ValueError, match=message):
        recording_config(tmp_path, tmp_path / "w.h5", own, RecordingSettings(**asked), pytest.fail)


def write_csv(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(0).normal(0, 20, (int(seconds * SFREQ), 2))
    rows = [f"{k / SFREQ:.2f},{one:.3f},{two:.3f}" for k, (one, two) in enumerate(signal)]
    path.write_text("\n".join(["time,C3,C4", *rows]) + "\n")


@pytest.fixture
def recordings(tmp_path):
    """Two of one name, one too short for a window, a hidden one, and a file that is none."""
    for name, seconds in {"a/rest.csv": 4, "b/rest.csv": 4, "short.csv": 1.5, ".hidden.csv": 4}.items():
        write_csv(tmp_path / "in" / name, seconds)
    (tmp_path / "in" / "notes.txt").write_text("a good day\n")
    return tmp_path / "in"


SHORT_WINDOWS = RecordingSettings(window=2.0, h_freq=40.0, notch="none")


def test_recordings_that_are_left_out_are_said(model, recordings, tmp_path):
    said = []
    prepare_windows(recordings, tmp_path / "w.h5", model, SHORT_WINDOWS, said.append)
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith("short.csv: left out, no window of 2 s fits")
    columns = outputs.store_columns(model, [WindowStore(tmp_path / "w.h5")], "prediction")
    assert outputs.by_recording(columns)["recording"].tolist() == ["a/rest.csv", "b/rest.csv"]
    assert columns["start_seconds"].tolist() == [0.0, 2.0, 0.0, 2.0]


def test_one_recording_is_read_whatever_its_name_and_neighbours(model, tmp_path, monkeypatch):
    recording = tmp_path / "S[05] rest.csv"  # brackets are no pattern
    write_csv(recording, 4)
    monkeypatch.setattr(type(tmp_path), "rglob", lambda *_: pytest.fail("one recording needs no search of its folder"))
    prepare_windows(recording, tmp_path / "w.h5", model, SHORT_WINDOWS, lambda _: None)
    assert set(WindowStore(tmp_path / "w.h5").recordings) == {recording.name}
    (tmp_path / "x.fdt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.fdt cannot be used: .*belong to a .set file"):
        prepare_windows(tmp_path / "x.fdt", tmp_path / "w2.h5", model, SHORT_WINDOWS, lambda _: None)


def test_whole_recordings_keep_their_paths_and_pass_over_what_is_none(model, recordings):
    said, asked = [], RecordingSettings(h_freq=40.0, notch="none")
    write_csv(recordings / "patch.csv", 0.1)
    found = outputs.whole_recording_columns(model, recordings, asked, said.append)
    assert found["recording"].tolist() == ["a/rest.csv", "b/rest.csv", "short.csv"]
    assert [line.partition(":")[0] for line in said if "left out" in line] == ["patch.csv"]


def test_a_remark_on_many_recordings_is_one_line():
    said = []
    say_of_recordings(
        {**{f"r{k}": ["cut short"] for k in range(5)}, "r5": ["left out, flat", "cut short"]}, said.append
    )
    assert said == ["r0, r1, r2 and 3 more: cut short", "r5: left out, flat"]


def test_an_output_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in {
        "folder.csv": "is a folder",
        "file/out.csv": "is a file, not a folder",
        "out.txt": r"must end in .csv or .npz, not 'out.txt'",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name, (".csv", ".npz"))
    check_output(tmp_path / "new" / "out.csv", (".csv",))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".h5"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(columns, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_text("of an earlier run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))  # Python ignores the signal: writing raises
    try:
        with pytest.raises(OSError, match=rf"out{suffix} was not written"):
            save_table(path, columns, None) if suffix == ".csv" else save_columns(path, columns)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(path.name, "of an earlier run")]


def test_what_is_read_is_never_the_output(recordings, stores):
    recording = recordings / "a" / "rest.csv"
    assert is_input(recording, recording)
    assert is_input(recording, recordings)
    assert is_input(stores[0].path, stores[0].path.parent)
    (recordings / "predictions.csv").write_text("window_id,recording,rest\n0,a,0.5\n")
    assert not is_input(recordings / "predictions.csv", recordings)
    assert not is_input(recordings / "new.csv", recordings)


def test_progress_is_shown_only_when_it_takes_long(monkeypatch, capsys):
    assert list(outputs.counted("abc", 3, "windows")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(outputs, "_QUICK_SECONDS", 0.0)
    for _ in outputs.counted("abc", 3, "windows"):
        time.sleep(0.1)
    shown = capsys.readouterr()
    assert "windows" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""
