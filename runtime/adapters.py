"""The adapters of an artefact: which there are, and what the compiled functions read for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.manifest import Manifest

PREFIX = "with_adapter_"
"""Before the name of a compiled function: the one that takes an adapter's tensors too."""
FUNCTIONS = ("forward", "hidden_states", "logits")
"""The functions of a pass, which every model has."""


class Adapters:
    """The adapters of a program.

    Parameters
    ----------
    manifest : Manifest
    parameters : tvm_ffi.Array
        All parameters of the artefact, as the model's own functions take them.
    """

    def __init__(self, manifest: Manifest, parameters: Any) -> None:
        self._all = parameters
        self._names = {adapter.name: adapter.parameters for adapter in manifest.adapters}
        own = [name for names in self._names.values() for name in names]
        self._model = len(manifest.parameters) - len(own)
        self._places = {name: self._model + i for i, name in enumerate(own)}
        self._made: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters are called."""
        return tuple(self._names)

    def check(self, name: str | None) -> None:
        """Check that there is an adapter of that name; None is the model alone.

        Raises
        ------
        UsageError
            There is none.
        """
        if name is None or (isinstance(name, str) and name in self._names):
            return
        have = f"has {', '.join(self._names)}" if self._names else "was compiled without adapters"
        raise UsageError(f"There is no adapter {name!r}; the artefact {have}.")

    def parameters(self, name: str) -> Any:
        """Return what a ``with_adapter_`` function takes: the model's parameters, the adapter's.

        Raises
        ------
        UsageError
            There is no such adapter, or the parameters are on another machine.
        """
        self.check(name)
        if name not in self._made:
            if not isinstance(self._all, tvm_ffi.Array):
                raise UsageError(
                    "Over RPC no adapter can be chosen; compile the model with --merge-adapter."
                )
            own = [self._all[self._places[tensor]] for tensor in self._names[name]]
            # One object for each: captured graphs know parameters by it.
            self._made[name] = tvm_ffi.Array([*(self._all[i] for i in range(self._model)), *own])
        return self._made[name]


def together(choices: Sequence[str | None]) -> list[list[int]]:
    """Group the places of equal choices: sequences with one adapter go through one pass."""
    found: dict[str | None, list[int]] = {}
    for place, choice in enumerate(choices):
        found.setdefault(choice, []).append(place)
    return list(found.values())
