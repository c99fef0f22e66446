"""Damaged HDF5 stores: seeded mutations, each opened, read and audited in a process of its own kind.

    python tests/data_pipeline/fuzz_stores.py --count 2500 --seed 0

A case is right when the store is read, or refused with a ValueError of one line that names the file; and the audit
gives a status. Everything else (another exception, a crash of HDF5's library, more than `_SECONDS` or `_MEGABYTES`) is
listed and makes the exit status 1. A worker goes through the cases; when it dies or hangs, the next one takes over.
"""

import argparse
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

_SECONDS, _MEGABYTES = 60, 400
_STARTING = 180


def sources(folder):
    """Small files of every flavour and our own: the smaller the signal, the more mutations hit what describes it."""
    from flavour_files import LOADER, brain_noise, cut, flavour_a, flavour_b, flavour_c, flavour_d

    from data_pipeline.montages import montage_of
    from data_pipeline.store import StoreInfo, create_store

    rng = np.random.default_rng(0)
    labels = {"data_group_0": np.zeros(6, np.int64), "data_group_10": np.ones(6, np.int64)}
    blocks = {name: cut(brain_noise(rng, 22, 6 * 16), 16) for name in labels}
    files = [
        flavour_a(folder / "a.h5", blocks, labels),
        flavour_b(folder / "b.h5", {"aaaaaaaa_s001_t000": brain_noise(rng, 22, 6 * 16)}, 16, LOADER),
        flavour_c(folder / "c.h5", [rng.normal(size=(6, 16, 16))] * 2, [np.zeros(6)] * 2),
        flavour_d(folder / "d.h5", [rng.normal(size=(6, 60, 16))], [rng.normal(size=(6, 12))]),
    ]
    with create_store(folder / "own.h5", StoreInfo(100.0, 16, 0.16, class_names=["a", "b"])) as writer:
        for i in range(4):
            who = {"subject": f"s{i}", "recording": f"r{i}", "start_samples": np.arange(5) * 16}
            signal = rng.normal(size=(5, 2, 16))
            writer.add(f"g{i}", signal, montage_of(["C3", "C4"]), **who, labels=np.arange(5) % 2)
    return [path.read_bytes() for path in [*files, folder / "own.h5"]]


def mutated(contents, seed, case):
    """One of the files with one to four changes."""
    rng = np.random.default_rng((seed, case))
    content = bytearray(contents[int(rng.integers(len(contents)))])
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(content)))
        kind = rng.integers(8)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at] = int(rng.integers(256))
        elif kind == 2:  # a length, address or count of extreme size
            value = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)[rng.integers(8)]
            at -= at % 8
            content[at : at + 8] = value.to_bytes(8, "little")[: len(content) - at]
        elif kind == 3:
            content[at : at + int(rng.integers(1, 65))] = b""
        elif kind == 4:
            content[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 65)), dtype=np.uint8))
        elif kind == 5:  # a piece of the file in another place
            other, size = int(rng.integers(len(content))), int(rng.integers(8, 129))
            content[at : at + size] = content[other : other + size]
        elif kind == 6:
            size = int(rng.integers(1, 513))
            content[at : at + size] = bytes([int(rng.choice([0, 255]))]) * min(size, len(content) - at)
        else:
            del content[max(at, 1) :]
        if not content:
            content = bytearray(b"\0")
    return bytes(content)


def outcome(path):
    """What became of one file: "read", "refused", or what is wrong."""
    from data_pipeline.audit import audit
    from data_pipeline.old_files import OldFiles
    from data_pipeline.store import WindowStore

    old = OldFiles(unit="uV", sfreq=100.0)
    try:
        store = WindowStore(path, old)
        for row in range(len(store)):
            window = store[row]["signal"]
            assert window.dtype == np.float32
            assert window.shape[1] == store.n_times
        result = "read"
    except ValueError as error:
        if "\n" in str(error) or str(path) not in str(error):
            return f"unclear message: {error}"
        result = "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    try:
        status = audit([path], old).status
    except BaseException as error:
        return f"audit, {type(error).__name__}: {error}"
    return result if status in (0, 1, 2) else f"audit: status {status}"


def work(first, count, seed):
    """Worker: a line before and after each case."""
    import resource

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with tempfile.TemporaryDirectory() as folder:
        contents = sources(Path(folder))
        Path(folder, "warm.h5").write_bytes(contents[-1])
        print("warm", outcome(Path(folder, "warm.h5")), flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # for the sake of the machine
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for case in range(first, count):
            print("begin", case, flush=True)
            path = Path(folder, f"case{case}.h5")
            path.write_bytes(mutated(contents, seed, case))
            found = outcome(path)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            if grown > _MEGABYTES:
                found, before = f"took {grown:.0f} MB", before + int(grown * 1024)
            print("end", case, " ".join(found.split())[:300], flush=True)
            path.unlink()


def run(count, seed):
    """Go through `count` cases: (how often each outcome came, {case: what is wrong})."""
    outcomes, wrong, first = Counter(), {}, 0
    while first < count:
        command = [sys.executable, __file__, "--worker", str(first), "--count", str(count), "--seed", str(seed)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = queue.Queue()
        reader = threading.Thread(target=lambda w=worker, q=lines: [q.put(line) for line in w.stdout] + [q.put(None)])
        reader.start()
        current = None
        while True:
            try:
                line = lines.get(timeout=_SECONDS if current is not None else _STARTING)
            except queue.Empty:
                line = "hang"
                worker.kill()
            if line is None or line == "hang":
                break
            word, number, *rest = line.split(maxsplit=2)
            if word == "begin":
                current = int(number)
            elif word == "end":
                text = rest[0].strip() if rest else ""
                outcomes[text if text in ("read", "refused") else "wrong"] += 1
                if text not in ("read", "refused"):
                    wrong[int(number)] = text
                first, current = int(number) + 1, None
        worker.wait()
        reader.join()
        if current is not None:
            wrong[current] = "hangs" if line == "hang" else f"ends the process with status {worker.returncode}"
            outcomes["wrong"] += 1
            first = current + 1
        elif first < count:
            raise RuntimeError(f"the worker cannot start (status {worker.returncode})")
    return outcomes, wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.count, options.seed)
        return 0
    outcomes, wrong = run(options.count, options.seed)
    print(", ".join(f"{name}: {number}" for name, number in sorted(outcomes.items())))
    for case, what in sorted(wrong.items()):
        print(f"case {case}: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
