"""Times the calls of compiled code, each counted as the kernel it is."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqsa_compiler.errors import ArtefactError

if TYPE_CHECKING:
    from gqsa_compiler.runtime.manifest import Manifest

ATTENTION, MACHINE = "attention with KV cache", "virtual machine"

# Calls that are the machine's own work: registers, shapes, storage.
_MACHINE = re.compile(r"vm\.builtin\.|shape_func|compute_symbolic_expr")
# The cache's object runs its own kernels: what it appends, and the attention itself.
_ATTENTION = re.compile(r"vm\.builtin\.attention_kv_cache_\w*attention")

Key = int | str
"""What a call is counted as: the place of a linear kernel in the manifest, or a name."""


class Trace:
    """Adds up the time of calls; an instrument for `Session.set_instrument`.

    Parameters
    ----------
    manifest : Manifest
        Its list of kernels.
    addresses : dict
        Where each parameter's data lies, by its name.

    """

    def __init__(self, manifest: Manifest, addresses: dict[str, int]) -> None:
        layers = {kernel.layer: index for index, kernel in enumerate(manifest.kernels)}
        # Parameters are named after their layer: `<layer>.codes`. An empty one has no place of
        # its own: the next begins where it does.
        self._owners = {
            addresses[p.name]: layers[p.name.rpartition(".")[0]]
            for p in manifest.parameters
            if 0 not in p.shape and p.name.rpartition(".")[0] in layers
        }
        # Functions are named after the rule and the shape. A tied embedding is read by two: only
        # one of them is the head's kernel.
        self._names = [re.sub(r"\W", "_", f"{k.kernel}_{k.n}x{k.k}") for k in manifest.kernels]
        self._open: list[_Call] = []
        self._times: dict[Key, int] = defaultdict(int)
        self._calls: dict[Key, int] = defaultdict(int)

    def __call__(
        self, function: Any, name: str, before: bool, result: Any, *arguments: Any
    ) -> None:
        """Take note of a call that is about to be made, or of one that has just ended."""
        now = time.perf_counter_ns()
        if before:
            call = _Call(self._key(name, arguments), now)
            self._open.append(call)
            call.began = time.perf_counter_ns()
            return
        call = self._open.pop()
        self._times[call.key] += now - call.began - call.inside
        self._calls[call.key] += 1
        if self._open:
            self._open[-1].inside += time.perf_counter_ns() - call.entered

    def take(self) -> tuple[dict[Key, int], dict[Key, int]]:
        """Return nanoseconds and calls since the last time, the machine's own calls left out.

        Raises
        ------
        ArtefactError
            No call was reported.

        """
        if not self._calls:
            raise ArtefactError(
                "The artefact's model.so does not report its calls, so it cannot be profiled; "
                "compile the model again."
            )
        times, calls = self._times, self._calls
        self._times, self._calls = defaultdict(int), defaultdict(int)
        for found in (times, calls):
            found.pop(MACHINE, None)
        return times, calls

    def _key(self, name: str, arguments: tuple[Any, ...]) -> Key:
        if _MACHINE.match(name):
            return ATTENTION if _ATTENTION.match(name) else MACHINE
        for argument in arguments:
            if hasattr(argument, "data_ptr"):
                index = self._owners.get(argument.data_ptr())
                if index is not None and name.startswith(self._names[index]):
                    return index
        return name


@dataclass
class _Call:
    """A call that has not ended, with the time of what it called itself."""

    key: Key
    entered: int
    began: int = 0
    inside: int = 0
