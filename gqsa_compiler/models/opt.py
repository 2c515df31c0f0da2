"""OPT: learned positions, LayerNorm, biases and a plain MLP."""

from __future__ import annotations

from gqsa_compiler._tvm import PagedKVCache, nn
from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.layers import (
    DTYPE,
    CausalLM,
    Embedding,
    activation,
    attend,
    linear,
    output_layer,
)
from gqsa_compiler.models.tensors import OPT_POSITION_OFFSET

op = nn.op


def layer_norm(config: DecoderConfig) -> nn.LayerNorm:
    """Create LayerNorm with weight and bias over the last axis."""
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=DTYPE)


class OPTAttention(nn.Module):
    """Multi-head attention without rotation."""

    def __init__(self, config: DecoderConfig, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        hidden = config.hidden_size
        self.q_proj = linear(hidden, hidden, config.qkv_bias)
        self.k_proj = linear(hidden, hidden, config.qkv_bias)
        self.v_proj = linear(hidden, hidden, config.qkv_bias)
        self.out_proj = linear(hidden, hidden, config.output_bias)

    def forward(self, x: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """Attend from float32 [n, H] to the cached tokens of each row."""
        qkv = op.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        return self.out_proj(attend(self.config, self.layer_id, qkv, kv))


class OPTLayer(nn.Module):
    """A block with LayerNorm before attention and before the MLP."""

    def __init__(self, config: DecoderConfig, layer_id: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.self_attn_layer_norm = layer_norm(config)
        self.self_attn = OPTAttention(config, layer_id)
        self.final_layer_norm = layer_norm(config)
        self.fc1 = linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """Transform float32 [n, H]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), kv)
        return x + self.fc2(activation(self.activation, self.fc1(self.final_layer_norm(x))))


class OPTDecoder(nn.Module):
    """Embeddings of tokens and of positions, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        positions = config.max_position_embeddings + OPT_POSITION_OFFSET
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Embedding(positions, config.hidden_size)
        self.layers = nn.ModuleList([OPTLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layer_norm = layer_norm(config)


class OPTModel(nn.Module):
    """Only there because Hugging Face's names have it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config)


class OPTForCausalLM(CausalLM):
    """The whole model.

    Parameters
    ----------
    config : DecoderConfig
    context_length : int
        Not used: the learned table has a row for each of ``max_position_embeddings``.
    """

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        super().__init__()
        del context_length
        self.model = OPTModel(config)
        self.lm_head = (
            None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size)
        )

    def hidden_states(self, tokens: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """See `CausalLM.hidden_states`."""
        decoder = self.model.decoder
        rows = kv.get_query_positions(tokens.shape[0]) + OPT_POSITION_OFFSET
        x = decoder.embed_tokens(tokens) + decoder.embed_positions(rows)
        for layer in decoder.layers:
            x = layer(x, kv)
        return x

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """See `CausalLM.logits`."""
        decoder = self.model.decoder
        return output_layer(self.lm_head, decoder.embed_tokens, decoder.final_layer_norm(hidden))
