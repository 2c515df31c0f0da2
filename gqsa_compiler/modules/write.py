"""Write a module checkpoint: the graph as ONNX, whose large tensors lie in model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, StringStringEntryProto, TensorProto, numpy_helper

from gqsa_compiler.checkpoint import BSRLayer, CheckpointWriter, QuantizationConfig, SafetensorsFile
from gqsa_compiler.checkpoint.config import LayerScheme
from gqsa_compiler.checkpoint.names import layer_of
from gqsa_compiler.checkpoint.safetensors_file import FLOAT_DTYPES, METADATA_KEY
from gqsa_compiler.compress.store import producer
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.onnx_graph import INLINE_BYTES
from gqsa_compiler.modules.files import (
    CONFIG_FILE,
    GRAPH_FILE,
    MODEL_TYPE,
    MODULE_VERSION,
    WEIGHTS_FILE,
)
from gqsa_compiler.outdir import staged_directory

_ONE_SHARD = 1 << 62


def quantization_of(
    layers: Sequence[BSRLayer], ratio: float, balance: str, ignore: Sequence[str]
) -> QuantizationConfig:
    """Return what config.json says of layers; those that differ from the first one by name."""
    first = layers[0] if layers else None
    bits, size = (4, 16) if first is None else (first.bits, first.group_size)
    symmetric = False if first is None else first.symmetric
    return QuantizationConfig(
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        ratio=ratio,
        balance=balance,
        ignore=tuple(ignore),
        per_layer={
            layer.name: LayerScheme(layer.bits, layer.group_size, layer.symmetric, ratio)
            for layer in layers
            if (layer.bits, layer.group_size, layer.symmetric) != (bits, size, symmetric)
        },
        producer=producer(),
    )


def write_checkpoint(
    output: str | Path,
    model: ModelProto,
    layers: Sequence[BSRLayer],
    quantization: QuantizationConfig,
    sizes: Mapping[str, tuple[int, int]],
    *,
    name: str,
    overwrite: bool = False,
) -> None:
    """Write a module checkpoint, whole or not at all.

    Parameters
    ----------
    output : path
        The directory.
    model : ModelProto
        With all tensors inside, those of `layers` too.
    layers : sequence of BSRLayer
    quantization : QuantizationConfig
    sizes : mapping
        Smallest and largest value of each size that varies.
    name : str
        Of the module.
    overwrite : bool

    Raises
    ------
    ModelError
        The model is not valid ONNX.
    """
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "module_version": MODULE_VERSION,
        "name": name,
        "sizes": {key: list(bounds) for key, bounds in sizes.items()},
    }
    try:
        with staged_directory(output, overwrite=overwrite) as staging:
            inner = staging / "checkpoint"
            with CheckpointWriter(inner, config, quantization, _ONE_SHARD) as writer:
                outside = _write_tensors(writer, model, layers)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                (inner / file).rename(staging / file)
            inner.rmdir()
            _point_to(model, outside, staging / WEIGHTS_FILE)
            onnx.save(model, str(staging / GRAPH_FILE))
            onnx.checker.check_model(str(staging / GRAPH_FILE))
    except onnx.checker.ValidationError as error:
        raise ModelError(f"The graph of {name} is not valid ONNX: {error}.") from error


def _write_tensors(
    writer: CheckpointWriter, model: ModelProto, layers: Sequence[BSRLayer]
) -> set[str]:
    """Write layers and large tensors; returns the names of the tensors that were written."""
    written = set()
    for layer in layers:
        writer.add_layer(layer)
    parts = {layer.name for layer in layers}
    compressed = {f"{layer}.weight" for layer in parts}
    for tensor in model.graph.initializer:
        owner = layer_of(tensor.name)
        if owner is not None and owner[0] in parts:
            # The two numbers of a shape are in the graph too: runtimes infer shapes before they
            # open other files.
            if owner[1] != "shape":
                written.add(tensor.name)
            continue
        array = numpy_helper.to_array(tensor)
        plain = owner is None and tensor.name not in {"", METADATA_KEY, *compressed}
        if plain and array.dtype in FLOAT_DTYPES and array.nbytes > INLINE_BYTES:
            writer.add_tensor(tensor.name, np.ascontiguousarray(array))
            written.add(tensor.name)
    return written


def _point_to(model: ModelProto, names: set[str], weights: Path) -> None:
    """Let tensors of a model lie in a safetensors file, at the places that its header says."""
    if not names:
        return
    with SafetensorsFile(weights) as file:
        for tensor in model.graph.initializer:
            if tensor.name not in names:
                continue
            info = file.tensors[tensor.name]
            tensor.ClearField("raw_data")
            for field in ("float_data", "int32_data", "int64_data", "uint64_data", "double_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", WEIGHTS_FILE),
                ("offset", str(info.start)),
                ("length", str(info.stop - info.start)),
            ):
                tensor.external_data.append(StringStringEntryProto(key=key, value=value))
