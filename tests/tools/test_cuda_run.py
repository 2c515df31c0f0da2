"""The program that measures a bundle: its order, what a crash costs, verdicts and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_processes
import cuda_run
import cuda_shapes
import numpy as np
import pytest
from cuda_bundle import build, jobs_of
from cuda_check import compare
from cuda_processes import NO_TIME, Clock, run_group
from cuda_report import Report, main
from cuda_rivals import RIVALS
from cuda_run import Group, Kitchen, Results, groups_of
from cuda_shapes import RIVALS as RIVAL_TOKENS
from cuda_shapes import Shape

from tests.tools.cuda_emulated import instant_compiler

SHAPES = (Shape(48, 256, ("a goal, down",)), Shape(64, 128, ()))
CHILD = """
import json, os, sys
order = json.load(sys.stdin)
for case in order["cases"]:
    name = "|".join(map(str, case))
    print(json.dumps({"begin": name}), flush=True)
    if case[2] == order["dies"]:
        sys.stderr.write("Segmentation fault of a kind\\n"); sys.stderr.flush(); os._exit(9)
    if case[2] == order["hangs"]:
        import time; time.sleep(60)
    print("a line that is no result")
    print(json.dumps({"case": name, "status": "ok", "bandwidth": 2e12}), flush=True)
    if case[2] == order["lost"]:
        sys.exit(3)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_shapes, "GOAL_SHAPES", ("48x256",))
        jobs = list(jobs_of(SHAPES, ["sm_90"], ["int16"], sweep=False, tokens=(1, 2)))
        build(folder, jobs, SHAPES, (1, 2), compiler=instant_compiler)
    return folder


@pytest.fixture
def manifest(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "manifest.json").read_text()))


def test_goals_come_first_and_then_their_rivals(manifest: dict[str, Any]) -> None:
    names = [group.name for group in groups_of(manifest, [], True, "sm_90")]
    assert names[:4] == ["48x256-0.5", "48x256-rivals", "llama-2-7b", "64x128-0.5"]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 2 * 3 + 2 + 1
    own = groups_of(manifest, ["64x128"], False, "sm_90")
    assert [group.name for group in own] == ["64x128-0.5", "64x128-0.3", "64x128-0.0"]
    assert [case[2] for case in own[0].cases] == [1, 2]
    assert groups_of(manifest, [], True, "sm_80")[0].rivals
    variants = {case[0].split("-")[2] for case in groups_of(manifest, [], False, "sm_90")[0].cases}
    assert variants == {"default", "bias"}


def run_child(tmp_path: Path, seconds: float = 60, **how: int) -> dict[str, dict[str, Any]]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    order = {"dies": 0, "hangs": 0, "lost": 0, **how}
    cases = [("k", 0.5, tokens) for tokens in (1, 2, 4)]
    results = run_group(order, script, cases, tmp_path / "log", Clock(seconds))
    assert len(results) == 3
    return {result["case"]: result for result in results}


def test_a_crash_costs_its_own_result_only(tmp_path: Path) -> None:
    results = run_child(tmp_path, dies=2)
    assert results["k|0.5|1"]["status"] == results["k|0.5|4"]["status"] == "ok"
    crashed = results["k|0.5|2"]
    assert crashed["status"] == "crashed"
    assert crashed["fault"] == "the process ended with 9: Segmentation fault of a kind"


def test_after_a_lost_device_another_process_goes_on(tmp_path: Path) -> None:
    results = run_child(tmp_path, lost=1)
    assert [result["status"] for result in results.values()] == ["ok"] * 3


def test_what_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_processes, "SECONDS_A_CHILD", 2.0)
    monkeypatch.setattr(cuda_processes, "SECONDS_A_CASE", 0.0)
    results = run_child(tmp_path, hangs=1)
    assert results["k|0.5|1"]["status"] == "crashed"
    assert results["k|0.5|4"]["status"] == "ok"


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    results = run_child(tmp_path, seconds=0)
    assert {result["status"] for result in results.values()} == {"skipped"}


