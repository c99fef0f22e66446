"""Windows by their content: a hash of the bytes of each, to find windows that occur twice."""

import hashlib
from collections.abc import Iterator

import numpy as np

NO_SIGNAL = 0  # hash of every window without signal: that two of those are equal says nothing


def hash_windows(signal: np.ndarray) -> np.ndarray:
    """(n,C,T) -> (n,) uint64: the first 8 bytes of BLAKE2b over a window's little-endian float32.

    Windows in which every channel is constant get `NO_SIGNAL`. Two of 15 million different windows share a hash with
    a probability of 6e-6.
    """
    return np.array([_hash(window) for window in np.asarray(signal, dtype="<f4")], dtype=np.uint64)


def _hash(window: np.ndarray) -> int:
    if all((window[:, :n] == window[:, :1]).all() for n in (8, window.shape[1])):  # 8 samples nearly always tell
        return NO_SIGNAL
    digest = hashlib.blake2b(np.ascontiguousarray(window).data, digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def repeated(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Places (k > 1, ascending) of each content that occurs more than once among (n,) hashes, by first place."""
    again = later_copies(hashes)
    places = np.flatnonzero(np.isin(hashes, hashes[again]))  # the others are dropped before anything is sorted
    order = places[np.argsort(hashes[places], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1) if len(order) else []
    yield from sorted(groups, key=lambda group: int(group[0]))


def later_copies(hashes: np.ndarray) -> np.ndarray:
    """(n,) bool: whether a window's content occurred before."""
    again = np.ones(len(hashes), dtype=bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again & (hashes != NO_SIGNAL)
