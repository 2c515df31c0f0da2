"""The losses of a stage, and a stage that makes a model worse."""

from __future__ import annotations

import pytest

from gqsa_compiler.compress.training.course import Course
from gqsa_compiler.compress.training.losses import LossParts
from gqsa_compiler.errors import GqsaError


def course(losses: list[float]) -> Course:
    found = Course(len(losses))
    for loss in losses:
        found.add(LossParts(loss, loss / 2, 0.0))
    return found


def test_the_latest_tenth_counts() -> None:
    assert course([4.0] * 18 + [1.0, 2.0]).divergence("weights") == pytest.approx(0.75)
    assert course([3.0]).divergence("weights") == pytest.approx(1.5)


def test_a_rise_is_an_error_and_a_wobble_is_not() -> None:
    assert course([2.0] * 18 + [2.19] * 2).divergence("scales") > 1
    assert course([2.0] * 9 + [9.0]).divergence("scales") > 1  # too few to say
    with pytest.raises(GqsaError, match=r"Stage scales has made .* rose from 2\.000 to 2\.210"):
        course([2.0] * 18 + [2.21] * 2).divergence("scales")


def test_a_resumed_course_is_the_whole_one() -> None:
    losses = [5.0, 4.0, 3.0, 2.0] * 5
    whole, part = course(losses), Course(len(losses))
    for loss in losses[:7]:
        part.add(LossParts(loss, loss / 2, 0.0))
    saved = part.tensors()
    part = Course.resume(len(losses), saved)
    assert saved == {}
    for loss in losses[7:]:
        part.add(LossParts(loss, loss / 2, 0.0))
    assert part == whole
