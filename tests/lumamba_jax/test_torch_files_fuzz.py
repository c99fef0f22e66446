"""Thousands of damaged weight files: each gives the original's tensors or one clear error, in bounded memory and time.

Damage is to what describes the tensors: headers, indices, zip structure, pickles. A file whose damage makes it another
valid file (a letter of a name, a length that still fits) cannot be told from one that was meant so; such a file must
show other names, shapes or dtypes, which the converter compares with the architecture's. What must never happen is the
same description over other values.
"""

import codecs
import json
import pickle
import random
import signal
import struct
import sys
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from torch_checkpoint_writer import (
    foreign,
    mapping,
    program,
    state_dict,
    storages,
    text,
    with_64_bit_end,
    write_checkpoint,
)

from lumamba_jax.torch_files import read_tensors

SEED = 20240719
SECONDS_PER_FILE = 20
BYTES_PER_FILE = 300_000  # of Python and NumPy, at the peak; the files have about 1,000
ARRAYS = {  # no two storages of one size, so that exchanging two of them shows
    "blocks.0.weight": np.arange(15, dtype=np.float32).reshape(3, 5) / 7,
    "blocks.0.bias": np.array([1.5, -2.0, 0.25], ml_dtypes.bfloat16),
    "scale": np.array(0.5),
}


class Case(NamedTuple):
    """A folder of files, one of which is read."""

    files: dict[str, bytes]
    entry: str


class Executed(BaseException):
    """Reading a file did something other than read; not an Exception, so that nothing can hide it."""


class Hung(BaseException):
    """Reading a file took too long."""


# --- undamaged files -------------------------------------------------------------------------------------------------


def header_and_data(arrays) -> tuple[dict, bytes]:
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return header, data


def safetensors(header: dict | bytes, data: bytes) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def plain() -> Case:
    return Case({"model.safetensors": safetensors(*header_and_data(ARRAYS))}, "model.safetensors")


def sharded() -> Case:
    names = list(ARRAYS)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    files = {
        shard: safetensors(*header_and_data({name: ARRAYS[name] for name in held})) for shard, held in shards.items()
    }
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": sum(array.nbytes for array in ARRAYS.values())}, "weight_map": weight_map}
    entry = "model.safetensors.index.json"
    return Case(files | {entry: json.dumps(index).encode()}, entry)


PICKLE = mapping({"epoch": foreign(3), "hyper_parameters": foreign({"lr": [1e-3, None], "seen": {1}, "id": 2**70})})
PICKLE = program(PICKLE + text("state_dict") + state_dict(ARRAYS) + b"s")


def checkpoint(folder: Path, program: bytes = PICKLE) -> Case:
    path = write_checkpoint(folder / "writing", program, storages(ARRAYS))
    return Case({"model.ckpt": with_64_bit_end(path.read_bytes())}, "model.ckpt")


# --- damage ----------------------------------------------------------------------------------------------------------


def with_file(case: Case, name: str, content: bytes) -> Case:
    return case._replace(files=case.files | {name: content})


