"""One layer: masks have the counts asked for, and compensation pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gqsa_compiler.checkpoint import from_codes, to_dense
from gqsa_compiler.compress.hessian import MomentAccumulator, Moments, inverse
from gqsa_compiler.compress.importance import choose_mask, group_blocks, obs_scores
from gqsa_compiler.compress.oneshot import (
    GroupedWeight,
    MaskedSolver,
    compress_rows,
)
from gqsa_compiler.compress.quantizer import fit_grid, round_to_grid
from gqsa_compiler.compress.recipe import parse_recipe
from gqsa_compiler.errors import ModelError

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


def output_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - dense).T).square().sum() / (inputs @ dense.T).square().sum())


def plain(weight: Tensor, keep: Tensor) -> Tensor:
    """Return `weight` rounded to the nearest on 4-bit grids, without any compensation."""
    parts = weight.reshape(len(weight), -1, G)
    scale, zero = fit_grid(parts)
    rounded = round_to_grid(parts, scale[..., None], zero[..., None]).reshape(weight.shape)
    return rounded * keep.repeat_interleave(G, 1)


@pytest.mark.parametrize("balance", ["matrix", "row"])
@pytest.mark.parametrize("percent", [0, 30, 50, 95])
def test_mask_counts(balance: str, percent: int) -> None:
    weight, _, moments = problem()
    (result,) = compress_rows([weight], moments, parse_recipe(f"w4s{percent}g16"), balance)
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
    (result,) = compress_rows([weight], moments, parse_recipe(f"w4s{percent}g16"), balance)
    compensated = output_error(result.decode(), weight, inputs)
    assert compensated < 0.6 * output_error(plain(weight, result.keep), weight, inputs)


def test_matrix_balance_loses_less_than_row_balance() -> None:
    weight, inputs, moments = problem()
    weight[:4] *= 8  # rows that matter more
    recipe = parse_recipe("w4s50g16")
    matrix, row = (
        output_error(compress_rows([weight], moments, recipe, b)[0].decode(), weight, inputs)
        for b in ("matrix", "row")
    )
    assert matrix < row


def test_layers_with_one_input_are_pruned_each_on_its_own() -> None:
    weight, _, moments = problem()
    recipe = parse_recipe("w4s50g16")
    parts = compress_rows([weight, weight[:8] * 100], moments, recipe, "matrix")
    assert [int(p.keep.sum()) for p in parts] == [N * 3, 8 * 3]
    assert [p.decode().shape for p in parts] == [(N, K), (8, K)]


def test_drift_of_the_inputs_is_made_up_for() -> None:
    weight, dense_inputs, _ = problem()
    inputs = dense_inputs @ (torch.eye(K) * 0.8)  # an earlier layer lost a fifth
    moments = MomentAccumulator()
    moments.add(inputs, dense=dense_inputs)
    (result,) = compress_rows([weight], moments.finish("l"), parse_recipe("w4s0g16"), "matrix")
    wanted = dense_inputs @ weight.T
    error = (inputs @ result.decode().T - wanted).square().sum() / wanted.square().sum()
    unaware = (inputs @ weight.T - wanted).square().sum() / wanted.square().sum()
    assert error < 0.5 * unaware


def test_dead_inputs_keep_their_weights_and_hurt_nothing() -> None:
    weight, inputs, moments = problem(dead=True)
    (result,) = compress_rows([weight], moments, parse_recipe("w4s0g16"), "matrix")
    assert torch.isfinite(result.decode()).all()
    assert output_error(result.decode(), weight, inputs) < 0.01
    dead = result.decode()[:, 32:48] - weight[:, 32:48]
    assert dead.abs().max() < 0.5


def test_inputs_that_are_all_zero() -> None:
    weight, inputs, _ = problem()
    moments = MomentAccumulator()
    moments.add(inputs * 0)
    (result,) = compress_rows([weight], moments.finish("l"), parse_recipe("w4s30g16"), "matrix")
    assert torch.isfinite(result.decode()).all()


def test_inputs_that_are_not_finite_are_an_error_naming_the_layer() -> None:
    moments = MomentAccumulator()
    moments.add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ModelError, match=r"layer model\.layers\.3\.mlp\.up_proj are not finite"):
        moments.finish("model.layers.3.mlp.up_proj")


def test_decoded_weight_is_what_the_checkpoint_decodes_to() -> None:
    weight, _, moments = problem()
    (result,) = compress_rows([weight], moments, parse_recipe("w4s30g16"), "matrix")
    layer = from_codes(
        "l",
        (N, K),
        G,
        result.keep.numpy(),
        result.codes.numpy().astype(np.uint8),
        result.scales.half().numpy(),
        result.zeros.numpy().astype(np.uint8),
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


def test_obs_scores_match_the_formula() -> None:
    weight, _, moments = problem()
    inverted = inverse(moments.hessian)
    blocks = torch.linalg.inv(group_blocks(inverted, G)).float()
    scores = obs_scores(weight, blocks)
    w = weight[3, 2 * G : 3 * G].double()
    block = inverted[2 * G : 3 * G, 2 * G : 3 * G]
    expected = float(w @ torch.linalg.inv(block) @ w / 2)
    assert float(scores[3, 2]) == pytest.approx(expected, rel=1e-4)


def test_ties_keep_the_earlier_groups() -> None:
    mask = choose_mask(torch.ones(2, 4), 0.5, "row")
    assert mask.tolist() == [[True, True, False, False]] * 2


def test_rows_slices_every_part() -> None:
    weight, _, moments = problem()
    (result,) = compress_rows([weight], moments, parse_recipe("w4s30g16"), "matrix")
    part: GroupedWeight = result.rows(3, 5)
    assert torch.equal(part.decode(), result.decode()[3:5])
