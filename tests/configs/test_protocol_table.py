"""The table of protocols: divisions it may use, several stores, what an encoder has seen."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from flax import nnx

from configs import protocol_table
from configs.schema import ExperimentConfig, from_mapping, write_yaml
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax.architectures import build
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.inference import load
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.run_log import write_json

SFREQ, SAMPLES = 100, 100


def store_of(path, subjects, names, *, classes=("a", "b"), first=0, labels=(0, 1) * 3, same=None):
    """Six contiguous windows of each subject, from the window number `first` of its recording on.

    `same`: subject -> another one, before it, whose signal it has. Windows differ by `first`.
    """
    rng, signals = np.random.default_rng(first), {}
    info = StoreInfo(SFREQ, SAMPLES, SAMPLES / SFREQ, class_names=classes and list(classes))
    with create_store(path, info) as writer:
        for number, subject in enumerate(subjects):
            signal = rng.normal(0, 20, (6, len(names), SAMPLES)).astype(np.float32)
            signal = signals[subject] = signals.get((same or {}).get(subject), signal)
            who = {"subject": subject, "recording": subject, "start_samples": (first + np.arange(6)) * SAMPLES}
            writer.add(f"g{number}", signal, montage_of(names), labels=np.array(labels), **who)
    return WindowStore(path)


def test_stores_are_joined_at_the_channels_they_share(tmp_path):
    first = store_of(tmp_path / "1.h5", ["s1", "s2"], ["C3", "C4", "CZ"])
    second = store_of(tmp_path / "2.h5", ["s3"], ["PZ", "CZ", "C3"])
    data = protocol_table.labelled([first, second])
    assert data.signal_uv.shape == (18, 2, SAMPLES)
    np.testing.assert_array_equal(data.signal_uv[:12], first.read(np.arange(12))[:, [0, 2]])
    np.testing.assert_array_equal(data.signal_uv[12:], second.read(np.arange(6))[:, [2, 1]])
    with pytest.raises(ValueError, match="other classes"):
        protocol_table.labelled([first, store_of(tmp_path / "3.h5", ["s4"], ["C3", "CZ"], classes=("a", "c"))])


def test_a_given_test_part_is_the_only_fold_and_shares_no_subject(tmp_path):
    names = ["C3", "C4"]
    train = store_of(tmp_path / "train.h5", [f"s{i}" for i in range(5)], names)
    test = store_of(tmp_path / "test.h5", ["t1", "t2"], names)
    (split,) = protocol_table.given_test(protocol_table.labelled([train, test]), len(test))
    assert split.test.tolist() == list(range(30, 42))
    assert sorted([*split.train, *split.val]) == list(range(30))
    assert not protocol_table.trains_on_tested(protocol_table.labelled([train, test]), [split])


def test_a_test_part_of_other_trials_is_a_fold_whose_rows_know_labels_of_the_subject(tmp_path):
    names, subjects = ["C3", "C4"], ["s1", "s2", "s3"]
    train = store_of(tmp_path / "train.h5", subjects, names)
    trials = store_of(tmp_path / "trials.h5", subjects, names, first=20)
    data = protocol_table.labelled([train, trials])
    (split,) = folds = protocol_table.given_test(data, len(trials))
    assert split.test.tolist() == list(range(18, 36))
    assert sorted([*split.train, *split.val]) == list(range(18))
    assert protocol_table.trains_on_tested(data, folds)
    rows = protocol_table.frozen_rows(data, [train, trials], {}, folds, shots=None, resamples=10, say=lambda _: None)
    assert {row.knows for row in rows} == {"labelled windows"}
    assert rows[0].windows == 18
    touching = store_of(tmp_path / "touching.h5", subjects, names, first=6)
    with pytest.raises(ValueError, match=r"s1.*touch"):
        protocol_table.given_test(protocol_table.labelled([train, touching]), len(touching))


def test_windows_without_a_class_are_no_class(tmp_path):
    names = ["C3", "C4"]
    store = store_of(tmp_path / "1.h5", ["s1", "s2", "s3"], names, classes=None, labels=[-1, 1, 2, 1, 2, -1])
    data = protocol_table.labelled([store])
    assert (list(data.class_names), data.labels.tolist()) == (["1", "2"], [0, 1, 0, 1] * 3)
    kept = protocol_table.labelled_rows([store])
    np.testing.assert_array_equal(data.signal_uv, store.read(kept))
    np.testing.assert_array_equal(data.times.starts, kept % 6 * SAMPLES / SFREQ)
    rows = protocol_table.frozen_rows(
        data, [store], {}, protocol_table.folds_of(data, 3), shots=None, resamples=0, say=lambda _: None
    )
    assert rows[0].windows == 12
    assert "nan" not in protocol_table.markdown(rows)  # no intervals were asked for
    write_json([asdict(row) for row in rows], tmp_path / "rows.json")
    again = [protocol_table.Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())]
    assert protocol_table.markdown(again) == protocol_table.markdown(rows)
    with pytest.raises(ValueError, match="nothing to tell apart"):
        protocol_table.labelled([store_of(tmp_path / "2.h5", ["s1", "s2"], names, labels=[1] * 6)])


def test_a_recording_of_two_subjects_is_refused_whatever_it_is_called(tmp_path):
    subjects = ["s1", "s2", "s3", "s4"]
    how = {"shots": None, "resamples": 0, "say": lambda _: None}
    store = store_of(tmp_path / "1.h5", subjects, ["C3", "C4"], same={"s4": "s1"})
    data = protocol_table.labelled([store])
    with pytest.raises(ValueError, match=r"leakage.*same signal"):
        protocol_table.frozen_rows(data, [store], {}, protocol_table.folds_of(data, None), **how)
    store = store_of(tmp_path / "2.h5", subjects, ["C3", "C4"])
    data = replace(protocol_table.labelled([store]), recordings=np.repeat(["r1", "r2", "r3", "r1"], 6))
    with pytest.raises(ValueError, match=r"leakage: recording r1 in both"):
        protocol_table.frozen_rows(data, [store], {}, protocol_table.folds_of(data, None), **how)


def run_of(path, split, **sections):
    path.mkdir()
    write_yaml(from_mapping(sections, ExperimentConfig()), path / "config.yaml")
    (path / "split.json").write_text(json.dumps(split))
    return path


def test_what_an_encoder_has_seen_is_read_from_its_runs(tmp_path):
    assert protocol_table.pretraining_subjects(tmp_path) == (set(), False)
    lists = {"unit": "subject", "train": ["eegmat/Subject03"], "val": ["own"], "test": ["unseen"]}
    first = run_of(tmp_path / "first", lists)
    assert protocol_table.pretraining_subjects(first) == ({"eegmat/Subject03", "Subject03", "own"}, True)
    lists = {"unit": "subject", "train": ["later"], "val": [], "test": []}
    second = run_of(tmp_path / "second", lists, trainer={"init_from": str(first / "best")})
    found = protocol_table.pretraining_subjects(second / "best")
    assert found == ({"eegmat/Subject03", "Subject03", "own", "later"}, True)
    third = run_of(tmp_path / "third", lists, trainer={"init_from": str(tmp_path / "published.safetensors")})
    assert protocol_table.pretraining_subjects(third) == ({"later"}, False)


def test_what_a_division_in_time_has_seen_is_read_from_its_stores(tmp_path):
    store = store_of(tmp_path / "1.h5", ["s1", "s2"], ["C3", "C4"])
    rows = {"unit": "time", "num_windows": 12, "train": [0, 1, 6], "val": [4], "test": []}
    run = run_of(tmp_path / "run", rows, data={"train": [str(store.path)], "split_unit": "time"})
    assert protocol_table.pretraining_subjects(run) == ({"s1", "s2"}, True)
    (tmp_path / "1.h5").unlink()
    assert protocol_table.pretraining_subjects(run) == (set(), False)


def test_an_encoder_that_was_given_labels_of_test_subjects_knows_labels(tmp_path):
    store = store_of(tmp_path / "1.h5", ["s1", "s2", "s3"], ["C3", "C4"])
    data = protocol_table.labelled([store])
    config = LuMambaConfig(patch_size=20, embed_dim=16, num_queries=2, num_blocks=1)
    folds = protocol_table.folds_of(data, 3)
    how = {"shots": None, "resamples": 0, "say": lambda _: None, "baselines": False}
    for kind, seen, knows in (
        ("classify", {"s2"}, {"labelled windows"}),
        ("pretrain", {"s2"}, {"pre-training windows", "unlabelled windows"}),
        ("classify", {"other"}, {"nothing", "unlabelled windows"}),
    ):
        save_pretrained(tmp_path / kind, config, nnx.split(build(config, seed=0))[1], {"task": {"kind": kind}})
        model = {"model": load(tmp_path / kind)}
        rows = protocol_table.frozen_rows(data, [store], model, folds, seen={"model": seen}, **how)
        assert {row.knows for row in rows} == knows
