"""Scores against scikit-learn and by hand, the bootstrap against a plain loop, and merging against one pass."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from data_pipeline.loader import LoaderConfig, make_dataset
from data_pipeline.montages import montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax import metrics


def _softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _data(seed, n_classes, n=300, n_subjects=12, ties=True):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) + 1.2 * np.eye(n_classes)[labels] + rng.normal(size=(n, 1)) * 2
    if ties:
        logits = np.round(logits, 1)
    return logits, labels, rng.integers(0, n_subjects, n)


def _predictions(logits, labels, subject, recording=None):
    names = np.array([f"s{k}" for k in subject])
    recordings = names if recording is None else np.array([f"r{k}" for k in recording])
    return metrics.Predictions(logits, labels, np.arange(len(labels)), recordings, names)


def _calibration_error(p, y, bins=15):
    """Guo et al. 2017, window by window."""
    total, cells = 0.0, {}
    for row, label in zip(p, y, strict=True):
        confidence = row.max()
        own = next(k for k in range(bins) if confidence <= (k + 1) / bins or k == bins - 1)
        cells.setdefault(own, []).append((confidence, float(row.argmax() == label)))
    for members in cells.values():
        total += abs(sum(right for _, right in members) - sum(confidence for confidence, _ in members))
    return total / len(y)


def _binary_by_scikit_learn(logits, y):
    p, decided = _softmax(logits)[:, 1], logits.argmax(1)
    return {
        "accuracy": sk.accuracy_score(y, decided),
        "accuracy_reference": sk.accuracy_score(y, decided),
        "balanced_accuracy": sk.balanced_accuracy_score(y, decided),
        "recall": sk.recall_score(y, decided, average="macro"),
        "sensitivity": sk.recall_score(y, decided),
        "specificity": sk.recall_score(y, decided, pos_label=0),
        "precision": sk.precision_score(y, decided),
        "f1": sk.f1_score(y, decided),
        "f1_macro": sk.f1_score(y, decided, average="macro"),
        "f1_weighted": sk.f1_score(y, decided, average="weighted"),
        "kappa": sk.cohen_kappa_score(y, decided),
        "auroc": sk.roc_auc_score(y, p),
        "aupr": sk.average_precision_score(y, p),
        "auroc_reference": sk.roc_auc_score(y, logits[:, 1]),
        "aupr_reference": sk.average_precision_score(y, logits[:, 1]),
        "brier": sk.brier_score_loss(y, p),
    }


def _multiclass_by_scikit_learn(logits, y):
    p, decided, classes = _softmax(logits), logits.argmax(1), range(logits.shape[1])
    recall = sk.recall_score(y, decided, average="macro")
    return {
        "accuracy": sk.accuracy_score(y, decided),
        "accuracy_reference": sk.balanced_accuracy_score(y, decided),
        "balanced_accuracy": sk.balanced_accuracy_score(y, decided),
        "recall": recall,
        "precision": sk.precision_score(y, decided, average="macro"),
        "f1": sk.f1_score(y, decided, average="macro"),
        "f1_macro": sk.f1_score(y, decided, average="macro"),
        "f1_weighted": sk.f1_score(y, decided, average="weighted"),
        "kappa": sk.cohen_kappa_score(y, decided),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "aupr": np.mean([sk.average_precision_score(y == k, p[:, k]) for k in classes]),
        "brier": np.mean([sum((row[k] - (label == k)) ** 2 for k in classes) for row, label in zip(p, y, strict=True)]),
    }


def _assert_equal(ours, expected):
    assert ours.keys() == expected.keys() | {"ece"}
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=0, abs=1e-12), name


def test_binary_scores_equal_scikit_learn():
    logits, y, _ = _data(0, 2)
    ours = metrics.classification(logits, y)
    _assert_equal(ours, _binary_by_scikit_learn(logits, y))
    assert abs(ours["auroc"] - ours["auroc_reference"]) > 0.05  # the two definitions do differ here


def test_multiclass_scores_equal_scikit_learn():
    logits, y, _ = _data(1, 5)
    _assert_equal(metrics.classification(logits, y), _multiclass_by_scikit_learn(logits, y))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_calibration_error_equals_a_loop_over_windows(n_classes):
    logits, y, _ = _data(20, n_classes)
    p = _softmax(logits)
    assert metrics.classification(logits, y)["ece"] == pytest.approx(_calibration_error(p, y), rel=0, abs=1e-12)
    report = metrics.evaluate(_predictions(logits, y, np.arange(300) % 5), "classification", n_resamples=0)
    rows = report.levels["window"].reliability
    assert sum(row["n"] for row in rows) == 300
    from_table = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / 300
    assert from_table == pytest.approx(_calibration_error(p, y), abs=1e-12)
    assert all(row["low"] < row["confidence"] <= row["high"] for row in rows)


def test_calibration_by_hand():
    """Certain and always right: no error. Sure by 0.8 and right every second time: 0.3."""
    y = np.array([0, 1, 0, 1])
    assert metrics.classification(200.0 * np.eye(2)[y], y)["ece"] == 0
    half = metrics.classification(np.log(np.array([[0.8, 0.2]] * 4)), y)
    assert half["ece"] == pytest.approx(0.3)
    assert half["brier"] == pytest.approx((0.2**2 + 0.8**2) / 2)


@pytest.fixture(scope="module")
def store_of_61_windows(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "windows.h5"
    rng = np.random.default_rng(0)
    montage = montage_of(["C3", "C4"])
    with create_store(path, StoreInfo(sfreq=100.0, n_times=80, stride_seconds=0.8, class_names=list("abc"))) as writer:
        for subject, count in enumerate((19, 1, 30, 11)):
            about = {"subject": f"s{subject}", "recording": f"r{subject}", "start_samples": 80 * np.arange(count)}
            signal = rng.normal(size=(count, 2, 80))
            writer.add(f"g{subject}", signal, montage, **about, labels=rng.integers(0, 3, count))
    return WindowStore(path)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_scores_of_eight_shards_equal_scikit_learn_on_all_windows(store_of_61_windows, n_classes):
    """Eight hosts, uneven shards with filler rows as the loader makes them, merged out of order."""
    store = store_of_61_windows
    y = np.minimum(store.labels, n_classes - 1)
    logits = np.random.default_rng(5).normal(size=(61, n_classes)) + np.eye(n_classes)[y]
    config = LoaderConfig(batch_size=16, grouping="padded", reader_threads=0, patch_size=40).for_evaluation()
    parts, filler = [], 0
    for host in range(8):
        for batch in make_dataset([store], [np.arange(61)], config, host_index=host, host_count=8):
            ids = batch["window_id"]
            outputs = np.where(batch["window_mask"][:, None], logits[ids], 99.0)  # a filler row would be seen
            rows = metrics.Predictions(outputs, y[ids], ids, store.recordings[ids], store.subjects[ids])
            parts.append(rows.select(batch["window_mask"]))
            filler += int((~batch["window_mask"]).sum())
    assert filler == 3
    merged = metrics.Predictions.merge(parts[::-1])
    assert len(parts) == 32
    assert len(merged) == 61
    expected = (_binary_by_scikit_learn if n_classes == 2 else _multiclass_by_scikit_learn)(logits, y)
    _assert_equal(metrics.classification(merged.logits, merged.labels), expected)
    report = metrics.evaluate(merged, "classification", n_resamples=0)
    for name, value in expected.items():
        assert report.levels["window"].metrics[name].value == pytest.approx(value, rel=0, abs=1e-12), name


def test_small_binary_case_by_hand():
    # p(class 1) = 0.8, 0.6, 0.4, 0.2 for labels 1, 0, 1, 0: 3 of 4 pairs in order, precision 1 then 2/3
    logits = np.log(np.array([[0.2, 0.8], [0.4, 0.6], [0.6, 0.4], [0.8, 0.2]]))
    scores = metrics.classification(logits, np.array([1, 0, 1, 0]))
    assert scores["auroc"] == pytest.approx(0.75)
    assert scores["aupr"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["balanced_accuracy"] == pytest.approx(0.5)
    assert scores["kappa"] == pytest.approx(0.0)


def test_one_logit_is_class_one_and_equal_scores_give_one_half():
    y = np.array([0, 1, 0, 1])
    assert metrics.classification(np.array([[-1.0], [2.0], [-0.5], [0.3]]), y)["auroc"] == 1.0
    assert metrics.classification(np.zeros((4, 1)), y)["auroc"] == 0.5


def test_missing_class_is_left_out_and_said():
    logits, y, subject = _data(2, 4)
    y = np.where(y == 3, 0, y)
    ours = metrics.classification(logits, y)
    p = _softmax(logits)
    areas = [sk.roc_auc_score(y == k, p[:, k]) for k in range(3)]
    assert ours["auroc"] == pytest.approx(np.mean(areas), rel=0, abs=1e-12)
    recalls = [np.mean(logits[y == k].argmax(1) == k) for k in range(3)]
    assert ours["balanced_accuracy"] == pytest.approx(np.mean(recalls), rel=0, abs=1e-12)
    report = metrics.evaluate(_predictions(logits, y, subject), "classification", class_names=list("wxyz"))
    assert report.levels["window"].notes == ["no samples of z: left out of means over classes"]
    assert report.levels["window"].metrics["auroc"].low > 0.5


def test_one_class_only_has_no_auroc_but_an_accuracy():
    scores = metrics.classification(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
    assert np.isnan(scores["auroc"])
    assert scores["accuracy"] == 0.5


def test_unlabelled_rows_and_per_channel_decisions():
    logits, y, _ = _data(3, 3, n=60)
    by_channel = metrics.classification(logits.reshape(20, 3, 3), y.reshape(20, 3))
    assert by_channel == metrics.classification(logits, y)
    hidden = np.where(np.arange(60) < 10, -1, y)
    assert metrics.classification(logits, hidden) == metrics.classification(logits[10:], y[10:])
    with pytest.raises(ValueError, match="no labelled window"):
        metrics.classification(logits, np.full(60, -1))
    with pytest.raises(ValueError, match="label 3 does not exist in a model of 3 classes"):
        metrics.classification(logits, y + 1)


def test_multilabel_equals_scikit_learn_per_output():
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, (200, 3)).astype(np.float64)
    logits = rng.normal(size=(200, 3)) + y
    ours = metrics.multilabel(logits, y)
    p = 1 / (1 + np.exp(-logits))
    expected = {
        "accuracy": np.mean((logits > 0) == (y > 0)),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(y[:, k], logits[:, k] > 0) for k in range(3)]),
        "f1": sk.f1_score(y, logits > 0, average="macro"),
        "kappa": np.mean([sk.cohen_kappa_score(y[:, k], logits[:, k] > 0) for k in range(3)]),
        "auroc": sk.roc_auc_score(y, logits),
        "aupr": sk.average_precision_score(y, logits),
        "brier": np.mean([sk.brier_score_loss(y[:, k], p[:, k]) for k in range(3)]),
    }
    _assert_equal(ours, expected)


def test_outputs_with_one_label_only_are_left_out_of_means_and_said():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, (60, 4)).astype(np.float64)
    y[:, 1], y[:, 3] = 0, 1
    logits, names = rng.normal(size=(60, 4)), np.array([f"s{k % 5}" for k in range(60)])

    def window(columns):
        found = metrics.Predictions(logits[:, columns], y[:, columns], np.arange(60), names, names)
        own = ["wxyz"[k] for k in columns]
        return metrics.evaluate(found, "multilabel", class_names=own, n_resamples=0).levels["window"]

    all_four = window([0, 1, 2, 3])
    assert all_four.metrics["auroc"].value == pytest.approx(sk.roc_auc_score(y[:, [0, 2]], logits[:, [0, 2]]))
    (note,) = all_four.notes
    assert note.startswith("one label only at x, z: left out of means")
    assert window([0, 2]).notes == []
    (note,) = window([1, 3]).notes
    assert note.startswith("no output has both labels")


def test_two_logits_per_output_are_scored_as_independent_outputs():
    rng = np.random.default_rng(21)
    y = rng.integers(0, 2, (60, 4))
    logits = rng.normal(size=(60, 4, 2))
    names = np.array([f"s{k % 5}" for k in range(60)])
    both = metrics.as_multilabel(metrics.Predictions(logits, y, np.arange(60), names, names))
    report = metrics.evaluate(both, "multilabel", class_names=list("wxyz"), n_resamples=0)
    difference = logits[..., 1] - logits[..., 0]
    window = report.levels["window"]
    assert window.metrics["auroc"].value == pytest.approx(sk.roc_auc_score(y, difference), rel=0, abs=1e-12)
    assert [row["name"] for row in window.per_class] == list("wxyz")
    assert window.per_class[2]["aupr"] == pytest.approx(
        sk.average_precision_score(y[:, 2], difference[:, 2]), abs=1e-12
    )


def test_regression_equals_scikit_learn():
    rng = np.random.default_rng(5)
    y = rng.normal(50, 3, (200, 4))
    p = y + rng.normal(0, 2, (200, 4)) + np.arange(4)
    ours = metrics.regression(p, y)
    assert ours["r2"] == pytest.approx(sk.r2_score(y, p), rel=0, abs=1e-12)
    assert ours["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(y, p)), rel=0, abs=1e-12)
    pearson = np.mean([np.corrcoef(y[:, k], p[:, k])[0, 1] for k in range(4)])
    assert ours["pearson"] == pytest.approx(pearson, rel=0, abs=1e-12)
    names = np.array([f"s{k % 5}" for k in range(200)])
    report = metrics.evaluate(metrics.Predictions(p, y, np.arange(200), names, names), "regression", n_resamples=0)
    for k, row in enumerate(report.levels["window"].per_class):
        assert row["r2"] == pytest.approx(sk.r2_score(y[:, k], p[:, k]), rel=0, abs=1e-12)
    own = names == "s3"
    subject = next(row for row in report.subjects if row["subject"] == "s3")
    assert subject["r2"] == pytest.approx(sk.r2_score(y[own], p[own]), rel=0, abs=1e-12)


def test_pearson_of_the_published_code_is_a_mean_over_growing_prefixes():
    rng = np.random.default_rng(22)
    y = rng.normal(size=(1200, 2)) + np.linspace(0, 5, 1200)[:, None]
    p = y + 2 * rng.normal(size=(1200, 2))
    prefixes = [metrics.regression(p[:stop], y[:stop])["pearson"] for stop in (512, 1024, 1200)]
    assert metrics.pearson_reference(p, y) == pytest.approx(np.mean(prefixes), abs=1e-12)
    assert abs(np.mean(prefixes) - prefixes[-1]) > 0.01
    names = np.array(["a", "b"] * 600)
    report = metrics.evaluate(metrics.Predictions(p, y, np.arange(1200), names, names), "regression", n_resamples=10)
    assert report.levels["window"].metrics["pearson_reference"].value == pytest.approx(np.mean(prefixes), abs=1e-12)


def test_constant_columns_give_zero_pearson_and_a_warning():
    y = np.random.default_rng(6).normal(size=(20, 2))
    constant_output = y.copy()
    constant_output[:, 1] = 0.1
    with pytest.warns(RuntimeWarning, match=r"outputs \[1\] are constant"):
        assert metrics.regression(constant_output, y)["pearson"] == pytest.approx(0.5)
    constant_target = y.copy()
    constant_target[:, 0] = 7.0
    with pytest.warns(RuntimeWarning, match=r"targets \[0\] are constant"):
        scores = metrics.regression(y, constant_target)
    assert scores["pearson"] == pytest.approx(0.5)
    assert scores["r2"] == 1.0


@pytest.mark.parametrize("n_classes", [2, 3])
def test_vectorised_bootstrap_equals_a_loop_over_duplicated_windows(n_classes):
    logits, y, subject = _data(7, n_classes, n=120, n_subjects=6)
    names = np.unique(subject)
    weights = metrics._Weights.bootstrap(subject, 20, seed=1)
    probabilities = _softmax(logits)
    ours = metrics._classification_scores(probabilities, y, weights, logits[:, -1])
    for r, drawn in enumerate(weights.of_group.astype(int)):
        assert drawn.sum() == len(names)
        rows = np.concatenate(
            [np.flatnonzero(subject == s) for s, k in zip(names, drawn, strict=True) for _ in range(k)]
        )
        expected = metrics.classification(logits[rows], y[rows])
        for name, value in expected.items():
            assert ours[name][r] == pytest.approx(value, abs=1e-12), name


def test_regression_bootstrap_equals_a_loop():
    rng = np.random.default_rng(8)
    y, subject = rng.normal(size=(80, 2)) + 1e3, rng.integers(0, 5, 80)
    p = y + rng.normal(size=(80, 2))
    weights = metrics._Weights.bootstrap(subject, 10, seed=0)
    ours = metrics._regression_scores(p, y, weights)
    for r, drawn in enumerate(weights.of_group.astype(int)):
        rows = np.concatenate([np.flatnonzero(subject == s) for s in range(5) for _ in range(drawn[s])])
        for name, value in metrics.regression(p[rows], y[rows]).items():
            assert ours[name][r] == pytest.approx(value, abs=1e-9), name


def test_ranking_in_chunks_is_the_same(monkeypatch):
    logits, y, subject = _data(9, 2, n=100)
    weights = metrics._Weights.bootstrap(subject, 50, seed=0)
    whole = metrics._ranking(logits[:, 1], y == 1, weights)
    monkeypatch.setattr(metrics, "_CHUNK", 700)
    np.testing.assert_array_equal(metrics._ranking(logits[:, 1], y == 1, weights), whole)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Binary decisions that are right with probability 0.7, subjects independent: 95 % intervals of the accuracy."""
    covered = 0
    for trial in range(60):
        rng = np.random.default_rng(100 + trial)
        y = rng.integers(0, 2, 400)
        decided = np.where(rng.random(400) < 0.7, y, 1 - y)
        logits = np.eye(2)[decided]
        report = metrics.evaluate(
            _predictions(logits, y, np.repeat(np.arange(40), 10)), "classification", n_resamples=200
        )
        accuracy = report.levels["window"].metrics["accuracy"]
        covered += accuracy.low <= 0.7 <= accuracy.high
    assert 50 <= covered <= 60


