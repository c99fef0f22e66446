"""HDF5's library runs for ever, or crashes, on some damaged texts: they are looked at before it reads an attribute.

Texts of any length lie in "global heaps", named by address. Layout: HDF5 File Format Specification 3.0, III.E (global
heap) and IV.A (object headers, messages 0x000C attribute and 0x0010 continuation). Only what h5py writes by default is
followed (headers of version 1); the library itself refuses the rest, or reads it.
"""

import os
import struct

import h5py
from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)

_HEADER_V1, _ATTRIBUTE, _CONTINUATION = 1, 0x000C, 0x0010
_VARIABLE_LENGTH = 9  # class of a datatype
_SHARED = 0x02  # flag of a message whose content, or datatype, lies elsewhere
_MOST_CHUNKS, _LARGEST_CHUNK = 1000, 1 << 26


class TextHeaps:
    """The heaps of one file. descriptor: of the file, open for reading while `check` is used."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
        self._sound: set[int] = set()  # addresses

    def check(self, thing: h5py.File | h5py.Group) -> None:
        """Raise ValueError when a text among the attributes of a file or group lies in a damaged heap."""
        base = thing.file.userblock_size
        for content in _values(self._descriptor, base, base + h5o.get_info(thing.id).addr):
            for at in range(0, len(content) - 15, 16):  # per text: length, address of its heap, number in it
                length, heap, _ = struct.unpack_from("<IQI", content, at)
                if length > self._size:  # the library asks for so much memory before it looks
                    raise ValueError("a text is longer than the file")
                if length and heap not in self._sound:
                    _check_heap(self._descriptor, base + heap)
                    self._sound.add(heap)


def _values(descriptor: int, base: int, address: int) -> list[bytes]:
    """The values of attributes of variable length in the object header at an address."""
    head = os.pread(descriptor, 16, address)
    if len(head) < 16 or head[0] != _HEADER_V1:
        return []
    chunks, found = [(address + 16, int.from_bytes(head[8:12], "little"))], []
    for place, size in chunks:  # grows by continuations
        if len(chunks) > _MOST_CHUNKS or size > _LARGEST_CHUNK:
            raise ValueError("its header has no end")
        chunk = os.pread(descriptor, size, place)
        at = 0
        while at + 8 <= len(chunk):
            kind, length, flags = struct.unpack_from("<HHB", chunk, at)
            content = chunk[at + 8 : at + 8 + length]
            at += 8 + length
            if kind == _CONTINUATION and len(content) >= 16:
                more, more_size = struct.unpack_from("<QQ", content)
                chunks.append((base + more, more_size))
            elif kind == _ATTRIBUTE and not flags & _SHARED:
                found.append(_value(content))
    return found


def _value(message: bytes) -> bytes:
    """Value of an attribute message, b"" for one that is not of variable length.

    Raises ValueError for a type of variable length that does not exist.
    """
    if len(message) < 9:
        return b""
    version, flags, *sizes = struct.unpack_from("<BBHHH", message)
    if flags & 1 or not 1 <= version <= 3:  # a datatype that lies elsewhere, or a version that does not exist
        return b""
    name, datatype, dataspace = ((size + 7) // 8 * 8 if version == 1 else size for size in sizes)
    start = (9 if version == 3 else 8) + name
    if start >= len(message) or message[start] & 0x0F != _VARIABLE_LENGTH:
        return b""
    what = int.from_bytes(message[start + 1 : start + 4], "little")  # a sequence, or a text with padding and alphabet
    kind, padding, alphabet = what & 0xF, what >> 4 & 0xF, what >> 8 & 0xF
    if kind > 1 or (kind == 1 and (padding > 2 or alphabet > 1)):
        raise ValueError("an attribute has a type that does not exist")
    return message[start + datatype + dataspace :]


def _check_heap(descriptor: int, address: int) -> None:
    """Raise ValueError for a heap whose objects do not lead to its end."""
    if address >= 1 << 63:
        raise ValueError("a text lies beyond the end of the file")
    head = os.pread(descriptor, 16, address)
    size = int.from_bytes(head[8:16], "little")
    if head[:4] != b"GCOL" or size < 16 or size > _LARGEST_CHUNK:
        raise ValueError("its texts are not where they should be")
    heap, at = os.pread(descriptor, size, address), 16
    while at + 16 <= len(heap):
        number, length = struct.unpack_from("<H", heap, at)[0], struct.unpack_from("<Q", heap, at + 8)[0]
        step = length if number == 0 else 16 + (length + 7) // 8 * 8  # number 0: the space that is free, as a whole
        if step < 16 or at + step > len(heap):
            raise ValueError("its texts are damaged")
        at += step
