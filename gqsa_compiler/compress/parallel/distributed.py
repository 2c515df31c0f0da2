"""Several processes that train together, through Hugging Face `accelerate`.

Process 0 calibrates, compresses block by block, saves and writes; the others wait for its messages
and take their share of every end-to-end step. They read what they need from its work directory.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from gqsa_compiler.compress.parallel.launch import Launch
from gqsa_compiler.compress.training.losses import LossParts
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.errors import GqsaError, UsageError

EXTRA = "pip install gqsa-compiler[distributed]"

STEP_TIMEOUT = timedelta(hours=1)
"""For a message of a step: one process may read or save a model meanwhile. Waiting for process 0's
other work has no limit; its end is noticed."""

POLL_SECONDS = 0.2
FAREWELL_SECONDS = 10.0
"""For the others to hear that all is done."""

BUCKET_ELEMENTS = 1 << 25
"""About so many gradients are added up in one message."""

_FAILED = {"failed": True}


def own_device(name: str, launch: Launch) -> torch.device:
    """Return the device of one process of several.

    Parameters
    ----------
    name : str
        ``auto``, ``cuda`` or ``cpu``.
    launch : Launch

    Raises
    ------
    UsageError
        Another device was named, or there are more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(
            f"Each of several processes takes a GPU of its own, so the device {name} cannot be "
            "named: use auto, cuda or cpu."
        )
    if launch.local_index >= gpus:
        raise UsageError(
            f"There are more processes than GPUs on this machine ({gpus}); start one for each."
        )
    return torch.device("cuda", launch.local_index)


class LaunchedRanks(Ranks):
    """A process of several that were started together.

    As a context manager it tells the others when process 0 fails.

    Parameters
    ----------
    launch : Launch
    device : torch.device
        This process's own.

    Raises
    ------
    UsageError
        The package accelerate is missing.
    GqsaError
        The processes do not find each other.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        try:
            import accelerate
        except ImportError as error:
            raise UsageError(
                f"Training on several processes needs the package accelerate: {EXTRA}"
            ) from error
        self.index = launch.index
        self.count = launch.count
        self._device = device
        self._messages = 0
        ours = not torch.distributed.is_initialized()
        try:
            self._state = accelerate.PartialState(cpu=device.type == "cpu", timeout=STEP_TIMEOUT)
            if ours:
                # Not at the end of the run: another one in the same process goes on using it.
                atexit.register(self._state.destroy_process_group)
            self._store = self._open_store()
        except RuntimeError as error:
            raise GqsaError(
                f"Process {self.index} does not reach the others ({_reason(error)}); check "
                "MASTER_ADDR and MASTER_PORT."
            ) from error

    def _open_store(self) -> torch.distributed.TCPStore:
        """Open what messages go through: unlike collectives it can be asked without waiting.

        It lives in process 0 and ends with it, which is how the others notice.
        """
        from accelerate.utils import broadcast_object_list

        host = os.environ["MASTER_ADDR"]
        port = [0]
        store = None
        if not self.index:
            store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [store.port]
        broadcast_object_list(port)
        if store is None:
            store = torch.distributed.TCPStore(host, port[0], is_master=False)
        self._state.wait_for_everyone()  # or process 0 might end before the others have found it
        return store

    def check_batch(self, batch: int) -> None:
        """See `Ranks`."""
        if batch < self.count:
            raise UsageError(
                f"A step has {batch} sequences, too few for {self.count} processes: start fewer, "
                "or give the recipe's end-to-end stages more batch_tokens."
            )

    def take(self, batch: Tensor) -> Tensor:
        """See `Ranks`. Shares differ by at most one sequence."""
        return batch[self.index :: self.count]

    def mean_losses(self, losses: LossParts, share: float) -> LossParts:
        """See `Ranks`."""
        parts = [losses.total, losses.divergence, losses.cross_entropy]
        tensor = torch.tensor(parts, dtype=torch.float64, device=self._device)
        return LossParts(*self._sum(tensor * share).tolist())

    def add_gradients(self, parameters: Iterable[nn.Parameter], share: float) -> None:
        """See `Ranks`."""
        for bucket in _buckets(parameters):
            total = self._sum(torch.cat([gradient.flatten() for gradient in bucket]).mul_(share))
            parts = total.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import reduce

        try:
            total: Tensor = reduce(tensor, "sum")
        except RuntimeError as error:
            raise GqsaError(
                f"Process {self.index} has lost the others ({_reason(error)}): one has ended, and "
                "its own message says why. The same command goes on from what is saved."
            ) from error
        return total

    def announce(self, message: Mapping[str, Any]) -> None:
        """See `Ranks`."""
        self._store.set(f"message-{self._messages}", json.dumps(message))
        self._messages += 1

    def receive(self) -> dict[str, Any]:
        """Wait for process 0's next message, however long it takes.

        Raises
        ------
        GqsaError
            Process 0 has ended.
        """
        key = f"message-{self._messages}"
        try:
            while not self._store.check([key]):
                time.sleep(POLL_SECONDS)
            message: dict[str, Any] = json.loads(self._store.get(key))
        except RuntimeError as error:
            raise self._left() from error
        if message == _FAILED:
            raise self._left()
        self._messages += 1
        return message

    def _left(self) -> GqsaError:
        return GqsaError(
            f"Process {self.index} ends because process 0 has failed; its own message says why."
        )

    def say_goodbye(self) -> None:
        """Let process 0 end: its last message was heard."""
        try:
            self._store.add("heard", 1)
        except RuntimeError as error:
            raise self._left() from error

    def await_goodbyes(self) -> None:
        """Wait until the others have heard the last message, but not for ever."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._store.add("heard", 0) < self.count - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)

    def __enter__(self) -> LaunchedRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self.index:
            self.announce(_FAILED)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield the gradients there are, a few at a time."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of a message, without the place in PyTorch's source."""
    line = (str(error).splitlines() or ["no message"])[0]
    return line.rsplit("] ", 1)[-1].split(". ")[0].rstrip(".")[:200]
