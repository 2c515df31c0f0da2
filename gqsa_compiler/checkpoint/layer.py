"""One compressed linear layer, in memory, exactly as the checkpoint stores it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SYMMETRIC_ZERO = 8
"""The zero point of every group of a symmetric layer (codes 0..15 mean -8..7)."""


@dataclass(frozen=True, eq=False)
class BSRLayer:
    """A linear layer's weight [N, K] as Block Sparse Row with 1 x G blocks of 4-bit codes.

    A weight is ``(code - zero) * scale``; the weights of a group that is absent are 0.

    Parameters
    ----------
    name : str
        The layer's module path in the model, e.g. ``model.layers.0.self_attn.q_proj``.
    shape : tuple of int
        (N, K): output and input features.
    group_size : int
        G, the number of consecutive input features of a group; divides K.
    indptr : int32 [N + 1]
        Row r's groups are ``indptr[r]:indptr[r + 1]``.
    indices : uint16 [nnz]
        Column group (0 .. K/G - 1) of each kept group, strictly increasing within a row.
    qweight : uint8 [nnz, G / 2]
        Codes: element 2i in the low nibble of byte i, element 2i + 1 in the high one.
    scales : float16 [nnz]
    qzeros : uint8 [ceil(nnz / 2)] or None
        True zero points, group 2i in the low nibble of byte i; None when symmetric
        (every zero is `SYMMETRIC_ZERO`).
    bits : int
        Bits a code; 4.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.uint16]
    qweight: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    qzeros: npt.NDArray[np.uint8] | None
    bits: int = 4

    @property
    def nnz(self) -> int:
        """Number of kept groups."""
        return int(self.indices.shape[0])

    @property
    def symmetric(self) -> bool:
        """Whether the layer stores no zero points."""
        return self.qzeros is None

    @property
    def sparsity(self) -> float:
        """Share of groups that are absent, 0 to 1."""
        n, k = self.shape
        total = n * (k // self.group_size)
        return 1.0 - self.nnz / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (without the 16 bytes of the shape)."""
        arrays = (self.indptr, self.indices, self.qweight, self.scales)
        return sum(a.nbytes for a in arrays) + (0 if self.qzeros is None else self.qzeros.nbytes)

    def codes(self) -> npt.NDArray[np.uint8]:
        """Unpack the 4-bit codes to uint8 [nnz, G]."""
        return np.stack([self.qweight & 0xF, self.qweight >> 4], axis=-1).reshape(
            self.nnz, self.group_size
        )

    def zeros(self) -> npt.NDArray[np.uint8]:
        """Unpack the zero points to uint8 [nnz]."""
        if self.qzeros is None:
            return np.full(self.nnz, SYMMETRIC_ZERO, np.uint8)
        return np.stack([self.qzeros & 0xF, self.qzeros >> 4], axis=-1).reshape(-1)[: self.nnz]
