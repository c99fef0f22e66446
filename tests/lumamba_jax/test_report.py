"""The report: every section has its figures, nothing comes from outside the file, and thin data does not break it."""

import base64
import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lumamba_jax import report as page
from lumamba_jax.metrics import Estimate, Predictions, evaluate
from lumamba_jax.report import (
    AttentionMap,
    Decisions,
    EmbeddingMaps,
    Estimates,
    LossCurves,
    Reconstruction,
    RunReport,
    write_report,
)

SITES = {  # metres, head frame
    "FP1": (-0.03, 0.11, 0.03), "FP2": (0.03, 0.11, 0.03), "F3": (-0.05, 0.08, 0.08), "F4": (0.05, 0.08, 0.08),
    "C3": (-0.065, 0.01, 0.1), "C4": (0.065, 0.01, 0.1), "CZ": (0.0, 0.01, 0.14), "P3": (-0.05, -0.06, 0.1),
    "P4": (0.05, -0.06, 0.1), "O1": (-0.03, -0.1, 0.04), "O2": (0.03, -0.1, 0.04),
}  # fmt: skip


def _window(ch_names, rng, *, quality=0.8) -> Reconstruction:
    time = np.arange(640) / 256
    signal = 20 * np.sin(2 * np.pi * 10 * time + rng.uniform(0, 6, (len(ch_names), 1)))
    hidden = np.repeat(rng.random((len(ch_names), 16)) < 0.5, 40, axis=1)
    return Reconstruction(signal + 5, quality * signal + 5, hidden, 256.0, ch_names)


def _report(rng, ch_names=tuple(SITES), *, labels=None, classes=("rest", "task"), queries=2) -> RunReport:
    n = 60
    labels = rng.integers(len(classes), size=n) if labels is None else labels
    subjects = np.array([f"s{i % 4}" for i in range(n)])
    logits = 2.0 * np.eye(len(classes))[labels] + rng.normal(size=(n, len(classes)))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predictions = Predictions(logits, labels, np.arange(n), subjects, subjects)
    scores = evaluate(predictions, "classification", n_resamples=50).levels["window"].metrics
    shown = {name: scores[name] for name in ("balanced_accuracy", "auroc")}
    steps = np.arange(5, 101, 5)
    locations = np.array([SITES.get(name, (0.01 * i, 0.0, 0.12)) for i, name in enumerate(ch_names)])
    curves = {"train": (steps, 1 / steps), "validation": (steps[::4], 1.2 / steps[::4])}
    return RunReport(
        title="A run <of> the model",
        facts={"subjects": "4 & more"},
        steps=[("prepare", 3.2), ("pre-train", 61.0)],
        scores={"LuMamba": shown, "band power": {"auroc": Estimate(0.61)}},
        losses=[LossCurves("Pre-training", curves, best_step=85), LossCurves("Fine-tuning", curves)],
        reconstruction=_window(ch_names, rng),
        attention=[AttentionMap("cap", rng.dirichlet(np.ones(len(ch_names)), queries), locations, ch_names)],
        outcome=Decisions(labels, classes, {"LuMamba": probabilities, "band power": probabilities[::-1]}),
        embeddings=EmbeddingMaps(
            {"before": rng.normal(size=(n, 8)), "after": logits @ rng.normal(size=(len(classes), 8))},
            subjects,
            labels,
            classes,
        ),
    )