def test_degenerate_resamples_are_dropped_and_counted():
    """Two subjects, one class each: half of the resamples hold one class only."""
    logits = np.array([[1.0, 0], [0.4, 0.6], [0, 1.0], [0.6, 0.4]])
    report = metrics.evaluate(
        _predictions(logits, np.array([0, 0, 1, 1]), [0, 0, 1, 1]), "classification", n_resamples=400
    )
    window = report.levels["window"]
    assert 150 < window.dropped_resamples < 250
    assert window.metrics["auroc"].low == window.metrics["auroc"].value == window.metrics["auroc"].high


def test_recording_level_is_the_mean_probability_and_is_not_the_mean_logit():
    logits = np.array([[0.0, 9.0], [0.5, 0.0], [0.5, 0.0], [0.0, 0.2], [1.0, 0.0]])
    y = np.array([0, 0, 0, 1, 1])
    report = metrics.evaluate(_predictions(logits, y, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]), "classification")
    first, second = _softmax(logits)[:3, 1].mean(), _softmax(logits)[3:, 1].mean()
    assert first > 0.5 > second
    recording = report.levels["recording"]
    assert recording.n_units == 2
    assert recording.metrics["accuracy"].value == 0.0
    assert recording.confusion.tolist() == [[0, 1], [1, 0]]


