"""A GPTQ directory: every group present, one width and one group size for all layers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np

from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.model import (
    CompressedModel,
    DirectoryOutput,
    full_matrix,
    pack_words,
    write_json,
)
from gqsa_compiler.export.report import ExportReport

_USUAL_GROUPS = (16, 32, 64, 128, 256)


def write_gptq(
    model: CompressedModel, directory: Path, output: str, _dtype: str | None
) -> ExportReport:
    """Write the layers' own codes.

    The common group size is the smallest one; larger groups are repeated. Version 1 of the format,
    which more programs read, is written where all zero points are the middle: for others it cannot
    say 0, and GPTQModel takes it only from itself. Those get version 2.

    Raises
    ------
    ModelError
        The layers have several widths, a size is no whole number of words, or a linear layer of a
        block is not compressed, which readers of GPTQ do not expect.
    """
    bits, size = _common(model)
    middle, symmetric = symmetric_zero(bits), True
    for layer in model.each_layer("looking at zero points"):
        if layer.nnz:
            symmetric = symmetric and bool((layer.zeros() == middle).all())
    offset = 1 if symmetric else 0
    out = DirectoryOutput(directory)
    try:
        for layer in model.each_layer("writing layers"):
            k = layer.shape[1]
            codes, scales, points = full_matrix(layer, size)
            stored = (points - np.uint8(offset)).T
            out.add(
                {
                    f"{layer.name}.qweight": np.ascontiguousarray(pack_words(codes, bits).T),
                    f"{layer.name}.qzeros": pack_words(np.ascontiguousarray(stored), bits),
                    f"{layer.name}.scales": np.ascontiguousarray(scales.T),
                    f"{layer.name}.g_idx": (np.arange(k) // size).astype(np.int32),
                }
            )
        for name, array in model.each_plain():
            out.add({name: array})
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": False,
            "sym": symmetric,
            "lm_head": "lm_head" in model.names,
            "true_sequential": True,
            "static_groups": False,
            "checkpoint_format": "gptq" if offset else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"gqsa-compiler:{version('gqsa-compiler')}"]},
        }
        config = model.config(dtype="float16", quantization_config=settings)
        out.finish(model.source, config)
        write_json(directory / "quantize_config.json", settings)
    finally:
        out.close()
    notes = []
    if not offset:
        notes.append("Zero points differ, so the layout is gptq_v2, which older readers refuse.")
    if size not in _USUAL_GROUPS:
        notes.append(f"Groups of {size} are smaller than most readers of GPTQ take.")
    kind = f"{bits}-bit codes, groups of {size}"
    return ExportReport(output, "gptq", {kind: len(model.names)}, (), out.bytes, tuple(notes))


def _common(model: CompressedModel) -> tuple[int, int]:
    """Return the one width and group size; checks that the format holds every layer."""
    said = model.layers.quantization
    schemes = [said.scheme(name) for name in model.names]
    widths = sorted({scheme.bits for scheme in schemes})
    if len(widths) != 1:
        raise ModelError(
            f"{model.where} has layers of {' and '.join(map(str, widths))} bits, and a GPTQ "
            "checkpoint has one width; export it with --to compressed-tensors."
        )
    bits = widths[0]
    for name in model.names:
        n, k = model.source.shape(f"{name}.weight")
        if n * bits % 32 or k * bits % 32:
            raise ModelError(
                f"{model.where}: layer {name!r} of {n} x {k} weights of {bits} bits does not fill "
                "whole words, as GPTQ has them; export it with --to compressed-tensors."
            )
    for name in model.plain:
        if ".layers." in name and name.endswith(".weight") and len(model.source.shape(name)) == 2:
            raise ModelError(
                f"{model.where}: {name} is not compressed, and readers of GPTQ expect every "
                "linear layer of a block to be; export it with --to compressed-tensors."
            )
    return bits, min(scheme.group_size for scheme in schemes)
