"""The adapters of one compilation, and their tensors as the low-rank paths read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.artefact import WeightLoader, packed_tensors
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.compile_options import CompileOptions
from gqsa_compiler.errors import CompileError
from gqsa_compiler.lora.adapter import Adapter
from gqsa_compiler.lora.names import check_names
from gqsa_compiler.passes.low_rank import LowRankOptions
from gqsa_compiler.passes.plan import LowRankSite, PackPlan, np_dtype
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.runtime import schema
from gqsa_compiler.schedules.low_rank.spec import LowRankDtype

MERGED = "merged"
"""What the adapter is called that is part of the model."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Adapters:
    """Adapters beside one model.

    Parameters
    ----------
    adapters : mapping of str to Adapter
        By name.
    dtype : str
        What their matrices are stored in.
    merged : bool
        The one adapter is part of the model.
    """

    adapters: Mapping[str, Adapter]
    dtype: LowRankDtype
    merged: bool

    @classmethod
    def open(
        cls,
        directories: Mapping[str, str | Path],
        records: Sequence[ParamRecord],
        dtype: LowRankDtype,
        *,
        merged: bool,
    ) -> Adapters:
        """Open adapters and check them against a model's parameters.

        Raises
        ------
        ModelError, CheckpointError
            See `Adapter`.
        """
        linears = {
            record.layer: (record.shape[0], record.shape[1])
            for record in records
            if len(record.shape) == 2
            and record.name.endswith(".weight")
            # A tied one is the head's weight too, but what an adapter says of it is not the head's.
            and not record.layer.rpartition(".")[2].startswith("embed_")
        }
        opened = {name: Adapter(path, linears) for name, path in directories.items()}
        return cls(opened, dtype, merged)

    @property
    def low_rank(self) -> LowRankOptions:
        """What the passes need to know."""
        ranks: dict[str, int] = {}
        for adapter in self.adapters.values():
            for layer in adapter.layers.values():
                ranks[layer.layer] = max(layer.rank, ranks.get(layer.layer, 0))
        return LowRankOptions(ranks, self.dtype, self.merged)

    def packed(
        self, plan: PackPlan, weights: WeightLoader, progress: Callable[[str, int, int], None]
    ) -> Iterator[tuple[str, Array]]:
        """Yield every tensor of the artefact: the model's, then each adapter's, or both as one.

        Raises
        ------
        ModelError
            A matrix holds what is no finite number.
        CompileError
            It holds a number that its dtype does not.
        """
        if self.merged:
            (adapter,) = self.adapters.values()
            yield from packed_tensors(plan, _Merged(weights, _Filled(plan, adapter)), progress)
            return
        yield from packed_tensors(plan.without_adapters(), weights, progress)
        for name, adapter in self.adapters.items():
            filled = _Filled(plan, adapter)
            for record in _last(plan):
                yield _name(name, record), filled.load(record.name)

    def describe(self, plan: PackPlan) -> tuple[schema.Adapter, ...]:
        """Return what the manifest says of adapters that can be chosen; nothing of a merged one."""
        if self.merged:
            return ()
        records = _last(plan)
        return tuple(
            schema.Adapter(
                name,
                max(layer.rank for layer in adapter.layers.values()),
                tuple(_name(name, record) for record in records),
            )
            for name, adapter in self.adapters.items()
        )


def _name(adapter: str, record: ParamRecord) -> str:
    """Name one of a path's tensors as an adapter fills it."""
    return f"adapters.{adapter}.{record.name}"


def _last(plan: PackPlan) -> list[ParamRecord]:
    """List the tensors that adapters fill in the order in which the compiled functions take them.

    Raises
    ------
    CompileError
        They are not the plan's last ones.
    """
    known = {record.name: record for site in plan.sites for record in site.records}
    last = [tensor.name for tensor in plan.tensors[len(plan.tensors) - len(known) :]]
    if set(last) != set(known):
        raise CompileError("The adapters' tensors are not the plan's last; this is a bug.")
    return [known[name] for name in last]


class _Filled:
    """The tensors of a plan's sites as one adapter fills them."""

    def __init__(self, plan: PackPlan, adapter: Adapter) -> None:
        self.adapter = adapter
        self.places = {
            record.name: (site, i) for site in plan.sites for i, record in enumerate(site.records)
        }

    def load(self, name: str) -> Array:
        """Return a tensor in its stored dtype; what the adapter leaves alone is zero."""
        site, which = self.places[name]
        array = _fill(site, self.adapter)[which]
        with np.errstate(over="ignore"):
            stored = array.astype(np_dtype(site.dtype))
        if not np.isfinite(stored).all():
            remedy = "; compile with --adapter-dtype float32" if site.dtype == "float16" else ""
            raise CompileError(
                f"{self.adapter.directory} has values for {name} that {site.dtype} does not hold"
                f"{remedy}."
            )
        return stored


class _Merged:
    """A model's weights and those of the adapter that is part of it."""

    def __init__(self, weights: WeightLoader, filled: _Filled) -> None:
        self.weights, self.filled = weights, filled

    def load(self, name: str) -> Array:
        if name in self.filled.places:
            return self.filled.load(name)
        return self.weights.load(name)

    def layer(self, name: str) -> BSRLayer:
        return self.weights.layer(name)


def _fill(site: LowRankSite, adapter: Adapter) -> tuple[Array, Array]:
    """Return A and B of a site, float32; what an adapter or its rank leaves open is zero."""
    a, b = (np.zeros(record.shape, np.float32) for record in site.records)
    column = 0
    for layer, features in zip(site.layers, site.features, strict=True):
        if layer in adapter.layers:
            down, up = _balanced(*adapter.matrices(layer))
            row = site.changed.index(layer) * site.rank
            a[row : row + len(down)] = down
            b[: up.shape[1], column : column + features] = up.T
        column += features
    return a, b


def _balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """Move a power of two from one matrix to the other, which leaves their product what it is.

    After little training B is so much smaller than A that halves would hold few of its digits.
    """
    largest = [float(abs(matrix).max()) for matrix in (a, b)]
    if not all(0 < value < math.inf for value in largest):
        return a, b
    steps = round(math.log2(largest[0] / largest[1]) / 2)
    return np.ldexp(a, -steps), np.ldexp(b, steps)


def open_adapters(options: CompileOptions, records: Sequence[ParamRecord]) -> Adapters | None:
    """Open what a compilation is asked for; None without adapters.

    Raises
    ------
    UsageError
        A name is none.
    ModelError, CheckpointError
        See `Adapter`.
    """
    if options.merge_adapter is not None:
        one = {MERGED: options.merge_adapter}
        return Adapters.open(one, records, options.adapter_dtype, merged=True)
    if not options.adapters:
        return None
    check_names(options.adapters)
    return Adapters.open(options.adapters, records, options.adapter_dtype, merged=False)
