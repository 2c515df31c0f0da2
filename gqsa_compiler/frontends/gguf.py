"""Models in a GGUF file, through transformers' tables of names, fields and conversions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends._transformers import (
    gguf_tensor_processor,
    gguf_tokenizer_splits,
    gguf_weight_names,
)
from gqsa_compiler.frontends.gguf_config import read_gguf_config
from gqsa_compiler.frontends.gguf_header import check_header
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.tokenizer import save_transformers_tokenizer
from gqsa_compiler.models.registry import text_config

# Tensors that are no parameter of the transformers model: this one is in the configuration.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight"})

# Values of tokenizer.ggml.pre: GPT-2's regular expression, and the same after single digits.
_LIKE_GPT2 = frozenset({"default", "gpt-2"})
_DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "minerva-7b"})

_HALF_DTYPES: dict[str, npt.DTypeLike] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}


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
        check_header(path)
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

        fields = {key: value for key, value in self.config.items() if key != "model_type"}
        try:
            config = AutoConfig.for_model(self.config["model_type"], **fields)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:
            # transformers checks sizes against each other and raises its validator's own classes.
            raise ModelError(
                f"{self.path}: transformers refuses its configuration: {error}"
            ) from error
        names = gguf_weight_names(model, self._processor)
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
        return gguf_tensor_processor(self._architecture, self.config)

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

    def dtype(self, name: str) -> str:
        """See `ModelSource.dtype`."""
        return np.dtype(self._dtype(self._lookup(name))).name

    @staticmethod
    def _dtype(tensor: Any) -> npt.DTypeLike:
        return _HALF_DTYPES.get(tensor.tensor_type.name, np.float32)

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
        return np.ascontiguousarray(processed, dtype=self._dtype(tensor))

    def stored_type(self, name: str) -> str:
        """Return GGUF's name of a tensor's type, e.g. ``Q4_0``."""
        return str(self._lookup(name).tensor_type.name)

    def stored_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Map a quantised tensor as it is stored, uint8 [N, bytes of a row]."""
        return np.asarray(self._lookup(name).data)

    def in_order(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring rows of a stored matrix, such as its codes, into transformers' order."""
        stored = self._lookup(name).name
        return np.asarray(self._processor.process(weights=rows, name=stored).weights)

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
        self._split_as_trained(tokenizer.backend_tokenizer)
        save_transformers_tokenizer(tokenizer, directory, self.config, {})

    def _split_as_trained(self, tokenizer: Any) -> None:
        """Split text before byte-pair encoding as the vocabulary's merges were learned.

        transformers knows most of GGUF's names for it and silently uses GPT-2's way for others,
        which encodes, say, a number after an empty line differently.
        """
        from tokenizers import pre_tokenizers

        kind, way = (
            str(self._reader.fields[name].contents()) if name in self._reader.fields else "default"
            for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        )
        if way in _DIGITS_ALONE:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif kind == "gpt2" and way not in _LIKE_GPT2 and way not in gguf_tokenizer_splits():
            raise ModelError(
                f"{self.path}: text is split in the way {way!r} (tokenizer.ggml.pre), which is not "
                "understood; use the model's safetensors directory."
            )
