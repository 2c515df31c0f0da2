"""Write other quantisers' tensors, one number at a time, from the formats' definitions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Arrays = dict[str, npt.NDArray[Any]]
_WORDS = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}


class MemoryTensors:
    """Tensors in a dict, as a reader of layers takes them."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.arrays = dict(arrays)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self.arrays)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and its dtype as safetensors writes it."""
        array = self.arrays[name]
        return array.shape, _WORDS[array.dtype.name]

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor."""
        return self.arrays[name]


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix, unpacked: codes [N, K], scales and zeros [N, C], the group of columns."""

    codes: npt.NDArray[np.int64]
    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.int64]
    bits: int
    columns: npt.NDArray[np.int64]

    @property
    def dense(self) -> npt.NDArray[np.float64]:
        """Decode by the definition, in float64: every product is exact."""
        zeros, scales = self.zeros[:, self.columns], self.scales[:, self.columns]
        return (self.codes - zeros) * scales.astype(np.float64)


def random_matrix(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    seed: int = 0,
    symmetric: bool = False,
    low: int = 0,
    scale_dtype: Any = np.float16,
) -> Matrix:
    """Draw a matrix; `low` is the least zero point. Some groups are all zero."""
    rng = np.random.default_rng(seed)
    count = -(-k // group)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(low, 1 << bits, (n, count))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    columns = np.arange(k) // group
    empty = (rng.random((n, count)) < 0.2)[:, columns]
    codes = np.where(empty, zeros[:, columns], codes)
    scales = (rng.uniform(0.3, 1.0, (n, count)) / 32).astype(scale_dtype)
    return Matrix(codes, scales, zeros, bits, columns)


def stream_words(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Pack each row as one stream of bits, lowest first, into int32 words."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes:
        whole = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append([whole >> (32 * w) & 0xFFFFFFFF for w in range(words)])
    return np.array(rows, np.uint32).view(np.int32)


def separate_words(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Pack each row into int32 words with floor(32 / bits) codes each."""
    each = 32 // bits
    rows = []
    for row in codes:
        parts = [row[i : i + each] for i in range(0, len(row), each)]
        rows.append([sum(int(c) << (bits * i) for i, c in enumerate(part)) for part in parts])
    return np.array(rows, np.uint32).view(np.int32)


def pack_gptq(m: Matrix, *, version: int = 1, g_idx: bool = True) -> Arrays:
    """Return qweight, qzeros, scales and g_idx."""
    top = (1 << m.bits) - 1
    zeros = (m.zeros - (1 if version == 1 else 0)) & top
    found: Arrays = {
        "qweight": np.ascontiguousarray(stream_words(m.codes, m.bits).T),
        "qzeros": stream_words(zeros.T, m.bits),
        "scales": np.ascontiguousarray(m.scales.T),
    }
    if g_idx:
        found["g_idx"] = m.columns.astype(np.int32)
    return found


def pack_awq(m: Matrix) -> Arrays:
    """Return qweight, qzeros and scales in the GEMM order."""

    def words(values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        rows = [
            [
                sum(int(row[8 * w + order[i]]) << (4 * i) for i in range(8))
                for w in range(len(row) // 8)
            ]
            for row in values
        ]
        return np.array(rows, np.uint32).view(np.int32)

    return {
        "qweight": words(m.codes.T),
        "qzeros": words(m.zeros.T),
        "scales": np.ascontiguousarray(m.scales.T),
    }


def pack_compressed(
    m: Matrix,
    *,
    symmetric: bool = False,
    words: Callable[[npt.NDArray[Any], int], npt.NDArray[np.int32]] = stream_words,
) -> Arrays:
    """Return the tensors of `pack-quantized`."""
    found: Arrays = {
        "weight_packed": words(m.codes, m.bits),
        "weight_scale": m.scales,
        "weight_shape": np.array(m.codes.shape, np.int64),
    }
    if not symmetric:
        found["weight_zero_point"] = np.ascontiguousarray(words(m.zeros.T, m.bits).T)
    return found


def make_two_four(m: Matrix, seed: int = 0) -> Matrix:
    """Zero two weights of every four neighbours."""
    codes = m.codes.copy()
    rng = np.random.default_rng(seed)
    n, k = codes.shape
    zeros = m.zeros[:, m.columns]
    for row in range(n):
        for at in range(0, k, 4):
            for place in rng.permutation(4)[:2]:
                codes[row, at + place] = zeros[row, at + place]
    return Matrix(codes, m.scales, m.zeros, m.bits, m.columns)


def kept_of_four(codes: npt.NDArray[Any], zero: int) -> list[list[tuple[int, int]]]:
    """Return, for each row, the two kept places of every four, as the library chooses them."""
    table = {
        (): (2, 3), (3,): (2, 3), (2,): (2, 3), (1,): (1, 2), (0,): (0, 2),
        (2, 3): (2, 3), (1, 3): (1, 3), (0, 3): (0, 3), (1, 2): (1, 2), (0, 2): (0, 2),
        (0, 1): (0, 1),
    }  # fmt: skip
    rows = []
    for row in codes:
        quads = [row[at : at + 4] for at in range(0, len(row), 4)]
        rows.append([table[tuple(i for i, code in enumerate(q) if code != zero)] for q in quads])
    return rows


def pack_marlin24(m: Matrix, *, grouped: bool) -> Arrays:
    """Return the tensors of `marlin-24` of a symmetric 2:4 matrix."""
    n, k = m.codes.shape
    zero = 1 << (m.bits - 1)
    places = kept_of_four(m.codes, zero)
    kept = np.array(
        [
            [m.codes[row, 4 * q + p] for q, pair in enumerate(places[row]) for p in pair]
            for row in range(n)
        ]
    )
    tiles = kept.T.reshape(k // 32, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)
    permutation = []
    for i in range(32):
        first = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1):
                column = i // 4
                first.append(16 * row + column // 2 * 256 + 8 * (column % 2) + 4 * block)
        for j in range(4):
            permutation += [p + j for p in first]
    inner = [0, 2, 4, 6, 1, 3, 5, 7] if m.bits == 4 else [0, 2, 1, 3]
    step = len(inner)
    order = [permutation[at + i] for at in range(0, 1024, step) for i in inner]
    packed = stream_words(tiles[:, order].reshape(k // 32, 16 * n), m.bits)

    meta = np.zeros(n * k // 16, np.uint16)
    for row in range(n):
        for word in range(k // 16):
            value = 0
            for q in range(4):
                a, b = places[row][4 * word + q]
                value |= (a | b << 2) << (4 * q)
            r = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32
            r += row % 64 // 8 * 4
            c = word
            if r % 2 == 0 and c % 2 == 1:
                r, c = r + 1, c - 1
            elif r % 2 == 1 and c % 2 == 0:
                r, c = r - 1, c + 1
            meta[c // 2 * n * 2 + r * 2 + c % 2] = value
    scales = np.ascontiguousarray(m.scales.T)
    if grouped:
        order = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
        scales = np.ascontiguousarray(scales.reshape(-1, 64)[:, order].reshape(scales.shape))
    return {
        "weight_packed": packed,
        "scale_packed": scales,
        "meta": meta.view(np.int16).reshape(k // 32, 2 * n),
    }


def pack_bitmask(dense: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> Arrays:
    """Return the tensors of `sparse-24-bitmask`, or of a mask of any other shape."""
    n, k = dense.shape
    bits = np.zeros((n, -(-k // 8)), np.uint8)
    for row, column in zip(*np.nonzero(mask), strict=True):
        bits[row, column // 8] |= 1 << column % 8
    values = dense[mask]
    return {
        "compressed": values.reshape(n, k // 2) if values.size == n * k // 2 else values,
        "bitmask": bits,
        "shape": np.array([[n], [k]], np.int64),
    }


def quantise_directory(
    model: Path,
    directory: Path,
    pack: Callable[[str, tuple[int, int]], tuple[Arrays, npt.NDArray[Any]]],
    quantization: Mapping[str, Any],
) -> dict[str, npt.NDArray[Any]]:
    """Copy a dense model with the linear layers of its blocks replaced.

    Parameters
    ----------
    model, directory : Path
    pack : callable
        Gives, for a module path and a shape, the tensors of the layer and its dense weights.
    quantization : mapping
        ``quantization_config``.

    Returns
    -------
    dict
        The dense weights by tensor name.
    """
    shutil.copytree(model, directory)
    tensors: Arrays = {}
    want = {}
    for name, array in load_file(model / "model.safetensors").items():
        if ".layers." in name and array.ndim == 2:
            layer = name.removesuffix(".weight")
            parts, want[name] = pack(layer, (array.shape[0], array.shape[1]))
            tensors.update({f"{layer}.{part}": value for part, value in parts.items()})
        else:
            tensors[name] = array
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(config))
    return want
