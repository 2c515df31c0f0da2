"""The tasks of a compiled model, and compiling with a database: what is chosen, and its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler.compile import plan_kernels
from gqsa_compiler.compile_options import CompileOptions
from gqsa_compiler.errors import UsageError
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.targets import parse_target
from gqsa_compiler.tune import TuneOptions, check_runs_here, model_tasks
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import host_chip
from gqsa_compiler.tuning.tasks import QUANTILES, Workload, extract
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny
from tests.tuning.conftest import HOST
from tests.tuning.samples import trial_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny compressed Llama."""
    folder = tmp_path_factory.mktemp("tasks")
    make_tiny("llama", folder / "dense")
    return make_checkpoint(folder / "dense", folder / "checkpoint")


def test_a_workloads_calls() -> None:
    assert Workload(128, 64).calls() == {1: 64.0, 128: 1.0}
    assert Workload(1300, 10, 512).calls() == {1: 10.0, 512: 2.0, 276: 1.0}
    assert Workload(1, 10).calls() == {1: 11.0}


def test_the_tasks_of_a_model(checkpoint: Path) -> None:
    plan, weights = plan_kernels(str(checkpoint))
    tasks = extract(plan, weights, Workload(16, 8))
    layers = {task.name.split()[0]: task for task in tasks}
    assert set(layers) == {"q+k+v", "o", "gate+up", "down", "embed_tokens"}
    assert sum(task.layers for task in tasks) == len(plan.kernels)
    gate = layers["gate+up"]
    assert gate.layers == layers["o"].layers > 1
    assert gate.spec.epilogue.gated
    assert len(gate.rows) == QUANTILES
    assert list(gate.rows) == sorted(gate.rows)
    assert 0.5 < gate.density < 0.7
    assert gate.calls == {1: 8.0, 16: 1.0}
    assert layers["embed_tokens"].calls == {1: 9.0}
    assert json.loads(json.dumps(gate.describe()))["n"] == gate.spec.n


def test_tuning_is_for_one_target_that_runs_here(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="One target is tuned at a time"):
        model_tasks(str(checkpoint), TuneOptions("x86-64-v3,x86-64-v4"))
    with pytest.raises(UsageError, match="at least one token"):
        model_tasks(str(checkpoint), TuneOptions(gen=0))
    for name in ("x86-64-v3", "aarch64"):
        target = parse_target(name)
        if target.arch != HOST.arch:
            with pytest.raises(UsageError, match=f"cannot run code for {name}.*gqsa tune export"):
                check_runs_here(target)


def test_compiling_with_a_database_is_deterministic_and_says_what_it_took(
    checkpoint: Path, tmp_path: Path
) -> None:
    plan, _ = plan_kernels(str(checkpoint))
    kernel = next(k for k in plan.kernels if k.spec.epilogue.gated)
    space = kernel.rule.space(kernel.spec, HOST)
    wanted = next(c for c in space if c.tasks == 16)
    trial = trial_of(kernel.spec, wanted, HOST, host_chip())
    worse = trial_of(kernel.spec, space[-1], HOST, host_chip(), ratio=0.95)
    first, second = Database(tmp_path / "one"), Database(tmp_path / "two")
    first.append(trial, worse)
    second.append(worse, replace(trial, session="another", time="later"))  # the order is no matter
    reports = [
        gqsa_compile(str(checkpoint), tmp_path / f"out{n}", database=tmp_path / db, max_batch=1)
        for n, db in enumerate(("one", "two"))
    ]
    for name in ("model.so", "params.safetensors", "manifest.json"):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()
    sources = reports[0].configuration_sources
    assert sources["exact"] == sum(k.spec.epilogue.gated for k in plan.kernels)
    assert sum(sources.values()) == len(plan.kernels)
    used = Manifest.read(tmp_path / "out0").kernels
    assert [k.config["tasks"] for k in used if k.layer == kernel.name] == [16]
    written = json.loads((tmp_path / "out0" / "report.json").read_text())
    lines = {line["layer"]: line for line in written["configurations"]}
    assert lines[kernel.name]["source"] == "exact"
    assert "from the database" in lines[kernel.name]["detail"]


def test_a_database_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tuning database"):
        plan_kernels(str(checkpoint), CompileOptions(database=tmp_path / "none"))
