"""Random layers and one-call runs of linear kernels, for the kernel tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler._tvm import Target, tvm
from gqsa_compiler.checkpoint import BSRLayer, pack_codes
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.arm import wide
from gqsa_compiler.schedules.arm.bsr import has_matrices
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import rules_for
from gqsa_compiler.schedules.x86.bsr import has_bfloat16
from gqsa_compiler.schedules.x86.config import LEAST
from gqsa_compiler.targets import TargetSpec, parse_target

Array = npt.NDArray[Any]
HOST = parse_target("cpu")


def random_layer(
    keep: npt.NDArray[np.bool_],
    group_size: int,
    rng: np.random.Generator,
    *,
    symmetric: bool = False,
    bits: int = 4,
    scales: tuple[float, float] = (1e-3, 1e-2),
    name: str = "layer",
) -> BSRLayer:
    """Make a layer that keeps the groups of `keep` [N, K/G], with random codes and zeros.

    Scales are log-uniform between the two numbers, half of them negative if they are symmetric.
    """
    nnz = int(keep.sum())
    low, high = np.log(scales[0]), np.log(scales[1])
    return BSRLayer(
        name,
        (keep.shape[0], keep.shape[1] * group_size),
        group_size,
        np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        np.nonzero(keep)[1].astype(np.uint16),
        pack_codes(rng.integers(0, 1 << bits, (nnz, group_size), dtype=np.uint8), bits),
        np.exp(rng.uniform(low, high, nnz)).astype(np.float16),
        None if symmetric else pack_codes(rng.integers(0, 1 << bits, nnz, dtype=np.uint8), bits),
        bits,
    )


def random_keep(
    shape: tuple[int, int], rng: np.random.Generator, density: float
) -> npt.NDArray[np.bool_]:
    """Choose groups at random; some rows come out empty and some full."""
    keep = rng.random(shape) < density
    keep[rng.random(shape[0]) < 0.1] = False
    if density > 0.2:
        keep[rng.random(shape[0]) < 0.1] = True
    return keep


def spec_of(layer: BSRLayer, **fields: Any) -> LinearSpec:
    """Describe `layer` as a kernel's spec."""
    n, k = layer.shape
    return LinearSpec(
        n, k, "bsr", f"int{layer.bits}", layer.group_size, layer.nnz, layer.symmetric, **fields
    )


def rules_that_run(specs: Iterable[LinearSpec]) -> list[Any]:
    """List this machine's rules that run any of `specs`, as pytest parameters."""
    specs = list(specs)
    return [
        pytest.param(rule, id=rule.name)
        for rule in rules_for(HOST)
        if any(rule.applies(spec, HOST) for spec in specs)
    ]


def compile_kernel(
    spec: LinearSpec, rule: ScheduleRule[Any], config: KernelConfig, target: TargetSpec
) -> Any:
    """Compile one kernel to an executable."""
    func = rule.build(spec, config, target).with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": func})
    return tvm.compile(module, Target(target.tvm_dict()), tir_pipeline=cpu_code.register())


@lru_cache(maxsize=256)
def _shared(
    code: LinearSpec, rule: ScheduleRule[Any], config: KernelConfig, target: TargetSpec
) -> Any:
    return compile_kernel(code, rule, config, target)


