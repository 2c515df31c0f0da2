"""Trials that are built while others are measured, and the processes that build them."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.tuning import prepare as prepare_module
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.lanes import Attempt, Overlapped
from gqsa_compiler.tuning.lookup import config_fields
from gqsa_compiler.tuning.measure.builders import BuilderPool, serve
from gqsa_compiler.tuning.measure.code import BuildError
from gqsa_compiler.tuning.measure.workspace import KERNEL
from gqsa_compiler.tuning.records import config_key
from tests.tuning.conftest import HOST, Bench
from tests.tuning.fakes import FakeBuilders, FakeMeasurer, patch, session


@pytest.fixture
def _fakes() -> Iterator[None]:
    """Let sessions build nothing."""
    with pytest.MonkeyPatch.context() as undo:
        for name in ("Workspace", "make_case"):
            undo.setattr(prepare_module, name, getattr(prepare_module, name))
        patch()
        yield


@dataclass
class Refusing(FakeBuilders):
    """Builders that cannot make some of the code."""

    refuses: Callable[[Any], bool] = lambda _config: False
    closed: bool = False

    def build(self, work: Any, config: Any, folder: Path) -> None:
        """Refuse, or take no time."""
        if self.refuses(config):
            raise BuildError("refused")

    def close(self) -> None:
        """Note it."""
        self.closed = True


@pytest.mark.usefixtures("_fakes")
def test_overlapped_trials_are_those_of_any_session(tmp_path: Path) -> None:
    measurer, builders = FakeMeasurer(slots=2), Refusing(2, refuses=lambda c: c.tasks == 16)
    result = session(tmp_path, measurer, builders=builders, trials=40, search="random").run()
    (state,) = result.tasks
    assert builders.closed
    trials = Database(tmp_path).read().trials
    assert len(trials) == 41 == 1 + result.trials
    assert len({config_key(trial.config) for trial in trials}) == 41
    refused = [t for t in trials if t.status == "build"]
    assert len(refused) == state.failures["build"] > 0
    assert {t.message for t in refused} == {"refused"}
    assert state.ratio < 0.97
    bests = [t.ratio or 0 for t in trials if t.best]
    assert bests == sorted(bests, reverse=True)


@pytest.mark.usefixtures("_fakes")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt

    measurer, builders = FakeMeasurer(before=interrupt, slots=2), Refusing(1)
    result = session(tmp_path, measurer, builders=builders, trials=99, search="random").run()
    assert result.interrupted
    assert builders.closed
    assert result.trials > 3
    assert len(Database(tmp_path).read().trials) == result.trials + 1


@pytest.mark.usefixtures("_fakes")
@pytest.mark.parametrize("building", [False, True])
def test_an_error_costs_no_trial_that_had_ended(tmp_path: Path, building: bool) -> None:
    """Whatever is done at the same moment is returned, by `end` at the latest."""

    def fail(number: int) -> None:
        if number in (2, 5) and not building:
            raise GqsaError("no machine is left")

    def refuse(_config: Any) -> bool:
        raise OSError("the disk is full")

    builders = Refusing(1, refuses=refuse) if building else Refusing(1)
    made = session(tmp_path, FakeMeasurer(slots=8), trials=0, search="random")
    made.run()
    (state,) = made.states
    lane = Overlapped(FakeMeasurer(before=fail, slots=8), builders, 3)
    for config in list(state.space.values())[1:7]:
        lane._built.append(Attempt(state, config, state.incumbent))
    lane.feed()
    wait(lane._measuring)
    if building:
        lane.start(Attempt(state, list(state.space.values())[7]))
        wait(lane._building)
    ended: list[Attempt] = []
    with pytest.raises(OSError if building else GqsaError):  # noqa: PT012
        while True:
            ended += lane.wait()
    ended += lane.end()
    assert len({config_key(config_fields(attempt.config)) for attempt in ended}) == len(ended)
    assert [attempt.outcome.status for attempt in ended] == ["ok"] * (6 if building else 4)


def test_a_builder_process_makes_code(bench: Bench) -> None:
    pool, config = BuilderPool(1), bench.space[2]
    try:
        folder = bench.work.place()
        pool.build(bench.work, config, folder)
        candidate = bench.work.complete(config, folder)
        assert bench.measure(candidate).status == "ok"
        os.killpg(pool._all[0].pid, signal.SIGKILL)
        with pytest.raises(BuildError, match="has ended"):
            pool.build(bench.work, config, bench.work.place())
    finally:
        pool.close()
    with pytest.raises(BuildError, match="were ended"):
        pool.build(bench.work, config, bench.work.place())


def test_a_builders_errors_are_answers(bench: Bench, tmp_path: Path) -> None:
    request = {
        "rule": "no such",
        "spec": bench.task.spec.to_json(),
        "config": config_fields(bench.space[0]),
        "target": asdict(HOST),
        "path": str(tmp_path / KERNEL),
        "seconds": 60,
    }
    answers = io.StringIO()
    serve([json.dumps(request)], answers)
    assert json.loads(answers.getvalue()) == {"error": "Target cpu has no rule no such."}
