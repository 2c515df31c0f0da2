"""What every reader of another quantiser's layers gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import LayerScheme, unpack_codes
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.codes import Codes, regroup, scheme_of
from gqsa_compiler.limits import BITS


class Tensors(Protocol):
    """The stored tensors of a model, by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and its dtype as safetensors writes it."""

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor."""


class LayerFormat(ABC):
    """The quantised layers of a stored model, in one quantiser's format.

    Parameters
    ----------
    tensors : Tensors
    where : str
        The model, for messages.

    Attributes
    ----------
    kind : str
        The format's name, e.g. ``GPTQ``.
    """

    kind: str

    def __init__(self, tensors: Tensors, where: str) -> None:
        self.tensors = tensors
        self.where = where

    @cached_property
    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """The stored module paths of the quantised layers."""

    @abstractmethod
    def parts(self, layer: str) -> frozenset[str]:
        """Name all tensors that make up a layer, those that may be absent too."""

    @abstractmethod
    def shape(self, layer: str) -> tuple[int, int]:
        """Return N and K; the tensors' shapes are checked against each other."""

    @abstractmethod
    def bits(self, layer: str) -> int:
        """Return the bits of a code."""

    @abstractmethod
    def scales(self, layer: str) -> npt.NDArray[Any]:
        """Read the scales, [N, C]."""

    @abstractmethod
    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """Read the zero points, uint8 [N, C]; None when the layer is symmetric."""

    @abstractmethod
    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """Read the codes, uint8 [N, K]."""

    @abstractmethod
    def groups(self, layer: str) -> int:
        """Return C, the groups of a row."""

    def columns(self, layer: str) -> npt.NDArray[Any] | None:
        """Read the group of each column, [K]; None when groups are runs of columns."""
        return None

    def scheme(self, layer: str) -> LayerScheme:
        """Return the scheme that the layer gets in a GQSA checkpoint, without reading its codes.

        Raises
        ------
        Misfit
            Its groups fit none.
        """
        count, columns = self.groups(layer), self.columns(layer)
        size, _ = regroup(self.shape(layer)[1], count, columns, layer, self.where)
        return scheme_of(self.bits(layer), size, self.zeros(layer))

    def matrix(self, layer: str) -> Codes:
        """Read a layer.

        Raises
        ------
        ModelError
            It is malformed.
        """
        n, k = self.shape(layer)
        found = Codes(
            self.codes(layer),
            self.scales(layer),
            self.zeros(layer),
            self.bits(layer),
            self.columns(layer),
        )
        count = self.groups(layer)
        if found.codes.shape != (n, k) or found.scales.shape != (n, count):
            raise self.error(layer, "has codes and scales of different sizes")
        if found.zeros is not None and found.zeros.shape != (n, count):
            raise self.error(layer, "has scales and zero points of different sizes")
        return found

    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""
        return name in self._names

    def named(self, part: str) -> tuple[str, ...]:
        """List the module paths P for which ``P.<part>`` is stored."""
        return tuple(
            name.removesuffix(f".{part}")
            for name in self.tensors.names
            if name.endswith(f".{part}")
        )

    def size(self, layer: str, part: str, dtypes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Return a part's shape.

        Raises
        ------
        ModelError
            It is missing, or of another dtype or rank, or empty.
        """
        name = f"{layer}.{part}"
        if not self.has(name):
            raise ModelError(f"{self.where} lacks the tensor {name!r} of a {self.kind} layer.")
        shape, dtype = self.tensors.shape_dtype(name)
        if dtype not in dtypes or len(shape) != rank or 0 in shape:
            raise ModelError(
                f"{self.where}: {name} is {dtype} {list(shape)}, not a {self.kind} layer's "
                f"{' or '.join(dtypes)} of rank {rank}."
            )
        return shape

    def error(self, layer: str, what: str) -> ModelError:
        """Build the error for a layer."""
        return ModelError(f"{self.where}: the {self.kind} layer {layer!r} {what}.")

    def check_bits(self, layer: str, bits: int) -> int:
        """Return `bits` if a GQSA checkpoint can have them; raises ModelError otherwise."""
        if bits not in BITS:
            wanted = ", ".join(map(str, BITS))
            raise self.error(layer, f"has codes of {bits} bits; a GQSA checkpoint has {wanted}")
        return bits

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tensors.names)


class ColumnFormat(LayerFormat):
    """What GPTQ and AWQ share: ``qweight`` and ``scales`` [C, N], a column for every output."""

    optional: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """See `LayerFormat.layers`."""
        return self.named("qweight")

    def parts(self, layer: str) -> frozenset[str]:
        """See `LayerFormat.parts`."""
        names = ("qweight", "qzeros", "scales", *self.optional)
        return frozenset(f"{layer}.{name}" for name in names)

    def groups(self, layer: str) -> int:
        """See `LayerFormat.groups`."""
        return self.size(layer, "scales", FLOATS, 2)[0]

    def scales(self, layer: str) -> npt.NDArray[Any]:
        """See `LayerFormat.scales`."""
        return self.tensors.read(f"{layer}.scales").T


FLOATS = ("F16", "BF16", "F32")
"""What scales may be stored as."""


def unpack_rows(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Unpack int32 [R, W], each row a stream of bits, lowest first, to uint8 [R, count]."""
    stream = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    return unpack_codes(stream, bits, count)


def unpack_columns(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Unpack int32 [W, C], each column a stream of bits, to uint8 [C, count]."""
    return unpack_rows(words.T, bits, count)
