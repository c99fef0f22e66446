"""One process at a time works in a run's directory: a lock file that names its holder and outlives no crash.

`run.lock` holds host, process id and the start time of that process. On the holder's own machine (same boot, same
process namespace) the process table says whether it is alive; a number that was reused is recognised by its start
time. For anybody else the file's modification time, renewed by the holder every `heartbeat_s`, is the sign of life:
who finds a lock that is not yet silent for long enough waits until it is, since a run that is started again elsewhere
meets the lock of its killed predecessor, and is refused only when a new sign of life shows that the holder lives. Both
times of a comparison come from the file system of the directory, so that clocks of hosts need not agree.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from lumamba_jax.agreement import first_text, on_first, say_on_stderr

LOCK_FILE = "run.lock"


class DirectoryInUseError(OSError):
    """Another process works in the directory, alive as far as can be seen."""


class RunLock:
    """Holds `directory` for this run: `with RunLock(run_dir): ...`. On several hosts process 0 holds it for all."""

    def __init__(
        self,
        directory: str | Path,
        *,
        say: Callable[[str], None] = say_on_stderr,
        heartbeat_s: float = 30.0,
        stale_after_s: float = 180.0,
    ):
        """Nothing happens before the `with`.

        Args:
            directory: of the run; created when it is taken.
            say: receives the notes that a lock is waited for and was taken over.
            heartbeat_s: seconds between signs of life.
            stale_after_s: a holder on another machine that gave none for so long is taken for dead.
        """
        self._directory = Path(directory).absolute()
        self._path = self._directory / LOCK_FILE
        self._say, self._heartbeat_s, self._stale_after_s = say, heartbeat_s, stale_after_s
        self._own: dict[str, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Take the directory; waits up to `stale_after_s` for a holder on another machine that may be dead.

        Raises: DirectoryInUseError, on every process, with a sentence that names the holder; OSError of the disk.
        """
        refusal = None
        with on_first() as first:
            if first:
                try:
                    self._acquire()
                except DirectoryInUseError as error:
                    refusal = str(error)
        if (sentence := first_text(refusal)) is not None:
            raise DirectoryInUseError(sentence)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._own.get("pid") != os.getpid():  # a fork does not hold it
            return
        with contextlib.suppress(OSError), _exclusive(self._directory):
            if _read(self._path) == self._own:
                self._path.unlink()
        self._own = {}

    def check(self) -> None:
        """Raise OSError when another process has taken the directory over (this one was suspended, say).

        Cheap; process 0 looks, for itself: to be called before what must not be written twice.
        """
        if not self._own:
            return
        holder = _read(self._path)
        if holder != self._own:
            now = "nobody holds it now" if holder is None else f"{_name(holder)} holds it now"
            raise OSError(f"{self._directory} was taken from this process while it gave no sign of life: {now}")

    def _acquire(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        own = _identity(os.getpid()) | {"token": uuid.uuid4().hex, "since": _now()}
        draft = self._path.with_name(f".{LOCK_FILE}.{own['token']}")
        met: _Sign | None = None
        while (found := self._attempt(own, draft)) is not None:
            left_s = self._stale_after_s - found.silent_s
            if not found.may_be_dead or (met is not None and not found.continues(met)):
                raise DirectoryInUseError(self._refusal(found))
            if met is None:
                self._say(
                    f"{self._directory} is held by {_name(found.holder)}{found.last_sign}: waiting up to "
                    f"{left_s:.0f} s for another; without one it is taken over"
                )
                met = found
            # A holder that lives gives its next sign within a heartbeat.
            time.sleep(max(0.01, min(left_s, self._heartbeat_s / 6)))
        self._own = own
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _attempt(self, own: Mapping[str, Any], draft: Path) -> "_Sign | None":
        """Take the directory unless somebody holds it: then what is seen of the holder."""
        with _exclusive(self._directory):
            try:
                draft.write_text(json.dumps(own))
                found = self._look(draft.stat().st_mtime)
                if found is not None and found.holds:
                    return found
                if found is not None:
                    self._path.unlink(missing_ok=True)
                _create(self._path, draft)
            finally:
                draft.unlink(missing_ok=True)
        if found is not None:
            self._say(
                f"{self._directory}: taken over from {_name(found.holder)}, which ended without releasing "
                f"it{found.last_sign}"
            )
        return None

    def _look(self, now: float) -> "_Sign | None":
        """What is seen of the holder; None when there is none.

        Args:
            now: the time of the directory's file system.
        """
        try:
            seen = self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        holder = _read(self._path)
        if holder is not None and holder["machine"] == _identity(os.getpid())["machine"]:
            alive = _start_of(holder["pid"]) == (holder["started"] or 0)
            return _Sign(holder, seen, now - seen, holds=alive, may_be_dead=False)
        return _Sign(holder, seen, now - seen, holds=now - seen < self._stale_after_s, may_be_dead=True)

    def _refusal(self, found: "_Sign") -> str:
        hint = f" (it counts as gone after {self._stale_after_s:.0f} s of silence)" if found.may_be_dead else ""
        return (
            f"{self._directory} is in use by {_name(found.holder)}{found.last_sign}: wait for it, stop it{hint}, or "
            "choose another directory"
        )

    def _beat(self) -> None:
        own = self._own
        while not self._ended.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):
                if _read(self._path) != own:
                    return
                os.utime(self._path)


class _Sign(NamedTuple):
    """What is seen of a lock's holder: who it is, when it gave its last sign of life and how long ago that is.

    `may_be_dead`: only silence tells whether it lives; `holds`: it does as far as is known now.
    """

    holder: dict[str, Any] | None
    seen: float
    silent_s: float
    holds: bool
    may_be_dead: bool

    @property
    def last_sign(self) -> str:
        return f", last sign of life {max(0.0, self.silent_s):.0f} s ago" if self.may_be_dead else ""

    def continues(self, earlier: "_Sign") -> bool:
        """Whether the same holder has been silent since."""
        return (self.holder, self.seen) == (earlier.holder, earlier.seen)


def _identity(pid: int) -> dict[str, Any]:
    """Who a process is: `machine` is where its number means something."""
    machine = [platform.node()]
    with contextlib.suppress(OSError):
        machine.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        machine.append(str(Path("/proc/self/ns/pid").readlink()))
    return {"host": platform.node(), "machine": " ".join(machine), "pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> int | None:
    """When a process was started (clock ticks since boot, 0 where there is no /proc); None when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    else:
        return None if fields[0] in "ZX" else int(fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def _read(path: Path) -> dict[str, Any] | None:
    """The holder, None when there is no lock or it cannot be understood."""
    try:
        holder = json.loads(path.read_bytes())
        return holder if {"host", "machine", "pid", "started", "since"} <= holder.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _name(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"an unknown process (its {LOCK_FILE} cannot be read)"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _create(path: Path, draft: Path) -> None:
    """Put `draft` in place as `path`, complete from the first moment, unless somebody was faster."""
    try:
        try:
            os.link(draft, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("x") as file:
                file.write(draft.read_text())
    except FileExistsError as error:
        raise DirectoryInUseError(f"{path.parent} was taken by {_name(_read(path))} at this very moment") from error


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process of this machine at a time looks at the lock and changes it (where the file system can do that)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
