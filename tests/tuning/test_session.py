"""Sessions: what is tried, what is kept, interrupts, kills, resuming."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.tuning import prepare as prepare_module
from gqsa_compiler.tuning import session as session_module
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.lookup import Known, Tuned, config_fields, open_tuned
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.records import SessionStart, config_key
from gqsa_compiler.tuning.report import render, write_report
from gqsa_compiler.tuning.search import FULL, CostModel, Search, check_model, features
from gqsa_compiler.tuning.session import Session
from gqsa_compiler.tuning.state import best_trials, is_current, open_database, overview
from tests.tuning.fakes import FakeMeasurer, patch, session, task
from tests.tuning.samples import V4


@pytest.fixture(autouse=True)
def _fakes() -> Iterator[None]:
    """Let sessions build nothing."""
    with pytest.MonkeyPatch.context() as undo:
        for name in ("Workspace", "make_case"):
            undo.setattr(prepare_module, name, getattr(prepare_module, name))
        patch()
        yield


def test_a_random_search_finds_something_better(tmp_path: Path) -> None:
    made = session(tmp_path, FakeMeasurer(), trials=40, search="random")
    result = made.run()
    (state,) = result.tasks
    assert result.trials == 40
    assert not result.interrupted
    assert state.ratio < 0.95
    assert result.gain() == pytest.approx(1 / state.ratio)
    assert result.decode_seconds(True) < result.decode_seconds(False)


def test_every_trial_is_a_record_and_no_configuration_is_tried_twice(tmp_path: Path) -> None:
    session(tmp_path, FakeMeasurer(), trials=40, search="random").run()
    contents = Database(tmp_path).read()
    starts = [e for e in contents.entries if isinstance(e, SessionStart)]
    assert len(starts) == 1
    assert starts[0].tasks[0]["share"] == 1.0
    configs = Counter(config_key(trial.config) for trial in contents.trials)
    assert len(contents.trials) == 41
    assert set(configs.values()) == {1}
    first = contents.trials[0]
    assert (first.ratio, first.best) == (1.0, True)
    bests = [t.ratio or 0 for t in contents.trials if t.best]
    assert bests == sorted(bests, reverse=True)


def test_what_a_session_found_is_what_compiling_takes(tmp_path: Path) -> None:
    result = session(tmp_path, FakeMeasurer(), trials=30, search="random").run()
    (state,) = result.tasks
    found = open_tuned(tmp_path, V4).choose(state.task.rule, state.task.spec, V4)
    assert (found.config, found.source) == (state.incumbent.config, "exact")


def test_equal_kernels_never_win(tmp_path: Path) -> None:
    """With a noise of 5% and nothing to be gained, the default stays."""
    measurer = FakeMeasurer(noise=0.05)
    made = session(tmp_path, measurer, trials=30, search="random")
    make = measurer.measure

    def equal(space: object, candidate: object, incumbent: object, rounds: int = 0) -> object:
        return make(space, incumbent, incumbent, rounds)

    measurer.measure = equal  # type: ignore[assignment, method-assign]
    (state,) = made.run().tasks
    assert state.ratio > 0.97


def test_time_goes_where_the_model_spends_it(tmp_path: Path) -> None:
    tasks = (task(256, 512, layers=9), task(128, 256, layers=1))
    result = session(tmp_path, FakeMeasurer(), tasks, trials=40, search="random").run()
    large, small = result.tasks
    assert large.share > 0.9
    assert large.trials > 4 * small.trials > 0


@pytest.mark.parametrize("status", ["wrong", "crash", "hang", "memory", "build"])
def test_failures_are_recorded_and_never_win(tmp_path: Path, status: str) -> None:
    default = task().rule.space(task().spec, V4)[0]
    measurer = FakeMeasurer(fails=lambda config: status if config.tasks != default.tasks else None)
    result = session(tmp_path, measurer, trials=30, search="random").run()
    (state,) = result.tasks
    assert state.incumbent.config.tasks == default.tasks  # type: ignore[attr-defined]
    failed = [t for t in Database(tmp_path).read().trials if t.status == status]
    assert len(failed) == state.failures[status] > 0
    assert all(t.message == "planted" and not t.best and t.ratio is None for t in failed)


def test_samples_of_other_calls_are_a_crash(tmp_path: Path) -> None:
    """What a wild write of a candidate's may print."""

    class Wild(FakeMeasurer):
        wild = 1

        def measure(self, *arguments: Any, **rounds: Any) -> Outcome:
            found = super().measure(*arguments, **rounds)
            if self.count <= self.wild:
                return found
            return replace(found, samples={7: [(1.0, 0.5)]})

    result = session(tmp_path, Wild(), trials=5, search="random").run()
    assert result.tasks[0].failures == {"crash": 5}
    messages = {t.message for t in Database(tmp_path).read().trials}
    assert messages == {"", "Its samples are of other calls."}
    broken = Wild()
    broken.wild = 0
    with pytest.raises(CompileError, match=r"default kernel of .* failed: Its samples are of"):
        session(tmp_path / "other", broken, trials=5, search="random").run()


