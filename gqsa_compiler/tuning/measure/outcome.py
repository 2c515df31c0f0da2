"""What a measurement gives, whoever made it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gqsa_compiler.tuning.records import Status

LEAST_GAIN = 0.01
"""A configuration that gains less is not worth a change."""
SIGMAS = 2.0
"""Standard errors by which a new best has to be better."""


@dataclass(frozen=True)
class Outcome:
    """A candidate's trial.

    Parameters
    ----------
    status : str
    message : str
        Why it failed.
    samples : mapping of int to sequence of (float, float)
        By number of tokens: seconds of a call, the incumbent's and the candidate's, in the order
        of the rounds.
    """

    status: Status
    message: str = ""
    samples: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)

    def medians(self, which: int = 1) -> dict[int, float]:
        """Return the median seconds of a call: 0 the incumbent's, 1 the candidate's."""
        return {m: statistics.median(s[which] for s in some) for m, some in self.samples.items()}


@dataclass(frozen=True)
class Comparison:
    """How a candidate's workload compares with the incumbent's.

    Parameters
    ----------
    ratio : float
        Candidate's time to incumbent's: the median over the rounds.
    noise : float
        Standard error of that, from the rounds' spread.
    """

    ratio: float
    noise: float

    @property
    def wins(self) -> bool:
        """Whether the candidate is faster beyond the noise, and by enough."""
        return self.ratio + SIGMAS * self.noise < 1.0 and self.ratio < 1.0 - LEAST_GAIN


def checked(outcome: Outcome, calls: Collection[int]) -> Outcome:
    """Return an outcome, or a failed one where its samples are of other calls than a workload's.

    Parameters
    ----------
    outcome : Outcome
    calls : collection of int
        Numbers of tokens.
    """
    if outcome.status == "ok" and set(outcome.samples) != set(calls):
        return Outcome("crash", "Its samples are of other calls.")
    return outcome


def compare(outcome: Outcome, calls: Mapping[int, float]) -> Comparison:
    """Compare by the time of a workload's calls, round by round.

    Neighbours in time are compared with each other: what slows the machine for longer than a
    round falls on both.

    Parameters
    ----------
    outcome : Outcome
        Of status ``ok``.
    calls : mapping of int to float
        Calls with so many tokens.
    """
    rounds = min(len(outcome.samples[m]) for m in calls)
    ratios = []
    for i in range(rounds):
        incumbent, candidate = (
            sum(count * outcome.samples[m][i][which] for m, count in calls.items())
            for which in (0, 1)
        )
        ratios.append(candidate / incumbent)
    ratio = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(r - ratio) for r in ratios)
    # The standard error of a median is 1.2533 of a mean's.
    return Comparison(ratio, 1.2533 * spread / rounds**0.5)
