"""Trials in processes of their own: right ones are timed, every kind of failure is told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.schedules.table import rules_for
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import read_outcome, run_job
from gqsa_compiler.tuning.measure.outcome import Comparison, Outcome, compare
from gqsa_compiler.tuning.measure.workspace import BuildError, Limits, Workspace
from gqsa_compiler.tuning.tasks import Task
from tests.tuning.conftest import HOST, SMALL, Bench, adopt, small_task

Planted = Callable[[str], Path]


def test_a_right_candidate_is_timed(bench: Bench) -> None:
    outcome = bench.measure(bench.work.build(bench.space[-1]))
    assert (outcome.status, outcome.message) == ("ok", "")
    assert {m: len(s) for m, s in outcome.samples.items()} == {1: SMALL.rounds, 5: SMALL.rounds}
    assert all(0 < t < 10 for t in (*outcome.medians().values(), *outcome.medians(0).values()))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", "wrong", "is not a number"),
        ("for (long i = 0; i < size; ++i) y[i] = 0;", "wrong", "beyond its bound"),
        ("for (long i = 0; i < size; ++i) y[i] = INFINITY;", "wrong", "is not a number"),
        ("*static_cast<volatile int*>(nullptr) = 1;", "crash", "signal 11"),
        ("abort();", "crash", "signal 6"),
        ("_exit(0);", "crash", "before it was done"),
        ("for (;;) { char* p = new char[64 << 20]; memset(p, 1, 64 << 20); }", "memory", ""),
        ("return -1;", "crash", "exit code 1"),
    ],
)
def test_a_bad_candidate_is_told_apart(
    bench: Bench, planted: Planted, body: str, status: str, message: str
) -> None:
    outcome = bench.measure(adopt(bench.work, bench.space[1], planted(body)))
    assert outcome.status == status, outcome
    assert message in outcome.message
    assert not outcome.samples


def test_a_candidate_that_hangs_is_ended(bench: Bench, planted: Planted) -> None:
    candidate = adopt(bench.work, bench.space[1], planted("for (;;) pause();"))
    bench.work.limits = replace(SMALL, run_seconds=1.0)
    try:
        outcome = bench.measure(candidate)
    finally:
        bench.work.limits = SMALL
    assert (outcome.status, outcome.message) == ("hang", "It took more than 1 s.")


def test_a_candidate_that_is_wrong_in_some_calls_only(bench: Bench, planted: Planted) -> None:
    """It copies the right outputs at first, then adds to one of them."""
    right = [bench.work.root / "case" / f"wanted-{m}.bin" for m in (1, 5)]
    body = (
        "static int calls = 0; ++calls;"
        f'FILE* f = fopen(out.shape[0] == 1 ? "{right[0]}" : "{right[1]}", "rb");'
        "size_t n = fread(y, 4, size, f); fclose(f); if (n == 0) return -1;"
        "if (calls > 4) y[0] += 1e6f;"
    )
    outcome = bench.measure(adopt(bench.work, bench.space[1], planted(body)))
    assert outcome.status == "wrong"


def test_the_machine_goes_on_after_a_failure(bench: Bench, planted: Planted) -> None:
    bench.measure(adopt(bench.work, bench.space[1], planted("abort();")))
    assert bench.measure(bench.default).status == "ok"


class Broken:
    """A rule whose code cannot be made."""

    def __init__(self, rule: object, how: str) -> None:
        self._rule, self._how = rule, how

    def __getattr__(self, name: str) -> object:
        return getattr(self._rule, name)

    def build(self, *_: object) -> object:
        """Fail."""
        import os
        import time

        if self._how == "hang":
            time.sleep(60)
        if self._how == "crash":
            os.abort()
        if self._how == "memory":
            return np.ones(1 << 40, np.uint8)
        raise CompileError("no such kernel")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "no such kernel"),
        ("hang", "more than 1 s"),
        ("crash", "signal 6"),
        ("memory", "Memory"),
    ],
)
def test_code_that_cannot_be_made(bench: Bench, tmp_path: Path, how: str, message: str) -> None:
    task = replace(bench.task, rule=Broken(bench.task.rule, how))  # type: ignore[arg-type]
    case = make_case(task, bench.space[0])
    work = Workspace(tmp_path / "work", case, HOST, 1, replace(SMALL, build_seconds=1))
    with pytest.raises(BuildError, match=message):
        work.build(bench.space[0])


@pytest.mark.parametrize(
    ("code", "out", "status"),
    [
        (0, b"", "crash"),
        (0, b"nonsense\n", "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[1,2,3]}\n', "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[0,1]}\n{"event":"done"}\n', "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":["x",1]}\n', "crash"),
        (0, b"[" * 5000, "crash"),
        (0, b'{"event":"sample","tokens":1e400,"seconds":[1,2]}\n', "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[1%s,2]}\n' % (b"0" * 400), "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[NaN,-1]}\n', "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[1,1e-320]}\n', "crash"),
        (1, b"", "crash"),
        (-9, b"", "crash"),
        (0, b'{"event":"sample","tokens":1,"seconds":[1,2]}\n{"event":"done"}\n', "ok"),
    ],
)
def test_what_is_printed_is_not_taken_on_trust(code: int, out: bytes, status: str) -> None:
    assert read_outcome(code, out, b"").status == status


def test_a_runtime_that_is_not_there(bench: Bench, tmp_path: Path) -> None:
    folder = bench.work.write_job(bench.default, bench.default)
    program = bench.measurer._program
    outcome = run_job([str(program), str(folder), str(tmp_path)], 10, None)
    assert outcome.status == "crash"
    assert "libtvm_ffi.so" in outcome.message


CASES = {
    "gated": {"epilogue": Epilogue(activation="silu", gated=True), "norm_eps": 1e-5},
    "bias and residual": {"epilogue": Epilogue(bias=True, activation="gelu", residual=True)},
    "symmetric": {"symmetric": True},
    "full": {"nnz": 32 * 4},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_kind_of_layer_agrees_with_the_reference(
    bench: Bench, tmp_path: Path, name: str, dtype: str
) -> None:
    fields = {"nnz": 64, "activation_dtype": dtype, **CASES[name]}
    spec = LinearSpec(32, 64, "bsr", "int4", 16, **fields)  # type: ignore[arg-type]
    rule = next(r for r in rules_for(HOST) if r.applies(spec, HOST))
    task = Task(name, rule, spec, (1, 2, 4), 1, {1: 1.0, 3: 1.0})
    config = rule.space(spec, HOST)[0]
    if isinstance(config, GenericConfig):
        config = replace(config, tiles=(4,))  # compiles faster
    work = Workspace(tmp_path / "work", make_case(task, config), HOST, 1, SMALL)
    candidate = work.build(config)
    outcome = bench.measurer.measure(work, candidate, candidate)
    assert (outcome.status, outcome.message) == ("ok", "")


def test_a_dense_layer(bench: Bench, tmp_path: Path) -> None:
    spec = LinearSpec(48, 40, "dense", "float16")
    rule = next(r for r in rules_for(HOST) if r.applies(spec, HOST))
    task = Task("head", rule, spec, (), 1, {1: 1.0, 2: 1.0})
    config = rule.space(spec, HOST)[0]
    work = Workspace(tmp_path / "work", make_case(task, config), HOST, 1, SMALL)
    assert bench.measurer.measure(work, work.build(config), work.build(config)).status == "ok"


def test_a_jobs_paths_are_relative(bench: Bench) -> None:
    folder = bench.work.write_job(bench.default, bench.default)
    assert str(bench.work.root) not in (folder / "job.txt").read_text()


def test_cases_are_the_same_every_time() -> None:
    task = small_task()
    config = task.rule.space(task.spec, HOST)[0]
    first, again, other = (make_case(task, config, seed) for seed in (1, 1, 2))
    for name in ("x", "wanted", "bound"):
        assert np.array_equal(getattr(first.right[5], name), getattr(again.right[5], name))
    assert not np.array_equal(first.right[5].wanted, other.right[5].wanted)


def outcome_of(ratios: list[float]) -> Outcome:
    """Make an outcome whose rounds have such ratios, on a machine that gets slower."""
    return Outcome("ok", samples={1: [(1e-3 * (i + 1), 1e-3 * (i + 1) * r) for i, r in
                                      enumerate(ratios)]})  # fmt: skip


def test_a_new_best_wins_beyond_the_noise_only() -> None:
    assert compare(outcome_of([0.9, 0.91, 0.9, 0.89, 0.9]), {1: 1.0}).wins
    assert not compare(outcome_of([0.9, 1.3, 0.5, 0.95, 1.1]), {1: 1.0}).wins
    assert not compare(outcome_of([0.995] * 9), {1: 1.0}).wins
    assert compare(outcome_of([0.9] * 5), {1: 1.0}) == Comparison(pytest.approx(0.9), 0.0)  # type: ignore[arg-type]


def test_calls_are_weighted_by_the_workload() -> None:
    outcome = Outcome("ok", samples={1: [(1.0, 0.5)] * 3, 64: [(10.0, 20.0)] * 3})
    assert compare(outcome, {1: 100.0, 64: 1.0}).ratio == pytest.approx(70 / 110)
    assert compare(outcome, {1: 1.0, 64: 1.0}).ratio == pytest.approx(20.5 / 11)


def test_limits_have_room_for_a_long_build() -> None:
    assert Limits().build_seconds >= 60
