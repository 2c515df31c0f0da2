"""One compressed linear layer, in memory, exactly as the checkpoint stores it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.bits import packed_size, unpack_codes


def symmetric_zero(bits: int) -> int:
    """Return the zero point of every group of a symmetric layer: codes mean -2^(bits-1) and up."""
    return 1 << (bits - 1)


@dataclass(frozen=True, eq=False)
class BSRLayer:
    """A linear layer's weight [N, K] as Block Sparse Row with 1 x G blocks of codes.

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
    qweight : uint8 [nnz, G * bits / 8]
        Codes, 0 to 2^bits - 1: each group is a stream of bits (`bits.pack_codes`).
    scales : float16 [nnz]
    qzeros : uint8 [ceil(nnz * bits / 8)] or None
        True zero points, 0 to 2^bits - 1: one stream of bits. None when symmetric (every zero is
        `symmetric_zero`).
    bits : int
        Bits of a code: 2, 3, 4 or 8.
    input_rms : float32 [K] or None
        How large each input is beside the others, positive: proportional to its root mean square
        on calibration text. None where nobody has measured it.
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
    input_rms: npt.NDArray[np.float32] | None = None

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
        """Bytes of the tensors that W is made of (without the 16 bytes of the shape)."""
        arrays = (self.indptr, self.indices, self.qweight, self.scales)
        return sum(a.nbytes for a in arrays) + (0 if self.qzeros is None else self.qzeros.nbytes)

    def codes(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Unpack the codes of kept groups `start` to `stop` to uint8 [stop - start, G]."""
        return unpack_codes(self.qweight[start:stop], self.bits, self.group_size)

    def zeros(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Unpack the zero points of kept groups `start` to `stop` to uint8 [stop - start]."""
        stop = self.nnz if stop is None else stop
        if self.qzeros is None:
            return np.full(stop - start, symmetric_zero(self.bits), np.uint8)
        before = start % 8  # eight zero points begin at a whole byte
        first = (start - before) * self.bits // 8
        part = self.qzeros[first : packed_size(stop, self.bits)]
        return unpack_codes(part, self.bits, stop - start + before)[before:]
