"""Write a GQSA checkpoint, tensor by tensor, all or nothing."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.config import QuantizationConfig
from gqsa_compiler.checkpoint.layer import BSRLayer
from gqsa_compiler.checkpoint.names import (
    CONFIG_FILE,
    MARKER,
    is_tied_head,
    layer_of,
)
from gqsa_compiler.checkpoint.safetensors_file import FLOAT_DTYPES, METADATA_KEY
from gqsa_compiler.checkpoint.shards import ShardWriter
from gqsa_compiler.checkpoint.validate import validate_layer
from gqsa_compiler.errors import CheckpointError
from gqsa_compiler.outdir import staged_directory

DEFAULT_SHARD_BYTES = 4 << 30


class CheckpointWriter:
    """Writes a checkpoint beside `directory`; it takes the name when the block ends well.

    ``with CheckpointWriter(path, config, quantization) as writer: writer.add_layer(...)``.
    On any exception nothing is left. A tensor is on disk when the call that adds it returns: no
    more than one is held in memory.

    Parameters
    ----------
    directory : path
        The checkpoint to make.
    config : dict
        The model's config.json; its `quantization_config`, if any, is replaced.
    quantization : QuantizationConfig
        What the layers must agree with.
    shard_bytes : int
        Most bytes of tensor data in one file.
    overwrite : bool
        Replace an existing checkpoint at the end.

    Raises
    ------
    UsageError
        On entry: the directory exists and `overwrite` is false, or cannot be made.
    CheckpointError
        `config` cannot be written as JSON.
    GqsaError
        The disk is full.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: dict[str, Any],
        quantization: QuantizationConfig,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        overwrite: bool = False,
    ) -> None:
        if shard_bytes < 1:
            raise CheckpointError(f"A shard cannot have {shard_bytes} bytes.")
        self._target = Path(directory)
        self._config = {**config, "quantization_config": quantization.to_dict()}
        try:
            self._config_text = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The model's config cannot be stored: {error}.") from error
        self._quantization = quantization
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._staging: Path | None = None
        self._shards: ShardWriter | None = None
        self._names: set[str] = set()
        self._layers: dict[str, int] = {}
        self._bias_rows: dict[str, tuple[int, ...]] = {}

    @property
    def directory(self) -> Path:
        """Where the files lie until the block ends; tokenizer files may be written there.

        Raises
        ------
        CheckpointError
            The writer is not inside its `with` block.
        """
        if self._staging is None:
            raise CheckpointError("A CheckpointWriter writes only inside its `with` block.")
        return self._staging

    def add_layer(self, layer: BSRLayer) -> None:
        """Check and write a compressed layer; its tensors share a shard.

        Raises
        ------
        CheckpointError
            It breaks docs/format.md, disagrees with the configuration or is there already.
        """
        validate_layer(layer, self._quantization)
        if is_tied_head(self._config, f"{layer.name}.qweight"):
            raise CheckpointError(
                f"Layer {layer.name!r} cannot be compressed while config.json says "
                "tie_word_embeddings; set that to false to give the head weights of its own."
            )
        if f"{layer.name}.weight" in self._names and layer.name not in self._layers:
            raise CheckpointError(f"Layer {layer.name!r} is already stored uncompressed.")
        tensors: dict[str, npt.NDArray[Any]] = {
            "shape": np.array(layer.shape, np.int64),
            "indptr": layer.indptr,
            "indices": layer.indices,
            "qweight": layer.qweight,
            "scales": layer.scales,
        }
        if layer.qzeros is not None:
            tensors["qzeros"] = layer.qzeros
        if layer.input_rms is not None:
            tensors["input_rms"] = layer.input_rms
        tensors[MARKER] = np.zeros(0, np.uint8)
        self._add({f"{layer.name}.{part}": array for part, array in tensors.items()})
        self._layers[layer.name] = layer.shape[0]

    def add_tensor(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write an uncompressed tensor: float16, float32 or `ml_dtypes.bfloat16`, stored as is.

        Raises
        ------
        CheckpointError
            The name is taken or reserved, or the dtype is another one.
        """
        if array.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"Tensor {name!r} has dtype {array.dtype}; an uncompressed tensor is float16, "
                "bfloat16 or float32."
            )
        if not name or name == METADATA_KEY or layer_of(name):
            raise CheckpointError(f"The tensor name {name!r} is reserved by docs/format.md.")
        if is_tied_head(self._config, name):
            raise CheckpointError(
                f"Tensor {name!r} cannot be stored while config.json says tie_word_embeddings: "
                "the embedding is the output head."
            )
        owner = name.removesuffix(".weight")
        if owner != name and owner in self._layers:
            raise CheckpointError(f"Layer {owner!r} is already stored compressed.")
        self._add({name: array})
        if name.endswith(".bias"):
            self._bias_rows[name.removesuffix(".bias")] = array.shape

    def __enter__(self) -> CheckpointWriter:
        staged = staged_directory(self._target, overwrite=self._overwrite)
        self._staging = self._stack.enter_context(staged)
        self._shards = ShardWriter(self._staging, self._shard_bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._shards is not None
        # ExitStack hands the exceptions of `_finish` on to the staged directory, which cleans up.
        self._stack.callback(self._shards.close)
        if kind is None:
            self._stack.callback(self._finish)
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            self._staging = None

    def _add(self, tensors: dict[str, npt.NDArray[Any]]) -> None:
        _ = self.directory  # outside the block: an error
        assert self._shards is not None
        for name in tensors:
            if name in self._names:
                raise CheckpointError(f"The tensor {name!r} is already stored.")
        self._shards.add(tensors)
        self._names.update(tensors)

    def _finish(self) -> None:
        for name in self._quantization.per_layer:
            if name not in self._layers:
                raise CheckpointError(
                    f"quantization_config's per_layer names {name!r}, which was not added."
                )
        for name, rows in self._layers.items():
            shape = self._bias_rows.get(name, (rows,))
            if shape != (rows,):
                raise CheckpointError(
                    f"Tensor '{name}.bias' has shape {list(shape)}, not [{rows}]."
                )
        assert self._shards is not None
        self._shards.finish()
        (self.directory / CONFIG_FILE).write_text(self._config_text, encoding="utf-8")
