"""What every decoder's configuration says, in one form for all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from gqsa_compiler.models.fields import FieldReader
from gqsa_compiler.models.rope import RopeParameters
from gqsa_compiler.schedules.spec import Activation

LayerKind = Literal["full", "sliding"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

MAX_LAYERS = 1000
"""Far more than any published decoder has."""

ConfigT = TypeVar("ConfigT", bound="DecoderConfig")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """A decoder-only transformer, after every default is filled in.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size, num_hidden_layers : int
    num_attention_heads, num_key_value_heads, head_dim : int
        Query heads, key/value heads, features of a head.
    max_position_embeddings : int
        The longest context in tokens.
    norm_eps : float
    activation : str
        ``silu``, ``gelu`` (erf), ``gelu_tanh`` or ``relu``.
    tie_word_embeddings : bool
        Whether the output layer is the embedding matrix.
    attention_scale : float
        Factor of the attention scores.
    qkv_bias, output_bias, mlp_bias : bool
        Biases of q/k/v, of o and of the MLP's linear layers.
    sliding_window : int or None
        Tokens a ``sliding`` layer sees, itself included.
    layer_kinds : tuple of str
        ``full`` or ``sliding`` for each layer.
    rope, rope_local : RopeParameters or None
        Rotary embedding of the full layers (or of all), and of the sliding ones where it differs.
    bos_token_id : int or None
    eos_token_ids : tuple of int
    """

    model_type: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Hugging Face's defaults of this family, for fields that a configuration leaves out."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: Activation
    tie_word_embeddings: bool
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_kinds: tuple[LayerKind, ...] = ()
    rope: RopeParameters | None = None
    rope_local: RopeParameters | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
        """Read Hugging Face's fields.

        Raises
        ------
        ModelError
            A field is missing, has a wrong type, is not understood, or has a value that this
            family's definition does not implement; the message names it.
        """
        reader = FieldReader(cls.model_type, {**cls.defaults, **fields})
        config = cls(**cls.read(reader))
        reader.finish()
        return config

    @classmethod
    @abstractmethod
    def read(cls, fields: FieldReader) -> dict[str, Any]:
        """Take this family's fields and return the constructor's arguments."""


def read_common(fields: FieldReader, activation_field: str = "hidden_act") -> dict[str, Any]:
    """Take the fields that Llama and its relatives share; `activation_field` is one's name."""
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"= {kv_heads} does not divide {heads} heads")
    if fields.raw("head_dim", None) is None and hidden % heads:
        raise fields.error("hidden_size", f"= {hidden} is not a multiple of {heads} heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"= {head_dim} is odd, so it cannot be rotated")
    bos = fields.token_ids("bos_token_id")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, minimum=0.0),
        "activation": read_activation(fields, activation_field, "silu"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
        "attention_scale": head_dim**-0.5,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": fields.token_ids("eos_token_id"),
    }


def read_activation(fields: FieldReader, name: str, default: str) -> Activation:
    """Take an activation function's name."""
    value = fields.text(name, default)
    if value not in _ACTIVATIONS:
        raise fields.error(name, f"is {value!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def read_layer_types(
    fields: FieldReader, num_layers: int, default: tuple[LayerKind, ...]
) -> tuple[LayerKind, ...]:
    """Take ``layer_types``: which layers attend to everything and which to a window."""
    value = fields.raw("layer_types", None)
    if value is None:
        return default
    names: Mapping[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}
    if not isinstance(value, list) or any(not isinstance(v, str) or v not in names for v in value):
        raise fields.error(
            "layer_types", f"is {str(value)[:200]}; supported are {', '.join(names)}"
        )
    if len(value) != num_layers:
        raise fields.error("layer_types", f"has {len(value)} entries for {num_layers} layers")
    return tuple(names[v] for v in value)
