"""ONNX operators that move, select and make values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gqsa_compiler._tvm import relax, tirx
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.importer import Builder, prim
from gqsa_compiler.frontends.onnx.sizes import as_sizes
from gqsa_compiler.frontends.onnx.values import Dim, Expr, Node, Sizes, Value

op = relax.op
_END = 1 << 31
"""Ends of slices beyond this mean the end of the axis."""


def shape(builder: Builder, node: Node) -> Value:
    """Import the sizes of a tensor."""
    sizes = builder.shape(node.inputs[0])
    begin, end = node.attributes.get("start", 0), node.attributes.get("end")
    return Sizes(tuple(sizes[begin:end]))


def size(builder: Builder, node: Node) -> Value:
    """Import the number of elements."""
    total = math.prod(builder.shape(node.inputs[0]), start=1)
    return Sizes((builder.simple(total),), scalar=True)


def reshape(builder: Builder, node: Node) -> Value:
    """Import a new shape, with 0 for a size that stays and -1 for the one that follows."""
    x = builder.expr(node.inputs[0], node.names[0])
    old, wanted = builder.shape(x), _sizes(node, 1, "shape").items
    keeps = not node.attributes.get("allowzero", 0)
    new: list[Dim] = []
    for place, item in enumerate(wanted):
        keep = keeps and isinstance(item, int) and item == 0
        new.append(old[place] if keep else item)
    open_places = [i for i, item in enumerate(new) if isinstance(item, int) and item == -1]
    if open_places:
        rest = math.prod(item for i, item in enumerate(new) if i not in open_places)
        new[open_places[0]] = _quotient(builder, node, old, rest)
    return _view(builder, x, new)


def _quotient(builder: Builder, node: Node, old: tuple[Dim, ...], rest: Dim) -> Dim:
    """Return what is left of a product of sizes: common factors first, then a division."""
    left = list(old)
    if isinstance(rest, int):
        whole = math.prod(left, start=1)
        return builder.simple(whole // rest if isinstance(whole, int) else _div(whole, rest))
    whole = builder.simple(math.prod(left, start=1))
    found = builder.simple(_div(whole, rest))
    if not builder.proves(found * rest == whole):
        raise ModelError(f"{node.where}: the size that -1 stands for does not follow.")
    return found


def _div(one: Dim, other: Dim) -> Dim:
    return tirx.floordiv(prim(one), prim(other))


def _view(builder: Builder, x: Expr, new: Sequence[Dim]) -> Expr:
    """Emit a tensor in another shape."""
    old = builder.shape(x)
    if len(old) == len(new) and all(map(builder.equal, old, new)):
        return x
    count, wanted = _count(builder, old), _count(builder, new)
    if not builder.equal(count, wanted):
        # It does not hold for all sizes; where it does not the module has to stop.
        flat = builder.emit(op.reshape(x, relax.ShapeExpr([count])))
        x = builder.fit(flat, {0: wanted})
    elif len(new) > 2 and len(old) >= 2 and builder.equal(old[-1], new[-1]):
        rows = builder.rows(x)  # the same rows, so that what follows can go on with them
        return builder.from_rows(rows, new[:-1])
    return builder.emit(op.reshape(x, relax.ShapeExpr(new)))


def flatten(builder: Builder, node: Node) -> Value:
    """Import a matrix of the sizes before and after an axis."""
    x = builder.expr(node.inputs[0], node.names[0])
    old = builder.shape(x)
    axis = int(node.attributes.get("axis", 1))
    axis += len(old) if axis < 0 else 0
    sides = [builder.simple(math.prod(part, start=1)) for part in (old[:axis], old[axis:])]
    return _view(builder, x, sides)


def transpose(builder: Builder, node: Node) -> Value:
    """Import a permutation of the axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    axes = node.attributes.get("perm") or list(range(len(builder.shape(x))))[::-1]
    return x if axes == sorted(axes) else builder.emit(op.permute_dims(x, axes), node)


