"""What every exporter works on: a source with compressed layers, and what it writes to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, CompressedLayers, symmetric_zero
from gqsa_compiler.checkpoint.names import is_tied_head
from gqsa_compiler.checkpoint.shards import ShardWriter
from gqsa_compiler.checkpoint.writer import DEFAULT_SHARD_BYTES
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.progress import Progress

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class CompressedModel:
    """A model to export.

    Parameters
    ----------
    source : ModelSource
    layers : CompressedLayers
        Those of the source.
    progress : callable
        Called as ``progress(stage, done, total)``.
    """

    source: ModelSource
    layers: CompressedLayers
    progress: Progress

    @property
    def where(self) -> str:
        """The model, for messages."""
        return str(self.source.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the compressed layers."""
        return self.layers.layer_names

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Names of all other tensors."""
        taken = {f"{name}.weight" for name in self.names}
        return tuple(
            name
            for name in self.source.tensor_names()
            if name not in taken and not is_tied_head(self.source.config, name)
        )

    def each_layer(self, stage: str) -> Iterator[BSRLayer]:
        """Go through the compressed layers."""
        for done, name in enumerate(self.names):
            self.progress(stage, done, len(self.names))
            yield self.layers.layer(name)
        self.progress(stage, len(self.names), len(self.names))

    def each_plain(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Go through the other tensors."""
        for name in self.plain:
            yield name, self.source.tensor(name)

    def config(self, **fields: Any) -> dict[str, Any]:
        """Return config.json without what it says about GQSA's own storage, and with `fields`."""
        kept = {k: v for k, v in self.source.config.items() if k != "quantization_config"}
        kept.pop("torch_dtype", None)
        return {**kept, **fields}


@dataclass
class DirectoryOutput:
    """A Hugging Face directory that is being written.

    Parameters
    ----------
    directory : Path
        Exists and is empty.
    """

    directory: Path
    bytes: int = 0
    _shards: ShardWriter = field(init=False)

    def __post_init__(self) -> None:
        """Begin the first shard."""
        self._shards = ShardWriter(self.directory, DEFAULT_SHARD_BYTES)

    def add(self, tensors: Arrays) -> None:
        """Write tensors, which share a shard."""
        self.bytes += sum(array.nbytes for array in tensors.values())
        self._shards.add(tensors)

    def finish(self, source: ModelSource, config: Mapping[str, Any]) -> None:
        """Complete the weights; write config.json and the tokenizer."""
        self._shards.finish()
        write_json(self.directory / "config.json", config)
        source.save_tokenizer(self.directory)

    def close(self) -> None:
        """Close what an error left open."""
        self._shards.close()


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def full_matrix(
    layer: BSRLayer, size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Unpack a layer with all its groups, in smaller ones if need be.

    Absent groups have the middle code and zero point, and the scale 1: their weights are 0.

    Parameters
    ----------
    layer : BSRLayer
    size : int
        Columns of a group; divides the layer's own group size.

    Returns
    -------
    codes : uint8 [N, K]
    scales : float16 [N, K / size]
    zeros : uint8 [N, K / size]
    """
    n, k = layer.shape
    count, middle = k // layer.group_size, symmetric_zero(layer.bits)
    codes = np.full((n, count, layer.group_size), middle, np.uint8)
    scales = np.ones((n, count), np.float16)
    zeros = np.full((n, count), middle, np.uint8)
    rows = np.repeat(np.arange(n), np.diff(layer.indptr))
    codes[rows, layer.indices] = layer.codes()
    scales[rows, layer.indices] = layer.scales
    zeros[rows, layer.indices] = layer.zeros()
    times = layer.group_size // size
    return codes.reshape(n, k), scales.repeat(times, axis=1), zeros.repeat(times, axis=1)


def pack_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack uint8 [R, n] into int32 [R, ceil(n * bits / 32)], each row one stream of bits."""
    from gqsa_compiler.checkpoint import pack_codes

    rows, count = codes.shape
    spare = -count % 32
    if spare:
        codes = np.concatenate([codes, np.zeros((rows, spare), np.uint8)], axis=1)
    words = pack_codes(codes, bits).view("<i4")
    return np.ascontiguousarray(words[:, : -(-count * bits // 32)]).astype(np.int32, copy=False)
