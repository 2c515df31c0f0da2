"""The supported architectures: one record each, everything about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.families import (
    Gemma3Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)
from gqsa_compiler.models.tensors import (
    NamedShape,
    gemma3_tensors,
    llama_tensors,
    opt_tensors,
    qwen3_tensors,
)


@dataclass(frozen=True)
class Architecture:
    """Everything about one architecture.

    Parameters
    ----------
    model_type : str
        As ``config.json`` says it.
    config : type
        Reads and checks the configuration.
    module, model_name : str
        Where the definition is. It is imported when it is asked for, since it loads TVM.
    tensors : callable
        Gives the names and shapes of a configuration's weights.
    """

    model_type: str
    config: type[DecoderConfig]
    module: str
    model_name: str
    tensors: Callable[[DecoderConfig], Iterator[NamedShape]]

    def load_model_class(self) -> Any:
        """Import the definition: a subclass of `nn.Module` that takes (config, context_length)."""
        return getattr(importlib.import_module(self.module), self.model_name)


_PACKAGE = "gqsa_compiler.models"

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        record.model_type: record
        for record in (
            Architecture(
                "llama", LlamaConfig, f"{_PACKAGE}.llama", "LlamaForCausalLM", llama_tensors
            ),
            Architecture(
                "mistral", MistralConfig, f"{_PACKAGE}.llama", "LlamaForCausalLM", llama_tensors
            ),
            Architecture(
                "qwen2", Qwen2Config, f"{_PACKAGE}.llama", "LlamaForCausalLM", llama_tensors
            ),
            Architecture(
                "qwen3", Qwen3Config, f"{_PACKAGE}.qwen3", "Qwen3ForCausalLM", qwen3_tensors
            ),
            Architecture(
                "gemma3_text",
                Gemma3Config,
                f"{_PACKAGE}.gemma3",
                "Gemma3ForCausalLM",
                gemma3_tensors,
            ),
            Architecture("opt", OPTConfig, f"{_PACKAGE}.opt", "OPTForCausalLM", opt_tensors),
        )
    }
)
"""Every supported ``model_type``, in the order of documentation."""


def architecture(model_type: Any, where: str) -> Architecture:
    """Look up a ``model_type``.

    Parameters
    ----------
    model_type : Any
        What the configuration says.
    where : str
        The file, for the message.

    Raises
    ------
    ModelError
        It is not supported; the message lists those that are.
    """
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if model_type == "gqsa_module":
        raise ModelError(
            f"{where} is that of a module, not of a language model; gqsa compile takes it "
            "(docs/modules.md)."
        )
    if found is None:
        said = f"says model_type {model_type!r}" if model_type else "has no model_type"
        raise ModelError(f"{where} {said}; supported are {', '.join(ARCHITECTURES)}.")
    return found


def parse_config(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read and check a text model's configuration.

    Raises
    ------
    ModelError
        The architecture, a field or a field's value is not supported.
    """
    return architecture(config.get("model_type"), where).config.from_dict(config)


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration of the text decoder, checked.

    For a multimodal Gemma 3 this is its ``text_config``, with the token ids and the tying of the
    whole; for other models the configuration itself.

    Raises
    ------
    ModelError
        As `parse_config`.
    """
    text = dict(config)
    nested = config.get("text_config")
    if config.get("model_type") == "gemma3" and isinstance(nested, dict):
        text = {"model_type": "gemma3_text", **nested, "architectures": ["Gemma3ForCausalLM"]}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
                     "quantization_config", "torch_dtype", "dtype"):  # fmt: skip
            if config.get(name) is not None:
                text[name] = config[name]
    parse_config(text, where)
    return text
