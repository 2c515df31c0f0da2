"""What an end-to-end stage's losses have come to: a stage must not leave a model worse."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gqsa_compiler.compress.training.losses import LossParts
from gqsa_compiler.errors import GqsaError

_FEW = 20
"""Steps that say nothing: the rates have hardly risen, and one text differs from the next."""
_WORSE = 1.1
"""The loss at the end against that at the beginning: texts differ by a few percent."""


@dataclass
class Course:
    """The losses of a stage's first and of its latest steps, a tenth of all each.

    Parameters
    ----------
    steps : int
        Of the whole stage.
    first, latest, divergences : list of float
        Losses of the first steps; losses and divergences of the latest.
    """

    steps: int
    first: list[float] = field(default_factory=list)
    latest: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    @classmethod
    def resume(cls, steps: int, saved: dict[str, Tensor]) -> Course:
        """Take what `tensors` has given out of a saved state."""
        names = ("first", "latest", "divergences")
        return cls(steps, *(saved.pop(name).tolist() for name in names))

    def tensors(self) -> dict[str, Tensor]:
        """Return what has to be saved."""
        kept = {"first": self.first, "latest": self.latest, "divergences": self.divergences}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in kept.items()}

    def add(self, losses: LossParts) -> None:
        """Take a step in."""
        tenth = max(1, self.steps // 10)
        if len(self.first) < tenth:
            self.first.append(losses.total)
        self.latest = [*self.latest, losses.total][-tenth:]
        self.divergences = [*self.divergences, losses.divergence][-tenth:]

    def divergence(self, stage: str) -> float:
        """Return the latest steps' mean divergence.

        Raises
        ------
        GqsaError
            The stage's loss has risen.
        """
        before, after = (sum(some) / len(some) for some in (self.first, self.latest))
        if self.steps >= _FEW and after > _WORSE * before:
            raise GqsaError(
                f"Stage {stage} has made the model worse: its loss rose from {before:.3f} to "
                f"{after:.3f}. Begin again (--restart) with smaller rates of the stage in a "
                "recipe file, or without the stage (--stages)."
            )
        return sum(self.divergences) / len(self.divergences)
