"""One layer: masks have the counts asked for, and compensation pays."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gqsa_compiler.checkpoint import from_codes, to_dense
from gqsa_compiler.compress.recipes.recipe import (
    SCORES,
    SOLVERS,
    STRUCTURES,
    Recipe,
    Solver,
)
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.compensate import MaskedSolver
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import MomentAccumulator, Moments
from gqsa_compiler.compress.solver.oneshot import compress_rows
from gqsa_compiler.compress.solver.quantizer import fit_grid, max_code, round_to_grid
from gqsa_compiler.errors import ModelError
from gqsa_compiler.limits import BITS
from tests.compress.training.helpers import element_mask

N, K, G = 24, 96, 16


def problem(*, dead: bool = False) -> tuple[Tensor, Tensor, Moments]:
    """Return a weight, correlated inputs with outliers, and their moments."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + 0.3
    inputs = torch.randn(2000, K, generator=generator) @ mixing
    inputs[:, 5] *= 20
    if dead:
        inputs[:, 32:50] = 0
    moments = MomentAccumulator()
    for part in inputs.split(512):
        moments.add(part)
    return weight, inputs, moments.finish("layer")


def one(weight: Tensor, moments: Moments, percent: int = 0, bits: int = 4, **how: Any) -> Any:
    """Compress one layer."""
    recipe = Recipe("test", bits, percent, G, **how)
    rows = torch.ones(len(weight))
    return compress_rows([weight], moments, [recipe.target], recipe, row_weights=[rows])[0]


def scores(structure: str, solver: str) -> list[str]:
    """List the scores that a recipe may have with these."""
    measured = (structure, solver) == ("group", "compensated")
    return [score for score in SCORES if score != "fisher" or measured]


def output_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - dense).T).square().sum() / (inputs @ dense.T).square().sum())


def plain(weight: Tensor, keep: Tensor) -> Tensor:
    """Return `weight` rounded to the nearest on 4-bit grids, without any compensation."""
    parts = weight.reshape(len(weight), -1, G)
    scale, zero = fit_grid(parts, 4)
    rounded = round_to_grid(parts, scale[..., None], zero[..., None], 4).reshape(weight.shape)
    return rounded * keep.repeat_interleave(G, 1)


