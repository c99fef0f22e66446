"""What window stores hold, and what is wrong with them: `python -m data_pipeline.audit FILE...`.

Reads every window of HDF5 files of the reference pipeline, of this package, and of ArrayRecord folders, and tells for
each: which flavour it is, what it would be read as, whether its windows are scrambled, occur twice (in all files
together), are flat, clipped or not finite, and which labels and subjects it has. Exit status: 0 = clean, 1 = there is
something to act on, 2 = a file cannot be read. `--repair OUT` writes clean stores of our own format.
"""

import dataclasses
import json as json_format
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from data_pipeline.array_record_store import ArrayRecordStore
from data_pipeline.convert_store import write_windows
from data_pipeline.formats import HDF5_SUFFIXES, open_store, stores_at
from data_pipeline.old_files import DISK_ORDER, OldFiles, Seams, orders_with
from data_pipeline.store import Store, WindowStore
from data_pipeline.window_hashes import NO_SIGNAL, hash_windows, later_copies, repeated

_TOGETHER = 64  # windows in memory
_CLIPPED_UV = 32_000.0  # where writers of float16 clip, if they do
_NAMED = 20  # pairs of groups that are named


@dataclass(frozen=True)
class AuditConfig:
    """Files to look at."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """HDF5 files, ArrayRecord folders, or folders of such stores"""
    json: Path | None = None
    """write everything found to this file, too"""
    repair: Path | None = None
    """write clean stores: one file in, one store out (.h5, or a folder of ArrayRecord shards); several in, a folder"""
    old: OldFiles = field(default_factory=OldFiles)
    """how files that do not describe themselves are read"""


@dataclass
class Report:
    """What was found in one store: facts by name (JSON values), and what to act on, one sentence each."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    to_act: list[str] = field(default_factory=list)
    unreadable: str = ""

    @property
    def status(self) -> int:
        """0 clean, 1 something to act on, 2 unreadable."""
        return 2 if self.unreadable else int(bool(self.to_act))


@dataclass
class Audit:
    """Reports of all stores, and the stores themselves (None where unreadable) with the hashes of their windows."""

    reports: list[Report]
    stores: list[Store | None]
    hashes: list[np.ndarray]

    @property
    def status(self) -> int:
        """The worst of the reports."""
        return max(report.status for report in self.reports)

    def first_copies(self) -> list[np.ndarray]:
        """Rows of each store without the windows that occurred before, in it or in an earlier one."""
        again = later_copies(np.concatenate(self.hashes))
        return [np.flatnonzero(~own) for own in np.split(again, np.cumsum([len(h) for h in self.hashes])[:-1])]


