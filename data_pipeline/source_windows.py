"""One source of a corpus to windows, in a worker: read, filter, cut, label, and keep the result until it is stored.

A result lies in the folder of the run under a key made of the bytes of the files, the options that matter to it and
the versions of what computed it: `<key>.json` (the manifest entry) and `<key>.npz` (the windows, when there are any).
"""

import dataclasses
import hashlib
import json
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.corpora.base import Corpus, Drop, Piece, Source
from data_pipeline.file_results import digest_of, outcome_of, package_version, write_json
from data_pipeline.montages import Montage
from data_pipeline.preprocess import FLAT_UV, PreprocessConfig, preprocess, robust_amplitude
from data_pipeline.readers import companions
from data_pipeline.recording import Recording
from data_pipeline.windows import cut_windows

RESULT_VERSION = "3"  # raise when the code changes what a source becomes: older results are then not used


@dataclass(frozen=True)
class SourceTask:
    """Everything a worker needs for one source. stored: key of a result whose windows a store holds already."""

    source: Source
    corpus: Corpus
    results: Path
    stored: str = ""

    def files(self, key: str) -> tuple[Path, Path]:
        """Entry (JSON) and windows (npz) of a result."""
        folder = self.results / key[:2]
        return folder / f"{key}.json", folder / f"{key}.npz"


@dataclass(frozen=True)
class Block:
    """Windows of one piece: signal (n,C,T) float32 microvolts, start_samples (n,) at the stored rate, labels (n,) or
    (n,K) or None, the name and part of the piece, and the montage of all of them.
    """

    signal: np.ndarray
    start_samples: np.ndarray
    labels: np.ndarray | None
    name: str
    part: str
    montage: Montage


def digest_source(task: SourceTask) -> dict:
    """SHA-256 over the files of a source; "" for one that cannot be read."""
    try:
        return {"sha256": digest_of(_files(task.source))}
    except OSError:
        return {"sha256": ""}


def process_source(task: SourceTask) -> dict:
    """The manifest entry of a source, from its result or by making it. Only a full disk raises.

    The entry has two keys more than the manifest: "key", of the result, and "transient": it may be better next time.
    """
    entry, _ = outcome_of(lambda: {"sha256": digest_of(_files(task.source))}, task.source.path.name)
    if "sha256" not in entry:
        return entry | {"key": "", "transient": True}
    digest = entry["sha256"]
    key = result_key(task, digest)
    record, windows = task.files(key)
    known = _known(record)
    if known is not None and (not known.get("windows") or key == task.stored or _whole(windows)):
        return known | {"key": key, "transient": False}
    blocks: list[Block] = []
    entry, lasting = outcome_of(lambda: _make_windows(task, blocks), task.source.path.name)
    entry |= {"sha256": digest}
    record.parent.mkdir(parents=True, exist_ok=True)
    if "windows" in entry:
        _write_blocks(windows, blocks)
    if lasting:
        write_json(record, entry)
    return entry | {"key": key, "transient": not lasting}


def result_key(task: SourceTask, digest: str) -> str:
    """What a result depends on, as 32 hex digits: not the split, not other files, not who computes it."""
    source, corpus = task.source, task.corpus
    options = {key: value for key, value in corpus.settings().items() if key not in corpus.split_options}
    versions = [RESULT_VERSION, package_version("lumamba-jax"), package_version("mne")]
    own = [source.name, source.subject, source.session, source.label, source.classes]
    parts = [versions, corpus.name, options, digest, own]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of a result, in order."""
    with np.load(path) as arrays:
        for i, about in enumerate(json.loads(str(arrays["about"]))):
            montage = Montage(about["montage"], tuple(about["ch_names"]), arrays[f"locations_{i}"])
            labels = arrays[f"labels_{i}"] if about["labelled"] else None
            signal, starts = arrays[f"signal_{i}"], arrays[f"starts_{i}"]
            yield Block(signal, starts, labels, about["name"], about["part"], montage)


def _known(record: Path) -> dict | None:
    """The entry of an earlier run; None when there is none, or when a crash of the machine left it damaged."""
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def _whole(windows: Path) -> bool:
    """Whether an earlier run's windows are there, with the checksums they were written with."""
    try:
        with zipfile.ZipFile(windows) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _files(source: Source) -> list[Path]:
    return [source.path, *sorted({*source.companions, *companions(source.path)})]


