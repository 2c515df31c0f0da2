"""Which quantiser's layers a directory holds, from its settings and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.json_file import read_json
from gqsa_compiler.frontends.quantised.awq import AWQFormat, awq_group_size
from gqsa_compiler.frontends.quantised.bitmask import BitmaskTensors
from gqsa_compiler.frontends.quantised.compressed_tensors import (
    IntegerFormat,
    PackedFormat,
    weight_bits,
)
from gqsa_compiler.frontends.quantised.gptq import GPTQFormat, GPTQSettings
from gqsa_compiler.frontends.quantised.layer_format import LayerFormat, Tensors
from gqsa_compiler.frontends.quantised.marlin24 import Marlin24Format
from gqsa_compiler.frontends.quantised.promised import promised

Found = tuple[Tensors, tuple[LayerFormat, ...]]
_SETTINGS_FILES = ("quantize_config.json", "quant_config.json")


def recognise(kind: str, directory: Path, config: Mapping[str, Any], stored: Tensors) -> Found:
    """Choose the readers of a quantised directory.

    Parameters
    ----------
    kind : str
        What `detect` calls it: a key of `READERS`.
    directory : Path
    config : mapping
        The parsed ``config.json``.
    stored : Tensors

    Returns
    -------
    tensors : Tensors
        What all tensors are to be read from; sparse ones are shown dense.
    formats : tuple of LayerFormat
        The quantised layers; none in a model that is sparse and not quantised.

    Raises
    ------
    ModelError
        The settings are missing or say something that is not read, or none of the layers is there.
    """
    where = str(directory)
    tensors, formats = READERS[kind](settings(directory, config), stored, where)
    plain_sparse = isinstance(tensors, BitmaskTensors)
    if not any(found.layers for found in formats) and not plain_sparse:
        raise ModelError(
            f"{where} is marked as quantised by {kind}, but it has no quantised layer; copy or "
            "download it again."
        )
    return tensors, formats


def settings(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a directory says of its quantisation; {} if it says nothing."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, dict):
            nested = found.get("quantization_config")  # compressed-tensors' oldest way
            return {**found, **nested} if isinstance(nested, dict) else dict(found)
    for name in _SETTINGS_FILES:
        if (directory / name).is_file():
            return read_json(directory / name)
    return {}


def _gptq(fields: dict[str, Any], stored: Tensors, where: str) -> Found:
    if not fields:
        raise ModelError(
            f"{where} has GPTQ's tensors, but nothing says whether its zero points are stored "
            "minus one; add a quantize_config.json with bits, group_size and checkpoint_format "
            "('gptq': minus one; 'gptq_v2': as they are, e.g. from EfficientQAT)."
        )
    return stored, (GPTQFormat(stored, where, GPTQSettings.read(fields, where)),)


def _awq(fields: dict[str, Any], stored: Tensors, where: str) -> Found:
    return stored, (AWQFormat(stored, where, awq_group_size(fields, where)),)


def _compressed_tensors(fields: dict[str, Any], stored: Tensors, where: str) -> Found:
    bits = weight_bits(fields, where)
    all_have = promised(fields, where)
    tensors: Tensors = stored
    if any(name.endswith(".bitmask") for name in stored.names):
        tensors = BitmaskTensors(stored, where)
    return tensors, (
        PackedFormat(tensors, where, bits, all_have),
        IntegerFormat(tensors, where, bits, all_have),
        Marlin24Format(tensors, where, all_have),
    )


READERS: Mapping[str, Callable[[dict[str, Any], Tensors, str], Found]] = {
    "GPTQ": _gptq,
    "AWQ": _awq,
    "compressed-tensors": _compressed_tensors,
}
"""The quantisers whose checkpoints are read, by the names that `detect` gives them."""
