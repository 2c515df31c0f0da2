"""How a training step is shared by several processes; here, by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gqsa_compiler.compress.training.losses import LossParts


class Ranks:
    """A process that is alone: it takes whole batches, and there is nothing to add up.

    Attributes
    ----------
    index : int
        Of this process. 0 does all that is not shared: it alone saves, logs and writes.
    count : int
        Processes in all.
    """

    index = 0
    count = 1

    def check_batch(self, batch: int) -> None:
        """Check that a batch of so many sequences can be shared.

        Raises
        ------
        UsageError
            There are more processes than sequences.
        """

    def take(self, batch: Tensor) -> Tensor:
        """Return the process's share of a batch's sequence numbers, int64 [batch]."""
        return batch

    def mean_losses(self, losses: LossParts, share: float) -> LossParts:
        """Return the losses of the whole batch, given those of this process's share of it."""
        return losses

    def add_gradients(self, parameters: Iterable[nn.Parameter], share: float) -> None:
        """Make the gradients, which are means over this process's share, those of the batch."""

    def announce(self, message: Mapping[str, Any]) -> None:
        """Tell the other processes what comes next; JSON types."""
