"""Scores match their formulas, and masks keep what scores best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.counts import kept_groups
from gqsa_compiler.compress.solver.hessian import inverse
from gqsa_compiler.compress.solver.importance import (
    Scorer,
    choose_mask,
    choose_of_four,
    group_blocks,
    magnitude_scores,
    obs_scores,
)
from gqsa_compiler.compress.solver.two_of_four import column_values, sweep_mask

N, K, G = 6, 32, 8


def problem() -> tuple[Tensor, Tensor]:
    """Return a weight float32 [N, K] and a Hessian float64 [K, K]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, K, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(K, K, generator=generator, dtype=torch.float64)
    return torch.randn(N, K, generator=generator), inputs.T @ inputs / 200 + torch.eye(K)


@pytest.mark.parametrize("size", [G, 1])
def test_obs_scores_match_the_formula(size: int) -> None:
    weight, hessian = problem()
    inverted = inverse(hessian)
    scores = obs_scores(weight, torch.linalg.inv(group_blocks(inverted, size)).float())
    assert scores.shape == (N, K // size)
    for row in range(N):
        for group in range(K // size):
            part = slice(group * size, (group + 1) * size)
            w = weight[row, part].double()
            expected = float(w @ torch.linalg.inv(inverted[part, part]) @ w / 2)
            assert float(scores[row, group]) == pytest.approx(expected, rel=1e-4)


def test_obs_scores_are_what_dropping_costs() -> None:
    weight, hessian = problem()
    scores = Scorer("obs", hessian, inverse(hessian), G)(weight)
    # The rest of the row, refitted without group 1.
    rest = torch.ones(K, dtype=torch.bool)
    rest[G : 2 * G] = False
    w = weight[2].double()
    best = torch.zeros(K, dtype=torch.float64)
    best[rest] = torch.linalg.solve(hessian[rest][:, rest], (hessian @ w)[rest])
    cost = (best - w) @ hessian @ (best - w) / 2
    assert float(scores[2, 1]) == pytest.approx(float(cost), rel=1e-4)


def test_magnitude_and_wanda_scores_match_their_formulas() -> None:
    weight, hessian = problem()
    magnitude = Scorer("magnitude", hessian, None, G)(weight)
    wanda = Scorer("wanda", hessian, None, G)(weight)
    power = hessian.diagonal()
    for row in range(N):
        for group in range(K // G):
            columns = range(group * G, (group + 1) * G)
            assert float(magnitude[row, group]) == pytest.approx(
                sum(float(weight[row, j]) ** 2 for j in columns), rel=1e-5
            )
            norm = sum((float(weight[row, j]) * float(power[j]) ** 0.5) ** 2 for j in columns)
            assert float(wanda[row, group]) == pytest.approx(norm, rel=1e-5)
    assert torch.equal(magnitude_scores(weight, 1), weight.square())


def test_kept_groups_round_halves_up_and_keep_one() -> None:
    assert [kept_groups(5, s) for s in (0.0, 0.3, 0.5, 0.95)] == [5, 4, 3, 1]
    assert kept_groups(1, 0.9) == 1


def test_masks_keep_the_best() -> None:
    scores = torch.tensor([[1.0, 9.0, 8.0, 7.0], [6.0, 2.0, 3.0, 4.0]])
    row = choose_mask(scores, 0.5, "row")
    assert row.tolist() == [[False, True, True, False], [True, False, False, True]]
    matrix = choose_mask(scores, 0.5, "matrix")
    assert matrix.tolist() == [[False, True, True, True], [True, False, False, False]]


def test_ties_keep_the_earlier_groups() -> None:
    mask = choose_mask(torch.ones(2, 4), 0.5, "row")
    assert mask.tolist() == [[True, True, False, False]] * 2
    assert choose_of_four(torch.ones(2, 4)).tolist() == mask.tolist()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_of_four_the_best_are_kept(keep: int) -> None:
    scores = torch.rand(N, K, generator=torch.Generator().manual_seed(1))
    mask = choose_of_four(scores, keep)
    for row in range(N):
        for start in range(0, K, 4):
            quad = scores[row, start : start + 4].tolist()
            best = sorted(quad, reverse=True)[:keep]
            assert mask[row, start : start + 4].tolist() == [value in best for value in quad]


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_sweep_mask_is_the_slow_sweep(score: str) -> None:
    """SparseGPT, weight by weight, with the inverse of what is left of the Hessian."""
    generator = torch.Generator().manual_seed(3)
    features = 136  # more than one run of columns whose errors are gathered
    inputs = torch.randn(400, features, generator=generator, dtype=torch.float64)
    inputs += inputs[:, :1]
    hessian = inputs.T @ inputs / 400
    weight = torch.randn(3, features, generator=generator)
    factor = torch.linalg.cholesky(inverse(hessian), upper=True).float()
    mask = sweep_mask(weight, factor, column_values(score, hessian, factor))  # type: ignore[arg-type]
    for row in range(3):
        w = weight[row].double()
        for start in range(0, features, 4):
            # Column j's own inverse: of the columns from j on.
            inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(start, start + 4)]
            worth = {
                "obs": [1 / float(left[0, 0]) for left in inverses],
                "wanda": hessian.diagonal()[start : start + 4].tolist(),
                "magnitude": [1.0] * 4,
            }[score]
            scores = [float(w[start + i]) ** 2 * worth[i] for i in range(4)]
            best = sorted(range(4), key=lambda i: -scores[i])[:2]
            for i in range(4):
                assert bool(mask[row, start + i]) == (i in best)
                if i not in best:
                    left = inverses[i]
                    w[start + i :] -= w[start + i] / left[0, 0] * left[0]
