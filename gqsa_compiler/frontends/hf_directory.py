"""Models stored as a Hugging Face directory: dense safetensors, and GQSA checkpoints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.names import INDEX_FILE, SINGLE_FILE
from gqsa_compiler.checkpoint.safetensors_file import DTYPES, FLOAT_DTYPES
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.json_file import read_json
from gqsa_compiler.frontends.source import READS, ModelSource
from gqsa_compiler.frontends.tokenizer import save_directory_tokenizer
from gqsa_compiler.models.registry import text_config

# Text decoders sit under other names in checkpoints of a bare decoder or of a multimodal model.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_BARE_ROOTS = ("embed_tokens.", "layers.", "norm.", "decoder.")
# Parts of a multimodal model that a text decoder does not have.
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "visual.",
                 "model.multi_modal_projector.")  # fmt: skip


def canonical_name(stored: str) -> str | None:
    """Return the name that the text model itself gives a stored tensor; None for other towers."""
    if stored.startswith(_OTHER_TOWERS):
        return None
    for prefix, replacement in _PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    if stored.startswith(_BARE_ROOTS):
        return f"model.{stored}"
    return stored


class SafetensorsFiles:
    """The tensors of a directory's safetensors files, read one at a time.

    Parameters
    ----------
    directory : Path
        With ``model.safetensors``, shards and ``model.safetensors.index.json``, or any other
        ``*.safetensors``.

    Raises
    ------
    ModelError
        No weights, only pickled ones, a file that is truncated or missing, or two files that may
        both be meant.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.files = self._find_files()
        self._handles = {path: self._open(path) for path in self.files}
        self._where: dict[str, Path] = {}
        for path, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118
                if self._where.setdefault(name, path) != path:
                    raise ModelError(
                        f"{self._where[name]} and {path.name} beside it both hold {name!r}; delete "
                        "the file that does not belong to the model."
                    )

    def _find_files(self) -> tuple[Path, ...]:
        single, index = self._directory / SINGLE_FILE, self._directory / INDEX_FILE
        if index.is_file():
            names = _indexed(index)
            if single.is_file() and single.name not in names:
                raise ModelError(self._which_is_stale(names))
            for name in names:
                if not self._has(name):
                    raise ModelError(
                        f"{self._directory / name} is missing, although {index.name} "
                        "names it; the model was not copied or downloaded completely."
                    )
            return tuple(self._directory / name for name in names)
        if single.is_file():
            return (single,)
        files = tuple(sorted(self._directory.glob("*.safetensors")))
        if files:
            return files
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth")
                   for p in sorted(self._directory.glob(pattern))]  # fmt: skip
        if pickled:
            raise ModelError(
                f"{self._directory} has its weights only as {pickled[0]}, a pickle file, which "
                "gqsa does not load because it can run code; save the model with "
                "save_pretrained(..., safe_serialization=True) first."
            )
        raise ModelError(f"{self._directory} holds no *.safetensors weights; {READS}.")

    def _has(self, name: str) -> bool:
        """Whether there is a file that an index names: it is untrusted, and may only name these."""
        return Path(name).name == name and (self._directory / name).is_file()

    def _which_is_stale(self, names: tuple[str, ...]) -> str:
        """Say what to do about an index beside a single file; transformers would read the file."""
        remedy = f"delete {INDEX_FILE}, whose files are not there"
        if any(map(self._has, names)):
            remedy = (
                f"delete what is left over: {SINGLE_FILE}, or {INDEX_FILE} with its files "
                f"({names[0]} ...)"
            )
        return (
            f"{self._directory} holds both {SINGLE_FILE} and {INDEX_FILE}, which names other "
            f"files; {remedy}."
        )

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ModelError(f"{path} is not a file; copy or download it again.")
        try:
            return safe_open(path, "np")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is truncated or damaged ({error}); copy or download it again."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """The stored names of all tensors."""
        return tuple(self._where)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and its dtype as safetensors writes it (``F32``, ``BF16``)."""
        part = self._handles[self._where[name]].get_slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor."""
        array: npt.NDArray[Any] = self._handles[self._where[name]].get_tensor(name)
        return array

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._where[name]


def _indexed(index: Path) -> tuple[str, ...]:
    """Return the files that an index names."""
    try:
        return tuple(sorted(set(map(str, read_json(index)["weight_map"].values()))))
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{index} has no usable weight_map: {error!r}.") from error


class HFSource(ModelSource):
    """A dense model in a Hugging Face directory.

    Parameters
    ----------
    path : Path
    name : str
    config : dict
        The parsed ``config.json``.

    Raises
    ------
    ModelError
        An architecture or a field that is not understood, or unreadable weights.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any]) -> None:
        self.kind = "hf"
        self.path = path
        self.name = name
        self.config = text_config(config, str(path / "config.json"))
        self._files = SafetensorsFiles(path)
        self.stored_names = self._files.names

    @cached_property
    def _stored(self) -> dict[str, str]:
        named = ((canonical_name(stored), stored) for stored in self.stored_names)
        return {name: stored for name, stored in named if name is not None}

    def tensor_names(self) -> tuple[str, ...]:
        """See `ModelSource.tensor_names`."""
        return tuple(self._stored)

    def _lookup(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise ModelError(f"{self.path} has no tensor {name!r}.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelSource.shape`."""
        return self._files.shape_dtype(self._lookup(name))[0]

    def dtype(self, name: str) -> str:
        """See `ModelSource.dtype`."""
        stored = self._lookup(name)
        word = self._files.shape_dtype(stored)[1]
        dtype = DTYPES.get(word)
        if dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self._files.file_of(stored)}: {stored} is stored as {word}; {READS}."
            )
        return str(dtype)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """See `ModelSource.tensor`."""
        self.dtype(name)  # refuses what is no float
        return self._files.read(self._lookup(name))

    @property
    def disk_bytes(self) -> int:
        """See `ModelSource.disk_bytes`."""
        return sum(path.stat().st_size for path in self._files.files)

    def save_tokenizer(self, directory: Path) -> None:
        """See `ModelSource.save_tokenizer`."""
        save_directory_tokenizer(self.path, directory, self.config)


