"""Records that nobody measured, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gqsa_compiler.schedules.activations import default_activations
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import TargetSpec, parse_target
from gqsa_compiler.tuning.key import TargetKey, source_hash
from gqsa_compiler.tuning.lookup import config_fields, density_of
from gqsa_compiler.tuning.records import Trial

CHIP = "some-chip"
V4 = parse_target("x86-64-v4")


def sparse(target: TargetSpec = V4, n: int = 64, k: int = 128, **fields: Any) -> LinearSpec:
    """Describe a layer with half of its groups, with the target's default activations."""
    fields = {"nnz": n * k // 32, "activation_dtype": default_activations(target), **fields}
    return LinearSpec(n, k, "bsr", "int4", 16, **fields)


def rule_of(spec: LinearSpec, target: TargetSpec) -> ScheduleRule[Any]:
    """Return the rule that runs a layer."""
    return select(spec, target)[0]


def trial_of(
    spec: LinearSpec,
    config: KernelConfig,
    target: TargetSpec = V4,
    chip: str = CHIP,
    ratio: float = 0.8,
    **fields: Any,
) -> Trial:
    """Make a record of a configuration that won."""
    rule = rule_of(spec, target)
    made = Trial(
        target=TargetKey.of(target, chip),
        kernels=source_hash(rule),
        producer="0.1.0",
        rule=rule.name,
        layout_version=rule.layout_version,
        spec=rule.code_key(spec),
        density=density_of(spec),
        rows=(1, 4, 8),
        config=config_fields(config),
        status="ok",
        calls={1: 128.0, 128: 1.0},
        seconds={1: 1e-5, 128: 1e-3},
        ratio=ratio,
        noise=0.01,
        best=True,
        machine={"host": "here"},
        session="s1",
        time="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **fields)


TRIAL = trial_of(sparse(), rule_of(sparse(), V4).space(sparse(), V4)[0])
"""The default configuration of such a layer, on `CHIP`."""