@pytest.mark.parametrize("balance", ["matrix", "row"])
@pytest.mark.parametrize("percent", [0, 30, 50, 95])
def test_mask_counts(balance: str, percent: int) -> None:
    weight, _, moments = problem()
    result = one(weight, moments, percent, balance=balance)
    groups = K // G
    if balance == "matrix":
        assert int(result.keep.sum()) == N * groups - N * groups * percent // 100
    else:
        expected = max(1, groups - groups * percent // 100)
        assert result.keep.sum(1).tolist() == [expected] * N


@pytest.mark.parametrize("balance", ["matrix", "row"])
@pytest.mark.parametrize("percent", [0, 30, 50])
def test_compensation_beats_none_on_the_same_mask(balance: str, percent: int) -> None:
    weight, inputs, moments = problem()
    result = one(weight, moments, percent, balance=balance)
    compensated = output_error(result.decode(), weight, inputs)
    assert compensated < 0.6 * output_error(plain(weight, result.keep), weight, inputs)


def test_matrix_balance_loses_less_than_row_balance() -> None:
    weight, inputs, moments = problem()
    weight[:4] *= 8  # rows that matter more
    matrix, row = (
        output_error(one(weight, moments, 50, balance=b).decode(), weight, inputs)
        for b in ("matrix", "row")
    )
    assert matrix < row


def test_layers_with_one_input_are_pruned_each_on_its_own() -> None:
    weight, _, moments = problem()
    recipe = Recipe("test", 4, 50, G)
    parts = compress_rows([weight, weight[:8] * 100], moments, [recipe.target] * 2, recipe)
    assert [int(p.keep.sum()) for p in parts] == [N * 3, 8 * 3]
    assert [p.decode().shape for p in parts] == [(N, K), (8, K)]


def test_drift_of_the_inputs_is_made_up_for() -> None:
    weight, dense_inputs, _ = problem()
    inputs = dense_inputs @ (torch.eye(K) * 0.8)  # an earlier layer lost a fifth
    moments = MomentAccumulator()
    moments.add(inputs, dense=dense_inputs)
    result = one(weight, moments.finish("l"))
    wanted = dense_inputs @ weight.T
    error = (inputs @ result.decode().T - wanted).square().sum() / wanted.square().sum()
    unaware = (inputs @ weight.T - wanted).square().sum() / wanted.square().sum()
    assert error < 0.5 * unaware


def test_dead_inputs_keep_their_weights_and_hurt_nothing() -> None:
    weight, inputs, moments = problem(dead=True)
    result = one(weight, moments)
    assert torch.isfinite(result.decode()).all()
    assert output_error(result.decode(), weight, inputs) < 0.01
    dead = result.decode()[:, 32:48] - weight[:, 32:48]
    assert dead.abs().max() < 0.5


def test_inputs_that_are_not_finite_are_an_error_naming_the_layer() -> None:
    moments = MomentAccumulator()
    moments.add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ModelError, match=r"layer model\.layers\.3\.mlp\.up_proj are not finite"):
        moments.finish("model.layers.3.mlp.up_proj")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_decoded_weight_is_what_the_checkpoint_decodes_to(bits: int, structure: str) -> None:
    weight, _, moments = problem()
    percent = 30 if structure == "group" else 0
    result = one(weight, moments, percent, bits, structure=structure)
    layer = from_codes(
        "l",
        (N, K),
        G,
        result.keep.numpy(),
        result.codes.numpy().astype(np.uint8),
        result.scales.half().numpy(),
        result.zeros.numpy().astype(np.uint8),
        bits=bits,
    )
    np.testing.assert_array_equal(to_dense(layer), result.decode().numpy())


def test_refit_finds_the_least_squares_solution_on_the_mask() -> None:
    weight, _, moments = problem()
    hessian = moments.hessian.float()
    target = weight @ hessian
    mask = torch.rand(N, K // G, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0] = False  # an empty row stays zero
    fitted = MaskedSolver(hessian, target, G).refit(weight, mask, 60)
    for row in range(N):
        kept = mask[row].repeat_interleave(G)
        assert not fitted[row, ~kept].any()
        exact = torch.linalg.solve(
            moments.hessian[kept][:, kept], target[row, kept].double()
        ).float()
        torch.testing.assert_close(fitted[row, kept], exact, rtol=2e-2, atol=2e-2)


def test_rows_slices_every_part() -> None:
    weight, _, moments = problem()
    result = one(weight, moments, 30)
    part: GroupedWeight = result.rows(3, 5)
    assert torch.equal(part.decode(), result.decode()[3:5])
    two = one(weight, moments, structure="2:4")
    assert torch.equal(two.rows(3, 5).elements, two.elements[3:5])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bits", BITS)
def test_every_method_gives_a_storable_weight(bits: int, structure: str, solver: str) -> None:
    weight, _, moments = problem()
    percent = 30 if structure == "group" else 0
    for score in scores(structure, solver):
        result = one(
            weight, moments, percent, bits, structure=structure, solver=solver, score=score
        )
        assert result.bits == bits
        for part in (result.codes, result.zeros):
            assert torch.equal(part, part.round())
            assert part.min() >= 0
            assert part.max() <= max_code(bits)
        assert torch.equal(result.scales, result.scales.half().float())
        assert result.scales.min() > 0


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensated_beats_rounding(bits: int, structure: str, score: str) -> None:
    weight, inputs, moments = problem()
    percent = 50 if structure == "group" else 0
    compensated, rtn = (
        output_error(
            one(
                weight, moments, percent, bits, structure=structure, score=score, solver=solver
            ).decode(),
            weight,
            inputs,
        )
        for solver in ("compensated", "rtn")
    )
    assert compensated < 0.6 * rtn


def test_more_bits_lose_less() -> None:
    weight, inputs, moments = problem()
    for solver in SOLVERS:
        errors = [
            output_error(one(weight, moments, 0, bits, solver=solver).decode(), weight, inputs)
            for bits in BITS
        ]
        assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(errors))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_obs_beats_wanda_beats_magnitude(structure: str) -> None:
    weight, inputs, moments = skewed_problem(G if structure == "group" else 1)
    percent = 50 if structure == "group" else 0
    obs, wanda, magnitude = (
        output_error(
            one(weight, moments, percent, structure=structure, score=score).decode(),
            weight,
            inputs,
        )
        for score in ("obs", "wanda", "magnitude")
    )
    assert obs < 0.9 * wanda
    assert wanda < 0.9 * magnitude