def audit(paths: Sequence[Path], old: OldFiles = OldFiles()) -> Audit:  # noqa: B008  (frozen)
    """Look at every window of every store. Raises ValueError when a folder holds no store or a path is named twice."""
    files = [own for path in paths for own in stores_at(path)]
    twice = [str(path) for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    if not files or twice:
        raise ValueError(f"{twice[0]} is named twice: its windows would all be duplicates" if twice else "name a file")
    reports, stores, hashes = [Report(path) for path in files], [], []
    for report in reports:
        store, own = _looked_at(report, old)
        stores.append(store)
        hashes.append(own)
    _name_duplicates(reports, stores, hashes)
    return Audit(reports, stores, hashes)


def repair(found: Audit, out: Path, old: OldFiles) -> list[Path]:
    """Write what can be repaired: rows by name, windows unscrambled, each content once, values finite.

    One store in, one out; several in, one store for each in the folder `out`. What was done is in the provenance.
    Raises ValueError when a store cannot be read or `out` exists; then nothing is written for that store.
    """
    if len(found.reports) > 1 and out.suffix in HDF5_SUFFIXES:
        raise ValueError(f"{len(found.reports)} files become as many stores: give a folder, not {out}")
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or choose another name")
    bad = next((report for report in found.reports if report.unreadable), None)
    if bad is not None:
        raise ValueError(f"nothing was repaired: {bad.unreadable}")
    stores = [open_store(report.path, old) for report in found.reports]  # raises where something must be told first
    written = []
    targets = [out] if len(stores) == 1 else _targets([report.path for report in found.reports], out)
    for store, rows, target in zip(stores, found.first_copies(), targets, strict=True):
        if not len(rows):
            continue
        with warnings.catch_warnings(action="ignore"):
            info = dataclasses.replace(store.info, provenance=_provenance(store, len(rows)))
            write_windows([store], [rows], target, info)
        written.append(target)
    return written


def _targets(paths: Sequence[Path], out: Path) -> list[Path]:
    """A file in `out` for each store; its folder's name tells apart what the reference calls train.h5 everywhere."""
    short = [path.stem for path in paths]
    names = [s if short.count(s) == 1 else f"{p.resolve().parent.name}-{s}" for p, s in zip(paths, short, strict=True)]
    repeated_names = [name for name in names if names.count(name) > 1]
    if repeated_names:
        raise ValueError(f"two files would become {repeated_names[0]}.h5: repair them one by one")
    return [out / f"{name}.h5" for name in names]


def _provenance(store: Store, kept: int) -> dict:
    done: dict[str, Any] = {"file": store.path.name, "bytes": store.num_bytes, "windows": len(store)}
    done["duplicates_dropped"] = len(store) - kept
    if isinstance(store, WindowStore) and "window_layout" not in store.attributes:
        flavour = store.flavour
        done["flavour"] = None if flavour is None else f"{flavour.letter} ({flavour.corpora})"
        done["unscrambled"] = store.scrambled
        done["rows_permuted"] = None if store.channel_rows is None else store.channel_rows.tolist()
        done["values_not_finite"] = "read as 0"
    return {**store.info.provenance, "repaired_from": done}


# --- one store -------------------------------------------------------------------------------------------------------


def _looked_at(report: Report, old: OldFiles) -> tuple[Store | None, np.ndarray]:
    nothing = np.zeros(0, np.uint64)
    keep = dataclasses.replace(old, non_finite="keep")
    refusal = ""
    try:
        store = open_store(report.path, keep)
    except ValueError as error:
        refusal = " ".join(str(error).split())
        try:
            store = WindowStore(report.path, keep, to_look=True)
        except ValueError:
            report.unreadable = refusal
            return None, nothing
    try:
        _describe(report, store)
        hashes = _scan(report, store)
    except ValueError as error:
        report.unreadable = " ".join(str(error).split())
        return None, nothing
    if refusal:
        report.facts["read as"] = "nothing: it is refused"
        report.to_act.append(refusal)
    return store, hashes


def _describe(report: Report, store: Store) -> None:
    facts = report.facts
    own = not isinstance(store, WindowStore) or "window_layout" in store.attributes
    groups = len(store.groups) if isinstance(store, WindowStore) else len(store.recordings.table)
    facts["format"] = _format_of(store)
    facts["groups"], facts["windows"] = groups, len(store)
    facts["shape"] = [[len(m), store.n_times] for m in store.montages.values()]
    facts["dtype"] = str(store.dtype) if isinstance(store, WindowStore) else "float32"
    facts["sfreq"] = None if math.isnan(store.sfreq) else store.sfreq
    facts["montages"] = list(store.montages)
    facts["subjects"] = len(store.subjects.unique())
    facts["labels"] = _labels_of(store)
    if isinstance(store, ArrayRecordStore):
        store.verify()
    if own or not isinstance(store, WindowStore):
        facts["layout"] = {"scrambled": False, "stated": True}
        facts["read as"] = f"{', '.join(store.montages)}, {store.sfreq:g} Hz, uV, as stored"
        return
    _describe_old(report, store)


def _describe_old(report: Report, store: WindowStore) -> None:
    facts = report.facts
    channels = facts["shape"][0][0]
    facts["orders that fit"] = orders_with(channels)
    facts["channel names in the file"] = "channel_names" in store.attributes
    if "(subjects unknown)" in str(store.subjects[0]):
        facts["subjects"] = "unknown"
    facts["layout"] = _layout_of(store)
    how = ["repaired" if store.scrambled else "as stored"]
    if store.channel_rows is not None:
        how.append("rows permuted by name")
    rate = "unknown rate" if facts["sfreq"] is None else f"{store.sfreq:g} Hz"
    facts["read as"] = f"{', '.join(store.montages)}, {rate}, uV, {', '.join(how)}"
    report.to_act += _remarks(store, facts)


def _remarks(store: WindowStore, facts: dict) -> Iterator[str]:
    """What to act on in a file of another pipeline, before its windows are read."""
    flavour, layout = store.flavour, facts["layout"]
    yield "it does not describe itself and is read by what it looks like: --repair makes a store that does"
    if flavour is not None and flavour.order == DISK_ORDER and not facts["channel names in the file"]:
        yield ("its rows are in the order of the reference's writer; the reference's readers name 14 of 22 wrongly "
               "(channel_order as_reference does the same)")  # fmt: skip
    if store.scrambled:
        yield "its windows are scrambled: reshaped without a transpose"
    if store.scrambled and layout["unclear"]:
        yield ("the signal does not show that its windows are scrambled; they are taken to be, as in all such files of "
               "the reference (windows as_stored leaves them)")  # fmt: skip
    if not store.scrambled and layout["ratio"] is not None and layout["ratio"] < 0.5:
        yield "its windows look scrambled, which files of this flavour never are: look at the signal"


def _format_of(store: Store) -> str:
    if not isinstance(store, WindowStore):
        return "ArrayRecord store of this package"
    if "window_layout" in store.attributes:
        return "HDF5 store of this package"
    if store.flavour is None:
        return "HDF5 of unknown origin"
    return f"flavour {store.flavour.letter} of the reference ({store.flavour.corpora})"


def _layout_of(store: WindowStore) -> dict:
    """The statistic of every group: jumps at the seams if scrambled, over those if not."""
    counts = np.diff([*store.first_rows, len(store)]).tolist()
    each = {}
    for i, (name, count) in enumerate(zip(store.groups, counts, strict=True)):
        if count > 1:
            each[name] = _number(store.seams([i]).ratio)
    whole: Seams = store.seams()
    return {
        "scrambled": store.scrambled,
        "jump_if_scrambled": _number(whole.scrambled),
        "jump_if_stored": _number(whole.stored),
        "ratio": _number(whole.ratio),
        "unclear": whole.unclear,
        "ratio_of_groups": each,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


def _labels_of(store: Store) -> dict | None:
    if store.labels is None:
        return None
    labels, shape = store.labels, list(store.labels.shape[1:])
    if labels.dtype.kind == "f":
        extent = [_number(float(labels.min())), _number(float(labels.max()))]
        return {"kind": "targets", "shape": shape, "range": extent}
    values, counts = np.unique(labels, return_counts=True)
    kind = "classes" if labels.ndim == 1 else "classes per channel"
    return {"kind": kind, "shape": shape, "counts": dict(zip(map(str, values), counts.tolist(), strict=True))}


def _scan(report: Report, store: Store) -> np.ndarray:
    """Read every window: counts of what is not signal, and the hashes (n,) of all."""
    hashes = np.zeros(len(store), np.uint64)
    totals = Counter(dict.fromkeys(("values_not_finite", "windows_not_finite", "values_clipped", "windows_flat"), 0))
    half = isinstance(store, WindowStore) and store.dtype == np.float16
    for rows in _pieces(store, report.path.name):
        signal = store.read(rows)
        finite = np.isfinite(signal)
        bad = ~finite.all(axis=(1, 2))
        if bad.any():
            totals["values_not_finite"] += int((~finite).sum())
            totals["windows_not_finite"] += int(bad.sum())
            np.nan_to_num(signal, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        if half:
            totals["values_clipped"] += int((np.abs(signal) >= _CLIPPED_UV).sum())
        hashes[rows] = hash_windows(signal)
        totals["windows_flat"] += int((hashes[rows] == NO_SIGNAL).sum())
    report.facts |= totals
    if totals["values_not_finite"]:
        report.to_act.append(f"{totals['values_not_finite']} values in {totals['windows_not_finite']} windows are not "
                             f"finite: they are read as 0 (non_finite keep leaves those windows out)")  # fmt: skip
    if totals["values_clipped"]:
        report.to_act.append(f"{totals['values_clipped']} values lie at the limit of float16: they are clipped")
    return hashes


def _pieces(store: Store, title: str) -> Iterator[np.ndarray]:
    parts = []
    for name in store.montage_names.unique():
        rows = np.flatnonzero(store.montage_names == name)
        parts += np.array_split(rows, -(-len(rows) // _TOGETHER))
    console = Console(stderr=True)
    yield from track(parts, description=title, console=console, transient=True, disable=not console.is_terminal)


def _name_duplicates(reports: Sequence[Report], stores: Sequence[Store | None], hashes: Sequence[np.ndarray]) -> None:
    """Which groups repeat which, over all files; the later copy is the one to act on."""
    bounds = np.cumsum([0, *map(len, hashes)])
    pairs: dict[int, Counter] = {i: Counter() for i in range(len(reports))}
    for places in repeated(np.concatenate(hashes)):
        first = _place(int(places[0]), bounds, stores)
        for place in places[1:].tolist():
            number, group = _place(place, bounds, stores)
            pairs[number][group, *first] += 1
    for number, report in enumerate(reports):
        if report.unreadable:
            continue
        named = [
            {"group": group, "repeats": f"{reports[other].path}:{before}", "windows": count}
            for (group, other, before), count in pairs[number].most_common()
        ]
        copies = sum(pair["windows"] for pair in named)
        report.facts["duplicates"] = {"windows": copies, "pairs": named[:_NAMED], "num_pairs": len(named)}
        if copies:
            elsewhere = sum(count for (_, other, _), count in pairs[number].items() if other != number)
            where = f", {elsewhere} of them in another file" if elsewhere else ""
            report.to_act.append(f"{copies} windows occur before{where} (the first: {named[0]['group']} repeats "
                                 f"{named[0]['repeats']}): --repair drops them")  # fmt: skip


def _place(row: int, bounds: np.ndarray, stores: Sequence[Store | None]) -> tuple[int, str]:
    """Number of the file and name of the group (or recording) of a window."""
    number = int(np.searchsorted(bounds, row, side="right")) - 1
    store, own = stores[number], row - int(bounds[number])
    if isinstance(store, WindowStore):
        return number, store.groups[int(np.searchsorted(store.first_rows, own, side="right")) - 1]
    assert store is not None, "an unreadable file has no hashes"
    return number, str(store.recordings[own])


# --- what is shown ---------------------------------------------------------------------------------------------------


def table_of(reports: Sequence[Report]) -> Table:
    """One table: a section for each file, what it holds, then what to act on."""
    table = Table("what", "found", title="window stores", title_justify="left")
    for report in reports:
        table.add_row("[bold]file", f"[bold]{escape(str(report.path))}")
        for what, found in _rows(report):
            table.add_row(what, escape(found))
        table.add_section()
    return table


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    if report.unreadable:
        yield "[red]unreadable", report.unreadable
        return
    facts, layout, labels = report.facts, report.facts["layout"], report.facts["labels"]
    shapes = ", ".join(f"{channels} x {samples}" for channels, samples in facts["shape"])
    yield "format", facts["format"]
    yield "windows", f"{facts['windows']:,} in {facts['groups']:,} groups, {shapes}, {facts['dtype']}"
    if "orders that fit" in facts:
        named = "named in the file" if facts["channel names in the file"] else "not named in the file"
        yield (
            "channels",
            f"{named}; {facts['shape'][0][0]} fit {', '.join(facts['orders that fit']) or 'no known order'}",
        )
    if not layout.get("stated"):
        yield "layout", _layout_text(layout)
    yield "read as", facts["read as"]
    yield "labels", "none" if labels is None else _labels_text(labels)
    yield "subjects", str(facts["subjects"])
    duplicates = facts["duplicates"]
    pairs = "".join(f"\n{p['group']} repeats {p['repeats']} ({p['windows']})" for p in duplicates["pairs"][:3])
    yield "duplicates", f"{duplicates['windows']:,} windows{pairs}"
    yield "values", f"{facts['values_not_finite']:,} not finite, {facts['values_clipped']:,} clipped"
    yield "flat", f"{facts['windows_flat']:,} windows without signal"
    for sentence in report.to_act:
        yield "[yellow]act on", sentence
    if not report.to_act:
        yield "[green]clean", "nothing to act on"


def _layout_text(layout: dict) -> str:
    ratios = [ratio for ratio in layout["ratio_of_groups"].values() if ratio is not None]
    what = "scrambled" if layout["scrambled"] else "windows as they should be"
    if layout["ratio"] is None:
        return f"{what} (no two windows to compare)"
    spread = f", {min(ratios):g} to {max(ratios):g} in {len(ratios)} groups" if len(ratios) > 1 else ""
    jumps = f"{layout['jump_if_scrambled']:g} / {layout['jump_if_stored']:g}"
    unclear = "; the signal does not decide" if layout["unclear"] else ""
    return f"{what}: jumps at the seams {jumps} = {layout['ratio']:g}{spread}{unclear}"


def _labels_text(labels: dict) -> str:
    if labels["kind"] == "targets":
        return f"{labels['shape'][0]} targets, {labels['range'][0]} to {labels['range'][1]}"
    counts = ", ".join(f"{name}: {count:,}" for name, count in list(labels["counts"].items())[:12])
    return f"{labels['kind']} ({counts})"


def write_json(found: Audit, path: Path) -> None:
    """Everything found, whole or not at all."""
    content = {
        "status": found.status,
        "files": [
            {"file": str(r.path), "status": r.status, "unreadable": r.unreadable, "act_on": r.to_act, **r.facts}
            for r in found.reports
        ],
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json_format.dumps(content, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _one_sentence() -> Iterator[list[int]]:
    status = [0]
    try:
        yield status
    except (ValueError, OSError) as error:
        print(f"audit: {' '.join(str(error).split())}", file=sys.stderr)
        status[0] = 2
    except KeyboardInterrupt:
        print("audit: interrupted; nothing half-written stays", file=sys.stderr)
        status[0] = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 clean (or repaired), 1 something to act on, 2 unreadable."""
    config: Any = tyro.cli(AuditConfig, args=arguments, description=__doc__, prog="python -m data_pipeline.audit")
    with _one_sentence() as status:
        found = audit(config.paths, config.old)
        Console().print(table_of(found.reports))
        if config.json is not None:
            write_json(found, config.json)
        status[0] = found.status
        if config.repair is not None and found.status:
            for path in repair(found, config.repair, config.old):
                print(f"{path}: written")
            status[0] = 0
        elif config.repair is not None:
            print("nothing to repair: nothing was written")
    return status[0]


if __name__ == "__main__":
    sys.exit(main())