def truncated(cases: list[Case]) -> Iterator[Case]:
    for case in cases:
        for name, content in case.files.items():
            for sixteenth in range(16):
                yield with_file(case, name, content[: len(content) * sixteenth // 16])


def flipped(content: bytes, places: range, rng: random.Random, ways: int) -> Iterator[bytes]:
    """Every byte of `places` in several ways, one of them a digit and one a single bit."""
    for place in places:
        old = content[place]
        choices = [old ^ (1 << rng.randrange(8)), ord("0") + rng.randrange(10), rng.randrange(256), 0, 255, old ^ 0x80]
        for new in choices[:ways]:
            yield content[:place] + bytes([new]) + content[place + 1 :]


def flipped_headers(rng: random.Random) -> Iterator[Case]:
    case = plain()
    content = case.files[case.entry]
    end = 8 + int.from_bytes(content[:8], "little")
    yield from (with_file(case, case.entry, bad) for bad in flipped(content, range(end), rng, 4))
    case = sharded()
    for name, content in case.files.items():
        end = len(content) if name == case.entry else 8 + int.from_bytes(content[:8], "little")
        yield from (with_file(case, name, bad) for bad in flipped(content, range(end), rng, 2))


def edited(value: object, rng: random.Random) -> object:
    """One change somewhere inside a JSON value: a number, a type, a missing or an added item."""
    odd = [0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1.5, True, None, "F32", "F64", "../a", [], {}, [[]], {"dtype": "F32"}]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.randrange(8)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            return value | {rng.choice(["extra", "", key + "x", "../" + key]): rng.choice([value[key], *odd])}
        if action == 2:
            return value | {key: value[rng.choice(list(value))]}
        return value | {key: edited(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], *rng.choice([[], [edited(value[at], rng)], [value[at]] * 2]), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.6:
        return value + rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])
    return rng.choice(odd)


def edited_headers(rng: random.Random, count: int) -> Iterator[Case]:
    case, (header, data) = plain(), header_and_data(ARRAYS)
    for _ in range(count):
        yield with_file(case, case.entry, safetensors(edited(header, rng), data))
    case = sharded()
    index = json.loads(case.files[case.entry])
    for _ in range(count // 2):
        yield with_file(case, case.entry, json.dumps(edited(index, rng)).encode())
    keys = [json.dumps(key) for key in (*header, "dtype", "shape", "data_offsets")]
    written = json.dumps(header)
    for key in keys:  # the same key twice, which a dict cannot say
        at = written.index(key)
        for value in ("1", "[]", '"F32"', "{}"):
            doubled = written[:at] + f"{key}: {value}, " + written[at:]
            yield with_file(plain(), "model.safetensors", safetensors(doubled.encode(), data))


def claimed_lengths(rng: random.Random) -> Iterator[Case]:
    case = plain()
    content = case.files[case.entry]
    length = int.from_bytes(content[:8], "little")
    claims = [100 * 10**9, 100 << 30, 2**63, 2**64 - 1, 2**31, 2**32, 0, 1, 2, len(content), len(content) - 8]
    for claim in claims + [length + i for i in range(-20, 21) if i] + [rng.randrange(2**64) for _ in range(20)]:
        yield with_file(case, case.entry, struct.pack("<Q", claim) + content[8:])


def damaged_zips(folder: Path, rng: random.Random) -> Iterator[Case]:
    """Every byte of every zip structure, in two ways; then pieces of the archive moved, dropped and repeated."""
    case = checkpoint(folder)
    content = case.files[case.entry]
    with zipfile.ZipFile(folder / "writing") as archive:
        local = [range(info.header_offset, info.header_offset + 30 + len(info.filename)) for info in archive.infolist()]
        directory = range(archive.start_dir, len(content))
    for places in (*local, directory):
        yield from (with_file(case, case.entry, bad) for bad in flipped(content, places, rng, 2))
    for start in (*(places.start for places in local), directory.start, len(content) - 98, len(content) - 22):
        for bad in (content[:start] + content[start + 1 :], content[:start] + b"PK\x03\x04" + content[start:]):
            yield with_file(case, case.entry, bad)
    for _ in range(150):  # 2 or 4 bytes: sizes, offsets and counts
        at, wide = rng.choice(directory), rng.choice([2, 4])
        value = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, len(content), rng.randrange(2**32)]) % 256**wide
        yield with_file(case, case.entry, content[:at] + value.to_bytes(wide, "little") + content[at + wide :])


