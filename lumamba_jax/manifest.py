"""What a checkpoint states about itself, so that damage is found: its leaves and its files with their checksums.

Two layers, because each sees what the other cannot:

- **Files**: size and SHA-256 of every file of a checkpoint, taken from the disk when it is complete. They find flipped
  bits, truncated and missing files before anything interprets the damaged bytes, and name the file.
- **Leaves**: shape, dtype and a checksum of the values of every array, taken from the devices when it is saved and
  again when it is restored. They find what went wrong before or after the files were right: a buffer that was reused
  while it was written, a library that puts values in the wrong place, a restore onto another mesh that mixes up shards.

The JSON file that holds both is sealed by a SHA-256 of its own content.

**The checksum of an array** is a sum over its elements modulo 2^64, so that it can be taken shard by shard and does not
depend on how the array lies on devices and hosts:

    checksum = sum over i1..in of  mix(bits of x[i1..in]) * w(1, i1) * ... * w(n, in)  mod 2^64

`bits` is the element's memory as an unsigned integer (a NaN keeps its payload, -0 is not 0), `mix` multiplies by an odd
constant and folds the upper half onto the lower (a bijection), `w(axis, index)` are pseudo-random odd numbers
(SplitMix64). One changed element always changes the sum: the difference of two mixed values is not 0, and an odd factor
is invertible modulo 2^64. Several changes or swaps cancel with a chance of about 2^-64: damage, not an attacker, is
what this is against. This is multilinear hashing (Carter & Wegman 1979) with weights that factor over the axes.
"""

import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt64

from lumamba_jax.agreement import from_all_processes

SEAL = "sha256"
# Files are hashed in pieces of this many bytes, side by side.
_PIECE = 64 * 2**20
_READ = 2**20
# Elements worked on at a time: their 64-bit products stay in the cache of a core.
_BLOCK = 2**14
_MASK = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Leaf(NamedTuple):
    """One array of a checkpoint; `checksum` has 16 hexadecimal digits."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str


def named_leaves(tree: Any) -> dict[str, Any]:
    """`{"blocks/0/norm/scale": leaf, ...}` of a parameter state or any other tree, in the order of the tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in paths}


