"""A directory of what a task's candidates are measured with: data, packed weights, code.

    case/x-1.bin ...            inputs, right outputs and their bounds
    packed/0/records.bin ...    the weight, once for each way that configurations pack it
    candidates/3/kernel.so      a candidate's code
    candidates/3/job.txt        what `measure.cpp` is to do with it

Paths in a job are relative to it, so that the directory can be carried elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.measure.case import Case
from gqsa_compiler.tuning.measure.code import BuildError, make_code

KERNEL, JOB = "kernel.so", "job.txt"
_TYPES = {"i": "i", "u": "u", "f": "f", "V": "u"}  # bfloat16 is raw bytes to numpy


@dataclass(frozen=True)
class Limits:
    """What a trial may take.

    Parameters
    ----------
    build_seconds : int
        Of making a candidate's code.
    run_seconds : float
        Of checking and timing it.
    rotate_bytes : int
        Weights that calls take turns on: more than the caches hold.
    rounds : int
        Samples of each kernel and number of tokens.
    least_seconds : float
        That a sample lasts.
    memory_bytes : int
        Address space beyond the data's own that a candidate's process may have.
    """

    build_seconds: int = 120
    run_seconds: float = 60.0
    rotate_bytes: int = 256 << 20
    rounds: int = 9
    least_seconds: float = 2e-3
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Candidate:
    """A configuration with its code and its packed weight in a workspace.

    Parameters
    ----------
    config : KernelConfig
    folder : Path
        Of its code.
    packed : Path
        Folder of its packed weight.
    arrays : dict of str to str
        The packed tensors' lines of a job, by name: file, type and shape.
    """

    config: KernelConfig
    folder: Path
    packed: Path
    arrays: dict[str, str]


class Workspace:
    """The directory of one task.

    Parameters
    ----------
    root : Path
        Made; empty.
    case : Case
    target : TargetSpec
    threads : int
        That kernels run on.
    limits : Limits

    Attributes
    ----------
    case_bytes, weight_bytes : int
        Of inputs and outputs, and of the largest packed weight.
    """

    def __init__(
        self, root: Path, case: Case, target: TargetSpec, threads: int, limits: Limits
    ) -> None:
        self.root = root
        self.case = case
        self.target = target
        self.threads = threads
        self.limits = limits
        self.case_bytes = self.weight_bytes = 0
        self._packed: dict[Hashable, tuple[Path, dict[str, str]]] = {}
        self._count = 0
        self._shared: dict[str, str] = {}
        self._write_case()

    def build(self, config: KernelConfig) -> Candidate:
        """Make a candidate's code and pack its weight.

        Raises
        ------
        BuildError
            The rule, TVM, LLVM or the linker failed, or took too long.
        """
        folder = self.place()
        rule, spec, seconds = self.case.task.rule, self.case.spec, self.limits.build_seconds
        make_code(rule, spec, config, self.target, folder / KERNEL, seconds)
        return self.complete(config, folder)

    def place(self) -> Path:
        """Make the folder of one more candidate, whose code `KERNEL` is to be put there."""
        folder = self.root / "candidates" / str(self._count)
        self._count += 1
        folder.mkdir(parents=True)
        return folder

    def complete(self, config: KernelConfig, folder: Path) -> Candidate:
        """Pack the weight for a candidate whose code is in its folder.

        Raises
        ------
        BuildError
            It cannot be packed.
        """
        try:
            packed, arrays = self._pack(config)
        except CompileError as error:
            raise BuildError(str(error)) from error
        return Candidate(config, folder, packed, arrays)

    def write_job(
        self, candidate: Candidate, incumbent: Candidate, rounds: int | None = None
    ) -> Path:
        """Write what is to be measured into the candidate's folder, and return the folder."""
        limits, case = self.limits, self.case
        lines = [
            f"device {'gpu' if self.target.kind == 'cuda' else 'cpu'}",
            f"threads {self.threads}",
            f"rotate {limits.rotate_bytes}",
            f"rounds {rounds or limits.rounds}",
            f"least {limits.least_seconds}",
        ]
        lines += [f"array {name} ../../case/{text}" for name, text in self._shared.items()]
        pair = (("incumbent", incumbent), ("candidate", candidate))
        for who, one in pair:
            place = f"../../packed/{one.packed.name}"
            lines += [f"array {who}.{n} {place}/{text}" for n, text in one.arrays.items()]
        lines += [f"kernel {who} ../{one.folder.name}/{KERNEL}" for who, one in pair]
        for m, right in case.right.items():
            rows, columns = right.wanted.shape
            lines.append(f"case {m} {rows} {columns} wanted-{m} bound-{m}")
            for who, one in pair:
                names = [self._argument(name, m, who) for name in case.arguments(one.config)]
                lines.append(f"call {m} {who} {' '.join(names)}")
        (candidate.folder / JOB).write_text("\n".join(lines) + "\n", encoding="ascii")
        return candidate.folder

    @staticmethod
    def _argument(name: str, tokens: int, who: str) -> str:
        if name.startswith("@"):
            return f"@{who}.{name[1:]}"
        return f"{name}-{tokens}" if name in ("x", "residual") else name

    def _write_case(self) -> None:
        folder = self.root / "case"
        folder.mkdir(parents=True)
        arrays: dict[str, Any] = {"norm": self.case.norm, "bias": self.case.bias}
        for m, right in self.case.right.items():
            arrays[f"x-{m}"], arrays[f"residual-{m}"] = right.x, right.residual
            arrays[f"wanted-{m}"], arrays[f"bound-{m}"] = right.wanted, right.bound
        for name, array in arrays.items():
            if array is not None:
                self._shared[name] = _write(folder, name, array)
                self.case_bytes += array.nbytes

    def _pack(self, config: KernelConfig) -> tuple[Path, dict[str, str]]:
        rule: Any = self.case.task.rule
        way: Hashable = rule.packed_by(config)
        if way not in self._packed:
            folder = self.root / "packed" / str(len(self._packed))
            folder.mkdir(parents=True)
            packed = self.case.pack(config)
            lines = {name: _write(folder, name, array) for name, array in packed.items()}
            self._packed[way] = (folder, lines)
            size = sum(array.nbytes for array in packed.values())
            self.weight_bytes = max(self.weight_bytes, size)
        return self._packed[way]


def _write(folder: Path, name: str, array: npt.NDArray[Any]) -> str:
    """Write an array's numbers; returns its file, type and shape as a job has them."""
    data = np.ascontiguousarray(array)
    file = f"{name}.bin"
    data.tofile(folder / file)
    kind = _TYPES[data.dtype.kind]
    return " ".join([file, kind, str(8 * data.dtype.itemsize), *map(str, data.shape)])
