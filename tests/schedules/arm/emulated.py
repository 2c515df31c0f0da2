"""Runs the Arm rules' kernels in an emulator, each compiled once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.targets import TargetSpec
from tools.arm_kernels import call, compile_for, link

Array = npt.NDArray[Any]


class Kernels:
    """Programs of kernels, each compiled once.

    Parameters
    ----------
    folder : Path
        Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = lru_cache(maxsize=None)(self._compile)

    def _compile(
        self,
        code: LinearSpec,
        rule: ScheduleRule[GenericConfig],
        config: GenericConfig,
        target: TargetSpec,
    ) -> Path:
        own = self._folder / str(len(list(self._folder.iterdir())))
        own.mkdir()
        return link(compile_for(target, rule.build(code, config, target)), own)

    def run(
        self,
        rule: ScheduleRule[GenericConfig],
        spec: LinearSpec,
        parts: list[Any],
        x: Array,
        operands: dict[str, Array],
        tiles: tuple[int, ...] | None,
        target: TargetSpec,
    ) -> Array:
        """Pack layers and run a rule's kernel, as `linear_cases.run` does it on this machine."""
        assert rule.applies(spec, target)
        config = rule.space(spec, target)[0]
        if tiles is not None:
            config = replace(config, tiles=tiles)
        program = self._program(rule.code_key(spec), rule, config, target)
        packed = rule.pack(spec, config, parts)
        arrays = [x, *(operands[name] for name in ("norm",) if name in operands)]
        for param in rule.params(spec, config):
            array = packed[param.name]
            assert str(array.dtype) == param.dtype, param.name
            assert param.shape in (array.shape, (None,)), param.name
            arrays.append(array)
        arrays += [operands[name] for name in ("bias", "residual") if name in operands]
        return call(program, arrays, np.full((len(x), spec.n_out), np.nan, np.float32))
