"""The report of a prepared corpus: one self-contained HTML page, made from its manifest and from nothing else.

Same manifest, same bytes: no dates, no times, no names of machines. Figures are inline SVG; the page reads on a phone.
"""

import html
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.corpora.base import PARTS
from data_pipeline.preprocess import PLAUSIBLE_UV

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a5195", "#8c8c00")  # Okabe-Ito
_GREY = "#8b949e"
_EXAMPLES = 5
_BAR_ROW = 22  # pixels


def write_report(manifest: Mapping, path: Path) -> None:
    """Write the page of a manifest of `prepare_corpus`; complete or not at all."""
    used = [entry for entry in manifest["files"].values() if entry.get("windows")]
    sections = [
        ("Counts", _counts(manifest)),
        ("Worth knowing", _list(manifest["warnings"])),
        ("Classes in each part", _classes(manifest)),
        ("Subjects of each part", _subjects(manifest)),
        ("Files without windows", _left_files(manifest)),
        ("Windows left out", _left_windows(used)),
        ("Amplitudes", _amplitudes(manifest)),
        ("Sampling rates", _rates(used)),
        ("Durations and channels", _durations(used)),
        ("What was noted", _notes(used)),
        ("Outputs", _outputs(manifest)),
        ("How it was made", _settings(manifest)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    page = _PAGE.format(title=html.escape(manifest["title"]), css=_CSS, body=body)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def files_by_reason(manifest: Mapping) -> dict[tuple[str, str], list[str]]:
    """(status, reason) -> names of files without windows, the most frequent reason first.

    Reasons that differ in numbers and names only are one, with these left out.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in manifest["files"].items():
        if "reason" in entry:
            groups.setdefault((entry["status"], _general(entry["reason"])), []).append(name)
    named = {}
    for (status, general), names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        own = {manifest["files"][name]["reason"] for name in names}
        named[status, own.pop() if len(own) == 1 else general] = names
    return named


# --- sections ---------------------------------------------------------------------------------------------------------


def _counts(manifest: Mapping) -> str:
    parts, expected = manifest["parts"], manifest["expected"]
    published = expected["windows"]
    rows = []
    for part in [part for part in PARTS if part in parts or part in published]:
        own = parts.get(part, {"windows": 0, "recordings": 0, "subjects": []})
        rows.append(
            (part, _n(own["windows"]), *_beside(own["windows"], published.get(part)), _n(own["recordings"]),
             _n(len(own["subjects"])))
        )  # fmt: skip
    total = {"windows": sum(own["windows"] for own in parts.values())}
    recordings = sum(bool(entry.get("windows")) for entry in manifest["files"].values())
    subjects = len({subject for own in parts.values() for subject in own["subjects"]})
    all_published = sum(published.values()) or None
    rows.append(
        ("<b>all</b>", _n(total["windows"]), *_beside(total["windows"], all_published), _n(recordings), _n(subjects))
    )
    facts = []
    if expected["recordings"]:
        facts.append(f"The corpus has {_n(expected['recordings'])} recordings, {_n(recordings)} gave windows.")
    if expected["subjects"]:
        facts.append(f"Published subjects: {_n(expected['subjects'])}, here {_n(subjects)}.")
    if expected["source"]:
        facts.append(f"Published figures: {expected['source']}.")
    header = ("part", "windows", "published", "difference", "recordings", "subjects")
    return _table(header, rows) + _note(" ".join(facts))


def _beside(found: int, published: int | None) -> tuple[str, str]:
    return ("–", "–") if published is None else (_n(published), f"{100 * (found / published - 1):+.1f} %")


def _classes(manifest: Mapping) -> str:
    names = manifest["class_names"]
    parts = {part: own for part, own in manifest["parts"].items() if own["labels"]}
    if not names or not parts:
        return ""
    per_channel = any(sum(own["labels"].values()) != own["windows"] for own in parts.values())
    header = ("part", *(f"{_swatch(i)} {html.escape(name)}" for i, name in enumerate(names)))
    shares, rows = {}, []
    for part, own in parts.items():
        counts = [own["labels"].get(str(i), 0) for i in range(len(names))]
        shares[part] = [count / sum(counts) for count in counts]
        cells = [
            f'{_n(count)} <span class="quiet">{share:.1%}</span>'
            for count, share in zip(counts, shares[part], strict=True)
        ]
        rows.append((part, *cells))
    note = "Counts are windows times channels: every channel has a label." if per_channel else ""
    return _note(note) + _stacked_bars(shares) + _table(header, rows)


def _subjects(manifest: Mapping) -> str:
    parts = manifest["parts"]
    if not parts:
        return ""
    rows, lists = [], ""
    for part, own in parts.items():
        per_subject: Counter = Counter()
        for entry in manifest["files"].values():
            if part in entry.get("parts", {}):
                per_subject[entry["subject"]] += entry["parts"][part]
        counts = sorted(per_subject.values())
        rows.append((part, _n(len(counts)), _n(counts[0]), _n(int(np.median(counts))), _n(counts[-1])))
        ids = html.escape(", ".join(own["subjects"]))
        lists += f"<details><summary>{part}: {_n(len(counts))} subjects</summary><p>{ids}</p></details>"
    split = manifest["split"]
    digest = f" (digest {split['sha256']})" if split.get("sha256") else ""
    rule = f"Rule: {split['rule']}; never divided: the {split['unit']}{digest}."
    header = ("part", "subjects", "fewest windows", "median", "most windows")
    return _note(rule) + _table(header, rows) + lists


def _left_files(manifest: Mapping) -> str:
    rows = []
    for (status, reason), names in files_by_reason(manifest).items():
        examples = [f"{name}: {manifest['files'][name]['reason']}" for name in names[:_EXAMPLES]]
        shown = "".join(f"<li>{html.escape(example)}</li>" for example in examples)
        more = f"<li>and {len(names) - _EXAMPLES:,} more, see manifest.json</li>" if len(names) > _EXAMPLES else ""
        detail = f"<details><summary>{html.escape(reason)}</summary><ul>{shown}{more}</ul></details>"
        rows.append((detail, status, _n(len(names))))
    return _table(("reason", "", "files"), rows) if rows else "<p>Every file gave windows.</p>"


def _left_windows(used: Sequence[Mapping]) -> str:
    counts: Counter = Counter()
    for entry in used:
        counts.update(entry["rejected_windows"])
    rows = [(html.escape(reason), _n(count)) for reason, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    return _table(("reason", "windows"), rows) if rows else ""


def _amplitudes(manifest: Mapping) -> str:
    """Histogram of the robust amplitude of recordings, four bins per decade, and who lies outside what is plausible."""
    found = {name: entry["robust_amplitude_uv"] for name, entry in manifest["files"].items() if entry.get("windows")}
    values = np.array(list(found.values()))
    positive = values[values > 0]
    if not len(positive):
        return ""
    low, high = math.floor(2 * math.log10(positive.min())), math.ceil(2 * math.log10(positive.max()) + 1e-9)
    edges = 10.0 ** (np.arange(2 * low, 2 * max(high, low + 1) + 1) / 4)  # four bins per decade
    counts, _ = np.histogram(positive, edges)
    labels = [f"{_short(a)} to {_short(b)} µV" for a, b in itertools.pairwise(edges)]
    odd = sorted(name for name, value in found.items() if not PLAUSIBLE_UV[0] <= value <= PLAUSIBLE_UV[1])
    note = "Median over channels of 1.4826 times the median absolute deviation, after the filters, per recording."
    text = _note(note) + _bars(list(zip(labels, counts.tolist(), strict=True)), "recordings by amplitude")
    if odd:
        shown = "".join(f"<li>{html.escape(name)}: {found[name]:g} µV</li>" for name in odd[:50])
        summary = f"{len(odd):,} recordings outside {PLAUSIBLE_UV[0]:g} to {PLAUSIBLE_UV[1]:g} µV: check their unit"
        text += f"<details><summary>{summary}</summary><ul>{shown}</ul></details>"
    return text


def _rates(used: Sequence[Mapping]) -> str:
    counts = Counter(entry["sfreq"] for entry in used)
    return _bars([(f"{rate:g} Hz", counts[rate]) for rate in sorted(counts)], "recordings by sampling rate")


def _durations(used: Sequence[Mapping]) -> str:
    edges = [0, 60, 300, 600, 1200, 1800, 3600, 7200, 21600, 86400, math.inf]
    names = [
        "< 1 min",
        "1-5 min",
        "5-10 min",
        "10-20 min",
        "20-30 min",
        "30-60 min",
        "1-2 h",
        "2-6 h",
        "6-24 h",
        "> 24 h",
    ]
    durations = np.array([entry["duration_seconds"] for entry in used])
    if not len(durations):
        return ""
    counts, _ = np.histogram(durations, edges)
    first, last = np.flatnonzero(counts)[[0, -1]]
    rows = list(zip(names, counts.tolist(), strict=True))[first : last + 1]
    montages = Counter((entry["montage"], entry["channels"]) for entry in used)
    table = [(html.escape(name), _n(channels), _n(n)) for (name, channels), n in sorted(montages.items())]
    hours = f"{durations.sum() / 3600:,.1f} hours of recordings with windows."
    return _note(hours) + _bars(rows, "recordings by duration") + _table(("montage", "channels", "recordings"), table)


def _notes(used: Sequence[Mapping]) -> str:
    counts = Counter(_general(note) for entry in used for note in entry["notes"])
    flat = sum(bool(entry["flat_channels"]) for entry in used)
    rows = [(html.escape(note), _n(count)) for note, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    rows += [("a channel is flat over the whole recording (kept)", _n(flat))] if flat else []
    return _table(("note", "recordings"), rows) if rows else ""


def _outputs(manifest: Mapping) -> str:
    rows = [
        (html.escape(name), _n(own["windows"]), f"{own['bytes'] / 2**20:,.1f} MiB", f"<code>{own['sha256']}</code>")
        for name, own in manifest["outputs"].items()
    ]
    return _table(("file", "windows", "size", "SHA-256"), rows)


def _settings(manifest: Mapping) -> str:
    rows = [("signal", html.escape(_signal(manifest["signal"])))] if "signal" in manifest else []
    rows += [(html.escape(key), html.escape(str(value))) for key, value in manifest["options"].items()]
    rows += [
        (what, html.escape(str(manifest[what]))) for what in ("licence", "citation", "software") if what in manifest
    ]
    return _table((), rows)


def _signal(about: Mapping) -> str:
    low, high = (None if edge is None else f"{edge:g} Hz" for edge in about["band"])
    band = f"band {low or 'from DC'} to {high or 'Nyquist'}" if low or high else "no band-pass"
    notch = f"notch {about['notch']:g} Hz" if about["notch"] else "no notch"
    window, stride = about["window_seconds"], about["stride_seconds"]
    cut = f"{about['sfreq']:g} Hz, windows of {window:g} s every {stride:g} s, microvolts"
    return f"{band}, {notch}, reference: {about['reference']}, {cut}"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _general(reason: str) -> str:
    """A reason without its numbers, files and names in quotes, so that equal causes are counted together."""
    reason = re.sub(r"^[^\s,]+\.\w+(?=, line)", "…", re.sub(r"'[^']*'", "'…'", reason))
    return re.sub(r"(?<![A-Za-z_/])\d+(?:\.\d+)?(?![A-Za-z_])", "#", reason)


def _bars(rows: Sequence[tuple[str, int]], alt: str) -> str:
    """Horizontal bars with their numbers, the longest over the whole width."""
    if not rows:
        return ""
    left, width, most = 150, 420, max(max(count for _, count in rows), 1)
    items = []
    for i, (name, count) in enumerate(rows):
        y, length = i * _BAR_ROW, width * count / most
        items.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{_BAR_ROW - 6}" fill="{_COLORS[0]}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 15}" fill="{_GREY}">{count:,}</text>'
        )
    return _svg(left + width + 70, _BAR_ROW * len(rows), items, alt)


def _stacked_bars(shares: Mapping[str, Sequence[float]]) -> str:
    left, width, items = 90, 540, []
    for i, (part, own) in enumerate(shares.items()):
        y, x = i * _BAR_ROW, float(left)
        items.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(part)}</text>')
        for k, share in enumerate(own):
            color = _COLORS[k % len(_COLORS)]
            items.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{width * share:.1f}" height="{_BAR_ROW - 6}" fill="{color}"/>'
            )
            x += width * share
    return _svg(left + width + 10, _BAR_ROW * len(shares), items, "share of each class in each part")


def _svg(width: float, height: float, items: Sequence[str], alt: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{html.escape(alt, quote=True)}">{"".join(items)}</svg></figure>'
    )


def _swatch(i: int) -> str:
    return f'<span class="swatch" style="background: {_COLORS[i % len(_COLORS)]}"></span>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; every column but the first holds numbers when there is a header."""
    kind = ' class="number"' if header else ""
    head = "".join(f"<th{kind if i else ''}>{cell}</th>" for i, cell in enumerate(header))
    cells = ["".join(f"<td{kind if i else ''}>{cell}</td>" for i, cell in enumerate(row)) for row in rows]
    top = f"<tr>{head}</tr>" if header else ""
    return f'<div class="scroll"><table>{top}{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _n(count: int) -> str:
    return f"{count:,}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


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
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
p.note, .quiet { color: #57606a; font-size: 0.9rem; }
.scroll { overflow-x: auto; }
figure { margin: 0.6rem 0; max-width: 100%; }
svg { max-width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; fill: #24292f; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; }
table { border-collapse: collapse; margin: 0.6rem 0; font-size: 0.95rem; }
th, td { text-align: left; padding: 0.3rem 1.2rem 0.3rem 0; border-bottom: 1px solid #eaeef2; vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: 0.8rem; }
summary { cursor: pointer; }
"""
