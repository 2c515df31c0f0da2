"""Between BSRLayer and plain matrices. Nothing here knows a target's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.bits import pack_codes
from gqsa_compiler.checkpoint.layer import BSRLayer, symmetric_zero
from gqsa_compiler.checkpoint.validate import MAX_INDEX, validate_layer
from gqsa_compiler.errors import CheckpointError
from gqsa_compiler.limits import BITS

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix

_CHUNK_VALUES = 1 << 22
"""Weights decoded at a time: bounds temporaries to some tens of megabytes."""


def decode_groups(layer: BSRLayer, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Decode kept groups `start` to `stop` to float32 [stop - start, G].

    ``(code - zero) * scale`` is exact in float32: a difference has at most 9 bits, a scale 11.
    """
    stop = layer.nnz if stop is None else stop
    values = layer.codes(start, stop).astype(np.float32)
    values -= layer.zeros(start, stop)[:, None]
    values *= layer.scales[start:stop, None].astype(np.float32)
    return values


def to_dense(layer: BSRLayer) -> npt.NDArray[np.float32]:
    """Decode a layer to float32 [N, K], exactly; absent groups are 0."""
    n, k = layer.shape
    dense = np.zeros((n, k // layer.group_size, layer.group_size), np.float32)
    step = max(1, _CHUNK_VALUES // layer.group_size)
    for start in range(0, layer.nnz, step):
        stop = min(layer.nnz, start + step)
        rows = np.searchsorted(layer.indptr, np.arange(start, stop), side="right") - 1
        dense[rows, layer.indices[start:stop]] = decode_groups(layer, start, stop)
    return dense.reshape(n, k)


def to_scipy(layer: BSRLayer) -> bsr_matrix:
    """Decode a layer to a `scipy.sparse.bsr_matrix` of float32 with blocks (1, G)."""
    from scipy.sparse import bsr_matrix

    data = decode_groups(layer)[:, None, :]
    indices, indptr = layer.indices.astype(np.int32), layer.indptr.copy()
    return bsr_matrix((data, indices, indptr), shape=layer.shape, blocksize=(1, layer.group_size))


def from_codes(
    name: str,
    shape: tuple[int, int],
    group_size: int,
    keep_mask: npt.NDArray[np.bool_],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[Any],
    zeros: npt.NDArray[np.uint8] | None,
    bits: int = 4,
) -> BSRLayer:
    """Build a layer from codes that somebody else quantised; nothing is rounded but the scales.

    Parameters
    ----------
    name : str
        The layer's module path.
    shape : tuple of int
        (N, K).
    group_size : int
        G.
    keep_mask : bool [N, K/G]
        Groups to keep.
    codes : uint8 [N, K/G, G]
        0 to 2^bits - 1; those of dropped groups are not read.
    scales : float [N, K/G]
        Rounded to float16 if they are not: quantise with rounded scales, or the codes do not fit.
    zeros : uint8 [N, K/G] or None
        Zero points 0 to 2^bits - 1; None for a symmetric layer (zero is 2^(bits - 1)).
    bits : int
        Bits of a code: 2, 3, 4 or 8.

    Raises
    ------
    CheckpointError
        There are no codes of so many bits, shapes do not agree, a code or zero point does not fit,
        a scale is not finite in float16, or all scales become 0 in it.
    """
    _check_bits(name, bits)
    n, k = shape
    if group_size < 1 or k % group_size:
        raise CheckpointError(f"Layer {name!r}: group size {group_size} does not divide K = {k}.")
    columns = k // group_size
    wanted = {"keep_mask": (n, columns), "codes": (n, columns, group_size), "scales": (n, columns)}
    given = {"keep_mask": keep_mask.shape, "codes": codes.shape, "scales": scales.shape}
    if zeros is not None:
        wanted["zeros"], given["zeros"] = (n, columns), zeros.shape
    for what, size in wanted.items():
        if given[what] != size:
            raise CheckpointError(
                f"Layer {name!r}: {what} has shape {list(given[what])}, not {list(size)}."
            )
    keep = keep_mask.astype(bool, copy=False)
    if np.count_nonzero(keep) > MAX_INDEX:
        raise CheckpointError(f"Layer {name!r} has more than 2^31 - 1 groups.")
    indptr = np.zeros(n + 1, np.int32)
    np.cumsum(keep.sum(axis=1), out=indptr[1:])
    kept_codes = _packed(name, "code", codes[keep], bits)
    kept_zeros = None if zeros is None else _packed(name, "zero point", zeros[keep], bits)
    with np.errstate(over="ignore"):  # an infinity is what validate_layer reports
        kept_scales = scales[keep].astype(np.float16)
    if not kept_scales.any() and scales[keep].any():
        raise CheckpointError(f"Layer {name!r} has only scales that float16 rounds to 0.")
    layer = BSRLayer(
        name=name,
        shape=(n, k),
        group_size=group_size,
        indptr=indptr,
        indices=np.nonzero(keep)[1].astype(np.uint16),
        qweight=kept_codes,
        scales=kept_scales,
        qzeros=kept_zeros,
        bits=bits,
    )
    validate_layer(layer)
    return layer


def from_dense(
    name: str,
    weight: npt.NDArray[Any],
    group_size: int,
    keep_mask: npt.NDArray[np.bool_] | None = None,
    *,
    symmetric: bool = False,
    bits: int = 4,
) -> BSRLayer:
    """Build a layer from a dense matrix by plain rounding to nearest.

    A baseline without any calibration; `gqsa compress` does much better.

    Parameters
    ----------
    name : str
        The layer's module path.
    weight : float [N, K]
        Finite.
    group_size : int
        G, divides K.
    keep_mask : bool [N, K/G], optional
        Groups to keep; all of them by default.
    symmetric : bool
        Fix the zero point at 2^(bits - 1) and store none.
    bits : int
        Bits of a code: 2, 3, 4 or 8.

    Raises
    ------
    CheckpointError
        G does not divide K, there are no codes of so many bits, a weight is not finite, a group's
        scale overflows float16, or all weights are so small that they become 0.
    """
    n, k = weight.shape
    if group_size < 1 or k % group_size:
        raise CheckpointError(f"Layer {name!r}: group size {group_size} does not divide K = {k}.")
    _check_bits(name, bits)
    groups = np.asarray(weight, dtype=np.float32).reshape(n, k // group_size, group_size)
    if not np.isfinite(groups).all():
        raise CheckpointError(f"Layer {name!r} holds a weight that is not finite.")
    keep = np.ones(groups.shape[:2], bool) if keep_mask is None else keep_mask
    top, middle = (1 << bits) - 1, symmetric_zero(bits)
    low = np.minimum(groups.min(axis=2), 0.0)
    high = np.maximum(groups.max(axis=2), 0.0)
    wide = high / top - low / top
    if symmetric:
        # Codes reach further down than up (-8 and 7): the larger of the two needs decides.
        wide = np.maximum(-low / middle, high / (top - middle))
    with np.errstate(over="ignore"):
        scales = wide.astype(np.float16)
    # A scale of 0 could not be divided by. Beside larger groups the smallest float16 loses nothing.
    least = np.finfo(np.float16).smallest_subnormal
    scales = np.maximum(scales, least)
    if 0 < np.abs(groups[keep]).max(initial=0.0) <= float(least) / 2:
        raise CheckpointError(f"Layer {name!r} holds weights too small for a float16 scale.")
    if not np.isfinite(scales[keep]).all():
        raise CheckpointError(f"Layer {name!r} holds weights too large for a float16 scale.")
    steps = np.where(np.isfinite(scales), scales, 1).astype(np.float32)
    if symmetric:
        zeros = np.full(scales.shape, middle, np.uint8)
    else:
        zeros = np.clip(np.rint(-low / steps), 0, top).astype(np.uint8)
    codes = np.rint(groups / steps[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, top).astype(np.uint8)
    stored = None if symmetric else zeros
    return from_codes(name, (n, k), group_size, keep, codes, scales, stored, bits)


def _check_bits(name: str, bits: int) -> None:
    if bits not in BITS:
        raise CheckpointError(
            f"Layer {name!r} cannot have codes of {bits} bits; they have "
            f"{', '.join(map(str, BITS))}."
        )


def _packed(name: str, what: str, values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    top = (1 << bits) - 1
    if values.size and (values.min() < 0 or values.max() > top):
        raise CheckpointError(f"Layer {name!r} has a {what} outside 0 to {top}.")
    return pack_codes(values.astype(np.uint8, copy=False), bits)
