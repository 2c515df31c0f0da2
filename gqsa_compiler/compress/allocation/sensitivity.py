"""How much the model's loss grows with what each layer becomes.

To second order the divergence of a changed model from the dense one is, a token,
``E[(g . dy)^2] / 2``: dy is what changes in a layer's output and g the gradient there of the
log-likelihood of a token that the model itself draws (the Fisher information). Leaving out products
of different outputs and tokens, and taking the sizes of a token's gradients together, a layer whose
rows w_n change by e_n costs

    sum_n f_n e_n R e_n^T / 2,   f_n = mean of g_n^2,   R = mean of x x^T |g|^2 / (mean of |g|^2)

over the calibration tokens. e_n is measured: groups are dropped step by step as compression does,
the rest made up for, and rounding adds what the sweep is expected to leave.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.allocation.costs import LayerCosts
from gqsa_compiler.compress.allocation.traces import LayerTrace, trace_layers
from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.solver.compensate import Curvature, MaskedSolver
from gqsa_compiler.compress.solver.hessian import MomentAccumulator
from gqsa_compiler.compress.solver.importance import Scorer, choose_mask
from gqsa_compiler.compress.solver.quantizer import fit_grid, round_to_grid
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.progress import Progress

TOKENS = 4096
"""Calibration tokens that are used, about."""

LONGEST = 512
"""Tokens of a sequence that are used: more sequences tell more than longer ones."""

ROWS = 256
"""Rows of a layer that are pruned to learn its curve, evenly spread over it."""

STEP = 0.1
"""Between the sparsities at which costs are measured."""

REFIT_STEPS = 6
"""Conjugate gradient steps of the refit after each of them."""


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What was measured of a model.

    Parameters
    ----------
    costs : tuple of LayerCosts
        In the model's order.
    rows : mapping of str to float32 [N]
        By module path, f: what an error in each of the layer's outputs costs. Scores of groups
        times their row's f can be compared within the layer.
    """

    costs: tuple[LayerCosts, ...]
    rows: Mapping[str, Tensor]


