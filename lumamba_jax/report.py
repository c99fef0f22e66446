"""One self-contained HTML page about a run: scores, losses, reconstruction, attention, decisions, embeddings.

Arrays in, one file out: figures are inline SVG images, nothing is loaded from the network, and the page reads on a
phone. Every part that is given becomes a section; a part that cannot be drawn (an ROC curve of one class) says why.
"""

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from lumamba_jax.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito, readable with every kind of colour vision
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a5195", "#8c8c00")
_INK, _GREY, _SHADE = "#24292f", "#8b949e", "#e7ecf1"
_SCORE_NAMES = {"auroc": "AUROC", "aupr": "AUPR", "kappa": "Cohen's kappa", "f1_weighted": "weighted F1"}
_SCORE_NAMES |= {"r2": "R²", "rmse": "RMSE", "pearson": "Pearson r"}
_SHOWN_CHANNELS = 8
_PIXELS_PER_INCH = 96  # of panels on the page: their text has one size wherever there is room
_MERGED_M = 0.004  # electrodes closer than this on the map are one place, which no interpolation survives
_NEIGHBOURS = 5


# --- what a report is made of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCurves:
    """Losses of one training run: name ("train", "validation") -> (steps, losses); `best_step` is marked."""

    title: str
    curves: Mapping[str, tuple[Shaped[np.ndarray, "n"], Shaped[np.ndarray, "n"]]]
    best_step: int | None = None


@dataclass(frozen=True)
class Reconstruction:
    """One window, what the model made of it, and which samples it could not see (True); microvolts."""

    signal_uv: Float[np.ndarray, "C T"]
    reconstruction_uv: Float[np.ndarray, "C T"]
    hidden: Bool[np.ndarray, "C T"]
    sfreq: float
    ch_names: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class AttentionMap:
    """Mean attention of each learned query to the channels of one montage (rows sum to 1); metres, head frame."""

    montage: str
    weights: Float[np.ndarray, "Q C"]
    locations: Float[np.ndarray, "C 3"]
    ch_names: Sequence[str]


@dataclass(frozen=True)
class Decisions:
    """True classes of the test windows, and the probabilities `(n, K)` of each model by name, ours first."""

    labels: Int[np.ndarray, "n"]
    class_names: Sequence[str]
    probabilities: Mapping[str, Float[np.ndarray, "n K"]]


