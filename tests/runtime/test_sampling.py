from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.sampling import Sampler, SamplingOptions, distribution


def slow_distribution(logits: list[float], o: SamplingOptions) -> dict[int, float]:
    """The definition, in plain Python: sort, cut, normalise, a step after another."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if o.top_k:
        ranked = ranked[: o.top_k]
    weights = {i: math.exp((logits[i] - logits[ranked[0]]) / o.temperature) for i in ranked}

    def normal(some: dict[int, float]) -> dict[int, float]:
        total = math.fsum(some.values())
        return {i: w / total for i, w in some.items()}

    weights = normal(weights)
    if o.top_p < 1:
        kept: dict[int, float] = {}
        for i in ranked:
            kept[i] = weights[i]
            if math.fsum(kept.values()) >= o.top_p:
                break
        weights = normal(kept)
    most = max(weights.values())
    return normal({i: w for i, w in weights.items() if w >= o.min_p * most})


@given(
    st.lists(st.integers(-3000, 3000), min_size=1, max_size=40, unique=True),
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
        top_k=st.integers(0, 45),
        top_p=st.sampled_from([1.0, 0.05, 0.31, 0.55, 0.9, 0.999]),
        min_p=st.sampled_from([0.0, 0.01, 0.13, 1.0]),
    ),
)
def test_distribution(thousandths: list[int], options: SamplingOptions) -> None:
    logits = np.array(thousandths, np.float32) / 500
    ids, weights = distribution(logits, options)
    expected = slow_distribution([float(x) for x in logits], options)
    assert set(ids.tolist()) == expected.keys()
    np.testing.assert_allclose(weights, [expected[int(i)] for i in ids], rtol=1e-9)
    assert weights.sum() == pytest.approx(1)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=1), 4, [])
    n = 8000
    counts = np.bincount([sampler(logits) for _ in range(n)], minlength=4) / n
    # Five standard deviations of a share p of n draws.
    for share, p in zip(counts, [0.5, 0.3, 0.15, 0.05], strict=True):
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_seed_repeats_and_others_differ() -> None:
    logits = np.zeros(1000, np.float32)
    draws = [
        [sampler(logits) for _ in range(8)]
        for sampler in (
            Sampler(SamplingOptions(temperature=1, seed=seed), 1000, [])
            for seed in (3, 3, 4, None, None)
        )
    ]
    assert draws[0] == draws[1]
    assert len({tuple(d) for d in draws}) == 4


def test_greedy_and_minus_infinity() -> None:
    logits = np.array([1, -np.inf, 3, 2], np.float32)
    assert Sampler(SamplingOptions(), 4, [])(logits) == 2
    hot = Sampler(SamplingOptions(temperature=100, seed=0), 4, [])
    assert 1 not in {hot(logits) for _ in range(200)}


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    """As in Hugging Face: positive logits of seen tokens are divided, negative ones multiplied."""
    logits = np.array([4.0, 3.0, 2.5, -1.0], np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), 4, [0])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 0]
    np.testing.assert_array_equal(logits, before)
    negative = np.array([-1.0, -1.5, -9.0], np.float32)
    assert Sampler(SamplingOptions(repetition_penalty=2.0), 3, [0])(negative) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "likeliest"),
    [
        ({"temperature": 5e-324}, True),
        ({"temperature": 1.7e308}, False),
        ({"temperature": 1.0, "top_p": 5e-324}, True),
        ({"temperature": 1.0, "top_k": 1}, True),
        ({"temperature": 1.0, "top_k": 51}, False),
        ({"top_k": 10**400, "seed": 2**200}, True),
        ({"repetition_penalty": 1e30}, False),
        ({"repetition_penalty": 1e-30}, False),
    ],
)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_extreme_values_give_a_token_and_no_warning(
    options: dict[str, Any], likeliest: bool, size: float
) -> None:
    logits = np.random.default_rng(0).uniform(-size, size, 50).astype(np.float32)
    token = Sampler(SamplingOptions(**options), 50, [1, 2])(logits)
    assert 0 <= token < 50
    assert not likeliest or logits[token] == logits.max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(temperature: float, bad: float) -> None:
    logits = np.array([1, bad, 2], np.float32)
    with pytest.raises(ArtefactError, match="not finite numbers"):
        Sampler(SamplingOptions(temperature=temperature, seed=0), 3, [])(logits)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.01}, {"top_p": math.nan},
        {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0},
        {"repetition_penalty": math.nan}, {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e300}, {"seed": -1}, {"seed": 1.5}, {"seed": math.inf},
        {"temperature": 10**400}, {"top_k": math.inf}, {"top_k": math.nan},
    ],
)  # fmt: skip
def test_values_out_of_range(values: dict[str, Any]) -> None:
    name = next(iter(values))
    with pytest.raises(UsageError, match=f"{name} is .* and must be"):
        SamplingOptions(**values)
