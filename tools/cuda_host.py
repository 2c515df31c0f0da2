"""The host's part of a kernel as plain JSON: which device functions it launches, and with what.

TVM lowers a kernel to a host function that chooses between device functions by the number of
tokens. `cuda_encode.py` writes that function as nested lists, and `launches` evaluates them, so a
machine without TVM launches what TVM would.

A program is ``{"params": [[variable, dtype, extents], ...], "body": statement}``. Statements:
``["seq", ...]``, ``["if", condition, then, else]``, ``["for", variable, first, count, body]``,
``["let", variable, value]``, ``["alloc", variable, dtype, extents]`` and ``["launch", function,
arguments, {tag: size}]``. Expressions: a number, ``["var", variable]``, ``["cast", x]``,
``["not", x]``, ``["select", condition, a, b]`` and ``[operator, a, b]``. Only the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
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
    "shift_left": lambda a, b: a << b,
    "shift_right": lambda a, b: a >> b,
}
"""Operators by the names of TVM's expressions."""
ITEM_BYTES = {"uint8": 1, "float16": 2, "uint16": 2, "float32": 4, "int32": 4, "uint32": 4}
"""Bytes of an element of what a host function allocates."""


@dataclass(frozen=True)
class Tensor:
    """An argument: where it lies on the device, its dtype and its shape."""

    address: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: a device function, its arguments (addresses or integers), its sizes."""

    name: str
    arguments: tuple[int, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int


def launches(
    program: Mapping[str, Any], tensors: Sequence[Tensor], allocate: Callable[[int], int]
) -> tuple[Launch, ...]:
    """Evaluate a host function.

    Parameters
    ----------
    program : mapping
        As `cuda_encode.encode_host` makes it.
    tensors : sequence of Tensor
        Its arguments, in order.
    allocate : callable
        Gives the address of so many bytes of device memory that live as long as the launches.

    Raises
    ------
    ValueError
        An argument has not the declared shape or dtype, or the program has what is not defined.
    """
    host = _Host(allocate)
    if len(program["params"]) != len(tensors):
        raise ValueError(f"{len(program['params'])} arguments are declared, not {len(tensors)}.")
    for declared, tensor in zip(program["params"], tensors, strict=True):
        host.bind(declared, tensor)
    host.run(program["body"])
    return tuple(host.launches)


class _Host:
    """The variables of one evaluation, and the launches so far."""

    def __init__(self, allocate: Callable[[int], int]) -> None:
        self.allocate = allocate
        self.values: dict[str, int] = {}
        self.launches: list[Launch] = []

    def bind(self, declared: Sequence[Any], tensor: Tensor) -> None:
        name, dtype, extents = declared
        wrong = f"Argument {name} is {tensor.dtype} {tensor.shape}, not {dtype} {extents}."
        if dtype != tensor.dtype or len(extents) != len(tensor.shape):
            raise ValueError(wrong)
        for extent, size in zip(extents, tensor.shape, strict=True):
            if isinstance(extent, list) and extent[0] == "var":
                if self.values.setdefault(extent[1], size) != size:
                    raise ValueError(wrong)
            elif self.value(extent) != size:
                raise ValueError(wrong)
        self.values[name] = tensor.address

    def run(self, node: Sequence[Any]) -> None:
        kind = node[0]
        if kind == "seq":
            for statement in node[1:]:
                self.run(statement)
        elif kind == "if":
            chosen = node[2] if self.value(node[1]) else node[3]
            if chosen is not None:
                self.run(chosen)
        elif kind == "for":
            first = self.value(node[2])
            for i in range(first, first + self.value(node[3])):
                self.values[node[1]] = i
                self.run(node[4])
        elif kind == "let":
            self.values[node[1]] = self.value(node[2])
        elif kind == "alloc":
            size = ITEM_BYTES[node[2]]
            for extent in node[3]:
                size *= self.value(extent)
            self.values[node[1]] = self.allocate(size)
        elif kind == "launch":
            self._launch(node[1], node[2], node[3])
        else:
            raise ValueError(f"Statement {kind!r} of a host function is not known.")

    def _launch(self, name: str, arguments: Sequence[Any], sizes: Mapping[str, Any]) -> None:
        left = {tag: self.value(size) for tag, size in sizes.items()}

        def axes(kind: str) -> tuple[int, int, int]:
            x, y, z = (int(left.pop(f"{kind}.{axis}", 1)) for axis in "xyz")
            return x, y, z

        grid, threads = axes("blockIdx"), axes("threadIdx")
        shared = int(left.pop("tirx.use_dyn_shared_memory", 0))
        if left:
            raise ValueError(f"Kernel {name} is launched with {', '.join(left)}, not known.")
        if min(grid) > 0:
            values = tuple(int(self.value(argument)) for argument in arguments)
            self.launches.append(Launch(name, values, grid, threads, shared))

    def value(self, node: Any) -> Any:
        if isinstance(node, int | float):
            return node
        kind = node[0]
        if kind == "var":
            return self.values[node[1]]
        if kind == "cast":
            return int(self.value(node[1]))
        if kind == "not":
            return not self.value(node[1])
        if kind == "select":
            return self.value(node[2] if self.value(node[1]) else node[3])
        if kind in BINARY:
            return BINARY[kind](self.value(node[1]), self.value(node[2]))
        raise ValueError(f"Expression {kind!r} of a host function is not known.")
