"""The table of protocols: divisions it may use, several stores, what an encoder has seen."""

import json

import numpy as np
import pytest

from configs import protocol_table
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store

SFREQ, SAMPLES = 100, 100


def store_of(path, subjects, names, *, classes=("a", "b"), first=0):
    """Six contiguous windows of each subject, from the window number `first` of its recording on."""
    rng = np.random.default_rng(0)
    with create_store(path, StoreInfo(SFREQ, SAMPLES, SAMPLES / SFREQ, class_names=list(classes))) as writer:
        for number, subject in enumerate(subjects):
            signal = rng.normal(0, 20, (6, len(names), SAMPLES)).astype(np.float32)
            labels = np.arange(6) % 2
            who = {"subject": subject, "recording": subject, "start_samples": (first + np.arange(6)) * SAMPLES}
            writer.add(f"g{number}", signal, montage_of(names), labels=labels, **who)
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


def test_what_an_encoder_has_seen_is_read_from_its_run(tmp_path):
    assert protocol_table.pretraining_subjects(tmp_path) is None
    lists = {"unit": "subject", "train": ["eegmat/Subject03"], "val": ["own"], "test": ["unseen"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    assert protocol_table.pretraining_subjects(tmp_path) == {"eegmat/Subject03", "Subject03", "own"}
