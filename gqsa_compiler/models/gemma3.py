"""Gemma 3's text decoder."""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt

from gqsa_compiler._tvm import PagedKVCache, nn
from gqsa_compiler.models.families import Gemma3Config
from gqsa_compiler.models.layers import (
    Attention,
    GatedMLP,
    RotaryCausalLM,
    Rotation,
    plus_one,
    rms_norm,
)

op = nn.op


class Gemma3Layer(nn.Module):
    """A block with norms on both sides of attention and of the MLP."""

    def __init__(self, config: Gemma3Config, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = rms_norm(config)
        self.self_attn = Attention(config, layer_id, qk_norm=True)
        self.post_attention_layernorm = rms_norm(config)
        self.pre_feedforward_layernorm = rms_norm(config)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = rms_norm(config)

    def forward(self, x: nn.Tensor, rotation: Rotation, kv: PagedKVCache) -> nn.Tensor:
        """Transform float32 [n, H]."""
        attended = self.self_attn(self.input_layernorm(x), rotation, kv)
        x = x + self.post_attention_layernorm(attended)
        transformed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(transformed)


class Gemma3ForCausalLM(RotaryCausalLM):
    """Windowed and full layers in turn, each kind with its own rotary table.

    Parameters
    ----------
    config : Gemma3Config
    context_length : int
        Positions that the rotary tables cover.
    """

    def __init__(self, config: Gemma3Config, context_length: int) -> None:
        layers = [Gemma3Layer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, context_length, layers, qk_norm=True)
        self.softcapping = config.final_logit_softcapping

    def embed(self, tokens: nn.Tensor) -> nn.Tensor:
        """Look up int32 [n] and scale: float32 [n, H]."""
        return self.model.embed_tokens(tokens) * math.sqrt(self.config.hidden_size)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """See `CausalLM.logits`."""
        logits = super().logits(hidden)
        if self.softcapping is None:
            return logits
        return op.tanh(logits / self.softcapping) * self.softcapping

    def adapt(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Fold ``1 + w`` into every norm's weight (they are the only vectors called weight)."""
        is_norm = name.endswith("norm.weight")
        return plus_one(array) if is_norm else array