def _make_windows(task: SourceTask, blocks: list[Block]) -> dict:
    """Manifest entry of a source; its windows are appended to `blocks`."""
    source, corpus = task.source, task.corpus
    rejected, facts = Counter(), []
    for piece in corpus.read(source):
        chain = _chain(piece.recording, corpus.chain(source), lower=corpus.low_rate == "lower")
        recording, montage = preprocess(piece.recording, chain)
        block, lost = _block(piece, recording, corpus.placed(montage), corpus)
        rejected.update(lost)
        facts.append(_facts(piece.recording, recording))
        if len(block.signal):
            blocks.append(block)
    if not facts:
        raise ValueError("holds nothing that this corpus uses")
    n_windows = sum(len(block.signal) for block in blocks)
    entry: dict = {"status": "windows", "windows": n_windows} if n_windows else {"status": "rejected"}
    entry |= _joined(facts) | {"rejected_windows": dict(rejected)}
    if not n_windows:
        entry["reason"] = _why_no_window(rejected, entry["duration_seconds"], corpus)
        return entry
    parts = {block.part for block in blocks}
    entry["parts"] = {p: sum(len(b.signal) for b in blocks if b.part == p) for p in sorted(parts)}
    entry["labels"] = {p: _counted([b.labels for b in blocks if b.part == p]) for p in sorted(parts)}
    entry |= {"montage": blocks[0].montage.name, "channels": len(blocks[0].montage)}
    return entry


def _chain(recording: Recording, chain: PreprocessConfig, *, lower: bool) -> PreprocessConfig:
    if chain.h_freq is not None and recording.sfreq / 2 <= chain.h_freq and not lower:
        raise ValueError(
            f"sampled at {recording.sfreq:g} Hz: the band to {chain.h_freq:g} Hz reaches its Nyquist frequency "
            "(--low-rate lower keeps such files)"
        )
    return chain


def _block(piece: Piece, recording: Recording, montage: Montage, corpus: Corpus) -> tuple[Block, dict[str, int]]:
    cut = cut_windows(
        recording, n_times=corpus.n_times, stride=corpus.stride_samples, segments=piece.segments, keep_flat=True
    )
    labels = [piece.label if label is None else label for label in cut.labels]
    if piece.label_windows is not None:
        labels = list(piece.label_windows(cut.start_samples, recording.n_times))
    kept = [i for i, label in enumerate(labels) if not isinstance(label, Drop)]
    dropped = Counter(label.reason for label in labels if isinstance(label, Drop))
    signal, starts = (cut.signal, cut.start_samples) if not dropped else (cut.signal[kept], cut.start_samples[kept])
    starts = starts + round(piece.onset * recording.sfreq)
    array = _label_array([labels[i] for i in kept])
    return Block(signal, starts, array, piece.name, piece.part, montage), dict(cut.rejected) | dropped


def _label_array(labels: Sequence) -> np.ndarray | None:
    """(n,) int64 classes, (n,K) int8 classes per channel, (n,K) float32 targets, or None."""
    if not labels or labels[0] is None:
        return None
    array = np.asarray(labels)
    if array.ndim == 1:
        return array.astype(np.int64)
    return array.astype(np.int8 if np.issubdtype(array.dtype, np.integer) else np.float32)


def _counted(labels: Sequence[np.ndarray | None]) -> dict[str, int]:
    """How often each class number occurs (per channel labels: in windows times channels); {} for targets."""
    counts: Counter = Counter()
    for own in labels:
        if own is not None and np.issubdtype(own.dtype, np.integer):
            counts.update({str(value): int(n) for value, n in zip(*np.unique(own, return_counts=True), strict=True)})
    return dict(sorted(counts.items()))


def _facts(source: Recording, recording: Recording) -> dict:
    flat = int((recording.signal_uv.std(axis=1) < FLAT_UV).sum())
    return {
        "sfreq": source.sfreq,
        "duration_seconds": source.duration,
        "unit": source.unit,
        "robust_amplitude_uv": robust_amplitude(recording),
        "flat_channels": flat,
        "dropped_channels": sorted(recording.dropped),
        "notes": list(recording.notes),
    }


def _joined(facts: list[dict]) -> dict:
    """One set of facts for all pieces: total duration, median amplitude, notes once each."""
    joined = dict(facts[0])
    joined["duration_seconds"] = round(sum(own["duration_seconds"] for own in facts), 3)
    joined["robust_amplitude_uv"] = float(f"{np.median([own['robust_amplitude_uv'] for own in facts]):.4g}")
    joined["flat_channels"] = max(own["flat_channels"] for own in facts)
    joined["notes"] = list(dict.fromkeys(note for own in facts for note in own["notes"]))
    return joined


def _why_no_window(rejected: Counter, duration: float, corpus: Corpus) -> str:
    if rejected:
        return "every window was left out: " + ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return f"no window of {corpus.window:g} s fits: the file lasts {duration:g} s"


def _write_blocks(path: Path, blocks: Sequence[Block]) -> None:
    """Write the result, whole or not at all; two workers may do so at the same time."""
    arrays, about = {}, []
    for i, block in enumerate(blocks):
        arrays |= {f"signal_{i}": block.signal, f"starts_{i}": block.start_samples}
        arrays[f"locations_{i}"] = block.montage.locations
        if block.labels is not None:
            arrays[f"labels_{i}"] = block.labels
        montage = {"montage": block.montage.name, "ch_names": block.montage.ch_names}
        about.append({"name": block.name, "part": block.part, "labelled": block.labels is not None} | montage)
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays, about=np.array(json.dumps(about)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def with_stored(task: SourceTask, key: str) -> SourceTask:
    """The same task, with the key of a result that a store holds already."""
    return dataclasses.replace(task, stored=key)
