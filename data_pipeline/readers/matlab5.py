"""MATLAB files of version 5 to 7, checked before SciPy reads them: its reader trusts what the file says of itself.

A damaged count or tag makes it crash the process or ask for all memory. Layout: MathWorks, "MAT-File Format", level 5:
128 bytes of header, then data elements of a tag (type, bytes) and content; a matrix is an element that holds others.
"""

import math
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

_MATRIX, _COMPRESSED = 14, 15
_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}  # of one number or letter
_NUMBERS = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13})
_CELL, _STRUCT, _OBJECT, _CHAR, _SPARSE, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 3, 4, 5, 6, 15
_COMPLEX, _GLOBAL_HEADER = 0x0800, 128
_DEEPEST = 100
_HDF5 = b"MATLAB 7.3"


@dataclass(frozen=True)
class _Element:
    """Type of an element, its content as places in the data, and where the next one begins."""

    kind: int
    start: int
    stop: int
    after: int


def is_matlab73(path: Path) -> bool:
    """Whether a MATLAB file is of version 7.3, which is HDF5."""
    with path.open("rb") as file:
        head = file.read(520)
    return head.startswith(_HDF5) or b"\x89HDF" in (head[:4], head[512:516])


def check_matlab5(path: Path) -> None:
    """Raise ValueError, one sentence, when a file is no whole MATLAB file of version 5 to 7."""
    size = path.stat().st_size
    if size <= _GLOBAL_HEADER:
        raise ValueError(f"damaged: not a MATLAB file, which has more than {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
        if order is None or 0 in data[:4]:
            raise ValueError("damaged: not a MATLAB file of version 5 or later")
        try:
            _Reader(data, order).check_variables(_GLOBAL_HEADER)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"damaged MATLAB file: {error}") from error


class _Reader:
    def __init__(self, data: bytes | mmap.mmap, order: str) -> None:
        self.data, self.order = data, order

    def check_variables(self, at: int) -> None:
        """Every element from `at` to the end is a variable, compressed or not."""
        while at + 8 <= len(self.data):
            element = self.element(at, len(self.data), padded=False)
            if element.kind == _COMPRESSED:
                _Reader(zlib.decompress(self.data[element.start : element.stop]), self.order).check_variables(0)
            elif element.kind == _MATRIX:
                self.check_matrix(element, 0)
            else:
                raise ValueError(f"an element of type {element.kind} at byte {at} where a variable must begin")
            at = element.after

    def element(self, at: int, end: int, *, padded: bool = True) -> _Element:
        """The element at `at`, which lies wholly before `end`."""
        if at + 8 > end:
            raise ValueError(f"an element lacks at byte {at}")
        first, size = struct.unpack(f"{self.order}II", self.data[at : at + 8])
        if first >> 16:  # four bytes of content at most, inside the tag
            kind, size, start, after = first & 0xFFFF, first >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError(f"{size} bytes inside a tag at byte {at}")
        else:
            kind, start = first, at + 8
            after = start + (size + 7) // 8 * 8 if padded else start + size
        if start + size > end:
            raise ValueError(f"an element of {size} bytes at byte {at} is cut short")
        if kind not in _BYTES and kind not in (_MATRIX, _COMPRESSED):
            raise ValueError(f"an element of unknown type {kind} at byte {at}")
        return _Element(kind, start, start + size, min(after, end))

    def integers(self, element: _Element) -> tuple[int, ...]:
        size = element.stop - element.start
        if element.kind not in (5, 6) or size % 4:
            raise ValueError(f"no 32-bit integers at byte {element.start}")
        letter = "i" if element.kind == 5 else "I"
        return struct.unpack(f"{self.order}{size // 4}{letter}", self.data[element.start : element.stop])

    def check_matrix(self, matrix: _Element, depth: int) -> None:
        """Flags, dimensions and name of a matrix, and the content that its class asks for."""
        if matrix.start == matrix.stop:  # an empty cell or field
            return
        if depth > _DEEPEST:
            raise ValueError("matrices within matrices without end")
        at, end = matrix.start, matrix.stop
        element = self.element(at, end)
        flags = self.integers(element)
        if len(flags) != 2:
            raise ValueError(f"a matrix without flags at byte {at}")
        kind = flags[0] & 0xFF
        if kind > _LAST_NUMERIC:  # a function or an object of a newer class: elements of any number
            self.check_elements(element.after, end, depth)
            return
        element = self.element(element.after, end)
        shape = self.integers(element)
        if len(shape) < 2 or min(shape) < 0:
            raise ValueError(f"the dimensions {shape} of a matrix at byte {at}")
        name = self.element(element.after, end)
        if name.kind not in (1, 2, 16):
            raise ValueError(f"a matrix without a name at byte {at}")
        self.check_content(kind, math.prod(shape), name.after, end, depth, parts=1 + bool(flags[0] & _COMPLEX))

    def check_content(self, kind: int, count: int, at: int, end: int, depth: int, *, parts: int) -> None:
        """Numbers in `parts` (real, imaginary), or the matrices of cells and fields."""
        if _FIRST_NUMERIC <= kind <= _LAST_NUMERIC:
            for _ in range(parts):
                element = self.element(at, end)
                if element.kind not in _NUMBERS or element.stop - element.start != count * _BYTES[element.kind]:
                    raise ValueError(f"not the {count} numbers that a matrix at byte {at} should hold")
                at = element.after
        elif kind in (_CHAR, _SPARSE):  # letters; or rows, columns and numbers
            for _ in range(1 if kind == _CHAR else 2 + parts):
                at = self.element(at, end).after
        elif kind in (_CELL, _STRUCT, _OBJECT):
            if kind == _OBJECT:
                at = self.element(at, end).after
            if kind != _CELL:
                at, fields = self.fields(at, end)
                count *= fields
            for _ in range(count):
                element = self.element(at, end)
                if element.kind != _MATRIX:
                    raise ValueError(f"no matrix at byte {at}, where a cell or field should be")
                self.check_matrix(element, depth + 1)
                at = element.after
        else:
            raise ValueError(f"a matrix of unknown class {kind}")

    def fields(self, at: int, end: int) -> tuple[int, int]:
        """Where the fields of a structure begin, and their number."""
        element = self.element(at, end)
        length = self.integers(element)
        if len(length) != 1 or length[0] < 1:
            raise ValueError(f"a structure without names of fields at byte {at}")
        names = self.element(element.after, end)
        return names.after, (names.stop - names.start) // length[0]

    def check_elements(self, at: int, end: int, depth: int) -> None:
        """Elements up to the end, whatever they are."""
        while at + 8 <= end:
            element = self.element(at, end)
            if element.kind == _MATRIX:
                self.check_matrix(element, depth + 1)
            at = element.after
