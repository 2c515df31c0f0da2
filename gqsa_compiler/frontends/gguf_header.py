"""Checks of a GGUF file's header, before the `gguf` package reads it.

That package believes the lengths it finds: a list that claims 2^40 entries keeps it busy for days,
and lists of lists end its stack.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from gqsa_compiler.errors import ModelError

_MAGIC = b"GGUF"
_STRING, _LIST = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the number of its type; strings and lists have a length of their own."""
_MOST = 1 << 20
"""Fields, or tensors; a large model has some thousands."""


def check_header(path: Path) -> None:
    """Walk over the fields, and see that everything they claim is in the file.

    Parameters
    ----------
    path : Path
        A little-endian file; the rest of it, and a file of the other order, is left to the reader.

    Raises
    ------
    ModelError
        It is not such a file, or a length leads beyond its end.
    """
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).fields()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except _Damaged as error:
        raise ModelError(
            f"{path} is truncated or damaged ({error}); copy or download it again."
        ) from None


class _Damaged(Exception):
    pass


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def fields(self) -> None:
        if self._take(4) != _MAGIC:
            raise _Damaged("it does not begin with GGUF")
        (version,) = struct.unpack("<I", self._take(4))
        if version & 0xFFFF == 0:
            return  # big-endian
        tensors, fields = struct.unpack("<QQ", self._take(16))
        if tensors > _MOST or fields > _MOST:
            raise _Damaged(f"its header counts {tensors} tensors and {fields} fields")
        for _ in range(fields):
            self._skip(self._number(8))
            self._value(self._number(4))

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number(8))
        elif kind == _LIST:
            entries, count = self._number(4), self._number(8)
            if entries == _STRING:
                for _ in range(count):  # each takes 8 bytes of the file
                    self._skip(self._number(8))
            else:
                self._skip(self._width(entries) * count)
        else:
            self._skip(self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in _SIZES:
            raise _Damaged(f"a field has type {kind}")
        return _SIZES[kind]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise _Damaged("it ends in its header")
        return data

    def _skip(self, size: int) -> None:
        if size > self._size - self._file.tell():
            raise _Damaged("a field reaches beyond its end")
        self._file.seek(size, 1)