@dataclass(frozen=True)
class Estimates:
    """True values `(n, K)` of a regression, and the predictions `(n, K)` of each model by name, ours first."""

    targets: Float[np.ndarray, "n K"]
    predictions: Mapping[str, Float[np.ndarray, "n K"]]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the rows, numbers are the caller's to format."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Reliability:
    """How often decisions of a given probability are right: rows of `metrics.LevelReport.reliability`, and the expected
    calibration error, of each model by name."""

    bins: Mapping[str, Sequence[Mapping[str, float]]]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class SubjectScores:
    """One score of every subject by name, of each model by name; NaN where it is not defined."""

    metric: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EmbeddingMaps:
    """Embeddings `(n, M)` of the same windows at several moments, by name.

    Attributes:
        embeddings: moment -> array; one map each.
        subjects: `(n,)` subject of each window.
        labels: `(n,)` class numbers, or floats of a regression; None = windows without labels.
        class_names: names of the classes.
        caption: which windows these are.
    """

    embeddings: Mapping[str, Float[np.ndarray, "n M"]]
    subjects: Shaped[np.ndarray, "n"]
    labels: Shaped[np.ndarray, "n"] | None = None
    class_names: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class RunReport:
    """The content of the page; empty parts are left out.

    Attributes:
        title: of the page.
        facts: the run in a few lines, name -> text.
        steps: what was run, (name, seconds).
        scores: model -> score -> value and interval; ours first, then baselines.
        scores_note: what the scores were computed on.
        losses: one figure each.
        reconstruction, attention, outcome, reliability, subjects, embeddings: see their classes.
        tables: title -> table, each a section of its own.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[tuple[str, float]] = ()
    scores: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    scores_note: str = ""
    losses: Sequence[LossCurves] = ()
    reconstruction: Reconstruction | None = None
    attention: Sequence[AttentionMap] = ()
    outcome: Decisions | Estimates | None = None
    reliability: Reliability | None = None
    subjects: SubjectScores | None = None
    embeddings: EmbeddingMaps | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)


def write_report(report: RunReport, path: str | Path) -> Path:
    """Draw the figures and write the page; complete or not at all. Returns its path.

    Raises: ValueError for arrays whose lengths do not belong together.
    """
    import matplotlib as mpl

    path = Path(path)
    with mpl.rc_context(_style()):
        sections = [
            ("Summary", _summary(report)),
            ("Scores", _scores(report.scores, report.scores_note)),
            *((title, _text_table(table)) for title, table in report.tables.items()),
            ("Decisions on the test windows", _outcome(report.outcome)),
            ("Calibration", _reliability(report.reliability)),
            ("Subjects", _subjects(report.subjects)),
            ("Training", _training(report.losses)),
            ("Masked reconstruction", _reconstruction(report.reconstruction)),
            ("Where the queries look", _attention(report.attention)),
            ("Embeddings", _embeddings(report.embeddings)),
        ]
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{html.escape(title)}</h2>{content}</section>'
        for title, content in sections
        if content
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(_PAGE.format(title=html.escape(report.title), css=_CSS, body=body), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


# --- the page ---------------------------------------------------------------------------------------------------------

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: #fff; color: #24292f;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.6rem; padding-bottom: 0.3rem; border-bottom: 1px solid #d8dee4; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.2rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
p.note, figcaption { color: #57606a; font-size: 0.9rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
.scroll { overflow-x: auto; }
figure { margin: 0.6rem 0; max-width: 100%; }
figure.panel { flex: 0 1 auto; }
figure.map { flex: 0 1 9.5rem; }
figure.wide img { min-width: 40rem; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; margin: 0.6rem 0; font-size: 0.95rem; }
th, td { text-align: left; padding: 0.3rem 1.2rem 0.3rem 0; border-bottom: 1px solid #eaeef2; vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td .interval { color: #57606a; font-size: 0.85rem; }
@media (max-width: 30rem) {
  figure.map { flex-basis: calc(50% - 0.75rem); }
  td .interval { display: block; }
  th, td { padding-right: 0.8rem; }
}
"""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; every column but the first holds numbers when there is a header."""
    kind = ' class="number"' if header else ""
    head = "".join(f"<th{kind if i else ''}>{cell}</th>" for i, cell in enumerate(header))
    cells = ["".join(f"<td{kind if i else ''}>{cell}</td>" for i, cell in enumerate(row)) for row in rows]
    top = f"<tr>{head}</tr>" if header else ""
    return f'<div class="scroll"><table>{top}{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _figure(
    size: tuple[float, float],
    alt: str,
    draw: Callable[..., None],
    *arguments: object,
    kind: str = "panel",
    caption: str = "",
) -> str:
    """`draw(axes, *arguments)` on axes of `size` inches, as HTML; `kind` is its CSS class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot(), *arguments)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{html.escape(alt, quote=True)}" src="data:image/svg+xml;base64,{data}">'
    if kind == "wide":
        image = f'<div class="scroll">{image}</div>'
    width = f' style="flex-basis: {_PIXELS_PER_INCH * size[0]:.0f}px"' if kind == "panel" else ""
    return f'<figure class="{kind}"{width}>{image}{below}</figure>'


def _style() -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same page everywhere
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
        "axes.labelcolor": _INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#eaeef2",
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "path",
        "svg.hashsalt": "lumamba_jax",
        "path.simplify_threshold": 0.3,
    }


# --- summary and scores -----------------------------------------------------------------------------------------------


