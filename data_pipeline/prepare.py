"""`python -m data_pipeline.prepare INPUT_DIR OUT.h5`: a folder of recordings becomes one window store.

Files are read, filtered and cut in parallel; the result of each is kept in a cache folder beside the output, under a
key made of its bytes and the settings, until the store is complete: an interrupted run goes on where it stopped. The
store appears at once (temporary file and rename), with a manifest beside it that says, for every file of the folder,
what became of it and why.

`python -m data_pipeline.prepare CORPUS --raw DIR --out DIR` prepares a published corpus from its original layout,
`python -m data_pipeline.prepare list` shows which.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data_pipeline import prepare_corpus
from data_pipeline.corpora import CORPORA
from data_pipeline.file_results import (
    digest_of,
    disk_full_named,
    json_beside,
    name_inside,
    outcome_of,
    package_version,
    write_json,
)
from data_pipeline.montages import Montage
from data_pipeline.preprocess import PreprocessConfig, preprocess, robust_amplitude
from data_pipeline.readers import companions, read_recording, why_not_a_recording
from data_pipeline.signal_options import SignalOptions, described_classes
from data_pipeline.store import SCHEMA_VERSION, StoreInfo, create_store
from data_pipeline.windows import LabelTable, Segment, Windows, annotation_segments, cut_windows, read_label_table
from data_pipeline.workers import completed, with_progress

_CACHE_VERSION = "2"  # raise when the code changes what a file becomes: older cached results are then not used


@dataclass(frozen=True)
class PrepareConfig(SignalOptions):
    """Settings of one run; frequencies in hertz, times in seconds."""

    input_dir: Annotated[Path, tyro.conf.Positional]
    """folder of recordings, searched recursively; or one recording"""
    out: Annotated[Path, tyro.conf.Positional]
    """window store to write (HDF5); a manifest (JSON) is written beside it"""
    labels: Path | None = None
    """CSV with the columns file, label and optionally start, stop, subject"""
    class_names: tuple[str, ...] = ()
    """order of the classes (default: sorted)"""
    task: Literal["auto", "classification", "regression"] = "auto"
    """what a single numeric label column means"""
    unlabelled: Literal["error", "skip"] = "error"
    """a recording without a row in the label table stops the run, or is left out"""
    annotations: tuple[str, ...] = ()
    """label by annotations of the file instead: DESCRIPTION or DESCRIPTION=CLASS"""
    include: tuple[str, ...] = ()
    """patterns of files to take, relative to the folder (default: all)"""
    exclude: tuple[str, ...] = ()
    """patterns of files to leave out"""
    rename: tuple[str, ...] = ()
    """LABEL=NAME: electrode names for labels that say nothing"""
    text_sfreq: float | None = None
    """sampling rate of CSV/TXT files that do not state theirs"""
    subject_pattern: str | None = None
    """regular expression with one group that finds the subject in a file's path"""
    jobs: int | None = None
    """processes (default: one per core, at most 4)"""

    def checked(self) -> "PrepareConfig":
        """The same settings. Raises ValueError, one sentence, for the first that cannot be right."""
        if not self.input_dir.exists():
            raise ValueError(f"{self.input_dir} is not a folder or a recording: it does not exist")
        if self.out.is_dir():
            raise ValueError(
                f"{self.out} is a folder: the output must be a file, for example {self.out / 'windows.h5'}"
            )
        if self.labels is not None and self.annotations:
            raise ValueError("--labels and --annotations exclude each other: labels come from one of them")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, found {self.jobs}")
        self.preprocess_config()
        self.check_signal_options()
        if self.subject_pattern is not None:
            _subject_regex(self.subject_pattern)
        return self

    def preprocess_config(self) -> PreprocessConfig:
        """The part that the signal chain needs. Raises ValueError for settings that contradict each other."""
        bad = [item for item in self.rename if "=" not in item]
        if bad:
            raise ValueError(f"--rename takes LABEL=NAME, found {bad[0]!r}")
        return self.chain_config(dict(item.split("=", 1) for item in self.rename))


@dataclass(frozen=True)
class FileTask:
    """One file to process in a worker: everything a worker needs, and nothing of the other files."""

    path: Path
    name: str
    cache: Path
    config: PrepareConfig
    segments: tuple[Segment, ...]
    subject: str