def skewed_problem(width: int) -> tuple[Tensor, Tensor, Moments]:
    """Return a problem in which the scores disagree about groups of `width` columns.

    Of every four groups, one nearly repeats another (only OBS sees it), and one is quiet (only
    magnitude does not see it).
    """
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(N, 16 * width, generator=generator)
    loud, other, quiet = torch.randn(3, 3000, 4, width, generator=generator)
    again = loud + 0.1 * torch.randn(loud.shape, generator=generator)
    inputs = torch.stack([2 * loud, 2 * again, other, 0.1 * quiet], dim=2).reshape(3000, -1)
    moments = MomentAccumulator()
    moments.add(inputs)
    return weight, inputs, moments.finish("layer")


def test_rounding_is_the_plain_thing() -> None:
    weight, _, moments = problem()
    result = one(weight, moments, 50, solver="rtn", score="magnitude", balance="row")
    norms = weight.reshape(N, -1, G).square().sum(2)
    keep = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, norms.topk(3, 1).indices, True)
    assert torch.equal(result.keep, keep)
    torch.testing.assert_close(result.decode(), plain(weight, keep))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_two_of_four_keeps_exactly_two_of_four(score: str, solver: str) -> None:
    weight, _, moments = problem()
    result = one(weight, moments, structure="2:4", score=score, solver=solver)
    assert result.keep.all()  # a checkpoint of sparsity 0
    mask = element_mask(result)
    assert (mask.reshape(N, -1, 4).sum(2) == 2).all()
    dropped = ~mask.reshape(result.codes.shape)
    zeros = result.zeros[..., None].expand_as(result.codes)
    assert torch.equal(result.codes[dropped], zeros[dropped])
    assert (result.decode()[~mask] == 0).all()
    if score == "magnitude" and solver == "rtn":
        best = weight.abs().reshape(N, -1, 4).topk(2, 2).indices
        assert mask.reshape(N, -1, 4).gather(2, best).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_layers_with_one_input_may_become_different_things(solver: Solver) -> None:
    weight, _, moments = problem()
    weights = [weight, weight[:8] * 3, weight[4:12], weight[:8], weight[:5]]
    targets = [
        LayerTarget(4, 16, 0.5),
        LayerTarget(2, 32, 0.25),
        LayerTarget(4, 16, 0.0),
        LayerTarget(4, 16, 0.25),
        LayerTarget(8, 8, 0.0),
    ]
    recipe = Recipe("test", 4, 50, 16, solver=solver)
    results = compress_rows(weights, moments, targets, recipe)
    for part, target, result in zip(weights, targets, results, strict=True):
        (alone,) = compress_rows([part], moments, [target], recipe)
        assert (result.bits, result.codes.shape[2]) == (target.bits, target.group_size)
        assert result.keep.float().mean() == pytest.approx(1 - target.sparsity)
        # Solved together, sums are added up in another order.
        torch.testing.assert_close(result.decode(), alone.decode(), rtol=0.05, atol=0.05)