def expand(builder: Builder, node: Node) -> Value:
    """Import a broadcast, in both directions."""
    x = builder.expr(node.inputs[0], node.names[0])
    old, wanted = builder.shape(x), _sizes(node, 1, "shape").items
    rank = max(len(old), len(wanted))
    padded = (1,) * (rank - len(old)) + tuple(old)
    new = [
        mine if isinstance(asked, int) and asked == 1 else asked
        for mine, asked in zip(padded, (1,) * (rank - len(wanted)) + tuple(wanted), strict=True)
    ]
    if len(old) == rank and all(map(builder.equal, old, new)):
        return x
    first = rank - len(old)
    varying = {axis: new[first + axis] for axis, size in enumerate(old) if not _ints(size)}
    x = builder.fit(x, varying)
    return builder.emit(op.broadcast_to(x, relax.ShapeExpr(new)), node)


def unsqueeze(builder: Builder, node: Node) -> Value:
    """Import new axes of size 1."""
    x = builder.expr(node.inputs[0], node.names[0])
    axes = node.axes(1) or []
    rank = len(builder.shape(x)) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(builder.shape(x))
    return _view(builder, x, [1 if place in places else next(rest) for place in range(rank)])


def squeeze(builder: Builder, node: Node) -> Value:
    """Import the removal of axes of size 1."""
    x = builder.expr(node.inputs[0], node.names[0])
    sizes, axes = builder.shape(x), node.axes(1)
    if axes is None:
        places = {i for i, item in enumerate(sizes) if isinstance(item, int) and item == 1}
    else:
        places = {axis % len(sizes) for axis in axes}
    return _view(builder, x, [item for i, item in enumerate(sizes) if i not in places])


def concat(builder: Builder, node: Node) -> Value:
    """Import a concatenation."""
    parts = [builder.expr(value, name) for value, name in zip(node.inputs, node.names, strict=True)]
    return builder.emit(op.concat(parts, axis=int(node.attributes["axis"])), node)


