"""Headers that claim what is not there."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.gguf_header import check_header

UINT8, UINT32, STRING, LIST, FLOAT64 = 0, 4, 8, 9, 12


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(kind: int, value: bytes) -> bytes:
    return text(b"key") + struct.pack("<I", kind) + value


def listed(kind: int, count: int, values: bytes) -> bytes:
    return field(LIST, struct.pack("<IQ", kind, count) + values)


def header(*fields: bytes, version: int = 3, count: int | None = None, tensors: int = 0) -> bytes:
    count = len(fields) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(fields)


def check(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    check_header(path)


def test_all_kinds_of_fields_pass(tmp_path: Path) -> None:
    fields = (
        field(UINT32, b"\1\0\0\0"),
        field(STRING, text(b"llama")),
        listed(STRING, 2, text(b"a") + text(b"")),
        listed(FLOAT64, 3, bytes(24)),
        listed(UINT8, 0, b""),
    )
    check(tmp_path, header(*fields) + b"the rest")


def test_a_big_endian_file_is_the_reader_s(tmp_path: Path) -> None:
    check(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 1 << 40))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGML" + bytes(20), "does not begin with GGUF"),
        (b"GGUF\3\0", "ends in its header"),
        (header(count=1), "ends in its header"),
        (header(count=1 << 40), "counts 0 tensors and 1099511627776 fields"),
        (header(tensors=1 << 63), "tensors and 0 fields"),
        (header(listed(UINT8, 1 << 40, b"")), "reaches beyond its end"),
        (header(listed(STRING, 1 << 40, text(b"a"))), "ends in its header"),
        (header(listed(LIST, 1, bytes(12))), "a field has type 9"),
        (header(field(13, b"")), "a field has type 13"),
        (header(field(STRING, struct.pack("<Q", (1 << 64) - 1))), "reaches beyond its end"),
        (header(field(FLOAT64, bytes(4))), "reaches beyond its end"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.gguf is truncated or damaged \(.*{why}.*\)"):
        check(tmp_path, data)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf cannot be read"):
        check_header(tmp_path / "none.gguf")
