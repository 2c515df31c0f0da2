"""The names and shapes of every family's weights, without building its definition.

A stored model is checked against this list before anything costs time: neither TVM nor PyTorch is
needed. That the definitions have the same parameters is a test.
"""

from __future__ import annotations

from collections.abc import Iterator

from gqsa_compiler.models.config import DecoderConfig

Shape = tuple[int, ...]
NamedShape = tuple[str, Shape]

# The first two rows of OPT's position table are never used.
OPT_POSITION_OFFSET = 2


def llama_tensors(config: DecoderConfig) -> Iterator[NamedShape]:
    """List the tensors of Llama, Mistral and Qwen 2, layer by layer."""
    return _rotary(config, ("input_layernorm", "post_attention_layernorm"), qk_norm=False)


def qwen3_tensors(config: DecoderConfig) -> Iterator[NamedShape]:
    """List the tensors of Qwen 3, layer by layer."""
    return _rotary(config, ("input_layernorm", "post_attention_layernorm"), qk_norm=True)


def gemma3_tensors(config: DecoderConfig) -> Iterator[NamedShape]:
    """List the tensors of Gemma 3's text decoder, layer by layer."""
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    return _rotary(config, norms, qk_norm=True)


def opt_tensors(config: DecoderConfig) -> Iterator[NamedShape]:
    """List the tensors of OPT, layer by layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    root = "model.decoder"
    yield f"{root}.embed_tokens.weight", (config.vocab_size, hidden)
    positions = config.max_position_embeddings + OPT_POSITION_OFFSET
    yield f"{root}.embed_positions.weight", (positions, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"{root}.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", hidden, hidden, config.qkv_bias)
        yield from _linear(f"{layer}.self_attn.out_proj", hidden, hidden, config.output_bias)
        yield from _linear(f"{layer}.fc1", inner, hidden, config.mlp_bias)
        yield from _linear(f"{layer}.fc2", hidden, inner, config.mlp_bias)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield f"{layer}.{name}.weight", (hidden,)
            yield f"{layer}.{name}.bias", (hidden,)
    yield f"{root}.final_layer_norm.weight", (hidden,)
    yield f"{root}.final_layer_norm.bias", (hidden,)
    yield from _head(config)


def _rotary(
    config: DecoderConfig, norms: tuple[str, ...], *, qk_norm: bool
) -> Iterator[NamedShape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield from _linear(f"{attention}.q_proj", queries, hidden, config.qkv_bias)
        yield from _linear(f"{attention}.k_proj", keys, hidden, config.qkv_bias)
        yield from _linear(f"{attention}.v_proj", keys, hidden, config.qkv_bias)
        yield from _linear(f"{attention}.o_proj", hidden, queries, config.output_bias)
        if qk_norm:
            yield f"{attention}.q_norm.weight", (config.head_dim,)
            yield f"{attention}.k_norm.weight", (config.head_dim,)
        yield from _linear(f"{mlp}.gate_proj", inner, hidden, config.mlp_bias)
        yield from _linear(f"{mlp}.up_proj", inner, hidden, config.mlp_bias)
        yield from _linear(f"{mlp}.down_proj", hidden, inner, config.mlp_bias)
        for name in norms:
            yield f"{layer}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield from _head(config)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[NamedShape]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _head(config: DecoderConfig) -> Iterator[NamedShape]:
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)
