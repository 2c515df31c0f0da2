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
    if inputs.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return functional.linear(inputs, weight, bias)
    product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return product(inputs, weight, bias, "none", [], "")


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return supported


@contextmanager
def quick_linears(block: nn.Module) -> Iterator[None]:
    """Let a float32 block's linear layers compute with `linear`, unless gradients are wanted."""
    with _forwards(block, _forward if not torch.is_grad_enabled() else None):
        yield


@contextmanager
def half_linears(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a 16-bit model compute in float32 where the CPU is slow in 16.

    The weights stay as they are; one at a time is converted when its layer runs.
    """
    half = next(model.parameters()).dtype != torch.float32
    with _forwards(model, _widened if half and not multiplies_bfloat16() else None):
        yield


@contextmanager
def _forwards(
    model: nn.Module, forward: Callable[[nn.Linear, Tensor], Tensor] | None
) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if forward is None:
        layers = []
    else:
        for layer in layers:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs, layer.weight, layer.bias)


def _widened(layer: nn.Linear, inputs: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return linear(inputs.float(), layer.weight.float(), bias).to(inputs.dtype)
