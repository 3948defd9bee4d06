"""The header of a GGUF file, walked through before a library reads it: nothing in it may reach beyond the file.

The gguf package trusts the counts that a file declares: for an array of 2**60 numbers at the end of a file it makes
objects until the memory is full. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from fastscore.types import InputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_SHORTEST_PAIR = 8 + 4 + 1
_SHORTEST_TENSOR = 8 + 4 + 4 + 8
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 22
"""In all arrays together. The library makes an object of each; the largest vocabularies have about a million."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header declares."""

    version: int
    num_pairs: int
    num_tensors: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Walk through the header of a file, in time and memory bounded by its size.

    Raises:
        InputError: it is no GGUF file, or declares what it has no room for.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise InputError("no GGUF file: it is empty", path=str(path))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse_gguf_header(data)
    except InputError as error:
        raise error.at(path=str(path)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", path=str(path)) from error


def parse_gguf_header(data: bytes | mmap.mmap) -> GgufHeader:
    """The header at the beginning of ``data``, which is a whole file.

    Raises:
        InputError: as :func:`read_gguf_header`.
    """
    return _Walk(data).header()


class _Walk:
    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._elements = 0
        self._order = "<"

    def header(self) -> GgufHeader:
        if self._size < len(_MAGIC) or self._data[: len(_MAGIC)] != _MAGIC:
            raise InputError("no GGUF file: it begins otherwise")
        self._at = len(_MAGIC)
        version = self._integer("I", "the version")
        if not version & 0xFFFF:  # written on a machine of the other byte order
            self._order = ">"
            self._at -= 4
            version = self._integer("I", "the version")
        if version not in _VERSIONS:
            raise InputError(f"GGUF version {version}; expected {' or '.join(map(str, _VERSIONS))}")
        num_tensors, num_pairs = self._integer("Q", "the tensor count"), self._integer("Q", "the key count")
        self._room(num_pairs, _SHORTEST_PAIR, "keys")
        for _ in range(num_pairs):
            self._string("a key")
            self._value(self._integer("I", "a type"), nested=False)
        self._room(num_tensors, _SHORTEST_TENSOR, "tensors")
        for _ in range(num_tensors):
            self._tensor()
        return GgufHeader(version, num_pairs, num_tensors)

    def _tensor(self) -> None:
        self._string("a tensor's name")
        dimensions = self._integer("I", "a tensor's dimensions")
        if dimensions > MAX_DIMENSIONS:
            raise InputError(f"a tensor of {dimensions} dimensions; at most {MAX_DIMENSIONS} are possible")
        elements = 1
        for _ in range(dimensions):
            elements *= self._integer("Q", "a tensor's size")
        self._integer("I", "a tensor's type")
        offset = self._integer("Q", "a tensor's place")
        # No type has less than a bit for each element.
        if offset > self._size or elements > 8 * self._size:
            raise InputError(f"a tensor of {elements} elements at byte {offset}, the file has {self._size} bytes")

    def _value(self, kind: int, *, nested: bool) -> None:
        if kind == _STRING:
            self._string("a value")
        elif kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind], "a value")
        elif kind == _ARRAY and not nested:
            self._array()
        else:
            raise InputError("an array in an array" if kind == _ARRAY else f"a value of the unknown type {kind}")

    def _array(self) -> None:
        kind, length = self._integer("I", "an array's type"), self._integer("Q", "an array's length")
        self._elements += length
        if self._elements > MAX_ELEMENTS:
            raise InputError(f"arrays of {self._elements} elements; at most {MAX_ELEMENTS} are read")
        if kind in _SCALAR_BYTES:
            self._skip(length * _SCALAR_BYTES[kind], "an array")
            return
        self._room(length, 8, "elements")
        for _ in range(length):
            self._value(kind, nested=True)

    def _string(self, what: str) -> None:
        self._skip(self._integer("Q", f"the length of {what}"), what)

    def _integer(self, code: str, what: str) -> int:
        start = self._at
        self._skip(struct.calcsize("<" + code), what)
        return int(struct.unpack_from(self._order + code, self._data, start)[0])

    def _skip(self, size: int, what: str) -> None:
        if size > self._size - self._at:
            raise InputError(f"{what} at byte {self._at} has {size} bytes: the file ends before")
        self._at += size

    def _room(self, count: int, size: int, what: str) -> None:
        if count * size > self._size - self._at:
            raise InputError(f"{count} {what} are declared, for which the file has no room")
