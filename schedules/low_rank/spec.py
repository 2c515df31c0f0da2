"""What the kernel of a low-rank path computes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.spec import Activation

LowRankDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class Part:
    """One of the layers that were folded into a linear op.

    Parameters
    ----------
    features : int
        Its outputs.
    slot : int or None
        Which of the adapters' low-rank inputs it takes; None: the adapters leave it alone.
    """

    features: int
    slot: int | None


@dataclass(frozen=True)
class LowRankSpec:
    """``out = epilogue(base + u B)``, part by part: what an adapter adds, and what waits for it.

    With ``u = A x`` [m, slots * rank], the inputs of a part are ``u[:, slot * rank:][:, :rank]``
    and its columns of ``B`` are those of its features. The epilogue is an activation, or, when
    `gated`, ``activation(first part) * second part``.

    Parameters
    ----------
    parts : tuple of Part
        One after the other in `base`; together N features. Two of equal size when `gated`.
    rank : int
        Of every slot; 0 without slots, where only the gating is computed.
    dtype : str
        Of B [rank, N].
    activation : str or None
    gated : bool
        The output has N / 2 features. Needs `activation`.
    """

    parts: tuple[Part, ...]
    rank: int
    dtype: LowRankDtype = "float16"
    activation: Activation | None = None
    gated: bool = False

    @property
    def n(self) -> int:
        """Features of `base`."""
        return sum(part.features for part in self.parts)

    @property
    def n_out(self) -> int:
        """Features of the output."""
        return self.n // 2 if self.gated else self.n

    @property
    def slots(self) -> int:
        """How many parts the adapters change."""
        return sum(part.slot is not None for part in self.parts)

    @property
    def starts(self) -> tuple[int, ...]:
        """Each part's first feature in `base`."""
        return (0, *accumulate(part.features for part in self.parts[:-1]))

    def check(self) -> None:
        """Refuse a description that no kernel can mean.

        Raises
        ------
        CompileError
            Naming what is wrong.
        """
        slots = [part.slot for part in self.parts if part.slot is not None]
        if slots != list(range(len(slots))) or (self.rank > 0) != bool(slots):
            raise CompileError(f"A low-rank path of rank {self.rank} has the slots {slots}.")
        if not slots and not self.gated:
            raise CompileError("A low-rank path without slots and gates has nothing to compute.")
        if self.gated and (
            self.activation is None
            or len(self.parts) != 2
            or self.parts[0].features != self.parts[1].features
        ):
            raise CompileError("A gated low-rank path needs two equal parts and an activation.")
