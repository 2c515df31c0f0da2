"""The GQSA checkpoint format (docs/format.md): read, write, validate, convert."""

from gqsa_compiler.checkpoint.bits import pack_codes, unpack_codes
from gqsa_compiler.checkpoint.compressed_layers import CompressedLayers
from gqsa_compiler.checkpoint.config import FORMAT_VERSION, LayerScheme, QuantizationConfig
from gqsa_compiler.checkpoint.convert import (
    decode_groups,
    from_codes,
    from_dense,
    to_dense,
    to_scipy,
)
from gqsa_compiler.checkpoint.layer import BSRLayer, symmetric_zero
from gqsa_compiler.checkpoint.reader import CheckpointReader, is_checkpoint
from gqsa_compiler.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from gqsa_compiler.checkpoint.validate import validate, validate_layer
from gqsa_compiler.checkpoint.writer import CheckpointWriter

__all__ = [
    "FORMAT_VERSION",
    "BSRLayer",
    "CheckpointReader",
    "CheckpointWriter",
    "CompressedLayers",
    "LayerScheme",
    "QuantizationConfig",
    "SafetensorsFile",
    "TensorInfo",
    "decode_groups",
    "from_codes",
    "from_dense",
    "is_checkpoint",
    "pack_codes",
    "symmetric_zero",
    "to_dense",
    "to_scipy",
    "unpack_codes",
    "validate",
    "validate_layer",
]