def damaged_pickles(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """The pickle in an archive whose checksums are right: every byte, then opcodes inserted, removed and exchanged."""
    for bad in flipped(PICKLE, range(len(PICKLE)), rng, 2):
        yield checkpoint(folder, bad)
    opcodes = (
        b"()]}.0129NQRabcdeghijlopqrstuIJKLMFGSUTBCVXP\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e"
    )
    opcodes += b"\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98"
    for _ in range(count):
        at, width = rng.randrange(2, len(PICKLE)), rng.choice([0, 0, 1, 1, 2, 5, 20])
        new = rng.choice(
            [
                bytes([rng.choice(opcodes)]),
                bytes([rng.choice(opcodes)]) + rng.randbytes(rng.choice([1, 4, 8])),
                b"cposix\nsystem\n" + b"X\x04\x00\x00\x00true\x85R",
                b"cbuiltins\nexec\n(X\x04\x00\x00\x00passtR0",
                PICKLE[(other := rng.randrange(len(PICKLE))) : other + rng.choice([1, 5, 30])],
                b"",
            ]
        )
        yield checkpoint(folder, PICKLE[:at] + new + PICKLE[at + width :])


def garbage(rng: random.Random, count: int) -> Iterator[Case]:
    starts = [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"{",
        b'{"weight_map":',
        struct.pack("<Q", 64) + b"{",
        b"<html",
        b"version ",
    ]
    for _ in range(count):
        yield Case({"a.pt": rng.choice(starts) + rng.randbytes(rng.randrange(300))}, "a.pt")


# --- what may come of it ---------------------------------------------------------------------------------------------


class Watch:
    """A context in which reading may neither act, nor take long, nor fill memory."""

    FORBIDDEN = ("exec", "import", "os.", "subprocess.", "shutil.", "socket.", "pickle.", "marshal.", "ctypes.")

    def __init__(self):
        self.watching = False
        self.peak = 0
        sys.addaudithook(self.audit)  # cannot be removed; switched off it does nothing

    def audit(self, event: str, arguments: tuple) -> None:
        if self.watching:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or event.startswith(self.FORBIDDEN):
                self.watching = False
                raise Executed(event)

    def alarm(self, *_: object) -> None:
        raise Hung

    def __enter__(self):
        tracemalloc.start()
        self.before = signal.signal(signal.SIGALRM, self.alarm)
        signal.alarm(SECONDS_PER_FILE)
        self.watching = True

    def __exit__(self, *_: object) -> None:
        self.watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.fixture(scope="module")
def watch(tmp_path_factory) -> Watch:
    folder = tmp_path_factory.mktemp("undamaged")
    for codec in ("cp437", "raw-unicode-escape"):  # of zip names and text opcodes; Python imports codecs at first use
        codecs.lookup(codec)
    for case in (plain(), sharded(), checkpoint(folder)):
        outcome(written(folder, case))
    return Watch()


def description(tensors) -> dict:
    return {name: (array.shape, array.dtype) for name, array in tensors.items()}


def written(folder: Path, case: Case) -> Path:
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    return folder / case.entry


def outcome(entry: Path) -> str:
    try:
        found = read_tensors([entry])
    except (FileNotFoundError, ValueError) as error:
        return refusal(entry, error)
    if description(found) != description(ARRAYS):
        return "another description"
    for name, array in ARRAYS.items():
        assert found[name].tobytes() == array.tobytes(), f"{name} has other values"
    return "equal"


def refusal(entry: Path, error: Exception) -> str:
    sentence = str(error)
    assert sentence.startswith(f"{entry}: "), sentence
    assert sentence.isascii(), sentence
    assert "\n" not in sentence, sentence
    assert "cannot be read" not in sentence, sentence  # said of exceptions that nobody foresaw
    assert len(sentence) < 800, sentence
    if isinstance(error, FileNotFoundError):
        assert "shards are not beside it" in sentence, sentence
        return "a shard is missing"
    return "refused"


def survey(folder: Path, cases: Iterable[Case], watch: Watch) -> Counter:
    """The outcomes of all cases, each under watch."""
    counts = Counter()
    for case in cases:
        entry = written(folder, case)
        with watch:
            counts[outcome(entry)] += 1
        assert watch.peak < BYTES_PER_FILE, case
    return counts


def test_the_watch_sees_what_it_must(tmp_path, watch):
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(X\x04\x00\x00\x00truetR.")
    with pytest.raises(Executed, match=r"pickle\.find_class"), watch, (tmp_path / "evil.pkl").open("rb") as file:
        pickle.load(file)
    with pytest.raises(Executed, match="open"), watch:
        (tmp_path / "new").write_bytes(b"")
    with watch:
        bytes(2 * BYTES_PER_FILE)
    assert watch.peak > BYTES_PER_FILE


def test_undamaged_files_are_equal(tmp_path, watch):
    assert survey(tmp_path, [plain(), sharded(), checkpoint(tmp_path)], watch) == {"equal": 3}


def test_truncated_files(tmp_path, watch):
    # a whole file is among the sixteenths of none
    assert survey(tmp_path, truncated([plain(), sharded(), checkpoint(tmp_path)]), watch) == {"refused": 5 * 16}


DAMAGE = {  # how, how many files at least, how many of them at most may show another description
    "flipped headers": (lambda folder, rng: flipped_headers(rng), 1900, 0.06),
    "edited headers": (lambda folder, rng: edited_headers(rng, 700), 1050, 0.02),
    "claimed lengths": (lambda folder, rng: claimed_lengths(rng), 70, 0),
    "zips": (damaged_zips, 1500, 0),
    "pickles": (lambda folder, rng: damaged_pickles(folder, rng, 1000), 2000, 0.06),
    "garbage": (lambda folder, rng: garbage(rng, 300), 300, 0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(tmp_path, watch, kind):
    damage, at_least, redescribed = DAMAGE[kind]
    counts = survey(tmp_path, damage(tmp_path, random.Random(SEED)), watch)
    print(f"{kind}: {dict(counts)}")
    assert counts.total() >= at_least
    assert counts["another description"] <= redescribed * counts.total()
    assert counts["refused"] > 0.4 * counts.total()
