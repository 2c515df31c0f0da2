"""The configurations that tuning chooses from: those that compute with the same weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.lookup import config_fields
from gqsa_compiler.tuning.measure.case import random_layer
from gqsa_compiler.tuning.records import config_key
from gqsa_compiler.tuning.tasks import Task

_ROWS = 8


def tuned_space(
    rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec
) -> tuple[KernelConfig, ...]:
    """List a rule's configurations but for those that round weights otherwise than the default.

    Some layouts keep scales in fewer bits (`ScheduleRule.stored`): they are faster and change the
    model, which is no question of speed.
    """
    space = tuple(rule.space(spec, target))
    if spec.weight != "bsr":
        return space
    groups = _ROWS * (spec.k // spec.group_size)
    full = spec.nnz == spec.n * (spec.k // spec.group_size)
    small = replace(spec, n=_ROWS, nnz=groups if full else groups // 2, epilogue=Epilogue())
    task = Task("sample", rule, small, (groups // _ROWS // 2,), 1, {1: 1.0})
    layer = random_layer(task, np.random.default_rng(0))
    small = replace(small, nnz=layer.nnz)
    known: dict[Hashable, bytes] = {}

    def stored(config: KernelConfig) -> bytes:
        way = rule.packed_by(config)
        if way not in known:
            known[way] = rule.stored(small, config, layer).tobytes()
        return known[way]

    return tuple(config for config in space if stored(config) == stored(space[0]))


def tuned_by_key(
    rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec
) -> dict[str, KernelConfig]:
    """Return `tuned_space` by the texts that records have configurations in."""
    return {config_key(config_fields(c)): c for c in tuned_space(rule, spec, target)}
