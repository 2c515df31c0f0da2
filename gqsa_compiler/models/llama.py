"""Llama, Mistral and Qwen 2.

The latter two differ in their configurations only: a window is the KV cache's business, and
`qkv_bias` says whether q, k and v have biases.
"""

from __future__ import annotations

from gqsa_compiler.models.config import DecoderConfig
from gqsa_compiler.models.layers import PreNormLayer, RotaryCausalLM


class LlamaForCausalLM(RotaryCausalLM):
    """RMSNorm, rotary grouped-query attention, gated MLP.

    Parameters
    ----------
    config : DecoderConfig
    context_length : int
        Positions that the rotary table covers.
    """

    def __init__(self, config: DecoderConfig, context_length: int) -> None:
        layers = [PreNormLayer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, context_length, layers)
