"""Models in a GGUF file, through transformers' tables of names, fields and conversions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.gguf_config import read_gguf_config
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.tokenizer import save_transformers_tokenizer
from gqsa_compiler.models.registry import text_config

# Tensors that are no parameter of the transformers model: this one is in the configuration.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight"})


class GGUFSource(ModelSource):
    """A GGUF file, its tensors dequantised one at a time.

    Parameters
    ----------
    path : Path
    name : str

    Raises
    ------
    ModelError
        The file is damaged, or its architecture or one of its fields is not understood.
    """

    def __init__(self, path: Path, name: str) -> None:
        from gguf import GGUFReader

        self.kind = "gguf"
        self.path = path
        self.name = name
        try:
            self._reader = GGUFReader(path)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
            # The reader maps the file as it goes and fails wherever the bytes run out.
            raise ModelError(
                f"{path} is truncated or damaged ({error}); copy or download it again."
            ) from error
        self._architecture, fields = read_gguf_config(self._reader, path)
        self.config = text_config(fields, str(path))

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """Hugging Face name -> the reader's tensor."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        fields = {key: value for key, value in self.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.config["model_type"], **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = get_gguf_hf_weights_map(model, self._processor)
        tensors = {t.name: t for t in self._reader.tensors if t.name not in _NOT_WEIGHTS}
        unknown = sorted(set(tensors) - set(names))
        if unknown:
            raise ModelError(
                f"{self.path}: the {self._architecture} tensor {unknown[0]!r} is not understood."
            )
        return {names[name]: tensor for name, tensor in tensors.items()}

    @cached_property
    def _processor(self) -> Any:
        """Undoes what the conversion to GGUF did to a tensor (rotary order, Gemma's norms)."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        return TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=self.config)

    def _lookup(self, name: str) -> Any:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(f"{self.path} has no tensor {name!r}.") from None

    def tensor_names(self) -> tuple[str, ...]:
        """See `ModelSource.tensor_names`."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelSource.shape`."""
        # GGUF writes the fastest axis first.
        return tuple(int(size) for size in reversed(self._lookup(name).shape))

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """See `ModelSource.tensor`; quantised tensors are decoded to float32."""
        from gguf import dequantize

        tensor = self._lookup(name)
        try:
            weights = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, "
                "which the gguf package cannot decode."
            ) from error
        processed = self._processor.process(weights=weights, name=tensor.name).weights
        return np.ascontiguousarray(processed, dtype=np.float32)

    @property
    def disk_bytes(self) -> int:
        """See `ModelSource.disk_bytes`."""
        return self.path.stat().st_size

    def save_tokenizer(self, directory: Path) -> None:
        """See `ModelSource.save_tokenizer`."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:
            raise ModelError(
                f"{self.path}: transformers cannot convert its tokenizer: {error}"
            ) from error
        save_transformers_tokenizer(tokenizer, directory, self.config, {})
