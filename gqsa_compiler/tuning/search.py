"""Which configuration of a space to try next."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import util
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import UsageError
from gqsa_compiler.tuning.records import config_key
from gqsa_compiler.tuning.tasks import Task

FULL = 24
"""Spaces up to this size are tried from end to end, without a model."""
EXPLORE = 0.2
"""Share of the trials that are chosen at random all the same."""
FIRST = 8
"""Trials of a task at random before the model chooses."""
PATIENCE = 16
"""Trials without a new best after which a task may be given up."""
LEAST_EXPECTED = 0.01
"""Gain that the model has to expect for a task to go on after that."""
_FAILED = math.log(4.0)  # what a failed trial counts as, in the logarithm of the ratio

Array = npt.NDArray[np.float64]


def check_model() -> None:
    """Check that the library of the cost model is there.

    Raises
    ------
    UsageError
        It is not.
    """
    if util.find_spec("sklearn") is None:
        raise UsageError(
            "Searching needs scikit-learn; pip install 'gqsa-compiler[tune]', or name "
            "--search random or all, which do without."
        )


def features(task: Task, config: Mapping[str, Any]) -> list[float]:
    """Describe a configuration of a task in numbers: sizes as logarithms, lists by their ends."""
    spec = task.spec
    values = [
        math.log2(spec.n),
        math.log2(spec.k),
        task.density,
        float(spec.epilogue.gated),
        float(spec.bits),
        float(spec.group_size),
    ]
    for name in sorted(config):
        value = config[name]
        if isinstance(value, list | tuple):
            numbers = [float(v) for v in value] or [0.0]
            values += [float(len(value)), math.log2(1 + min(numbers)), math.log2(1 + max(numbers))]
        elif isinstance(value, bool | int | float):
            values.append(math.log2(1 + abs(float(value))))
        else:
            values.append(float(sum(str(value).encode()) % 97))
    return values


class CostModel:
    """Gradient-boosted trees that learn a session's ratios, one for each rule.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._rows: dict[str, list[list[float]]] = {}
        self._values: dict[str, list[float]] = {}
        self._fitted: dict[str, Any] = {}

    def add(self, task: Task, config: Mapping[str, Any], ratio: float | None) -> None:
        """Learn a trial's ratio to the default; None: it failed."""
        name = task.rule.name
        self._rows.setdefault(name, []).append(features(task, config))
        value = _FAILED if ratio is None else math.log(ratio)
        self._values.setdefault(name, []).append(value)
        self._fitted.pop(name, None)

    def predict(self, task: Task, configs: Sequence[Mapping[str, Any]]) -> Array:
        """Predict the logarithms of the ratios of some configurations.

        There has to be at least one trial of the task's rule.
        """
        from sklearn.ensemble import HistGradientBoostingRegressor

        name = task.rule.name
        if name not in self._fitted:
            trees = HistGradientBoostingRegressor(
                max_iter=120,
                learning_rate=0.1,
                min_samples_leaf=3,
                max_leaf_nodes=15,
                early_stopping=False,
                random_state=self._seed,
            )
            trees.fit(np.array(self._rows[name]), np.array(self._values[name]))
            self._fitted[name] = trees
        found = self._fitted[name].predict(np.array([features(task, c) for c in configs]))
        return np.asarray(found, np.float64)


@dataclass
class Search:
    """The search of one task's space.

    Parameters
    ----------
    task : Task
    space : dict of str to dict
        Configurations' fields by `config_key`.
    model : CostModel or None
        None: at random, or from end to end.
    full : bool
        Try all, in the space's order.
    rng : random.Random
    """

    task: Task
    space: Mapping[str, Mapping[str, Any]]
    model: CostModel | None
    full: bool
    rng: random.Random
    tried: dict[str, float | None] = field(default_factory=dict)
    since_best: int = 0
    waiting: list[str] = field(default_factory=list)

    def first(self, config: Mapping[str, Any]) -> None:
        """Try a configuration before all others: one that was good elsewhere."""
        key = config_key(config)
        if key in self.space and key not in self.tried and key not in self.waiting:
            self.waiting.append(key)

    def tell(self, config: Mapping[str, Any], ratio: float | None, best: bool) -> None:
        """Learn how a trial ended: its ratio to the default, None if it failed."""
        key = config_key(config)
        self.tried[key] = ratio
        if key in self.waiting:
            self.waiting.remove(key)
        self.since_best = 0 if best else self.since_best + 1
        if self.model is not None:
            self.model.add(self.task, config, ratio)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Note that a configuration is being tried, so that `next` gives another."""
        key = config_key(config)
        self.tried[key] = None
        if key in self.waiting:
            self.waiting.remove(key)

    def next(self) -> Mapping[str, Any] | None:
        """Choose the next trial; None if there is nothing left that is worth one."""
        left = [key for key in self.space if key not in self.tried]
        if not left:
            return None
        if self.waiting:
            return self.space[self.waiting[0]]
        if self.full:
            return self.space[left[0]]
        at_random = self.space[self.rng.choice(left)]
        if self.model is None:
            return None if self.since_best > 4 * PATIENCE else at_random
        if len(self.tried) < FIRST:
            return at_random
        expected = self.model.predict(self.task, [self.space[key] for key in left])
        best = int(expected.argmin())
        known = [ratio for ratio in self.tried.values() if ratio is not None]
        hope = math.log(min(known)) - float(expected[best]) if known else 1.0
        if self.since_best > PATIENCE and hope < LEAST_EXPECTED:
            return None
        if self.rng.random() < EXPLORE:
            return at_random
        return self.space[left[best]]