def prepare(config: PrepareConfig) -> dict:
    """Run the whole job and return the manifest that was written.

    Raises ValueError (bad input, nothing usable) or OSError (disk) with one sentence; an existing output is then
    untouched.
    """
    config = config.checked()
    files, others = _find_files(config)
    table = read_label_table(config.labels, task=config.task) if config.labels else None
    labelled, unlabelled = _match_labels(files, table, config)
    class_names = _class_names(table, config)
    cache = config.out.with_name(f".{config.out.name}.cache")
    tasks = [_task(name, path, labelled, table, cache, config) for name, path in files.items() if name in labelled]
    with disk_full_named(cache):
        cache.mkdir(parents=True, exist_ok=True)
        outcomes = _run(tasks, config.jobs or min(4, os.cpu_count() or 1))
        entries = others | unlabelled | {task.name: outcome for task, outcome in zip(tasks, outcomes, strict=True)}
        manifest = _manifest(config, entries, class_names)
        if not any(entry.get("windows") for entry in entries.values()):
            shutil.rmtree(cache, ignore_errors=True)
            raise ValueError(_nothing_usable(entries, config))
        with json_beside(_manifest_path(config.out), manifest):
            _write_store(config, tasks, outcomes, class_names)
        shutil.rmtree(cache, ignore_errors=True)
    return manifest


# --- which files, which labels ---------------------------------------------------------------------------------------


def _find_files(config: PrepareConfig) -> tuple[dict[str, Path], dict[str, dict]]:
    """Recordings by relative name, sorted, and manifest entries of the files that are none."""
    files, others = {}, {}
    single = config.input_dir.is_file()
    root = config.input_dir.parent if single else config.input_dir
    taken = {config.out.resolve(), _manifest_path(config.out).resolve()}
    taken |= {config.labels.resolve()} if config.labels else set()
    for path in [config.input_dir] if single else sorted(root.rglob("*")):
        name = name_inside(root, path)
        hidden = not single and any(part.startswith(".") for part in Path(name).parts)
        if hidden or not path.is_file() or path.resolve() in taken:
            continue
        if config.include and not any(fnmatch.fnmatch(name, pattern) for pattern in config.include):
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.exclude):
            continue
        try:
            reason = why_not_a_recording(path)
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
        if reason:
            others[name] = {"status": "skipped", "reason": reason}
        else:
            files[name] = path
    if single and others:
        raise ValueError(f"{config.input_dir} cannot be used: {others[name_inside(root, config.input_dir)]['reason']}")
    if not files:
        found = f"{len(others)} files, none of which is a recording" if others else "no files"
        raise ValueError(f"{config.input_dir} holds {found}: expected EDF, BDF, FIF, BrainVision, EEGLAB or CSV files")
    return files, others


def _match_labels(
    files: dict[str, Path], table: LabelTable | None, config: PrepareConfig
) -> tuple[dict[str, str | None], dict[str, dict]]:
    """Recording -> its key in the table (None without a table), and manifest entries of those left out."""
    if table is None:
        return dict.fromkeys(files), {}
    matched: dict[str, str | None] = {}
    unknown = []
    for key in table.segments:
        hits = _named_by(key, files)
        if len(hits) > 1:
            raise ValueError(
                f"{table.path}: {key!r} means {len(hits)} files ({', '.join(hits[:3])}): write their paths"
            )
        if hits and hits[0] in matched:
            raise ValueError(f"{table.path}: {key!r} and {matched[hits[0]]!r} both mean {hits[0]}: use one spelling")
        if hits:
            matched[hits[0]] = key
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{table.path} names {len(unknown)} files that are no recordings in {config.input_dir}: {_few(unknown)}"
        )
    bare = [name for name in files if name not in matched]
    if bare and config.unlabelled == "error":
        raise ValueError(
            f"{len(bare)} recordings have no row in {table.path} ({_few(bare)}): "
            "add rows, leave the files out with --exclude, or pass --unlabelled skip"
        )
    return matched, {name: {"status": "skipped", "reason": "no row in the label table"} for name in bare}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _named_by(key: str, files: dict[str, Path]) -> list[str]:
    """Recordings that a table's `file` means: the relative path, else the file name, else the name without suffix."""
    key = key.replace("\\", "/").removeprefix("./")
    if key in files:
        return [key]
    by_name = [name for name, path in files.items() if path.name == key]
    return by_name or [name for name, path in files.items() if path.stem == key]


def _class_names(table: LabelTable | None, config: PrepareConfig) -> tuple[str, ...] | None:
    found = table.class_names if table else tuple(sorted(set(described_classes(config.annotations).values()))) or None
    if not config.class_names:
        return found
    if found is None:
        raise ValueError("--class-names given, but there are no classes: labels are missing or are regression targets")
    missing = [name for name in found if name not in config.class_names]
    if missing or len(set(config.class_names)) != len(config.class_names):
        raise ValueError(f"--class-names must list each class once; not listed: {', '.join(missing) or 'none'}")
    return config.class_names