def _sections(text: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', text, flags=re.DOTALL))


def _images(text: str) -> list[ET.Element]:
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    return [ET.fromstring(base64.b64decode(data)) for data in found]


def _written(report: RunReport, path) -> str:
    return write_report(report, path / "report.html").read_text()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_every_section_holds_its_figures(rng, tmp_path):
    sections = _sections(_written(_report(rng), tmp_path))
    figures = {name: len(_images(content)) for name, content in sections.items()}
    assert figures == {
        "summary": 0,
        "scores": 0,
        "decisions-on-the-test-windows": 3,  # two confusion matrices and the ROC
        "training": 2,
        "masked-reconstruction": 1,
        "where-the-queries-look": 3,  # two queries and the colour scale
        "embeddings": 4,  # two moments, by class and by subject
    }
    for image in _images("".join(sections.values())):
        assert len(list(image.iter("{http://www.w3.org/2000/svg}path"))) > 5


def test_the_page_needs_nothing_outside_itself(rng, tmp_path):
    text = _written(_report(rng), tmp_path)
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!data:|#)', text)
    assert not re.findall(r"<script|<link|@import|url\(", text)
    for image in _images(text):
        for element in image.iter():
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(value.startswith(("#", "data:")) for value in links)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first = _written(_report(np.random.default_rng(3)), tmp_path)
    assert first == _written(_report(np.random.default_rng(3)), tmp_path)


def test_text_of_the_user_is_escaped_and_scores_show_their_intervals(rng, tmp_path):
    report = dataclasses.replace(
        _report(rng), scores={"ours": {"auroc": Estimate(0.8123, 0.7, 0.9)}, "<b>": {"kappa": Estimate(0.25)}}
    )
    text = _written(report, tmp_path)
    assert "A run &lt;of&gt; the model" in text
    assert "4 &amp; more" in text
    rows = re.findall(r"<tr>(.*?)</tr>", _sections(text)["scores"])
    assert "&lt;b&gt;" in rows[0]
    assert "0.812" in rows[1]
    assert "[0.700, 0.900]" in rows[1]
    assert rows[1].endswith('<td class="number">–</td>')  # the second model has no AUROC
    assert "0.250</td>" in rows[2]


def test_the_explained_share_counts_hidden_samples_only(rng):
    window = _window(("C3", "C4"), rng, quality=0.5)
    assert page._explained(window) == pytest.approx(0.75, abs=1e-6)  # the residual has half the amplitude
    perfect_where_seen = np.where(window.hidden, 5.0, window.signal_uv)
    blind = dataclasses.replace(window, reconstruction_uv=perfect_where_seen)
    assert page._explained(blind) == pytest.approx(0.0, abs=0.01)


def test_neighbours_are_counted_within_and_across_subjects():
    subjects = np.repeat(["a", "b", "c"], 6)
    labels = np.tile([0, 1], 9)
    by_subject = np.eye(3)[np.repeat([0, 1, 2], 6)] + 1e-3 * np.arange(18)[:, None]
    text = page._neighbours(by_subject, EmbeddingMaps({}, subjects, labels, ("x", "y")))
    assert "100 % are of the same subject" in text
    by_class = 10.0 * np.eye(2)[labels] + 1e-3 * np.random.default_rng(0).normal(size=(18, 2))
    text = page._neighbours(by_class, EmbeddingMaps({}, subjects, labels, ("x", "y")))
    assert "of other subjects, 100 % share the class" in text


@pytest.mark.parametrize(
    ("names", "interpolates"),
    [
        (tuple(SITES), True),
        (("CZ",), False),
        (("C3", "C4"), False),
        (("FP1-F7", "F7-T3", "T3-T5", "T5-O1", "FP2-F8", "F8-T4", "T4-T6", "T6-O2", "C3-CZ"), False),  # on one line
        ((*SITES, "CZ-COPY"), False),
    ],
)
def test_maps_of_any_montage(names, interpolates, rng, tmp_path):
    report = _report(rng, names)
    if "CZ-COPY" in names:  # two bipolar channels may have one midpoint
        locations = report.attention[0].locations.copy()
        locations[-1] = locations[names.index("CZ")]
        report = dataclasses.replace(report, attention=[dataclasses.replace(report.attention[0], locations=locations)])
    assert page._can_interpolate(report.attention[0].locations) == interpolates
    sections = _sections(_written(report, tmp_path))
    assert len(_images(sections["where-the-queries-look"])) == 3
    assert len(_images(sections["masked-reconstruction"])) == 1


def test_one_class_in_the_test_set_has_no_roc_but_a_report(rng, tmp_path):
    report = _report(rng, labels=np.zeros(60, dtype=int))
    section = _sections(_written(report, tmp_path))["decisions-on-the-test-windows"]
    assert len(_images(section)) == 2
    assert "one class" in section


def test_many_classes_and_regressions(rng, tmp_path):
    classes = tuple(f"stage {k}" for k in range(14))
    many = _sections(_written(_report(rng, classes=classes), tmp_path))
    assert len(_images(many["decisions-on-the-test-windows"])) == 3
    targets = rng.normal(size=(60, 2))
    ages = dataclasses.replace(
        _report(rng),
        outcome=Estimates(targets, {"LuMamba": targets + 0.1, "band power": 0 * targets}),
        embeddings=EmbeddingMaps({"after": rng.normal(size=(60, 4))}, np.repeat(["a", "b"], 30), targets[:, 0]),
    )
    found = _sections(_written(ages, tmp_path))
    assert len(_images(found["decisions-on-the-test-windows"])) == 2
    assert "share the class" not in found["embeddings"]


@pytest.mark.parametrize("windows", [1, 3, 25])
def test_few_windows_and_unlabelled_ones_have_a_map(windows, rng, tmp_path):
    maps = EmbeddingMaps({"after": np.ones((windows, 4))}, np.array(["only"] * windows))
    sections = _sections(_written(RunReport("few", embeddings=maps), tmp_path))
    assert list(sections) == ["embeddings"]
    assert len(_images(sections["embeddings"])) == 1


def test_arrays_that_do_not_belong_together_are_refused_and_nothing_is_written(rng, tmp_path):
    good = _report(rng)
    broken = [
        {"reconstruction": dataclasses.replace(good.reconstruction, ch_names=("C3",))},
        {"attention": [dataclasses.replace(good.attention[0], ch_names=("C3",))]},
        {"outcome": dataclasses.replace(good.outcome, probabilities={"LuMamba": np.ones((3, 2))})},
        {"outcome": Estimates(np.ones((5, 1)), {"LuMamba": np.ones((4, 1))})},
        {"embeddings": dataclasses.replace(good.embeddings, subjects=np.array(["a"]))},
    ]
    for change in broken:
        with pytest.raises(ValueError, match=r"need|belong|targets"):
            write_report(dataclasses.replace(good, **change), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
