"""The container: lazy, and hostile files are refused before anything is mapped."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gqsa_compiler.checkpoint import SafetensorsFile
from gqsa_compiler.checkpoint.safetensors_file import MAX_HEADER_BYTES
from gqsa_compiler.errors import CheckpointError
from tests.checkpoint.helpers import Raw, raw_bytes

TWO: Raw = {"a": ("U8", [3], b"abc"), "b": ("F32", [1, 2], struct.pack("<2f", 1.5, -2.0))}


def opened(tmp_path: Path, content: bytes) -> SafetensorsFile:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return SafetensorsFile(path)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "bf16": np.array([1.0, -3.5], ml_dtypes.bfloat16),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
        "flag": np.array([True, False]),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.tensors) == set(arrays)
        for name, array in arrays.items():
            read = file.tensor(name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_arrays_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    with opened(tmp_path, raw_bytes(TWO)) as file:
        array = file.tensor("a")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert array.tobytes() == b"abc"


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    file = opened(tmp_path, raw_bytes(TWO))
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.tensor("a")


def test_unaligned_tensors_come_aligned(tmp_path: Path) -> None:
    with opened(tmp_path, raw_bytes(TWO)) as file:
        array = file.tensor("b")
        assert file.tensors["b"].start % 4 == 3
        assert array.flags.aligned
        assert not array.flags.writeable
        assert array.tolist() == [[1.5, -2.0]]


def test_reading_maps_instead_of_loading(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    size = 1 << 30
    text = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + size)  # sparse: takes no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with SafetensorsFile(path) as file:
        assert file.tensor("x")[size - 1] == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10  # kilobytes


def set_entry(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[name][key] = value

    return edit


def delete_entry(name: str, key: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        del header[name][key]

    return edit


def replace_entry(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (replace_entry("b", 5), "'b'.*lacks a dtype"),
        (replace_entry("b", None), "'b'.*lacks a dtype"),
        (delete_entry("b", "shape"), "'b'.*lacks a dtype, shape"),
        (delete_entry("b", "data_offsets"), "'b'.*lacks"),
        (set_entry("b", "dtype", "F33"), "unknown dtype 'F33'"),
        (set_entry("b", "dtype", ["F32"]), "unknown dtype"),
        (set_entry("b", "shape", 2), "not a short list"),
        (set_entry("b", "shape", [2.0]), "not a short list"),
        (set_entry("b", "shape", [True, 2]), "not a short list"),
        (set_entry("b", "shape", [-1, -2]), "not a short list"),
        (set_entry("b", "shape", [1] * 65), "not a short list"),
        (set_entry("b", "shape", [2**63]), "not a short list"),
        (set_entry("b", "shape", [2**31, 2**31]), "overflows"),
        (set_entry("b", "shape", [2**62, 2**62, 0]), "overflows"),
        # 2^64 elements would wrap to 0 in 64-bit arithmetic and fit an empty tensor.
        (set_entry("b", "shape", [2**32, 2**32]), "overflows"),
        (set_entry("b", "shape", [1, 3]), "do not fit"),
        (set_entry("b", "data_offsets", [3]), "two byte positions"),
        (set_entry("b", "data_offsets", [3, -1]), "two byte positions"),
        (set_entry("b", "data_offsets", ["3", "11"]), "two byte positions"),
        (set_entry("b", "data_offsets", [3.0, 11.0]), "two byte positions"),
        (set_entry("b", "data_offsets", [11, 3]), "do not fit"),
        (set_entry("b", "data_offsets", [0, 8]), "overlaps"),
        (set_entry("b", "data_offsets", [4, 12]), "hole"),
        (set_entry("b", "data_offsets", [2**62, 2**62 + 8]), "hole"),
        (replace_entry("__metadata__", ["x"]), "not text"),
        (replace_entry("__metadata__", {"x": 1}), "not text"),
    ],
)
def test_a_bad_header_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(tmp_path, raw_bytes(TWO, edit))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated: it needs 8 bytes and has 0"),
        (b"\x10\0\0", "truncated"),
        ((0).to_bytes(8, "little"), "would have 0 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}", "truncated"),
        (b"GGUF\3\0\0\0" + bytes(64), "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not JSON"),
        ((4).to_bytes(8, "little") + b"{\xff\xfe}", "not valid JSON"),
        ((4).to_bytes(8, "little") + b"{,,}", "not valid JSON"),
        ((60_000).to_bytes(8, "little") + b'{"a":' + b"[" * 59_995, "not valid JSON"),
        ((5_006).to_bytes(8, "little") + b'{"a":' + b"1" * 5_000 + b"}", "not valid JSON"),
        ((17).to_bytes(8, "little") + b'{"a":1,"a":2}    ', "key 'a' twice"),
        (raw_bytes(TWO, tail=b"!"), "1 bytes that belong to no tensor"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(tmp_path, content)
    assert "x.safetensors" in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = raw_bytes(TWO)
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match="truncated"):
            opened(tmp_path, content[:length])


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: No such file"):
        SafetensorsFile(tmp_path / "nothing.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("dir.safetensors", "pipe.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a regular file"):
            SafetensorsFile(tmp_path / name)


def test_a_file_that_shrank_after_opening_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, raw_bytes(TWO)) as file:
        os.truncate(file.path, 16)
        with pytest.raises(CheckpointError, match=r"Cannot map tensor 'b' of .*x\.safetensors"):
            file.tensor("b")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 150), byte=st.integers(0, 255), more=st.binary(max_size=8))
def test_a_spoiled_byte_never_escapes_as_another_error(
    tmp_path: Path, at: int, byte: int, more: bytes
) -> None:
    content = bytearray(raw_bytes(TWO))
    content[at % len(content)] = byte
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content) + more)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return  # any other kind of error fails the test
    with file:
        for name, info in file.tensors.items():
            assert 8 <= info.start <= info.stop <= file.size
            assert file.tensor(name).nbytes == info.stop - info.start