def _summary(report: RunReport) -> str:
    facts = [(f"<b>{html.escape(name)}</b>", html.escape(text)) for name, text in report.facts.items()]
    steps = [(html.escape(name), f"{seconds:.0f} s") for name, seconds in report.steps]
    if steps:
        steps.append(("<b>total</b>", f"<b>{sum(seconds for _, seconds in report.steps):.0f} s</b>"))
    tables = (_table((), facts) if facts else "") + (_table(("step", "time"), steps) if steps else "")
    return f'<div class="columns">{tables}</div>' if tables else ""


def _scores(scores: Mapping[str, Mapping[str, Estimate]], note: str) -> str:
    names = list(dict.fromkeys(name for model in scores.values() for name in model))
    if not names:
        return ""
    rows = [
        (html.escape(_SCORE_NAMES.get(name, name.replace("_", " "))), *(_cell(m.get(name)) for m in scores.values()))
        for name in names
    ]
    return _note(note) + _table(("", *map(html.escape, scores)), rows)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or not np.isfinite(estimate.value):
        return "–"
    if not np.isfinite([estimate.low, estimate.high]).all():
        return f"{estimate.value:.3f}"
    return f'{estimate.value:.3f} <span class="interval">[{estimate.low:.3f}, {estimate.high:.3f}]</span>'


def _text_table(table: Table) -> str:
    rows = [tuple(map(html.escape, row)) for row in table.rows]
    return _note(table.note) + _table(tuple(map(html.escape, table.header)), rows)


# --- losses -----------------------------------------------------------------------------------------------------------


def _training(losses: Sequence[LossCurves]) -> str:
    figures = [
        _figure((4.2, 2.9), f"Loss curves: {run.title}", _draw_losses, run)
        for run in losses
        if any(len(steps) for steps, _ in run.curves.values())
    ]
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


def _draw_losses(axes: "Axes", run: LossCurves) -> None:
    for color, (name, (steps, values)) in zip(_COLORS, run.curves.items(), strict=False):
        sparse = len(steps) <= 40 and name != "train"
        axes.plot(steps, values, color=color, label=name, lw=1.6, marker="o" if sparse else None, ms=3.5)
    if run.best_step is not None:
        axes.axvline(run.best_step, color=_GREY, lw=1, ls=":", label=f"best, step {run.best_step}")
    axes.set(title=run.title, xlabel="optimizer step", ylabel="loss")
    axes.set_xlim(left=0)
    axes.legend()


# --- masked reconstruction --------------------------------------------------------------------------------------------


def _reconstruction(window: Reconstruction | None) -> str:
    if window is None:
        return ""
    shape = np.shape(window.signal_uv)
    if {shape, np.shape(window.reconstruction_uv), np.shape(window.hidden)} != {(len(window.ch_names), *shape[1:])}:
        raise ValueError(f"signal {shape}, reconstruction, hidden samples and channel names must belong to one window")
    shown = np.unique(np.linspace(0, shape[0] - 1, min(_SHOWN_CHANNELS, shape[0])).round().astype(int))
    note = (
        f"The model sees the white stretches and fills in the shaded ones. {_explained_in_words(window)} "
        f"{window.caption} {len(shown)} of its {shape[0]} channels are drawn."
    )
    size = (9.0, 0.9 + 0.62 * max(len(shown), 2))
    alt = "True signal and reconstruction of one window, hidden patches shaded"
    return _note(note) + _figure(size, alt, _draw_reconstruction, window, shown, kind="wide")


def _explained_in_words(window: Reconstruction) -> str:
    share = _explained(window)
    if not share >= 0.005:
        return (
            "Of the variance of the samples it could not see it explains nothing: a flat reconstruction is the mean, "
            "the first thing that pre-training learns; longer pre-training is needed for more."
        )
    return f"It explains {100 * share:.0f} % of the variance of the samples it could not see, over all channels."


