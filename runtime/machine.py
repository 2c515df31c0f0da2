"""A session's virtual machine and its paged key/value cache.

All of it is made and called on the session's thread (`workers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gqsa_compiler.runtime import graphs
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.adapters import FUNCTIONS, PREFIX
from gqsa_compiler.runtime.devices import Device, aligned, out_of_memory
from gqsa_compiler.runtime.errors import ArtefactError, UsageError, last_line
from gqsa_compiler.runtime.graphs import DecodeGraphs
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.workers import forget_frames


class Instrument(Protocol):
    """What `Session.set_instrument` takes: called before and after each call of the compiled code.

    `name` is the called function's in the library, or a builtin's of TVM; `result` is None
    before the call. Calls can be nested.
    """

    def __call__(
        self, function: Any, name: str, before: bool, result: Any, *arguments: Any
    ) -> None:
        """Take note of a call."""


@dataclass(frozen=True)
class Limits:
    """What a session's cache holds.

    Parameters
    ----------
    context_length : int
        Tokens of a sequence.
    max_batch : int
        Sequences at once.
    """

    context_length: int
    max_batch: int


@dataclass(frozen=True)
class Code:
    """A compiled function and what it takes as parameters.

    Parameters
    ----------
    function : str
        Its name in the library.
    parameters : tvm_ffi.Array
    """

    function: str
    parameters: Any


class Machine:
    """The compiled functions over one cache.

    Parameters
    ----------
    module : tvm_ffi.Module
        The code.
    manifest : Manifest
    device : Device
    limits : Limits

    Raises
    ------
    ArtefactError
        The code is no compiled model.
    UsageError
        There is no memory for the cache.
    """

    def __init__(self, module: Any, manifest: Manifest, device: Device, limits: Limits) -> None:
        self._module, self._device = module, device
        self._adapted = bool(manifest.adapters)
        self._functions = self._load()
        cache = manifest.kv_cache
        pages = -(-limits.context_length // cache.page_size) * limits.max_batch
        tokens, token_bytes = pages * cache.page_size, cache.bytes_per_token
        sizes = limits.max_batch, tokens, manifest.model.prefill_chunk
        try:
            self._kv = self._functions["create_kv_cache"](self._shape(*sizes))
        except Exception as error:  # TVM names its errors' classes at run time
            raise UsageError(
                f"The key/value cache of {tokens} tokens ({tokens * token_bytes / 1e9:.1f} GB) "
                f"cannot be made: {last_line(error)}. Ask for a smaller context or batch."
            ) from None
        self._add = self._builtin("vm.builtin.kv_state_add_sequence")
        self._remove = self._builtin("vm.builtin.kv_state_remove_sequence")
        self._pop = self._builtin("vm.builtin.kv_state_popn")
        self._begin = self._builtin("vm.builtin.kv_state_begin_forward")
        self._end = self._builtin("vm.builtin.kv_state_end_forward")
        self.graphs: DecodeGraphs | None = None
        if graphs.DECODE in self._functions:
            self.graphs = DecodeGraphs.of(device, self._reload, limits.max_batch, cache.page_size)

    def _load(self) -> Mapping[str, Any]:
        """Make a virtual machine; return its functions by name."""
        names = [*FUNCTIONS, "create_kv_cache"]
        if self._adapted:
            names += [PREFIX + name for name in FUNCTIONS]
        try:
            vm = self._module["vm_load_executable"]()
            vm["vm_initialization"](*self._device.vm_arguments)
            if not self._device.is_cpu and vm.implements_function(graphs.DECODE):
                names += [graphs.DECODE, graphs.CHOOSE]  # else of a release before these
            self._vm, functions = vm, {name: vm[name] for name in names}
        except AttributeError as error:
            raise ArtefactError(
                f"The artefact's library is not a compiled model: {error}."
            ) from None
        return functions

    def _reload(self) -> Mapping[str, Any]:
        """Make another virtual machine in this one's place."""
        self._functions = self._load()
        return self._functions

    def _builtin(self, name: str) -> Any:
        """Find a function of TVM where the code runs."""
        return tvm_ffi.get_global_func(name)

    def _shape(self, *sizes: int) -> Any:
        """Make a shape where the code runs."""
        return tvm_ffi.Shape(sizes)

    def add(self, sequence: int) -> None:
        """Open an empty sequence."""
        self._add(self._kv, sequence)

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        self._remove(self._kv, sequence)

    def pop(self, sequence: int, tokens: int) -> None:
        """Forget a sequence's last tokens."""
        self._pop(self._kv, sequence, tokens)

    def run(
        self,
        sequences: Sequence[int],
        each: int,
        tokens: np.ndarray,
        compute: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Run one pass over `each` more tokens of every sequence, the cache's begin and end too.

        After a pass that fails the cache has no token of it.
        """
        self._begin(self._kv, self._shape(*sequences), self._shape(*(each,) * len(sequences)))
        done = False
        try:
            result = compute(tokens)
            done = True
            return result
        except Exception as error:
            if self._device.is_cpu:
                raise
            forget_frames(error)
            if not out_of_memory(error):
                raise
            raise UsageError(
                "The GPU is out of memory in the middle of a pass; ask for a smaller context or "
                "batch, or end what else runs on it."
            ) from None
        finally:
            self._end(self._kv)
            if not done:
                for sequence in sequences:
                    self.pop(sequence, each)

    def compute(self, code: Code, rows: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
        """Call a compiled function for some tokens, and rows of them where it takes these."""
        upload = self._device.upload
        given = (tokens,) if rows is None else (tokens, rows)
        arguments = [upload(tvm_ffi.from_dlpack(aligned(array))) for array in given]
        function = self._functions[code.function]
        return self._device.download(function(*arguments, self._kv, code.parameters))

    def score(self, code: Code, hidden: np.ndarray) -> np.ndarray:
        """Return the logits of some rows of hidden states."""
        rows = self._device.upload(tvm_ffi.from_dlpack(hidden))
        return self._device.download(self._functions[code.function](rows, code.parameters))

    def play(
        self,
        lengths: Sequence[int],
        parameters: Any,
        draws: np.ndarray | None,
        tokens: np.ndarray,
    ) -> np.ndarray:
        """Decode a token of each sequence by a captured graph; `draws` as for `Session.decode`."""
        assert self.graphs is not None
        result = self.graphs.run(tokens, lengths, self._kv, parameters)
        chosen = result if draws is None else self.graphs.choose(result, draws)
        return self._device.download(chosen)

    def set_instrument(self, instrument: Instrument) -> None:
        """Have every call of the compiled functions reported from now on."""
        self._vm["set_instrument"](tvm_ffi.convert(instrument))

    def free(self) -> None:
        """Free the cache and the code's own memory; nothing can be called after."""
        self.graphs = None
        self._kv = self._vm = None
        self._functions = {}
