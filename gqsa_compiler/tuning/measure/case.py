"""What a task is measured with: a layer like the model's, inputs, and the right outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, pack_codes
from gqsa_compiler.passes.plan import np_dtype
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.tuning.tasks import Task

Array = npt.NDArray[Any]

_ROWS = 1024  # decoded at once: the dense weight of a head would take gigabytes
_FLOAT_ERROR = 1e-5
_BFLOAT16_ERROR = 2.0**-6.95  # two roundings to 8 bits


@dataclass(frozen=True)
class Right:
    """The outputs for so many tokens, and how far a kernel may be from them.

    Parameters
    ----------
    x : float32 [m, K]
    residual : float32 [m, N_out] or None
    wanted : float32 [m, N_out]
    bound : float32 [m, N_out]
    """

    x: Array
    residual: Array | None
    wanted: Array
    bound: Array


@dataclass
class Case:
    """A task with data, the same for every machine: it is made from the task and a seed.

    Parameters
    ----------
    task : Task
    spec : LinearSpec
        With the number of groups of `part`.
    part : BSRLayer or array
        The weight, of a dense task [N, K].
    norm, bias : float32 [K], [N], or None
    right : mapping of int to Right
        By number of tokens.
    """

    task: Task
    spec: LinearSpec
    part: BSRLayer | Array
    norm: Array | None
    bias: Array | None
    right: Mapping[int, Right] = field(default_factory=dict)

    def pack(self, config: KernelConfig) -> dict[str, Array]:
        """Pack the weight for a configuration, as `ScheduleRule.pack`."""
        rule: Any = self.task.rule
        return dict(rule.pack(self.spec, config, [self.part]))

    def arguments(self, config: KernelConfig) -> list[str]:
        """List the names of a kernel's arguments; ``@`` before those of the packed weight."""
        names = ["x"] + ["norm"] * (self.norm is not None)
        names += [f"@{p.name}" for p in self.task.rule.params(self.spec, config)]
        names += ["bias"] * (self.bias is not None)
        return names + ["residual"] * self.spec.epilogue.residual + ["!"]


def make_case(task: Task, config: KernelConfig, seed: int = 0) -> Case:
    """Make a task's data.

    Rows keep as many groups as the model's do, other ones; values are random. The right outputs
    are the numpy reference's, with the weight as the rule stores it.

    Parameters
    ----------
    task : Task
    config : KernelConfig
        Any of the rule's.
    seed : int
    """
    rng = np.random.default_rng(seed)
    spec, epilogue = task.spec, task.spec.epilogue
    part = random_layer(task, rng) if spec.weight == "bsr" else _dense(spec, rng)
    if isinstance(part, BSRLayer):
        spec = replace(spec, nnz=part.nnz)
    norm = rng.uniform(0.5, 1.5, spec.k).astype(np.float32) if spec.norm_eps is not None else None
    bias = rng.standard_normal(spec.n).astype(np.float32) if epilogue.bias else None
    case = Case(task, spec, part, norm, bias)
    inputs = {m: rng.standard_normal((m, spec.k)).astype(np.float32) for m in task.calls}
    products = _products(case, config, inputs)
    right = {}
    for m, x in inputs.items():
        residual = None
        if epilogue.residual:
            residual = rng.standard_normal((m, spec.n_out)).astype(np.float32)
        wanted, bound = _finish(spec, *products[m], bias, residual)
        right[m] = Right(x, residual, wanted.astype(np.float32), bound.astype(np.float32))
    case.right = right
    return case


def random_layer(task: Task, rng: np.random.Generator) -> BSRLayer:
    """Make a layer whose rows keep as many groups as the task's do."""
    spec = task.spec
    groups, size = spec.k // spec.group_size, spec.group_size
    places = rng.random(spec.n)
    counts = np.rint(np.interp(places, np.linspace(0, 1, len(task.rows)), task.rows))
    counts = np.clip(counts.astype(np.int64), 0, groups)
    if spec.nnz < spec.n * groups and counts.sum() == spec.n * groups:
        counts[0] -= 1  # all groups kept is another kernel
    if spec.nnz == spec.n * groups:
        counts[:] = groups
    keep = np.zeros((spec.n, groups), bool)
    for start in range(0, spec.n, _ROWS):
        part = counts[start : start + _ROWS]
        order = rng.random((len(part), groups), dtype=np.float32).argsort(1).argsort(1)
        keep[start : start + len(part)] = order < part[:, None]
    nnz, bits = int(counts.sum()), spec.bits
    zeros = rng.integers(0, 1 << bits, nnz, dtype=np.uint8)
    codes = rng.integers(0, 1 << bits, (nnz, size), dtype=np.uint8)
    return BSRLayer(
        "tuned",
        (spec.n, spec.k),
        size,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.nonzero(keep)[1].astype(np.uint16),
        pack_codes(codes, bits),
        rng.uniform(1e-3, 2e-3, nnz).astype(np.float16),
        None if spec.symmetric else pack_codes(zeros, bits),
        bits,
    )