def _explained(window: Reconstruction) -> float:
    """1 - residual / variance over the hidden samples, each channel about its own mean; NaN when nothing is hidden."""
    centred = window.signal_uv - window.signal_uv.mean(axis=1, keepdims=True)
    total = np.sum(np.where(window.hidden, centred, 0.0) ** 2)
    residual = np.sum(np.where(window.hidden, window.signal_uv - window.reconstruction_uv, 0.0) ** 2)
    return float(1.0 - residual / total) if total > 0 else float("nan")


def _draw_reconstruction(axes: "Axes", window: Reconstruction, shown: np.ndarray) -> None:
    time = np.arange(window.signal_uv.shape[1]) / window.sfreq
    means = window.signal_uv[shown].mean(axis=1, keepdims=True)
    signal, guess = window.signal_uv[shown] - means, window.reconstruction_uv[shown] - means
    step = max(2.6 * float(np.quantile(np.abs(signal), 0.98)), 1e-3)
    for row, hidden in enumerate(window.hidden[shown]):
        level = -row * step
        starts, stops = _runs(hidden)
        spans = [(a / window.sfreq, (b - a) / window.sfreq) for a, b in zip(starts, stops, strict=True)]
        axes.broken_barh(spans, (level - 0.46 * step, 0.92 * step), color=_SHADE, lw=0)
        clip = 0.75 * step  # an artifact may reach into the neighbours, not over the figure
        axes.plot(time, level + np.clip(signal[row], -clip, clip), color=_INK, lw=0.7, label="signal")
        seen, unseen = (np.clip(np.where(mask, guess[row], np.nan), -clip, clip) for mask in (~hidden, hidden))
        axes.plot(time, level + seen, color=_COLORS[0], lw=0.9, alpha=0.35, label="reconstruction, visible")
        axes.plot(time, level + unseen, color=_COLORS[3], lw=1.3, label="reconstruction, hidden")
    axes.set_yticks(-np.arange(len(shown)) * step, [str(window.ch_names[i]) for i in shown])
    axes.set_ylim(-(len(shown) - 0.35) * step, 0.8 * step)
    axes.set_xlim(0, window.signal_uv.shape[1] / window.sfreq * 1.06)
    axes.set_xlabel("seconds")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    _scale_bar(axes, step, window.signal_uv.shape[1] / window.sfreq)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:3], labels[:3], ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)


def _runs(mask: Bool[np.ndarray, "T"]) -> tuple[np.ndarray, np.ndarray]:
    """First sample and end of every stretch of True."""
    edges = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _scale_bar(axes: "Axes", step: float, seconds: float) -> None:
    nice = np.array([m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)])
    height = float(nice[np.searchsorted(nice, 0.8 * step) - 1])
    x = seconds * 1.015
    axes.plot([x, x], [-height / 2, height / 2], color=_INK, lw=1.5, solid_capstyle="butt")
    axes.text(x + 0.005 * seconds, 0, f"{height:g} µV", va="center", fontsize=8)


# --- attention on the head --------------------------------------------------------------------------------------------


def _attention(maps: Sequence[AttentionMap]) -> str:
    if not maps:
        return ""
    note = (
        "Each learned query reads all channels; the maps show its mean attention over windows and time as a multiple "
        "of an even share (1 = every channel counts the same). Nose up; one colour scale for each montage."
    )
    return _note(note) + "".join(_montage_maps(montage) for montage in maps)


