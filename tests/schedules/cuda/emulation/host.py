"""Runs the host's part of a lowered kernel: which device functions are launched, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BINARY = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "FloorDiv": lambda a, b: a // b,
    "FloorMod": lambda a, b: a % b,
    "Min": min,
    "Max": max,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}


@dataclass(frozen=True)
class Launch:
    """One launch: a device function, its arguments in order (arrays or numbers), its sizes."""

    name: str
    arguments: tuple[Array | int | float, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int


class Host:
    """Evaluates a host function, statement by statement.

    Parameters
    ----------
    function : PrimFunc
        The entry function of a lowered module.
    arrays : sequence of array or number
        Its arguments, in order.

    Raises
    ------
    AssertionError
        An argument has not the declared shape or dtype.
    """

    def __init__(self, function: Any, arrays: Sequence[Array | int | float]) -> None:
        self.values: dict[Any, Any] = {}
        self.launches: list[Launch] = []
        params = list(function.params)
        assert len(params) == len(arrays), f"{len(params)} arguments are declared"
        for param, array in zip(params, arrays, strict=True):
            self._bind_argument(param, array)
        for param, array in zip(params, arrays, strict=True):
            if isinstance(array, np.ndarray):
                shape = tuple(self._value(extent) for extent in param.ty.shape)
                assert shape == array.shape, f"{param.name}: {array.shape}, not {param.ty.shape}"
        self._run(function.body)

    def _bind_argument(self, param: Any, array: Array | int | float) -> None:
        if not isinstance(array, np.ndarray):
            assert not hasattr(param.ty, "shape"), f"{param.name} should be an array"
            self.values[param] = array
            return
        shape = param.ty.shape
        assert len(shape) == array.ndim, f"{param.name} has {array.ndim} axes"
        assert str(param.ty.dtype.dtype) == str(array.dtype), f"{param.name}: {array.dtype}"
        for extent, size in zip(shape, array.shape, strict=True):
            if type(extent).__name__ == "Var":
                self.values.setdefault(extent, size)
        # What begins inside its memory begins at its start here.
        if type(param.elem_offset).__name__ == "Var":
            self.values[param.elem_offset] = 0
        self.values[param] = array

    def _run(self, node: Any) -> None:
        kind = type(node).__name__
        if kind == "SeqStmt":
            for statement in node.seq:
                self._run(statement)
        elif kind == "IfThenElse":
            if self._value(node.condition):
                self._run(node.then_case)
            elif node.else_case is not None:
                self._run(node.else_case)
        elif kind == "For":
            start = self._value(node.min)
            for i in range(start, start + self._value(node.extent)):
                self.values[node.loop_var] = i
                self._run(node.body)
        elif kind == "DeclBuffer":
            self.values[node.buffer] = self._value(node.data)
        elif kind == "AllocBuffer":
            shape = [self._value(extent) for extent in node.buffer.ty.shape]
            memory = np.empty(shape, str(node.buffer.ty.dtype.dtype))
            memory.view(np.uint8)[...] = 0xFF  # NaN in every float type
            self.values[node.buffer] = memory
        elif kind == "Bind":
            self.values[node.var] = self._value(node.value)
        elif kind == "Evaluate":
            self._launch(node.value)
        elif kind == "AttrStmt":
            self._run(node.body)
        else:
            raise NotImplementedError(f"statement {kind}: {node}")

    def _launch(self, call: Any) -> None:
        if type(call).__name__ == "IntImm":
            return
        assert call.op.name == "tirx.call_ffi_kernel", call
        tags = list(call.attrs.launch_params)
        values = [self._value(arg) for arg in call.args[1:]]
        sizes = dict(zip(tags, values[len(values) - len(tags) :], strict=True))

        def axes(name: str) -> tuple[int, int, int]:
            x, y, z = (int(sizes.pop(f"{name}.{axis}", 1)) for axis in "xyz")
            return x, y, z

        grid, threads = axes("blockIdx"), axes("threadIdx")
        shared = int(sizes.pop("tirx.use_dyn_shared_memory", 0))
        assert not sizes, sizes
        if min(grid) > 0:
            arguments = tuple(values[: len(values) - len(tags)])
            name = str(call.args[0].value)
            self.launches.append(Launch(name, arguments, grid, threads, shared))

    def _value(self, node: Any) -> Any:
        kind = type(node).__name__
        if kind in ("IntImm", "FloatImm"):
            return node.value
        if kind == "Var":
            return self.values[node]
        if kind == "Cast":
            return int(self._value(node.value))
        if kind == "Not":
            return not self._value(node.a)
        if kind in _BINARY:
            return _BINARY[kind](self._value(node.a), self._value(node.b))
        if kind == "Select":
            chosen = node.true_value if self._value(node.condition) else node.false_value
            return self._value(chosen)
        if kind == "Call":
            name = node.op.name
            arguments = [self._value(arg) for arg in node.args]
            shifts: Mapping[str, Any] = {
                "tirx.shift_left": lambda a, b: a << b,
                "tirx.shift_right": lambda a, b: a >> b,
                "tirx.buffer_data": lambda a: a,
            }
            if name in shifts:
                return shifts[name](*arguments)
        raise NotImplementedError(f"expression {kind}: {node}")
