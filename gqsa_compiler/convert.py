"""Another quantiser's checkpoint becomes a GQSA checkpoint, code by code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import CheckpointWriter
from gqsa_compiler.checkpoint.names import is_tied_head
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.fit import check_tensors
from gqsa_compiler.frontends.gguf import GGUFSource
from gqsa_compiler.frontends.quantised.gguf_layers import GGUFLayers
from gqsa_compiler.frontends.quantised.source import QuantisedLayers
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.outdir import check_output
from gqsa_compiler.progress import Progress

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion has made.

    Parameters
    ----------
    output : str
    formats : dict of str to int
        Layers taken over from each format.
    layers : int
        All of them.
    weights : int
        That they stand for.
    stored_bytes : int
        Of the layers in the checkpoint.
    absent_groups : float
        Share of their groups that are all zero and therefore absent, 0 to 1.
    uncompressed_bytes : int
        Of all other tensors.
    dense : dict of str to str
        Layers that do not fit and were stored uncompressed on request, and why.
    """

    output: str
    formats: dict[str, int]
    layers: int
    weights: int
    stored_bytes: int
    absent_groups: float
    uncompressed_bytes: int
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the layers over the weights that they stand for."""
        return 8 * self.stored_bytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def convert_model(
    model: str | ModelSource,
    output: str | Path,
    *,
    keep_dense: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Take over a quantised model as a GQSA checkpoint whose weights are the same to the bit.

    One layer is in memory at a time.

    Parameters
    ----------
    model : str or ModelSource
        A GPTQ, AWQ or compressed-tensors directory, or a GGUF file.
    output : str or Path
        The checkpoint; written aside and renamed when whole.
    keep_dense : bool
        Store the layers that do not fit uncompressed instead of refusing the model.
    overwrite : bool
        Replace an existing checkpoint.
    progress : callable or None
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    ConvertReport

    Raises
    ------
    UsageError
        The model is not quantised, or is a GQSA checkpoint; the output exists.
    ModelError
        A layer does not fit (`Misfit`), or the model cannot be read.
    CheckpointError
        A layer breaks a rule of docs/format.md.
    """
    source = model if isinstance(model, ModelSource) else resolve(model)
    check_output(output, overwrite, protect=(source.path,))
    layers = quantised_layers(source)
    check_tensors(source, parse_config(source.config, str(source.path)))
    say = progress or (lambda _stage, _done, _total: None)
    misfits: dict[str, str] = {}
    if keep_dense:
        say("trying the layers", 0, 1)
        misfits = layers.misfits()
        layers = layers.without(misfits)
        if not layers.layer_names:
            raise ModelError(f"No layer of {source.path} fits. {next(iter(misfits.values()))}")
    return _write(source, layers, misfits, Path(output), overwrite, say)


def quantised_layers(source: ModelSource) -> QuantisedLayers:
    """Return the layers of a source that were quantised by another program.

    Raises
    ------
    UsageError
        It has none.
    ModelError
        It is a GGUF file without a layer that can be taken over.
    """
    if isinstance(source, GGUFSource):
        return GGUFLayers(source)
    if isinstance(source.checkpoint, QuantisedLayers):
        return source.checkpoint
    if source.kind == "gqsa":
        raise UsageError(f"{source.path} is a GQSA checkpoint already.")
    raise UsageError(
        f"{source.path} is not quantised, so there are no codes to take over; "
        f"compress it: gqsa compress {source.path} -o DIR"
    )


def _write(
    source: ModelSource,
    layers: QuantisedLayers,
    misfits: dict[str, str],
    output: Path,
    overwrite: bool,
    say: Progress,
) -> ConvertReport:
    quantization, names = layers.quantization, layers.layer_names
    taken = {f"{name}.weight" for name in names}
    weights = stored = kept = groups = other = 0
    with CheckpointWriter(output, source.config, quantization, overwrite=overwrite) as writer:
        for done, name in enumerate(names):
            say("converting layers", done, len(names))
            layer = layers.layer(name)
            writer.add_layer(layer)
            n, k = layer.shape
            weights += n * k
            stored += layer.nbytes
            kept += layer.nnz
            groups += n * (k // layer.group_size)
        for tensor in source.tensor_names():
            if tensor in taken or is_tied_head(source.config, tensor):
                continue
            array = _dense(source, layers, tensor, misfits)
            writer.add_tensor(tensor, array)
            other += array.nbytes
        source.save_tokenizer(writer.directory)
        say("converting layers", len(names), len(names))
    absent = 1 - kept / groups if groups else 0.0
    return ConvertReport(
        str(output), layers.kinds(), len(names), weights, stored, absent, other, misfits
    )


def _dense(
    source: ModelSource, layers: QuantisedLayers, tensor: str, misfits: dict[str, str]
) -> npt.NDArray[Any]:
    """Read an uncompressed tensor in the narrowest dtype that holds it exactly."""
    layer = tensor.removesuffix(".weight")
    misfit = layer in misfits and source.kind == "quantised"
    array = layers.dense(layer) if misfit else source.tensor(tensor)
    if array.dtype.name in _FLOATS and not np.isfinite(array).all():
        raise ModelError(
            f"{source.path}: tensor {tensor!r} has values that are not finite numbers; download "
            "it again."
        )
    if array.dtype != np.float32 or array.ndim < 2:
        return array
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), array):
            return narrow
    return array
