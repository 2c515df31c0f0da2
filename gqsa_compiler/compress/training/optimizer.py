"""The optimiser of the training stages: relative rates, warm-up, cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.recipes.recipe import BlockStage, ModelStage
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.errors import UsageError

FINAL_RATE = 0.05
"""Share of the peak rates at the last step."""

LEAST_NORM = 0.1
"""Norm weights are taken for at least so large: Gemma's are offsets from 1, near 0."""

HEAD_EPSILON = 1.0
"""AdamW's epsilon for the head's parameters, whose gradients `normalise` brings to the size 1."""

MAX_ZERO_DRIFT = 0.5
"""How far outside the codes' range a trained zero point may be."""


def grouped_layers(module: nn.Module) -> dict[str, GroupedLinear]:
    """List a module's grouped layers by their path inside it."""
    return {n: m for n, m in module.named_modules() if isinstance(m, GroupedLinear)}


def parameter_groups(
    layers: Iterable[GroupedLinear],
    stage: BlockStage | ModelStage,
    norms: Iterable[nn.Parameter] = (),
    norm_rate: float = 0.0,
) -> list[dict[str, Any]]:
    """Give every parameter that the stage trains its peak rate; the others are frozen.

    A rate is relative to the mean size of the layer's weights, scales or norm weights (that of
    zero points is absolute, in code steps), so that it suits every layer of every model.

    Returns
    -------
    list of dict
        Parameter groups for `make_optimizer`, one a parameter; ``peak`` is its highest rate.
    """
    groups: list[dict[str, Any]] = []

    def add(parameter: nn.Parameter, rate: float, size: float) -> None:
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            groups.append({"params": [parameter], "lr": rate * size, "peak": rate * size})

    for layer in layers:
        kept = layer.keep
        if layer.latent is not None:
            inside = layer.latent.detach().view(layer.grid_shape)[kept]
            add(layer.latent, stage.weight_rate, _size(inside))
        add(layer.scale, stage.scale_rate, _size(layer.scale.detach()[kept]))
        add(layer.zero, stage.zero_rate, 1.0)
    for norm in norms:
        add(norm, norm_rate, max(_size(norm.detach()), LEAST_NORM))
    return groups


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Return fused AdamW without weight decay.

    Raises
    ------
    UsageError
        There is nothing to train.
    """
    if not groups:
        raise UsageError(
            "A training stage of the recipe trains nothing; give it a rate above 0, or leave it "
            "out."
        )
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: float) -> float:
    """Set the rates of a step, 0 <= step < steps; returns the share of the peak rates."""
    share = rate_share(step, steps, warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return share


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate: a linear rise, then a cosine down to `FINAL_RATE`."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    way = (step - rise) / max(1, steps - rise)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * way))


def damp(groups: list[dict[str, Any]], parameters: Iterable[nn.Parameter]) -> None:
    """Let these parameters, which have groups of their own, move by how large a gradient is.

    AdamW moves every parameter at the same rate, however small its gradient. In a head most rows
    are those of tokens that hardly ever come: their small, noisy gradients would carry them as far
    as the others. With an epsilon of the mean gradient's size they stay where they are. (SmolLM2,
    32 sequences, scales at 0.002: a head that costs 0.5% of perplexity before training costs 0.25%
    after it; without this, 0.9%.)
    """
    wanted = {id(parameter) for parameter in parameters}
    for group in groups:
        if id(group["params"][0]) in wanted:
            group["eps"] = HEAD_EPSILON


@torch.no_grad()
def normalise(parameters: Iterable[nn.Parameter]) -> None:
    """Divide each gradient by its root mean square."""
    for parameter in parameters:
        if parameter.grad is not None:
            size = parameter.grad.square().mean().sqrt()
            parameter.grad /= size.clamp(min=torch.finfo(size.dtype).tiny)


@torch.no_grad()
def clamp_zeros(layers: Iterable[GroupedLinear]) -> None:
    """Keep trained zero points near the codes' range, so that they can come back."""
    for layer in layers:
        if layer.zero.requires_grad:
            layer.zero.clamp_(-MAX_ZERO_DRIFT, layer.max_code + MAX_ZERO_DRIFT)


def _size(values: Tensor) -> float:
    return float(values.abs().mean()) if values.numel() else 1.0


def epoch_order(samples: int, total: int, seed: int) -> Tensor:
    """Return int64 [total]: the samples in a new random order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(samples, generator=generator) for _ in range(-(-total // samples))]
    return torch.cat(epochs)[:total]
