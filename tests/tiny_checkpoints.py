"""Compressed tiny models without running the compressor: random groups dropped, rest rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gqsa_compiler.checkpoint import CheckpointWriter, QuantizationConfig, from_dense
from gqsa_compiler.frontends.source import resolve


def make_checkpoint(
    model: Path, directory: Path, *, sparsity: float = 0.4, group_size: int = 16, seed: int = 0
) -> Path:
    """Compress the dense model at `model` into a GQSA checkpoint.

    Parameters
    ----------
    model, directory : Path
    sparsity : float
        Probability that a group is dropped.
    group_size : int
    seed : int

    Returns
    -------
    Path
        `directory`.
    """
    source = resolve(str(model))
    config = QuantizationConfig(
        group_size=group_size, ratio=sparsity, ignore=("lm_head",), producer="tests"
    )
    rng = np.random.default_rng(seed)
    with CheckpointWriter(directory, source.config, config) as writer:
        for name in source.tensor_names():
            array = source.tensor(name)
            if ".layers." in name and array.ndim == 2 and name.endswith(".weight"):
                keep = rng.random((array.shape[0], array.shape[1] // group_size)) >= sparsity
                layer = from_dense(
                    name.removesuffix(".weight"), array.astype(np.float32), group_size, keep
                )
                writer.add_layer(layer)
            else:
                writer.add_tensor(name, array)
        source.save_tokenizer(writer.directory)
    return directory
