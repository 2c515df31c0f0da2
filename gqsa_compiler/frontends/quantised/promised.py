"""What the settings of a compressed-tensors model promise of its quantised layers.

Fields: https://github.com/vllm-project/compressed-tensors (`QuantizationArgs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gqsa_compiler.errors import ModelError


@dataclass(frozen=True)
class Grouping:
    """Which weights share a scale.

    Parameters
    ----------
    strategy : str
        ``tensor``, ``channel`` (a row) or ``group``.
    size : int or None
        Columns of a group.
    """

    strategy: str
    size: int | None = None

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix [n, k]; the last group may be shorter."""
        if self.size is not None:
            return n, -(-k // self.size)
        return (1 if self.strategy == "tensor" else n), 1

    def __str__(self) -> str:
        return f"group_size {self.size}" if self.size is not None else f"strategy {self.strategy}"


@dataclass(frozen=True)
class Promised:
    """What the configuration says of every quantised layer.

    Parameters
    ----------
    zero_points : bool
        All weights are asymmetric.
    order : bool
        All columns are in activation order (``actorder`` ``group``).
    groupings : tuple of Grouping
        A layer's scales are of one of these; empty where the configuration does not tell.
    """

    zero_points: bool = False
    order: bool = False
    groupings: tuple[Grouping, ...] = ()

    def misfit(self, matrix: tuple[int, int], scales: tuple[int, int]) -> str | None:
        """Say what is wrong with the shape of a matrix's scales; None if it is as promised."""
        said = {grouping.scale_shape(*matrix): grouping for grouping in self.groupings}
        if not said or scales in said:
            return None
        wanted = " or ".join(f"{list(shape)} ({said[shape]})" for shape in said)
        return (
            f"has scales of shape {list(scales)}, but its {matrix[0]} x {matrix[1]} weights have "
            f"{wanted} by the settings; download it again"
        )


NOTHING = Promised()
"""Of settings that say nothing."""


def promised(fields: Mapping[str, Any], where: str) -> Promised:
    """Read what ``quantization_config``, checked by `weight_bits`, says of all weights.

    Raises
    ------
    ModelError
        A strategy or a group size is none, or one that gqsa does not read.
    """
    groups: dict[str, Any] = fields.get("config_groups") or {}
    weights = {n: g["weights"] for n, g in groups.items() if isinstance(g.get("weights"), dict)}
    groupings = [_grouping(w, f"{where}: {name}") for name, w in weights.items()]
    known = tuple(grouping for grouping in groupings if grouping is not None)
    return Promised(
        bool(weights) and all(w.get("symmetric") is False for w in weights.values()),
        bool(weights) and all(w.get("actorder") in ("group", True) for w in weights.values()),
        known if len(known) == len(groupings) else (),
    )


def _grouping(weights: Mapping[str, Any], where: str) -> Grouping | None:
    """Read what a group of layers says of its weights; None if it says nothing."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    whole = isinstance(size, int) and not isinstance(size, bool) and (size > 0 or size == -1)
    if size is not None and not whole:
        raise ModelError(f"{where} of its quantization_config has group_size {size!r}.")
    if strategy not in (None, "tensor", "channel", "group"):
        raise ModelError(
            f"{where} of its quantization_config has weights of the strategy {strategy!r}; gqsa "
            "reads group, channel and tensor. Start from the model it was made from."
        )
    if strategy == "tensor" or strategy == "channel":
        return Grouping(strategy)
    if size is None:
        return None
    return Grouping("channel") if size == -1 else Grouping("group", size)
