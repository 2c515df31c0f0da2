"""A quantised matrix of any origin, unpacked, and what it becomes: a layer, or a dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, LayerScheme, from_codes, symmetric_zero
from gqsa_compiler.errors import ModelError
from gqsa_compiler.limits import GROUP_SIZES


class Misfit(ModelError):
    """A layer that a GQSA checkpoint cannot hold without rounding it."""


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix whose weights are ``(code - zero) * scale``, C groups of columns a row.

    Parameters
    ----------
    codes : uint8 [N, K]
        0 to 2^bits - 1.
    scales : float16, bfloat16 or float32 [N, C]
    zeros : uint8 [N, C] or None
        Zero points, 0 to 2^bits - 1; None when every one is 2^(bits - 1).
    bits : int
    columns : integer [K] or None
        The group of each column; None when they are C runs of equal length.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.uint8] | None
    bits: int
    columns: npt.NDArray[Any] | None = None

    def layer(self, name: str, where: str) -> BSRLayer:
        """Return the layer of exactly these weights; groups that are all zero are left out.

        Parameters
        ----------
        name : str
            The layer's module path.
        where : str
            The model, for messages.

        Raises
        ------
        Misfit
            Its groups are not runs of 8 columns or more, or a scale is no float16.
        """
        n, k = self.codes.shape
        size, group = regroup(k, self.scales.shape[1], self.columns, name, where)
        middle = symmetric_zero(self.bits)
        zeros = None if self.zeros is None or (self.zeros == middle).all() else self.zeros
        codes = self.codes.reshape(n, k // size, size)
        wide = np.full((n, len(group)), middle, np.uint8) if zeros is None else zeros[:, group]
        scales = self.scales[:, group]
        keep = (codes != wide[:, :, None]).any(axis=2) & (scales != 0)
        half = exact_half(scales, keep, name, where)
        stored = None if zeros is None else wide
        return from_codes(name, (n, k), size, keep, codes, half, stored, self.bits)

    def dense(self) -> npt.NDArray[np.float32]:
        """Return float32 [N, K], each product rounded once where float32 does not hold it."""
        k = self.codes.shape[1]
        group = runs(k, self.scales.shape[1]) if self.columns is None else self.columns
        middle = symmetric_zero(self.bits)
        zeros = np.float32(middle) if self.zeros is None else self.zeros[:, group]
        weights = self.codes.astype(np.float32) - zeros
        weights *= self.scales[:, group].astype(np.float32)
        return weights


def runs(k: int, count: int) -> npt.NDArray[np.int64]:
    """Return the group of each of `k` columns in `count` runs of equal length."""
    return np.arange(k) * count // k


def regroup(
    k: int, count: int, columns: npt.NDArray[Any] | None, name: str, where: str
) -> tuple[int, npt.NDArray[np.int64]]:
    """Find the largest group size of ours whose groups each lie in one group of theirs.

    Parameters
    ----------
    k, count : int
        Columns, and groups of a row.
    columns : integer [k] or None
        The group of each column, 0 to count - 1; None when they are runs.
    name, where : str
        The layer and the model, for messages.

    Returns
    -------
    size : int
    group : int64 [k / size]
        Which of theirs each of ours takes its scale and zero point from.

    Raises
    ------
    Misfit
        There is none.
    """
    if columns is None and k % count:
        raise Misfit(
            f"{where}: layer {name!r} has {count} groups in {k} columns, so that they cannot be of "
            "one size; quantise the model with a group size that divides its columns."
        )
    given = runs(k, count) if columns is None else columns.astype(np.int64)
    for size in sorted(GROUP_SIZES, reverse=True):
        if k % size == 0:
            blocks = given.reshape(-1, size)
            if (blocks == blocks[:, :1]).all():
                return size, blocks[:, 0]
    if columns is not None and (np.diff(given) < 0).any():
        raise Misfit(
            f"{where}: the columns of a group of layer {name!r} are scattered (activation order, "
            "desc_act), and a GQSA checkpoint has groups of neighbours; quantise the model without "
            "desc_act, or with static groups."
        )
    raise Misfit(
        f"{where}: layer {name!r} has groups of {k // count} of its {k} columns, which groups "
        f"of {min(GROUP_SIZES)} do not divide."
    )


def exact_half(
    scales: npt.NDArray[Any], keep: npt.NDArray[np.bool_], name: str, where: str
) -> npt.NDArray[np.float16]:
    """Return the scales as float16; those that `keep` does not name are not looked at.

    Raises
    ------
    ModelError
        One is not finite.
    Misfit
        One is not a float16: too small, too large, or with more digits.
    """
    wide = scales.astype(np.float32)
    if not np.isfinite(wide[keep]).all():
        raise ModelError(
            f"{where}: layer {name!r} has scales that are not finite numbers; download it again."
        )
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    wrong = keep & ~((half.astype(np.float32) == wide) & np.isfinite(half))
    if wrong.any():
        raise Misfit(
            f"{where}: {int(wrong.sum())} of {wrong.size} scales of layer {name!r} "
            f"({scales.dtype}, e.g. {float(wide[wrong][0]):.6g}) are no float16 numbers, which a "
            "GQSA checkpoint has; compress the original model instead (gqsa compress)."
        )
    return np.where(keep, half, np.float16(1)).astype(np.float16)


def scheme_of(bits: int, size: int, zeros: npt.NDArray[np.uint8] | None) -> LayerScheme:
    """Return the scheme that `Codes.layer` gives a layer of these bits and zero points."""
    symmetric = zeros is None or bool((zeros == symmetric_zero(bits)).all())
    return LayerScheme(bits, size, symmetric, 0.0)
