"""Compressed models without running the compressor: the smallest groups dropped, rest rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gqsa_compiler.checkpoint import (
    CheckpointWriter,
    LayerScheme,
    QuantizationConfig,
    from_dense,
)
from gqsa_compiler.frontends.resolve import resolve


def make_checkpoint(
    model: str | Path,
    directory: Path,
    *,
    sparsity: float = 0.4,
    group_size: int = 16,
    bits: int = 4,
    per_layer: Mapping[str, LayerScheme] | None = None,
    head: LayerScheme | None = None,
) -> Path:
    """Compress a dense model into a GQSA checkpoint.

    Parameters
    ----------
    model : str or Path
        A MODEL, as `resolve` takes it.
    directory : Path
    sparsity : float
        Share of a matrix's groups that are dropped: those of least norm, so that rows keep
        different numbers.
    group_size, bits : int
    per_layer : mapping of str to LayerScheme, optional
        Layers with a scheme of their own.
    head : LayerScheme, optional
        Compresses the head, which then is no embedding any more.

    Returns
    -------
    Path
        `directory`.
    """
    source = resolve(str(model))
    layers = dict(per_layer or {})
    fields = source.config
    weights = {name: name for name in source.tensor_names()}
    if head is not None:
        layers["lm_head"] = head
        fields = {**fields, "tie_word_embeddings": False}
        embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights.setdefault("lm_head.weight", embedding)
    config = QuantizationConfig(
        bits=bits,
        group_size=group_size,
        ratio=sparsity,
        ignore=("lm_head",) if head is None else (),
        producer="tests",
        per_layer=layers,
    )
    with CheckpointWriter(directory, fields, config) as writer:
        for name, stored in weights.items():
            array = source.tensor(stored)
            linear = ".layers." in name and array.ndim == 2 and name.endswith(".weight")
            if linear or (head is not None and name == "lm_head.weight"):
                weight = array.astype(np.float32)
                scheme = config.scheme(name.removesuffix(".weight"))
                size = scheme.group_size
                norms = np.square(weight.reshape(len(weight), -1, size)).sum(-1)
                least = np.quantile(norms, scheme.ratio) if scheme.ratio else -1.0
                layer = from_dense(
                    name.removesuffix(".weight"),
                    weight,
                    size,
                    norms > least,
                    symmetric=scheme.symmetric,
                    bits=scheme.bits,
                )
                if name.endswith("up_proj.weight"):  # as if it had been measured
                    sizes = np.linspace(0.5, 3, layer.shape[1], dtype=np.float32)
                    layer = replace(layer, input_rms=sizes)
                writer.add_layer(layer)
            else:
                half = array.ndim == 2 and array.dtype == np.float32 and source.kind == "gguf"
                writer.add_tensor(name, array.astype(np.float16) if half else array)
        source.save_tokenizer(writer.directory)
    return directory