def test_balance_model_drops_what_each_layer_is_told_to() -> None:
    weight, _, moments = problem()
    matrix, model = (one(weight, moments, 50, balance=b) for b in ("matrix", "model"))
    assert torch.equal(matrix.decode(), model.decode())


SINGULAR = {
    "all zero": lambda x: x * 0,
    "fewer tokens than inputs": lambda x: x[:10],
    "one token": lambda x: x[:1],
    "duplicated columns": lambda x: x[:, torch.arange(K) // 2 * 2],
    "one column everywhere": lambda x: x[:, :1].expand(-1, K),
    "dead columns": lambda x: x * (torch.arange(K) % 5 > 0),
    "tiny": lambda x: x * 1e-15,
    "huge": lambda x: x * 1e15,
    "one huge column": lambda x: x * torch.where(torch.arange(K) == 5, 1e7, 1.0),
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize(("structure", "percent"), [("group", 0), ("group", 50), ("2:4", 0)])
def test_singular_inputs_are_no_worse_than_rounding(
    kind: str, structure: str, percent: int
) -> None:
    weight, inputs, _ = problem()
    inputs = SINGULAR[kind](inputs).contiguous()
    moments = MomentAccumulator()
    moments.add(inputs)
    final = moments.finish("layer")
    compensated, rtn = (
        one(weight, final, percent, structure=structure, solver=solver).decode()
        for solver in ("compensated", "rtn")
    )
    assert torch.isfinite(compensated).all()
    if inputs.any():
        inputs, dense = inputs.double(), weight.double()
        assert output_error(compensated.double(), dense, inputs) <= output_error(
            rtn.double(), dense, inputs
        )
    else:  # nothing is known of the inputs: the weights stay as they are
        assert (compensated - weight).square().sum() <= 1.1 * (rtn - weight).square().sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_are_not_finite_are_an_error_naming_the_layer(
    value: float, solver: Solver
) -> None:
    weight, _, moments = problem()
    bad = weight.clone()
    bad[3, 4] = value
    recipe = Recipe("test", 4, 50, 16, solver=solver)
    with pytest.raises(ModelError, match=r"weights of layer model\.up are not finite"):
        compress_rows(
            [weight, bad], moments, [recipe.target] * 2, recipe, ["model.gate", "model.up"]
        )


def test_numbers_too_small_to_compute_with_are_an_error_naming_the_layer() -> None:
    weight, inputs, _ = problem()
    moments = MomentAccumulator()
    moments.add(inputs * 1e-22)  # their squares are below float32's normal numbers
    recipe = Recipe("test", 4, 50, 16)
    with pytest.raises(ModelError, match=r"layer up are not finite numbers.* or too small"):
        compress_rows([weight], moments.finish("up"), [recipe.target], recipe, ["up"])


def test_a_hessian_that_cannot_be_inverted_is_an_error_naming_the_layer() -> None:
    weight, _, _ = problem()
    recipe = Recipe("test", 4, 50, 16)
    with pytest.raises(ModelError, match="inputs of layer up give no matrix"):
        compress_rows([weight], Moments(-torch.eye(K).double()), [recipe.target], recipe, ["up"])


def test_fisher_keeps_more_where_errors_cost_more() -> None:
    weight, _, moments = problem()
    recipe = Recipe("test", 4, 50, G, score="fisher")
    rows = torch.ones(len(weight))
    dear = len(weight) // 2
    rows[:dear] = 100.0
    plain_result = one(weight, moments, 50)
    (result,) = compress_rows([weight], moments, [recipe.target], recipe, row_weights=[rows])
    assert int(result.keep.sum()) == int(plain_result.keep.sum())
    assert int(result.keep[:dear].sum()) > int(plain_result.keep[:dear].sum())


def test_fisher_with_equal_rows_is_obs() -> None:
    weight, _, moments = problem()
    fisher = one(weight, moments, 50, score="fisher")
    assert torch.equal(fisher.decode(), one(weight, moments, 50).decode())
