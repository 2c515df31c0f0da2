"""Measuring on a GPU: the whole way but for the GPU, which is emulated."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler import tune as tune_module
from gqsa_compiler.errors import ArtefactError, CompileError, UsageError
from gqsa_compiler.schedules.cuda import config as configs
from gqsa_compiler.schedules.cuda import library
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target
from gqsa_compiler.tune import TuneOptions, tune_model
from gqsa_compiler.tuning import here
from gqsa_compiler.tuning import prepare as prepare_module
from gqsa_compiler.tuning.bundle import export_bundle
from gqsa_compiler.tuning.bundle_results import import_bundle
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.here import check_runs_here
from gqsa_compiler.tuning.key import gpu_chip
from gqsa_compiler.tuning.lookup import open_tuned
from gqsa_compiler.tuning.measure import program
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import LocalMeasurer, read_gpu
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.workspace import Candidate, Workspace
from gqsa_compiler.tuning.records import SessionStart
from gqsa_compiler.tuning.report import render
from gqsa_compiler.tuning.spaces import tuned_space
from gqsa_compiler.tuning.tasks import Workload
from tests.schedules.cuda.test_nvcc import needs_nvcc
from tests.tuning.conftest import SMALL, adopt
from tests.tuning.fakes import FakeBuilders, FakeMeasurer, patch
from tests.tuning.gpus import GPU, build_fake_gpu, emulated_fatbin, gpu_task

LIMITS = replace(SMALL, rounds=2, run_seconds=300.0, rotate_bytes=1 << 12)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake driver."""
    try:
        return build_fake_gpu(tmp_path_factory.mktemp("driver"))
    except CompileError:
        pytest.skip("nvcc, which comes with cuda.h, is not installed")


@pytest.fixture(scope="module")
def gpu(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put an emulated GPU into this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(driver))
        patch.setattr(program, "find_cuda_runtime", lambda: driver / program.CUDA_RUNTIME)
        patch.setattr(library, "compile_fatbin", emulated_fatbin(tmp_path_factory.mktemp("code")))
        patch.setattr(configs, "TILES", (1,))  # a prompt goes to the tensor cores' kernel
        yield driver


class FakeDriver:
    """What `check_runs_here` asks."""

    def capability(self, _device: int) -> tuple[int, int]:
        """Return that of an H100."""
        return 9, 0

    def name(self, _device: int) -> str:
        """Return its name."""
        return "NVIDIA H100 80GB HBM3"


def test_a_gpus_name_is_a_chip() -> None:
    assert gpu_chip(FakeDriver()) == "nvidia-h100-80gb-hbm3"  # type: ignore[arg-type]


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ArtefactError("no driver")

    monkeypatch.setattr(here, "open_driver", none)
    with pytest.raises(UsageError, match=r"no GPU to measure on; carry .*--target cuda:sm_90 -o"):
        check_runs_here(GPU)


def test_code_that_the_gpu_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "open_driver", FakeDriver)
    monkeypatch.setattr(here, "find_nvcc", lambda: None)
    check_runs_here(GPU)
    check_runs_here(replace(parse_target("cuda:sm_80"), features=("compute_80",)))
    with pytest.raises(UsageError, match="NVIDIA H100 80GB HBM3, cannot run code for cuda:sm_80"):
        check_runs_here(parse_target("cuda:sm_80"))


def test_trackers_are_for_cpus(tmp_path: Path) -> None:
    options = TuneOptions("cuda:sm_90", tracker="host:9190", chip="x")
    with pytest.raises(UsageError, match="measure for CPUs only"):
        tune_model("toy", tmp_path, options)


def test_configurations_that_round_the_weights_are_not_tried() -> None:
    task = gpu_task()
    whole, tried = task.rule.space(task.spec, GPU), tuned_space(task.rule, task.spec, GPU)
    assert {c.scale_bits for c in whole} == {8, 16}
    assert tried == tuple(c for c in whole if c.scale_bits == 16)
    head = replace(task.spec, weight_dtype="int8", symmetric=True, nnz=32 * 16)
    rule, default = select(head, GPU)
    assert tuned_space(rule, head, GPU)[0] == default


class Times(FakeMeasurer):
    """A GPU on which 32 warps are best."""

    def measure(self, space: Any, candidate: Any, incumbent: Any, rounds: int = 0) -> Outcome:
        """Compute the times."""
        pair = tuple(1e-5 * (1 + abs(one.config.warps - 32) / 64) for one in (incumbent, candidate))
        return Outcome("ok", samples={m: [pair] * (rounds or 9) for m in space.case.task.calls})


