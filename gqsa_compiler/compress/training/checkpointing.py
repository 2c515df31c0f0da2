"""Gradient checkpointing: keep only the blocks' inputs, and run each block again backwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gqsa_compiler.bandwidth import available_bytes

ACTIVATION_BYTES = 40
"""About what a block keeps for its gradient: bytes for each token, times the hidden size, times
the width of its layers relative to the hidden size (16-bit and float32 tensors together)."""

SHARE = 0.5
"""Most of the free memory that activations may take."""


def needs_checkpoints(config: Any, tokens: int, device: torch.device) -> bool:
    """Whether what a step of so many tokens keeps for its gradients is too much for the device."""
    # OPT has its own name for the width of its wide layers.
    widths = (getattr(config, name, 0) for name in ("intermediate_size", "ffn_dim"))
    width = max(config.hidden_size, *widths)
    needed = ACTIVATION_BYTES * tokens * config.num_hidden_layers * width
    return needed > SHARE * _free_bytes(device)


def use_checkpoints(blocks: nn.ModuleList) -> None:
    """Let every block keep nothing but its inputs."""
    for block in blocks:
        block.forward = partial(_forward, block.forward)


def _forward(forward: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **keywords)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
