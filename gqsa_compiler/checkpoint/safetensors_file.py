"""The safetensors container, read lazily from files that nobody vouches for.

The library's own reader copies every tensor it returns and its numpy flavour knows bfloat16 only
in late releases. This one maps one tensor at a time, so memory use follows what is alive.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The container's own limit; a longer header is refused before anything is read."""
MAX_RANK = 16
METADATA_KEY = "__metadata__"

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
    }
)
"""The container's dtype names and numpy's."""
FLOAT_DTYPES = tuple(DTYPES[name] for name in ("F16", "BF16", "F32"))
"""What an uncompressed tensor of a checkpoint may be."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Parameters
    ----------
    name : str
    dtype : numpy.dtype
    shape : tuple of int
    start, stop : int
        Bytes from the beginning of the file.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One open safetensors file. Its header is checked whole before any tensor is mapped.

    Parameters
    ----------
    path : path

    Raises
    ------
    CheckpointError
        The file cannot be opened, is truncated, or its header breaks the container's rules.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{self.path} is not a regular file.")
        try:
            # Not a `with`: the object owns the file until `close`.
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"Cannot open {self.path}: {error.strerror or error}.") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.tensors = _read_header(self._file, self.size, self.path)
        except BaseException:
            self._file.close()
            raise

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Map a tensor: read-only, its pages are read on first use and given back with it.

        A tensor that is not aligned to its item size is copied, since vector code downstream
        relies on alignment.
        """
        info = self.tensors[name]
        if info.start == info.stop:
            return np.zeros(info.shape, info.dtype)
        skip = info.start % mmap.ALLOCATIONGRANULARITY
        handle = self._file.fileno()
        try:
            mapped = mmap.mmap(
                handle,
                info.stop - info.start + skip,
                access=mmap.ACCESS_READ,
                offset=info.start - skip,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Cannot map tensor {name!r} of {self.path} ({error}); was the file changed "
                "while it was read?"
            ) from error
        count = math.prod(info.shape)
        array = np.frombuffer(mapped, info.dtype, count, skip).reshape(info.shape)
        if info.start % info.dtype.itemsize:
            array = array.copy()
            array.flags.writeable = False
        return array

    def close(self) -> None:
        """Close the file; arrays already handed out stay valid."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; a doubled key is an error, since readers would differ on it.

    Parameters
    ----------
    text : bytes
        UTF-8.
    what : str
        How messages name it, e.g. ``The header of FILE``.

    Raises
    ------
    CheckpointError
        It is not UTF-8, not JSON, nested beyond reason, or not an object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise CheckpointError(f"{what} has the key {key!r} twice; write it again.")
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(f"{what} is not valid JSON ({reason}); write it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object; write it again.")
    return value


def _truncated(path: Path, needed: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: it needs {needed} bytes and has {size}. Download or write it again."
    )


def _read_header(
    file: BinaryIO, size: int, path: Path
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    if size < 8:
        raise _truncated(path, 8, size)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would have {length} bytes "
            f"(2 to {MAX_HEADER_BYTES} are possible)."
        )
    if 8 + length > size:
        raise _truncated(path, 8 + length, size)
    text = file.read(length)
    if len(text) != length:  # the file shrank after its size was asked
        raise _truncated(path, 8 + length, 8 + len(text))
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON.")
    header = read_json_object(text, f"The header of {path}")
    metadata = _metadata(header.pop(METADATA_KEY, {}), path)
    infos = [_tensor_info(name, entry, 8 + length, path) for name, entry in header.items()]
    _check_tiling(infos, 8 + length, size, path)
    return metadata, {info.name: info for info in infos}


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"The header of {path} has a {METADATA_KEY} that is not text.")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"Tensor {name!r} in the header of {path} {what}.")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise fail("lacks a dtype, shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise fail("has a shape that is not a short list of sizes")
    # Without the zeros: numpy multiplies those last and would overflow on the rest.
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise fail("has a shape whose size overflows 63 bits")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise fail("has data_offsets that are not two byte positions")
    start, stop = offsets
    if stop < start or stop - start != math.prod(shape) * dtype.itemsize:
        raise fail(f"has data_offsets {start}..{stop} that do not fit its shape and dtype")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + stop)


def _check_tiling(infos: list[TensorInfo], base: int, size: int, path: Path) -> None:
    """The tensors must fill the file: no overlap, no hole, nothing beyond the end or after it."""
    position = base
    for info in sorted(infos, key=lambda info: (info.start, info.stop)):
        if info.start != position:
            fault = "overlaps another one" if info.start < position else "has a hole before it"
            raise CheckpointError(f"Tensor {info.name!r} of {path} {fault}; write it again.")
        position = info.stop
    if position > size:
        raise _truncated(path, position, size)
    if position < size:
        raise CheckpointError(
            f"{path} has {size - position} bytes that belong to no tensor; write it again."
        )