def run(
    rule: ScheduleRule[Any],
    spec: LinearSpec,
    parts: list[Any],
    x: Array,
    operands: dict[str, Array] | None = None,
    tiles: tuple[int, ...] | None = None,
    target: TargetSpec = HOST,
) -> Array:
    """Pack `parts`, run the rule's kernel (built for `target`) here, return its output.

    A layer that the rule does not run skips the test. Kernels are compiled once for every
    `ScheduleRule.code_key`. Fewer `tiles` than the default compile several times faster; they
    mean something to the generic kernels only.
    """
    if not rule.applies(spec, target):
        pytest.skip(f"{rule.name} does not run this layer")
    operands = operands or {}
    config = rule.space(spec, target)[0]
    if tiles is not None and isinstance(config, GenericConfig):
        # The x86 kernels have two kinds of tiles: of fewer tokens than a vector has lanes, and not.
        few = (2, config.lanes) if rule.name.startswith("x86.") else tiles
        config = replace(config, tiles=few)
    executable = _shared(rule.code_key(spec), rule, config, target)
    packed = rule.pack(spec, config, parts)
    args = [x]
    args += [operands["norm"]] if "norm" in operands else []
    for param in rule.params(spec, config):
        array = packed[param.name]
        assert str(array.dtype) == param.dtype, param.name
        assert param.shape in (array.shape, (None,)), param.name
        args.append(array)
    args += [operands[name] for name in ("bias", "residual") if name in operands]
    out = tvm.runtime.tensor(np.full((len(x), spec.n_out), np.nan, np.float32))
    executable["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in args], out)
    return np.asarray(out.numpy())


def random_operands(spec: LinearSpec, m: int, rng: np.random.Generator) -> dict[str, Array]:
    """Make the operands that `spec` calls for."""
    operands: dict[str, Array] = {}
    if spec.norm_eps is not None:
        operands["norm"] = rng.uniform(0.5, 1.5, spec.k).astype(np.float32)
    if spec.epilogue.bias:
        operands["bias"] = rng.standard_normal(spec.n).astype(np.float32)
    if spec.epilogue.residual:
        operands["residual"] = rng.standard_normal((m, spec.n_out)).astype(np.float32)
    return operands


@dataclass(frozen=True)
class Bounds:
    """The exact result and how far float32 arithmetic may be from it."""

    value: Array
    error: Array


def rounds_to_bfloat16(spec: LinearSpec, tokens: int, target: TargetSpec) -> bool:
    """Say whether the x86 or Arm kernels multiply so many tokens as bfloat16."""
    if spec.activation_dtype != "int16":
        return False
    if target.arch == "aarch64":
        return tokens >= wide.LEAST and has_matrices(spec, target)
    return tokens >= LEAST and has_bfloat16(target)


def expected(
    spec: LinearSpec,
    weight: Array,
    magnitude: Array,
    x: Array,
    operands: dict[str, Array],
    *,
    bfloat16: bool = False,
) -> Bounds:
    """Compute the reference and an error bound.

    Parameters
    ----------
    magnitude : [N, K]
        The largest intermediate value of each weight (a code times its scale).
    bfloat16 : bool
        Weights and inputs are rounded to 8 significant bits each.
    """
    if bfloat16:
        spec = replace(spec, activation_dtype="float32")
    value = reference.linear(spec, weight, x, **operands)
    linear = LinearSpec(**{**spec.__dict__, "epilogue": type(spec.epilogue)()})
    norm = {"norm": operands["norm"]} if "norm" in operands else {}
    inputs = np.abs(x.astype(np.float64))
    if norm:
        factor = 1.0 / np.sqrt((inputs**2).mean(-1, keepdims=True) + (spec.norm_eps or 0.0))
        inputs = inputs * factor * norm["norm"]
    error = 2e-6 * (inputs @ magnitude.T) + 1e-30
    if bfloat16:
        error = error + 2.0**-6.95 * (inputs @ np.abs(weight).T)
    if spec.weight == "bsr" and spec.activation_dtype == "int8" and norm:
        # The norm's rounding may move an activation over the border between two codes.
        error = error + 2.0 * magnitude.max(initial=0) * inputs.max(-1, keepdims=True) / 127
    if spec.weight == "bsr" and spec.activation_dtype == "int16":
        # A rounding of the norm, or of x / scale, may move activations over such a border.
        step = inputs.max(-1, keepdims=True) / 32767
        error = error + step * (1e-3 * magnitude.sum(1) + 2.0 * magnitude.max(initial=0))
    y = reference.linear(linear, weight, x, **norm)
    if spec.epilogue.bias:
        y = y + operands["bias"]
        error = error + 1e-6 * np.abs(y)
    activation = spec.epilogue.activation
    if spec.epilogue.gated and activation is not None:
        half = spec.n // 2
        gate = np.abs(reference.activate(activation, y[:, :half]))
        up = np.abs(y[:, half:])
        gate_error = 1.2 * error[:, :half] + 2e-6 * (gate + 1.0)
        error = gate_error * (up + error[:, half:]) + gate * error[:, half:]
    elif activation is not None:
        error = 1.2 * error + 2e-6 * (1.0 + np.abs(y))
    return Bounds(value, error + 1e-6 * np.abs(value) + (1e-6 if spec.epilogue.residual else 0))


def check(
    rule: ScheduleRule[Any],
    spec: LinearSpec,
    layers: list[BSRLayer],
    x: Array,
    rng: np.random.Generator,
    tiles: tuple[int, ...] | None = None,
    target: TargetSpec = HOST,
) -> None:
    """Run a rule's kernel on sparse layers and compare it with the reference."""
    weight = np.concatenate(
        [rule.stored(spec, rule.space(spec, target)[0], layer) for layer in layers]
    )
    magnitude = np.concatenate([_magnitude(layer) for layer in layers])
    operands = random_operands(spec, len(x), rng)
    got = run(rule, spec, layers, x, operands, tiles, target)
    bfloat16 = rounds_to_bfloat16(spec, len(x), target)
    assert_within(got, expected(spec, weight, magnitude, x, operands, bfloat16=bfloat16))


def assert_within(got: Array, bounds: Bounds) -> None:
    """Fail if any element is off by more than its bound."""
    assert np.all(np.isfinite(got))
    excess = np.abs(got - bounds.value) / bounds.error
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    assert excess.max() <= 1.0, (
        f"{worst}: {got[worst]} is not {bounds.value[worst]} +- {bounds.error[worst]}"
    )


def _magnitude(layer: BSRLayer) -> Array:
    n, k = layer.shape
    dense = np.zeros((n, k // layer.group_size))
    rows = np.repeat(np.arange(n), np.diff(layer.indptr))
    dense[rows, layer.indices] = (2**layer.bits - 1) * np.abs(layer.scales.astype(np.float64))
    return np.repeat(dense, layer.group_size, axis=1)
