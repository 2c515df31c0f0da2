"""What lies in a GQSA checkpoint or a compiled artefact, as plain data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from gqsa_compiler.errors import ArtefactError, ModelError, UsageError
from gqsa_compiler.runtime.library import choose
from gqsa_compiler.runtime.manifest import (
    MANIFEST_FILE,
    MODULE_FORMAT,
    Manifest,
    is_artefact,
    read_document,
)
from gqsa_compiler.runtime.module_manifest import ModuleManifest


def inspect_path(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint or an artefact.

    Parameters
    ----------
    path : str or Path
        Its directory.

    Returns
    -------
    dict
        An artefact's manifest, or what `inspect_checkpoint` says.

    Raises
    ------
    UsageError
        There is nothing at the path.
    ModelError
        What is there is neither, or a checkpoint that is not a whole model.
    CheckpointError, ArtefactError
        It is damaged.
    """
    from gqsa_compiler.checkpoint import is_checkpoint
    from gqsa_compiler.checkpoint.names import CONFIG_FILE
    from gqsa_compiler.checkpoint.safetensors_file import read_json_object

    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist.")
    if is_artefact(path):
        return _manifest(path).to_dict()
    if path.is_dir():
        if is_checkpoint(path):
            found = inspect_checkpoint(path)
            if not (path / "model.onnx").is_file():  # a module's graph is its own description
                _check_complete(path)
            return found
        config = path / CONFIG_FILE
        if config.exists():
            read_json_object(config.read_bytes(), str(config))  # damaged: it says what is wrong
    raise ModelError(
        f"{path} is neither a GQSA checkpoint nor a compiled artefact; "
        "make a checkpoint of a dense model with: gqsa compress MODEL -o DIR"
    )


def variant_here(path: str | Path) -> str | None:
    """Name the variant of an artefact that this machine runs; None if it can run none."""
    try:
        # It reads the variants, which both kinds of manifest have.
        return choose(cast(Any, _manifest(path))).target.name
    except ArtefactError:
        return None


def _manifest(path: str | Path) -> Manifest | ModuleManifest:
    """Read the manifest of a language model or of a module."""
    data, where = read_document(path), str(Path(path) / MANIFEST_FILE)
    if isinstance(data, dict) and data.get("format") == MODULE_FORMAT:
        return ModuleManifest.from_dict(data, where)
    return Manifest.from_dict(data, where)


def _check_complete(path: Path) -> None:
    """Check that a checkpoint has the tensors that its configuration asks for, as compile does."""
    from gqsa_compiler.frontends.fit import check_tensors
    from gqsa_compiler.frontends.resolve import resolve
    from gqsa_compiler.models.registry import parse_config

    source = resolve(str(path))
    check_tensors(source, parse_config(source.config, str(path)))


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Check a checkpoint's layers, all of them, and describe them.

    Returns
    -------
    dict
        ``layers``, each with ``name``, ``n``, ``k``, ``bits``, ``group_size``, ``sparsity`` (the
        dropped share of the layer's groups) and ``bytes`` (of its tensors in the file);
        ``bits_per_weight`` (bits stored in all layers over the N * K weights they stand for);
        ``compressed_bytes``, ``uncompressed_bytes``; ``quantization_config``.

    Raises
    ------
    CheckpointError
        A layer breaks a rule of docs/format.md.
    """
    from gqsa_compiler.checkpoint import CheckpointReader

    layers: list[dict[str, Any]] = []
    with CheckpointReader(path) as reader:
        for name in reader.layer_names:
            layer = reader.layer(name)
            layers.append(
                {
                    "name": name,
                    "n": layer.shape[0],
                    "k": layer.shape[1],
                    "bits": layer.bits,
                    "group_size": layer.group_size,
                    "sparsity": layer.sparsity,
                    "bytes": layer.nbytes,
                }
            )
        other = 0
        for name in reader.tensor_names:
            shape, dtype = reader.shape_dtype(name)
            other += math.prod(shape) * dtype.itemsize
        quantization = reader.quantization.to_dict()
    weights = sum(layer["n"] * layer["k"] for layer in layers)
    stored = sum(layer["bytes"] for layer in layers)
    return {
        "format": "gqsa-checkpoint",
        "quantization_config": quantization,
        "layers": layers,
        "bits_per_weight": 8 * stored / weights if weights else 0.0,
        "compressed_bytes": stored,
        "uncompressed_bytes": other,
    }
