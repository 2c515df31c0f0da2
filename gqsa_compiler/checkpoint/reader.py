"""Read a GQSA checkpoint, one tensor at a time, trusting nothing in it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.config import QUANT_METHOD, QuantizationConfig
from gqsa_compiler.checkpoint.layer import BSRLayer
from gqsa_compiler.checkpoint.names import (
    CONFIG_FILE,
    INDEX_FILE,
    LAYER_TENSORS,
    MARKER,
    OPTIONAL_TENSORS,
    SINGLE_FILE,
    is_plain_shard_name,
    is_tied_head,
    layer_of,
    natural_key,
)
from gqsa_compiler.checkpoint.safetensors_file import (
    FLOAT_DTYPES,
    SafetensorsFile,
    TensorInfo,
    read_json_object,
)
from gqsa_compiler.checkpoint.validate import validate_layer
from gqsa_compiler.errors import CheckpointError, UsageError

MAX_JSON_BYTES = 100_000_000


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory whose config.json says ``quant_method: gqsa``."""
    try:
        config = _read_json(Path(path) / CONFIG_FILE)
    except CheckpointError:
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


class CheckpointReader:
    """An open GQSA checkpoint.

    Opening checks everything that costs no weight: config.json, the shards' headers, that every
    compressed layer is complete and agrees with the configuration.

    Parameters
    ----------
    path : path
        The checkpoint's directory.

    Attributes
    ----------
    path : Path
    config : dict
        The whole of config.json.
    quantization : QuantizationConfig
    layer_names : tuple of str
        Compressed layers in natural order (``layers.2`` before ``layers.10``).
    tensor_names : tuple of str
        Uncompressed tensors in natural order.

    Raises
    ------
    UsageError
        There is no such directory.
    CheckpointError
        A file is missing, truncated or malformed; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError(f"There is no directory {self.path}.")
        config_path = self.path / CONFIG_FILE
        self.config: dict[str, Any] = _read_json(config_path)
        if "quantization_config" not in self.config:
            raise CheckpointError(
                f"{config_path} has no quantization_config: this is not a GQSA checkpoint. "
                "Make one with `gqsa compress`."
            )
        try:
            self.quantization = QuantizationConfig.from_dict(self.config["quantization_config"])
        except CheckpointError as error:
            raise CheckpointError(f"{config_path}: {error}") from error
        with ExitStack() as stack:
            self._files = self._open_files(stack)
            layers: dict[str, set[str]] = {}
            plain = []
            for name in self._files:
                owner = layer_of(name)
                if owner:
                    layers.setdefault(owner[0], set()).add(owner[1])
                else:
                    plain.append(name)
            self.layer_names = tuple(sorted(layers, key=natural_key))
            for name in self.layer_names:
                self._check_layer_tensors(name, layers[name])
            markers = {f"{name}.{MARKER}" for name in layers}
            self.tensor_names = tuple(sorted(set(plain) - markers, key=natural_key))
            self._check_others()
            self._stack = stack.pop_all()

    def layer(self, name: str) -> BSRLayer:
        """Map one compressed layer and check it.

        Its arrays are read-only and memory-mapped; they live as long as somebody holds them.

        Raises
        ------
        KeyError
            There is no such layer.
        CheckpointError
            The layer breaks a rule of docs/format.md.
        """
        if name not in self.layer_names:
            raise KeyError(name)
        arrays = {
            part: self._map(f"{name}.{part}")
            for part in LAYER_TENSORS
            if f"{name}.{part}" in self._files
        }
        n, k = (int(size) for size in arrays["shape"])
        bits = self.quantization.scheme(name).bits
        width = arrays["qweight"].shape[1]
        layer = BSRLayer(
            name=name,
            shape=(n, k),
            group_size=8 * width // bits,
            indptr=arrays["indptr"],
            indices=arrays["indices"],
            qweight=arrays["qweight"],
            scales=arrays["scales"],
            qzeros=arrays.get("qzeros"),
            bits=bits,
            input_rms=arrays.get("input_rms"),
        )
        source = str(self._files[f"{name}.qweight"].path)
        validate_layer(layer, self.quantization, source=source)
        bias = f"{name}.bias"
        if bias in self._files and self._info(bias).shape != (n,):
            raise CheckpointError(
                f"Tensor {bias!r} in {self._files[bias].path} has shape "
                f"{list(self._info(bias).shape)}, not [{n}]."
            )
        return layer

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Map an uncompressed tensor, read-only: float16, float32 or `ml_dtypes.bfloat16`.

        Raises
        ------
        KeyError
            There is no such tensor.
        """
        if name not in self.tensor_names:
            raise KeyError(name)
        return self._map(name)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of any stored tensor (``P.qweight`` too) from the header alone.

        Raises
        ------
        KeyError
            There is no such tensor.
        """
        info = self._info(name)
        return info.shape, info.dtype

    @property
    def disk_bytes(self) -> int:
        """Bytes of the safetensors files."""
        files = {file.path: file.size for file in self._files.values()}
        return sum(files.values())

    def close(self) -> None:
        """Close the files; arrays already handed out stay valid."""
        self._stack.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        return self._files[name].tensors[name]

    def _map(self, name: str) -> npt.NDArray[Any]:
        return self._files[name].tensor(name)

    def _open_files(self, stack: ExitStack) -> dict[str, SafetensorsFile]:
        """Open every shard; return the file of each tensor."""
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{self.path} holds both {SINGLE_FILE} and {INDEX_FILE}; delete the stale one."
            )
        if not index.exists():
            if not single.exists():
                raise CheckpointError(f"{self.path} holds no {SINGLE_FILE} and no {INDEX_FILE}.")
            file = stack.enter_context(SafetensorsFile(single))
            return dict.fromkeys(file.tensors, file)
        weight_map = _weight_map(index)
        shards = {
            name: stack.enter_context(SafetensorsFile(self.path / name))
            for name in sorted(set(weight_map.values()))
        }
        for tensor, shard in weight_map.items():
            if tensor not in shards[shard].tensors:
                raise CheckpointError(f"{index} places {tensor!r} in {shard}, which lacks it.")
        for shard, file in shards.items():
            for tensor in file.tensors:
                if weight_map.get(tensor) != shard:
                    raise CheckpointError(f"{file.path} holds {tensor!r}, against {index}.")
        return {tensor: shards[shard] for tensor, shard in weight_map.items()}

    def _check_layer_tensors(self, name: str, parts: set[str]) -> None:
        """Check what the headers tell of a layer: complete, of the right dtypes and ranks."""
        where = f"Layer {name!r} in {self._files[f'{name}.{min(parts)}'].path}"
        missing = [p for p in LAYER_TENSORS if p not in parts and p not in OPTIONAL_TENSORS]
        if missing:
            raise CheckpointError(f"{where} lacks the tensor {name}.{missing[0]}.")
        marker = f"{name}.{MARKER}"
        if marker in self._files and not is_marker(self._info(marker)):
            raise CheckpointError(f"{where} is stored compressed and as {marker}; keep one.")
        qweight = self._info(f"{name}.qweight")
        if len(qweight.shape) != 2:
            raise CheckpointError(f"{where} is not valid: qweight is not a matrix.")
        shape = self._info(f"{name}.shape")
        if shape.dtype != np.int64 or shape.shape != (2,):
            raise CheckpointError(f"{where} is not valid: shape is not int64 [2].")

    def _check_others(self) -> None:
        for name in self.tensor_names:
            info = self._info(name)
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"Tensor {name!r} in {self._files[name].path} has dtype {info.dtype}; "
                    "an uncompressed tensor is float16, bfloat16 or float32."
                )
        for name in self.quantization.per_layer:
            if name not in self.layer_names:
                raise CheckpointError(
                    f"{self.path / CONFIG_FILE}: per_layer names {name!r}, which is not a "
                    "compressed layer."
                )
        for name in self.quantization.ignore:
            if name in self.layer_names:
                raise CheckpointError(
                    f"{self.path / CONFIG_FILE}: ignore names {name!r}, which is compressed."
                )
        for name in self._files:
            if is_tied_head(self.config, name):
                raise CheckpointError(
                    f"{self._files[name].path} holds {name!r}, but config.json says "
                    "tie_word_embeddings: the embedding is the output head."
                )


def is_marker(info: TensorInfo) -> bool:
    """Whether a ``P.weight`` is the marker of a compressed layer: uint8 [0]."""
    return info.dtype == np.uint8 and info.shape == (0,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is not read.")
    return read_json_object(text, str(path))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    for shard in weight_map.values():
        if not is_plain_shard_name(shard):
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not a plain .safetensors file name; "
                "it is not opened."
            )
    return weight_map