def _montage_maps(montage: AttentionMap) -> str:
    channels = np.shape(montage.weights)[1]
    if np.shape(montage.locations) != (channels, 3) or len(montage.ch_names) != channels:
        raise ValueError(f"{montage.montage}: attention to {channels} channels needs as many names and positions")
    relative = np.asarray(montage.weights, np.float64) * channels
    limits = (float(relative.min()), float(max(relative.max(), relative.min() + 1e-6)))
    draw = _topomap if _can_interpolate(montage.locations) else _head_scatter
    figures = []
    for number, row in enumerate(relative, 1):
        top = int(np.argmax(row))
        caption = f"query {number}: most to {montage.ch_names[top]} ({row[top]:.2f}×)"
        alt = f"Attention of query {number} to the electrodes of {montage.montage}"
        figures.append(_figure((1.9, 1.9), alt, draw, row, montage, limits, kind="map", caption=caption))
    bar = _figure((1.9, 0.62), "Colour scale", _color_bar, limits, kind="map")
    title = f"<h3>{html.escape(montage.montage)}, {channels} channel{'s' if channels > 1 else ''}</h3>"
    return f'{title}<div class="row">{"".join(figures)}{bar}</div>'


def _flat(locations: Float[np.ndarray, "C 3"]) -> Float[np.ndarray, "C 2"]:
    """Azimuthal equidistant projection about the vertex; the equator of the head lies on the unit circle."""
    xyz = np.asarray(locations, np.float64) - np.array([0.0, 0.0, 0.04])  # centre of the head in its own frame
    radius = np.maximum(np.linalg.norm(xyz, axis=1), 1e-9)
    polar = np.arccos(np.clip(xyz[:, 2] / radius, -1, 1)) / (np.pi / 2)
    azimuth = np.arctan2(xyz[:, 1], xyz[:, 0])
    return np.stack([polar * np.cos(azimuth), polar * np.sin(azimuth)], axis=1)


def _can_interpolate(locations: Float[np.ndarray, "C 3"]) -> bool:
    """Whether a map between the electrodes means something: at least eight, spread over the head, none in one place."""
    if len(locations) < 8:
        return False
    flat = _flat(locations)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + np.eye(len(flat))
    spread = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    return bool(distance.min() > _MERGED_M / 0.09 and spread[1] > 0.2 * spread[0])


def _topomap(axes: "Axes", values: np.ndarray, montage: AttentionMap, limits: tuple[float, float]) -> None:
    import mne

    names = [str(name) for name in montage.ch_names]
    info = mne.create_info(names, sfreq=100.0, ch_types="eeg", verbose="error")
    positions = dict(zip(names, np.asarray(montage.locations, np.float64), strict=True))
    info.set_montage(mne.channels.make_dig_montage(positions, coord_frame="head"), verbose="error")
    look = {"cmap": "YlGnBu", "vlim": limits, "contours": 0, "sensors": "k.", "res": 96}
    mne.viz.plot_topomap(values, info, axes=axes, show=False, **look)