def test_a_default_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="The default kernel of layer 256x512 failed: planted"):
        session(tmp_path, FakeMeasurer(fails=lambda _c: "wrong"), search="random").run()


def test_time_runs_out(tmp_path: Path) -> None:
    made: list[Session] = []

    def before(number: int) -> None:
        if number == 10:
            made[0].began -= 60.0  # a minute has gone

    made.append(session(tmp_path, FakeMeasurer(before=before), seconds=60.0, search="random"))
    result = made[0].run()
    assert 0 < result.trials < 12
    assert result.seconds > 60


def test_the_time_that_is_left_is_that_of_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial takes 10 s, and what comes before them 100 s."""
    clock = [0.0]
    monkeypatch.setattr(session_module.time, "monotonic", lambda: clock[0])
    said: list[float | None] = []

    def before(number: int) -> None:
        clock[0] += 100.0 if number == 1 else 10.0

    measurer = FakeMeasurer(noise=0.0, before=before, fails=lambda _c: None)
    made = session(tmp_path, measurer, trials=4, search="random")
    made._observe = lambda s: said.append(s.left())
    monkeypatch.setattr(measurer, "fails", lambda c: "hang" if measurer.count > 1 else None)
    made.run()
    assert said[0] is None
    assert [s for s in said if s is not None] == [30.0, 30.0, 20.0, 20.0, 10.0, 10.0, 0.0]


def test_ctrl_c_keeps_everything(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt

    result = session(tmp_path, FakeMeasurer(before=interrupt), trials=99, search="random").run()
    assert result.interrupted
    assert len(Database(tmp_path).read().trials) == result.trials + 1


def test_resuming_goes_on_where_it_was(tmp_path: Path) -> None:
    first = session(tmp_path, FakeMeasurer(), trials=20, search="random").run()
    made = session(tmp_path, FakeMeasurer(), trials=35, search="random", resume=True)
    second = made.run()
    assert second.session == first.session
    assert second.trials == 35
    assert second.tasks[0].ratio <= first.tasks[0].ratio
    trials = Database(tmp_path).read().trials
    assert len(trials) == 36
    assert max(Counter(config_key(t.config) for t in trials).values()) == 1


def test_resuming_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no session of toy"):
        session(tmp_path, FakeMeasurer(), resume=True, search="random")


def test_a_database_gives_a_session_its_start(tmp_path: Path) -> None:
    first = session(tmp_path, FakeMeasurer(), trials=60, search="random").run()
    known = [Known(trial, 0) for trial in Database(tmp_path).read().trials]
    made = session(tmp_path / "new", FakeMeasurer(), trials=1, search="random")
    made._known = Tuned(known, "some-chip")
    (state,) = made.run().tasks
    assert state.incumbent.config == first.tasks[0].incumbent.config


_KILLED = """
import sys, time
from pathlib import Path
from tests.tuning.fakes import FakeMeasurer, patch, session
patch()
measurer = FakeMeasurer(before=lambda _n: time.sleep(0.002))
made = session(Path(sys.argv[1]), measurer, trials=int(sys.argv[2]), search="random",
               seed=int(sys.argv[3]))
