"""``com.microsoft::MatMulNBits``: its blocks are groups of a GQSA layer, and taken as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gqsa_compiler.checkpoint import BSRLayer, from_codes, symmetric_zero, unpack_codes
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.values import Array, Node
from gqsa_compiler.limits import BITS, GROUP_SIZES


@dataclass(frozen=True, eq=False)
class Decoded:
    """A layer that does not fit a checkpoint, decoded.

    Parameters
    ----------
    matrix : float32 [N, K]
    reason : str
        Why it does not fit.
    """

    matrix: Array
    reason: str


def read_matmul_nbits(node: Node) -> BSRLayer | Decoded:
    """Read a layer of blocks: ``w = (code - zero) * scale``.

    The codes are uint8 [N, blocks, block * bits / 8], the scales [N * blocks], the zero points
    packed row by row, 2^(bits - 1) where there are none.

    Parameters
    ----------
    node : Node
        Inputs A, B, scales, zero_points, g_idx, bias; attributes K, N, bits, block_size.

    Returns
    -------
    BSRLayer or Decoded
        The layer with every group that is not zero; decoded where a scale is no float16 number,
        zero points are no whole numbers, or blocks do not divide the row.

    Raises
    ------
    ModelError
        The tensors do not have the sizes that the attributes say, or columns are reordered.
    """
    k, n = (int(node.attributes.get(key, 0)) for key in ("K", "N"))
    bits, size = int(node.attributes.get("bits", 4)), int(node.attributes.get("block_size", 0))
    if n < 1 or k < 1 or size < 1 or bits not in BITS or bits == 3:
        raise ModelError(f"{node.where}: {bits} bits in blocks of {size} are not supported.")
    order = node.array(4, "g_idx")
    if order is not None and order.size:
        raise ModelError(f"{node.where}: columns in another order (g_idx) are not supported.")
    blocks = -(-k // size)
    packed, scales = node.array(1, "weights"), node.array(2, "scales")
    zeros = node.array(3, "zero points")
    if packed is None or packed.dtype != np.uint8 or packed.size != n * blocks * size * bits // 8:
        raise ModelError(f"{node.where}: its weights are not [{n}, {blocks}, {size * bits // 8}].")
    if scales is None or scales.size != n * blocks:
        raise ModelError(f"{node.where}: it has not {n * blocks} scales.")
    codes = unpack_codes(packed.reshape(n * blocks, -1), bits, size).reshape(n, blocks, size)
    points = _points(node, zeros, n, blocks, bits)
    scales = scales.reshape(n, blocks)
    name = node.names[1].removesuffix(".weight").removesuffix(".qweight")
    reason = _misfit(k, size, scales, points)
    if reason is not None:
        values = codes.astype(np.float32) - points[..., None].astype(np.float32)
        values *= scales[..., None].astype(np.float32)
        return Decoded(np.ascontiguousarray(values.reshape(n, -1)[:, :k]), reason)
    keep = (codes != points[..., None]).any(axis=2) & (scales != 0)
    whole = points.astype(np.uint8)
    stored = None if (whole == symmetric_zero(bits)).all() else whole
    # A negative scale turns the codes around; a checkpoint takes it as it is.
    return from_codes(name, (n, k), size, keep, codes, scales, stored, bits)


def _points(node: Node, zeros: Array | None, n: int, blocks: int, bits: int) -> Array:
    if zeros is None or not zeros.size:
        return np.full((n, blocks), symmetric_zero(bits), np.uint8)
    if zeros.dtype != np.uint8:
        if zeros.size != n * blocks:
            raise ModelError(f"{node.where}: it has not {n * blocks} zero points.")
        return zeros.reshape(n, blocks)
    width = -(-blocks * bits // 8)
    if zeros.size != n * width:
        raise ModelError(f"{node.where}: its zero points are not [{n}, {width}].")
    return unpack_codes(zeros.reshape(n, width), bits, width * 8 // bits)[:, :blocks]


def _misfit(k: int, size: int, scales: Array, points: Array) -> str | None:
    """Say why a layer of blocks is no layer of a checkpoint; None if it is one."""
    if k % size or size not in GROUP_SIZES:
        return f"blocks of {size} do not make groups of {k} columns"
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales.astype(np.float32)):
        return "its scales have more digits than float16"
    if not np.array_equal(points, points.astype(np.uint8)):
        return "its zero points are not whole numbers"
    return None
