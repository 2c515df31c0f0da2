"""What a name of an ONNX graph stands for while it is imported, and a node's view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError

Expr: TypeAlias = Any  # relax.Expr; TVM has no types for mypy to read
Dim: TypeAlias = Any  # int, or a symbolic TVM expression of int64
Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Sizes:
    """Integers that are known up to the sizes of the inputs: what ``Shape`` gives.

    Parameters
    ----------
    items : tuple
        Each an int or a symbolic expression.
    scalar : bool
        A tensor of rank 0, with one item.
    """

    items: tuple[Dim, ...]
    scalar: bool = False


Value: TypeAlias = Any  # numpy array (a constant), Sizes, or a Relax expression


@dataclass(frozen=True, eq=False)
class Node:
    """One operator: its inputs' values and its attributes.

    Parameters
    ----------
    name : str
        For messages and for naming a layer.
    op : str
    inputs : tuple
        Values; None where an optional input is left out.
    names : tuple of str
        What the graph calls the inputs.
    attributes : dict
        As Python values: int, float, str, list, numpy array.
    outputs : int
        How many of the outputs are named.
    """

    name: str
    op: str
    inputs: tuple[Value | None, ...]
    names: tuple[str, ...]
    attributes: dict[str, Any]
    outputs: int = 1

    def input(self, index: int) -> Value | None:
        """Return an input, or None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def array(self, index: int, what: str) -> Array | None:
        """Return an input that has to be a constant; None if it is left out.

        Raises
        ------
        ModelError
            It is computed by the graph.
        """
        value = self.input(index)
        if isinstance(value, Sizes) and all(isinstance(item, int) for item in value.items):
            array = np.array(value.items, np.int64)
            return array[0] if value.scalar else array
        if value is None or isinstance(value, np.ndarray):
            return value
        raise ModelError(f"{self.where}: its {what} is computed by the graph; it must be constant.")

    def axes(self, index: int) -> list[int] | None:
        """Return axes, an attribute in old operator sets and an input in new ones."""
        found = self.array(index, "axes")
        if found is not None:
            return [int(axis) for axis in found.reshape(-1)]
        axes = self.attributes.get("axes")
        return None if axes is None else list(axes)

    @property
    def where(self) -> str:
        """The node, for messages."""
        return f"ONNX node {self.name!r} ({self.op})"