def _head_scatter(axes: "Axes", values: np.ndarray, montage: AttentionMap, limits: tuple[float, float]) -> None:
    """One dot for each channel on the outline of a head, named where there are few."""
    flat = _flat(montage.locations)
    angle = np.linspace(0, 2 * np.pi, 120)
    axes.plot(np.cos(angle), np.sin(angle), color=_INK, lw=1)
    axes.plot([-0.14, 0, 0.14], [0.99, 1.14, 0.99], color=_INK, lw=1)
    look = {"cmap": "YlGnBu", "s": 46, "edgecolors": _INK, "linewidths": 0.6}
    axes.scatter(*flat.T, c=values, vmin=limits[0], vmax=limits[1], **look)
    if len(flat) <= 6:
        for (x, y), name in zip(flat, montage.ch_names, strict=True):
            axes.annotate(str(name), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    axes.axis("off")


def _color_bar(axes: "Axes", limits: tuple[float, float]) -> None:
    axes.imshow(np.linspace(0, 1, 128)[None], aspect="auto", cmap="YlGnBu", extent=(*limits, 0, 1))
    axes.set(yticks=[], xlabel="× even share")
    axes.set_xticks(limits, [f"{value:.2f}" for value in limits])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


# --- decisions --------------------------------------------------------------------------------------------------------


def _outcome(outcome: Decisions | Estimates | None) -> str:
    if outcome is None:
        return ""
    figures = _estimate_figures(outcome) if isinstance(outcome, Estimates) else _decision_figures(outcome)
    return f'<div class="row">{"".join(figures)}</div>'


def _decision_figures(decisions: Decisions) -> list[str]:
    labels, classes = np.asarray(decisions.labels), len(decisions.class_names)
    for name, probabilities in decisions.probabilities.items():
        if np.shape(probabilities) != (len(labels), classes):
            raise ValueError(
                f"{name}: {len(labels)} windows of {classes} classes need probabilities of that shape, "
                f"found {np.shape(probabilities)}"
            )
    side = min(1.8 + 0.4 * max(classes, 3), 6.0)
    figures = [
        _figure((side, side - 0.3), f"Confusion matrix of {name}", _draw_confusion, decisions, name)
        for name in decisions.probabilities
    ]
    if len(np.unique(labels)) < 2:
        return [*figures, _note("No ROC curve: the test windows are all of one class.")]
    return [*figures, _figure((3.5, 3.3), "ROC curves", _draw_roc, decisions)]


def _draw_confusion(axes: "Axes", decisions: Decisions, name: str) -> None:
    k = len(decisions.class_names)
    counts = np.zeros((k, k), dtype=int)
    np.add.at(counts, (np.asarray(decisions.labels), decisions.probabilities[name].argmax(axis=1)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if k <= 4 else 7 if k <= 8 else 5
    for i, j in np.ndindex(k, k) if k <= 12 else ():
        look = {"ha": "center", "va": "center", "fontsize": size, "color": "white" if shares[i, j] > 0.55 else _INK}
        axes.text(j, i, f"{100 * shares[i, j]:.0f} %\n{counts[i, j]}", **look)
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if k > 3 else {}
    axes.set_xticks(range(k), [str(c) for c in decisions.class_names], **slanted)
    axes.set_yticks(range(k), [str(c) for c in decisions.class_names])
    axes.set(title=name, xlabel="decided", ylabel="true")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _draw_roc(axes: "Axes", decisions: Decisions) -> None:
    """Binary: one curve for each model. More classes: one-vs-rest curves of the first model, most frequent classes."""
    labels = np.asarray(decisions.labels)
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=":")
    if len(decisions.class_names) == 2:
        for color, (name, probabilities) in zip(_COLORS, decisions.probabilities.items(), strict=False):
            _roc_curve(axes, probabilities[:, 1], labels == 1, name, color)
        title = f"ROC, {decisions.class_names[1]} against {decisions.class_names[0]}"
    else:
        ours = next(iter(decisions.probabilities))
        counts = np.bincount(labels, minlength=len(decisions.class_names))
        frequent = [k for k in np.argsort(-counts, kind="stable")[: len(_COLORS)] if 0 < counts[k] < len(labels)]
        for color, k in zip(_COLORS, sorted(frequent), strict=False):
            name = str(decisions.class_names[k])
            _roc_curve(axes, decisions.probabilities[ours][:, k], labels == k, name, color)
        title = f"ROC of {ours}, each class against the rest"
    axes.set(title=title, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right")


def _roc_curve(axes: "Axes", scores: np.ndarray, positive: np.ndarray, name: str, color: str) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    false, true, _ = roc_curve(positive, scores)
    axes.plot(false, true, color=color, lw=1.8, label=f"{name}: {roc_auc_score(positive, scores):.2f}")


def _estimate_figures(estimates: Estimates) -> list[str]:
    for name, predicted in estimates.predictions.items():
        if np.shape(predicted) != np.shape(estimates.targets):
            raise ValueError(f"{name}: predictions {np.shape(predicted)} for targets {np.shape(estimates.targets)}")
    return [
        _figure((4.0, 3.6), f"Predictions of {name} over the true values", _draw_estimates, estimates, name)
        for name in estimates.predictions
    ]


def _draw_estimates(axes: "Axes", estimates: Estimates, name: str) -> None:
    targets, predicted = estimates.targets, estimates.predictions[name]
    ends = [min(targets.min(), predicted.min()), max(targets.max(), predicted.max())]
    axes.plot(ends, ends, color=_GREY, lw=1, ls=":")
    for color, true, guess in zip(_COLORS, targets.T, predicted.T, strict=False):
        axes.scatter(true, guess, s=14, color=color, alpha=0.6, linewidths=0)
    axes.set(title=name, xlabel="true", ylabel="predicted")


# --- calibration and subjects -----------------------------------------------------------------------------------------


def _reliability(reliability: Reliability | None) -> str:
    if reliability is None:
        return ""
    note = (
        "Decisions by the probability the model gave them, and how many of them were right; on the dotted line a "
        "probability means what it says. The expected calibration error is the mean distance from it over windows."
    )
    return _note(note) + _figure((3.9, 3.5), "Reliability of probabilities", _draw_reliability, reliability)


def _draw_reliability(axes: "Axes", reliability: Reliability) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=":")
    for i, (name, rows) in enumerate(reliability.bins.items()):
        color, largest = _COLORS[i % len(_COLORS)], max((row["n"] for row in rows), default=1)
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        axes.plot(x, y, color=color, lw=1.4, label=f"{name}: {reliability.errors[name]:.3f}")
        axes.scatter(x, y, s=[8 + 60 * row["n"] / largest for row in rows], color=color, linewidths=0)
    axes.set(xlabel="probability of the decision", ylabel="share that is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left", title="calibration error", title_fontsize=8)


def _subjects(subjects: SubjectScores | None) -> str:
    if subjects is None or not any(subjects.scores.values()):
        return ""
    first = next(iter(subjects.scores.values()))
    order = sorted(first, key=lambda name: (np.isnan(first[name]), first[name]))
    undefined = sum(bool(np.isnan(value)) for value in first.values())
    note = f"{subjects.metric} of each subject's own windows, sorted by that of the first model."
    if undefined:
        note += f" It is not defined for {undefined} of {len(order)} subjects."
    size = (7.0, min(0.9 + 0.17 * len(order), 9.0))
    alt = f"{subjects.metric} of every subject"
    return _note(note) + _figure(size, alt, _draw_subjects, subjects, order, kind="wide")


def _draw_subjects(axes: "Axes", subjects: SubjectScores, order: Sequence[str]) -> None:
    rows = np.arange(len(order))
    for i, (name, scores) in enumerate(subjects.scores.items()):
        values = [scores.get(subject, np.nan) for subject in order]
        axes.scatter(values, rows, s=20, color=_COLORS[i % len(_COLORS)], alpha=0.8, linewidths=0, label=name)
    if len(order) <= 48:
        axes.set_yticks(rows, order, fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(order)} subjects")
    axes.set(xlabel=subjects.metric, ylim=(-0.7, len(order) - 0.3))
    if len(subjects.scores) > 1:
        axes.legend(loc="lower right")


# --- embeddings -------------------------------------------------------------------------------------------------------


def _embeddings(maps: EmbeddingMaps | None) -> str:
    if maps is None:
        return ""
    rows = []
    for moment, values in maps.embeddings.items():
        if len(values) != len(maps.subjects) or (maps.labels is not None and len(values) != len(maps.labels)):
            raise ValueError(f"{moment}: {len(values)} embeddings need as many subjects and labels")
        flat, shares = _principal_plane(np.asarray(values, np.float64))
        figures = [
            _figure((4.2, 3.3), f"Embeddings {moment}, {coloring[0]}", _draw_map, flat, shares, *coloring)
            for coloring in _colorings(maps)
        ]
        rows.append(f"<h3>{html.escape(moment)}</h3>{_note(_neighbours(values, maps))}")
        rows.append(f'<div class="row">{"".join(figures)}</div>')
    note = (
        "One point for each window: its mean embedding on the first two principal components (in brackets, their share "
        "of the variance). What separates in the full space need not separate in this plane: see the neighbours. "
        f"{maps.caption}"
    )
    return _note(note) + "".join(rows)


def _colorings(maps: EmbeddingMaps) -> list[tuple[str, np.ndarray, Sequence[str]]]:
    """(title, value of each window, names of the values; no names = a continuous value)."""
    names, subject = np.unique(np.asarray(maps.subjects).astype(str), return_inverse=True)
    by_subject = ("coloured by subject", subject, names.tolist())
    if maps.labels is None:
        return [by_subject]
    labels = np.asarray(maps.labels)
    if labels.dtype.kind == "f":
        return [("coloured by target", labels, ()), by_subject]
    return [("coloured by class", labels, [str(name) for name in maps.class_names]), by_subject]


def _principal_plane(values: Float[np.ndarray, "n M"]) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `(n, 2)` on the first two principal components, and the share of the variance of each."""
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    plane, shares = np.zeros((len(values), 2)), np.zeros(2)
    found = min(2, len(singular))
    plane[:, :found] = left[:, :found] * singular[:found]
    shares[:found] = singular[:found] ** 2 / max(float((singular**2).sum()), 1e-300)
    signs = np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])  # the sign of a component is arbitrary: fix it
    return plane * np.where(signs == 0, 1, signs), shares


def _draw_map(
    axes: "Axes", flat: np.ndarray, shares: np.ndarray, title: str, values: np.ndarray, names: Sequence[str]
) -> None:
    import matplotlib as mpl

    size = 16 if len(flat) <= 400 else 7
    if not names:
        points = axes.scatter(*flat.T, c=values, cmap="viridis", s=size, alpha=0.8, linewidths=0)
        axes.figure.colorbar(points, ax=axes, fraction=0.05)
    palette = _COLORS if len(names) <= len(_COLORS) else mpl.colormaps["tab20"].colors
    for i, name in enumerate(names):
        own = values == i
        label = name if len(names) <= 12 else None
        axes.scatter(*flat[own].T, color=palette[i % len(palette)], s=size, alpha=0.75, linewidths=0, label=label)
    labels = [f"component {i} ({100 * share:.0f} %)" for i, share in enumerate(shares, 1)]
    axes.set(title=title, xticks=[], yticks=[], xlabel=labels[0], ylabel=labels[1])
    axes.spines[:].set_visible(False)
    if 0 < len(names) <= 12:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)


def _neighbours(values: Float[np.ndarray, "n M"], maps: EmbeddingMaps) -> str:
    """What is near in the full space: the same subject, and the same class among other subjects, in words."""
    subjects = np.unique(np.asarray(maps.subjects).astype(str), return_inverse=True)[1]
    if len(values) <= _NEIGHBOURS or len(values) > 4000:
        return ""
    values = np.asarray(values, np.float64)
    squared = (values**2).sum(1)
    distance = squared[:, None] + squared[None] - 2 * values @ values.T
    np.fill_diagonal(distance, np.inf)
    same_subject = subjects[:, None] == subjects[None]
    text = f"Of the {_NEIGHBOURS} nearest windows, {_agreement(distance, same_subject)} are of the same subject"
    labels = maps.labels
    if labels is not None and np.asarray(labels).dtype.kind != "f" and len(np.unique(subjects)) > 1:
        others = np.where(same_subject, np.inf, distance)
        same_class = np.asarray(labels)[:, None] == np.asarray(labels)[None]
        text += f"; of the {_NEIGHBOURS} nearest of other subjects, {_agreement(others, same_class)} share the class"
    return f"{text}."


def _agreement(distance: np.ndarray, same: np.ndarray) -> str:
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :_NEIGHBOURS]
    possible = np.isfinite(np.take_along_axis(distance, nearest, axis=1))
    return f"{100 * np.take_along_axis(same, nearest, axis=1)[possible].mean():.0f} %"
