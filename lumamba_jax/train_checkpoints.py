"""The train states of one run on disk: written in the background, verified when restored, the intact ones used.

`directory/STEP/` is one state: `state/` (Orbax, arrays by name) and `manifest.json` (`manifest.py`: checksums of all
leaves and files, the progress of the run, versions). `python -m lumamba_jax.train_checkpoints RUN` lists them.

**Commit.** A state is written as `.STEP.writing`; when every process has written its part, process 0 takes the
checksums of the files, writes the manifest, flushes all to the disk and renames the directory. A killed process leaves
a step as a whole or a hidden directory that does not count, which the next one removes.

**Restore.** The newest step whose files and, once loaded, leaves are what was saved. Damaged ones are said, and set
aside as `STEP.damaged` when an older one is good; when none is, nothing is touched and one error lists them all.
Arrays are saved by name and global index: any mesh, sharding or number of processes can read them.

All hosts must see the same directory (a network file system). With several processes every call is collective.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from lumamba_jax.agreement import first_text, from_all_processes, gathered_errors, on_first, say_on_stderr
from lumamba_jax.manifest import (
    Leaf,
    file_damage,
    file_records,
    flush_to_disk,
    leaf_damage,
    leaf_records,
    leaves_of,
    named_leaves,
    require_same_leaves,
    require_space,
    seal,
    unseal,
)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_DIRECTORY = "state"
DAMAGED_SUFFIX = ".damaged"
_WRITING, _DELETING, _REPLACED = ".writing", ".deleting", ".replaced"


def steps_in(directory: str | Path) -> list[int]:
    """The committed steps under `directory`, oldest first; whether they are intact is not looked at."""
    directory = Path(directory)
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


class TrainCheckpoints:
    """The train states of one run. A context manager; every process of the run has one and calls it alike."""

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 1,
        keep_every: int | None = None,
        say: Callable[[str], None] = say_on_stderr,
    ):
        """Open `directory`, which is created; what a killed process left half-written is removed.

        Args:
            directory: `checkpoints` of a run; one run at a time writes there (`run_lock.RunLock`).
            keep: how many of the newest steps stay; 2 or more leave something to fall back on.
            keep_every: steps that are a multiple of it stay as well.
            say: receives one sentence for each damaged step that is passed over.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"checkpoints: keep {keep} and keep_every {keep_every} must be at least 1")
        self._directory = Path(directory).absolute()
        self._keep, self._keep_every, self._say = keep, keep_every, say
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        logging.getLogger("absl").addFilter(_raised_anyway)
        with on_first() as first:
            if first:
                self._directory.mkdir(parents=True, exist_ok=True)
                _tidy(self._directory)

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, None before the first; waits for a save in progress."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The committed steps, oldest first, as process 0 sees them; waits for a save in progress."""
        self.wait()
        return json.loads(from_all_processes(json.dumps(steps_in(self._directory)))[0])

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Begin to write the array tree `state`, and `progress` (JSON), as `step`.

        Returns when the values are off the devices: the buffers may be donated. The disk is waited for by the next
        call (or `wait`), which also raises what went wrong there.

        Raises: OSError when an earlier save failed; ValueError when JSON cannot hold `progress`.
        """
        self.wait()
        leaves = named_leaves(state)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "saved": datetime.now().astimezone().isoformat(timespec="seconds"),
            "processes": jax.process_count(),
            "progress": dict(progress),
            "leaves": leaf_records(leaves),
        }
        seal(content)  # progress that JSON cannot hold is the caller's error, not the disk's
        writing = self._hidden(step, _WRITING)
        try:
            self._make_room(writing, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()))
            response = ocp.save_async(str(writing / STATE_DIRECTORY), leaves)
        except Exception as error:  # surfaces in wait(), at the same point on every process
            failed: Future[None] = Future()
            failed.set_exception(error)
            self._pending = step, failed
        else:
            self._pending = step, self._writer.submit(self._finish, step, content, response)

    def _make_room(self, writing: Path, size: int) -> None:
        """An empty folder `writing` on a disk that can hold `size` bytes. Raises OSError on every process."""
        problem = None
        if jax.process_index() == 0:
            try:
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir()
                require_space(writing, size)
            except OSError as error:
                problem = str(error)
        if (problem := first_text(problem)) is not None:
            raise OSError(problem)

    def wait(self) -> None:
        """Return when nothing is being written. Raises OSError, once, when the last save failed on any process."""
        if self._pending is None:
            return
        step, future = self._pending
        error = future.exception()
        self._pending = None
        sentence = first_text(None if error is None else self._why(step, error))
        if sentence is not None:
            if jax.process_index() == 0:
                shutil.rmtree(self._hidden(step, _WRITING), ignore_errors=True)
            raise OSError(sentence) from error

    def failure(self) -> str | None:
        """The sentence of a save that has failed meanwhile on any process, once; what it left is removed.

        Nothing is waited for while the save goes on. A caller that asks between its saves can save the present state
        instead of losing the step: `save` and `wait` raise only where the next one is due.
        """
        if self._pending is None:  # all processes save alike
            return None
        _, future = self._pending
        failed = future.done() and future.exception() is not None
        if first_text("failed" if failed else None) is None:
            return None
        try:
            self.wait()
        except OSError as error:
            return str(error)
        return None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read the newest intact state (or exactly `step`) into the tree, dtypes and shardings of `abstract_state`.

        Returns: (state, progress). Leaves without a sharding come to the first device.
        Raises: FileNotFoundError when nothing was saved; ValueError when no step is intact, or when the saved tree is
            another one; OSError when files that are intact cannot be loaded (memory, permissions).
        """
        expected = {name: _with_sharding(leaf) for name, leaf in named_leaves(abstract_state).items()}
        committed = self.steps
        candidates = committed[::-1] if step is None else [step] if step in committed else []
        if not candidates:
            wanted = "checkpoint to resume from" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"{self._directory} holds no {wanted}")
        damaged: dict[int, str] = {}
        for candidate in candidates:
            path = self._directory / str(candidate)
            manifest, damage = _examine_for_all(path)
            if damage is None:
                records = leaves_of(manifest)
                _require_same_tree(expected, records, path)
                with gathered_errors("restoring"):  # before all compare their leaves
                    leaves = _load(path, expected)
                damage = leaf_damage(records, leaves)
                if damage is None:
                    self._set_aside(damaged, instead=candidate)
                    tree = jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in expected])
                    return tree, manifest["progress"]
                del leaves  # the older step needs their memory
            damaged[candidate] = damage
        listed = "; ".join(f"step {number}: {damage}" for number, damage in damaged.items())
        raise ValueError(
            f"{self._directory}: no checkpoint to resume from is intact ({listed}). Put a good copy in place, or start "
            "again in another directory"
        )

    def close(self) -> None:
        """Wait for the disk. Raises OSError when the last save failed."""
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.wait()
            elif self._pending is not None and jax.process_count() == 1:
                # The error on its way out is the one to show; other processes may be at another point, so that
                # nothing collective may be asked of them.
                step, future = self._pending
                if (failure := future.exception()) is not None:
                    self._say(self._why(step, failure))
        finally:
            self._release()

    def _release(self) -> None:
        self._writer.shutdown()
        logging.getLogger("absl").removeFilter(_raised_anyway)

    def _finish(self, step: int, content: dict[str, Any], response: ocp.AsyncResponse[None]) -> None:
        """In the background: wait for Orbax (all processes), then commit and apply the retention on process 0."""
        response.result()
        if jax.process_index() != 0:
            return
        writing, final = self._hidden(step, _WRITING), self._directory / str(step)
        text = seal({**content, "files": file_records(writing)})
        (writing / MANIFEST_FILE).write_text(text)
        for path in (writing / MANIFEST_FILE, *(path for path in writing.rglob("*") if path.is_dir()), writing):
            flush_to_disk(path)
        if final.exists():
            final.rename(self._hidden(step, _REPLACED))
        writing.rename(final)
        flush_to_disk(self._directory)
        shutil.rmtree(self._hidden(step, _REPLACED), ignore_errors=True)
        self._drop_old(step)

    def _drop_old(self, saved: int) -> None:
        committed = steps_in(self._directory)
        retained = {saved, *committed[-self._keep :]}
        if self._keep_every is not None:
            retained |= {step for step in committed if step % self._keep_every == 0}
        for step in set(committed) - retained:
            hidden = (self._directory / str(step)).rename(self._hidden(step, _DELETING))
            shutil.rmtree(hidden, ignore_errors=True)

    def _set_aside(self, damaged: Mapping[int, str], *, instead: int) -> None:
        if jax.process_index() != 0:
            return
        for step, damage in damaged.items():
            path = self._directory / str(step)
            aside = path.with_name(f"{step}{DAMAGED_SUFFIX}")
            number = 2
            while aside.exists():
                aside = path.with_name(f"{step}{DAMAGED_SUFFIX}-{number}")
                number += 1
            try:
                path.rename(aside)
                outcome = f"It is set aside as {aside.name}"
            except OSError:  # a directory that may only be read
                outcome = "It could not be set aside"
            self._say(f"{path} is damaged: {damage}. {outcome}; step {instead} is used instead")

    def _why(self, step: int, error: BaseException) -> str:
        """The sentence for a save that failed; the disk's reason is found in the libraries' long messages."""
        text = " ".join(str(error).split())
        reasons = {
            "the disk is full": ("No space left", "ENOSPC"),
            "the disk quota is used up": ("quota exceeded", "EDQUOT"),
            "a file would be larger than allowed": ("File too large", "EFBIG"),
        }
        why = next((why for why, signs in reasons.items() if any(sign in text for sign in signs)), None)
        newest = max(steps_in(self._directory), default=None)
        intact = "no earlier one exists" if newest is None else f"earlier ones are untouched, the newest is {newest}"
        return (
            f"{self._directory / str(step)} could not be saved: {why or text[:300] or type(error).__name__}; {intact}"
        )

    def _hidden(self, step: int, suffix: str) -> Path:
        return self._directory / f".{step}{suffix}"


