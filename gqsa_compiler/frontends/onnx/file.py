"""Read an ONNX file that nobody vouches for: sizes limited, external data kept to its directory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.values import Array

SUFFIX = ".onnx"
_MOST_BYTES = 2 << 30  # what a protobuf message can have
_OLDEST, _NEWEST = 13, 24
"""Operator sets that are read."""


def load_model(path: str | os.PathLike[str]) -> ModelProto:
    """Read a model without its external data, and check it.

    Raises
    ------
    ModelError
        It cannot be read, is no valid model, or needs operators of another release.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ModelError(f"{file} is larger than an ONNX file can be (2 GiB).")
        model = onnx.load(str(file), load_external_data=False)
    except OSError as error:
        raise ModelError(f"Cannot read {file}: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's own errors, which differ from release to release
        raise ModelError(f"{file} is not an ONNX file: {error}.") from error
    if not model.HasField("graph") or not model.graph.output:
        raise ModelError(f"{file} is not an ONNX file: it has no graph.")
    version = opset(model)
    if not _OLDEST <= version <= _NEWEST:
        raise ModelError(
            f"{file} uses ONNX operator set {version}; sets {_OLDEST} to {_NEWEST} are read. "
            "onnx.version_converter may convert it."
        )
    return model


def opset(model: ModelProto) -> int:
    """Return the version of the standard operators that a model uses."""
    versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    return int(versions[0]) if versions else _OLDEST


def read_tensor(tensor: TensorProto, directory: Path) -> Array:
    """Return the values of an initializer; external data are mapped, not read.

    Parameters
    ----------
    tensor : TensorProto
    directory : Path
        Of the model; external files outside it are not opened.

    Raises
    ------
    ModelError
        The data are missing, too short, or elsewhere.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"ONNX tensor {tensor.name!r} cannot be read: {error}.") from error
    said = {entry.key: entry.value for entry in tensor.external_data}
    where = f"ONNX tensor {tensor.name!r}"
    path = directory / said.get("location", "")
    inside = path.resolve().parent == directory.resolve()
    if not inside or not said.get("location"):
        raise ModelError(
            f"{where} lies in {said.get('location')!r}, which is not a file beside the model; "
            "it is not opened."
        )
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        offset = int(said.get("offset", 0))
        count = int(np.prod(list(tensor.dims), dtype=object)) if tensor.dims else 1
        if dtype.itemsize * 8 < 8 or tensor.data_type in _PACKED or min(offset, count) < 0:
            raise ValueError("its dtype or sizes cannot be mapped")
        if not count:
            return np.zeros(list(tensor.dims), dtype)
        if offset + count * dtype.itemsize > path.stat().st_size:
            raise ValueError("the file is too short")
        return np.memmap(path, dtype, "r", offset, tuple(tensor.dims) or (1,)).reshape(
            list(tensor.dims)
        )
    except (OSError, ValueError, KeyError, OverflowError) as error:
        raise ModelError(f"{where} cannot be read from {path}: {error}.") from error


_PACKED = tuple(
    getattr(TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "STRING")
    if hasattr(TensorProto, name)
)
