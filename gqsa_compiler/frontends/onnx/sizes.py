"""ONNX operators on shapes: integers that follow from the inputs' sizes are computed right away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gqsa_compiler._tvm import tirx
from gqsa_compiler.frontends.onnx.importer import Builder, prim
from gqsa_compiler.frontends.onnx.values import Dim, Node, Sizes, Value

Rule = Callable[[Builder, Node], Value | None]


def as_sizes(value: Value) -> Sizes | None:
    """Return integers of rank 0 or 1 as sizes; None for any other value."""
    if isinstance(value, Sizes):
        return value
    if isinstance(value, np.ndarray) and value.ndim < 2 and value.dtype.kind in "iu":
        return Sizes(tuple(int(item) for item in value.reshape(-1)), scalar=value.ndim == 0)
    return None


def _binary(combine: Callable[[Dim, Dim], Dim]) -> Rule:
    def rule(builder: Builder, node: Node) -> Value | None:
        one, other = as_sizes(node.inputs[0]), as_sizes(node.inputs[1])
        if one is None or other is None:
            return None
        length = max(len(one.items), len(other.items))
        if {len(one.items), len(other.items)} - {1, length}:
            return None
        pairs = zip(_stretch(one, length), _stretch(other, length), strict=True)
        items = tuple(builder.simple(combine(a, b)) for a, b in pairs)
        return Sizes(items, one.scalar and other.scalar)

    return rule


def _stretch(value: Sizes, length: int) -> tuple[Dim, ...]:
    return value.items * length if len(value.items) == 1 else value.items


def _divide(one: Dim, other: Dim) -> Dim:
    if isinstance(one, int) and isinstance(other, int):
        return int(one / other) if abs(one) < 1 << 52 else one // other
    return tirx.floordiv(prim(one), prim(other))


def _largest(one: Dim, other: Dim) -> Dim:
    both = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if both else tirx.max(prim(one), prim(other))


def _smallest(one: Dim, other: Dim) -> Dim:
    both = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if both else tirx.min(prim(one), prim(other))


def _equal(builder: Builder, node: Node) -> Value | None:
    one, other = as_sizes(node.inputs[0]), as_sizes(node.inputs[1])
    if one is None or other is None or len(one.items) != len(other.items):
        return None
    answers = []
    for a, b in zip(one.items, other.items, strict=True):
        if builder.equal(a, b):
            answers.append(True)
        elif builder.proves(prim(a) < b) or builder.proves(prim(a) > b):
            answers.append(False)
        else:
            return None
    return np.array(answers[0] if one.scalar and other.scalar else answers)


def _where(_builder: Builder, node: Node) -> Value | None:
    condition, one, other = node.inputs[0], as_sizes(node.inputs[1]), as_sizes(node.inputs[2])
    if not isinstance(condition, np.ndarray) or one is None or other is None:
        return None
    length = max(condition.size, len(one.items), len(other.items))
    chosen = np.broadcast_to(condition.reshape(-1), (length,))
    pairs = zip(chosen, _stretch(one, length), _stretch(other, length), strict=True)
    return Sizes(tuple(a if yes else b for yes, a, b in pairs), one.scalar and other.scalar)


def _gather(_builder: Builder, node: Node) -> Value | None:
    data, places = node.inputs[0], node.inputs[1]
    if not isinstance(data, Sizes) or not isinstance(places, np.ndarray) or places.ndim > 1:
        return None
    items = tuple(data.items[int(place)] for place in places.reshape(-1))
    return Sizes(items, scalar=places.ndim == 0)


def _slice(_builder: Builder, node: Node) -> Value | None:
    data = node.inputs[0]
    if not isinstance(data, Sizes):
        return None
    ends = [node.array(index, "bounds") for index in (1, 2, 4)]
    if ends[0] is None:
        start, stop, step = node.attributes["starts"][0], node.attributes["ends"][0], 1
    else:
        assert ends[1] is not None
        start, stop = int(ends[0][0]), int(ends[1][0])
        step = 1 if ends[2] is None else int(ends[2][0])
    return Sizes(data.items[slice(start, stop, step)])


def _concat(_builder: Builder, node: Node) -> Value | None:
    parts = [as_sizes(value) for value in node.inputs]
    if any(part is None for part in parts):
        return None
    return Sizes(tuple(item for part in parts if part is not None for item in part.items))


def _unsqueeze(_builder: Builder, node: Node) -> Value | None:
    data = node.inputs[0]
    return Sizes(data.items) if isinstance(data, Sizes) and data.scalar else None


def _squeeze(_builder: Builder, node: Node) -> Value | None:
    data = node.inputs[0]
    if not isinstance(data, Sizes) or len(data.items) != 1:
        return None
    return Sizes(data.items, scalar=True)


def _reshape(_builder: Builder, node: Node) -> Value | None:
    data, shape = node.inputs[0], node.inputs[1]
    if not isinstance(data, Sizes) or not isinstance(shape, np.ndarray) or shape.size > 1:
        return None
    return Sizes(data.items, scalar=shape.size == 0)


def _cast(_builder: Builder, node: Node) -> Value | None:
    data, to = node.inputs[0], int(node.attributes["to"])
    return data if isinstance(data, Sizes) and to in (6, 7) else None  # int32, int64


def _identity(_builder: Builder, node: Node) -> Value | None:
    return node.inputs[0] if isinstance(node.inputs[0], Sizes) else None


def _negate(builder: Builder, node: Node) -> Value | None:
    data = node.inputs[0]
    if not isinstance(data, Sizes):
        return None
    return Sizes(tuple(builder.simple(-prim(item)) for item in data.items), data.scalar)


def _product(builder: Builder, node: Node) -> Value | None:
    data = node.inputs[0]
    if not isinstance(data, Sizes):
        return None
    total: Any = 1
    for item in data.items:
        total = total * item
    return Sizes((builder.simple(total),), scalar=not node.attributes.get("keepdims", 1))


RULES: Mapping[str, Rule] = {
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _binary(_divide),
    "Max": _binary(_largest),
    "Min": _binary(_smallest),
    "Equal": _equal,
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Cast": _cast,
    "Identity": _identity,
    "Neg": _negate,
    "ReduceProd": _product,
}
"""Each returns None where it does not apply."""


def compute(builder: Builder, node: Node) -> Value | None:
    """Compute an operator on sizes; None if it is none, or needs the tensors themselves."""
    rule = RULES.get(node.op)
    if rule is None or not any(isinstance(value, Sizes) for value in node.inputs):
        return None
    if node.op in ("Max", "Min") and len(node.inputs) != 2:
        return None
    return rule(builder, node)
