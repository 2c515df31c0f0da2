"""What code that compiles or exports a model needs of its compressed layers, wherever they lie."""

from __future__ import annotations

from typing import Protocol

from gqsa_compiler.checkpoint.config import QuantizationConfig
from gqsa_compiler.checkpoint.layer import BSRLayer


class CompressedLayers(Protocol):
    """Compressed layers by name: a `CheckpointReader`, or layers that are converted as they come.

    Attributes
    ----------
    layer_names : tuple of str
        In natural order.
    """

    layer_names: tuple[str, ...]

    @property
    def quantization(self) -> QuantizationConfig:
        """What a checkpoint of these layers says about them."""

    def layer(self, name: str) -> BSRLayer:
        """Return one layer, checked.

        Raises
        ------
        KeyError
            There is no such layer.
        """