def _task(
    name: str, path: Path, labelled: dict[str, str | None], table: LabelTable | None, cache: Path, config: PrepareConfig
) -> FileTask:
    key = labelled[name]
    segments = table.segments[key] if table and key is not None else (Segment(),)
    subject = table.subjects.get(key, "") if table and key is not None else ""
    if not subject and config.subject_pattern is not None:
        found = _subject_regex(config.subject_pattern).search(name)
        if found is None:
            raise ValueError(f"--subject-pattern {config.subject_pattern!r} does not match {name}")
        subject = found[1]
    return FileTask(path, name, cache, config, segments, subject)


def _subject_regex(pattern: str) -> re.Pattern:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--subject-pattern {pattern!r} is not a regular expression: {error}") from error
    if regex.groups != 1:
        raise ValueError(f"--subject-pattern {pattern!r} needs exactly one group, for example '(sub-[0-9]+)'")
    return regex


# --- one file --------------------------------------------------------------------------------------------------------


def process_file(task: FileTask) -> dict:
    """Read, filter and cut one file, or find its result in the cache. Returns its manifest entry.

    Whatever is wrong with the file becomes a "rejected" entry with one sentence; only errors of the disk are raised.
    """
    digest = _digest(task.path)
    cached = task.cache / _cache_name(task, digest)
    if cached.with_suffix(".json").is_file():
        return json.loads(cached.with_suffix(".json").read_text()) | {"cached": str(cached)}
    entry, lasting = outcome_of(lambda: _windows_of(task, cached.with_suffix(".npz")), task.path.name)
    if lasting:
        write_json(cached.with_suffix(".json"), entry | {"sha256": digest})
    return entry | {"sha256": digest, "cached": str(cached)}


def _windows_of(task: FileTask, cached: Path) -> dict:
    config = task.config
    source = read_recording(task.path, text_sfreq=config.text_sfreq)
    recording, montage = preprocess(source, config.preprocess_config())
    segments, notes = task.segments, list(recording.notes)
    if config.annotations:
        seconds = config.event_seconds or config.window
        segments, ignored = annotation_segments(recording, described_classes(config.annotations), event_seconds=seconds)
        notes.append(f"{len(segments)} annotations used as labels, {ignored} others ignored")
    windows = cut_windows(recording, n_times=config.n_times, stride=config.stride_samples, segments=segments)
    subject, origin = _subject(task, source.subject)
    entry = {
        "status": "windows" if len(windows.signal) else "rejected",
        "windows": len(windows.signal),
        "rejected_windows": windows.rejected,
        "montage": montage.name,
        "channels": len(montage),
        "sfreq": source.sfreq,
        "duration_seconds": round(source.duration, 3),
        "unit": source.unit,
        "robust_amplitude_uv": float(f"{robust_amplitude(recording):.4g}"),
        "subject": subject,
        "subject_from": origin,
        "dropped_channels": recording.dropped,
        "notes": notes,
    }
    if len(windows.signal):
        _write_windows(cached, windows, montage)
    else:
        entry["reason"] = _why_no_window(windows.rejected, source.duration, config)
    return entry


def _why_no_window(rejected: dict[str, int], duration: float, config: PrepareConfig) -> str:
    if rejected:
        return "every window was rejected: " + ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    stretch = "annotated or labelled stretch" if config.annotations or config.labels else "recording"
    return f"no window of {config.window:g} s fits: the file lasts {duration:g} s, no {stretch} is long enough"


def _subject(task: FileTask, from_file: str) -> tuple[str, str]:
    if task.subject:
        return task.subject, "labels or --subject-pattern"
    if from_file:
        return from_file, "path (BIDS)"
    return Path(task.name).with_suffix("").as_posix(), "file name (every file its own subject)"


def _write_windows(path: Path, windows: Windows, montage: Montage) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                signal=windows.signal,
                start_samples=windows.start_samples,
                labels=np.array(json.dumps(windows.labels)),
                montage=np.array(json.dumps([montage.name, montage.ch_names])),
                locations=montage.locations,
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return digest_of((path, *companions(path)))


