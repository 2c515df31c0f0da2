"""Puts machine code where TVM would leave CUDA source in a library.

On a machine without a GPU's driver TVM's runtime for CUDA does not load, and the code generator
then makes a module that holds source, which a library would compile on its user's machine. The
modules that a library imports lie in it as one string of bytes (``__tvm_ffi__library_bin``), all
numbers little endian and 64 bits wide:

- the number of bytes that follow;
- the tree of imports: two vectors, each its length and its numbers;
- for every module its kind (length, characters) and, but for the library itself (``_lib``), its
  bytes (length, bytes). Those of kind ``cuda`` are a format (length, characters), the table of
  functions, and the code (length, bytes). Formats are ``cuda`` (source), ``ptx``, ``cubin`` and
  ``fatbin``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from gqsa_compiler.errors import CompileError

_FORMATS = (b"cuda", b"ptx", b"cubin", b"fatbin")


@dataclass
class _Reader:
    """Reads a string of bytes from its start."""

    data: bytes
    at: int = 0

    def number(self) -> int:
        """Read an integer."""
        (value,) = struct.unpack("<Q", self.take(8))
        return int(value)

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        if count > len(self.data) - self.at:
            raise CompileError("A library's imported modules are not laid out as in TVM 0.27.")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> bytes:
        """Read a length and as many bytes."""
        return self.take(self.number())


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def embed_machine_code(
    blob: bytes, source: str, code: bytes, code_format: Literal["cubin", "fatbin"]
) -> bytes:
    """Replace a CUDA module's source by machine code.

    Parameters
    ----------
    blob : bytes
        As ``runtime.ModulePackImportsToTensor`` gives it for a library's host module.
    source : str
        What the module holds, whatever format it is said to be in.
    code : bytes
        What it shall hold.

    Returns
    -------
    bytes
        For ``codegen.codegen_blob``.

    Raises
    ------
    CompileError
        `blob` is laid out otherwise, or holds no such module.
    """
    reader = _Reader(blob)
    if reader.number() != len(blob) - 8:
        raise CompileError("A library's imported modules are not laid out as in TVM 0.27.")
    for _ in range(2):
        reader.take(8 * reader.number())
    parts = [blob[8 : reader.at]]
    ending = _text(source.encode())
    replaced = 0
    while reader.at < len(blob):
        kind = reader.text()
        parts.append(_text(kind))
        if kind == b"_lib":
            continue
        value = reader.text()
        if kind == b"cuda" and value.endswith(ending):
            inside = _Reader(value)
            if inside.text() in _FORMATS:
                table = value[inside.at : -len(ending)]
                value = _text(code_format.encode()) + table + _text(code)
                replaced += 1
        parts.append(_text(value))
    if replaced != 1:
        raise CompileError(f"A library holds {replaced} CUDA modules of the given source, not 1.")
    return _text(b"".join(parts))
