"""A GGUF file: codes where a block type of llama.cpp holds them, decoded layers elsewhere."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, symmetric_zero, to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.gguf_metadata import (
    TensorMap,
    add_metadata,
    architecture_name,
    rope_factors,
)
from gqsa_compiler.export.gguf_tokenizer import add_tokenizer
from gqsa_compiler.export.model import CompressedModel, full_matrix
from gqsa_compiler.export.report import ExportReport
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.registry import parse_config

FILE = "model.gguf"
BLOCK = 32
_FLOATS = {"float32": "F32", "float16": "F16"}


def block_type(layer: BSRLayer) -> str | None:
    """Return the block type that holds a layer exactly, the smallest one; None if there is none.

    Blocks have 32 columns and a float16 scale. ``Q4_0`` has the zero point 8; ``Q4_1`` has a
    float16 minimum, which has to be minus zero point times scale; ``Q8_0`` holds ``code - zero``
    as a signed byte.
    """
    if layer.group_size % BLOCK:
        return None
    if layer.bits == 8:
        return "Q8_0" if _signed_bytes(layer) else None
    zeros = layer.zeros()
    top = np.uint8((1 << layer.bits) - 1)
    if layer.nnz == 0 or ((zeros <= 8) & (8 + (top - zeros.astype(np.int16)) <= 15)).all():
        return "Q4_0"
    low = -zeros.astype(np.float32) * layer.scales.astype(np.float32)
    with np.errstate(over="ignore"):
        exact = low.astype(np.float16).astype(np.float32) == low
    return "Q4_1" if exact.all() else "Q8_0"


def _signed_bytes(layer: BSRLayer) -> bool:
    """Whether ``code - zero`` is a signed byte for every code of the layer."""
    if layer.symmetric or layer.nnz == 0:
        return True
    zeros = layer.zeros().astype(np.int16)[:, None]
    differences = layer.codes().astype(np.int16) - zeros
    return bool(differences.min() >= -128 and differences.max() <= 127)


def pack_blocks(layer: BSRLayer, kind: str) -> npt.NDArray[np.uint8]:
    """Pack a layer into rows of blocks, uint8 [N, bytes]; absent groups have the scale 0.

    Parameters
    ----------
    layer : BSRLayer
    kind : str
        What `block_type` says.
    """
    n = layer.shape[0]
    codes, scales, zeros = full_matrix(layer, BLOCK)
    signed = codes.reshape(n, -1, BLOCK).astype(np.int16) - zeros[:, :, None]
    # All zero: one value of the scale is as good as another, and 0 is what llama.cpp writes.
    scales = np.where(signed.any(axis=2), scales, np.float16(0)).astype("<f2")
    head = scales[:, :, None].view(np.uint8)
    if kind == "Q8_0":
        blocks = np.concatenate([head, signed.astype(np.int8).view(np.uint8)], axis=2)
        return blocks.reshape(n, -1)
    if kind == "Q4_1":
        low = (-zeros.astype(np.float32) * scales.astype(np.float32)).astype("<f2")
        head = np.concatenate([head, low[:, :, None].view(np.uint8)], axis=2)
        four = codes.reshape(n, -1, BLOCK)
    else:
        four = (signed + symmetric_zero(4)).astype(np.uint8)
    half = BLOCK // 2
    packed = four[:, :, :half] | four[:, :, half:] << np.uint8(4)
    return np.concatenate([head, packed], axis=2).reshape(n, -1)


def write_gguf(
    model: CompressedModel, directory: Path, output: str, dtype: str | None
) -> ExportReport:
    """Write ``model.gguf``; layers that no block type holds exactly are decoded to `dtype`.

    Raises
    ------
    ModelError
        llama.cpp has no such architecture, rotary embedding or tokenizer, or float16 does not hold
        a weight.
    """
    from gguf import GGUFWriter

    dtype = dtype or "float16"
    config = parse_config(model.source.config, model.where)
    architecture = architecture_name(config, model.where)
    writer = GGUFWriter(directory / FILE, architecture)
    try:
        add_metadata(writer, config, model.source.name, model.where)
        with tempfile.TemporaryDirectory() as scratch:
            model.source.save_tokenizer(Path(scratch))
            add_tokenizer(writer, Path(scratch), model.source.config, model.where)
        file = _File(writer, model, TensorMap(architecture, config), dtype)
        file.declare(config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file.write(config)
    finally:
        writer.close()
    size = (directory / FILE).stat().st_size
    decoded = sum(kind is None for kind in file.kinds.values())
    notes = []
    if decoded:
        notes.append(
            f"{decoded} of {len(file.kinds)} layers fit no block type of GGUF (groups of "
            f"{BLOCK} columns or more, one float16 scale each) and are stored as {dtype}."
        )
    counts = Counter(kind or _FLOATS[dtype] for kind in file.kinds.values())
    return ExportReport(output, "gguf", dict(counts), tuple(file.rounded), size, tuple(notes))


class _File:
    """The tensors of one file: declared first, as the format wants it, then written."""

    def __init__(self, writer: Any, model: CompressedModel, names: TensorMap, dtype: str) -> None:
        self._writer = writer
        self._model = model
        self._names = names
        self._dtype = dtype
        self.kinds: dict[str, str | None] = {}
        self.rounded: list[str] = []

    def declare(self, config: DecoderConfig) -> None:
        """Choose every tensor's type and add it to the header."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

        for layer in self._model.each_layer("choosing block types"):
            kind = self.kinds[layer.name] = block_type(layer)
            n, k = layer.shape
            name = self._names.name(f"{layer.name}.weight")
            if kind is None:
                self._declare_floats(name, (n, k), np.dtype(self._dtype))
                continue
            raw = GGMLQuantizationType[kind]
            block, size = GGML_QUANT_SIZES[raw]
            row = k // block * size
            self._writer.add_tensor_info(name, (n, row), np.dtype(np.uint8), n * row, raw)
        for tensor in self._model.plain:
            shape = self._model.source.shape(tensor)
            self._declare_floats(self._names.name(tensor), shape, self._plain_dtype(tensor))
        factors = rope_factors(config)
        if factors is not None:
            self._declare_floats("rope_freqs.weight", factors.shape, factors.dtype)
        self._writer.add_file_type(
            LlamaFileType.ALL_F32 if self._dtype == "float32" else LlamaFileType.MOSTLY_F16
        )
        self._writer.add_quantization_version(2)

    def write(self, config: DecoderConfig) -> None:
        """Write the tensors' data, in the same order."""
        for layer in self._model.each_layer("writing layers"):
            tensor, kind = f"{layer.name}.weight", self.kinds[layer.name]
            rows = self._decoded(layer) if kind is None else pack_blocks(layer, kind)
            self._writer.write_tensor_data(np.ascontiguousarray(self._names.arrange(tensor, rows)))
        for tensor, array in self._model.each_plain():
            plain = self._names.arrange(tensor, array.astype(np.float32))
            stored = plain.astype(self._plain_dtype(tensor))
            self._writer.write_tensor_data(np.ascontiguousarray(stored))
        factors = rope_factors(config)
        if factors is not None:
            self._writer.write_tensor_data(factors)

    def _decoded(self, layer: BSRLayer) -> npt.NDArray[Any]:
        exact = to_dense(layer)
        with np.errstate(over="ignore"):
            stored = exact.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise ModelError(
                f"{self._model.where}: layer {layer.name!r} has weights beyond float16; choose "
                "--dtype float32."
            )
        if not np.array_equal(stored.astype(np.float32), exact):
            self.rounded.append(layer.name)
        return stored

    def _plain_dtype(self, tensor: str) -> np.dtype[Any]:
        """Float16 matrices stay so; bfloat16 becomes float32, and so do vectors, as usual."""
        source = self._model.source
        half = len(source.shape(tensor)) > 1 and source.dtype(tensor) == "float16"
        return np.dtype(np.float16 if half else np.float32)

    def _declare_floats(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self._writer.add_tensor_info(name, shape, dtype, size)