def _cache_name(task: FileTask, digest: str) -> str:
    """Key of a result: the bytes, and every setting that changes it (not: other files, class order, processes)."""
    ignored = ("input_dir", "out", "labels", "class_names", "task", "unlabelled", "include", "exclude", "jobs")
    settings = {k: v for k, v in dataclasses.asdict(task.config).items() if k not in ignored}
    parts = [_CACHE_VERSION, digest, task.name, task.subject, settings, [dataclasses.astuple(s) for s in task.segments]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# --- all files -------------------------------------------------------------------------------------------------------


def _run(tasks: Sequence[FileTask], jobs: int) -> list[dict]:
    """Outcomes in the order of the tasks, with a progress bar on stderr."""
    outcomes = dict(with_progress(completed(process_file, tasks, jobs=jobs), len(tasks), "preparing"))
    return [outcomes[i] for i in range(len(tasks))]


def _write_store(
    config: PrepareConfig, tasks: Sequence[FileTask], outcomes: Sequence[dict], class_names: tuple[str, ...] | None
) -> None:
    chain = config.preprocess_config()
    info = StoreInfo(
        sfreq=config.sfreq,
        n_times=config.n_times,
        stride_seconds=config.stride_samples / config.sfreq,
        filters={"l_freq": chain.l_freq, "h_freq": chain.h_freq, "notch": chain.notch, "reference": chain.reference},
        class_names=class_names,
        source_version=f"lumamba_jax {package_version('lumamba-jax')}, mne {package_version('mne')}",
    )
    used = [(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True) if outcome.get("windows")]
    with create_store(config.out, info) as store:
        for (task, outcome), group in zip(used, _group_names([task.name for task, _ in used]), strict=True):
            with np.load(Path(outcome["cached"]).with_suffix(".npz")) as part:
                name, ch_names = json.loads(str(part["montage"]))
                store.add(
                    group,
                    part["signal"],
                    Montage(name, ch_names, part["locations"]),
                    subject=outcome["subject"],
                    recording=task.name,
                    start_samples=part["start_samples"],
                    labels=_label_array(json.loads(str(part["labels"])), class_names),
                )


def _label_array(labels: list, class_names: tuple[str, ...] | None) -> np.ndarray | None:
    if labels[0] is None:
        return None
    if class_names is None:
        return np.array(labels, dtype=np.float32)
    return np.array([class_names.index(label) for label in labels], dtype=np.int64)


def _group_names(names: Sequence[str]) -> list[str]:
    """HDF5 group of each recording: its path without the suffix, with it where two would collide."""
    short = [Path(name).with_suffix("").as_posix().replace("/", "__") for name in names]
    return [s if short.count(s) == 1 else n.replace("/", "__") for s, n in zip(short, names, strict=True)]


# --- manifest and messages -------------------------------------------------------------------------------------------


def _manifest(config: PrepareConfig, entries: dict[str, dict], class_names: tuple[str, ...] | None) -> dict:
    files = {name: {k: v for k, v in entries[name].items() if k != "cached"} for name in sorted(entries)}
    count = {
        status: sum(e["status"] == status for e in files.values()) for status in ("windows", "rejected", "skipped")
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "output": config.out.name,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "class_names": class_names,
        "counts": count | {"total_windows": sum(e.get("windows", 0) for e in files.values())},
        "montages": sorted({e["montage"] for e in files.values() if e.get("windows")}),
        "subjects": len({e["subject"] for e in files.values() if e.get("windows")}),
        "files": files,
    }


def _manifest_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.manifest.json")


def _nothing_usable(entries: dict[str, dict], config: PrepareConfig) -> str:
    rejected = {name: entry["reason"] for name, entry in entries.items() if entry["status"] == "rejected"}
    shown = [f"\n  {name}: {reason}" for name, reason in list(rejected.items())[:20]]
    more = f"\n  and {len(rejected) - 20} more" if len(rejected) > 20 else ""
    return f"no usable window in {config.input_dir}: {len(rejected)} recordings were rejected{''.join(shown)}{more}"


def _print_summary(manifest: dict, out: Path) -> None:
    for name, entry in manifest["files"].items():
        if entry.get("windows"):
            lost = "".join(f", {count} rejected ({reason})" for reason, count in entry["rejected_windows"].items())
            print(
                f"{name}: {entry['windows']} windows{lost}; {entry['montage']}, {entry['channels']} channels, "
                f"{entry['sfreq']:g} Hz, {entry['unit']}, {entry['robust_amplitude_uv']:g} uV"
            )
        else:
            print(f"{name}: {entry['status']}: {entry['reason']}")
    counts = manifest["counts"]
    print(
        f"{out}: {counts['total_windows']} windows from {counts['windows']} files of {manifest['subjects']} subjects, "
        f"{len(manifest['montages'])} montages; {counts['rejected']} files rejected, {counts['skipped']} skipped; "
        f"details in {_manifest_path(out)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one message on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["list"]:
            prepare_corpus.list_corpora()
        elif arguments and arguments[0] in CORPORA:
            return prepare_corpus.main(arguments[0], arguments[1:])
        else:
            config = tyro.cli(
                PrepareConfig, args=arguments, description=__doc__, prog="python -m data_pipeline.prepare"
            )
            _print_summary(prepare(config), config.out)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"prepare: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; finished files are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
