"""The shared machinery of corpora: same bytes however the run went, interruptions, kills, full disks, clusters."""

import contextlib
import errno
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import corpus_trees as trees
import numpy as np
import pytest

from data_pipeline import prepare_corpus, source_windows, workers
from data_pipeline.corpora import CORPORA
from data_pipeline.prepare import main
from data_pipeline.store import WindowStore
from data_pipeline.workers import KILLED, completed


def small_tree(root, n=5, seconds=12):
    for i in range(n):
        kind = ("normal", "abnormal")[i % 2]
        folder = root / "edf" / ("eval" if i == n - 1 else "train") / kind / "01_tcp_ar"
        trees.write_edf(folder / f"aaaaaaa{i}_s001_t000.edf", trees.tuh_labels(extras=()), seed=i, seconds=seconds)
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return small_tree(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    """An unbroken run."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert run(raw, out) == 0
    return out


def run(raw, out, *options, jobs=1):
    return main(["tuab", "--raw", str(raw), "--out", str(out), "--jobs", str(jobs), *options])


def contents(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_two_processes_elsewhere_write_the_same_bytes(raw, done, tmp_path):
    shutil.copytree(raw, tmp_path / "another" / "place")
    assert run(tmp_path / "another" / "place", tmp_path / "out", jobs=2) == 0
    assert contents(tmp_path / "out") == contents(done)
    assert set(contents(done)) == {
        "train.h5",
        "validation.h5",
        "test.h5",
        *("manifest.json", "report.html", "split.json"),
    }


def test_a_second_run_does_nothing_until_a_file_or_an_option_changes(raw, done, tmp_path, monkeypatch, capsys):
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    out = Path(shutil.copytree(done, tmp_path / "out"))
    seen = []
    real = source_windows._make_windows
    monkeypatch.setattr(source_windows, "_make_windows", lambda task, b: seen.append(task.source.name) or real(task, b))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for path in raw.rglob("*.edf"):
        path.touch()
    assert run(raw, out) == 0
    assert not seen
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "train: 6 windows (published: 591,357)" in capsys.readouterr().out
    changed = sorted(raw.rglob("*.edf"))[1]
    trees.write_edf(changed, trees.tuh_labels(), seed=77)
    assert run(raw, out) == 0
    assert len(seen) == 5
    assert contents(out)["test.h5"] == contents(done)["test.h5"]
    assert contents(out) != contents(done)
    assert run(raw, out, "--channel-order", "D") == 0
    assert len(seen) == 10
    (out / "test.h5").unlink()  # an output is lacking
    assert run(raw, out, "--channel-order", "D") == 0
    assert len(seen) == 15


def test_an_interrupted_run_goes_on_where_it_stopped(raw, done, tmp_path, monkeypatch, capsys):
    real, seen = source_windows._make_windows, []

    def interrupted(task, blocks):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(task.source.name)
        return real(task, blocks)

    monkeypatch.setattr(source_windows, "_make_windows", interrupted)
    assert run(raw, tmp_path / "out") == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare"]
    rest = []
    monkeypatch.setattr(source_windows, "_make_windows", lambda task, b: rest.append(task.source.name) or real(task, b))
    results = sorted((tmp_path / "out" / ".prepare" / "results").rglob("*.npz"))
    results[0].write_bytes(results[0].read_bytes()[:-100] + b"0" * 100)  # what a power failure may leave
    results[1].with_suffix(".json").write_text("")
    assert run(raw, tmp_path / "out") == 0
    assert len(rest) == 2 + 2
    assert contents(tmp_path / "out") == contents(done)


@pytest.mark.parametrize("results", [1, 3])
def test_kill_9_leaves_nothing_wrong_and_the_next_run_ends_with_the_same_bytes(raw, done, tmp_path, results):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "data_pipeline.prepare",
        "tuab",
        "--raw",
        str(raw),
        "--out",
        str(out),
        "--jobs",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(out.glob(".prepare/results/*/*.npz"))) < results:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in out.iterdir()] == [".prepare"]
    assert run(raw, out) == 0
    assert contents(out) == contents(done)


class Crash(BaseException):
    """The machine stops here."""


def test_stopped_between_any_two_moves_the_folder_never_mixes_two_runs(raw, done, tmp_path, monkeypatch):
    """A run with another split replaces an earlier one; it is stopped before its k-th change of the output folder."""
    staged, new = tmp_path / "staged", tmp_path / "new"
    assert run(raw, new, "--seed", "1", "--validation", "0.4") == 0
    shutil.copytree(done, staged)
    moves = {}
    with monkeypatch.context() as patch:

        def stop(out, names, old):
            moves.update(names=names, old=old)
            raise Crash

        patch.setattr(prepare_corpus, "_start_moves", stop)
        with pytest.raises(Crash):
            run(raw, staged, "--seed", "1", "--validation", "0.4")
    old_stores, new_stores = ({n: b for n, b in contents(o).items() if n.endswith(".h5")} for o in (done, new))
    assert set(old_stores.values()).isdisjoint({b for n, b in new_stores.items() if n != "test.h5"})
    k, finished = 0, False
    while not finished:
        out = Path(shutil.copytree(staged, tmp_path / f"stopped{k}"))
        with monkeypatch.context() as patch:
            left = [k]

            def counted(real, own=out, left=left):
                def call(self, *args, **kwargs):
                    if own in (self.parent, *(Path(a).parent for a in args)):
                        if not left[0]:
                            raise Crash
                        left[0] -= 1
                    return real(self, *args, **kwargs)

                return call

            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                prepare_corpus._start_moves(out, **moves)
                finished = True
            except Crash:
                pass
        stores = {path.name: path.read_bytes() for path in out.glob("*.h5")}
        assert stores.items() <= old_stores.items() or stores.items() <= new_stores.items()
        if (out / "manifest.json").is_file():
            assert stores in (old_stores, new_stores)
        assert run(raw, out, "--seed", "1", "--validation", "0.4") == 0
        assert contents(out) == contents(new)
        k += 1
    assert k == 1 + 6 + 6  # six removals, six arrivals, and none


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_and_not_a_rejected_file(raw, done, tmp_path, monkeypatch, capsys, code):
    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", refuse)
        assert run(raw, tmp_path / "out") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare"]
    assert run(raw, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(done)


def test_mistakes_of_the_user_are_one_sentence(raw, tmp_path, capsys):
    def fails(message, raw, out, *options, jobs=1):
        assert run(raw, out, *options, jobs=jobs) == 2
        err = capsys.readouterr().err
        assert message in err, err
        assert "Traceback" not in err

    (tmp_path / "file").write_text("")
    fails("is a file: --out must be a folder", raw, tmp_path / "file")
    fails("are the same folder", raw, raw)
    fails("--jobs must be at least 1", raw, tmp_path / "o", jobs=0)
    fails("no Dask scheduler answers at nowhere", raw, tmp_path / "o", "--scheduler", "nowhere")
    (tmp_path / "o2").mkdir()
    (tmp_path / "o2" / "train.h5").write_text("of somebody else")
    fails("holds train.h5 and no manifest.json", raw, tmp_path / "o2")
    assert [p.name for p in (tmp_path / "o2").iterdir()] == ["train.h5"]
    (tmp_path / "o2" / "manifest.json").write_text("{")
    fails("is damaged", raw, tmp_path / "o2")
    short = small_tree(tmp_path / "short", seconds=2)
    fails("5 files: no window of 5 s fits: the file lasts 2 s", short, tmp_path / "o3")
    assert list((tmp_path / "o3").iterdir()) == []


def test_names_that_are_no_utf_8_stop_nothing(raw, tmp_path):
    """Archives from other systems: neither JSON, HDF5 nor HTML can hold such bytes."""
    odd = os.fsdecode(b"na\xefve")
    shutil.copytree(raw, tmp_path / "raw")
    folder = tmp_path / "raw" / "edf" / "train" / "normal" / "01_tcp_ar"
    try:
        (folder / odd).mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    good = folder / "aaaaaaa0_s001_t000.edf"
    shutil.copy(good, folder / odd / "aaaaaaa0_s009_t000.edf")
    shutil.copy(good, folder / f"{odd}.edf")
    (folder / odd / "aaaaaaa0_s010_t000.edf").write_bytes(b"0")
    assert run(tmp_path / "raw", tmp_path / "out") == 0
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    found = {name.partition("01_tcp_ar/")[2]: entry["status"] for name, entry in files.items() if "ve" in name}
    assert found == {
        r"na\xefve.edf": "skipped",
        r"na\xefve/aaaaaaa0_s009_t000.edf": "windows",
        r"na\xefve/aaaaaaa0_s010_t000.edf": "rejected",
    }
    assert "ve.edf" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    stores = [WindowStore(path) for path in (tmp_path / "out").glob("*.h5")]
    assert any(r"na\xefve/aaaaaaa0_s009" in name for store in stores for name in store.recordings)


def test_a_file_whose_content_was_not_fetched_is_named(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    name = "edf/train/normal/01_tcp_ar/aaaaaaa0_s008_t000.edf"
    (tmp_path / "raw" / name).symlink_to(tmp_path / ".git" / "annex" / "objects" / "x.edf")
    assert run(tmp_path / "raw", tmp_path / "out") == 0
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"][name]
    assert (entry["status"], entry["reason"]) == ("rejected", "cannot be read (No such file or directory)")


def test_two_runs_do_not_write_to_one_folder(raw, tmp_path, capsys):
    with prepare_corpus._alone(tmp_path / ".prepare"):
        assert run(raw, tmp_path) == 2
        assert "another run is writing to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_without_windows_is_said(raw, tmp_path, capsys):
    raw = Path(shutil.copytree(raw, tmp_path / "raw"))
    (evaluation,) = raw.glob("edf/eval/*/*/*.edf")
    evaluation.write_bytes(evaluation.read_bytes()[:1000])
    assert run(raw, tmp_path / "o") == 0
    assert "there are no test windows: every file of this part was left out" in capsys.readouterr().err


def work(task):
    """Kills its process at 3."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"task": task}


def test_a_file_that_kills_its_worker_is_rejected_and_the_others_go_on():
    found = dict(completed(work, range(6), jobs=2))
    assert found == {i: {"task": i} if i != 3 else KILLED for i in range(6)}


def test_the_manifest_says_what_became_of_every_file_and_what_was_written(raw, done):
    manifest = json.loads((done / "manifest.json").read_text())
    assert {name.rsplit("/", 1)[1]: (e["windows"], e["subject"]) for name, e in manifest["files"].items()} == {
        f"aaaaaaa{i}_s001_t000.edf": (2, f"aaaaaaa{i}") for i in range(5)
    }
    for name, about in manifest["outputs"].items():
        store = WindowStore(done / name)
        assert about["windows"] == len(store) == manifest["parts"][about["part"]]["windows"]
        assert about["sha256"] == source_windows.digest_of([done / name])
        labels = {str(k): int((store.labels == k).sum()) for k in np.unique(store.labels)}
        assert manifest["parts"][about["part"]]["labels"] == labels
    entry = manifest["files"]["edf/train/normal/01_tcp_ar/aaaaaaa0_s001_t000.edf"]
    assert entry["sha256"] == source_windows.digest_of([raw / "edf/train/normal/01_tcp_ar/aaaaaaa0_s001_t000.edf"])
    assert 15 < entry["robust_amplitude_uv"] < 25
    split = json.loads((done / "split.json").read_text())
    assert split["sha256"] == manifest["split"]["sha256"]


class Balanced(html.parser.HTMLParser):
    """Raises when tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.links, self.figures = [], [], [], []

    @property
    def text(self):
        return "".join(self.cells)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.figures += [value for name, value in attrs if name == "aria-label"]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_the_report_shows_counts_classes_reasons_amplitudes_and_rates(tmp_path):
    raw = trees.tuab_tree(tmp_path / "raw")
    folder = raw / "edf" / "train" / "normal" / "01_tcp_ar"
    trees.write_edf(folder / "aaaaaaa9_s001_t000.edf", trees.tuh_labels(), scale=5000.0)
    assert run(raw, tmp_path / "out") == 0
    page = Balanced()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert page.links == []
    text = " ".join(page.text.split())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for part, published in (("train", "591,357"), ("validation", "154,938"), ("test", "74,010")):
        own = manifest["parts"][part]
        windows, recordings, subjects = own["windows"], own["recordings"], len(own["subjects"])
        assert f"{part}{windows}{published}-100.0 %{recordings}{subjects}" in text
        normal, abnormal = own["labels"].get("0", 0), own["labels"].get("1", 0)
        assert f"{part}{normal} {normal / windows:.1%}{abnormal} {abnormal / windows:.1%}" in text
        per_subject = Counter()
        for entry in manifest["files"].values():
            per_subject[entry.get("subject")] += entry.get("parts", {}).get(part, 0)
        counts = sorted(count for count in per_subject.values() if count)
        assert f"{part}{subjects}{counts[0]}{int(np.median(counts))}{counts[-1]}" in text
        assert f"{part}: {subjects} subjects{', '.join(own['subjects'])}" in text
    assert page.figures == [
        "share of each class in each part",
        "recordings by amplitude",
        "recordings by sampling rate",
        "recordings by duration",
    ]
    bars = [i for i, cell in enumerate(page.cells) if re.fullmatch(r"[\d.,e+]+ to [\d.,e+]+ µV", cell)]
    assert sum(int(page.cells[i + 1]) for i in bars) == manifest["counts"]["windows"]
    for name, entry in manifest["files"].items():
        if "reason" in entry:  # the example of a reason, with the status and the count of its row
            row = page.cells.index(f"{name}: {entry['reason']}")
            assert page.cells[row + 1 : row + 3] == [entry["status"], "1"]
    assert "no window of 5 s fits: the file lasts 4 s" in text
    assert "its subject is in the official evaluation set" in text
    assert "250 Hz10256 Hz1400 Hz1" in text
    assert "1 recordings outside 0.5 to 500 µV" in text
    assert "normal" in text
    assert "20% of the other subjects validate, seed 0" in text
    assert "signalband 0.1 Hz to 75 Hz, notch 60 Hz, reference: none, 256 Hz, windows of 5 s every 5 s" in text


def test_list_names_every_corpus_with_its_source_and_licence(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name, corpus in CORPORA.items():
        assert f"{name}  {corpus.title}" in text
        for told in (corpus.source, corpus.licence, corpus.citation):
            assert told in " ".join(text.split())
    assert "train 15,686,874 windows" in text


@contextlib.contextmanager
def dask_worker(address):
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as worker:
        try:
            yield
        finally:
            worker.kill()


@contextlib.contextmanager
def dask_workers(*, nanny):
    """(address of a scheduler, process ids of its two workers, client); with a nanny a lost worker is started again."""
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with contextlib.ExitStack() as stack:
        cluster = distributed.LocalCluster(
            n_workers=2 if nanny else 0, threads_per_worker=1, processes=True, dashboard_address=None
        )
        address = stack.enter_context(cluster).scheduler_address
        if not nanny:
            for _ in range(2):
                stack.enter_context(dask_worker(address))
        client = stack.enter_context(distributed.Client(cluster))
        client.wait_for_workers(2, timeout=120)
        yield address, list(client.run(os.getpid).values()), client


@pytest.mark.parametrize("nanny", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_dask_cluster_that_loses_a_worker_writes_the_same_bytes(tmp_path, nanny):
    raw = small_tree(tmp_path / "raw", 12)
    assert run(raw, tmp_path / "here") == 0
    with dask_workers(nanny=nanny) as (address, pids, client):
        results = []

        def kill_one():
            while not results:
                time.sleep(0.002)
                results.extend((tmp_path / "out").glob(".prepare/results/*/*.npz"))
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        arguments = ["tuab", "--raw", str(raw), "--out", str(tmp_path / "out"), "--scheduler", address]
        assert main(arguments) == 0
        killer.join()
        assert len(results) < 12  # it was killed mid-way
        assert pids[0] not in client.run(os.getpid).values()
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_dask_cluster_that_loses_all_workers_says_so_and_goes_on_with_new_ones(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.2)
    raw, out, said = small_tree(tmp_path / "raw", 12), tmp_path / "out", []
    assert run(raw, tmp_path / "here") == 0
    with dask_workers(nanny=False) as (address, pids, _), contextlib.ExitStack() as stack:

        def replace_all():
            while not list(out.glob(".prepare/results/*/*.npz")):
                time.sleep(0.002)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            while "no worker is connected" not in "".join(said):
                time.sleep(0.1)
                said.append(capfd.readouterr().err)
            stack.enter_context(dask_worker(address))

        replacing = threading.Thread(target=replace_all)
        replacing.start()
        assert main(["tuab", "--raw", str(raw), "--out", str(out), "--scheduler", address]) == 0
        replacing.join()
    assert f"dask worker {address}" in "".join(said)
    assert contents(out) == contents(tmp_path / "here")
