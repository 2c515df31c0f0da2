"""The parts that decoders share, on tokens flattened to rows: attention, MLP, output layer.

Attribute names are those of Hugging Face's modules, so that a parameter's name in the compiled
module is its tensor's name in the checkpoint. All arithmetic is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import PagedKVCache, nn, relax, wrap_nested
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.schedules.generic.rope import rope_qkv
from gqsa_compiler.schedules.spec import Activation

op = nn.op
DTYPE = "float32"


def linear(in_features: int, out_features: int, bias: bool = False) -> Any:
    """Create a linear layer with a weight [out, in] and maybe a bias [out]."""
    return nn.Linear(in_features, out_features, bias=bias, dtype=DTYPE)


def rms_norm(config: DecoderConfig, features: int | None = None) -> Any:
    """Create RMSNorm over the last axis (`features`, by default the hidden size)."""
    return nn.RMSNorm(
        features or config.hidden_size, axes=-1, epsilon=config.norm_eps, bias=False, dtype=DTYPE
    )


def take_rows(table: nn.Tensor, indices: nn.Tensor) -> nn.Tensor:
    """Look up rows of a matrix: float32 [r, f] at int32 [n] to float32 [n, f].

    Indices are clipped to the matrix: TVM's default reads past its end instead.
    """
    taken = relax.op.take(table._expr, indices._expr, axis=0, mode="clip")
    return wrap_nested(taken, "take")


class Embedding(nn.Module):
    """A lookup table with a ``weight`` [rows, features]."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((rows, features), dtype=DTYPE)

    def forward(self, indices: nn.Tensor) -> nn.Tensor:
        """Look up int32 [n]: float32 [n, features]."""
        return take_rows(self.weight, indices)


def activation(name: Activation, x: nn.Tensor) -> nn.Tensor:
    """Apply an activation function."""
    if name == "silu":
        return op.silu(x)
    if name == "relu":
        return op.relu(x)
    return op.gelu(x, approximate="tanh" if name == "gelu_tanh" else None)


class RopeTable(nn.Module):
    """Cosines and sines of every position, as a parameter ``cos_sin`` [context, head_dim]."""

    def __init__(self, context_length: int, head_dim: int) -> None:
        super().__init__()
        self.cos_sin = nn.Parameter((context_length, head_dim), dtype=DTYPE)


class RopeTables(RopeTable):
    """The table of full layers, and a second one, ``local``, for sliding ones where it differs."""

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        super().__init__(context_length, config.head_dim)
        if config.rope_local is not None:
            self.local = RopeTable(context_length, config.head_dim)

    def of_layer(self, config: DecoderConfig, layer_id: int) -> nn.Tensor:
        """Return the table that a layer uses."""
        is_local = config.rope_local is not None and config.layer_kinds[layer_id] == "sliding"
        return self.local.cos_sin if is_local else self.cos_sin


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates q and k.

    Parameters
    ----------
    kernel : PrimFunc
        From `rope_qkv`; one for all layers.
    positions : Tensor
        int32 [n].
    cos_sin : Tensor
        float32 [context, D].
    """

    kernel: Any
    positions: Any
    cos_sin: Any


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, with rotary positions.

    Parameters
    ----------
    config : DecoderConfig
    layer_id : int
    qk_norm : bool
        Normalise each head of q and k before rotating it.
    """

    def __init__(self, config: DecoderConfig, layer_id: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        heads = config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, heads, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_heads, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_heads, config.qkv_bias)
        self.o_proj = linear(heads, config.hidden_size, config.output_bias)
        self.q_norm = rms_norm(config, config.head_dim) if qk_norm else None
        self.k_norm = rms_norm(config, config.head_dim) if qk_norm else None

    def forward(self, x: nn.Tensor, rotation: Rotation, kv: PagedKVCache) -> nn.Tensor:
        """Attend from float32 [n, H] to the cached tokens of each row's sequence."""
        qkv = op.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        norms = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]
        qkv = op.tensor_ir_op(
            rotation.kernel,
            "rope_qkv",
            [qkv, rotation.positions, rotation.cos_sin, *norms],
            nn.Tensor.placeholder(qkv.shape, DTYPE),
        )
        return self.o_proj(attend(self.config, self.layer_id, qkv, kv))


