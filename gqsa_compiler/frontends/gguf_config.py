"""Translate a GGUF file's metadata to the fields of a Hugging Face configuration.

transformers' own table (`gguf_config_fields`) names most fields. It leaves out RoPE scaling and
some head sizes and ignores what it does not know; those are handled here, and what remains is an
error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends._transformers import gguf_config_fields
from gqsa_compiler.models.rope import RopeParameters

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}

# Metadata that repeats what another field says, or that only llama.cpp's own tools use.
_IRRELEVANT = frozenset(
    {
        "rope.scaling.finetuned",
        "attention.value_length",
        "attention.causal",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "attention.sliding_window_pattern",
        "tensor_data_layout",
    }
)
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_TOKENS_ENDING_A_TURN = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_gguf_config(reader: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """Read the model's configuration.

    Parameters
    ----------
    reader : gguf.GGUFReader
    path : Path
        For messages.

    Returns
    -------
    architecture : str
        GGUF's own name of it.
    config : dict
        Hugging Face fields, in transformers 5's spelling.

    Raises
    ------
    ModelError
        The architecture is not supported, or a field is not understood.
    """
    values = {name: field for name, field in reader.fields.items()}  # noqa: C416
    if "general.architecture" not in values:
        raise ModelError(f"{path} does not say its architecture (general.architecture).")
    arch = str(values["general.architecture"].contents())
    if arch not in _CLASSES:
        raise ModelError(
            f"{path} has the GGUF architecture {arch!r}; supported are {', '.join(_CLASSES)}."
        )
    names = gguf_config_fields(arch)
    config: dict[str, Any] = {
        "model_type": "gemma3_text" if arch == "gemma3" else arch,
        "architectures": [_CLASSES[arch]],
    }
    scaling: dict[str, Any] = {}
    for name, field in values.items():
        if not name.startswith(f"{arch}."):
            continue
        key = name[len(arch) + 1 :]
        if key == "attention.key_length":
            config["head_dim"] = field.contents()
        elif key in _SCALING:
            scaling[_SCALING[key]] = field.contents()
        elif key in names:
            hf_name = names[key]
            if hf_name is not None:
                config[hf_name] = field.contents()
        elif key not in _IRRELEVANT:
            raise ModelError(f"{path}: the field {name!r} is not understood.")
    for name, key in _TOKENS.items():
        if name in values:
            config[key] = values[name].contents()
    _add_turn_ends(config, values)
    if "vocab_size" not in config and "tokenizer.ggml.tokens" in values:
        config["vocab_size"] = len(values["tokenizer.ggml.tokens"].data)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "num_attention_heads" not in config or "hidden_size" not in config:
        raise ModelError(f"{path} lacks {arch}.attention.head_count or {arch}.embedding_length.")
    _check_biases(config, tensors, path)
    _add_rope(config, scaling, tensors.get("rope_freqs.weight"), path)
    return arch, config


def _add_turn_ends(config: dict[str, Any], values: dict[str, Any]) -> None:
    ids = {values[name].contents() for name in _TOKENS_ENDING_A_TURN if name in values}
    if ids and "eos_token_id" in config:
        config["eos_token_id"] = sorted({*ids, config["eos_token_id"]})


def _check_biases(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
    # Llama's GGUF has no field for biases: the tensors tell.
    if config["model_type"] == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
        if "blk.0.ffn_gate_inp.weight" in tensors:
            raise ModelError(f"{path} is a mixture of experts, which gqsa does not support.")


def _add_rope(config: dict[str, Any], scaling: dict[str, Any], factors: Any, path: Path) -> None:
    theta = config.pop("rope_theta", None)
    base: dict[str, Any] = {} if theta is None else {"rope_theta": float(theta)}
    if scaling.get("rope_type", "none") == "none":
        scaling = {}
    rope = {"rope_type": "default", **base, **scaling}
    if factors is not None:
        if scaling:
            raise ModelError(f"{path} has both rope_freqs and rope.scaling, which is ambiguous.")
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        rope = _llama3_scaling(
            np.asarray(factors.data, dtype=np.float64), base.get("rope_theta", 10000.0), head_dim
        )
        if rope == {}:
            raise ModelError(
                f"{path}: its rope_freqs.weight is not Llama 3's scaling and is not understood."
            )
    if config["model_type"] == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        config["rope_parameters"] = rope


def _llama3_scaling(
    factors: npt.NDArray[np.float64], theta: float, head_dim: int
) -> dict[str, Any]:
    """Find the ``llama3`` parameters that give these frequency divisors; {} if none do.

    llama.cpp's converter replaces the parameters by their effect, a divisor for each frequency.
    Every published Llama 3 has the original context 8192 and the band 1 to 4, so that the factor,
    the largest divisor, is all that is left to find.
    """
    factor = round(float(factors.max()), 4)
    plain = RopeParameters("default", theta)
    guess = RopeParameters("llama3", theta, factor, 8192, 1.0, 4.0)
    expected = plain.inverse_frequencies(head_dim) / guess.inverse_frequencies(head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        return {}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
