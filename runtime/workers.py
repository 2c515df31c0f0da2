"""The threads that compiled code runs on.

TVM keeps a pool of workers for each thread that calls it, so all calls of a session are made on one
thread of ours, which pins nobody else's. Sessions with as many threads share it: two loaded models
take turns on one pool, rather than fight for the cores with two.

All that a process asks of a GPU is asked on one such thread, whatever its sessions' threads: it
copies weights, runs passes and frees memory. While a CUDA graph is captured (`graphs`) a request of
another thread would break the capture, and one to free memory would end the process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar
from weakref import WeakValueDictionary, finalize

from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.errors import UsageError

T = TypeVar("T")

_SHARE_ALL_CORES = -3  # TVM's affinity mode: the workers share the CPUs that are listed
_GPU = -1  # in the place of CPUs in a key

_lock = threading.Lock()
# Weak: sessions that nobody closed take their workers with them.
_pools: WeakValueDictionary[tuple[int, ...], Workers] = WeakValueDictionary()


class Workers:
    """A calling thread with TVM's workers behind it; `share` gives one, `release` gives it back."""

    def __init__(self, cpus: Sequence[int], *, gpu: bool = False) -> None:
        self._gpu = gpu
        self._left = deque[Callable[[], object]]()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gqsa-session")
        self._users = 0
        self._process = os.getpid()
        try:
            configure = tvm_ffi.get_global_func("runtime.config_threadpool")
            self._thread = self._executor.submit(threading.get_ident).result()
            self.call(configure, _SHARE_ALL_CORES, len(cpus), [str(cpu) for cpu in cpus])
        except BaseException:
            self._executor.shutdown()
            raise

    @classmethod
    def share(cls, cpus: Sequence[int], *, gpu: bool = False) -> Workers:
        """Return the workers on these CPUs, one for each; made where there are none.

        For a GPU there is one in a process, on the CPUs that it was first asked for.
        """
        key = _key([_GPU] if gpu else cpus)
        with _lock:
            workers = _pools.get(key) or cls(cpus, gpu=gpu)
            _pools[key] = workers
            workers._users += 1
        return workers

    def release(self) -> None:
        """End the threads if nobody else has a share in them."""
        with _lock:
            self._users -= 1
            if self._users:
                return
            for key in [key for key, workers in _pools.items() if workers is self]:
                del _pools[key]
        self._executor.shutdown()

    @property
    def here(self) -> bool:
        """Whether this is the thread."""
        return threading.get_ident() == self._thread

    @property
    def left_behind(self) -> bool:
        """Whether this is a forked child, which has none of the threads."""
        return os.getpid() != self._process

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on the thread, from another one, and wait for it.

        Raises
        ------
        UsageError
            This process was forked off the one that has the thread: it would wait for ever.
        """
        if self.left_behind:
            raise UsageError(
                "The artefact was loaded before this process was forked; load it in this process, "
                "or start processes by spawning them."
            )
        if self._left:
            self._executor.submit(self._catch_up)
        if self._gpu:
            return self._executor.submit(_forgetful, function, *args).result()
        return self._executor.submit(function, *args).result()

    def after(self, owner: object, function: Callable[..., object], *args: Any) -> None:
        """Have a function called on the thread, before its next call, when an object is gone.

        The arguments live as long: what is on a GPU is not freed by whoever drops the object. A
        finaliser may run anywhere, so it only takes note and waits for no lock.
        """
        finalize(owner, self._left.append, partial(function, *args)).atexit = False

    def _catch_up(self) -> None:
        while self._left:
            self._left.popleft()()

    def __del__(self) -> None:
        """Do what is left here: nobody has the thread any more."""
        self._catch_up()


def _forgetful(function: Callable[..., T], *args: Any) -> T:
    """Call a function; what a failure's frames hold goes here, not where it is caught."""
    try:
        return function(*args)
    except BaseException as error:
        forget_frames(error)
        raise


def forget_frames(error: BaseException | None) -> None:
    """Drop the local variables in an exception's frames, which may be tensors of a GPU."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def _key(cpus: Sequence[int]) -> tuple[int, ...]:
    # A forked child has the dictionary, but none of the threads.
    return (os.getpid(), *cpus)
