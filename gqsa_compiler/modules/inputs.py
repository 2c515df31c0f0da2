"""Inputs of a graph to calibrate on: read from .npz files that nobody vouches for, and checked."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.onnx.graph import GraphTensor
from gqsa_compiler.frontends.onnx.values import Array

_MOST_BYTES = 2 << 30
_MOST_ARRAYS = 1000
_KINDS = "biuf"
"""Numbers and truth values: everything that needs no pickle."""


def read_inputs(paths: Sequence[str | Path]) -> list[dict[str, Array]]:
    """Read calls of a graph, one an .npz file.

    Parameters
    ----------
    paths : sequence of path
        What ``numpy.savez(file, NAME=ARRAY, ...)`` writes, compressed or not; 2 GiB in all.

    Returns
    -------
    list of dict
        Arrays by the names of the graph's inputs.

    Raises
    ------
    UsageError
        There is no such file.
    ModelError
        A file is damaged, too large, or holds something else than arrays of numbers.
    """
    left = _MOST_BYTES
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        try:
            with zipfile.ZipFile(path) as archive:
                items = archive.infolist()
                size = sum(item.file_size for item in items)
                if size > left or len(items) > _MOST_ARRAYS:
                    raise ValueError(
                        f"its {len(items)} arrays take {size} bytes; {_MOST_ARRAYS} arrays and "
                        f"{_MOST_BYTES} bytes in all files are read"
                    )
                left -= size
                found.append({_name(item): _array(archive, item) for item in items})
        except Exception as error:  # whatever a damaged file makes of zipfile and numpy
            raise ModelError(f"{path} cannot be read as an .npz file: {error}.") from error
    return found


def _name(item: zipfile.ZipInfo) -> str:
    if not item.filename.endswith(".npy"):
        raise ValueError(f"{item.filename!r} in it is no array")
    return item.filename.removesuffix(".npy")


def _array(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> Array:
    """Read an array whose header agrees with the size that the archive says: nothing grows."""
    with archive.open(item) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{item.filename!r} has version {version}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        if dtype.kind not in _KINDS:
            raise ValueError(f"{item.filename!r} has dtype {dtype}, not numbers")
        if math.prod(shape) * dtype.itemsize != item.file_size - file.tell():
            raise ValueError(f"{item.filename!r} has another size than its header says")
        values = np.frombuffer(file.read(), dtype)
    return values.reshape(shape, order="F" if by_columns else "C")


def check_inputs(
    inputs: Sequence[GraphTensor],
    bounds: Mapping[str, tuple[int, int]],
    calls: Sequence[Mapping[str, Array]],
) -> list[dict[str, Array]]:
    """Check calls of a graph against its inputs.

    Parameters
    ----------
    inputs : sequence of GraphTensor
    bounds : mapping of str to (int, int)
        Of sizes that vary.
    calls : sequence of mappings
        Arrays by name.

    Returns
    -------
    list of dict
        The arrays in the inputs' dtypes.

    Raises
    ------
    UsageError
        There are no calls; a name, dtype or size is another than the graph's.
    """
    if not calls:
        raise UsageError("There are no calibration inputs; give at least one.")
    names = [item.name for item in inputs]
    found = []
    for number, call in enumerate(calls, 1):
        where = f"Calibration inputs, call {number}"
        if sorted(call) != sorted(names):
            raise UsageError(
                f"{where}: the graph takes {', '.join(names)}, each once; given are "
                f"{', '.join(sorted(call)) or 'none'}."
            )
        sizes: dict[str, int] = {}
        found.append(
            {item.name: _checked(item, call[item.name], bounds, sizes, where) for item in inputs}
        )
    return found


def _checked(
    item: GraphTensor,
    given: Array,
    bounds: Mapping[str, tuple[int, int]],
    sizes: dict[str, int],
    where: str,
) -> Array:
    array = np.asarray(given)
    if not np.can_cast(array.dtype, item.dtype, "same_kind"):
        raise UsageError(f"{where}: input {item.name} must be {item.dtype}, not {array.dtype}.")
    if array.ndim != len(item.shape):
        raise UsageError(
            f"{where}: input {item.name} has {array.ndim} axes, not {len(item.shape)}."
        )
    for axis, (size, wanted) in enumerate(zip(array.shape, item.shape, strict=True)):
        if isinstance(wanted, int):
            low = high = wanted
        else:
            low, high = (sizes[wanted],) * 2 if wanted in sizes else bounds[wanted]
            sizes[wanted] = size
        if not low <= size <= high:
            raise UsageError(
                f"{where}: axis {axis} of input {item.name} has size {size}; it must be "
                f"{low if low == high else f'{low} to {high}'}."
            )
    return array.astype(item.dtype)
