"""`params.safetensors`: written once by the compiler, mapped into memory by the runtime.

Every tensor starts on a 64-byte boundary of the file, so that a mapping can be handed to vector
code as it is. safetensors allows no holes, so gaps are uint8 tensors called ``_pad.<number>``.
Pages are mapped copy-on-write: nothing is read before it is used, and the file cannot change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.schema import Parameter

ALIGNMENT = 64
_HEADER_RESERVE = 1 << 18  # bytes kept free for the header while the tensors stream by
_HEADER_LIMIT = 100_000_000  # the format's own limit
_METADATA, _PAD = "__metadata__", "_pad."
_COPY_BLOCK = 1 << 24
_CODES = {
    "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float64": ("F64", 8),
    "int8": ("I8", 1), "int16": ("I16", 2), "int32": ("I32", 4), "int64": ("I64", 8),
    "uint8": ("U8", 1), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8),
}  # fmt: skip


def write_params(
    path: str | Path, tensors: Iterable[tuple[str, np.ndarray]]
) -> tuple[Parameter, ...]:
    """Write a parameters file, one tensor at a time.

    Parameters
    ----------
    path : str or Path
        The file to write; its directory exists.
    tensors : iterable of (name, array)
        In call order. Arrays may have any shape and any dtype of safetensors; bfloat16 is
        recognised by its name, so ml_dtypes arrays need no conversion.

    Returns
    -------
    tuple of Parameter
        The manifest's entries, in the same order.

    """
    header: dict[str, dict[str, Any]] = {}
    entries = []
    with Path(path).open("wb+") as file:
        file.seek(_HEADER_RESERVE)
        for name, array in tensors:
            dtype = array.dtype.name
            if name in header or name.startswith(_PAD):
                raise ValueError(f"The parameter name {name!r} is taken.")
            if dtype not in _CODES or array.dtype.byteorder == ">":
                raise ValueError(f"The parameter {name} has the dtype {array.dtype!r}.")
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start = file.tell() - _HEADER_RESERVE
            file.write(data.data)
            header[name] = _entry(_CODES[dtype][0], array.shape, start, data.nbytes)
            digest = hashlib.sha256(data.data).hexdigest()
            entries.append(Parameter(name, dtype, tuple(map(int, array.shape)), digest))
            gap = -data.nbytes % ALIGNMENT
            if gap:
                file.write(bytes(gap))
                header[f"{_PAD}{len(entries)}"] = _entry("U8", (gap,), start + data.nbytes, gap)
        _write_header(file, header)
    return tuple(entries)


def _entry(code: str, shape: Sequence[int], start: int, nbytes: int) -> dict[str, Any]:
    return {
        "dtype": code,
        "shape": [int(n) for n in shape],
        "data_offsets": [start, start + nbytes],
    }


def _write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    end = file.tell()
    room = _HEADER_RESERVE
    if len(text) + 8 > room:
        room = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT
        _shift(file, _HEADER_RESERVE, end, room - _HEADER_RESERVE)
    file.seek(0)
    file.write((room - 8).to_bytes(8, "little") + text.ljust(room - 8))


def _shift(file: BinaryIO, start: int, end: int, distance: int) -> None:
    """Move the bytes [start, end) of a file towards its end, last block first."""
    while end > start:
        begin = max(start, end - _COPY_BLOCK)
        file.seek(begin)
        block = file.read(end - begin)
        file.seek(begin + distance)
        file.write(block)
        end = begin


def map_params(
    path: str | Path, parameters: Sequence[Parameter], *, verify: bool = True
) -> list[np.ndarray]:
    """Map a parameters file into memory, after checking it against the manifest.

    Parameters
    ----------
    path : str or Path
        The file.
    parameters : sequence of Parameter
        What the manifest says of it.
    verify : bool
        Compare every parameter's SHA-256, which reads the whole file once.

    Returns
    -------
    list of ndarray
        The bytes of each parameter, uint8 [nbytes], in the order of `parameters`: views of one
        copy-on-write mapping, each aligned to 64 bytes.

    Raises
    ------
    ArtefactError
        The file is missing, truncated or malformed, or disagrees with the manifest.

    """
    path = Path(path)
    try:
        mapping = np.memmap(path, np.uint8, mode="c")
    except FileNotFoundError:
        raise ArtefactError(f"The artefact is incomplete: there is no {path}.") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be mapped: {error}.") from None
    header, begin = _read_header(path, mapping)
    views = [_view(path, mapping[begin:], header.get(p.name), p) for p in parameters]
    listed = {p.name for p in parameters}
    for name in header:
        if name not in listed and name != _METADATA and not name.startswith(_PAD):
            raise ArtefactError(
                f"{path} has the parameter {name}, which the manifest does not list; copy or "
                "compile the artefact again."
            )
    if verify:
        with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
            digests = pool.map(lambda view: hashlib.sha256(view.data).hexdigest(), views)
            for parameter, digest in zip(parameters, digests, strict=True):
                if digest != parameter.sha256:
                    raise ArtefactError(
                        f"The parameter {parameter.name} in {path} is damaged: its SHA-256 is not "
                        "the manifest's. Copy or compile the artefact again."
                    )
    return views


def _read_header(path: Path, mapping: np.ndarray) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(mapping[:8].tobytes(), "little")
    if len(mapping) < 8 or size > min(len(mapping) - 8, _HEADER_LIMIT):
        raise ArtefactError(f"{path} is truncated or is not a safetensors file.")
    try:
        header = json.loads(mapping[8 : 8 + size].tobytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} has a damaged header; copy or compile the artefact again.")
    return header, 8 + size


def _view(path: Path, data: np.ndarray, entry: Any, parameter: Parameter) -> np.ndarray:
    """Find one parameter's bytes; nothing in the header is trusted."""
    name = parameter.name
    if parameter.dtype not in _CODES:
        raise ArtefactError(f"The manifest gives {name} the unknown dtype {parameter.dtype!r}.")
    code, itemsize = _CODES[parameter.dtype]
    if not isinstance(entry, dict):
        raise ArtefactError(f"{path} has no parameter {name}, which the manifest lists.")
    if (entry.get("dtype"), entry.get("shape")) != (code, list(parameter.shape)):
        raise ArtefactError(
            f"The parameter {name} in {path} is {entry.get('dtype')} {entry.get('shape')}, and the "
            f"manifest says {code} {list(parameter.shape)}."
        )
    offsets = entry.get("data_offsets")
    nbytes = math.prod(parameter.shape) * itemsize
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int and offset >= 0 for offset in offsets)
        or min(parameter.shape, default=0) < 0
        or offsets[1] - offsets[0] != nbytes
    ):
        raise ArtefactError(f"The parameter {name} in {path} has broken offsets: {offsets}.")
    if offsets[1] > len(data):
        raise ArtefactError(
            f"{path} is truncated: {name} lies beyond its end. Copy or compile the artefact again."
        )
    view: np.ndarray = data[offsets[0] : offsets[1]]
    if nbytes and view.ctypes.data % ALIGNMENT:
        raise ArtefactError(f"The parameter {name} in {path} is not aligned to 64 bytes.")
    return view
