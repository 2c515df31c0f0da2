"""Bundles: built here, run with nothing but the runtime, read back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.native import native_folder
from gqsa_compiler.targets import host_arch, parse_target
from gqsa_compiler.tuning import bundle as bundle_module
from gqsa_compiler.tuning.bundle import export_bundle
from gqsa_compiler.tuning.bundle_results import import_bundle
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import host_chip
from gqsa_compiler.tuning.lookup import open_tuned
from gqsa_compiler.tuning.measure.code import BuildError
from gqsa_compiler.tuning.records import SessionStart
from gqsa_compiler.tuning.report import render
from gqsa_compiler.tuning.tasks import Task, Workload
from tests.tuning.conftest import HOST, SMALL, small_task


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a task with two candidates besides its default."""
    folder = tmp_path_factory.mktemp("bundle") / "built"
    folder.mkdir()
    found = export_bundle(
        folder, [small_task()], HOST, "toy", Workload(5, 8), trials=2, threads=1, limits=SMALL
    )
    assert found.candidates == {"layer 32x64": 3}
    assert found.failed == {"layer 32x64": 0}
    return folder


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """Copy the bundle elsewhere."""
    return Path(shutil.copytree(built, tmp_path / "moved"))


def run(bundle: Path, **environment: str) -> str:
    """Run a bundle as somebody would who has nothing installed."""
    done = subprocess.run(
        ["sh", str(bundle / "run.sh")],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_a_bundle_runs_and_its_results_are_records(bundle: Path, tmp_path: Path) -> None:
    said = run(bundle)
    assert said.count("tasks-0-candidates-") == 3
    database = Database(tmp_path / "db")
    session, count = import_bundle(bundle, database)
    assert count == 3
    trials = database.read().trials
    assert [t.status for t in trials] == ["ok"] * 3
    assert trials[0].best
    assert trials[0].ratio == 1.0
    assert {t.target.chip for t in trials} == {host_chip()}
    assert {t.session for t in trials} == {session}
    found = open_tuned(tmp_path / "db", HOST).choose(small_task().rule, small_task().spec, HOST)
    assert found.source == "exact"
    assert "Tuning of toy" in render(database, session)
    # What has a result is not measured again, and what is known is not added again.
    assert "candidates" not in run(bundle)
    assert import_bundle(bundle, database)[1] == 0
    assert sum(isinstance(e, SessionStart) for e in database.read().entries) == 1


def test_a_candidate_that_is_killed_is_a_failed_trial(bundle: Path, tmp_path: Path) -> None:
    run(bundle)
    results = bundle / "results"
    (results / "tasks-0-candidates-1.code").write_text("137\n")
    (results / "tasks-0-candidates-2.code").write_text("139\n")
    import_bundle(bundle, Database(tmp_path / "db"), "some chip")
    trials = Database(tmp_path / "db").read().trials
    assert [t.status for t in trials] == ["ok", "hang", "crash"]
    assert "signal 11" in trials[2].message
    assert trials[0].target.chip == "some-chip"


def test_a_bundle_that_was_not_run(bundle: Path, tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    with pytest.raises(UsageError, match=r"run run\.sh"):
        import_bundle(bundle, database)
    (bundle / "results").mkdir()
    with pytest.raises(UsageError, match="name it with --chip"):
        import_bundle(bundle, database)
    with pytest.raises(UsageError, match=r"has no results; run run\.sh"):
        import_bundle(bundle, database, "chip")
    with pytest.raises(UsageError, match="no tuning bundle"):
        import_bundle(tmp_path, database)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "not of a tuning bundle"),
        ({"version": 2}, "not of a tuning bundle"),
        ({"threads": "1"}, "threads is missing or wrong"),
        ({"tasks": None}, "tasks is missing or wrong"),
        ({"candidates": {"a": 1}}, "candidates is missing or wrong"),
        ({"candidates": {"../a": ""}}, "is no candidate"),
        ({"candidates": {"a" * 5000: ""}}, "is no candidate"),
        ({"candidates": {"\U0001f600" * 150: ""}}, "is no candidate"),
        ({"candidates": {"\ud800": ""}}, "is no candidate"),
        ({"session": "../../elsewhere"}, "session is missing or wrong"),
        ({"tasks": [{"name": 3}]}, "bundle.json is damaged"),
        ({"tasks": [{"name": "a", "rule": "b", "spec": "c", "share": 1e400}]}, "json is damaged"),
        ({"candidates": {"tasks-0-candidates-0": "{}"}}, "is damaged"),
    ],
)
def test_a_damaged_bundle_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (bundle / "results").mkdir()
    for number in range(3):
        (bundle / "results" / f"tasks-0-candidates-{number}.code").write_text("0\n")
    head = {**json.loads((bundle / "bundle.json").read_text()), **change}
    (bundle / "bundle.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match=message):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("calls", {}, "json or .* is damaged"),
        ("session", "another", "is of another session"),
        ("rule", "\x1b[2J", "cannot be printed"),
    ],
)
def test_a_damaged_candidate_is_refused(
    bundle: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    (bundle / "results").mkdir()
    (bundle / "results" / "tasks-0-candidates-0.code").write_text("0\n")
    (bundle / "results" / "tasks-0-candidates-0.out").write_text('{"event":"done"}\n')
    head = json.loads((bundle / "bundle.json").read_text())
    first = json.loads(head["candidates"]["tasks-0-candidates-0"])
    head["candidates"]["tasks-0-candidates-0"] = json.dumps({**first, field: value})
    (bundle / "bundle.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match=message):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")
    assert Database(tmp_path / "db").read().entries == ()


def test_samples_of_other_calls_are_a_failed_trial(bundle: Path, tmp_path: Path) -> None:
    start = bundle / "results" / "tasks-0-candidates-0"
    start.parent.mkdir()
    start.with_suffix(".code").write_text("0\n")
    sample = '{"event":"sample","tokens":%d,"seconds":[1,1]}\n'
    said = "".join(sample % tokens for tokens in [*small_task().calls, 77])
    start.with_suffix(".out").write_text(said + '{"event":"done"}\n')
    import_bundle(bundle, Database(tmp_path / "db"), "chip")
    (trial,) = Database(tmp_path / "db").read().trials
    assert (trial.status, trial.message) == ("crash", "Its samples are of other calls.")


def test_what_is_too_large_is_not_read(bundle: Path, tmp_path: Path) -> None:
    start = bundle / "results" / "tasks-0-candidates-0"
    start.parent.mkdir()
    start.with_suffix(".code").write_text("1\n")
    with (start.parent / "cpuinfo").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="cpuinfo is too large"):
        import_bundle(bundle, Database(tmp_path / "db"))
    assert import_bundle(bundle, Database(tmp_path / "db"), "chip")[1] == 1