def test_a_session_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Workspace", "make_case"):
        monkeypatch.setattr(prepare_module, name, getattr(prepare_module, name))
    patch()
    builders: list[FakeBuilders] = []

    def pool(count: int) -> FakeBuilders:
        builders.append(FakeBuilders(count))
        return builders[0]

    for name, value in {
        "model_tasks": lambda *_a: (GPU, (gpu_task(),)),
        "check_runs_here": lambda _target: None,
        "gpu_chip": lambda: "nvidia-h100",
        "LocalMeasurer": lambda *_a: Times(read_bandwidth=5e11),
        "BuilderPool": pool,
    }.items():
        monkeypatch.setattr(tune_module, name, value)
    result = tune_model("toy", tmp_path, TuneOptions("cuda:sm_90", trials=50, threads=1))
    assert 1 <= builders[0].count <= 4
    assert result.trials == 5  # all there are with scales of 16 bits
    assert result.tasks[0].incumbent.config.warps == 32  # type: ignore[attr-defined]
    contents = Database(tmp_path).read()
    assert {t.target.chip for t in contents.trials} == {"nvidia-h100"}
    (start,) = [e for e in contents.entries if isinstance(e, SessionStart)]
    assert start.read_bandwidth == 5e11
    assert "Tuning of toy" in render(Database(tmp_path), result.session)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"event":"gpu","name":"","arch":"sm_90","copy":1}',
             b'{"event":"gpu","name":"x","arch":"sm_90","copy":-1}', b"[" * 5000],
)  # fmt: skip
def test_what_is_said_of_a_gpu_is_not_taken_on_trust(text: bytes) -> None:
    with pytest.raises(CompileError, match="damaged"):
        read_gpu(text)


def test_a_gpu_is_described(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = LocalMeasurer(tmp_path / "program", GPU)
    assert measurer.machine["gpu"] == "Fake GPU 90GB"
    assert measurer.read_bandwidth > 1e9
    monkeypatch.setenv("FAKE_GPU_DRIVER", "12080")
    with pytest.raises(CompileError, match=r"knows CUDA 12\.8 and 13\.0 is needed"):
        measurer._describe_gpu()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(CompileError, match="no NVIDIA driver"):
        measurer._describe_gpu()


@pytest.fixture(scope="module")
def bench(gpu: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Candidate]:
    """Build the default kernel of a small task."""
    task = gpu_task()
    default = tuned_space(task.rule, task.spec, GPU)[0]
    work = Workspace(
        tmp_path_factory.mktemp("gpu") / "work", make_case(task, default), GPU, 1, LIMITS
    )
    return work, work.build(default)


@pytest.mark.slow
def test_kernels_are_checked_and_timed_on_the_gpu(
    bench: tuple[Workspace, Candidate],
    planted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, default = bench
    measurer = LocalMeasurer(tmp_path / "program", GPU)
    outcome = measurer.measure(work, default, default)
    assert (outcome.status, outcome.message) == ("ok", "")
    assert {m: len(s) for m, s in outcome.samples.items()} == {1: 2, 5: 2}
    launches = outcome.medians()[1] / 1e-5
    assert launches == pytest.approx(1.0)  # one for a token: the flush of the cache is not in it
    assert outcome.medians()[5] > outcome.medians()[1]  # rounding, then the product
    wrong = adopt(work, default.config, planted(""))
    outcome = measurer.measure(work, wrong, default)
    assert (outcome.status, outcome.message) == (
        "wrong", "An output for 1 tokens is not a number.",
    )  # fmt: skip
    monkeypatch.setenv("FAKE_GPU_BYTES", "20000")
    outcome = measurer.measure(work, default, default)
    assert outcome.status == "memory"
    assert outcome.message.endswith("out of memory")


@needs_nvcc
@pytest.mark.slow
def test_a_bundle_holds_machine_code(tmp_path: Path) -> None:
    """Made by nvcc, without a GPU."""
    bundle, tasks = tmp_path / "bundle", [gpu_task()]
    bundle.mkdir()
    found = export_bundle(bundle, tasks, GPU, "toy", Workload(1, 8), trials=1, threads=1, jobs=2)
    assert found.failed == {"layer 32x256": 0}
    for path in bundle.glob("tasks/0/candidates/*/kernel.so"):
        code = path.read_bytes()
        assert b"main_kernel" in code
        assert b"__global__" not in code
    assert "./gqsa-measure --gpu ./lib" in (bundle / "run.sh").read_text()


@pytest.mark.slow
def test_a_bundle_for_a_gpu_runs_and_its_results_import(gpu: Path, tmp_path: Path) -> None:
    bundle, database = tmp_path / "bundle", Database(tmp_path / "db")
    bundle.mkdir()
    task = gpu_task()
    found = export_bundle(
        bundle, [task], GPU, "toy", Workload(5, 8), trials=1, threads=1, limits=LIMITS
    )
    assert found.candidates == {"layer 32x256": 2}
    assert sorted(p.name for p in (bundle / "lib").iterdir()) == [
        "libcudart.so.13", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so",
    ]  # fmt: skip
    words, environment = ["sh", str(bundle / "run.sh")], {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU of its own")
    assert "has no NVIDIA driver" in done.stderr
    assert not (bundle / "results" / "gpu").exists()
    environment["LD_LIBRARY_PATH"] = str(gpu)
    subprocess.run(words, env=environment, check=True)
    assert import_bundle(bundle, database)[1] == 2
    trials = database.read().trials
    assert [(t.status, t.message) for t in trials] == [("ok", "")] * 2
    assert {t.target.chip for t in trials} == {"fake-gpu-90gb"}
    assert {t.machine["gpu"] for t in trials} == {"Fake GPU 90GB"}
    (start,) = [e for e in database.read().entries if isinstance(e, SessionStart)]
    assert start.read_bandwidth > 0
    chosen = open_tuned(tmp_path / "db", GPU).choose(task.rule, task.spec, GPU)
    assert chosen.source == "exact"
    other = parse_target("cuda:sm_80")
    assert (
        open_tuned(tmp_path / "db", other).choose(task.rule, task.spec, other).source == "default"
    )
