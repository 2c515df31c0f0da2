"""What a caller asks for, checked: the one way in of the command line and the Python API.

No PyTorch: what is wrong is said at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gqsa_compiler.compress.calibration.spec import CalibrationSpec, parse_calibration
from gqsa_compiler.compress.recipes.budget import Budget, parse_budget
from gqsa_compiler.compress.recipes.presets import default_samples, with_stages
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.recipe_file import load_recipe
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.models.registry import parse_config

PathText = str | os.PathLike[str]


@dataclass(frozen=True)
class CompressOptions:
    """How to compress a model.

    Parameters
    ----------
    recipe : Recipe
    calibration : CalibrationSpec
    seed : int
        Of the training's order and of all that is drawn. The same seed gives the same checkpoint
        on the same kind of CPU with the same number of threads.
    device : str
        ``auto`` (a CUDA GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    overwrite : bool
        Replace an existing checkpoint.
    restart : bool
        Discard what an unfinished run has left; by default the same request goes on with it.
    """

    recipe: Recipe
    calibration: CalibrationSpec
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        """Refuse a seed that generators do not take."""
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"The seed is {self.seed}; it must be 0 to 2^63 - 1.")


def choose_recipe(
    recipe: PathText | Recipe,
    *,
    stages: str | Sequence[str] | None = None,
    budget: str | Budget | None = None,
    balance: str | None = None,
) -> Recipe:
    """Return the recipe that is asked for.

    Parameters
    ----------
    recipe : str, path or Recipe
        A preset's name, e.g. ``w4s50g16``, or a YAML file.
    stages : str or sequence of str, optional
        The training stages to run instead of the recipe's: ``block,weights,scales`` or some of
        them; ``none`` for no training.
    budget : str or Budget, optional
        A size that each layer's sparsity is chosen for, e.g. ``3.1`` (bits a weight) or ``60MB``.
        A text keeps what else the recipe's own budget says.
    balance : str, optional
        ``model``, ``matrix`` or ``row``, instead of the recipe's.

    Raises
    ------
    UsageError
        There is no such recipe, stage, budget or balance, or they do not go together.
    """
    names = stages
    if isinstance(stages, str):
        names = [name.strip() for name in stages.split(",")]
    if isinstance(recipe, Recipe):
        chosen = recipe if names is None else with_stages(recipe, names)
    else:
        chosen = load_recipe(os.fspath(recipe), names)
    if isinstance(budget, str):
        size = parse_budget(budget)
        if chosen.budget is not None:
            size = replace(chosen.budget, bits_per_weight=size.bits_per_weight, bytes=size.bytes)
        budget = size
    if budget is not None:
        chosen = replace(chosen, budget=budget)
    return chosen if balance is None else replace(chosen, balance=balance)


def choose_calibration(
    source: ModelSource,
    recipe: Recipe,
    calibration: CalibrationSpec | PathText | Sequence[PathText] | None = None,
    *,
    samples: int | Literal["all"] | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
) -> CalibrationSpec:
    """Return what to calibrate on; the numbers that are not given suit the recipe and the model.

    Parameters
    ----------
    source : ModelSource
        The dense model.
    recipe : Recipe
    calibration : CalibrationSpec, str, path or sequence of them, optional
        Text files, ``hf:NAME`` for a data set, or ``sampled`` (the default: the model writes).
        A `CalibrationSpec` has its own numbers.
    samples : int or ``all``, optional
        Sequences. By default `default_samples`, or all of a text that has fewer.
    sequence_length : int, optional
        Tokens of a sequence. By default `default_samples`, or the model's longest.
    seed : int

    Raises
    ------
    UsageError
        A file is not there, a number is out of range, or the model takes no sequences so long.
    ModelError
        The model's configuration is not understood.
    """
    longest = parse_config(source.config, str(source.path)).max_position_embeddings
    if isinstance(calibration, CalibrationSpec):
        if samples is not None or sequence_length is not None:
            raise UsageError(
                "Numbers of samples and tokens are given twice; set them in the CalibrationSpec."
            )
        spec = calibration
    else:
        usual_samples, usual_length = default_samples(recipe)
        if calibration is None:
            calibration = ()
        elif isinstance(calibration, (str, os.PathLike)):
            calibration = (calibration,)
        spec = parse_calibration(
            [os.fspath(value) for value in calibration],
            samples=_number(samples, usual_samples),
            sequence_length=min(usual_length, longest) if sequence_length is None
            else sequence_length,
            seed=seed,
        )  # fmt: skip
        if samples is None:
            spec = replace(spec, exact=False)
    if spec.sequence_length > longest:
        raise UsageError(
            f"The model {source.name} takes at most {longest} tokens, not a calibration sequence "
            f"of {spec.sequence_length}."
        )
    return spec


def _number(samples: int | Literal["all"] | None, usual: int) -> int | None:
    """Return a number of sequences, as `CalibrationSpec` has it: None is all."""
    if samples is None:
        return usual
    return None if samples == "all" else samples