@pytest.mark.parametrize(
    "samples",
    [[(1e-9, 1e-9)], [(1.0, 1.0), (1e400, 1.0)], [(True, 1.0)], [("1", "1")], [(2e-9, 9e5)] * 3],
)
def test_times_beyond_all_are_a_failed_trial_or_a_record(
    bundle: Path, tmp_path: Path, samples: list[tuple[float, float]]
) -> None:
    start = bundle / "results" / "tasks-0-candidates-0"
    start.parent.mkdir()
    start.with_suffix(".code").write_text("0\n")
    lines = [
        json.dumps({"event": "sample", "tokens": tokens, "seconds": pair})
        for tokens in small_task().calls
        for pair in samples
    ]
    start.with_suffix(".out").write_text("\n".join([*lines, '{"event":"done"}']))
    database = Database(tmp_path / "db")
    assert import_bundle(bundle, database, "chip")[1] == 1
    (trial,) = database.read().trials
    assert trial.status in ("ok", "crash")
    assert "Tuning of toy" in render(database, trial.session)


def test_a_damaged_description_of_a_gpu_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "results").mkdir()
    (bundle / "results" / "gpu").write_text('{"event":"gpu","name":7}')
    with pytest.raises(UsageError, match="gpu: What the program says of the GPU is damaged"):
        import_bundle(bundle, Database(tmp_path / "db"))


