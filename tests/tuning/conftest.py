"""One small task with its default kernel and the measuring program, for all tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gqsa_compiler.schedules.activations import default_activations
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target
from gqsa_compiler.tuning.measure.case import make_case
from gqsa_compiler.tuning.measure.local import LocalMeasurer
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.workspace import KERNEL, Candidate, Limits, Workspace
from gqsa_compiler.tuning.tasks import Task

HOST = parse_target("cpu")
SMALL = Limits(
    run_seconds=60.0, rotate_bytes=1 << 16, rounds=3, least_seconds=1e-5, memory_bytes=1 << 30
)
"""One thread, little data: what a busy machine measures in a tenth of a second."""


def small_task(n: int = 32, k: int = 64) -> Task:
    """Describe a layer with 1 to 4 groups a row, called with 1 and 5 tokens."""
    spec = LinearSpec(
        n, k, "bsr", "int4", 16, 2 * n, activation_dtype=default_activations(HOST), norm_eps=1e-5
    )
    rule, _ = select(spec, HOST)
    return Task(f"layer {n}x{k}", rule, spec, (1, 2, 3, 4), 2, {1: 8.0, 5: 1.0})


@dataclass
class Bench:
    """A task ready to be measured."""

    task: Task
    space: list[KernelConfig]
    work: Workspace
    default: Candidate
    measurer: LocalMeasurer

    def measure(self, candidate: Candidate) -> Outcome:
        """Measure a candidate against the default."""
        return self.measurer.measure(self.work, candidate, self.default)


def adopt(work: Workspace, config: KernelConfig, library: Path) -> Candidate:
    """Take a candidate whose code is there already."""
    folder = work.place()
    shutil.copyfile(library, folder / KERNEL)
    return work.complete(config, folder)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Build the default kernel of a small task, and the measuring program."""
    folder = tmp_path_factory.mktemp("tuning")
    task = small_task()
    space = list(task.rule.space(task.spec, HOST))
    work = Workspace(folder / "work", make_case(task, space[0]), HOST, 1, SMALL)
    measurer = LocalMeasurer(folder / "program", HOST)
    return Bench(task, space, work, work.build(space[0]), measurer)


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that compiles a kernel whose body is given, in C++, to a library."""

    def build(body: str) -> Path:
        source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
        source.write_text(
            "#include <cmath>\n#include <cstdio>\n#include <cstdlib>\n#include <cstring>\n"
            "#include <unistd.h>\n"
            "#include <dlpack/dlpack.h>\n#include <tvm/ffi/c_api.h>\n"
            'extern "C" int __tvm_ffi_main(void*, const TVMFFIAny* args, int count, TVMFFIAny*) {\n'
            "  DLTensor& out = *static_cast<DLTensor*>(args[count - 1].v_ptr);\n"
            "  float* y = static_cast<float*>(out.data);\n"
            "  long size = out.shape[0] * out.shape[1]; (void)y; (void)size;\n"
            f"  {body}\n  return 0;\n}}\n"
        )
        import tvm_ffi

        include = Path(tvm_ffi.__file__).parent / "include"
        words = ["g++", "-shared", "-fPIC", "-O1", f"-I{include}", str(source), "-o", str(library)]
        subprocess.run(words, check=True)
        return library

    return build
