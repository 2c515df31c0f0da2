"""The head in one shot: as good as any layer, whatever number of rows is solved at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.recipes.recipe import Head, Solver
from gqsa_compiler.compress.solver import head as head_module
from gqsa_compiler.compress.solver.head import compress_head
from gqsa_compiler.compress.solver.hessian import MomentAccumulator, Moments
from gqsa_compiler.compress.solver.rtn import round_weight
from gqsa_compiler.errors import ModelError
from tests.compress.training.helpers import is_storable, same_weight

ROWS, COLUMNS = 50, 64


def problem() -> tuple[Tensor, Tensor, Moments]:
    """Return a head, correlated states and their moments."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=random)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=random) / COLUMNS**0.5 + 0.2
    states = torch.randn(1500, COLUMNS, generator=random) @ mixing
    moments = MomentAccumulator()
    moments.add(states)
    return weight, states, moments.finish("head")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_makes_up_for_its_errors(bits: int) -> None:
    weight, states, moments = problem()
    head = Head(bits, 16)
    errors = []
    for solver in ("rtn", "compensated"):
        found = compress_head("lm_head", weight, moments, head, solver)  # type: ignore[arg-type]
        is_storable(found)
        assert bool(found.keep.all())
        assert found.codes.shape == (ROWS, COLUMNS // 16, 16)
        errors.append(float(((found.decode() - weight) @ states.T).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_rounding_is_rounding() -> None:
    weight, _, moments = problem()
    mask = torch.ones(ROWS, COLUMNS // 32, dtype=torch.bool)
    same_weight(
        compress_head("lm_head", weight, moments, Head(), "rtn"), round_weight(weight, mask, 32, 4)
    )


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moments = problem()
    whole = compress_head("lm_head", weight, moments, Head(), "compensated")
    monkeypatch.setattr(head_module, "ROWS", 16)
    parts = compress_head("lm_head", weight, moments, Head(), "compensated")
    # Sums of other sizes may round otherwise.
    assert float((parts.codes != whole.codes).float().mean()) < 1e-2


@pytest.mark.parametrize("solver", ["rtn", "compensated"])
def test_a_head_too_small_for_any_scale(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tokens that never occur may be, even if they are solved by themselves."""
    monkeypatch.setattr(head_module, "ROWS", 16)
    weight, _, moments = problem()
    weight[16:] *= 1e-12
    found = compress_head("lm_head", weight, moments, Head(), solver)
    assert not found.decode()[16:].any()
    with pytest.raises(ModelError, match=r"weights of layer lm_head are at most 4\.\de-12 in size"):
        compress_head("lm_head", weight * 1e-12, moments, Head(), solver)


def test_a_damaged_head_is_named() -> None:
    weight, _, moments = problem()
    weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match="weights of layer lm_head are not finite"):
        compress_head("lm_head", weight, moments, Head(), "compensated")
