"""The GQSA checkpoint format (docs/format.md): read, write, validate, convert."""

from gqsa_compiler.checkpoint.config import FORMAT_VERSION, LayerScheme, QuantizationConfig
from gqsa_compiler.checkpoint.convert import (
    decode_groups,
    from_codes,
    from_dense,
    pack_nibbles,
    to_dense,
    to_scipy,
)
from gqsa_compiler.checkpoint.layer import SYMMETRIC_ZERO, BSRLayer
from gqsa_compiler.checkpoint.reader import CheckpointReader, is_checkpoint
from gqsa_compiler.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from gqsa_compiler.checkpoint.validate import validate, validate_layer
from gqsa_compiler.checkpoint.writer import CheckpointWriter

__all__ = [
    "FORMAT_VERSION",
    "SYMMETRIC_ZERO",
    "BSRLayer",
    "CheckpointReader",
    "CheckpointWriter",
    "LayerScheme",
    "QuantizationConfig",
    "SafetensorsFile",
    "TensorInfo",
    "decode_groups",
    "from_codes",
    "from_dense",
    "is_checkpoint",
    "pack_nibbles",
    "to_dense",
    "to_scipy",
    "validate",
    "validate_layer",
]
