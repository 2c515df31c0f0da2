"""An artefact that is loaded: its code and its weights, shared by all sessions."""

from __future__ import annotations

from pathlib import Path

from gqsa_compiler.runtime import library, params
from gqsa_compiler.runtime._ffi import tvm_ffi
from gqsa_compiler.runtime.devices import Device
from gqsa_compiler.runtime.machine import Limits, Machine
from gqsa_compiler.runtime.manifest import Manifest


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
        uploaded = []
        for view, parameter in zip(views, manifest.parameters, strict=True):
            shape, dtype = tvm_ffi.Shape(parameter.shape), tvm_ffi.dtype(parameter.dtype)
            here = create_view(tvm_ffi.from_dlpack(view), shape, dtype, 0)
            uploaded.append(self.device.upload(here))
        self.parameters = tvm_ffi.Array(uploaded)

    def machine(self, limits: Limits) -> Machine:
        """Make a session's virtual machine and cache, on its thread."""
        return Machine(self.module, self.manifest, self.device, limits)
