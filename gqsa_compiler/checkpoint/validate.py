"""The rules of docs/format.md for a layer's tensors and for a whole checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.bits import packed_size
from gqsa_compiler.checkpoint.compressed_layers import CompressedLayers
from gqsa_compiler.checkpoint.config import QuantizationConfig
from gqsa_compiler.checkpoint.layer import BSRLayer
from gqsa_compiler.errors import CheckpointError
from gqsa_compiler.limits import BITS, GROUP_SIZES
from gqsa_compiler.progress import Progress

MAX_COLUMN_GROUPS = 1 << 16
MAX_INDEX = (1 << 31) - 1


def validate(reader: CompressedLayers, progress: Progress | None = None) -> None:
    """Check every layer of an open checkpoint (what opening checked already included).

    Reads each layer's `indptr`, `indices`, `scales` and the last byte of `qzeros`, one layer at
    a time; any code is valid, so `qweight` is not read.

    Raises
    ------
    CheckpointError
        The first rule that is broken, naming the layer and the file.
    """
    names = reader.layer_names
    for done, name in enumerate(names):
        if progress:
            progress("check layers", done, len(names))
        reader.layer(name)
    if progress:
        progress("check layers", len(names), len(names))


def validate_layer(
    layer: BSRLayer, config: QuantizationConfig | None = None, *, source: str | None = None
) -> None:
    """Check one layer.

    Parameters
    ----------
    layer : BSRLayer
        The layer to check.
    config : QuantizationConfig, optional
        What the layer must agree with: bits, group size, symmetric.
    source : str, optional
        The file it comes from, for messages.

    Raises
    ------
    CheckpointError
        A dtype or shape is wrong, `indptr` or `indices` are out of order or range, a scale is not
        finite, a padding bit of `qzeros` is not 0, an `input_rms` is not positive, or the layer
        differs from `config`.
    """
    fail = _Fail(layer.name, source)
    _check_sizes(layer, fail)
    if config is not None:
        _check_scheme(layer, config, fail)
    n, nnz, bits = layer.shape[0], layer.nnz, layer.bits
    _check_array("indptr", layer.indptr, np.int32, (n + 1,), fail)
    _check_array("indices", layer.indices, np.uint16, (nnz,), fail)
    _check_array(
        "qweight", layer.qweight, np.uint8, (nnz, packed_size(layer.group_size, bits)), fail
    )
    _check_array("scales", layer.scales, np.float16, (nnz,), fail)
    if layer.qzeros is not None:
        _check_array("qzeros", layer.qzeros, np.uint8, (packed_size(nnz, bits),), fail)
        used = nnz * bits % 8  # bits of the last byte, if it is not full
        if used and layer.qzeros[-1] >> used:
            raise fail("the padding bits at the end of qzeros are not 0")
    if layer.input_rms is not None:
        _check_array("input_rms", layer.input_rms, np.float32, (layer.shape[1],), fail)
        good = np.isfinite(layer.input_rms) & (layer.input_rms > 0)
        if not good.all():
            raise fail(f"input_rms {int(np.argmin(good))} is not a positive finite number")
    _check_order(layer, fail)
    finite = np.isfinite(layer.scales)
    if not finite.all():
        raise fail(f"scale {int(np.argmin(finite))} is not a finite number")


class _Fail:
    """Makes the error for one layer."""

    def __init__(self, name: str, source: str | None) -> None:
        self._where = f"Layer {name!r}" + (f" in {source}" if source else "")

    def __call__(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where} is not valid: {what}.")


def _check_sizes(layer: BSRLayer, fail: _Fail) -> None:
    n, k = layer.shape
    if layer.bits not in BITS:
        raise fail(f"it has {layer.bits} bits a code, not {', '.join(map(str, BITS))}")
    if layer.group_size not in GROUP_SIZES:
        raise fail(f"its group size {layer.group_size} is not a power of two from 8 to 256")
    if not 1 <= n < MAX_INDEX or not 1 <= k < MAX_INDEX:
        raise fail(f"its shape [{n}, {k}] is out of range")
    if k % layer.group_size:
        raise fail(f"its group size {layer.group_size} does not divide its {k} columns")
    if k // layer.group_size > MAX_COLUMN_GROUPS:
        raise fail(
            f"its {k} columns make more than {MAX_COLUMN_GROUPS} groups of {layer.group_size}"
        )
    if layer.indices.ndim != 1 or layer.nnz > MAX_INDEX:
        raise fail("indices is not a vector of fewer than 2^31 groups")


def _check_scheme(layer: BSRLayer, config: QuantizationConfig, fail: _Fail) -> None:
    scheme = config.scheme(layer.name)
    for what, here, there in (
        ("bits", layer.bits, scheme.bits),
        ("group_size", layer.group_size, scheme.group_size),
        ("symmetric", layer.symmetric, scheme.symmetric),
    ):
        if here != there:
            raise fail(f"its tensors say {what} {here}, quantization_config says {there}")
    if layer.name in config.ignore:
        raise fail("it is compressed, but quantization_config lists it in ignore")


def _check_array(
    what: str, array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...], fail: _Fail
) -> None:
    if array.dtype != np.dtype(dtype):
        raise fail(f"{what} has dtype {array.dtype}, not {np.dtype(dtype)}")
    if array.shape != shape:
        raise fail(f"{what} has shape {list(array.shape)}, not {list(shape)}")


def _check_order(layer: BSRLayer, fail: _Fail) -> None:
    indptr, indices, nnz = layer.indptr, layer.indices, layer.nnz
    if indptr[0] != 0 or indptr[-1] != nnz:
        raise fail(f"indptr runs from {indptr[0]} to {indptr[-1]}, not from 0 to {nnz}")
    falls = indptr[1:] < indptr[:-1]
    if falls.any():
        raise fail(f"indptr decreases after row {int(np.argmax(falls))}")
    if nnz == 0:
        return
    columns = layer.shape[1] // layer.group_size
    top = int(indices.max())
    if top >= columns:
        raise fail(f"indices holds {top}, but a row has {columns} groups (0 to {columns - 1})")
    # Where indices do not rise, a new row must begin.
    stalls = np.flatnonzero(indices[1:] <= indices[:-1]) + 1
    inside = indptr[np.searchsorted(indptr, stalls)] != stalls
    if inside.any():
        at = int(stalls[np.argmax(inside)])
        row = int(np.searchsorted(indptr, at, side="right")) - 1
        raise fail(
            f"indices are not strictly increasing in row {row} "
            f"({int(indices[at])} follows {int(indices[at - 1])})"
        )
