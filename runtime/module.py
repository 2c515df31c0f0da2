"""A compiled module: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from gqsa_compiler.runtime import cpus, params
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.errors import ArtefactError, GqsaError, UsageError, last_line
from gqsa_compiler.runtime.module_manifest import ModuleManifest, ModuleTensor
from gqsa_compiler.runtime.program import Program
from gqsa_compiler.runtime.workers import Workers

FUNCTION = "main"
_CPU, _POOLED_ALLOCATOR = 1, 2


def load_module(
    directory: str | Path,
    *,
    threads: int | None = None,
    verify: bool = True,
    variant: str | None = None,
) -> Module:
    """Load a compiled module.

    Parameters
    ----------
    directory : str or Path
        What `gqsa-compile` made of a module checkpoint or an ONNX file.
    threads : int, optional
        Worker threads; one for every core this process may use unless given.
    verify : bool
        Compare every parameter's SHA-256 with the manifest's: one read of the whole file.
    variant : str, optional
        Target name of the code to run, where the artefact has code for several.

    Raises
    ------
    ArtefactError
        The artefact is damaged, a language model, of another format version, or for another
        machine.
    UsageError
        The number of threads is out of range, or there is no such variant.

    """
    path = Path(directory)
    manifest = ModuleManifest.read(path)
    # A program reads versions, variants and parameters, which both kinds of manifest have.
    program = Program(path, cast(Any, manifest), verify=verify, variant=variant)
    return Module(program, manifest, threads)


class Module:
    """A loaded module; made by `load_module`. Use it as a context manager, or `close` it.

    >>> module = load_module("minilm.gqsa")                        # doctest: +SKIP
    >>> hidden = module(input_ids, attention_mask)                 # doctest: +SKIP
    """

    def __init__(
        self, program: Program, manifest: ModuleManifest, threads: int | None = None
    ) -> None:
        allowed = cpus.allowed_cpus()
        if threads is not None and not 1 <= threads <= len(allowed):
            raise UsageError(
                f"threads is {threads} and this process may use {len(allowed)} CPUs; "
                f"choose 1 to {len(allowed)}."
            )
        self.manifest = manifest
        self.threads = threads or cpus.default_threads()
        self._program = program
        self._bounds = {size.name: (size.smallest, size.largest) for size in manifest.sizes}
        self._closed = False
        self._workers = Workers.share(allowed[: self.threads])
        try:
            self._workers.call(self._start)
        except BaseException:
            self._workers.release()
            raise

    def _start(self) -> None:
        try:
            vm = self._program.module["vm_load_executable"]()
            vm["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
            self._function = vm[FUNCTION]
        except AttributeError as error:
            raise ArtefactError(
                f"The artefact's library is not a compiled module: {error}."
            ) from None
        self._vm = vm

    @property
    def inputs(self) -> tuple[ModuleTensor, ...]:
        """What the module takes, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[ModuleTensor, ...]:
        """What it returns, in order."""
        return self.manifest.outputs

    @property
    def variant(self) -> str:
        """Target name of the code that runs."""
        return self._program.variant.target.name

    def __call__(self, *arrays: Any, **named: Any) -> Any:
        """Run the module.

        Parameters
        ----------
        *arrays, **named
            The inputs, in order or by name: arrays, or what `numpy.asarray` takes.

        Returns
        -------
        ndarray or tuple of ndarray
            Memory of TVM's, not copied.

        Raises
        ------
        UsageError
            An input is missing, of another dtype or rank, or has a size that the module was not
            compiled for.

        """
        tensors = [_tensor(array) for array in self._arguments(arrays, named)]
        if self._closed:
            raise UsageError("The module is closed; load the artefact again.")
        try:
            result = self._workers.call(self._function, *tensors, self._program.parameters)
        except GqsaError:
            raise
        except Exception as error:  # TVM names its errors' classes at run time
            pairs = zip(self.inputs, tensors, strict=True)
            sizes = ", ".join(f"{given.name} {list(array.shape)}" for given, array in pairs)
            reason = last_line(error)
            if "match_cast" in str(error):
                reason = "a shape inside it does not follow from them"
            raise UsageError(
                f"The module cannot run on inputs of these sizes ({sizes}): {reason}."
            ) from None
        if len(self.outputs) == 1:
            return np.from_dlpack(result)
        return tuple(np.from_dlpack(part) for part in result)

    def _arguments(self, arrays: tuple[Any, ...], named: dict[str, Any]) -> list[np.ndarray]:
        names = [tensor.name for tensor in self.inputs]
        given = dict(zip(names, arrays, strict=False))
        twice = sorted(given.keys() & named.keys())
        unknown = sorted(named.keys() - set(names))
        missing = [name for name in names if name not in given and name not in named]
        if len(arrays) > len(names) or twice or unknown or missing:
            raise UsageError(
                f"The module takes {', '.join(names)}, each once; it was given {len(arrays)} "
                f"arrays{''.join(f' and {name}' for name in sorted(named))}."
            )
        values = {**given, **named}
        sizes: dict[str, int] = {}
        return [self._array(tensor, values[tensor.name], sizes) for tensor in self.inputs]

    def _array(self, tensor: ModuleTensor, value: Any, sizes: dict[str, int]) -> np.ndarray:
        """Check an input; `sizes` are those that earlier inputs have set."""
        array = np.asarray(value)
        if array.dtype != tensor.dtype and not np.can_cast(array.dtype, tensor.dtype, "same_kind"):
            raise UsageError(f"Input {tensor.name} must be {tensor.dtype}, not {array.dtype}.")
        if array.dtype.kind in "iu" and array.size:
            _check_range(tensor, array)
        if array.ndim != len(tensor.shape):
            raise UsageError(
                f"Input {tensor.name} has {array.ndim} axes; it must have {len(tensor.shape)}: "
                f"[{', '.join(tensor.shape)}]."
            )
        for axis, (size, text) in enumerate(zip(array.shape, tensor.shape, strict=True)):
            low, high = (sizes[text],) * 2 if text in sizes else self._range(text)
            if not low <= size <= high:
                wanted = str(low) if low == high else f"{low} to {high}"
                raise UsageError(
                    f"Axis {axis} of input {tensor.name} has size {size}; it must be {wanted}."
                )
            if text in self._bounds:
                sizes[text] = size
        return _aligned(array, np.dtype(tensor.dtype))

    def _range(self, text: str) -> tuple[int, int]:
        return self._bounds.get(text) or (int(text), int(text))

    def close(self) -> None:
        """Free the memory and the threads; a closed module cannot be called again."""
        if not self._closed:
            self._closed = True
            if not self._workers.left_behind:
                self._workers.call(self._free)
            self._workers.release()

    def _free(self) -> None:
        self._vm = self._function = None

    def __enter__(self) -> Module:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_range(tensor: ModuleTensor, array: np.ndarray) -> None:
    """Refuse integers that would become others in the dtype that the module takes."""
    dtype = np.dtype(tensor.dtype)
    if dtype.kind not in "iu" or np.can_cast(array.dtype, dtype):
        return
    limits = np.iinfo(dtype)
    least, most = int(array.min()), int(array.max())
    if least < limits.min or most > limits.max:
        raise UsageError(
            f"Input {tensor.name} has numbers from {least} to {most}, and {dtype} holds "
            f"{limits.min} to {limits.max}."
        )


def _tensor(array: np.ndarray) -> Any:
    return tvm_ffi.from_dlpack(array)


def _aligned(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Copy an array to where TVM's code takes arguments to be; numpy only promises 16 bytes."""
    size = array.size * dtype.itemsize
    buffer = np.empty(size + params.ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % params.ALIGNMENT
    view = buffer[start : start + size].view(dtype).reshape(array.shape)
    view[...] = array
    return view
