"""An artefact that is loaded: its code and its weights, shared by all sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime import cpus, library, params
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device
from gqsa_compiler.runtime.machine import Limits, Machine
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.workers import Workers


class Program:
    """The compiled code and the mapped parameters of one artefact: shared by its sessions.

    Parameters
    ----------
    directory : Path
        The artefact.
    manifest : Manifest
        Its manifest.
    verify : bool
        Check the parameters' SHA-256.
    variant : str, optional
        Target name of the variant to run; the best that this machine can run unless given.

    Raises
    ------
    ArtefactError
        Whatever `library.choose`, `library.check` and `params.map_params` refuse.
    UsageError
        There is no such variant.

    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        verify: bool = True,
        variant: str | None = None,
    ) -> None:
        self.variant = library.choose(manifest, variant)
        libraries = library.check(directory, manifest, self.variant)
        views = params.map_params(
            directory / manifest.parameters_file, manifest.parameters, verify=verify
        )
        self.manifest = manifest
        self.module = library.load_executable(
            libraries, directory / self.variant.library.file, manifest.versions.tvm
        )
        self.device = Device(self.variant.target.device_type)
        # A typed view made by TVM itself: numpy has no bfloat16 to say it in.
        create_view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        here = []
        for view, parameter in zip(views, manifest.parameters, strict=True):
            shape, dtype = tvm_ffi.Shape(parameter.shape), tvm_ffi.dtype(parameter.dtype)
            here.append(create_view(tvm_ffi.from_dlpack(view), shape, dtype, 0))
        self.parameters = self._upload(here)

    def _upload(self, tensors: Sequence[Any]) -> Any:
        """Bring parameters to the device: to a GPU on its thread, which frees them too."""

        def upload() -> Any:
            return tvm_ffi.Array([self.device.upload(tensor) for tensor in tensors])

        if self.device.is_cpu:
            return upload()
        # Kept for the program's life and not released: the thread ends with its last owner.
        workers = Workers.share(cpus.allowed_cpus()[: cpus.default_threads()], gpu=True)
        parameters = upload() if workers.here else workers.call(upload)
        workers.after(self, _nothing, parameters, self.module)
        self._workers = workers
        return parameters

    def machine(self, limits: Limits) -> Machine:
        """Make a session's virtual machine and cache, on its thread."""
        return Machine(self.module, self.manifest, self.device, limits)


def _nothing(*_held: object) -> None:
    pass
