"""Recipes by name: GQSA at any strength, and the baselines that it is compared with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gqsa_compiler.compress.recipes.recipe import (
    STAGES,
    BlockStage,
    Head,
    ModelStage,
    Recipe,
    Score,
    Solver,
    Structure,
)
from gqsa_compiler.errors import UsageError

BASELINE = "baseline/"
"""What the names of baselines begin with."""

NO_STAGES = "none"
"""The name of no training at all, where stages are named."""

MOST_HEAD_BITS = 4
"""GQSA recipes of at most so many bits compress the head too, by default settings."""

_NUMBER = "(0|[1-9][0-9]{0,3})"
_GQSA = re.compile(f"w{_NUMBER}s{_NUMBER}g{_NUMBER}")


class DefaultStages(NamedTuple):
    """The settings of each training stage that a recipe gets if it says nothing else."""

    block: BlockStage
    weights: ModelStage
    scales: ModelStage


def default_stages() -> DefaultStages:
    """Return the training stages that a recipe gets: all the numbers are here."""
    return DefaultStages(
        block=BlockStage(weight_rate=1e-2),
        weights=ModelStage(
            epochs=3.0,
            most_tokens=3 << 17,
            weight_rate=1e-2,
            scale_rate=4e-3,
            norm_rate=4e-3,
        ),
        scales=ModelStage(most_tokens=1 << 17, scale_rate=2e-3, norm_rate=2e-3),
    )


def default_samples(recipe: Recipe) -> tuple[int, int]:
    """Return the calibration sequences and the tokens of each that suit a recipe.

    Training end to end wants many and long ones, each seen once rather than a few of them often: as
    many as the stages train on. One shot and stage one do with less.
    """
    return (768, 512) if recipe.weights or recipe.scales else (128, 128)


@dataclass(frozen=True)
class _Baseline:
    """A baseline's method; its name is ``baseline/<method>-<numbers>``."""

    about: str
    pruned: bool
    structure: Structure = "group"
    score: Score = "obs"
    solver: Solver = "compensated"
    balance: str = "matrix"

    @property
    def numbers(self) -> str:
        return "w<bits>s<sparsity %>g<group>" if self.pruned else "w<bits>g<group>"

    def match(self, numbers: str) -> tuple[int, int, int] | None:
        """Read (bits, sparsity %, group size), or None."""
        sparsity = f"s{_NUMBER}" if self.pruned else "()"
        found = re.fullmatch(f"w{_NUMBER}{sparsity}g{_NUMBER}", numbers)
        if found is None:
            return None
        bits, percent, group = found.groups()
        return int(bits), int(percent or 0), int(group)


_BASELINES = {
    "rtn": _Baseline("rounded to the nearest", pruned=False, solver="rtn"),
    "gptq": _Baseline("error-compensated quantisation (like GPTQ)", pruned=False),
    "2of4": _Baseline("2 of 4 weights kept (like SparseGPT)", pruned=False, structure="2:4"),
    "magnitude": _Baseline(
        "groups of the smallest weights dropped, no compensation",
        pruned=True,
        score="magnitude",
        solver="rtn",
    ),
    "wanda": _Baseline(
        "groups of the smallest weights times inputs dropped in every row, no compensation",
        pruned=True,
        score="wanda",
        solver="rtn",
        balance="row",
    ),
}

_LISTED = (
    ("w4s50g16", "half of the groups of 16 weights, 4 bits: 3.1 bits a weight"),
    ("w4s30g16", "70% of the groups of 16 weights, 4 bits: 4.4 bits a weight, closer to the model"),
    ("w4s50g32", "half of the groups of 32 weights, 4 bits: 2.6 bits a weight"),
    ("w4s0g128", "all groups of 128 weights, 4 bits, nothing dropped"),
    ("w3s0g128", "all groups of 128 weights, 3 bits, nothing dropped"),
    ("w2s0g64", "all groups of 64 weights, 2 bits, nothing dropped"),
)
_LISTED_BASELINES = (
    *(f"{method}-w{b}g{g}" for method in ("rtn", "gptq") for b in (4, 3, 2) for g in (64, 128)),
    "2of4-w4g128",
    "magnitude-w4s50g16",
    "wanda-w4s50g16",
)


def preset_names() -> dict[str, str]:
    """List presets with a line about each. There are more: the numbers in them can be others."""
    listed = dict(_LISTED)
    for name in _LISTED_BASELINES:
        listed[BASELINE + name] = _BASELINES[name.split("-")[0]].about
    return listed


def parse_recipe(name: str, stages: Sequence[str] | None = None) -> Recipe:
    """Read a recipe's name.

    Parameters
    ----------
    name : str
        ``w<bits>s<sparsity %>g<group>``, e.g. ``w4s30g16``: GQSA, with all training stages. Or a
        baseline, e.g. ``baseline/gptq-w3g128``: without training.
    stages : sequence of str, optional
        The training stages to run instead, each with its default settings: any of `STAGES`;
        ``none`` or an empty sequence for no training.

    Raises
    ------
    UsageError
        The name has another form, or a number or a stage does not exist.
    """
    if name.startswith(BASELINE):
        recipe = _baseline(name)
    else:
        found = _GQSA.fullmatch(name)
        if found is None:
            raise _unknown(name)
        bits, percent, group = map(int, found.groups())
        balance = "model" if percent else "matrix"
        head = Head() if bits <= MOST_HEAD_BITS else None
        recipe = Recipe(name, bits, percent, group, score="fisher", balance=balance, head=head)
        recipe = with_stages(recipe, STAGES)
    return recipe if stages is None else with_stages(recipe, stages)


def with_stages(recipe: Recipe, stages: Iterable[str]) -> Recipe:
    """Return the recipe with these training stages and no others.

    One that the recipe has keeps its settings; another one gets the default ones.

    Raises
    ------
    UsageError
        A stage is unknown, or named twice.
    """
    wanted = tuple(stages)
    for index, stage in enumerate(wanted):
        if stage == NO_STAGES and len(wanted) > 1:
            raise UsageError(f"The stage {NO_STAGES} stands for no training: name it alone.")
        if stage not in (*STAGES, NO_STAGES):
            raise UsageError(
                f"There is no training stage {stage!r}{_did_you_mean(stage, STAGES)} Name any of "
                f"{', '.join(STAGES)}, or {NO_STAGES} alone for no training."
            )
        if stage in wanted[:index]:
            raise UsageError(
                f"The training stage {stage} is named twice; each runs once, in the order "
                f"{', '.join(STAGES)}."
            )
    settings: dict[str, Any] = {}
    for stage in STAGES:
        default = getattr(default_stages(), stage)
        settings[stage] = (getattr(recipe, stage) or default) if stage in wanted else None
    return replace(recipe, **settings)


def _baseline(name: str) -> Recipe:
    method, _, numbers = name.removeprefix(BASELINE).partition("-")
    baseline = _BASELINES.get(method)
    read = None if baseline is None else baseline.match(numbers)
    if baseline is None or read is None:
        raise _unknown(name)
    return Recipe(
        name,
        *read,
        structure=baseline.structure,
        score=baseline.score,
        solver=baseline.solver,
        balance=baseline.balance,
    )


def _unknown(name: str) -> UsageError:
    forms = ", ".join(f"{BASELINE}{key}-{baseline.numbers}" for key, baseline in _BASELINES.items())
    return UsageError(
        f"{name!r} is not a recipe{_did_you_mean(name, preset_names())} Recipes are "
        f"w<bits>s<sparsity %>g<group>, for example w4s30g16; {forms}; and files *.yaml."
    )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """End a sentence, with the known names that are like an unknown one."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "."
