"""What `bench_scaling.py` measures, and the figures that all of its parts work out alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Round = dict[str, Any]
"""One repeat of a part: everything in it is measured once, in turn."""


@dataclass(frozen=True)
class Plan:
    """The choices of one run.

    Parameters
    ----------
    directory : Path
        For artefacts, figures and plots.
    shape : str
        Of the random models: a name of `model_shapes`, or a config.json.
    artefact : Path or None
        Measured for context, batch and roofline instead of a random model.
    sparsity : float
        Of the random model that those three measure.
    threads, repeats : int
    steps : int
        Decoding passes that make one figure.
    prompt : int
        Tokens before decoding at each sparsity, and of the roofline's prompt.
    batch_prompt : int
        Tokens before decoding of every sequence of a batch.
    contexts, batches : tuple of int
    sparsities : tuple of float
    peak : float or None
        Operations a second, instead of the measured ones.
    """

    directory: Path
    shape: str
    artefact: Path | None
    sparsity: float
    threads: int
    repeats: int
    steps: int
    prompt: int
    batch_prompt: int
    contexts: tuple[int, ...]
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    peak: float | None

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""
        shorter = max(self.prompt, self.batch_prompt) + self.steps
        return max(*self.contexts, shorter)


@dataclass(frozen=True)
class Measurement:
    """A part that is ready to be measured.

    Parameters
    ----------
    about : mapping
        What does not change from round to round, for the JSON file and for `Part.result`.
    measure : callable
        Measures the round of a number.
    """

    about: Mapping[str, Any]
    measure: Callable[[int], Round]


@dataclass(frozen=True)
class Part:
    """One of the questions that are answered.

    Parameters
    ----------
    name : str
        As on the command line; also its files' name.
    fields : tuple of str
        Fields of `Plan` that its figures depend on.
    prepare : callable
        Loads what a plan needs; leaving the context frees it.
    result : callable
        Sums up rounds, given `Measurement.about`.
    """

    name: str
    fields: tuple[str, ...]
    prepare: Callable[[Plan], AbstractContextManager[Measurement]]
    result: Callable[[Mapping[str, Any], Sequence[Round]], dict[str, Any]]


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds: their median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def step_seconds(rounds: Sequence[Round], key: str) -> list[float]:
    """Return each round's seconds a decoding pass: the median of its passes."""
    return [statistics.median(found["seconds"][key]) for found in rounds]


def bandwidth_of(rounds: Sequence[Round]) -> float:
    """Return the read bandwidth, the median of what the rounds measured."""
    return statistics.median(found["read_bandwidth"] for found in rounds)


def in_turn(values: Sequence[Any], index: int) -> list[Any]:
    """Order values for a round: every second one backwards, so that a drift hits both ends."""
    return list(values if index % 2 == 0 else reversed(values))
