"""Where a kernel's configuration comes from: the rule's default, or measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec

if TYPE_CHECKING:
    from gqsa_compiler.targets import TargetSpec

Source = Literal["default", "exact", "nearest"]
"""The first of the rule's space; measured for this shape; measured for the nearest shape."""


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from.

    Parameters
    ----------
    config : KernelConfig
    source : str
    detail : str
        What the measurement was of, for the report; empty for a default.
    """

    config: KernelConfig
    source: Source = "default"
    detail: str = ""


class Configurations(Protocol):
    """Chooses configurations; `gqsa_compiler.tuning.lookup` does so by a database."""

    def choose(self, rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec) -> Choice:
        """Choose a configuration out of the rule's space."""


class Defaults:
    """Chooses each rule's default."""

    def choose(self, rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec) -> Choice:
        """Return the first configuration of the rule's space."""
        return Choice(rule.space(spec, target)[0])
