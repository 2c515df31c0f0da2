"""Choose an exporter and write the output whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gqsa_compiler.errors import UsageError
from gqsa_compiler.export.dense import write_dense
from gqsa_compiler.export.gguf_file import write_gguf
from gqsa_compiler.export.gptq import write_gptq
from gqsa_compiler.export.model import CompressedModel
from gqsa_compiler.export.packed import write_packed
from gqsa_compiler.export.report import ExportReport
from gqsa_compiler.frontends.fit import check_tensors
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.outdir import check_output, staged_directory
from gqsa_compiler.progress import Progress


def _write_onnx(
    model: CompressedModel, directory: Path, output: str, dtype: str | None
) -> ExportReport:
    """Write ONNX; the other formats need neither PyTorch nor TVM."""
    from gqsa_compiler.export.onnx_file import write_onnx

    return write_onnx(model, directory, output, dtype)


_Writer = Callable[[CompressedModel, Path, str, str | None], ExportReport]
_WRITERS: Mapping[str, _Writer] = {
    "dense": write_dense,
    "gptq": write_gptq,
    "compressed-tensors": write_packed,
    "gguf": write_gguf,
    "onnx": _write_onnx,
}
FORMATS = tuple(_WRITERS)
DTYPES: Mapping[str, tuple[str, ...]] = {
    "dense": ("float32", "float16", "bfloat16"),
    "gguf": ("float32", "float16"),
}
"""What decoded layers can be stored as, the formats that have any; see `export_model`."""


def export_model(
    model: str | ModelSource,
    output: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a compressed model in the format of other programs.

    One layer is in memory at a time.

    Parameters
    ----------
    model : str or ModelSource
        A GQSA checkpoint, or a checkpoint of another quantiser.
    output : str or Path
        The directory; written aside and renamed when whole. It must not exist.
    to : str
        One of `FORMATS`.
    dtype : str, optional
        What layers that the format holds only decoded are stored as: ``float32``, ``float16`` or
        ``bfloat16`` (dense). By default float32 for a dense model, which is exact, and float16 for
        GGUF.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    ExportReport

    Raises
    ------
    UsageError
        The model is not compressed, there is no such format or dtype, or the output exists.
    ModelError
        The format cannot hold the model, or it cannot be read.
    """
    if to not in _WRITERS:
        raise UsageError(f"There is no export format {to!r}; choose one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES.get(to, ()):
        known = DTYPES.get(to)
        raise UsageError(
            f"--to {to} stores codes, so it takes no --dtype."
            if known is None
            else f"--to {to} takes the dtypes {', '.join(known)}, not {dtype!r}."
        )
    source = model if isinstance(model, ModelSource) else resolve(model)
    if source.checkpoint is None:
        raise UsageError(
            f"{source.path} is not compressed, so there is nothing to export; compress it first "
            f"(gqsa compress {source.path} -o DIR)."
        )
    check_output(output, protect=(source.path,))
    check_tensors(source, parse_config(source.config, str(source.path)))
    say = progress or (lambda _stage, _done, _total: None)
    found = CompressedModel(source, source.checkpoint, say)
    with staged_directory(output) as staging:
        return _WRITERS[to](found, staging, str(output), dtype)
