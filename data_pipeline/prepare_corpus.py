"""`python -m data_pipeline.prepare CORPUS --raw DIR --out DIR`: a corpus in its original layout becomes window stores.

OUT receives one store per part (train.h5, validation.h5, test.h5), split.json, manifest.json and report.html. While
the run works, results of single files and finished stores lie in OUT/.prepare; at the end everything is moved at once,
the manifest last. A run that was killed at any moment goes on where it stopped and ends with the same bytes; a second
run finds that nothing is to be done.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from data_pipeline.corpora import CORPORA
from data_pipeline.corpora.base import PARTS, Catalogue, Corpus, Division, Source, checked_disjoint
from data_pipeline.file_results import digest_of, disk_full_named, package_version, write_json
from data_pipeline.report import files_by_reason, write_report
from data_pipeline.source_windows import SourceTask, digest_source, process_source, read_blocks, with_stored
from data_pipeline.splits import Split, save_split
from data_pipeline.store import SCHEMA_VERSION, StoreInfo, create_store
from data_pipeline.workers import completed, with_progress

MANIFEST, SPLIT, REPORT = "manifest.json", "split.json", "report.html"
_WORK, _LOCK = ".prepare", "lock"
_SHOWN = 20  # reasons on the terminal; the report has all
_FORMAT = "1"  # of the manifest and of what lies in the work folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a corpus is, where its stores go, and who does the work."""

    raw: Path
    """folder of the corpus in its original layout"""
    out: Path
    """folder for the stores, the split, the manifest and the report"""
    jobs: int | None = None
    """processes on this machine (default: one per core, at most 4; 1 = in this process)"""
    scheduler: str | None = None
    """address of a Dask scheduler whose workers do the work, for example tcp://HOST:8786; they must see both folders"""


@dataclass(frozen=True)
class _Plan:
    """What a run is going to do; its key is that of the outputs, apart from the bytes of the files."""

    corpus: Corpus
    run: Run
    catalogue: Catalogue
    division: Division
    key: str
    blocks: Sequence[range]  # of the sources that share a store

    @property
    def work(self) -> Path:
        return self.run.out / _WORK

    def part(self, source: Source) -> str:
        """Part of a source, "" when its pieces say it."""
        return self.division.parts[source.name]

    def store_name(self, part: str, block: int) -> str:
        """File of a part inside the output: one per part, or a folder of numbered ones."""
        return f"{part}.h5" if len(self.blocks) == 1 else f"{part}/{part}-{block:05d}.h5"


@dataclass
class _Stored:
    """A finished block: the result keys it was made of, and its stores by their names in the output."""

    keys: dict[str, str]
    stores: dict[str, dict]
    digest: str = field(default="")


def prepare_corpus(corpus: Corpus, run: Run) -> dict:
    """Run the whole job and return the manifest that lies in the output folder.

    Raises ValueError (bad input, nothing usable) or OSError (disk) with one sentence; existing output stays as it is.
    """
    if run.jobs is not None and run.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, found {run.jobs}")
    if run.out.exists() and not run.out.is_dir():
        raise ValueError(f"{run.out} is a file: --out must be a folder")
    if run.raw.resolve() == run.out.resolve():
        raise ValueError("--raw and --out are the same folder: the corpus itself stays as it is, give another --out")
    plan = _plan(corpus, run)
    run.out.mkdir(parents=True, exist_ok=True)
    with _alone(plan.work), disk_full_named(plan.work):
        if _finish_moves(run.out):
            _clear(plan.work)
        known = _known(run.out)
        if known is not None and _up_to_date(plan, known):
            _clear(plan.work)
            return known
        (plan.work / "results").mkdir(exist_ok=True)
        outcomes, stored = _make_stores(plan)
        manifest = _manifest(plan, outcomes, stored)
        if not manifest["counts"]["total_windows"]:
            _clear(plan.work)
            raise ValueError(_nothing_usable(manifest, run))
        _stage_descriptions(plan, manifest)
        old = [] if known is None else list(known["outputs"])
        _start_moves(run.out, [*manifest["outputs"], SPLIT, REPORT, MANIFEST], old)
        _clear(plan.work)
    return manifest


