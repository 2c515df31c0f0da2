"""Layers that train through the quantiser: values and gradients against slow references."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.quantizer import MAX_SCALE, MIN_SCALE
from gqsa_compiler.compress.store import to_layer
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.limits import BITS
from tests.compress.training.helpers import (
    COLUMNS,
    GROUP,
    ROWS,
    element_mask,
    grad,
    is_storable,
    random_inputs,
    random_weight,
    same_weight,
)

CASES = [{}, {"dropped": 0.0}, {"dropped": 0.0, "two_of_four": True}, {"two_of_four": True}]


class Round(torch.autograd.Function):
    """Rounding that passes gradients on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def slow_weight(
    weight: GroupedWeight, scale: Tensor, zero: Tensor, latent: Tensor | None
) -> Tensor:
    """Decode with straight-through rounding and PyTorch's own clamp; differentiable."""
    scale, zero = scale[..., None], Round.apply(zero)[..., None]
    if latent is None:
        codes = weight.codes
    else:
        ratio = latent.view(weight.codes.shape) / scale
        codes = (Round.apply(ratio) + zero).clamp(0, 2**weight.bits - 1)
    return ((codes - zero) * scale).flatten(1) * element_mask(weight)


def noisy_latent(weight: GroupedWeight, size: float = 1.0, seed: int = 3) -> Tensor:
    """Return weights around the decoded ones; many of them are clipped."""
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    spread = weight.scales.repeat_interleave(GROUP, 1) * 2**weight.bits * 0.4 * size
    return weight.decode() + noise * spread


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_decoded_weight(bits: int, case: dict[str, Any], frozen: bool) -> None:
    weight = random_weight(bits, **case)
    bias = torch.randn(ROWS)
    latent = None if frozen else weight.decode()
    layer = GroupedLinear(weight, bias, latent=latent)
    # Identity inputs: each output is one product, so that no order of summing shows.
    assert torch.equal(layer(torch.eye(COLUMNS)), weight.decode().T + bias)
    inputs = random_inputs(2, 5)
    torch.testing.assert_close(layer(inputs), functional.linear(inputs, weight.decode(), bias))
    without = GroupedLinear(weight, None, latent=latent)
    torch.testing.assert_close(without(inputs), functional.linear(inputs, weight.decode()))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_gradients(bits: int, case: dict[str, Any], frozen: bool) -> None:
    weight = random_weight(bits, **case)
    latent = None if frozen else noisy_latent(weight)
    layer = GroupedLinear(weight, None, latent=latent)
    inputs = random_inputs(7).requires_grad_()
    out = torch.randn(7, ROWS)
    layer(inputs).backward(out)

    scale, zero = (part.clone().requires_grad_() for part in (weight.scales, weight.zeros))
    slow_latent = None if latent is None else latent.clone().requires_grad_()
    other = inputs.detach().clone().requires_grad_()
    functional.linear(other, slow_weight(weight, scale, zero, slow_latent)).backward(out)
    for have, want in ((inputs, other), (layer.scale, scale), (layer.zero, zero)):
        torch.testing.assert_close(grad(have), grad(want), rtol=1e-4, atol=1e-4)
    assert float(grad(layer.scale)[~weight.keep].abs().sum()) == 0
    if slow_latent is not None:
        torch.testing.assert_close(grad(layer.latent), grad(slow_latent), rtol=1e-4, atol=1e-4)
        clipped = (grad(slow_latent) == 0) & element_mask(weight)
        assert 0.05 < float(clipped.float().mean()) < 0.9, "the test wants clipped codes"
    if not frozen and bits < 8:
        assert float(grad(zero).abs().sum()) > 0


@pytest.mark.parametrize("trained", ["inputs", "latent", "scale", "zero"])
def test_only_wanted_gradients(trained: str) -> None:
    weight = random_weight()
    layer = GroupedLinear(weight, None, latent=noisy_latent(weight)).requires_grad_(False)
    inputs = random_inputs(3)
    target = inputs if trained == "inputs" else layer.get_parameter(trained)
    target.requires_grad_()
    layer(inputs).sum().backward()
    for tensor in (inputs, *layer.parameters()):
        assert (tensor.grad is not None) == (tensor is target)


def test_dropped_latents_have_gradients_only_while_exploring() -> None:
    weight = random_weight()
    layer = GroupedLinear(weight, None, latent=noisy_latent(weight))
    inputs, out = random_inputs(7), torch.randn(7, ROWS)
    dropped = ~element_mask(weight)

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        layer(inputs).backward(out)
        return [grad(parameter).clone() for parameter in layer.parameters()]

    plain = gradients()
    layer.explore(True)
    scale, zero, latent = gradients()
    assert torch.equal(scale, plain[0])
    assert torch.equal(zero, plain[1])
    assert torch.equal(latent[~dropped], plain[2][~dropped])
    assert float(plain[2][dropped].abs().sum()) == 0
    torch.testing.assert_close(latent[dropped], (out.T @ inputs)[dropped])
    torch.testing.assert_close(layer.input_power(), inputs.square().mean(0))
    layer.explore(False)
    assert torch.equal(gradients()[2], plain[2])


