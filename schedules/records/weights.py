"""A layer's records inside a kernel: where rows and units begin."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load
from gqsa_compiler.schedules.records.chunks import Chunks
from gqsa_compiler.schedules.records.layout import Records
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class RecordWeights:
    """A layer's packed tensors inside a kernel; `Records.params` describes them.

    Parameters
    ----------
    spec : LinearSpec
    records : Records
    bytes : Buffer
    factors, row_starts : Buffer or None
        None where the layout has none.
    """

    spec: LinearSpec
    records: Records
    bytes: Buffer
    factors: Buffer | None
    row_starts: Buffer | None

    @property
    def chunks(self) -> Chunks:
        """How codes lie in a record."""
        return self.records.chunks

    @property
    def overhang(self) -> int:
        """Columns that the units of a row reach beyond it, where all groups are kept."""
        if not self.records.full:
            return 0
        width = self.chunks.groups * self.spec.group_size
        return self.records.row_units(self.spec) * width - self.spec.k

    def row(self, row: Expr) -> tuple[Expr, Expr]:
        """Emit the first and the past-the-last unit of a stored row, int64."""
        if self.row_starts is None:
            units = self.records.row_units(self.spec)
            first = B.bind(row * int64(units))
            return first, B.bind(first + int64(units))
        first = B.bind(int64(load(self.row_starts, row)))
        return first, B.bind(int64(load(self.row_starts, row + int64(1))))

    def factor(self, row: Expr) -> Expr:
        """Emit what all of a row's scales are multiplied by, float32."""
        return const(1.0, "float32") if self.factors is None else load(self.factors, row)

    def start(self, unit: Expr) -> Expr:
        """Emit where a unit's record begins, int64."""
        return B.bind(unit * int64(self.records.size))