# --- what is to be done ----------------------------------------------------------------------------------------------


def _plan(corpus: Corpus, run: Run) -> _Plan:
    corpus = corpus.completed(run.raw.resolve())
    catalogue = corpus.find(run.raw.resolve())
    division = checked_disjoint(corpus.split(catalogue), catalogue.sources)
    catalogue = catalogue.without(division.left_out)
    count = len(catalogue.sources)
    per_store = corpus.recordings_per_store or max(count, 1)
    blocks = [range(start, min(start + per_store, count)) for start in range(0, count, per_store)]
    return _Plan(corpus, run, catalogue, division, _key(corpus, catalogue, division), blocks)


def _key(corpus: Corpus, catalogue: Catalogue, division: Division) -> str:
    sources = [[s.name, s.subject, s.session, s.part, s.label, s.classes] for s in catalogue.sources]
    versions = [_FORMAT, SCHEMA_VERSION, package_version("lumamba-jax"), package_version("mne")]
    found = [sources, dict(catalogue.left_out), list(catalogue.warnings)]
    content = [versions, corpus.name, corpus.settings(), found, dataclasses.asdict(division)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _known(out: Path) -> dict | None:
    """The manifest of an earlier run. Raises ValueError when the folder holds another's stores."""
    if not (out / MANIFEST).is_file():
        strangers = [name for name in (*(f"{part}.h5" for part in PARTS), *PARTS) if (out / name).exists()]
        if strangers:
            raise ValueError(f"{out} holds {strangers[0]} and no {MANIFEST}: move it away or give another --out")
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        return manifest if "outputs" in manifest else None
    except ValueError as error:
        raise ValueError(f"{out / MANIFEST} is damaged: remove it and the stores beside it") from error


def _up_to_date(plan: _Plan, known: dict) -> bool:
    """Whether the outputs are those of the same plan, and every source still has the bytes they were made of."""
    if known.get("key") != plan.key or known["counts"]["transient"]:
        return False
    for name, about in known["outputs"].items():
        path = plan.run.out / name
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            return False
    tasks = _tasks(plan, {})
    found = with_progress(_on_workers(plan, digest_source, tasks), len(tasks), "checking")
    return all(known["files"][tasks[i].source.name]["sha256"] == outcome["sha256"] for i, outcome in found)


def _tasks(plan: _Plan, stored: Mapping[str, str]) -> list[SourceTask]:
    results = plan.work.resolve() / "results"
    bare = [SourceTask(source, plan.corpus, results) for source in plan.catalogue.sources]
    return [with_stored(task, stored.get(task.source.name, "")) for task in bare]


def _on_workers(plan: _Plan, work: object, tasks: Sequence[SourceTask]) -> Iterator[tuple[int, dict]]:
    jobs = plan.run.jobs or min(4, os.cpu_count() or 1)
    shared = plan.run.raw.resolve() if work is digest_source else plan.work.resolve()
    return completed(work, tasks, jobs=jobs, scheduler=plan.run.scheduler, shared=shared)  # pyright: ignore[reportArgumentType]


# --- files to stores -------------------------------------------------------------------------------------------------


def _make_stores(plan: _Plan) -> tuple[list[dict], list[_Stored]]:
    """Process every source and write every block of them as soon as it is complete.

    Windows of a source are kept until they are in a store. A block whose stores hold other results than the sources
    now have (a file was changed in between) is made again.
    """
    stored = [_read_stored(plan, block) for block in range(len(plan.blocks))]
    tasks = _tasks(plan, {name: key for own in stored if own for name, key in own.keys.items()})
    outcomes: dict[int, dict] = {}
    pending = list(range(len(tasks)))
    done: dict[int, _Stored] = {}
    with concurrent.futures.ThreadPoolExecutor(1) as writer:  # workers go on while a store is written
        while pending:
            writing: dict[int, concurrent.futures.Future[_Stored | None]] = {}
            block_of = {i: block for block, rows in enumerate(plan.blocks) for i in rows}
            left = Counter(block_of[i] for i in pending)
            results = _on_workers(plan, process_source, [tasks[i] for i in pending])
            for position, outcome in with_progress(results, len(pending), "preparing"):
                index = pending[position]
                outcomes[index] = outcome
                block = block_of[index]
                left[block] -= 1
                if not left[block]:
                    own = {i: outcomes[i] for i in plan.blocks[block]}
                    writing[block] = writer.submit(_write_block, plan, block, own, stored[block])
                for future in writing.values():
                    if future.done():
                        future.result()  # a full disk ends the run now
            made = {block: future.result() for block, future in writing.items()}
            done |= {block: own for block, own in made.items() if own is not None}
            again = [i for block, own in made.items() if own is None for i in plan.blocks[block]]
            pending = [i for i in again if _lost(tasks[i], outcomes[i])]
            for i in pending:
                tasks[i] = with_stored(tasks[i], "")
            for block in {block_of[i] for i in again}:
                stored[block] = None
    return [outcomes[i] for i in range(len(tasks))], [done[block] for block in range(len(plan.blocks))]


def _lost(task: SourceTask, outcome: dict) -> bool:
    """Whether the windows of a result are not in the results folder."""
    return bool(outcome.get("windows")) and not task.files(outcome["key"])[1].is_file()


def _record_path(plan: _Plan, block: int) -> Path:
    return plan.work / "blocks" / f"{block:05d}.json"


def _read_stored(plan: _Plan, block: int) -> _Stored | None:
    """The record of a block that an earlier run finished, if its stores are there."""
    path = _record_path(plan, block)
    if not path.is_file():
        return None
    own = _Stored(**json.loads(path.read_text()))
    staged = [plan.work / "stores" / name for name in own.stores]
    sizes = [about["bytes"] for about in own.stores.values()]
    whole = all(p.is_file() and p.stat().st_size == size for p, size in zip(staged, sizes, strict=True))
    return own if whole else None


def _write_block(plan: _Plan, block: int, outcomes: Mapping[int, dict], earlier: _Stored | None) -> _Stored | None:
    """The stores of a block; None when windows are lacking that an earlier block had, which now is out of date."""
    used = {i: outcome for i, outcome in outcomes.items() if outcome.get("windows")}
    sources = plan.catalogue.sources
    keys = {sources[i].name: outcome["key"] for i, outcome in used.items()}
    parts = {sources[i].name: plan.part(sources[i]) for i in used}
    digest = hashlib.sha256(json.dumps([plan.key, keys, parts], sort_keys=True).encode()).hexdigest()
    if earlier is not None and earlier.digest == digest:
        return earlier
    tasks = {i: SourceTask(sources[i], plan.corpus, plan.work.resolve() / "results") for i in used}
    if any(_lost(tasks[i], outcome) for i, outcome in used.items()):
        return None
    stores = {}
    for part in PARTS:
        own = [i for i, outcome in used.items() if any((p or plan.part(sources[i])) == part for p in outcome["parts"])]
        if own:
            name = plan.store_name(part, block)
            stores[name] = _write_store(plan, name, part, [(tasks[i], used[i]["key"]) for i in own])
    record = _Stored(keys, stores, digest)
    _record_path(plan, block).parent.mkdir(parents=True, exist_ok=True)
    write_json(_record_path(plan, block), dataclasses.asdict(record))
    if len(plan.blocks) > 1:  # one block: the results stay for a run with another split
        for i, outcome in used.items():
            tasks[i].files(outcome["key"])[1].unlink(missing_ok=True)
    return record


def _write_store(plan: _Plan, name: str, part: str, results: Sequence[tuple[SourceTask, str]]) -> dict:
    path = plan.work / "stores" / name
    n_windows, subjects = 0, set()
    groups = _group_names([task.source.name for task, _ in results])
    with create_store(path, _store_info(plan.corpus, plan.division, part)) as store:
        for (task, key), group in zip(results, groups, strict=True):
            for block in read_blocks(task.files(key)[1]):
                if (block.part or plan.part(task.source)) != part:
                    continue
                store.add(
                    f"{group}__{block.name}" if block.name else group,
                    block.signal,
                    block.montage,
                    subject=task.source.subject,
                    recording=f"{task.source.name}#{block.name}" if block.name else task.source.name,
                    start_samples=block.start_samples,
                    labels=block.labels,
                )
                n_windows += len(block.signal)
                subjects.add(task.source.subject)
    about = {"part": part, "windows": n_windows, "recordings": len(results), "subjects": len(subjects)}
    return about | {"bytes": path.stat().st_size, "sha256": digest_of([path])}


def _store_info(corpus: Corpus, division: Division, part: str) -> StoreInfo:
    chain = corpus.common_chain()
    provenance = {"corpus": corpus.name, "part": part, "options": corpus.settings(), "split": division.rule}
    return StoreInfo(
        sfreq=chain.sfreq,
        n_times=corpus.n_times,
        stride_seconds=corpus.stride_samples / chain.sfreq,
        filters={"l_freq": chain.l_freq, "h_freq": chain.h_freq, "notch": chain.notch, "reference": chain.reference},
        provenance=provenance | {"citation": corpus.citation, "licence": corpus.licence},
        class_names=corpus.class_names(),
        source_version=f"lumamba_jax {package_version('lumamba-jax')}, mne {package_version('mne')}",
    )


def _group_names(names: Sequence[str]) -> list[str]:
    """HDF5 group of each recording: its path without the suffix, with it where two would collide."""
    short = [Path(name).with_suffix("").as_posix().replace("/", "__") for name in names]
    count = Counter(short)
    return [s if count[s] == 1 else n.replace("/", "__") for s, n in zip(short, names, strict=True)]


# --- what is said about it -------------------------------------------------------------------------------------------


def _manifest(plan: _Plan, outcomes: Sequence[dict], stored: Sequence[_Stored]) -> dict:
    corpus, division = plan.corpus, plan.division
    files: dict[str, dict] = {
        name: {"status": "skipped", "reason": reason} for name, reason in plan.catalogue.left_out.items()
    }
    for source, outcome in zip(plan.catalogue.sources, outcomes, strict=True):
        files[source.name] = _file_entry(source, outcome, plan.part(source))
    statuses = Counter(entry["status"] for entry in files.values())
    names, parts = corpus.class_names(), _parts(files)
    empty = [part for part in PARTS if part in division.parts.values() and part not in parts]
    warnings = [f"there are no {part} windows: every file of this part was left out" for part in empty]
    return {
        "schema_version": SCHEMA_VERSION,
        "corpus": corpus.name,
        "title": corpus.title,
        "licence": corpus.licence,
        "citation": corpus.citation,
        "software": f"lumamba_jax {package_version('lumamba-jax')}, mne {package_version('mne')}",
        "key": plan.key,
        "options": corpus.settings(),
        "signal": _signal(corpus),
        "class_names": names,
        "outputs": dict(sorted((name, about) for own in stored for name, about in own.stores.items())),
        "counts": {status: statuses[status] for status in ("windows", "rejected", "skipped")}
        | {"total_windows": sum(e.get("windows", 0) for e in files.values())}
        | {"transient": sum(bool(outcome.get("transient")) for outcome in outcomes)},
        "parts": parts,
        "expected": dataclasses.asdict(corpus.expected),
        "split": {"unit": division.unit, "rule": division.rule},
        "warnings": [*plan.catalogue.warnings, *warnings],
        "files": dict(sorted(files.items())),
    }


def _signal(corpus: Corpus) -> dict:
    """The signal chain and the windows: hertz and seconds, None where a filter is off."""
    chain = corpus.common_chain()
    return {
        "band": [chain.l_freq, chain.h_freq],
        "notch": chain.notch,
        "sfreq": chain.sfreq,
        "reference": chain.reference,
        "window_seconds": corpus.n_times / chain.sfreq,
        "stride_seconds": corpus.stride_samples / chain.sfreq,
    }


def _file_entry(source: Source, outcome: dict, part: str) -> dict:
    """The entry of a source, with its subject, and its parts by their names."""
    entry = {k: v for k, v in outcome.items() if k not in ("key", "transient")}
    for column in ("parts", "labels"):
        if column in entry:
            entry[column] = {own or part: value for own, value in entry[column].items()}
    return entry | {"subject": source.subject, "session": source.session}


def _parts(files: Mapping[str, dict]) -> dict[str, dict]:
    """Windows, recordings, subjects and labels of every part that has windows."""
    parts = {}
    for part in PARTS:
        own = [entry for entry in files.values() if part in entry.get("parts", {})]
        labels: Counter = Counter()
        for entry in own:
            labels.update(entry["labels"][part])
        if own:
            parts[part] = {
                "windows": sum(entry["parts"][part] for entry in own),
                "recordings": len(own),
                "subjects": sorted({entry["subject"] for entry in own}),
                "labels": dict(sorted(labels.items(), key=lambda item: int(item[0]))),
            }
    return parts


def _stage_descriptions(plan: _Plan, manifest: dict) -> None:
    """Split, report and manifest beside the staged stores."""
    stores = plan.work / "stores"
    _write_split(plan, manifest, stores / SPLIT)
    manifest["split"]["sha256"] = json.loads((stores / SPLIT).read_text())["sha256"]
    write_report(manifest, stores / REPORT)
    write_json(stores / MANIFEST, manifest)


def _write_split(plan: _Plan, manifest: dict, path: Path) -> None:
    """Subjects of each part in the form of `splits.save_split`; recordings when the unit is not the subject."""
    parts, nobody = manifest["parts"], np.zeros(0, np.int64)
    if plan.division.unit == "subject":
        subjects = {key: tuple(parts.get(part, {}).get("subjects", ())) for key, part in _SPLIT_KEYS.items()}
        save_split(Split(nobody, nobody, nobody, subjects=subjects), path)
        return
    files = manifest["files"].items()
    own = {key: [name for name, entry in files if part in entry.get("parts", {})] for key, part in _SPLIT_KEYS.items()}
    content = {"unit": plan.division.unit, "rule": plan.division.rule} | own
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    write_json(path, content | {"sha256": digest})


_SPLIT_KEYS = {"train": "train", "val": "validation", "test": "test"}  # names of `splits` -> names of the stores


def _nothing_usable(manifest: dict, run: Run) -> str:
    reasons = list(files_by_reason(manifest).items())[:_SHOWN]
    shown = "".join(f"\n  {len(names):,} files: {reason} ({names[0]}, ...)" for (_, reason), names in reasons)
    return f"no usable window in {run.raw}:{shown}"


# --- the last moment -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the work folder, refuse a second run; the operating system lets go of the lock when a process dies.

    A folder without anything but the lock is removed at the end, out of the way at once in case another run begins.
    """
    with contextlib.ExitStack() as held:
        while not _locked(work, held):
            pass
        for leftover in work.parent.glob(f"{_WORK}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield
        finally:
            if [path.name for path in work.iterdir()] == [_LOCK]:
                aside = work.with_name(f"{_WORK}.{uuid.uuid4().hex[:8]}")
                work.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)


def _locked(work: Path, held: contextlib.ExitStack) -> bool:
    """Take the lock; False when its holder removed the folder while we opened the file."""
    work.mkdir(exist_ok=True)
    try:
        import fcntl

        handle = held.enter_context((work / _LOCK).open("w"))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle.fileno()).st_ino == (work / _LOCK).stat().st_ino
    except ImportError:  # no such locks on this system
        (work / _LOCK).touch()
        return True
    except BlockingIOError:
        raise ValueError(f"another run is writing to {work.parent}: wait for it, or give another --out") from None
    except FileNotFoundError:
        return False


def _clear(work: Path) -> None:
    """Remove everything from the work folder but the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            path.unlink(missing_ok=True)


def _start_moves(out: Path, names: Sequence[str], old: Sequence[str]) -> None:
    """Replace the outputs `old` of an earlier run by the staged `names`; from here on the change is carried through.

    The moves are written down first: a run that is killed in between is completed by the next one. Old outputs go
    before new ones come, so the folder never mixes two runs, and the manifest comes last.
    """
    write_json(out / _WORK / "moves.json", {"names": list(names), "old": [MANIFEST, *old, SPLIT, REPORT]})
    _finish_moves(out)


def _finish_moves(out: Path) -> bool:
    """Carry out the moves that are written down; whether there were any."""
    work = out / _WORK
    record, cleared = work / "moves.json", work / "cleared"
    if not record.is_file():
        return False
    moves = json.loads(record.read_text())
    if not cleared.exists():
        for name in moves["old"]:
            (out / name).unlink(missing_ok=True)
        for folder in PARTS:
            with contextlib.suppress(OSError):  # not empty, or not there
                (out / folder).rmdir()
        cleared.touch()
    for name in moves["names"]:
        if (work / "stores" / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "stores" / name).replace(out / name)
    record.unlink()  # before anything else goes: without `cleared` it would clear what has just come
    return True


# --- command line ----------------------------------------------------------------------------------------------------


def main(name: str, arguments: Sequence[str]) -> int:
    """Command line of one corpus; returns the exit status. Raises what `prepare_corpus` raises."""
    corpus = CORPORA[name]
    fields = [("run", Run), ("corpus", corpus)]
    command = dataclasses.make_dataclass("Command", fields)
    chosen = tyro.cli(
        tyro.conf.OmitArgPrefixes[command],
        args=arguments,
        description=f"{corpus.title}. Expected below --raw: {corpus.layout}.",
        prog=f"python -m data_pipeline.prepare {name}",
    )
    manifest = prepare_corpus(chosen.corpus, chosen.run)
    _print_summary(manifest, chosen.run.out)
    return 0


def _print_summary(manifest: dict, out: Path) -> None:
    for warning in manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    for (status, reason), names in list(files_by_reason(manifest).items())[:_SHOWN]:
        print(f"{len(names):,} files {status}: {reason} ({names[0]}{', ...' if len(names) > 1 else ''})")
    for part, about in manifest["parts"].items():
        published = manifest["expected"]["windows"].get(part)
        beside = f" (published: {published:,})" if published else ""
        print(
            f"{part}: {about['windows']:,} windows{beside} from {about['recordings']:,} recordings of "
            f"{len(about['subjects']):,} subjects"
        )
    print(f"{out}: {', '.join(manifest['outputs'])}; details in {REPORT} and {MANIFEST}")


def list_corpora() -> None:
    """Print every corpus: command, where to get it, licence, what is expected on disk and published counts."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for name, corpus in sorted(CORPORA.items()):
        expected = corpus.expected
        counts = [f"{part} {n:,} windows" for part, n in expected.windows.items()]
        counts += [f"{expected.recordings:,} recordings"] if expected.recordings else []
        counts += [f"{expected.subjects:,} subjects"] if expected.subjects else []
        console.print(f"[bold]{name}[/bold]  {escape(corpus.title)}")
        for what, text in (
            ("get it", corpus.source),
            ("licence", corpus.licence),
            ("layout", corpus.layout),
            ("expected", f"{', '.join(counts)} ({expected.source})" if counts else "no published counts"),
            ("cite", corpus.citation),
        ):
            console.print(f"  {what + ':':<10}{escape(text)}", soft_wrap=True)
