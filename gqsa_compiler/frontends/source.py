"""What every frontend gives of a model: its configuration, weights and tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

if TYPE_CHECKING:
    from gqsa_compiler.checkpoint import CompressedLayers

READS = (
    "gqsa reads dense safetensors models (float16, bfloat16, float32), GPTQ, AWQ and "
    "compressed-tensors checkpoints, GGUF files and GQSA checkpoints"
)


class ModelSource(ABC):
    """A model's configuration, weights and tokenizer, wherever they are stored.

    Attributes
    ----------
    kind : str
        ``hf`` (dense safetensors), ``gguf``, ``gqsa`` or ``quantised`` (by another program).
    name : str
        A short name for reports.
    path : Path
        The directory or file.
    config : dict
        The Hugging Face configuration fields of the (text) model.
    checkpoint : CompressedLayers or None
        The compressed layers of a ``gqsa`` or ``quantised`` model; None for the other kinds.
    """

    kind: Literal["hf", "gguf", "gqsa", "quantised"]
    name: str
    path: Path
    config: dict[str, Any]
    checkpoint: CompressedLayers | None = None

    @abstractmethod
    def tensor_names(self) -> tuple[str, ...]:
        """List the Hugging Face names of all weights, compressed ones as ``P.weight``."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it.

        Raises
        ------
        ModelError
            The model has no such tensor.
        """

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Return the dtype that `tensor` gives, without reading it: ``float16`` and so on.

        Raises
        ------
        ModelError
            The model has no such tensor, or its stored dtype is not a float one.
        """

    @abstractmethod
    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor (float32, float16 or bfloat16); a compressed one is decoded to float32.

        Raises
        ------
        ModelError
            The model has no such tensor, or its stored dtype is not a float one.
        """

    @property
    @abstractmethod
    def disk_bytes(self) -> int:
        """Bytes of the files that hold the weights."""

    @abstractmethod
    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer into the existing `directory`.

        Writes ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` if the model
        has one, and ``generation_config.json``, whose ``eos_token_id`` is the sorted union of
        what the model's files name.

        Raises
        ------
        ModelError
            The model comes without a tokenizer.
        """

    def __repr__(self) -> str:
        """Show the kind and the place."""
        return f"{type(self).__name__}({str(self.path)!r})"


__all__ = ["READS", "ModelSource"]
