"""A decoded token as one CUDA graph: what must stay where it is, and whether it did.

A graph is a list of launches with the addresses and numbers that they were captured with, so it
can be played again only while these hold. What they are, and who sees to it:

- the weights: `DecodeGraphs` forgets all graphs when it is given others;
- the function's own memory: the virtual machine that has the graphs keeps it;
- the new tokens: `tokens` writes them to one place;
- the cache's pages and its copies of q, k and v: TVM's cache allocates them once;
- the cache's tables: it copies them to one buffer, one behind another, each beginning at a multiple
  of 16 bytes. Only the page numbers' length changes while the number of sequences does not, so a
  graph is for a number of sequences and of started fours of pages (`layout`);
- scratch that a kernel takes while it is launched: TVM's pool for it frees a block for a larger one
  when it needs one. `Scratch` says where its blocks are; have they moved, all graphs are forgotten.

Nothing else may be asked of the GPU while a graph is captured: all that a process asks of it is
asked on one thread (`workers`), so that no session is in another's way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device, aligned, out_of_memory
from gqsa_compiler.runtime.errors import UsageError

DECODE, CHOOSE = "decode", "choose_tokens"
"""The compiled functions: a token of each sequence to logits, and these to the next tokens."""
MOST_GRAPHS = 128
"""Graphs that a session keeps; each has a few hundred launches, which take memory of the GPU."""
_PAGES_A_LAYOUT = 4
"""Page numbers, 4 bytes each, in the 16 bytes that the cache's tables are aligned to."""
SCRATCH = (64 << 20, 1 << 20, 1 << 20, 1 << 20)
"""Bytes of the blocks that the pool has from the start; no kernel takes more than three at once.
That is what attention takes for 32 sequences with 8192 features of q: a sum for each of the 64
shares that it divides a sequence into. Where more is needed, as for a prompt, the pool moves them.
They are part of `devices._RUNTIME_BYTES`."""
_RUNTIME = "libtvm_runtime.so"


class Scratch:
    """TVM's pool of scratch memory for launches from this thread.

    Parameters
    ----------
    device : Device
    sizes : sequence of int
        Bytes that the pool's blocks have from now on, the largest first, so that they are rarely
        made larger.

    Raises
    ------
    RuntimeError
        TVM's: the device has not enough memory.
    """

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        runtime = ctypes.CDLL(_RUNTIME, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        self._alloc, self._free = runtime.TVMBackendAllocWorkspace, runtime.TVMBackendFreeWorkspace
        self._alloc.restype = ctypes.c_void_p
        number = ctypes.c_int
        self._alloc.argtypes = [number, number, ctypes.c_uint64, number, number]
        self._free.argtypes = [number, number, ctypes.c_void_p]
        self._where = (device.memory.dlpack_device_type(), 0)
        self._blocks = len(sizes)
        device.empty((sum(sizes),), "uint8")  # an exception here: from the pool's it cannot come
        self._hold(sizes)

    def places(self) -> frozenset[int]:
        """Return the addresses of its blocks."""
        return self._hold([1] * self._blocks)

    def _hold(self, sizes: Sequence[int]) -> frozenset[int]:
        """Take so many blocks at once and give them back."""
        held = [self._alloc(*self._where, size, 1, 8) for size in sizes]
        for address in reversed(held):
            self._free(*self._where, address)
        return frozenset(held)


class DecodeGraphs:
    """The graphs of a session, made by its virtual machine as they are needed.

    Parameters
    ----------
    device : Device
    load : callable
        Makes a virtual machine and returns its functions by name; the one before, and its graphs,
        are gone.
    max_batch : int
        Sequences at once.
    page_size : int
        Tokens of a page.
    scratch : Scratch
    """

    def __init__(
        self,
        device: Device,
        load: Callable[[], Mapping[str, Any]],
        max_batch: int,
        page_size: int,
        scratch: Scratch,
    ) -> None:
        self._device, self._load, self._page = device, load, page_size
        self._scratch = scratch
        self._place = device.empty((max_batch,), "int32")
        self._tokens: dict[int, Any] = {}
        self._functions = load()
        self._made: set[tuple[int, int]] = set()
        self._known: tuple[frozenset[int], Any] | None = None

    @classmethod
    def of(
        cls,
        device: Device,
        load: Callable[[], Mapping[str, Any]],
        max_batch: int,
        page_size: int,
    ) -> DecodeGraphs:
        """Make a session's graphs, with scratch that lasts for most contexts.

        Raises
        ------
        UsageError
            There is no memory left for it.
        """
        try:
            return cls(device, load, max_batch, page_size, Scratch(device, SCRATCH))
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UsageError(
                "The GPU is out of memory: beside the weights and the cache there is no room for "
                "what a pass computes with; ask for a smaller context or batch, or end what else "
                "runs on it."
            ) from None

    def run(self, tokens: np.ndarray, lengths: Sequence[int], cache: Any, parameters: Any) -> Any:
        """Decode a token of each sequence, between the cache's begin and end of a pass.

        Parameters
        ----------
        tokens : ndarray
            int32 [b].
        lengths : sequence of int [b]
            Tokens that each sequence has with this one.

        Returns
        -------
        tvm_ffi.Tensor
            float32 [b, V] on the device; the next call writes to the same place.
        """
        graph = (len(tokens), self.layout(lengths))
        new = graph not in self._made
        if self._moved(parameters) or (new and len(self._made) >= MOST_GRAPHS):
            self._functions = self._load()
            self._made.clear()
            new = True
        place = self._tokens.get(len(tokens))
        if place is None:
            place = self._tokens[len(tokens)] = self._device.beginning(self._place, len(tokens))
        self._device.write(aligned(tokens), place)
        decode = self._functions[DECODE]
        result = decode(place, tvm_ffi.Shape((graph[1],)), cache, parameters)
        if new and not self._made:
            # Of a later graph it stays as it is: what that moved, the graphs before it have lost.
            self._known = (self._scratch.places(), parameters)
        self._made.add(graph)
        return result

    def choose(self, logits: Any, draws: np.ndarray) -> Any:
        """Choose a token for each row of logits; the result is int32 [b], on the device.

        Parameters
        ----------
        logits : tvm_ffi.Tensor
            What `run` returned.
        draws : ndarray
            float32 [b, 5]: 1 / temperature (0: the likeliest), top-k (0: all), top-p, min-p and a
            number from [0, 1).
        """
        given = tvm_ffi.from_dlpack(np.array(draws, np.float32))
        return self._functions[CHOOSE](logits, self._device.upload(given))

    def layout(self, lengths: Sequence[int]) -> int:
        """Return what tells apart the places of the cache's tables, for so many sequences."""
        pages = sum(-(-length // self._page) for length in lengths)
        return -(-pages // _PAGES_A_LAYOUT)

    def _moved(self, parameters: Any) -> bool:
        if self._known is None:
            return False
        places, known = self._known
        return known is not parameters or places != self._scratch.places()


__all__ = ["CHOOSE", "DECODE", "MOST_GRAPHS", "DecodeGraphs", "Scratch"]
