"""The matrices of a GGUF file whose codes a GQSA checkpoint can hold."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.gguf import GGUFSource
from gqsa_compiler.frontends.quantised.blocks import BLOCK, BLOCK_BITS, read_blocks
from gqsa_compiler.frontends.quantised.codes import Codes, Misfit
from gqsa_compiler.frontends.quantised.layer_format import LayerFormat
from gqsa_compiler.frontends.quantised.source import QuantisedLayers

_FLOATS = ("F32", "F16", "BF16")
HEAD = "lm_head"


class GGUFFormat(LayerFormat):
    """The linear layers of a GGUF file that are stored in blocks, by transformers' names.

    Parameters
    ----------
    source : GGUFSource
    """

    kind = "GGUF"

    def __init__(self, source: GGUFSource) -> None:
        self._source = source
        self.where = str(source.path)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Linear layers in any quantised type; an output head only in one that is read."""
        found = []
        for name in self._source.tensor_names():
            layer = name.removesuffix(".weight")
            if layer == name or len(self._source.shape(name)) != 2 or "embed" in layer:
                continue
            kind = self._source.stored_type(name)
            if kind in BLOCK_BITS or (kind not in _FLOATS and layer != HEAD):
                found.append(layer)
        return tuple(found)

    def parts(self, layer: str) -> frozenset[str]:
        """See `LayerFormat.parts`."""
        return frozenset({f"{layer}.weight"})

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        n, k = self._source.shape(f"{layer}.weight")
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        return BLOCK_BITS[self._type(layer)]

    def groups(self, layer: str) -> int:
        """See `LayerFormat.groups`."""
        return self.shape(layer)[1] // BLOCK

    def scales(self, layer: str) -> npt.NDArray[Any]:
        """See `LayerFormat.scales`."""
        return self.matrix(layer).scales

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`."""
        # Only Q4_1 has any, and there the blocks have to be read for them.
        return None if self._type(layer) != "Q4_1" else self.matrix(layer).zeros

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`."""
        return self.matrix(layer).codes

    def matrix(self, layer: str) -> Codes:
        """See `LayerFormat.matrix`."""
        name = f"{layer}.weight"
        found = read_blocks(self._source.stored_bytes(name), self._type(layer), name, self.where)
        zeros = None if found.zeros is None else self._source.in_order(name, found.zeros)
        return Codes(
            self._source.in_order(name, found.codes),
            self._source.in_order(name, found.scales),
            zeros,
            found.bits,
        )

    def _type(self, layer: str) -> str:
        kind = self._source.stored_type(f"{layer}.weight")
        if kind not in BLOCK_BITS:
            raise Misfit(
                f"{self.where}: {layer}.weight is stored as {kind}, whose scales are no float16 "
                f"numbers; gqsa takes over {', '.join(BLOCK_BITS)}. Compress the model instead "
                "(gqsa compress)."
            )
        return kind


class GGUFLayers(QuantisedLayers):
    """The quantised layers of a GGUF file.

    Parameters
    ----------
    source : GGUFSource

    Raises
    ------
    ModelError
        There are none.
    """

    def __init__(self, source: GGUFSource) -> None:
        found = GGUFFormat(source)
        if not any(source.stored_type(f"{n}.weight") in BLOCK_BITS for n in found.layers):
            raise ModelError(
                f"{source.path} has no layer stored as {', '.join(BLOCK_BITS)}, which are the "
                "types that can be taken over; compress it instead (gqsa compress)."
            )
        layers = {name: (found, name) for name in found.layers}
        taken = {f"{name}.weight" for name in layers}
        matrices = [
            name
            for name in source.tensor_names()
            if name not in taken and name.endswith(".weight") and len(source.shape(name)) == 2
        ]
        super().__init__(str(source.path), layers, matrices)
