"""Qwen 2 and 2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.layers import PreNormLayer, RotaryCausalLM


class Qwen2ForCausalLM(RotaryCausalLM):
    """RMSNorm, rotary grouped-query attention (`qkv_bias` is always set), gated MLP.

    Parameters
    ----------
    config : DecoderConfig
    context_length : int
        Positions that the rotary table covers.
    """

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        layers = [PreNormLayer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, context_length, layers)
