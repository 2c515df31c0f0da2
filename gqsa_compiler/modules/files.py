"""The files of a module checkpoint, and what counts as a module (no heavy imports)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import CheckpointError

GRAPH_FILE = "model.onnx"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "gqsa_module"
"""What `model_type` says in config.json of a module checkpoint."""
MODULE_VERSION = 1
_MOST_BYTES = 100_000_000


def is_module(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an ONNX file, or a directory with a module checkpoint."""
    place = Path(path)
    if place.suffix == ".onnx":
        return place.is_file()
    try:
        # Of whatever version: `read_config` says what is wrong with another one.
        return (place / GRAPH_FILE).is_file() and _read(place).get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a module checkpoint.

    Raises
    ------
    CheckpointError
        It is missing, too large or no JSON object, or of another version.
    """
    config = _read(directory)
    version = config.get("module_version")
    if type(version) is not int or version != MODULE_VERSION:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} has module_version {version!r}; this program reads "
            f"{MODULE_VERSION}. Use the version of gqsa-compiler that wrote it, or compress the "
            "module again."
        )
    return config


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold one JSON object.")
    return data
