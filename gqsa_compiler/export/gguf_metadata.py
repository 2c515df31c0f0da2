"""A model's configuration as GGUF's fields, and its tensors' names and order there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.rope import RopeParameters

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_MODEL_ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3": "GEMMA3"}


def architecture_name(config: DecoderConfig, where: str) -> str:
    """Return llama.cpp's name of the architecture.

    Raises
    ------
    ModelError
        llama.cpp has none that computes the same.
    """
    name = _ARCHITECTURES.get(config.model_type)
    windowed = config.sliding_window is not None and name != "gemma3"
    if name is None or windowed:
        what = "a sliding window" if windowed else f"the architecture {config.model_type!r}"
        raise ModelError(
            f"{where} has {what}, which gqsa does not export to GGUF; use --to dense and "
            "llama.cpp's converter."
        )
    return name


def add_metadata(writer: Any, config: DecoderConfig, name: str, where: str) -> None:
    """Add all fields of the model; see `gguf_tokenizer` for those of the tokenizer.

    Parameters
    ----------
    writer : gguf.GGUFWriter
    config : DecoderConfig
    name : str
        The model's.
    where : str
        For messages.

    Raises
    ------
    ModelError
        The rotary embedding is one that GGUF cannot say.
    """
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if writer.arch in ("llama", "qwen2", "qwen3"):
        writer.add_rope_dimension_count(config.head_dim)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.rope is None:
        raise ModelError(f"{where} has no rotary embedding, which GGUF's {writer.arch} has.")
    _add_rope(writer, config.rope, where)


def _add_rope(writer: Any, rope: RopeParameters, where: str) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("default", "llama3"):  # llama3: see `rope_factors`
        return
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
        return
    raise ModelError(
        f"{where} has a rotary embedding of kind {rope.kind!r}, which gqsa does not export to "
        "GGUF; use --to dense and llama.cpp's converter."
    )


def rope_factors(config: DecoderConfig) -> npt.NDArray[np.float32] | None:
    """Return the divisors of the frequencies that Llama 3's scaling has in GGUF, else None."""
    rope = config.rope
    if rope is None or rope.kind != "llama3":
        return None
    plain = RopeParameters("default", rope.theta).inverse_frequencies(config.head_dim)
    return (plain / rope.inverse_frequencies(config.head_dim)).astype(np.float32)


class TensorMap:
    """Names and order of a model's tensors in a GGUF file.

    Parameters
    ----------
    architecture : str
        As `architecture_name` gives it.
    config : DecoderConfig
    """

    def __init__(self, architecture: str, config: DecoderConfig) -> None:
        from gguf import MODEL_ARCH, get_tensor_name_map

        arch = getattr(MODEL_ARCH, _MODEL_ARCHITECTURES[architecture])
        self._names = get_tensor_name_map(arch, config.num_hidden_layers)
        self._architecture = architecture
        self._config = config

    def name(self, tensor: str) -> str:
        """Return GGUF's name of a tensor.

        Raises
        ------
        ModelError
            It has none.
        """
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"The tensor {tensor!r} has no name in a GGUF file.")
        return str(found)

    def arrange(self, tensor: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring rows that belong to a tensor into the order, and values into the form, of GGUF.

        Llama's q and k have the halves of each head interleaved; Gemma's norms are stored plus 1.
        """
        if self._architecture == "gemma3" and tensor.endswith("norm.weight"):
            return rows + np.ones((), rows.dtype)
        if self._architecture != "llama":
            return rows
        heads = 0
        if ".q_proj." in tensor:
            heads = self._config.num_attention_heads
        elif ".k_proj." in tensor:
            heads = self._config.num_key_value_heads
        if not heads:
            return rows
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)