def measure(
    source: ModelSource,
    tokens: Tensor,
    *,
    bits: Sequence[int],
    group_sizes: Sequence[int],
    most_sparsity: float,
    balance: str = "matrix",
    weigh_rows: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Sensitivities:
    """Measure what compressing each linear layer of a model's blocks costs.

    The dense model runs once forwards and once backwards, a block at a time.

    Parameters
    ----------
    source : ModelSource
        A dense model.
    tokens : int64 [S, T]
        Calibration sequences, of which about `TOKENS` tokens are used.
    bits, group_sizes : sequence of int
        Costs are measured for each pair.
    most_sparsity : float
        Costs are measured from sparsity 0 to this one.
    balance : str
        How a layer's groups are dropped; see `choose_mask`.
    weigh_rows : bool
        Whether groups are dropped by their scores times their row's f.
    seed : int
        Of the tokens drawn from the model's predictions.
    device : torch.device or str
        Where everything is computed; `rows` are on the CPU.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    Sensitivities

    Raises
    ------
    ModelError
        A layer's output, gradient or cost is NaN or infinite; the message names it.
    """
    chosen = choose_tokens(tokens)
    sparsities = measured_sparsities(most_sparsity)
    costs: list[LayerCosts] = []
    rows: dict[str, Tensor] = {}
    for trace in trace_layers(source, chosen, seed=seed, device=device, progress=progress):
        rows[trace.name] = row_weights(trace).cpu()
        costs.append(_layer_costs(trace, bits, group_sizes, sparsities, balance, weigh_rows))
    return Sensitivities(tuple(reversed(costs)), rows)


def row_weights(trace: LayerTrace) -> Tensor:
    """Return f, float32 [N]: the mean square of each output's gradient."""
    return trace.gradients.square().mean(0)


def choose_tokens(tokens: Tensor) -> Tensor:
    """Choose about `TOKENS` tokens, int64 [S', T'], from sequences evenly spread over `tokens`."""
    samples, length = tokens.shape[0], min(tokens.shape[1], LONGEST)
    count = min(samples, max(1, TOKENS // length))
    return tokens[[index * samples // count for index in range(count)], :length]


def measured_sparsities(most: float) -> tuple[float, ...]:
    """List the sparsities at which costs are measured: 0, every `STEP`, and `most`."""
    steps = itertools.takewhile(lambda s: s < most - 1e-9, (i * STEP for i in itertools.count()))
    return (*(round(step, 9) for step in steps), most)


@torch.no_grad()
def _layer_costs(
    trace: LayerTrace,
    bits: Sequence[int],
    group_sizes: Sequence[int],
    sparsities: tuple[float, ...],
    balance: str,
    weigh_rows: bool,
) -> LayerCosts:
    n, k = trace.weight.shape
    moments = MomentAccumulator()
    moments.add(trace.inputs)
    curvature = Curvature(moments.finish(trace.name).hessian)
    risk = _risk(trace)
    rows = [index * n // min(n, ROWS) for index in range(min(n, ROWS))]
    # The rows that are looked at stand for all of them.
    share = 0.5 * row_weights(trace)[rows] * (n / len(rows))
    weight = trace.weight[rows]
    curves: dict[tuple[int, int], tuple[float, ...]] = {}
    for group_size in group_sizes:
        if k % group_size:
            continue
        scale = share if weigh_rows else None
        steps = list(_prune(weight, curvature, scale, group_size, sparsities, balance))
        losses = [float((linear(change, risk) * change).sum(1) @ share) for _, change in steps]
        for width in bits:
            rounding = _rounding(weight, curvature, risk, group_size, width) * share[:, None]
            costs = [
                loss + float((rounding * mask).sum())
                for loss, (mask, _) in zip(losses, steps, strict=True)
            ]
            # Dropping a group also saves its rounding, which may be more at low sparsity.
            curves[width, group_size] = tuple(itertools.accumulate(costs, max))
    return LayerCosts(trace.name, (n, k), sparsities, curves)


def _risk(trace: LayerTrace) -> Tensor:
    """Return R, float32 [K, K], shrunk and damped as the Hessian is.

    Unshrunk, it would take what was fitted to these very tokens for better than it is.
    """
    power = trace.gradients.square().sum(1)
    mean = power.mean()
    weights = power / mean if mean > 0 else torch.ones_like(power)
    moments = MomentAccumulator()
    moments.add(trace.inputs * weights.sqrt()[:, None])
    return moments.finish(trace.name).hessian.float()


def _prune(
    weight: Tensor,
    curvature: Curvature,
    scale: Tensor | None,
    group_size: int,
    sparsities: tuple[float, ...],
    balance: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Drop groups up to each of `sparsities`: the mask bool [N, K/G] and the change [N, K].

    `scale` [N] is what the scores of each row are multiplied with.
    """
    solver = MaskedSolver(curvature.single, linear(weight, curvature.single), group_size)
    scorer = Scorer("obs", curvature.exact, curvature.inverse, group_size)
    fitted = weight
    for sparsity in sparsities:
        scores = scorer(fitted)
        mask = choose_mask(scores if scale is None else scores * scale[:, None], sparsity, balance)
        if sparsity:
            fitted = solver.refit(fitted, mask, REFIT_STEPS)
        yield mask, fitted - weight


def _rounding(
    weight: Tensor, curvature: Curvature, risk: Tensor, group_size: int, bits: int
) -> Tensor:
    """Return what rounding each group is expected to cost, float32 [N, K/G].

    The sweep passes each column's rounding error on to the columns behind it by a row of the
    inverse Hessian's factor, so the error's cost is that of the factor's row.
    """
    factor = curvature.factor
    passed = ((factor @ risk) * factor).sum(1) / factor.diagonal().square()
    groups = weight.reshape(len(weight), -1, group_size)
    importance = (factor.diagonal() ** -2).reshape(-1, group_size)
    scale, zero = fit_grid(groups, bits, importance)
    wrong = round_to_grid(groups, scale[..., None], zero[..., None], bits) - groups
    return (wrong.square() * passed.reshape(-1, group_size)).sum(-1)
