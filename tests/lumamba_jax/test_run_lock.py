"""One process in a run's directory: live holders are named and respected, dead ones are not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lumamba_jax import run_lock
from lumamba_jax.run_lock import LOCK_FILE, DirectoryInUseError, RunLock

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from lumamba_jax.run_lock import RunLock
try:
    with RunLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except OSError as error:
    print(error)
"""


def start(directory) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(directory)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"`."""
    process = start(tmp_path / "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_name_of_the_holder(tmp_path, holder):
    with pytest.raises(OSError, match=f"run is in use by process {holder.pid} on .* since 20.*another directory$"):
        RunLock(tmp_path / "run").__enter__()
    out, err = start(tmp_path / "run").communicate(timeout=300)
    assert f"in use by process {holder.pid}" in out
    assert err == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert holder.communicate(timeout=300) == ("", "")  # its standard input ends, and it releases
    assert list((tmp_path / "run").iterdir()) == []
    with RunLock(tmp_path / "run", say=pytest.fail) as lock:
        lock.check()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)  # suspended is not dead
    with pytest.raises(OSError, match="in use"):
        RunLock(tmp_path / "run").__enter__()
    holder.kill()
    holder.wait()
    notes = []
    with RunLock(tmp_path / "run", say=notes.append):
        assert f"taken over from process {holder.pid} on " in notes[0]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_zombie_does_not_hold(tmp_path):
    process = start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":  # not waited for: it stays in the process table
        time.sleep(0.01)
    notes = []
    with RunLock(tmp_path, say=notes.append):
        assert len(notes) == 1
    process.communicate()


def rewritten(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_reused_process_number_is_recognised(tmp_path, holder):
    lock = tmp_path / "run" / LOCK_FILE
    rewritten(lock, pid=os.getpid())  # alive, but started at another time
    notes = []
    with RunLock(tmp_path / "run", say=notes.append):
        assert f"taken over from process {os.getpid()}" in notes[0]


@pytest.mark.parametrize("machine", ["node7 another-boot pid:[1]", "same name, rebooted"])
def test_a_run_elsewhere_that_gives_no_new_sign_of_life_is_waited_for_and_taken_over(tmp_path, holder, machine):
    path = tmp_path / "run" / LOCK_FILE
    rewritten(path, host="node7", machine=machine, pid=1)
    os.utime(path, (time.time() - 175, time.time() - 175))
    notes = []
    with RunLock(tmp_path / "run", say=notes.append) as lock:
        lock.check()
    assert len(notes) == 2  # it says once that it waits
    assert "held by process 1 on node7" in notes[0]
    assert re.search(r"last sign of life 17\d s ago: waiting up to \d s", notes[0])
    assert "taken over from process 1 on node7" in notes[1]
    assert int(notes[1].split("last sign of life ")[1].split()[0]) >= 180


def test_a_run_elsewhere_that_is_silent_for_long_is_taken_over_at_once(tmp_path, holder):
    path = tmp_path / "run" / LOCK_FILE
    rewritten(path, host="node7", machine="another")
    os.utime(path, (time.time() - 200, time.time() - 200))
    notes = []
    with RunLock(tmp_path / "run", say=notes.append):
        assert len(notes) == 1
        assert "last sign of life 20" in notes[0]


def test_a_run_elsewhere_that_gives_a_sign_of_life_meanwhile_is_respected(tmp_path, holder):
    path, notes = tmp_path / "run" / LOCK_FILE, []
    rewritten(path, host="node7", machine="another", pid=1)
    os.utime(path, (time.time() - 100, time.time() - 100))

    def alive_when_asked(note: str) -> None:
        notes.append(note)
        os.utime(path)

    with pytest.raises(
        DirectoryInUseError, match=r"process 1 on node7 .*last sign of life \d s ago.*gone after 180 s of silence"
    ):
        RunLock(tmp_path / "run", say=alive_when_asked, heartbeat_s=0.6).__enter__()
    assert len(notes) == 1
    assert [name.name for name in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_what_happens_to_the_lock_while_it_is_waited_for(tmp_path, holder):
    path = tmp_path / "run" / LOCK_FILE
    rewritten(path, host="node7", machine="another")

    def taken_by_another(_: str) -> None:
        seen = path.stat().st_mtime
        rewritten(path, host="node9")
        os.utime(path, (seen, seen))

    with pytest.raises(DirectoryInUseError, match="on node9"):
        RunLock(tmp_path / "run", say=taken_by_another, heartbeat_s=0.6).__enter__()
    notes = []

    def released(note: str) -> None:
        notes.append(note)
        path.unlink(missing_ok=True)

    with RunLock(tmp_path / "run", say=released, heartbeat_s=0.6) as lock:
        lock.check()
        assert len(notes) == 1  # it was released: nothing is taken over


def test_a_lock_that_cannot_be_read_is_respected_while_it_is_young(tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text("{")
    with pytest.raises(DirectoryInUseError, match="unknown process"):
        RunLock(tmp_path, say=lambda _: os.utime(path, (time.time() + 1,) * 2), heartbeat_s=0.6).__enter__()
    os.utime(path, (0, 0))
    with RunLock(tmp_path, say=lambda _: None):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_holder_gives_signs_of_life_and_notices_that_it_lost_the_directory(tmp_path):
    with RunLock(tmp_path, heartbeat_s=0.02) as lock:
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.time() + 20
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 0
        lock.check()
        rewritten(tmp_path / LOCK_FILE, host="node8", token="another")
        with pytest.raises(OSError, match=r"was taken from this process.*on node8.*holds it now"):
            lock.check()
    assert (tmp_path / LOCK_FILE).exists()  # it is not ours to remove


def test_many_at_once_give_one_holder(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps(run_lock._identity(2**22 + 1) | {"started": 1, "since": "long ago"}))
    processes = [start(tmp_path) for _ in range(4)]
    first = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.communicate()
    assert sorted(line == "held\n" for line in first) == [False, False, False, True]
    assert all("in use by process" in line for line in first if line != "held\n")


def test_an_error_inside_releases_and_a_fork_does_not(tmp_path):
    with pytest.raises(KeyError):  # noqa: SIM117
        with RunLock(tmp_path):
            raise KeyError
    assert list(tmp_path.iterdir()) == []
    code = (
        "import os, sys\n"
        "from lumamba_jax.run_lock import RunLock\n"
        "with RunLock(sys.argv[1]) as lock:\n"
        "    if os.fork() == 0: lock.__exit__(); os._exit(0)\n"
        "    os.wait(); lock.check(); print('still held')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "still held\n", done.stderr
