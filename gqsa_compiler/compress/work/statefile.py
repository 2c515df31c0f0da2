"""A state of a compression in one safetensors file with a checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gqsa_compiler.checkpoint.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from gqsa_compiler.errors import CheckpointError, GqsaError

Metadata = str | int | float

_METADATA = "metadata"
_CHECKSUM = "crc32"
_TORCH_DTYPES: Mapping[np.dtype[Any], torch.dtype] = MappingProxyType(
    {
        DTYPES["BOOL"]: torch.bool,
        DTYPES["U8"]: torch.uint8,
        DTYPES["I8"]: torch.int8,
        DTYPES["I16"]: torch.int16,
        DTYPES["I32"]: torch.int32,
        DTYPES["I64"]: torch.int64,
        DTYPES["F16"]: torch.float16,
        DTYPES["BF16"]: torch.bfloat16,
        DTYPES["F32"]: torch.float32,
        DTYPES["F64"]: torch.float64,
    }
)


def write_state(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Metadata]
) -> None:
    """Write a state; the bytes are with the system, not yet on the disk, when this returns.

    Parameters
    ----------
    path : Path
    tensors : mapping of str to Tensor
        Of any device, shape and the dtypes of integers, floats and bool.
    metadata : mapping of str to str, int or float

    Raises
    ------
    OSError
        The file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if tensor.dtype not in _TORCH_DTYPES.values():
            raise TypeError(f"tensor {name!r} of a state cannot be {tensor.dtype}")
    text = json.dumps(dict(metadata))
    try:
        save_file(stored, path, {_METADATA: text, _CHECKSUM: str(_checksum(stored, text))})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Metadata]]:
    """Read what `write_state` wrote; memory holds each tensor once.

    Returns
    -------
    dict of str to Tensor
        Sorted by name. In ordinary CPU memory, not mapped: writing to them or replacing the file
        is safe.
    dict of str to str, int or float

    Raises
    ------
    GqsaError
        The file is damaged or cannot be read.
    """
    try:
        with SafetensorsFile(path) as file, path.open("rb") as data:
            text = file.metadata.get(_METADATA, "")
            expected = file.metadata.get(_CHECKSUM)
            tensors = {
                name: _read_tensor(data, info) for name, info in sorted(file.tensors.items())
            }
        if expected != str(_checksum(tensors, text)):
            raise _damaged(path)
        return tensors, json.loads(text)
    except CheckpointError as error:
        cause = error.__cause__
        raise (
            _unreadable(path, cause) if isinstance(cause, OSError) else _damaged(path)
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (KeyError, EOFError, ValueError) as error:
        raise _damaged(path) from error


def _read_tensor(data: BinaryIO, info: TensorInfo) -> Tensor:
    # PyTorch's own memory and its alignment: vector code adds in another order at another one,
    # and a run that goes on should compute what an undisturbed one does.
    tensor = torch.empty(info.shape, dtype=_TORCH_DTYPES[info.dtype])
    if tensor.numel():
        data.seek(info.start)
        # Reading, not mapping: a failing disk is an exception then, not the end of the process.
        if data.readinto(_bytes(tensor)) != info.stop - info.start:  # type: ignore[attr-defined]
            raise EOFError
    return tensor


def _bytes(tensor: Tensor) -> Any:
    """View a contiguous CPU tensor as a NumPy array uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    """Return a CRC-32 of all that a state holds."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(_bytes(tensor), value)
    return value


def _damaged(path: str | os.PathLike[str]) -> GqsaError:
    return GqsaError(
        f"The saved state {os.fspath(path)} is damaged, which a kill cannot cause but a failing "
        "disk can. Check the disk, then begin anew with --restart."
    )


def _unreadable(path: str | os.PathLike[str], error: OSError) -> GqsaError:
    return GqsaError(
        f"The saved state {os.fspath(path)} cannot be read: {error.strerror or error}. Make it "
        "readable, or begin anew with --restart."
    )
