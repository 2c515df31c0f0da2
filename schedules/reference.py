"""A slow numpy model of what every linear kernel computes; tests compare kernels with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, Activation, LinearSpec

Array = npt.NDArray[Any]

QUANT_TINY = 1e-30


def decode(layer: BSRLayer) -> npt.NDArray[np.float64]:
    """Decode a layer to its dense weight, float64 [N, K]."""
    n, k = layer.shape
    size = layer.group_size
    dense = np.zeros((n, k // size, size))
    rows = np.repeat(np.arange(n), np.diff(layer.indptr))
    codes = layer.codes().astype(np.float64) - layer.zeros()[:, None]
    dense[rows, layer.indices] = codes * layer.scales.astype(np.float64)[:, None]
    return dense.reshape(n, k)


def quantise_activations(x: Array) -> npt.NDArray[np.float64]:
    """Round float32 activations [m, K] to int8 per token and `ACTIVATION_BLOCK` columns, and back.

    The scale of a block is its largest magnitude / 127; a block below 1e-30 becomes 0. Codes are
    ``x * (127 / peak)`` in float32, rounded half to even.

    Returns
    -------
    float64 [m, K]
    """
    blocks = x.astype(np.float32).reshape(x.shape[0], -1, ACTIVATION_BLOCK)
    peak = np.abs(blocks).max(-1, keepdims=True)
    usable = peak >= np.float32(QUANT_TINY)
    safe = np.maximum(peak, np.float32(QUANT_TINY))
    inverse = np.where(usable, np.float32(127.0) / safe, np.float32(0.0))
    scale = np.where(usable, peak / np.float32(127.0), np.float32(0.0))
    return (np.rint(blocks * inverse).astype(np.float64) * scale).reshape(x.shape)


def quantise_tokens(x: Array) -> npt.NDArray[np.float64]:
    """Round float32 activations [m, K] to int16 per token, and back.

    The scale of a token is its largest magnitude / 32767; one below 1e-30 becomes 0. Codes are
    ``x * (32767 / peak)`` in float32, rounded half to even.

    Returns
    -------
    float64 [m, K]
    """
    values = x.astype(np.float32)
    peak = np.abs(values).max(-1, keepdims=True)
    usable = peak >= np.float32(QUANT_TINY)
    safe = np.maximum(peak, np.float32(QUANT_TINY))
    inverse = np.where(usable, np.float32(32767.0) / safe, np.float32(0.0))
    scale = np.where(usable, peak / np.float32(32767.0), np.float32(0.0))
    return np.rint(values * inverse).astype(np.float64) * scale


def activate(name: Activation, y: Array) -> npt.NDArray[np.float64]:
    """Apply an activation in float64."""
    y = y.astype(np.float64)
    if name == "silu":
        return y / (1.0 + np.exp(-np.clip(y, -700, 700)))
    if name == "gelu":
        return y * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2.0)))
    if name == "gelu_tanh":
        return 0.5 * y * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3)))
    return np.maximum(y, 0.0)


def linear(
    spec: LinearSpec,
    weight: Array,
    x: Array,
    *,
    norm: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
) -> npt.NDArray[np.float64]:
    """Compute what `spec` describes, in float64.

    Parameters
    ----------
    weight : [N, K]
        The dense (decoded) weight.
    x : float32 [m, K]
    norm : float32 [K], optional
        With `spec.norm_eps`.
    bias : float32 [N], optional
    residual : float32 [m, N_out], optional

    Returns
    -------
    float64 [m, N_out]
    """
    value = x.astype(np.float64)
    if spec.norm_eps is not None and norm is not None:
        factor = 1.0 / np.sqrt((value**2).mean(-1, keepdims=True) + spec.norm_eps)
        value = value * factor * norm.astype(np.float64)
    # As the generic kernels round; Arm's own have other scales (`spec.ACTIVATION_BLOCK`).
    if spec.weight == "bsr" and spec.activation_dtype == "int8":
        value = quantise_activations(value)
    elif spec.weight == "bsr" and spec.activation_dtype == "int16":
        value = quantise_tokens(value)
    y = value @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias
    epilogue = spec.epilogue
    if epilogue.activation is not None:
        half = spec.n // 2
        if epilogue.gated:
            y = activate(epilogue.activation, y[:, :half]) * y[:, half:]
        else:
            y = activate(epilogue.activation, y)
    return y if residual is None else y + residual
