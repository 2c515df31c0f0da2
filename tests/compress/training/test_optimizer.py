"""Rates relative to what they change, their schedule, and the order of the sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gqsa_compiler.compress.recipes.recipe import BlockStage, ModelStage
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.optimizer import (
    FINAL_RATE,
    LEAST_NORM,
    MAX_ZERO_DRIFT,
    clamp_zeros,
    damp,
    epoch_order,
    grouped_layers,
    make_optimizer,
    normalise,
    parameter_groups,
    rate_share,
    set_rates,
)
from gqsa_compiler.errors import UsageError
from tests.compress.training.helpers import grad, latent_of, random_weight

STAGE = BlockStage(weight_rate=0.1, scale_rate=0.2, zero_rate=0.3)


def grouped(*, latent: bool = True, bits: int = 4) -> GroupedLinear:
    weight = random_weight(bits)
    return GroupedLinear(weight, None, latent=weight.decode() if latent else None)


def test_rates_are_relative_to_what_is_kept() -> None:
    layer = grouped()
    kept = layer.keep
    with torch.no_grad():
        layer.scale[~kept] = 1e6
        latent_of(layer).view(layer.grid_shape)[~kept] = 1e6
    groups = parameter_groups([layer], STAGE)
    rates = {id(group["params"][0]): group["peak"] for group in groups}
    weights = latent_of(layer).view(layer.grid_shape)[kept]
    assert rates[id(layer.latent)] == pytest.approx(0.1 * float(weights.abs().mean()))
    assert rates[id(layer.scale)] == pytest.approx(0.2 * float(layer.scale.detach()[kept].mean()))
    assert rates[id(layer.zero)] == pytest.approx(0.3)
    assert all(group["lr"] == group["peak"] for group in groups)


@pytest.mark.parametrize("name", ["weight_rate", "scale_rate", "zero_rate"])
def test_a_rate_of_zero_freezes(name: str) -> None:
    layer = grouped()
    rates: dict[str, Any] = {"weight_rate": 1e-3, "scale_rate": 1e-3, "zero_rate": 1e-3, name: 0.0}
    groups = parameter_groups([layer], BlockStage(**rates))
    frozen = layer.get_parameter({"weight_rate": "latent"}.get(name, name.split("_")[0]))
    assert len(groups) == 2
    assert all(group["params"][0] is not frozen for group in groups)
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {
        id(group["params"][0]) for group in groups
    }
    assert not frozen.requires_grad


def test_norms() -> None:
    large, small, frozen = (nn.Parameter(torch.full((4,), v)) for v in (-2.0, 1e-4, 1.0))
    groups = parameter_groups([], ModelStage(), [large, small], 0.5)
    assert [group["peak"] for group in groups] == pytest.approx([1.0, 0.5 * LEAST_NORM])
    assert parameter_groups([], ModelStage(), [frozen], 0.0) == []
    assert not frozen.requires_grad


def test_a_layer_of_which_all_is_dropped() -> None:
    weight = random_weight(dropped=1.1)
    layer = GroupedLinear(weight, None, latent=weight.decode())
    assert not bool(layer.keep.any())
    peaks = [group["peak"] for group in parameter_groups([layer], STAGE)]
    assert peaks == [0.1, 0.2, 0.3]


def test_nothing_to_train_is_an_error() -> None:
    stage = BlockStage(weight_rate=0, scale_rate=0, zero_rate=0)
    with pytest.raises(UsageError, match="trains nothing"):
        make_optimizer(parameter_groups([grouped()], stage))


def test_optimizer_has_no_decay_and_is_fused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([{"params": [parameter], "lr": 0.1, "peak": 0.1}])
    assert optimizer.defaults["fused"]
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_grouped_layers() -> None:
    inner = grouped()
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner))
    assert grouped_layers(module) == {"1.0": inner}


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 40, 101])
def test_schedule(steps: int, warmup: float) -> None:
    shares = [rate_share(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(steps * warmup))
    assert all(0 < share <= 1 for share in shares)
    assert shares[:rise] == pytest.approx([(step + 1) / rise for step in range(min(rise, steps))])
    falling = shares[rise - 1 :]
    assert falling == sorted(falling, reverse=True)
    if steps >= 40 and warmup < 1:
        assert shares[rise] == 1
        assert FINAL_RATE <= shares[-1] < FINAL_RATE + 0.01


def test_set_rates() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [
        {"params": [p], "lr": peak, "peak": peak}
        for p, peak in zip(parameters, (2.0, 0.5), strict=True)
    ]
    optimizer = make_optimizer(groups)
    for step in (0, 3, 9):
        share = set_rates(optimizer, step, 10, 0.2)
        assert share == rate_share(step, 10, 0.2)
        assert [group["lr"] for group in optimizer.param_groups] == [2 * share, 0.5 * share]


@pytest.mark.parametrize("bits", [2, 8])
def test_zeros_stay_near_the_codes(bits: int) -> None:
    layer = grouped(bits=bits)
    with torch.no_grad():
        layer.zero[0], layer.zero[1], layer.zero[2] = -100.0, 1e4, 1.25
    clamp_zeros([layer])
    assert bool((layer.zero[0] == -MAX_ZERO_DRIFT).all())
    assert bool((layer.zero[1] == 2**bits - 1 + MAX_ZERO_DRIFT).all())
    assert bool((layer.zero[2] == 1.25).all())
    zeros = layer.result().zeros
    assert float(zeros.min()) >= 0
    assert float(zeros.max()) <= 2**bits - 1
    frozen = grouped()
    frozen.zero.requires_grad_(False)
    with torch.no_grad():
        frozen.zero[0] = -100.0
    clamp_zeros([frozen])
    assert bool((frozen.zero[0] == -100).all())


@pytest.mark.parametrize(("samples", "total"), [(5, 5), (5, 3), (5, 13), (1, 4)])
def test_order(samples: int, total: int) -> None:
    order = epoch_order(samples, total, seed=3)
    assert len(order) == total
    for epoch in order.split(samples):
        assert len(set(epoch.tolist())) == len(epoch)
    assert torch.equal(order, epoch_order(samples, total, seed=3))
    # More steps begin with the same ones.
    assert torch.equal(order, epoch_order(samples, total + 7, seed=3)[:total])


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    first, second = epoch_order(30, 60, seed=0).split(30)
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_order(30, 30, seed=1))


def test_rows_of_small_gradients_hardly_move() -> None:
    """Those of a head; elsewhere AdamW moves all alike."""
    head, other = (nn.Parameter(torch.zeros(4, 2)) for _ in range(2))
    groups = [{"params": [p], "lr": 0.1, "peak": 0.1} for p in (head, other)]
    damp(groups, [head])
    optimizer = make_optimizer(groups)
    for parameter in (head, other):
        parameter.grad = torch.full((4, 2), 1e-7)
        parameter.grad[0] = 1e-3
    normalise([head])
    assert grad(head).square().mean().item() == pytest.approx(1)
    optimizer.step()
    assert bool((other.detach() < -0.09).all())
    assert bool((head.detach()[0] < -0.05).all())
    assert bool((head.detach()[1:].abs() < 1e-4).all())
    without = nn.Parameter(torch.zeros(2))
    zero = nn.Parameter(torch.zeros(2))
    zero.grad = torch.zeros(2)
    normalise([without, zero])
    assert without.grad is None
    assert torch.equal(grad(zero), torch.zeros(2))
