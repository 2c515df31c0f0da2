"""The configuration of each supported family: its fields, its defaults, what must be neutral.

Kept apart from the model definitions, so that a configuration is checked without loading TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gqsa_compiler.models.config import (
    MAX_LAYERS,
    DecoderConfig,
    LayerKind,
    read_activation,
    read_common,
    read_layer_types,
)
from gqsa_compiler.models.fields import FieldReader
from gqsa_compiler.models.rope import RopeParameters, combine_rope, read_rope


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Llama 1 to 3, SmolLM and whatever else calls itself ``llama``."""

    model_type: ClassVar[str] = "llama"
    defaults: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 2048}

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        common = read_common(fields)
        bias = fields.boolean("attention_bias", False)
        # Neither is read by transformers: how the pre-training split its matrices, and an old
        # name of max_position_embeddings.
        fields.ignore(["pretraining_tp", "max_sequence_length"])
        fields.neutral("rope_interleaved", False, None)
        return {
            **common,
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": fields.boolean("mlp_bias", False),
            "rope": read_rope(fields, common["max_position_embeddings"]),
            "layer_kinds": ("full",) * common["num_hidden_layers"],
        }


@dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """Mistral 7B and its relatives: Llama with a window over every layer."""

    model_type: ClassVar[str] = "mistral"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        common = read_common(fields)
        window = fields.optional_integer("sliding_window")
        kind: LayerKind = "full" if window is None else "sliding"
        return {
            **common,
            "rope": read_rope(fields, common["max_position_embeddings"]),
            "sliding_window": window,
            "layer_kinds": (kind,) * common["num_hidden_layers"],
        }