def test_same_recording_name_of_two_subjects_stays_two_recordings():
    logits = np.eye(2)[[0, 0, 1, 1]]
    report = metrics.evaluate(
        _predictions(logits, np.array([0, 0, 1, 1]), [0, 0, 1, 1], [5, 5, 5, 5]), "classification"
    )
    assert report.levels["recording"].n_units == 2


def test_level_with_mixed_labels_is_left_out_with_a_note():
    logits, y, _ = _data(10, 2, n=40)
    report = metrics.evaluate(
        _predictions(logits, np.sort(y), np.arange(40) // 20, np.arange(40) // 2), "classification"
    )
    assert "subject" not in report.levels
    assert any(note.startswith("no subject level: ") for note in report.notes)


def test_merge_does_not_depend_on_the_split_and_counts_fillers_once():
    logits, y, subject = _data(11, 3, n=90)
    whole = _predictions(logits, y, subject)
    order = np.random.default_rng(0).permutation(90)
    parts = [whole.select(order[i : i + 16]) for i in range(0, 90, 16)]
    parts.append(whole.select(order[:5]))  # rows that a last batch repeats
    merged = metrics.Predictions.merge(parts)
    for field in ("logits", "labels", "window_id", "recording", "subject"):
        np.testing.assert_array_equal(getattr(merged, field), getattr(whole, field))
    assert metrics.evaluate(merged, "classification").to_dict() == metrics.evaluate(whole, "classification").to_dict()


def test_bad_predictions_are_named():
    logits, y, subject = _data(12, 2, n=10)
    good = _predictions(logits, y, subject)
    with pytest.raises(ValueError, match="disagree on its labels"):
        metrics.Predictions.merge([good, _predictions(logits, 1 - y, subject)])
    with pytest.raises(ValueError, match="no predictions to merge"):
        metrics.Predictions.merge([])
    logits[3, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 10 predictions are not finite"):
        _predictions(logits, y, subject)
    with pytest.raises((ValueError, TypeError), match="labels"):
        metrics.Predictions(good.logits, y[:-1], good.window_id, good.recording, good.subject)
    with pytest.raises(ValueError, match="3 class names for a model of 2 outputs"):
        metrics.evaluate(good, "classification", class_names=["a", "b", "c"])


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_report_is_json_and_a_table(kind):
    rng = np.random.default_rng(13)
    logits, subject = rng.normal(size=(60, 2)), np.arange(60) // 10
    labels = subject % 2 if kind == "classification" else (logits + rng.normal(size=(60, 2)) > 0).astype(np.float64)
    report = metrics.evaluate(_predictions(logits, labels, subject), kind, n_resamples=50)
    restored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    name = "rmse" if kind == "regression" else "auroc"
    estimate = restored["levels"]["window"]["metrics"][name]
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    table = metrics.format_table(report)
    assert f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in table
    assert "window (n=60)" in table


def test_single_subject_has_no_interval_and_says_so():
    logits, y, _ = _data(14, 2, n=20)
    report = metrics.evaluate(_predictions(logits, y, np.zeros(20, int)), "classification")
    assert np.isnan(report.levels["window"].metrics["auroc"].low)
    assert "no intervals: resampling subjects needs at least two" in report.notes


def test_tables_of_classes_and_subjects_equal_scikit_learn():
    logits, y, subject = _data(15, 3)
    report = metrics.evaluate(
        _predictions(logits, y, subject), "classification", class_names=list("abc"), n_resamples=0
    )
    p = _softmax(logits)
    for k, row in enumerate(report.levels["window"].per_class):
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(y == k, p[:, k]), rel=0, abs=1e-12)
        assert row["aupr"] == pytest.approx(sk.average_precision_score(y == k, p[:, k]), rel=0, abs=1e-12)
    assert sum(row["n"] for row in report.subjects) == 300
    own = subject == 7
    row = next(row for row in report.subjects if row["subject"] == "s7")
    assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y[own], logits[own].argmax(1)))
    assert row["label"] is None
    assert row["decided"] == "abc"[p[own].mean(0).argmax()]


def test_runs_are_averaged_on_the_same_windows_only():
    reports, runs = [], {}
    _, y, subject = _data(16, 2)
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(size=(300, 2)) + np.eye(2)[y]
        runs[f"run {seed}"] = _predictions(logits, y, subject)
        reports.append(metrics.evaluate(runs[f"run {seed}"], "classification", n_resamples=0))
    metrics.require_same_windows(runs)
    spread = metrics.over_runs(reports)["window"]["auroc"]
    values = [sk.roc_auc_score(y, _softmax(run.logits)[:, 1]) for run in runs.values()]
    assert spread.values == pytest.approx(values, abs=1e-12)
    mean = sum(values) / 3
    assert spread.mean == pytest.approx(mean)
    assert spread.sd == pytest.approx((sum((value - mean) ** 2 for value in values) / 2) ** 0.5)
    assert np.isnan(metrics.over_runs(reports[:1])["window"]["auroc"].sd)
    runs["other"] = runs["run 0"].select(np.arange(200))
    with pytest.raises(ValueError, match="other and run 0 were not scored on the same windows"):
        metrics.require_same_windows(runs)
