"""Bundles: built here, run with nothing but the runtime, read back."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.native import native_folder
from gqsa_compiler.targets import host_arch, parse_target
from gqsa_compiler.tuning.bundle import export_bundle, import_bundle
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import host_chip
from gqsa_compiler.tuning.lookup import open_tuned
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
        ({"candidates": {"tasks-0-candidates-0": "{}"}}, "is damaged"),
    ],
)
def test_a_damaged_bundle_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (bundle / "results").mkdir()
    (bundle / "results" / "tasks-0-candidates-0.code").write_text("0\n")
    head = {**json.loads((bundle / "bundle.json").read_text()), **change}
    (bundle / "bundle.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match=message):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")
    (bundle / "bundle.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        import_bundle(bundle, Database(tmp_path / "db"), "chip")


def test_a_gpu_has_no_bundles(tmp_path: Path) -> None:
    target = replace(HOST, name="cuda", kind="cuda", arch="sm_90")
    with pytest.raises(UsageError, match="bundles are for CPUs"):
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