def _dense(spec: LinearSpec, rng: np.random.Generator) -> Array:
    values = rng.standard_normal((spec.n, spec.k), dtype=np.float32) * np.float32(0.02)
    return values.astype(np_dtype(spec.weight_dtype))


def _products(
    case: Case, config: KernelConfig, inputs: Mapping[int, Array]
) -> dict[int, tuple[Array, Array]]:
    """Multiply, some rows at a time: products float64 [m, N] and their error bounds, by m."""
    spec = case.spec
    plain = replace(spec, epilogue=Epilogue())
    norm = {} if case.norm is None else {"norm": case.norm}
    sizes = {m: _inputs(spec, x, case.norm) for m, x in inputs.items()}
    found: dict[int, list[tuple[Array, Array]]] = {m: [] for m in inputs}
    for start in range(0, spec.n, _ROWS):
        weight, largest = _decode(case, config, start, min(start + _ROWS, spec.n))
        block = replace(plain, n=len(weight), nnz=0)
        for m, x in inputs.items():
            value = reference.linear(block, weight, x, **norm)
            found[m].append((value, _error(spec, sizes[m], weight, largest)))
    return {
        m: (np.concatenate([v for v, _ in some], 1), np.concatenate([e for _, e in some], 1))
        for m, some in found.items()
    }


def _inputs(spec: LinearSpec, x: Array, norm: Array | None) -> Array:
    """Return the magnitudes that weights are multiplied with, float64 [m, K]."""
    sizes = np.abs(x.astype(np.float64))
    if norm is not None:
        sizes = sizes / np.sqrt((sizes**2).mean(-1, keepdims=True) + (spec.norm_eps or 0.0)) * norm
    return sizes


def _error(spec: LinearSpec, sizes: Array, weight: Array, largest: Array) -> Array:
    """Bound a kernel's distance from the exact products, float64 [m, n].

    Generous where formats differ: int8 activations may round to the neighbouring code, and
    products of many tokens may be bfloat16 ones. A wrong index or a lost group is far beyond it.
    """
    error = _FLOAT_ERROR * (sizes @ largest.T) + 1e-30
    if spec.weight == "bsr" and spec.activation_dtype in ("int16", "float16") and len(sizes) > 1:
        error = error + _BFLOAT16_ERROR * (sizes @ np.abs(weight).T)
    if spec.weight == "bsr" and spec.activation_dtype in ("int8", "int16", "float16"):
        step = {"int8": 1 / 127, "int16": 1 / 32767, "float16": 2.0**-10}[spec.activation_dtype]
        peak = step * sizes.max(-1, keepdims=True)
        error = error + peak * (2.0 * largest.max(initial=0) + 0.05 * np.sqrt((largest**2).sum(1)))
    return error


def _decode(case: Case, config: KernelConfig, start: int, end: int) -> tuple[Array, Array]:
    """Decode some rows: the weights, and the largest number on the way to each, float64 [n, K]."""
    part = case.part
    if not isinstance(part, BSRLayer):
        weight = part[start:end].astype(np.float64)
        return weight, np.abs(weight)
    first, last = int(part.indptr[start]), int(part.indptr[end])
    zeros = part.zeros()[first:last]
    rows = BSRLayer(
        part.name,
        (end - start, part.shape[1]),
        part.group_size,
        (part.indptr[start : end + 1] - first).astype(np.int32),
        part.indices[first:last],
        part.qweight[first:last],
        part.scales[first:last],
        None if part.symmetric else pack_codes(zeros.astype(np.uint8), part.bits),
        part.bits,
    )
    rule: Any = case.task.rule
    weight = rule.stored(replace(case.spec, n=end - start, nnz=last - first), config, rows)
    largest = np.zeros((end - start, part.shape[1] // part.group_size))
    at = np.repeat(np.arange(end - start), np.diff(rows.indptr))
    largest[at, rows.indices] = (2**part.bits - 1) * np.abs(rows.scales.astype(np.float64))
    return weight, np.repeat(largest, part.group_size, axis=1)


def _finish(
    spec: LinearSpec, y: Array, error: Array, bias: Array | None, residual: Array | None
) -> tuple[Array, Array]:
    """Apply the epilogue to products and to their bounds."""
    epilogue = spec.epilogue
    if bias is not None:
        y = y + bias
    if epilogue.activation is not None:
        # No activation is steeper than 1.2.
        if epilogue.gated:
            half = spec.n // 2
            gate, up = reference.activate(epilogue.activation, y[:, :half]), y[:, half:]
            gate_error, up_error = 1.2 * error[:, :half] + 1e-5, error[:, half:]
            error = gate_error * (np.abs(up) + up_error) + np.abs(gate) * up_error
            y = gate * up
        else:
            y, error = reference.activate(epilogue.activation, y), 1.2 * error
    if residual is not None:
        y = y + residual
    return y, error + 1e-5 * (1.0 + np.abs(y))