def attend(config: DecoderConfig, layer_id: int, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
    """Append fused q, k, v rows [n, (Hq + 2 Hkv) D] to the cache and attend: [n, Hq D]."""
    n = qkv.shape[0]
    heads = config.num_attention_heads
    qkv = op.reshape(qkv, (1, n, heads + 2 * config.num_key_value_heads, config.head_dim))
    out = kv.attention_with_fused_qkv(layer_id, qkv, heads, config.attention_scale)
    return op.reshape(out, (n, heads * config.head_dim))


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(hidden, inner, bias)
        self.up_proj = linear(hidden, inner, bias)
        self.down_proj = linear(inner, hidden, bias)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Transform float32 [n, H]."""
        gate = activation(self.activation, self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class PreNormLayer(nn.Module):
    """Llama's block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: DecoderConfig, layer_id: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.input_layernorm = rms_norm(config)
        self.self_attn = Attention(config, layer_id, qk_norm)
        self.post_attention_layernorm = rms_norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: nn.Tensor, rotation: Rotation, kv: PagedKVCache) -> nn.Tensor:
        """Transform float32 [n, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module, ABC):
    """The three functions of every model; a family defines `hidden_states` and `logits`."""

    def forward(self, tokens: nn.Tensor, rows: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """Return the logits float32 [m, V] of the chosen `rows` int32 [m] of `tokens` int32 [n]."""
        return self.logits(take_rows(self.hidden_states(tokens, kv), rows))

    @abstractmethod
    def hidden_states(self, tokens: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """Return the last layer's output before the final norm, float32 [n, H]."""

    @abstractmethod
    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """Turn rows of `hidden_states` into logits: float32 [m, H] to [m, V]."""

    def adapt(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn a stored tensor into what this definition computes with (by default itself)."""
        del name
        return array


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that Hugging Face gives them."""

    def __init__(self, config: DecoderConfig, layers: list[Any]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = rms_norm(config)


class RotaryCausalLM(CausalLM):
    """A model with rotary positions whose layers all have the signature of `PreNormLayer`.

    Parameters
    ----------
    config : DecoderConfig
    context_length : int
        Positions that the rotary tables cover.
    layers : list of nn.Module
    qk_norm : bool
        Whether their attention normalises q and k.
    """

    def __init__(
        self,
        config: DecoderConfig,
        context_length: int,
        layers: list[Any],
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers)
        self.lm_head = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size)
        )
        self.rope = RopeTables(config, context_length)
        self.rope_kernel = rope_qkv(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=config.head_dim,
            qk_norm=qk_norm,
            eps=config.norm_eps,
        )

    def embed(self, tokens: nn.Tensor) -> nn.Tensor:
        """Look up int32 [n]: float32 [n, H]."""
        return self.model.embed_tokens(tokens)

    def hidden_states(self, tokens: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """See `CausalLM.hidden_states`."""
        positions = kv.get_query_positions(tokens.shape[0])
        x = self.embed(tokens)
        for layer_id, layer in enumerate(self.model.layers):
            table = self.rope.of_layer(self.config, layer_id)
            x = layer(x, Rotation(self.rope_kernel, positions, table), kv)
        return x

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """See `CausalLM.logits`."""
        return output_layer(self.lm_head, self.model.embed_tokens, self.model.norm(hidden))


def output_layer(lm_head: Any | None, embed_tokens: Any, hidden: nn.Tensor) -> nn.Tensor:
    """Multiply with the output matrix, which is the embedding's when `lm_head` is None."""
    if lm_head is not None:
        return lm_head(hidden)
    return op.matmul(hidden, op.permute_dims(embed_tokens.weight))


def plus_one(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Fold Gemma's ``1 + w`` into the weight of a norm."""
    return array.astype(np.float32) + np.float32(1.0)
