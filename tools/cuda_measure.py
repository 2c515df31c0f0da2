"""Checks and times the kernels of a bundle on one layer; one process of `cuda_run.py`.

Reads one JSON object from standard input and writes lines of JSON: ``{"begin": case}`` before a
case and its result after it, so that whoever started this knows what a crash belongs to. Ends with
status 3 when the device can be used no more.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_check import compare
from cuda_driver import Device, Driver, DriverError
from cuda_host import Launch, Tensor, launches
from cuda_layers import Kernel, Problem, packing_key
from cuda_timing import copies_needed, time_calls

Array = npt.NDArray[Any]
Result = dict[str, Any]

DEVICE_LOST = 3
"""The exit status when an error of the driver has ended the use of the device."""
_RUNS = 3  # of which all bits have to agree


@dataclass(frozen=True)
class Case:
    """One result: a kernel, a layer's sparsity, a number of tokens."""

    kernel: str
    sparsity: float
    tokens: int

    @property
    def name(self) -> str:
        """The case in one word."""
        return f"{self.kernel}|{self.sparsity}|{self.tokens}"


@dataclass
class Memory:
    """What was allocated for a while."""

    device: Device
    addresses: list[int] = field(default_factory=list)

    def allocate(self, size: int) -> int:
        """Allocate bytes until `release`."""
        self.addresses.append(self.device.allocate(size))
        return self.addresses[-1]

    def put(self, array: Array) -> Tensor:
        """Copy an array to the device."""
        tensor = Tensor(self.allocate(array.nbytes), str(array.dtype), array.shape)
        self.device.upload(tensor.address, array)
        return tensor

    def twin(self, tensor: Tensor, size: int) -> Tensor:
        """Copy `size` bytes on the device."""
        address = self.allocate(size)
        self.device.copy(address, tensor.address, size)
        return Tensor(address, tensor.dtype, tensor.shape)

    def release(self) -> None:
        """Free everything."""
        for address in self.addresses:
            self.device.free(address)
        self.addresses.clear()


@dataclass
class Weights:
    """A layer's packed tensors on the device: one copy, or as many as timing needs."""

    memory: Memory
    packed: Mapping[str, Array]
    copies: list[dict[str, Tensor]]

    @classmethod
    def put(cls, device: Device, packed: Mapping[str, Array]) -> Weights:
        """Copy the tensors to the device."""
        memory = Memory(device)
        return cls(memory, packed, [{name: memory.put(array) for name, array in packed.items()}])

    def rotate(self, count: int) -> None:
        """Have at least `count` copies."""
        while len(self.copies) < count:
            first = self.copies[0]
            self.copies.append(
                {
                    name: self.memory.twin(tensor, self.packed[name].nbytes)
                    for name, tensor in first.items()
                }
            )
        self.memory.device.synchronize()


class Program:
    """A kernel on the device.

    Parameters
    ----------
    kernel : mapping
        Its entry of the manifest.
    image : bytes
        Its machine code.
    """

    def __init__(self, device: Device, kernel: Kernel, image: bytes) -> None:
        self.device, self.kernel = device, kernel
        module = device.load(image)
        self.functions = {name: device.function(module, name) for name in kernel["functions"]}

    def plan(
        self, operands: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory
    ) -> tuple[Launch, ...]:
        """Find what is launched for these tensors."""
        known = {**operands, **weights}
        tensors = [known[name] for name in self.kernel["arguments"]]
        return launches(self.kernel["host"], tensors, memory.allocate)

    def launch(self, plan: Sequence[Launch]) -> None:
        """Launch a plan; returns at once."""
        for one in plan:
            function = self.functions[one.name]
            self.device.launch(function, one.grid, one.threads, one.shared_bytes, one.arguments)