def test_a_child_that_says_nothing_fails_once(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('no numpy here')")
    results = run_group({}, script, [("k", 0.5, 1)], tmp_path / "log", Clock(60))
    (result,) = results
    assert result["status"] == "failed"
    assert result["fault"] == "the process ended with 1: no numpy here"


def test_packing_happens_in_a_process_of_its_own(
    bundle: Path, manifest: dict[str, Any], tmp_path: Path
) -> None:
    (group,) = (g for g in groups_of(manifest, ["64x128"], False, "sm_90") if g.sparsity == 0.3)
    kitchen = Kitchen(manifest, bundle, tmp_path, 0)
    assert kitchen.start(group).result() == ""
    assert len(list(kitchen.place(group).glob("*.npz"))) == 2
    broken = {**manifest, "kernels": [{**k, "config": {}} for k in manifest["kernels"]]}
    kitchen = Kitchen(broken, bundle, tmp_path, 0)
    assert kitchen.start(Group("x", "64x128", 0.3, group.cases)).result().startswith(
        "packing failed: KeyError"
    )  # fmt: skip


def fake_probe(folder: Path) -> dict[str, Any]:
    return {
        "name": "Fake GPU",
        "arch": "sm_90",
        "processors": 132,
        "l2_bytes": 60_000_000,
        "copy_bandwidth": 4e12,
        "driver": "580.0",
    }


@pytest.fixture
def measured(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    """Run everything with children that make their results up."""

    def measure(order: Any, script: Path, cases: Any, log: Path, clock: Clock) -> list[Any]:
        results = []
        for case in cases:
            seconds = 1e-5 * case[2] * (4 if isinstance(case[1], str) else 1 - case[1] / 2)
            result = {"case": "|".join(map(str, case)), "status": "ok", "weight_bytes": 20_000_000}
            result |= {"timing": {"median": seconds}, "bandwidth": 2e7 / seconds}
            if case[1] == 0.3 and case[2] == 2:
                result = {"case": result["case"], "status": "wrong", "fault": "all is lost"}
            if "gemlite" in str(case[1]):
                result = {"case": result["case"], "status": "skipped", "fault": "no gemlite"}
            results.append(result)
        return results

    monkeypatch.setattr(cuda_run, "probe", fake_probe)
    monkeypatch.setattr(cuda_run, "run_group", measure)
    monkeypatch.setattr(Kitchen, "_prepare", lambda self, group: "")
    out = tmp_path / "results.json"
    words = ["cuda_run.py", "--bundle", str(bundle), "--out", str(out), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert cuda_run.main() == 1  # two cases are wrong
    assert "48x256-0.5: 4 ok, up to 2667 GB/s" in capsys.readouterr().out
    data: dict[str, Any] = json.loads(out.read_text())
    assert not list(tmp_path.glob("gqsa-cuda-*"))
    return data


def test_a_run_goes_on_where_time_ended(
    measured: dict[str, Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results in two runs, of which the first had time for two groups."""
    whole = cuda_run.run_group
    calls: list[str] = []

    def measure(order: Any, script: Path, cases: Any, log: Path, clock: Clock) -> list[Any]:
        calls.append(log.stem)
        found = whole(order, script, cases, log, clock)
        if len(calls) == 3:
            clock.seconds = 0.0
            found[-1] = {"case": found[-1]["case"], "status": "skipped", "fault": NO_TIME}
        return list(found)

    monkeypatch.setattr(cuda_run, "run_group", measure)
    parts = [tmp_path / "one.json", tmp_path / "two.json"]
    words = ["cuda_run.py", "--bundle", str(bundle), "--work", str(tmp_path), "--out"]
    monkeypatch.setattr(sys, "argv", [*words, str(parts[0])])
    assert cuda_run.main() == 0
    one = json.loads(parts[0].read_text())
    assert one["done"] == ["48x256-0.5", "48x256-rivals"]
    assert [left["group"] for left in one["skipped"]][:2] == ["llama-2-7b", "64x128-0.5"]
    monkeypatch.setattr(sys, "argv", [*words, str(parts[1]), "--resume", str(parts[0])])
    assert cuda_run.main() == 1
    two = json.loads(parts[1].read_text())
    assert calls[3] == "llama-2-7b"
    assert (two["done"], two["results"], two["rivals"]) == (
        measured["done"],
        measured["results"],
        measured["rivals"],
    )
    assert (two["skipped"], two["models"]) == ([], measured["models"])
    parts[0].write_text(json.dumps({**one, "bundle": {**one["bundle"], "built": "yesterday"}}))
    with pytest.raises(SystemExit, match="built yesterday, not of this one"):
        cuda_run.main()


def test_results_hold_what_was_found(measured: dict[str, Any]) -> None:
    assert measured["device"]["driver"] == "580.0"
    # Two shapes, three sparsities, two token counts; a fused one and two coarser ones have one.
    assert len(measured["results"]) == 2 * 3 * 2 + 3 * 2
    assert len(measured["rivals"]) == 2 * (4 * 7 + 3 * 2)
    names = [f"llama-2-7b|torch-compile-fp16|{context}" for context in (128, 512, 1024)]
    assert [result["case"] for result in measured["models"]] == names
    cases = [result["case"] for result in measured["results"]]
    assert len(cases) == len(set(cases))
    assert {case.split("|")[1] for case in cases} == {"0.5", "0.3", "0.0"}


def test_the_report(
    measured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(measured))
    plots = tmp_path / "plots"
    words = ["cuda_report.py", str(path)]
    if _has_matplotlib():
        words += ["--plots", str(plots)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    text = capsys.readouterr().out
    assert "Fake GPU (sm_90, 132 processors, 60 MB of L2), driver 580.0" in text
    goal = "| 48x256 | int16-default-w12r2d2s16-sm_90 | 7.50 | 2667 | 67% | 5.33 | "
    assert goal + "5.33 (torch-int4-g32) | 5.33 | not measured |" in text
    assert "| 48x256 | ours, int16 | 7.5 | 15.0 |" in text
    assert "| 48x256 | 10.00 | 8.50 | 7.50 | 10.00 |" in text
    assert "| llama-2-7b | 128 | 5.120 | not all measured |" in text
    assert "- wrong: 64x128-int16-default-w12r2d2s16-sm_90, 64x128, 0.3, 2: all is lost" in text
    assert "- skipped: gemlite-w4-g16, 4 cases: no gemlite" in text
    if _has_matplotlib():
        assert {path.name for path in plots.iterdir()} == {"cuda-bandwidth.svg", "cuda-tokens.svg"}
    # A run that had no rivals and no time left, and in which all was right.
    short = {**measured, "rivals": [], "skipped": [{"group": "g", "reason": "no time was left"}]}
    short["models"] = [{"case": "llama-2-7b|x|128", "status": "skipped", "fault": "no PyTorch"}]
    assert "| llama-2-7b | 128 | skipped: no PyTorch | |" in Report.of(short).models()
    short["results"] = [r for r in measured["results"] if r["status"] == "ok"][:1]
    assert "- not begun: g: no time was left" in Report.of(short).markdown()
    assert Report.of({**short, "skipped": []}).faults() == "All were right."


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_the_whole_program_with_a_driver_whose_kernels_do_nothing(
    bundle: Path, tmp_path: Path, fake_driver: str
) -> None:
    """Every process of it, from the bundle's own directory: nothing that is not written passes."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(bundle / "cuda_run.py"), "--out", str(out), "--no-rivals"]
    variables = {**os.environ, "LD_LIBRARY_PATH": str(Path(fake_driver).parent)}
    done = subprocess.run(
        [*command, "--only", "64x128"], env=variables, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("Fake GPU, sm_90, driver ")
    assert "64x128-0.3: 2 wrong" in done.stdout
    data = json.loads(out.read_text())
    assert len(data["results"]) == 6
    for result in data["results"]:
        assert result["status"] == "wrong"
        assert result["fault"].endswith("results are not finite or not written")
    assert "- wrong: 64x128-int16-default" in Report.of(data).markdown()


def test_without_a_gpu_it_says_so(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    variables = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, str(bundle / "cuda_run.py"), "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No GPU can be used: There is no NVIDIA driver here" in done.stderr
    assert not (tmp_path / "r.json").exists()


def test_results_are_whole_at_any_time(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {"date": "today"})
    results.data["results"].append({"case": "a"})
    results.save()
    assert json.loads((tmp_path / "r.json").read_text())["results"] == [{"case": "a"}]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_every_rival_has_its_tokens() -> None:
    assert set(RIVALS) == set(RIVAL_TOKENS)


@pytest.mark.parametrize(("dtype", "noise"), [("float16", 4e-4), ("int16", 5e-6)])
def test_errors_of_rounding_pass_and_a_lost_group_does_not(dtype: str, noise: float) -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((8, 4096)) * 3.0
    good = (expected + 3.0 * noise * rng.standard_normal(expected.shape)).astype(np.float32)
    verdict = compare(good, expected, dtype)
    assert verdict.fault is None
    assert verdict.together == pytest.approx(noise, rel=0.1)
    lost = good.copy()
    lost[:, 17] -= 3.0 * rng.standard_normal(8) / np.sqrt(600)  # one of a row's 600 groups
    assert "output 17" in str(compare(lost, expected, dtype).fault)
    worse = (expected * (1 + 6 * noise)).astype(np.float32)
    assert "of their norm together" in str(compare(worse, expected, dtype).fault)
    unwritten = good.copy()
    unwritten[3, 5] = np.nan
    fault = compare(unwritten, expected, dtype).fault
    assert fault == "1 of 32768 results are not finite or not written"
