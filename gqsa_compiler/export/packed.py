"""A compressed-tensors directory in the format `pack-quantized`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gqsa_compiler.checkpoint import LayerScheme
from gqsa_compiler.export.model import (
    Arrays,
    CompressedModel,
    DirectoryOutput,
    full_matrix,
    pack_words,
)
from gqsa_compiler.export.report import ExportReport

FORMAT = "pack-quantized"


def write_packed(
    model: CompressedModel, directory: Path, output: str, _dtype: str | None
) -> ExportReport:
    """Write the layers' own codes, with all groups; each scheme is a config group."""
    said = model.layers.quantization
    groups: dict[tuple[int, int, bool], list[str]] = {}
    counts: Counter[str] = Counter()
    out = DirectoryOutput(directory)
    try:
        for layer in model.each_layer("writing layers"):
            scheme = said.scheme(layer.name)
            key = (scheme.bits, scheme.group_size, scheme.symmetric)
            groups.setdefault(key, []).append(layer.name)
            counts[f"{layer.bits}-bit codes, groups of {layer.group_size}"] += 1
            codes, scales, zeros = full_matrix(layer, layer.group_size)
            tensors: Arrays = {
                f"{layer.name}.weight_packed": pack_words(codes, layer.bits),
                f"{layer.name}.weight_scale": scales,
                f"{layer.name}.weight_shape": np.array(layer.shape, np.int64),
            }
            if not layer.symmetric:
                points = pack_words(np.ascontiguousarray(zeros.T), layer.bits).T
                tensors[f"{layer.name}.weight_zero_point"] = np.ascontiguousarray(points)
            out.add(tensors)
        for name, array in model.each_plain():
            out.add({name: array})
        config = model.config(dtype="float16", quantization_config=_settings(model, groups))
        out.finish(model.source, config)
    finally:
        out.close()
    return ExportReport(output, "compressed-tensors", dict(counts), (), out.bytes)


def _settings(
    model: CompressedModel, groups: dict[tuple[int, int, bool], list[str]]
) -> dict[str, Any]:
    """Return `quantization_config`."""
    dense = [
        name.removesuffix(".weight")
        for name in model.plain
        if name.endswith(".weight") and "embed" not in name and len(model.source.shape(name)) == 2
    ]
    head = [] if "lm_head" in model.names else ["lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _weights(LayerScheme(bits, size, symmetric, 0.0)),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for number, ((bits, size, symmetric), names) in enumerate(groups.items())
        },
        "ignore": sorted({*dense, *head}),
        "kv_cache_scheme": None,
    }


def _weights(scheme: LayerScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