def measure(
    device: Device, program: Program, weights: Weights, problem: Problem, case: Case, timed: bool
) -> Result:
    """Check a case, and time it if it is right.

    Returns
    -------
    dict
        ``status`` is ``ok`` or ``wrong`` (with ``fault``).

    Raises
    ------
    DriverError
        A call failed; nothing more can be expected of the device.
    """
    memory = Memory(device)
    arrays = {
        name: a[: case.tokens] if name in ("x", "residual") else a
        for name, a in problem.operands.items()
    }
    operands = {name: memory.put(np.ascontiguousarray(a)) for name, a in arrays.items()}
    out = np.empty((case.tokens, problem.expected.shape[1]), np.float32)
    operands["out"] = memory.put(out)
    plan = program.plan(operands, weights.copies[0], memory)
    result = _check(device, program, plan, operands["out"], weights, problem, case)
    if result["status"] == "ok" and timed:
        size = problem.weight_bytes
        weights.rotate(copies_needed(size, int(device.info()["l2_bytes"])))
        plans = [program.plan(operands, copy, memory) for copy in weights.copies]
        timing = time_calls(device, lambda copy: program.launch(plans[copy]), len(plans))
        result["weight_bytes"] = size
        result["timing"] = timing.to_json()
        result["bandwidth"] = size / timing.median
    memory.release()
    return result


def _check(
    device: Device,
    program: Program,
    plan: Sequence[Launch],
    out: Tensor,
    weights: Weights,
    problem: Problem,
    case: Case,
) -> Result:
    spec = program.kernel["spec"]
    found: list[Array] = []
    for _ in range(_RUNS):
        got = np.empty(out.shape, np.float32)
        device.fill(out.address, 0xFF, got.nbytes)  # NaN
        program.launch(plan)
        device.download(out.address, got)
        found.append(got)
    expected = problem.expected[: case.tokens]
    gated = spec["epilogue"]["gated"]
    verdict = compare(found[0], expected, spec["activation_dtype"], gated)
    fault = verdict.fault
    if fault is None and any(other.tobytes() != found[0].tobytes() for other in found[1:]):
        fault = "results differ from run to run"
    counters = np.empty(problem.packed["arrivals"].shape, np.uint32)
    device.download(weights.copies[0]["arrivals"].address, counters)
    if fault is None and counters.any():
        fault = "a counter of arrivals was left behind"
    result: Result = {"status": "ok" if fault is None else "wrong", "together": verdict.together}
    result["worst"] = verdict.worst if np.isfinite(verdict.worst) else None
    if not np.isfinite(verdict.together):
        result["together"] = None
    return result if fault is None else {**result, "fault": fault}


def run_cases(
    device: Device,
    bundle: Path,
    kernels: Mapping[str, Kernel],
    cases: Sequence[Case],
    folder: Path,
    timed: bool,
) -> Iterator[Result]:
    """Run cases, default configurations first, those that share packed weights together.

    Yields
    ------
    dict
        ``{"begin": case}``, then the result: ``case``, ``status`` and what `measure` found.
        After a status of ``failed`` nothing follows: the device is lost.
    """

    def order(case: Case) -> tuple[bool, str]:
        kernel = kernels[case.kernel]
        return kernel["variant"] != "default", packing_key(kernel)

    ordered = sorted(cases, key=order)
    weights: Weights | None = None
    loaded: str | None = None
    programs: dict[str, Program] = {}
    for case in ordered:
        kernel = kernels[case.kernel]
        yield {"begin": case.name}
        result: Result = {"case": case.name}
        try:
            problem = Problem.load(folder, kernel)
            if weights is None or loaded != packing_key(kernel):
                if weights is not None:
                    weights.memory.release()
                weights, loaded = Weights.put(device, problem.packed), packing_key(kernel)
            if case.kernel not in programs:
                image = gzip.decompress((bundle / kernel["image"]).read_bytes())
                programs = {case.kernel: Program(device, kernel, image)}
            program = programs[case.kernel]
            result |= measure(device, program, weights, problem, case, timed)
        except DriverError as error:
            yield {**result, "status": "failed", "fault": str(error)}
            return
        yield result


def main() -> int:
    """Run the cases that standard input names."""
    order = json.load(sys.stdin)
    bundle = Path(order["bundle"])
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    kernels = {kernel["id"]: kernel for kernel in manifest["kernels"]}
    cases = [Case(*fields) for fields in order["cases"]]
    lost = False
    folder = Path(order["folder"])
    for line in run_cases(Driver(), bundle, kernels, cases, folder, order["timed"]):
        print(json.dumps(line), flush=True)
        lost = line.get("status") == "failed"
    return DEVICE_LOST if lost else 0


if __name__ == "__main__":
    sys.exit(main())