made._observe = lambda s: print(s.trials, flush=True)
made.run()
"""


def test_a_kill_loses_at_most_the_trial_in_flight_and_two_sessions_nothing(tmp_path: Path) -> None:
    """One session runs to its end while another in the same database is killed."""
    words = [sys.executable, "-c", _KILLED, str(tmp_path)]
    whole = subprocess.Popen([*words, "30", "1"], stdout=subprocess.PIPE, text=True)
    killed = subprocess.Popen([*words, "900", "2"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    last = 0
    for line in killed.stdout:
        last = int(line)
        if last >= 25:
            break
    killed.send_signal(signal.SIGKILL)
    rest = killed.stdout.read().split()  # `communicate` leaves out what is buffered
    killed.wait(timeout=60)
    killed.stdout.close()
    last = int(rest[-1]) if rest else last
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    contents = Database(tmp_path).read()
    counts = Counter(trial.session for trial in contents.trials)
    assert len(counts) == 2
    assert contents.unreadable <= 1
    assert 31 in counts.values()
    (other,) = [count for count in counts.values() if count != 31] or [31]
    assert last + 1 <= other <= last + 2
    resumed = session(tmp_path, FakeMeasurer(), trials=1, search="random", resume=True).run()
    assert resumed.session in counts


def _space() -> dict[str, dict[str, object]]:
    made = task()
    fields = [config_fields(config) for config in made.rule.space(made.spec, V4)]
    return {config_key(each): each for each in fields}


def test_a_small_space_is_tried_from_end_to_end() -> None:
    space = dict(list(_space().items())[:FULL])
    search = Search(task(), space, None, True, random.Random(0))
    seen = []
    while (config := search.next()) is not None:
        seen.append(config_key(config))
        search.tell(config, 1.0, False)
    assert seen == list(space)


def test_what_was_good_elsewhere_comes_first() -> None:
    space = _space()
    search = Search(task(), space, None, False, random.Random(0))
    wanted = list(space.values())[77]
    search.first(wanted)
    assert search.next() == wanted
    search.tell(wanted, 1.0, False)
    assert search.next() != wanted
    search.first({"unknown": 1})
    assert search.next() is not None


def test_features_are_numbers_of_one_length() -> None:
    lengths = {len(features(task(), config)) for config in _space().values()}
    assert len(lengths) == 1


def test_the_cost_model_finds_more_in_fewer_trials(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra `tune` (scikit-learn) is not installed")
    results = {}
    for how in ("model", "random"):
        made = session(tmp_path / how, FakeMeasurer(), trials=40, search=how, seed=3)
        results[how] = made.run().tasks[0].ratio
    assert results["model"] < 0.89  # the best there is: 0.87
    assert results["model"] <= results["random"] + 0.01


def test_a_model_that_expects_nothing_stops_the_task(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra `tune` (scikit-learn) is not installed")
    result = session(tmp_path, FakeMeasurer(noise=0.001), trials=900).run()
    assert result.tasks[0].finished
    assert result.trials < 300


def test_failed_trials_teach_the_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra `tune` (scikit-learn) is not installed")
    model, made = CostModel(), task()
    space = list(_space().values())
    for config in space[::7]:
        model.add(made, config, None if config["tasks"] == 16 else 0.9)
    bad, good = (next(c for c in space[1:] if c["tasks"] == count) for count in (16, 64))
    expected = model.predict(made, [bad, good])
    assert expected[0] > expected[1]


def test_without_the_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqsa_compiler.tuning.search.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"gqsa-compiler\[tune\].*--search random"):
        check_model()


def test_the_report_is_one_page_that_needs_nothing(tmp_path: Path) -> None:
    measurer = FakeMeasurer(fails=lambda c: "hang" if c.tasks == 16 else None)
    tasks = (task(256, 512, layers=9), task(128, 256, layers=1))
    result = session(tmp_path, measurer, tasks, trials=25, search="random").run()
    write_report(Database(tmp_path), result.session, tmp_path / "a" / "page.html")
    text = (tmp_path / "a" / "page.html").read_text()
    for words in ("Convergence", "roofline", "Failures by cause", "before and after", "planted"):
        assert words in text
    assert "layer 256x512" in text
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_reports_texts_are_escaped(tmp_path: Path) -> None:
    result = session(tmp_path, FakeMeasurer(), trials=1, search="random").run()
    database = Database(tmp_path)
    start = next(e for e in database.read().entries if isinstance(e, SessionStart))
    other = replace(start, session="x", model="<script>alert(1)</script>")
    database.append(other, *(replace(t, session="x") for t in database.read().trials))
    assert "<script" not in render(database, "x")
    assert result.session in render(database, result.session)


def test_a_report_of_no_session(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no session none"):
        render(Database(tmp_path), "none")


def test_an_overview_of_a_database(tmp_path: Path) -> None:
    session(tmp_path, FakeMeasurer(), trials=20, search="random").run()
    trials = Database(tmp_path).read().trials
    old = replace(trials[0], kernels="0" * 16)
    Database(tmp_path).append(old)
    found = overview(open_database(tmp_path))
    assert (found["sessions"], found["trials"], found["unreadable"]) == (1, 22, 0)
    assert sorted(line["current"] for line in found["kernels"]) == [False, True]
    assert is_current(trials[0])
    assert not is_current(old)
    (best,) = best_trials(Database(tmp_path).read().trials)
    assert best.ratio == min(t.ratio for t in trials if t.best and t.ratio)


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tuning database"):
        open_database(tmp_path / "none")
