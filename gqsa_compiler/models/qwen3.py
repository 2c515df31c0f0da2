"""Qwen 3: Llama with every head of q and k normalised before it is rotated."""

from __future__ import annotations

from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.layers import PreNormLayer, RotaryCausalLM


class Qwen3ForCausalLM(RotaryCausalLM):
    """RMSNorm, rotary grouped-query attention with normalised q and k, gated MLP.

    Parameters
    ----------
    config : DecoderConfig
    context_length : int
        Positions that the rotary table covers.
    """

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        layers = [PreNormLayer(config, i, qk_norm=True) for i in range(config.num_hidden_layers)]
        super().__init__(config, context_length, layers, qk_norm=True)
