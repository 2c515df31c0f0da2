"""Mask refinement while a block trains: dropped groups that grow are revived in others' places."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gqsa_compiler.compress.solver.importance import best, magnitude_scores
from gqsa_compiler.compress.solver.quantizer import fit_grid
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear

FROZEN_FROM = 0.5
"""Share of the steps after which masks are frozen."""


class MaskSchedule:
    """Chooses the masks of a block's layers anew, some times, and then freezes them.

    Until then the latent weights of dropped groups get the gradient that they would have if they
    were kept, so that a group the others cannot make up for grows. At an update every layer keeps
    as many groups as before: those of the highest activation-weighted magnitude. A row keeps as
    many as before where `rows` says so.

    Parameters
    ----------
    layers : mapping of str to GroupedLinear
    updates : int
        0 freezes the masks from the start.
    steps : int
        Steps of the whole training.
    rows : bool
        Rows keep their numbers of groups.
    """

    def __init__(
        self, layers: Mapping[str, GroupedLinear], updates: int, steps: int, *, rows: bool = False
    ) -> None:
        self.swapped = 0
        self._layers = [layer for layer in layers.values() if not bool(layer.keep.all())]
        last = max(1, int(steps * FROZEN_FROM))
        self._due = {max(1, last * turn // updates) for turn in range(1, updates + 1)}
        self._rows = rows
        for layer in self._layers:
            layer.explore(bool(self._due))

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Choose the masks anew if it is time; `done` steps have been taken."""
        if done not in self._due:
            return
        for layer in self._layers:
            self._choose(layer)
        if done == max(self._due):
            for layer in self._layers:
                layer.explore(False)

    def _choose(self, layer: GroupedLinear) -> None:
        assert layer.latent is not None
        size = layer.grid_shape[2]
        scores = magnitude_scores(layer.latent, size, layer.input_power())
        keep = best_groups(scores, layer.keep, rows=self._rows)
        revived = keep & ~layer.keep
        if not bool(revived.any()):
            return
        self.swapped += int(revived.sum())
        # A dropped group's scale and zero point mean nothing.
        groups = layer.latent.view(layer.grid_shape)[revived]
        scale, zero = fit_grid(groups, layer.bits)
        layer.scale[revived] = scale
        layer.zero[revived] = zero
        layer.keep = keep


def best_groups(scores: Tensor, keep: Tensor, *, rows: bool) -> Tensor:
    """Keep as many groups as before, those of the highest scores; ties keep the earlier group.

    Parameters
    ----------
    scores : float32 [N, K/G]
    keep : bool [N, K/G]
        The mask before.
    rows : bool
        As many as before in every row, not only in the matrix.

    Returns
    -------
    bool [N, K/G]
    """
    pool = scores if rows else scores.reshape(1, -1)
    counts = keep.reshape(pool.shape).sum(1, keepdim=True)
    return best(pool, counts).reshape(scores.shape)
