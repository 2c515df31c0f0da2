"""`quantization_config` as transformers holds it."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from gqsa_compiler.checkpoint.config import QUANT_METHOD, QuantizationConfig


class GQSAConfig(QuantizationConfigMixin):
    """What config.json says about a GQSA checkpoint, read as strictly as our own reader does.

    Parameters
    ----------
    **fields : Any
        The JSON object of docs/format.md, section 3.

    Raises
    ------
    CheckpointError
        A field is missing, unknown or impossible.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.quantization = QuantizationConfig.from_dict({"quant_method": QUANT_METHOD, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return self.quantization.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the JSON object, whole: no field of it has a default."""
        return self.to_dict()
