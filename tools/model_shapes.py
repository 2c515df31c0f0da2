"""Configurations of published models by name, for tools that make random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.json_file import read_json
from gqsa_compiler.models.registry import text_config

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_1B: Mapping[str, Any] = {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.2-1b": _LLAMA_1B,
        # With a vocabulary that keeps the head from hiding the layers.
        "llama-3.2-1b-32k": {**_LLAMA_1B, "vocab_size": 32000},
        "llama-2-7b": {
            **_LLAMA,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        "smollm2-135m": {
            **_LLAMA,
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
    }
)
"""The configurations that have a name."""


def shape_config(name: str) -> dict[str, Any]:
    """Return a named shape's configuration, or the one in a Hugging Face ``config.json``.

    Raises
    ------
    UsageError
        There is neither a shape nor a file of this name.
    """
    if name in SHAPES:
        return dict(SHAPES[name])
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise UsageError(
            f"{name} is neither a config.json nor one of the shapes {', '.join(SHAPES)}."
        )
    config = text_config(read_json(path), str(path))
    config.pop("quantization_config", None)
    return config
