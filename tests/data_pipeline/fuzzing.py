"""Seeded mutations of files, tried one after another in a worker process with limits of time and memory.

A script with cases gives `run_cases` two functions: `prepare(folder)` makes what all cases need, in the worker, and
`try_case(prepared, folder, rng)` returns what became of one case, a word of `fine` when it is right. When a worker dies
or hangs, the next one takes over after the case that did it.
"""

import argparse
import contextlib
import queue
import re
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_SECONDS, _MEGABYTES = 60, 400
_STARTING = 180
_EXTREME = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_REPLACEMENTS = ((b",", b";"), (b",", b""), (b"=", b""), (b"=", b"=="), (b"1", b'"'))
_LONGEST_LINE = 10**6
_STATUS = Path("/proc/self/status")
_NUMBERS = (b"0", b"-1", b"1", b"nan", b"inf", b"-inf", b"1e308", b"1e-308", b"99999999", b"", b"x", b"0.5", b"1,5")


def mutated(content, rng):
    """Bytes with one to four changes of bits, bytes, lengths or pieces."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(content)))
        kind = rng.integers(8)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at] = int(rng.integers(256))
        elif kind == 2:  # a length, address or count of extreme size
            value = _EXTREME[rng.integers(8)]
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


def mutated_text(content, rng, *, widths=False):
    """Bytes with one to four changes of lines, numbers or words; `widths` keeps the places of everything else."""
    for _ in range(int(rng.integers(1, 5))):
        lines = content.split(b"\n")
        at = int(rng.integers(len(lines)))
        kind = 0 if widths else rng.integers(7)
        if kind == 0:  # a number that cannot be, in place of a number
            numbers = list(re.finditer(rb"[-+]?\d[\d.]*", content))
            if numbers:
                old = numbers[int(rng.integers(len(numbers)))]
                new = _NUMBERS[rng.integers(len(_NUMBERS))]
                new = new[: len(old[0])].ljust(len(old[0])) if widths else new
                content = content[: old.start()] + new + content[old.end() :]
            continue
        if kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, lines[int(rng.integers(len(lines)))])
        elif kind == 3:
            lines[at] = lines[at][: int(rng.integers(len(lines[at]) + 1))]
        elif kind == 4:
            lines[at] = lines[at].replace(*_REPLACEMENTS[rng.integers(len(_REPLACEMENTS))])
        elif kind == 5:
            lines[at] += bytes(rng.integers(0, 256, int(rng.integers(1, 65)), dtype=np.uint8))
        else:
            lines[at] = lines[at] * min(int(rng.integers(2, 2000)), 1 + _LONGEST_LINE // (1 + len(lines[at])))
        content = b"\n".join(lines)
    return content or b"\n"


def run_cases(script, count, seed, fine):
    """Go through `count` cases of a script: (how often each outcome came, {case: what is wrong})."""
    outcomes, wrong, first = Counter(), {}, 0
    while first < count:
        command = [sys.executable, str(script), "--worker", str(first), "--count", str(count), "--seed", str(seed)]
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
                outcomes[text if text in fine else "wrong"] += 1
                if text not in fine:
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


def main(script, description, fine, prepare, try_case):
    """Command line of a script with cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.worker, options.count, options.seed, prepare, try_case)
        return 0
    outcomes, wrong = run_cases(script, options.count, options.seed, fine)
    print(", ".join(f"{name}: {number}" for name, number in sorted(outcomes.items())))
    for case, what in sorted(wrong.items()):
        print(f"case {case}: {what}")
    return 1 if wrong else 0


def _work(first, count, seed, prepare, try_case):
    """Worker: a line before and after each case."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # for the sake of the machine
        for case in range(first, count):
            print("begin", case, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                before = _start_peak()
                found = try_case(prepared, Path(own), np.random.default_rng((seed, case)))
                grown = _peak() - before
            if grown > _MEGABYTES:
                found = f"took {grown:.0f} MB ({found})"
            print("end", case, " ".join(found.split())[:300], flush=True)


def _start_peak():
    """Megabytes in use; from here on `_peak` counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak():
    """Most megabytes in use since `_start_peak`; where the system cannot tell, since the beginning."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024