_QWEN_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _read_qwen_windows(fields: FieldReader, num_layers: int) -> dict[str, Any]:
    window = fields.optional_integer("sliding_window")
    if not fields.boolean("use_sliding_window", False):
        window = None
    first = fields.integer("max_window_layers", minimum=0)
    kinds = read_layer_types(
        fields,
        num_layers,
        tuple("full" if window is None or i < first else "sliding" for i in range(num_layers)),
    )
    if "sliding" not in kinds:
        return {"sliding_window": None, "layer_kinds": kinds}
    if window is None:
        raise fields.error("layer_types", "has sliding layers, but no window is in use")
    return {"sliding_window": window, "layer_kinds": kinds}


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """Qwen 2 and 2.5: biases on q, k and v; windows in the upper layers, if at all."""

    model_type: ClassVar[str] = "qwen2"
    defaults: ClassVar[Mapping[str, Any]] = _QWEN_DEFAULTS

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        common = read_common(fields)
        # Written by Qwen2.5's own configurations; the text models set it to false.
        fields.neutral("use_mrope", False, None)
        return {
            **common,
            **_read_qwen_windows(fields, common["num_hidden_layers"]),
            "qkv_bias": True,
            "rope": read_rope(fields, common["max_position_embeddings"]),
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Qwen 3: every head of q and k is normalised before it is rotated."""

    model_type: ClassVar[str] = "qwen3"
    defaults: ClassVar[Mapping[str, Any]] = {**_QWEN_DEFAULTS, "head_dim": 128}

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        common = read_common(fields)
        bias = fields.boolean("attention_bias", False)
        return {
            **common,
            **_read_qwen_windows(fields, common["num_hidden_layers"]),
            "qkv_bias": bias,
            "output_bias": bias,
            "rope": read_rope(fields, common["max_position_embeddings"]),
        }


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """Gemma 3's text decoder: windowed layers with their own RoPE between full ones.

    Parameters
    ----------
    final_logit_softcapping : float or None
        Logits are ``cap * tanh(logits / cap)``.
    """

    model_type: ClassVar[str] = "gemma3_text"
    # A multimodal checkpoint's text_config holds only what differs from these.
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    final_logit_softcapping: float | None = None

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        # Gemma's own configurations also carry "hidden_act", which transformers does not read.
        fields.ignore(["hidden_act"])
        common = read_common(fields, "hidden_activation")
        bias = fields.boolean("attention_bias", False)
        fields.neutral("attn_logit_softcapping", None)
        fields.neutral("use_bidirectional_attention", False, None)
        fields.ignore(["cache_implementation"])
        cap = fields.raw("final_logit_softcapping", None)
        kinds = cls._read_layer_kinds(fields, common["num_hidden_layers"])
        rope, rope_local = _read_gemma_rope(fields, common["max_position_embeddings"])
        return {
            **common,
            "attention_scale": fields.number("query_pre_attn_scalar", above=0.0) ** -0.5,
            "qkv_bias": bias,
            "output_bias": bias,
            "sliding_window": fields.integer("sliding_window") if "sliding" in kinds else None,
            "layer_kinds": kinds,
            "rope": rope,
            "rope_local": rope_local,
            "final_logit_softcapping": (
                None if cap is None else fields.number("final_logit_softcapping", above=0.0)
            ),
        }

    @staticmethod
    def _read_layer_kinds(fields: FieldReader, num_layers: int) -> tuple[LayerKind, ...]:
        # transformers 5 writes the pattern with an underscore, beside layer_types.
        pattern = fields.integer("_sliding_window_pattern", 6)
        pattern = fields.integer("sliding_window_pattern", pattern)
        fields.ignore(["sliding_window"])
        default: tuple[LayerKind, ...] = tuple(
            "sliding" if (i + 1) % pattern else "full" for i in range(num_layers)
        )
        return read_layer_types(fields, num_layers, default)


def _read_gemma_rope(
    fields: FieldReader, max_positions: int
) -> tuple[RopeParameters, RopeParameters]:
    both = fields.raw("rope_parameters", None)
    both = {} if both is None else both
    if not isinstance(both, dict) or set(both) - {"full_attention", "sliding_attention"}:
        raise fields.error(
            "rope_parameters", "must have full_attention and sliding_attention, and nothing else"
        )
    full = combine_rope(
        fields,
        both.get("full_attention"),
        fields.raw("rope_scaling", None),
        theta_field="rope_theta",
        default_theta=1_000_000.0,
        max_positions=max_positions,
    )
    # Scaling in the older spelling is that of the full layers alone.
    sliding = combine_rope(
        fields,
        both.get("sliding_attention"),
        None,
        theta_field="rope_local_base_freq",
        default_theta=10_000.0,
        max_positions=max_positions,
    )
    return full, sliding


@dataclass(frozen=True, kw_only=True)
class OPTConfig(DecoderConfig):
    """OPT: learned positions, LayerNorm, biases everywhere, a plain two-layer MLP."""

    model_type: ClassVar[str] = "opt"

    @classmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """See `DecoderConfig.read`."""
        hidden = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        if hidden % heads:
            raise fields.error("hidden_size", f"= {hidden} is not a multiple of {heads} heads")
        layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
        fields.neutral("word_embed_proj_dim", hidden, None)
        fields.neutral("do_layer_norm_before", True)
        fields.neutral("_remove_final_layer_norm", False)
        fields.neutral("layer_norm_elementwise_affine", True)
        fields.ignore(["dropout", "activation_dropout", "layerdrop"])
        bias = fields.boolean("enable_bias", True)
        bos = fields.token_ids("bos_token_id")
        return {
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": fields.integer("ffn_dim"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "max_position_embeddings": fields.integer("max_position_embeddings", 2048),
            # Not a field of the configuration: PyTorch's default for LayerNorm.
            "norm_eps": 1e-5,
            "activation": read_activation(fields, "activation_function", "relu"),
            "tie_word_embeddings": fields.boolean("tie_word_embeddings", True),
            "attention_scale": (hidden // heads) ** -0.5,
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": bias,
            "layer_kinds": ("full",) * layers,
            "bos_token_id": bos[0] if bos else None,
            "eos_token_ids": fields.token_ids("eos_token_id"),
        }