class GQSASource(ModelSource):
    """A GQSA checkpoint; its compressed layers are decoded when `tensor` asks for them.

    Parameters
    ----------
    path : Path
    name : str
    config : dict
        The parsed ``config.json``.

    Raises
    ------
    CheckpointError
        The checkpoint breaks its specification.
    ModelError
        An architecture or a field that is not understood.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any]) -> None:
        from gqsa_compiler.checkpoint import CheckpointReader

        self.kind = "gqsa"
        self.path = path
        self.name = name
        self.config = text_config(config, str(path / "config.json"))
        self.checkpoint: CheckpointReader = CheckpointReader(path)

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """Weight name -> the compressed layer it belongs to, None when it is stored as it is."""
        names: dict[str, str | None] = dict.fromkeys(self.checkpoint.tensor_names)
        names.update((f"{layer}.weight", layer) for layer in self.checkpoint.layer_names)
        return names

    def _layer_of(self, name: str) -> str | None:
        try:
            return self._names[name]
        except KeyError:
            raise ModelError(f"{self.path} has no tensor {name!r}.") from None

    def tensor_names(self) -> tuple[str, ...]:
        """See `ModelSource.tensor_names`."""
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelSource.shape`."""
        layer = self._layer_of(name)
        if layer is None:
            return tuple(self.checkpoint.shape_dtype(name)[0])
        return self.checkpoint.layer(layer).shape

    def dtype(self, name: str) -> str:
        """See `ModelSource.dtype`."""
        if self._layer_of(name) is not None:
            return "float32"
        return str(self.checkpoint.shape_dtype(name)[1].name)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """See `ModelSource.tensor`."""
        from gqsa_compiler.checkpoint import to_dense

        layer = self._layer_of(name)
        if layer is None:
            return np.asarray(self.checkpoint.tensor(name))
        return np.asarray(to_dense(self.checkpoint.layer(layer)))

    @property
    def disk_bytes(self) -> int:
        """See `ModelSource.disk_bytes`."""
        return self.checkpoint.disk_bytes

    def save_tokenizer(self, directory: Path) -> None:
        """See `ModelSource.save_tokenizer`."""
        save_directory_tokenizer(self.path, directory, self.config)