def test_input_power_is_over_all_tokens() -> None:
    layer = GroupedLinear(random_weight(), None)
    layer.explore(True)
    parts = random_inputs(2, 3), random_inputs(5, seed=2)
    for part in parts:
        layer(part)
    seen = torch.cat([part.reshape(-1, COLUMNS) for part in parts])
    torch.testing.assert_close(layer.input_power(), seen.square().mean(0))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_result_round_trips(bits: int, case: dict[str, Any], frozen: bool) -> None:
    weight = random_weight(bits, **case)
    layer = GroupedLinear(weight, None, latent=None if frozen else weight.decode())
    same_weight(layer.result(), weight)
    again = GroupedLinear(layer.result(), None)
    same_weight(again.result(), weight)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_trained_is_what_is_stored(bits: int, case: dict[str, Any], frozen: bool) -> None:
    weight = random_weight(bits, **case)
    layer = GroupedLinear(weight, None, latent=None if frozen else noisy_latent(weight))
    with torch.no_grad():
        layer.scale.mul_(1 + 0.2 * torch.rand(layer.scale.shape))
        layer.zero.add_(torch.randn(layer.zero.shape))
    trained = layer.result()
    is_storable(trained)
    stored = torch.from_numpy(to_dense(to_layer("layer", trained)))
    assert torch.equal(stored, trained.decode())
    assert torch.equal(layer(torch.eye(COLUMNS)), stored.T)
    assert float(stored[~element_mask(weight)].abs().sum()) == 0
    same_weight(GroupedLinear(trained, None).result(), trained)
    if frozen:
        kept = element_mask(weight)
        assert torch.equal(trained.codes.flatten(1)[kept], weight.codes.flatten(1)[kept])


def test_scales_stay_in_the_range_of_float16() -> None:
    layer = GroupedLinear(random_weight(dropped=0.0), None)
    with torch.no_grad():
        layer.scale[0], layer.scale[1] = -1.0, 1e9
    scales = layer.result().scales
    assert bool((scales[0] == MIN_SCALE).all())
    assert bool((scales[1] == MAX_SCALE).all())


def test_what_dropped_groups_hold_means_nothing() -> None:
    weight = random_weight()
    scales, zeros, codes = weight.scales.clone(), weight.zeros.clone(), weight.codes.clone()
    for part in (scales, zeros, codes):
        part[~weight.keep] = torch.nan
    damaged = dataclasses.replace(weight, scales=scales, zeros=zeros, codes=codes)
    assert torch.equal(damaged.decode(), weight.decode())
    for latent in (None, weight.decode()):
        layer = GroupedLinear(damaged, None, latent=latent)
        assert torch.equal(layer(torch.eye(COLUMNS)), weight.decode().T)
        layer(random_inputs(3)).sum().backward()
        assert all(bool(grad(parameter).isfinite().all()) for parameter in layer.parameters())
        same_weight(layer.result(), weight)


def test_bfloat16_products() -> None:
    weight = random_weight()
    latent = noisy_latent(weight)
    bias = torch.randn(ROWS)
    layer = GroupedLinear(weight, bias, latent=latent, dtype=torch.bfloat16)
    exact = GroupedLinear(weight, bias, latent=latent.clone())
    inputs, out = random_inputs(40), torch.randn(40, ROWS)
    wide, narrow = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    result = layer(narrow)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact(wide), rtol=0.05, atol=0.2)
    result.backward(out.bfloat16())
    exact(wide).backward(out)
    assert grad(narrow).dtype == torch.float32
    for have, want in zip((narrow, *layer.parameters()), (wide, *exact.parameters()), strict=True):
        assert grad(have).dtype == torch.float32
        error = (grad(have) - grad(want)).norm() / grad(want).norm()
        assert float(error) < 0.02


def test_latents_are_taken_over_and_the_weight_is_left_alone() -> None:
    weight, kept = random_weight(), random_weight()
    latent = weight.decode()
    layer = GroupedLinear(weight, None, latent=latent)
    assert layer.latent is not None
    assert layer.latent.data_ptr() == latent.data_ptr()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.5)
    same_weight(weight, kept)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("train_weights", [False, True])
def test_a_layer_that_computes_elsewhere(train_weights: bool, bits: int) -> None:
    """`decoded` and `pass_back` are what `forward` and its backward pass do."""
    weight, inputs = random_weight(bits), random_inputs(9)
    target = torch.randn(9, ROWS, generator=torch.Generator().manual_seed(2))
    layers = [
        GroupedLinear(weight, None, latent=noisy_latent(weight) if train_weights else None)
        for _ in range(2)
    ]
    output = layers[0](inputs)
    output.backward(target)
    torch.testing.assert_close(inputs @ layers[1].decoded().T, output.detach())
    assert not layers[1].decoded().requires_grad
    layers[1].pass_back(target.T @ inputs)
    for (name, wanted), (_, have) in zip(
        layers[0].named_parameters(), layers[1].named_parameters(), strict=True
    ):
        torch.testing.assert_close(grad(have), grad(wanted), msg=name)


def test_what_is_frozen_gets_no_gradient() -> None:
    layer = GroupedLinear(random_weight(), None)
    layer.zero.requires_grad_(False)
    layer.pass_back(torch.ones(ROWS, COLUMNS))
    assert layer.zero.grad is None
    assert grad(layer.scale).shape == (ROWS, COLUMNS // GROUP)
