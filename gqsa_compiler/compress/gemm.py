"""Matrix products in float32 through oneDNN, for the linear layers of a block and for the solver.

PyTorch hands float32 products to MKL, which leaves AVX-512 unused on CPUs that are not Intel's:
oneDNN is twice as fast there (an AMD EPYC of 2024: 195 instead of 97 GFLOP/s a core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``inputs @ weight.T + bias``; nothing remembers how, so gradients do not flow.

    Parameters
    ----------
    inputs : float32 [..., K]
    weight : float32 [N, K]
    bias : float32 [N], optional

    Returns
    -------
    float32 [..., N]
    """
    if not torch.backends.mkldnn.is_available():
        return functional.linear(inputs, weight, bias)
    product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return product(inputs, weight, bias, "none", [], "")


@contextmanager
def quick_linears(block: nn.Module) -> Iterator[None]:
    """Let a float32 block's linear layers compute with `linear`, unless gradients are wanted."""
    layers = [] if torch.is_grad_enabled() else list(block.modules())
    layers = [module for module in layers if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs, layer.weight, layer.bias)