def require_same_leaves(expected: Mapping[str, Any], found: Mapping[str, Any], source: Path) -> None:
    """Raise one ValueError with every leaf that is missing, unused or of another shape (values: anything with one)."""
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    problems += [f"unused {name} {tuple(found[name].shape)}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        raise ValueError(f"{source}: the parameters are those of another architecture: {'; '.join(problems)}")


def leaf_records(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    """Shape, dtype and checksum of every array; the same on every process, whatever the shardings.

    Args:
        leaves: JAX arrays, of which each process reads its own shards, replicas once: then all processes must call
            this at the same point. NumPy arrays are the same everywhere; with nothing else nobody is waited for.
    """
    gathers = any(isinstance(leaf, jax.Array) for leaf in leaves.values())
    shards = {name: list(_own_shards(leaf, gathers=gathers)) for name, leaf in leaves.items()}
    for own in shards.values():
        for _, data in own:
            if isinstance(data, jax.Array):
                data.copy_to_host_async()
    with _threads() as pool:
        sums = list(pool.map(lambda own: sum(_checksum(np.asarray(data), offset) for offset, data in own),
                             shards.values()))  # fmt: skip
    texts = from_all_processes(json.dumps(sums)) if gathers else [json.dumps(sums)]
    gathered = [json.loads(text) for text in texts]
    return {
        name: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name, f"{sum(parts) & _MASK:016x}")
        for (name, leaf), parts in zip(leaves.items(), zip(*gathered, strict=True), strict=True)
    }


def leaves_of(content: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaf records in an unsealed JSON file, where they lie under "leaves"."""
    return {name: Leaf(tuple(shape), dtype, checksum) for name, (shape, dtype, checksum) in content["leaves"].items()}


def leaf_damage(expected: Mapping[str, Leaf], leaves: Mapping[str, Any]) -> str | None:
    """What is wrong with restored arrays, None when each is bit for bit what was saved. All processes must call it."""
    found = leaf_records(leaves)
    wrong = [name for name in expected if name not in found or found[name] != expected[name]]
    if not wrong:
        return None
    name = wrong[0]
    what = f"leaf {name} is {_describe(found.get(name))}, but {_describe(expected[name])} was saved"
    return what + _and_more(len(wrong), "leaf", "leaves")


def file_records(directory: Path) -> dict[str, dict[str, Any]]:
    """`{"state/d/0a1b": {"bytes": n, "sha256": [one for each 64 MiB]}, ...}` of every file under `directory`.

    Each file is also flushed to the disk, so that a power cut after the commit does not undo it.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    with _threads() as pool:
        digests = list(pool.map(_digest_of_piece, *_pieces(paths, sizes)))
        list(pool.map(flush_to_disk, paths))
    records, rest = {}, iter(digests)
    for path, size in zip(paths, sizes, strict=True):
        pieces = [next(rest) for _ in range(_count_pieces(size))]
        records[path.relative_to(directory).as_posix()] = {"bytes": size, "sha256": pieces}
    return records


def file_damage(directory: Path, expected: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the files of a checkpoint, None when all of `file_records` are there unchanged.

    Raises: PermissionError when they may not be read.
    """
    problems = []
    for name, record in expected.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            problems.append(f"{name} is missing (expected {record['bytes']:,} bytes)")
            continue
        if size != record["bytes"]:
            problems.append(f"{name} has {size:,} bytes, expected {record['bytes']:,}")
    if not problems:
        paths = [directory / name for name in expected]
        with _threads() as pool:
            found = pool.map(_digest_or_error, *_pieces(paths, [record["bytes"] for record in expected.values()]))
        for name, record in expected.items():
            wrong = [(number, digest, was) for number, was in enumerate(record["sha256"])
                     if (digest := next(found)) != was]  # fmt: skip
            for number, digest, was in wrong[:1]:
                start, stop = number * _PIECE, min((number + 1) * _PIECE, record["bytes"])
                problems.append(
                    f"{name} has changed since it was written (SHA-256 of its bytes {start:,} to {stop:,} is "
                    f"{digest[:16]}, expected {was[:16]})"
                )
    return problems[0] + _and_more(len(problems), "file", "files") if problems else None


def seal(content: Mapping[str, Any]) -> str:
    """JSON text of `content` and a SHA-256 over it, for `unseal`. Raises ValueError for what JSON cannot hold."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({**plain, SEAL: _digest_of_json(plain)}, indent=1, allow_nan=False) + "\n"


def unseal(text: bytes) -> dict[str, Any]:
    """The content of a sealed text. Raises ValueError ("is not ...", "has ...") when it is not what was written."""
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.pop(SEAL, None) != _digest_of_json(content):
        raise ValueError("has changed since it was written (its content does not fit its own SHA-256)")
    return content


def flush_to_disk(path: Path) -> None:
    """Have the operating system write a file, or the names in a directory, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, size: int) -> None:
    """Refuse to begin what the disk cannot hold: `size` bytes under `directory` are claimed and given back.

    Orbax notices a full disk in the middle, and its threads then print stacks long after. A file system that cannot
    claim bytes passes.

    Raises: OSError, as writing them would.
    """
    probe = directory / "space"
    try:
        with probe.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise OSError(error.errno, f"{size:,} bytes do not fit ({error.strerror})", str(directory)) from error
    finally:
        probe.unlink(missing_ok=True)


def _own_shards(leaf: Any, *, gathers: bool) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The parts of an array that this process answers for: (index of the first element, values)."""
    if not isinstance(leaf, jax.Array):
        if not gathers or jax.process_index() == 0:
            yield (0,) * np.ndim(leaf), leaf
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield tuple(part.start or 0 for part in shard.index), shard.data


def _checksum(values: np.ndarray, offset: tuple[int, ...]) -> int:
    """The sum of the module's docstring over one block of an array whose first element has the index `offset`."""
    words = values.view(_WORDS[values.dtype.itemsize])
    if not words.size:
        return 0
    axes = list(enumerate(offset)) or [(0, 0)]
    return _weighted_sum(np.atleast_1d(words), axes) & _MASK


def _weighted_sum(words: np.ndarray, axes: list[tuple[int, int]]) -> int:
    """`axes`: for each axis of `words` its number in the array and the index of the first element along it."""
    (axis, first), length, inner = axes[0], len(words), words[0].size
    if inner > _BLOCK:
        weights = _weights(axis, first, length)
        return sum(int(w) * _weighted_sum(row, axes[1:]) for w, row in zip(weights, words, strict=True))
    others = [_weights(*place, size) for place, size in zip(axes[1:], words.shape[1:], strict=True)]
    inner_weights = functools.reduce(np.multiply.outer, others, np.ones((), np.uint64)).ravel()
    total, rows = 0, _BLOCK // inner
    for start in range(0, length, rows):
        mixed = words[start : start + rows].reshape(-1, inner) * _GOLDEN
        mixed ^= mixed >> np.uint64(32)
        of_rows = mixed[:, 0] if inner == 1 else mixed @ inner_weights
        total += int(of_rows @ _weights(axis, first + start, len(of_rows)))
    return total


def _weights(axis: int, start: int, size: int) -> UInt64[np.ndarray, " n"]:
    """`w(axis, start..start+size)`: SplitMix64 (Steele, Lea & Flood 2014) made odd; each axis has its own sequence."""
    z = np.arange(start, start + size, dtype=np.uint64) * _GOLDEN + np.uint64((axis + 1) * 0xD1B54A32D192ED03 & _MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _count_pieces(size: int) -> int:
    return max(1, -(-size // _PIECE))


def _pieces(paths: list[Path], sizes: list[int]) -> tuple[list[Path], list[int]]:
    """Paths and piece numbers of all pieces, file by file."""
    pairs = [(path, k) for path, size in zip(paths, sizes, strict=True) for k in range(_count_pieces(size))]
    return [path for path, _ in pairs], [k for _, k in pairs]


def _digest_of_piece(path: Path, number: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(number * _PIECE)
        left = _PIECE
        while left and (data := file.read(min(_READ, left))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _digest_or_error(path: Path, number: int) -> str:
    try:
        return _digest_of_piece(path, number)
    except PermissionError:
        raise
    except OSError as error:  # a bad sector is damage like any other
        return f"unreadable: {error.strerror}"


def _digest_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe(leaf: Leaf | None) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)} with checksum {leaf.checksum}"


def _and_more(count: int, one: str, many: str) -> str:
    return "" if count == 1 else f", and {count - 1} more {one if count == 2 else many}"


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