def test_results_of_another_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "results").mkdir()
    (bundle / "results" / "session").write_text("bundle-other\n")
    (bundle / "results" / "tasks-0-candidates-0.code").write_text("0\n")
    with pytest.raises(UsageError, match="results is of another bundle"):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")
    with pytest.raises(subprocess.CalledProcessError):
        run(bundle)
    assert not (bundle / "results" / "tasks-0-candidates-1.code").exists()


def test_without_the_default_no_other_takes_its_place(bundle: Path, tmp_path: Path) -> None:
    for number, seconds in ((1, 0.5), (2, 0.999)):
        start = bundle / "results" / f"tasks-0-candidates-{number}"
        start.parent.mkdir(exist_ok=True)
        start.with_suffix(".code").write_text("0\n")
        sample = '{"event":"sample","tokens":%d,"seconds":[1,%g]}\n'
        said = "".join(sample % (tokens, seconds) for tokens in small_task().calls)
        start.with_suffix(".out").write_text(said + '{"event":"done"}\n')
    import_bundle(bundle, Database(tmp_path / "db"), "chip")
    trials = Database(tmp_path / "db").read().trials
    assert [(t.ratio, t.best) for t in trials] == [(0.5, True), (0.999, False)]


def test_a_pipe_among_results_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "results").mkdir()
    (bundle / "results" / "tasks-0-candidates-0.code").write_text("0\n")
    os.mkfifo(bundle / "results" / "tasks-0-candidates-0.out")
    with pytest.raises(UsageError, match="no file of a bundle's"):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")


def test_a_default_that_cannot_be_built_ends_all_builders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    class Pool:
        def __init__(self, count: int) -> None:
            self.count, self.closed = count, False
            pools.append(self)

        def build(self, *_: object) -> None:
            raise BuildError("refused")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(bundle_module, "BuilderPool", Pool)
    monkeypatch.setattr(bundle_module, "build_program", lambda *_: None)
    with pytest.raises(CompileError, match="refused") as caught:
        export_bundle(
            tmp_path, [small_task()], HOST, "toy", Workload(5, 8), trials=2, threads=1, jobs=2
        )
    assert caught.value is not None  # its traceback keeps what was under way
    assert [pool.closed for pool in pools] == [True]


def test_a_phone_has_no_bundles(tmp_path: Path) -> None:
    target = parse_target("android-arm64")
    with pytest.raises(UsageError, match="bundles are for Linux"):
        export_bundle(tmp_path, [], target, "toy", Workload(), trials=1, threads=1)


def test_a_bundle_for_a_machine_whose_libraries_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host_arch() == "aarch64" or shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("there is no compiler for another machine")
    monkeypatch.setenv("GQSA_NATIVE", str(tmp_path / "none"))
    with pytest.raises(CompileError, match="gqsa native aarch64"):
        export_bundle(tmp_path, [], parse_target("aarch64"), "toy", Workload(), trials=1, threads=1)


@pytest.mark.slow
def test_a_bundle_for_aarch64_runs_under_an_emulator(tmp_path: Path) -> None:
    if host_arch() == "aarch64":
        pytest.skip("this machine is aarch64 itself")
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    if not (native_folder("aarch64") / "lib").is_dir():
        pytest.skip("gqsa native aarch64 has not been run")
    target = parse_target("aarch64")
    spec = replace(small_task().spec, activation_dtype="float32")
    from gqsa_compiler.schedules.table import select

    task = Task("layer", select(spec, target)[0], spec, (1, 2, 3, 4), 1, {1: 8.0, 5: 1.0})
    bundle, database = tmp_path / "bundle", Database(tmp_path / "db")
    bundle.mkdir()
    limits = replace(SMALL, run_seconds=300)
    export_bundle(bundle, [task], target, "toy", Workload(5, 8), trials=2, threads=1, limits=limits)
    run(bundle, GQSA_EMULATOR="qemu-aarch64 -L /usr/aarch64-linux-gnu")
    import_bundle(bundle, database, "emulated")
    trials = database.read().trials
    assert [(t.status, t.message) for t in trials] == [("ok", "")] * 3
    assert {t.target.arch for t in trials} == {"aarch64"}
    found = open_tuned(tmp_path / "db", target, "emulated").choose(task.rule, spec, target)
    assert found.source == "exact"
