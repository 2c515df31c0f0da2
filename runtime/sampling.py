"""Choosing the next token. The order of the steps is that of Hugging Face's `generate`:
repetition penalty, temperature, top-k, top-p, min-p, then one draw.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from gqsa_compiler.runtime.errors import ArtefactError, UsageError

_SHARPEST = 1e30
"""1 / temperature at most: every other token is then as good as impossible. At least its inverse:
all tokens are then equal, and 0 would be the likeliest one."""
_MOST_PENALTY = 1e30  # and at least its inverse: float32 has both
_BELOW_1 = 1 - 2.0**-24  # the largest float32 below 1


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the defaults are greedy.

    Parameters
    ----------
    temperature : float
        0 takes the likeliest token; larger is more random.
    top_k : int
        Keep the k likeliest tokens; 0 keeps all.
    top_p : float
        Keep the fewest likeliest tokens whose probabilities reach this sum, in (0, 1].
    min_p : float
        Drop tokens less likely than this share of the likeliest one, in [0, 1].
    repetition_penalty : float
        Above 1 makes tokens of the prompt and of the answer less likely; from 1e-30 to 1e30.
    seed : int, optional
        For repeatable draws; each run differs without one.

    Raises
    ------
    UsageError
        A value is out of its range.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; comparisons are written so that NaN fails them."""
        checks = {
            "temperature": (0 <= self.temperature <= sys.float_info.max, "0 or more"),
            "top_k": (
                0 <= self.top_k < math.inf and self.top_k == int(self.top_k),
                "a whole number, 0 up",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                1 / _MOST_PENALTY <= self.repetition_penalty <= _MOST_PENALTY,
                "between 1e-30 and 1e30",
            ),
            "seed": (
                self.seed is None or (self.seed >= 0 and isinstance(self.seed, Integral)),
                "a whole number, 0 up",
            ),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)} and must be {rule}.")


class Sampler:
    """Chooses the tokens of one sequence.

    Parameters
    ----------
    options : SamplingOptions
        What to do.
    vocab_size : int
        V, the number of logits.
    prompt : sequence of int
        Tokens that the repetition penalty counts as seen.

    """

    def __init__(
        self, options: SamplingOptions, vocab_size: int, prompt: list[int] | np.ndarray
    ) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[np.asarray(prompt, dtype=np.int64)] = True

    def __call__(self, logits: np.ndarray) -> int:
        """Choose a token from float32 logits [V], which are left as they are."""
        o = self._options
        if o.repetition_penalty != 1:
            with np.errstate(over="ignore"):  # an infinity is told of below
                seen = np.where(
                    logits > 0, logits / o.repetition_penalty, logits * o.repetition_penalty
                )
            logits = np.where(self._seen, seen, logits)
        if o.temperature == 0:
            token = int(np.argmax(logits))
            if not np.isfinite(logits[token]):
                raise _not_numbers()
        else:
            ids, weights = distribution(logits, o)
            sums = np.cumsum(weights)
            token = int(ids[np.searchsorted(sums, self._random.random() * sums[-1], side="right")])
        return self.take(token)

    @property
    def draws_on_device(self) -> bool:
        """Whether a device can choose: it does not know which tokens were seen."""
        return self._options.repetition_penalty == 1

    def draw(self) -> np.ndarray:
        """Return what a device chooses the next token by, float32 [5]; then call `take`.

        They are 1 / temperature (0: the likeliest token), top-k (0: all), top-p, min-p and a
        number from [0, 1).
        """
        o = self._options
        sharpness = 0.0
        if o.temperature > 0:
            sharpness = min(max(1 / o.temperature, 1 / _SHARPEST), _SHARPEST)
        drawn = 0.0 if o.temperature == 0 else min(self._random.random(), _BELOW_1)
        top_k = min(o.top_k, self._seen.size)
        return np.array([sharpness, top_k, o.top_p, o.min_p, drawn], np.float32)

    def take(self, token: int) -> int:
        """Note a token that was chosen; -1 says that the logits were no finite numbers."""
        if token < 0:
            raise _not_numbers()
        self._seen[token] = True
        return token


def distribution(logits: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may be drawn and their probabilities.

    Parameters
    ----------
    logits : ndarray
        float32 [V]; the repetition penalty is applied already.
    options : SamplingOptions
        With a temperature above 0.

    Returns
    -------
    ids : ndarray
        int64 [k], in no particular order.
    weights : ndarray
        float64 [k], positive, summing to 1.

    """
    if 0 < options.top_k < logits.size:
        ids = np.sort(np.argpartition(logits, -options.top_k)[-options.top_k :])
    else:
        ids = np.arange(logits.size)
    kept = logits[ids].astype(np.float64)
    top = kept.max()
    if not np.isfinite(top):
        raise _not_numbers()
    with np.errstate(over="ignore"):  # at a temperature of almost 0: a weight of 0
        weights = np.exp((kept - top) / options.temperature)
    weights /= weights.sum()
    if options.top_p < 1:
        # Tokens below (1 - p) / n sum to less than 1 - p: the cut lies above them all, and the
        # sort, which would dominate at a vocabulary of 200 000, is left with a few.
        likely = np.flatnonzero(weights >= (1 - options.top_p) / weights.size)
        order = likely[np.argsort(-weights[likely], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        ids, weights = _keep(ids[order], weights[order], before < options.top_p)
    if options.min_p > 0:
        ids, weights = _keep(ids, weights, weights >= options.min_p * weights.max())
    return ids, weights


def _keep(ids: np.ndarray, weights: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = weights[mask]
    return ids[mask], kept / kept.sum()


def _not_numbers() -> ArtefactError:
    return ArtefactError(
        "The model's logits are not finite numbers: its weights or its kernels are broken. "
        "Run gqsa eval on the checkpoint to see which."
    )
