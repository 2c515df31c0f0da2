"""Run an artefact on a device that runs TVM's RPC server.

The compiled code and the packed weights are sent there; the tokenizer, the chat template and the
sampling stay here. An RPC server runs whatever it is sent, so it belongs into a trusted network
only (docs/mobile.md).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gqsa_compiler._tvm import rpc, runtime, tvm, tvm_ffi
from gqsa_compiler.errors import ArtefactError, GqsaError, UsageError
from gqsa_compiler.runtime import library, params
from gqsa_compiler.runtime.errors import last_line
from gqsa_compiler.runtime.machine import Limits, Machine
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import Model
from gqsa_compiler.runtime.program import Program
from gqsa_compiler.runtime.schema import Variant

_SECONDS = 10  # to reach the server
_CPU, _POOLED_ALLOCATOR = 1, 2
_TRIPLE = "target.llvm_get_system_triple"  # only a server of the whole compiler has it
_NAME = "gqsa"  # of the parameters, in the server's table


def load_remote(
    directory: str | Path,
    address: str,
    *,
    verify: bool = True,
    context_length: int | None = None,
    max_batch: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Load an artefact on a device.

    Parameters
    ----------
    directory : str or Path
        What `gqsa-compile` wrote for the device.
    address : str
        ``HOST:PORT`` of TVM's RPC server (``python -m tvm.exec.rpc_server``).
    verify : bool
        Compare every parameter's SHA-256 before it is sent.
    context_length, max_batch : int, optional
        Smaller limits than the artefact was compiled with.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` while weights are sent.

    Raises
    ------
    UsageError
        The address is none, or a limit is out of range.
    ArtefactError
        The artefact is damaged, or for another kind of machine than the device.
    GqsaError
        There is no server at the address, or its TVM is of another release.
    """
    path = Path(directory)
    program = _RemoteProgram(path, Manifest.read(path), address, verify, progress)
    return Model(path, program, context_length=context_length, max_batch=max_batch)


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``.

    Raises
    ------
    UsageError
        It is written otherwise, or the port is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UsageError(f"The address is {text!r} and must be HOST:PORT, such as phone:9090.")
    return host.strip("[]"), int(port)


class _Connection:
    """A session of TVM's RPC; its errors become ours."""

    def __init__(self, address: str) -> None:
        self.address = address
        host, port = parse_address(address)
        try:
            # TVM itself would wait for minutes.
            socket.create_connection((host, port), _SECONDS).close()
        except OSError as error:
            raise GqsaError(
                f"There is no server at {address} ({error.strerror or error}); start one there: "
                "python -m tvm.exec.rpc_server"
            ) from None
        try:
            self.session = rpc.connect(host, port)
        except Exception as error:
            if "mismatch" in str(error):
                raise self.other_release() from None
            raise GqsaError(
                f"{address} is no RPC server of TVM, or serves somebody else ({last_line(error)})."
            ) from None

    def function(self, name: str) -> Any:
        """Return one of the server's functions."""
        found = self.find(name)
        if found is None:
            raise self.other_release()
        return found

    def find(self, name: str) -> Any:
        """Return one of the server's functions, or None if it has none of that name."""
        try:
            return self.session.get_function(name)
        except AttributeError:
            return None

    def other_release(self) -> GqsaError:
        """Say that the server's TVM is not ours."""
        return GqsaError(
            f"The TVM at {self.address} is of another release than {tvm.__version__}, which is "
            f"here; run the server of apache-tvm {tvm.__version__} there."
        )

    def arch(self) -> str | None:
        """Return the device's architecture; None where the server does not tell."""
        triple = self.find(_TRIPLE)
        return None if triple is None else str(triple()).split("-", 1)[0]


class _RemoteDevice:
    """The device, as `Session` sees the one that it runs on."""

    is_cpu = True
    vm_arguments = (_CPU, 0, _POOLED_ALLOCATOR)

    def __init__(self, connection: _Connection) -> None:
        self._cpu = connection.session.cpu(0)

    def upload(self, tensor: Any) -> Any:
        """Send a tensor of this machine."""
        there = runtime.empty(tuple(tensor.shape), str(tensor.dtype), self._cpu)
        return there.copyfrom(tensor)

    def download(self, tensor: Any) -> np.ndarray:
        """Fetch a tensor."""
        array: np.ndarray = tensor.numpy()
        return array

    def free_bytes(self) -> None:
        """Tell nothing: pages are taken as they are used."""


class _RemoteProgram(Program):
    """The code and the parameters of an artefact, on a device."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        address: str,
        verify: bool,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.connection = connection = _Connection(address)
        self.manifest = manifest
        self.variant = _choose(manifest, directory, connection)
        code = directory / self.variant.library.file
        library.check_code(code, self.variant)
        views = params.map_params(
            directory / manifest.parameters_file, manifest.parameters, verify=verify
        )
        self.module = self._load(code)
        self.device: Any = _RemoteDevice(connection)
        # A server makes tensors of its own only by this table: elsewhere what is sent stays a view.
        keep = connection.function("vm.builtin.tensor_cache.update")
        create_view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        for i, (view, parameter) in enumerate(zip(views, manifest.parameters, strict=True)):
            if progress is not None:
                progress("sending the weights", i, len(views))
            shape, dtype = tvm_ffi.Shape(parameter.shape), tvm_ffi.dtype(parameter.dtype)
            here = create_view(tvm_ffi.from_dlpack(view), shape, dtype, 0)
            keep(f"{_NAME}_{i}", self.device.upload(here), True)
        if progress is not None:
            progress("sending the weights", len(views), len(views))
        array = connection.function("vm.builtin.param_array_from_cache")
        self.parameters = array(_NAME, len(views))
        connection.function("vm.builtin.tensor_cache.clear")()

    def _load(self, code: Path) -> Any:
        try:
            self.connection.session.upload(str(code))
            return self.connection.session.load_module(code.name)
        except Exception as error:
            raise ArtefactError(
                f"The device at {self.connection.address} cannot load the code for "
                f"{self.variant.target.name} ({self.variant.target.arch}); compile the model for "
                f"that device ({last_line(error)})."
            ) from None

    def machine(self, limits: Limits) -> Machine:
        """Make a session's virtual machine and cache on the device, with the server's threads."""
        return _RemoteMachine(self, limits)


class _RemoteMachine(Machine):
    """The code and the cache, on a device."""

    def __init__(self, program: _RemoteProgram, limits: Limits) -> None:
        self._connection = program.connection
        # Shapes of this machine do not go over the wire.
        self._make_shape = program.connection.function("ffi.Shape")
        super().__init__(program.module, program.manifest, program.device, limits)

    def _builtin(self, name: str) -> Any:
        return self._connection.function(name)

    def _shape(self, *sizes: int) -> Any:
        return self._make_shape(*sizes)


def _choose(manifest: Manifest, directory: Path, connection: _Connection) -> Variant:
    """Choose the variant that asks for least: a server does not tell its CPU's features."""
    variant = manifest.variants[-1]
    target = variant.target
    if variant.library.file == library.PROGRAM:
        raise ArtefactError(
            f"The code for {target.name} is linked into {directory / library.PROGRAM}; copy the "
            "folder to the device and run that."
        )
    if target.device_type != _CPU:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.kind}), and on a device over "
            "RPC only CPUs are driven; compile it for the device's CPU."
        )
    arch = connection.arch()
    if arch is not None and arch != target.arch:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.arch}) and the device at "
            f"{connection.address} is {arch}; compile it for that device."
        )
    return variant
