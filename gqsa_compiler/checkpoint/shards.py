"""Write safetensors shards as a stream: one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.names import INDEX_FILE, shard_file
from gqsa_compiler.checkpoint.safetensors_file import DTYPES, METADATA_KEY

_COPY_BYTES = 8 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor in the spool file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardWriter:
    """Writes tensors into ``model*.safetensors`` of a directory, and the index if it needs one.

    A header comes before the data and tells its size, so each shard's data is spooled to a file
    first, then copied behind the header, largest item size first: every tensor is then aligned.

    Parameters
    ----------
    directory : Path
        Exists; nothing else writes ``model*`` files there.
    shard_bytes : int
        Most bytes of tensor data in a shard; a tensor (or batch) beyond it gets a shard alone.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._spool: BinaryIO | None = None
        self._entries: list[_Entry] = []
        self._used = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: dict[str, npt.NDArray[Any]]) -> None:
        """Append tensors, all in one shard. Names are new, dtypes of the container."""
        nbytes = sum(array.nbytes for array in tensors.values())
        if self._entries and self._used + nbytes > self._shard_bytes:
            self._finish_shard()
        if self._spool is None:
            self._spool = self._spool_path.open("w+b")
        for name, array in tensors.items():
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._spool.write(data.data)
            entry = _Entry(name, array.dtype, array.shape, self._used, data.nbytes)
            self._entries.append(entry)
            self._used += data.nbytes

    def finish(self) -> None:
        """Complete the last shard, give the shards their names and write the index."""
        if self._entries or not self._shards:
            self._finish_shard()
        total = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            file = shard_file(number, total)
            self._part_path(number).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        if total > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / INDEX_FILE).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the spool file of an unfinished shard."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    @property
    def _spool_path(self) -> Path:
        return self._directory / "model.spool"

    def _part_path(self, number: int) -> Path:
        return self._directory / f"model-{number:05d}.part"

    def _finish_shard(self) -> None:
        # Stable: tensors of one item size stay in the order they came.
        order = sorted(self._entries, key=lambda entry: -entry.dtype.itemsize)
        with self._part_path(len(self._shards) + 1).open("wb") as out:
            out.write(_header(order))
            for entry in order:
                self._copy(entry, out)
            out.flush()
            os.fsync(out.fileno())  # a full disk or quota may show only here
        self.close()
        self._spool_path.unlink(missing_ok=True)
        self._shards.append([entry.name for entry in order])
        self._total += self._used
        self._entries, self._used = [], 0

    def _copy(self, entry: _Entry, out: BinaryIO) -> None:
        assert self._spool is not None
        self._spool.seek(entry.offset)
        left = entry.nbytes
        while left:
            data = self._spool.read(min(left, _COPY_BYTES))
            if not data:
                raise OSError(f"{self._spool_path} became shorter while it was read")
            out.write(data)
            left -= len(data)


def _header(order: list[_Entry]) -> bytes:
    # transformers refuses a file whose metadata does not name a framework.
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    position = 0
    for entry in order:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