def examine(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(manifest, what is wrong with the manifest or the files); exactly one of them is None.

    Raises: PermissionError when the step may not be read.
    """
    try:
        manifest = unseal((path / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return None, f"{MANIFEST_FILE} is missing, without it nothing can be verified"
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        return None, f"{MANIFEST_FILE} {error}"
    if manifest["format_version"] != FORMAT_VERSION:
        return None, f"{MANIFEST_FILE} has format {manifest['format_version']}, this version reads {FORMAT_VERSION}"
    if str(manifest["step"]) != path.name:
        return None, f"{MANIFEST_FILE} is that of step {manifest['step']}"
    damage = file_damage(path, manifest["files"])
    return (manifest, None) if damage is None else (None, damage)


def _examine_for_all(path: Path) -> tuple[dict[str, Any], str | None]:
    """What process 0 finds in a step, on every process."""
    examined = ""
    with on_first() as first:
        if first:
            examined = json.dumps(examine(path))
    return json.loads(from_all_processes(examined)[0])


class Verdict(NamedTuple):
    """One line of the report: what a step is, and what is wrong with it (None when it is intact)."""

    step: int
    saved: str
    size: int
    leaves: int
    damage: str | None


def verify(directory: str | Path) -> list[Verdict]:
    """Examine every committed step, oldest first: files, and leaves as loaded to the host. Nothing is changed."""
    return [_verdict(Path(directory).absolute() / str(step)) for step in steps_in(directory)]


def _verdict(path: Path) -> Verdict:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    manifest, damage = examine(path)
    if manifest is None:
        return Verdict(int(path.name), "", size, 0, damage)
    records = leaves_of(manifest)
    placeholders = {name: np.zeros((), np.dtype(leaf.dtype)) for name, leaf in records.items()}
    damage = leaf_damage(records, _load(path, placeholders))
    return Verdict(int(path.name), manifest["saved"], size, len(records), damage)


def _load(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return ocp.load(str(path / STATE_DIRECTORY), dict(expected))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OSError(f"{path}: its files are intact, but they cannot be loaded here ({first_line})") from error


def _require_same_tree(expected: Mapping[str, Any], found: Mapping[str, Leaf], path: Path) -> None:
    require_same_leaves(expected, found, path)
    problems = [
        f"{name} is {found[name].dtype}, expected {np.dtype(leaf.dtype).name}"
        for name, leaf in expected.items()
        if np.dtype(leaf.dtype).name != found[name].dtype
    ]
    if problems:
        raise ValueError(f"{path}: the state has other dtypes: {'; '.join(problems)}")


def _with_sharding(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _raised_anyway(record: logging.LogRecord) -> bool:
    """Logging filter: not the tracebacks that Orbax's threads print of errors that `wait` raises as one sentence."""
    return "_SignalingThread" not in record.getMessage()


def _tidy(directory: Path) -> None:
    """Finish or undo what a killed process was doing: writing, replacing or deleting a step."""
    for path in directory.glob(f".*{_REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED))
        if not final.exists():
            path.rename(final)
    for suffix in (_WRITING, _DELETING, _REPLACED):
        for path in directory.glob(f".*{suffix}"):
            shutil.rmtree(path)


def main(arguments: list[str] | None = None) -> int:
    """List the steps of a run. Exit status 0 when all are intact, 1 when any is damaged, 2 for bad input."""
    parser = argparse.ArgumentParser("python -m lumamba_jax.train_checkpoints", description=main.__doc__)
    parser.add_argument("run", type=Path, help="directory of a run, or its checkpoints")
    run: Path = parser.parse_args(arguments).run
    directory = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    try:
        verdicts = verify(directory)
    except OSError as error:
        print(f"train_checkpoints: {error}", file=sys.stderr)
        return 2
    aside = sorted(path.name for path in directory.glob(f"*{DAMAGED_SUFFIX}*")) if directory.is_dir() else []
    if not verdicts:
        print(f"train_checkpoints: {directory} holds no checkpoint", file=sys.stderr)
        return 2
    print(f"{directory}\n{'step':>10}  {'saved':25}  {'MB':>9}  {'leaves':>6}  state")
    for step, saved, size, leaves, damage in verdicts:
        print(f"{step:>10}  {saved:25}  {size / 1e6:>9.1f}  {leaves:>6}  {'intact' if damage is None else damage}")
    if aside:
        print(f"set aside as damaged earlier: {', '.join(aside)}")
    return int(any(verdict.damage is not None for verdict in verdicts))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the run itself may hold the accelerator
    sys.exit(main())