def split(builder: Builder, node: Node) -> tuple[Value, ...]:
    """Import a cut into parts of given sizes, or of equal ones."""
    x = builder.expr(node.inputs[0], node.names[0])
    axis = int(node.attributes.get("axis", 0)) % len(builder.shape(x))
    given = node.array(1, "split")
    lengths = node.attributes.get("split") if given is None else [int(item) for item in given]
    if lengths is None:
        total = builder.shape(x)[axis]
        if not isinstance(total, int):
            raise ModelError(f"{node.where}: an axis of varying size is not cut into equal parts.")
        step = -(-total // node.outputs)
        lengths = [min(step, total - begin) for begin in range(0, total, step)]
    ends = np.cumsum(lengths)
    parts = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        parts.append(_cut(builder, node, x, axis, int(begin), int(end), 1))
    return tuple(parts)


def slice_(builder: Builder, node: Node) -> Value:
    """Import slices along axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    if "starts" in node.attributes:
        starts = Sizes(tuple(node.attributes["starts"]))
        ends = Sizes(tuple(node.attributes["ends"]))
        axes, steps = node.attributes.get("axes"), None
    else:
        starts, ends = _sizes(node, 1, "starts"), _sizes(node, 2, "ends")
        given, steps = node.array(3, "axes"), node.array(4, "steps")
        axes = None if given is None else [int(axis) for axis in given]
    for place, (start, end) in enumerate(zip(starts.items, ends.items, strict=True)):
        axis = place if axes is None else axes[place]
        step = 1 if steps is None else int(steps[place])
        x = _cut(builder, node, x, axis % len(builder.shape(x)), start, end, step)
    return x


def _cut(builder: Builder, node: Node, x: Expr, axis: int, start: Dim, end: Dim, step: int) -> Expr:
    """Slice one axis; ends are clamped as in Python, as far as sizes decide."""
    length = builder.shape(x)[axis]
    if step != 1:
        if not all(isinstance(value, int) for value in (start, end, length)):
            raise ModelError(f"{node.where}: steps need ends that are constant.")
        places = np.arange(length)[slice(_python(start), _python(end), step)]
        return builder.emit(op.take(x, relax.const(places, "int64"), axis=axis), node)
    start, end = (_bound(builder, value, length) for value in (start, end))
    end = _at_least(builder, end, start)
    if builder.equal(start, 0) and builder.equal(end, length):
        return x
    count = builder.simple(end - start) if not _ints(start, end) else max(0, end - start)
    cut = builder.emit(
        op.strided_slice(x, [axis], [prim(start)], [prim(end)], [1], assume_inbound=True), node
    )
    sizes = [*builder.shape(x)]
    sizes[axis] = count
    if all(map(builder.equal, builder.shape(cut), sizes)):
        return cut
    return builder.block.match_cast(cut, relax.TensorType(sizes, builder.dtype(x)))


def _python(value: int) -> int | None:
    return None if abs(value) >= _END else value


def _bound(builder: Builder, value: Dim, length: Dim) -> Dim:
    """Clamp one end of a slice to [0, length]."""
    if isinstance(value, int) and value >= _END:
        return length
    if isinstance(value, int) and value < 0:
        value = 0 if value <= -_END else builder.simple(length + value)
    if _ints(value, length):
        return min(max(value, 0), length)
    if not builder.proves(prim(value) <= length):
        value = builder.simple(tirx.min(prim(value), prim(length)))
    return _at_least(builder, value, 0)


def _at_least(builder: Builder, value: Dim, least: Dim) -> Dim:
    if _ints(value, least):
        return max(value, least)
    if builder.proves(prim(value) >= prim(least)):
        return value
    return builder.simple(tirx.max(prim(value), prim(least)))


def gather(builder: Builder, node: Node) -> Value:
    """Import a selection along an axis (an embedding's rows); places beyond the end wrap."""
    data = builder.expr(node.inputs[0], node.names[0])
    axis = int(node.attributes.get("axis", 0)) % len(builder.shape(data))
    places = node.inputs[1]
    if isinstance(places, np.ndarray) and places.ndim == 0:
        sizes = list(builder.shape(data))
        length = sizes[axis]
        at = int(places) if places >= 0 else builder.simple(length + int(places))
        if builder.proves(prim(at) >= 0) and builder.proves(prim(at) < length):
            cut = _cut(builder, node, data, axis, at, builder.simple(at + 1), 1)
            return _view(builder, cut, [*sizes[:axis], *sizes[axis + 1 :]])
        if isinstance(length, int):
            raise ModelError(f"{node.where}: there is no place {int(places)} among {length}.")
    where = builder.expr(places, node.names[1])
    sizes = list(builder.shape(where))
    # An index that is out of range must not read other memory: it wraps.
    flat = where if len(sizes) == 1 else builder.emit(op.reshape(where, (_count(builder, sizes),)))
    taken = builder.emit(op.take(data, flat, axis=axis, mode="wrap"), node)
    old = list(builder.shape(data))
    return _view(builder, taken, [*old[:axis], *sizes, *old[axis + 1 :]])


def _count(builder: Builder, sizes: Sequence[Dim]) -> Dim:
    return builder.simple(math.prod(sizes, start=1))


def gather_elements(builder: Builder, node: Node) -> Value:
    """Import a selection with a place for each value."""
    data = builder.expr(node.inputs[0], node.names[0])
    axis = int(node.attributes.get("axis", 0))
    places = builder.expr(node.inputs[1], node.names[1])
    length = builder.shape(data)[axis]
    pairs = list(zip(builder.shape(places), builder.shape(data), strict=True))
    # Elsewhere they may cover less than the data; where sizes do not tell, they have to be equal.
    others = [pair for place, pair in enumerate(pairs) if place != axis % len(pairs)]
    if any(_ints(*pair) and pair[0] > pair[1] for pair in others):
        raise ModelError(f"{node.where}: its indices have more places than the data have.")
    unknown = {
        place: other
        for place, (one, other) in enumerate(pairs)
        if place != axis % len(pairs) and not builder.proves(prim(one) <= other)
    }
    places = builder.fit(places, unknown)
    safe = builder.emit(op.floor_mod(places, builder.expr(Sizes((length,)), "length")))
    return builder.emit(op.gather_elements(data, safe, axis=axis), node)


def gather_nd(builder: Builder, node: Node) -> Value:
    """Import a selection with a place in several axes for each value."""
    data = builder.expr(node.inputs[0], node.names[0])
    places = builder.expr(node.inputs[1], node.names[1])
    batch = int(node.attributes.get("batch_dims", 0))
    count = builder.shape(places)[-1]
    if not isinstance(count, int):
        raise ModelError(f"{node.where}: the number of axes that are indexed varies.")
    limits = builder.expr(Sizes(builder.shape(data)[batch : batch + count]), "sizes")
    safe = builder.emit(op.floor_mod(places, limits))
    return builder.emit(op.gather_nd(data, safe, batch_dims=batch), node)


def range_(builder: Builder, node: Node) -> Value:
    """Import evenly spaced integers."""
    ends = [_sizes(node, index, "bounds").items[0] for index in range(3)]
    values = [relax.prim_value(prim(end)) for end in ends]
    return builder.emit(op.arange(*values, "int64"), node)


def constant_of_shape(builder: Builder, node: Node) -> Value:
    """Import a tensor of one value."""
    value = node.attributes.get("value", np.zeros(1, np.float32))
    sizes = _sizes(node, 0, "shape").items
    if all(isinstance(item, int) for item in sizes) and math.prod(sizes, start=1) <= 1 << 16:
        return np.full(sizes, value.reshape(-1)[0], value.dtype)
    fill = relax.const(value.reshape(-1)[0], str(value.dtype))
    return builder.emit(op.full(relax.ShapeExpr(sizes), fill, str(value.dtype)), node)


def trilu(builder: Builder, node: Node) -> Value:
    """Import a triangle of a matrix."""
    x = builder.expr(node.inputs[0], node.names[0])
    given = node.array(1, "diagonal")
    k = 0 if given is None else int(given)
    upper = bool(node.attributes.get("upper", 1))
    return builder.emit((op.triu if upper else op.tril)(x, k), node)


def pad(builder: Builder, node: Node) -> Value:
    """Import constant padding."""
    if node.attributes.get("mode", "constant") != "constant":
        raise ModelError(f"{node.where}: only constant padding is supported.")
    x = builder.expr(node.inputs[0], node.names[0])
    pads = node.array(1, "pads")
    widths = node.attributes["pads"] if pads is None else [int(width) for width in pads]
    axes, value = node.array(3, "axes"), node.array(2, "value")
    rank = len(builder.shape(x))
    ends = [[0, 0] for _ in range(rank)]
    places = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    for place, axis in enumerate(places):
        ends[axis] = [widths[place], widths[place + len(widths) // 2]]
    fill = float(node.attributes.get("value", 0.0) if value is None else value.reshape(-1)[0])
    flat = [width for pair in ends for width in pair]
    return builder.emit(op.nn.pad(x, flat, "constant", fill), node)


def tile(builder: Builder, node: Node) -> Value:
    """Import a repetition along axes."""
    x = builder.expr(node.inputs[0], node.names[0])
    times = node.array(1, "repeats")
    assert times is not None
    return builder.emit(op.tile(x, [int(time) for time in times]), node)


def _sizes(node: Node, index: int, what: str) -> Sizes:
    found = as_sizes(node.inputs[index])
    if found is None:
        raise ModelError(
            f"{node.where}: its {what} depends on values, not on sizes of the inputs alone; such "
            "graphs cannot be compiled."
        )
    return found


def _ints(*values: Dim) -> bool:
    return all(isinstance(value, int) for value in values)
