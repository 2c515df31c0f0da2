"""What the rules of kernels that read records have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.records.layout import stored
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec

C = TypeVar("C", bound=GenericConfig)


class RecordsRule(ScheduleRule[C]):
    """Sparse weights, 16-bit activations; tasks have equal numbers of groups.

    Attributes
    ----------
    bits : tuple of int
        Codes that it runs.
    """

    bits: ClassVar[tuple[int, ...]]

    def packed_by(self, config: C) -> int:
        """Return the number of tasks: the rest is the same for every target."""
        return config.tasks

    def reads(self, spec: LinearSpec) -> bool:
        """Say whether this kernel's code is for such a layer, on whatever target."""
        return spec.weight == "bsr" and spec.bits in self.bits and spec.activation_dtype == "int16"

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: the bits only where the zero point follows from them."""
        key = super().code_key(spec)
        return key if spec.symmetric else replace(key, weight_dtype=f"int{self.bits[-1]}")

    def stored(self, spec: LinearSpec, config: C, part: BSRLayer) -> npt.NDArray[np.float64]:
        """Decode a layer as its packed tensors have it, float64 [N, K]."""
        return stored(spec, part)
