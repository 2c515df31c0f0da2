"""Random layers, and safetensors files written by hand so that they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from gqsa_compiler.checkpoint import (
    BSRLayer,
    CheckpointWriter,
    QuantizationConfig,
    from_codes,
    pack_codes,
)
from gqsa_compiler.limits import BITS

Raw = dict[str, tuple[str, list[int], bytes]]
"""Tensor name -> dtype name, shape, data."""

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32}


def random_layer(
    name: str,
    shape: tuple[int, int],
    group_size: int,
    *,
    density: float = 0.5,
    symmetric: bool = False,
    seed: int = 0,
    scale: float = 0.01,
    bits: int = 4,
) -> BSRLayer:
    """Return a layer with random codes; `density` 0 and 1 give empty and full rows."""
    rng = np.random.default_rng(seed)
    n, columns = shape[0], shape[1] // group_size
    keep = rng.random((n, columns)) < density
    codes = rng.integers(0, 1 << bits, (n, columns, group_size), dtype=np.uint8)
    scales = (rng.standard_normal((n, columns)) * scale).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 1 << bits, (n, columns), dtype=np.uint8)
    return from_codes(name, shape, group_size, keep, codes, scales, zeros, bits)


@st.composite
def layers(
    draw: st.DrawFn,
    *,
    name: str = "model.layers.0.mlp.up_proj",
    columns: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    bits: int | None = None,
) -> BSRLayer:
    """Draw layers: any bits and mask (empty and full rows come up often), extreme scales."""
    g = draw(st.sampled_from([8, 16, 32])) if group_size is None else group_size
    b = draw(st.sampled_from(BITS)) if bits is None else bits
    n = draw(st.integers(1, 7))
    c = draw(st.integers(1, 6)) if columns is None else columns
    rows = st.one_of(
        st.just([False] * c), st.just([True] * c), st.lists(st.booleans(), min_size=c, max_size=c)
    )
    keep = np.array(draw(st.lists(rows, min_size=n, max_size=n)), dtype=bool).reshape(n, c)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 1 << b, (n, c, g), dtype=np.uint8)
    size = draw(st.sampled_from([6e-8, 1e-4, 1.0, 65504.0]))
    signs = rng.choice([-1.0, 1.0], (n, c))
    scales = (signs * size * rng.uniform(0.5, 1.0, (n, c))).astype(np.float16)
    no_zeros = draw(st.booleans()) if symmetric is None else symmetric
    zeros = None if no_zeros else rng.integers(0, 1 << b, (n, c), dtype=np.uint8)
    layer = from_codes(name, (n, c * g), g, keep, codes, scales, zeros, b)
    if not draw(st.booleans()):
        return layer
    return replace(layer, input_rms=rng.lognormal(0, 3, c * g).astype(np.float32))


def naive_code(stream: npt.NDArray[np.uint8], bits: int, i: int) -> int:
    """Read code i of a stream of bits, one bit at a time."""
    code = 0
    for b in range(bits):
        at = i * bits + b
        code |= (int(stream[at // 8]) >> at % 8 & 1) << b
    return code


def naive_dense(layer: BSRLayer) -> npt.NDArray[np.float64]:
    """Decode one weight at a time, in float64, straight from the formula."""
    n, k = layer.shape
    g, bits = layer.group_size, layer.bits
    dense = np.zeros((n, k))
    for row in range(n):
        for group in range(layer.indptr[row], layer.indptr[row + 1]):
            zero = 2 ** (bits - 1)
            if layer.qzeros is not None:
                zero = naive_code(layer.qzeros, bits, group)
            for i in range(g):
                code = naive_code(layer.qweight[group], bits, i)
                column = int(layer.indices[group]) * g + i
                dense[row, column] = (code - zero) * float(layer.scales[group])
    return dense


def same_layer(a: BSRLayer, b: BSRLayer) -> bool:
    """Whether two layers are the same bit for bit."""

    def raw(layer: BSRLayer) -> tuple[Any, ...]:
        arrays = (layer.indptr, layer.indices, layer.qweight, layer.scales)
        optional = (layer.qzeros, layer.input_rms)
        stored = (None if x is None else (x.dtype, x.shape, x.tobytes()) for x in arrays + optional)
        return (layer.name, layer.shape, layer.group_size, layer.bits, *stored)

    return raw(a) == raw(b)


def raw_bytes(
    tensors: Raw, edit: Callable[[dict[str, Any]], None] | None = None, tail: bytes = b""
) -> bytes:
    """Lay out a safetensors file; `edit` may spoil the header before it is written."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    if edit:
        edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data + tail


def parse_raw(path: Path) -> Raw:
    """Read a safetensors file with nothing but its specification."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            content[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def array_of(raw: Raw, name: str, dtype: Any) -> npt.NDArray[Any]:
    """Return a raw tensor as a writable array."""
    return np.frombuffer(raw[name][2], dtype).reshape(raw[name][1]).copy()


def put(raw: Raw, name: str, array: npt.NDArray[Any], dtype: str | None = None) -> None:
    """Replace a raw tensor's content (and dtype name, where it changes)."""
    raw[name] = (dtype or raw[name][0], list(array.shape), array.tobytes())


LAYER = "model.layers.0.self_attn.q_proj"


def make_checkpoint(
    path: Path,
    *,
    symmetric: bool = False,
    shard_bytes: int = 1 << 30,
    bits: int = 4,
    **quantization: Any,
) -> Path:
    """Write a checkpoint with one layer (odd nnz), its bias and an embedding."""
    layer = random_layer(LAYER, (5, 64), 16, symmetric=symmetric, seed=3, bits=bits)
    if layer.nnz % 2 == 0:  # most rules about padding need an odd number of groups
        keep = layer.nnz - 1
        layer = replace(
            layer,
            indptr=np.minimum(layer.indptr, keep).astype(np.int32),
            indices=layer.indices[:keep],
            qweight=layer.qweight[:keep],
            scales=layer.scales[:keep],
            qzeros=None if symmetric else pack_codes(layer.zeros(0, keep), bits),
        )
    config = QuantizationConfig(
        bits=bits,
        group_size=16,
        symmetric=symmetric,
        ratio=0.5,
        producer="test 1",
        **quantization,
    )
    with CheckpointWriter(path, CONFIG, config, shard_bytes) as writer:
        writer.add_layer(layer)
        writer.add_tensor(f"{LAYER}.bias", np.arange(5, dtype=np.float32))
        writer.add_tensor("model.embed_tokens.weight", np.ones((7, 64), np.float16))
    return path
