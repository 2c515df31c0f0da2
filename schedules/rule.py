"""The interface of a schedule rule: a kernel together with its weight layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

if TYPE_CHECKING:
    from gqsa_compiler.checkpoint import BSRLayer
    from gqsa_compiler.targets import TargetSpec


@dataclass(frozen=True)
class KernelConfig:
    """Base of every rule's configuration: a frozen dataclass of tunable numbers."""


ConfigT = TypeVar("ConfigT", bound=KernelConfig)


class ScheduleRule(ABC, Generic[ConfigT]):
    """One kernel and the packed layout it reads.

    The first rule of an ordered table (`gqsa_compiler.schedules.table`) whose `applies` is true
    is used; the last rule of the table always applies.

    Attributes
    ----------
    name : str
        Unique; goes into the report and the tuning database.
    layout_version : int
        Raised whenever `pack` changes the bytes it writes.
    reads_stored_layout : bool
        For one dense part, the only tensor of `params` is that part as it is stored, so the
        compiler passes the stored tensor (a tied embedding, say) and packs no copy.
    """

    name: ClassVar[str]
    layout_version: ClassVar[int]
    reads_stored_layout: ClassVar[bool] = False

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code of `build` depends on: layers with equal keys share one function.

        The number of kept groups differs from layer to layer, so `build` declares the extents
        that follow from it as symbolic and the key leaves it out.
        """
        dense = spec.weight == "bsr" and spec.nnz == spec.n * (spec.k // spec.group_size)
        return replace(spec, nnz=spec.nnz if dense else 0)

    def packed_by(self, config: ConfigT) -> Hashable:
        """Return what of a configuration `pack` depends on."""
        return config

    @abstractmethod
    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""

    @abstractmethod
    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[ConfigT]:
        """List the configurations worth trying; the first is the default."""

    @abstractmethod
    def build(self, spec: LinearSpec, config: ConfigT, target: TargetSpec) -> Any:
        """Return the scheduled TIR PrimFunc.

        Its arguments, all row-major buffers: ``x`` float32 [m, K], ``norm`` if
        `spec.norm_eps` is set, the tensors of `params` in order, ``bias``, ``residual`` where the
        epilogue has them, and last the output float32 [m, N_out]. ``m``, the token count, is a
        symbolic int64 of at least 1; ranges of it are dispatched inside.
        """

    @abstractmethod
    def params(self, spec: LinearSpec, config: ConfigT) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors, in the order `build` takes them.

        A length that follows from the weights themselves is None; the code takes any.
        """

    @abstractmethod
    def pack(
        self,
        spec: LinearSpec,
        config: ConfigT,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint tensors into the tensors that `params` describes.

        `parts` are the layers folded into this one, stacked along N in order (`BSRLayer`s for
        ``bsr``, arrays [N_i, K] for ``dense``).
        """

    def stored(self, spec: LinearSpec, config: ConfigT, part: BSRLayer) -> npt.NDArray[np.float64]:
        """Decode a layer as its packed tensors have it, float64 [N, K].

        Most rules store scales as they come; one that rounds them says here to what.
        """
        return decode(part)
