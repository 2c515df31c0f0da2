"""File and tensor names of a checkpoint."""

from __future__ import annotations

import re
from typing import Any

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

OPTIONAL_TENSORS = ("qzeros", "input_rms")
LAYER_TENSORS = ("shape", "indptr", "indices", "qweight", "scales", *OPTIONAL_TENSORS)
"""The tensors of a compressed layer P are ``P.<one of these>``."""

MARKER = "weight"
"""``P.weight`` of a compressed layer P is uint8 [0]: a program that does not know the format finds
a weight of the wrong size and stops, where it would invent one that is missing."""


def layer_of(tensor: str) -> tuple[str, str] | None:
    """Split the name of a compressed layer's tensor into layer and part; None for other names."""
    layer, _, part = tensor.rpartition(".")
    return (layer, part) if layer and part in LAYER_TENSORS else None


def shard_file(number: int, total: int) -> str:
    """Return the name of shard `number` (from 1) of `total`."""
    if total == 1:
        return SINGLE_FILE
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def is_plain_shard_name(name: object) -> bool:
    """Whether `name`, from an index file, stays within its directory."""
    return isinstance(name, str) and bool(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors", name)
    )


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    parts = re.split(r"([0-9]+)", name)
    # Digits compare by length, then text: int() refuses thousands of them.
    stripped = (part.lstrip("0") for part in parts)
    return tuple((i % 2, len(t) if i % 2 else 0, t) for i, t in enumerate(stripped))


def is_tied_head(config: dict[str, Any], tensor: str) -> bool:
    """Whether `tensor` is an output head that the tied embedding of `config` stands for."""
    if config.get("tie_word_embeddings") is not True:
        return False
    owner = layer_of(tensor)
    return tensor == "lm_head.weight" or (owner is not None and owner[0] == "lm_head")
