"""The kernel that chooses tokens, under the emulation, against the CPU's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.runtime.sampling import Sampler, SamplingOptions, distribution
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.sampling import choose_tokens
from tests.schedules.cuda.emulation.run import Program, emulate

VOCAB = 700  # a whole turn of the block's 512 threads, and a part of one
DRAWS = 60


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Return the kernel, compiled for this CPU."""
    return emulate(choose_tokens(VOCAB), ARCHES["sm_80"], tmp_path_factory.mktemp("sampling"))


def choose(kernel: Program, logits: Any, draws: Any, order: int = 2) -> npt.NDArray[np.int32]:
    """Run the kernel."""
    logits, draws = np.asarray(logits, np.float32), np.asarray(draws, np.float32)
    return kernel.run([logits, draws, np.full(len(logits), -7, np.int32)], order)[-1]


def test_greedy_is_that_of_the_cpu(kernel: Program) -> None:
    """The first of equal ones; rows that are no numbers are said to be none."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((6, VOCAB)).astype(np.float32)
    logits[1, [699, 30, 517]] = 9.0
    logits[2] = -np.inf
    logits[2, 511] = -5.0
    logits[3, 600] = np.nan
    logits[4, 3] = np.inf
    logits[5] = -np.inf
    found = choose(kernel, logits, [[0, 0, 1, 0, 0]] * 6)
    options = SamplingOptions()
    for row in range(3):
        sampler = Sampler(options, VOCAB, [])
        np.testing.assert_array_equal(sampler.draw(), [0, 0, 1, 0, 0])
        assert found[row] == sampler(logits[row])
    assert list(found[3:]) == [-1, -1, -1]
    assert list(choose(kernel, logits[3:], [[1, 0, 1, 0, 0.5]] * 3)) == [-1, -1, -1]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=0.6, top_k=7),
        SamplingOptions(temperature=1.3, top_p=0.7),
        SamplingOptions(temperature=0.9, top_k=60, top_p=0.95, min_p=0.02),
        SamplingOptions(temperature=1e-35),
        SamplingOptions(temperature=1e300, top_k=10**400),
        SamplingOptions(temperature=2.0, top_p=1e-60),
        SamplingOptions(temperature=2.0, min_p=1.0),
    ],
    ids=["temperature", "top_k", "top_p", "all", "cold", "hot", "least_p", "most_p"],
)
def test_draws_have_the_distribution_of_the_cpu(kernel: Program, options: SamplingOptions) -> None:
    """Numbers that are spread evenly give each token its share of them, to one or two."""
    logits = (np.random.default_rng(2).standard_normal(VOCAB) * 3).astype(np.float32)
    logits[77] = -np.inf
    draws = np.tile(Sampler(options, VOCAB, []).draw(), (DRAWS, 1))
    draws[:, 4] = (np.arange(DRAWS) + 0.5) / DRAWS
    draws[-1, 4] = 1 - 2.0**-24
    found = choose(kernel, np.tile(logits, (DRAWS, 1)), draws)
    ids, weights = distribution(logits, options)
    want = np.zeros(VOCAB)
    want[ids] = weights
    counts = np.bincount(found, minlength=VOCAB)
    assert want[found].min() > 0
    # A token has an interval of [0, 1), and its number of even steps in it is off by one at most;
    # by one more for the last draw, which was moved.
    assert np.abs(counts - DRAWS * want).max() < 2


def test_what_a_sampler_asks_for() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.5, top_k=9, top_p=0.75, seed=3), 50, [])
    draw = sampler.draw()
    assert draw.dtype == np.float32
    drawn = np.random.default_rng(3).random()
    np.testing.assert_array_equal(draw, np.array([2.0, 9, 0.75, 0.0, drawn], np.float32))
    assert sampler.draws_on_device
    assert sampler.take(4) == 4
    penalised = SamplingOptions(temperature=0.5, repetition_penalty=1.1)
    assert not Sampler(penalised, 50, []).draws_on_device
    assert np.isfinite(Sampler(SamplingOptions(temperature=1e-38), 50, []).draw()).all()
