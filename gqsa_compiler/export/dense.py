"""A dense Hugging Face directory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.model import CompressedModel, DirectoryOutput
from gqsa_compiler.export.report import ExportReport

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_dense(
    model: CompressedModel, directory: Path, output: str, dtype: str | None
) -> ExportReport:
    """Write every layer decoded, in `dtype` (float32 if None), and all else as it is.

    Raises
    ------
    ModelError
        A weight is beyond float16's range.
    """
    dtype = dtype or "float32"
    counts: Counter[str] = Counter()
    rounded = []
    out = DirectoryOutput(directory)
    try:
        for layer in model.each_layer("decoding layers"):
            exact = to_dense(layer)
            with np.errstate(over="ignore"):
                stored = exact.astype(_DTYPES[dtype])
            if not np.isfinite(stored).all():
                raise ModelError(
                    f"{model.where}: layer {layer.name!r} has weights beyond {dtype}; choose "
                    "--dtype float32."
                )
            if not np.array_equal(stored.astype(np.float32), exact):
                rounded.append(layer.name)
            counts[dtype] += 1
            out.add({f"{layer.name}.weight": stored})
        for name, array in model.each_plain():
            out.add({name: array})
        out.finish(model.source, model.config(dtype=dtype))
    finally:
        out.close()
    return ExportReport(output, "dense", dict(counts), tuple(rounded), out.bytes)
