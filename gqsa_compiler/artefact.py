"""Write an artefact: library, packed parameters, manifest, tokenizer."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gqsa_compiler import runtime
from gqsa_compiler._child import run_in_child
from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError, GqsaError
from gqsa_compiler.head import round_weight
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.passes.plan import (
    BiasTensor,
    Kernel,
    PackedTensor,
    PackPlan,
    RawTensor,
    np_dtype,
)
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.runtime.chat import TEMPLATE_FILE, load_template
from gqsa_compiler.runtime.library import BUNDLE, RUNTIME_LIBRARIES
from gqsa_compiler.targets import TargetSpec, host_arch

PARAMETERS = "params.safetensors"
PROGRAM = "gqsa-run"
CHAT_PROMPT = "chat_prompt.json"
_LITTLE_ROOM = 1 << 20  # bytes: with less, a failure is put down to the full disk

Array = npt.NDArray[Any]


class WeightLoader(Protocol):
    """Where a plan's tensors come from."""

    def load(self, name: str) -> Array:
        """Return a dense parameter."""

    def layer(self, name: str) -> BSRLayer:
        """Return a compressed layer by its parameter's name."""


def packed_tensors(
    plan: PackPlan, weights: WeightLoader, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of `plan` in order, holding one kernel's packed weights at a time."""
    kernel: Kernel | None = None
    packed: Mapping[str, Array] = {}
    for done, tensor in enumerate(plan.tensors):
        progress("packing weights", done, len(plan.tensors))
        array: Array
        if isinstance(tensor, PackedTensor):
            if tensor.kernel is not kernel:
                kernel, packed = tensor.kernel, _pack(tensor.kernel, weights)
            array = packed[tensor.part]
        elif isinstance(tensor, BiasTensor):
            array = np.concatenate([_dense(weights, r.name, "float32") for r in tensor.records])
        else:
            array = _dense(weights, tensor.name, tensor.dtype)
        fits = len(array.shape) == len(tensor.shape) and all(
            wanted in (None, size) for wanted, size in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != np_dtype(tensor.dtype):
            raise CompileError(
                f"Parameter {tensor.name} was packed as {array.dtype}{list(array.shape)}, but its "
                f"kernel reads {tensor.dtype}{list(tensor.shape)}; this is a bug in the rule."
            )
        yield tensor.name, array
    progress("packing weights", len(plan.tensors), len(plan.tensors))


def _pack(kernel: Kernel, weights: WeightLoader) -> Mapping[str, Array]:
    parts: list[Any]
    if kernel.spec.weight == "dense":
        parts = [_dense(weights, r.name, kernel.spec.weight_dtype) for r in kernel.records]
    else:
        parts = [_layer(record, weights) for record in kernel.records]
    return kernel.rule.pack(kernel.spec, kernel.config, parts)


def _layer(record: ParamRecord, weights: WeightLoader) -> BSRLayer:
    if not record.linear_bits:
        return weights.layer(record.name)
    dense = _dense(weights, record.name, record.dtype)
    return round_weight(record.layer, dense, record.linear_group)


def _dense(weights: WeightLoader, name: str, dtype: str) -> Array:
    array = weights.load(name).astype(np_dtype(dtype), copy=False)
    if not np.all(np.isfinite(array.astype(np.float32, copy=False))):
        raise CompileError(f"Parameter {name} holds values that are not finite numbers in {dtype}.")
    return array


def library_name(target: TargetSpec, variants: int) -> str:
    """Name the library of one of so many variants of an artefact."""
    return "model.so" if variants == 1 else f"model.{target.name}.so"


def export_library(mod: tvm.IRModule, target: TargetSpec, path: Path) -> str:
    """Generate code, link a library and return its SHA-256.

    Parameters
    ----------
    mod : IRModule
        After every phase of the pipeline.
    target : TargetSpec
    path : Path
        Of the library.

    Raises
    ------
    CompileError
        No linker for the target, or code generation failed.
    OSError
        The disk is full.
    """
    compiler = tvm.support.cc.cross_compiler(_linker(target))
    directory = path.parent

    def generate() -> None:
        # Object files go beside the library, not to a temporary directory that may be small.
        with tempfile.TemporaryDirectory(dir=directory) as objects:
            executable = relax.build(
                mod,
                tvm.target.Target(target.tvm_dict()),
                relax_pipeline=None,
                tir_pipeline=cpu_code.register(),
            )
            executable.export_library(str(path), fcompile=compiler, workspace_dir=objects)

    try:
        run_in_child(generate, "Code generation")
    except CompileError as error:
        if shutil.disk_usage(directory).free < _LITTLE_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _linker(target: TargetSpec) -> str:
    if target.arch == host_arch():
        names, package = ["g++", "c++", "clang++"], "g++"
    else:
        names = [f"{target.arch}-linux-gnu-g++"]
        package = f"g++-{target.arch.replace('_', '-')}-linux-gnu"
    for name in names:
        if shutil.which(name):
            return name
    raise CompileError(
        f"Linking for {target.name} needs {names[0]}, which is not on the PATH; install it "
        f"(Debian: apt-get install {package})."
    )


def check_tools(target: TargetSpec, *, bundle: bool) -> None:
    """Check, before any work, that this machine can link for a target and bundle libraries.

    Raises
    ------
    CompileError
        No linker for the target, or no libraries for a bundle for another architecture.
    """
    if bundle and (target.arch != host_arch() or sys.platform != "linux"):
        folder = native_folder(target.arch) / BUNDLE
        if not folder.is_dir():
            raise CompileError(
                f"--bundle needs the runtime libraries for {target.arch}, and there is no "
                f"{folder}; make it with runtime/native/build.sh {target.arch}, or compile without "
                "--bundle."
            )
    _linker(target)


def native_folder(arch: str) -> Path:
    """Return where `runtime/native/build.sh` puts what it makes for an architecture.

    It holds the program ``gqsa-run`` and, if the architecture is another than this machine's, the
    folder `BUNDLE` with TVM's runtime libraries. Nothing may be there yet.
    """
    return Path(runtime.__file__).parent / "native" / "build" / arch


def bundle_libraries(directory: Path) -> None:
    """Put into an artefact what runs it on a machine that has nothing installed.

    These are TVM's runtime libraries for the artefact's code, the program ``gqsa-run`` if it has
    been built, and, for its ``--chat``, what the chat template writes around a message.

    Raises
    ------
    CompileError
        A library is not there.
    """
    arch = _arch_of(next(directory.glob("model*.so")))
    native = native_folder(arch)
    if arch == host_arch():
        places = [_package(p) / "lib" for p in ("tvm", "tvm_ffi")]
    else:
        places = [native / BUNDLE]
    library = directory / BUNDLE
    library.mkdir()
    for name in (*RUNTIME_LIBRARIES, "libtvm_ffi.so"):
        found = [place / name for place in places if (place / name).is_file()]
        if not found:
            raise CompileError(f"{name} is not in {places[0]}; install it there again.")
        shutil.copy2(found[0], library / name)
    if (native / PROGRAM).is_file():
        shutil.copy2(native / PROGRAM, directory / PROGRAM)
    prompt = chat_prompt(directory)
    if prompt is not None:
        text = json.dumps(prompt, indent=1, ensure_ascii=False)
        (directory / CHAT_PROMPT).write_text(text + "\n", encoding="utf-8")


def chat_prompt(directory: Path) -> dict[str, str | bool] | None:
    """Find what an artefact's chat template writes around one message of a user.

    Parameters
    ----------
    directory : Path
        With the model's chat_template.jinja and tokenizer_config.json, if it has them.

    Returns
    -------
    dict or None
        ``before`` and ``after`` the message, and whether its white space is cut off (``trim``);
        None if there is no template, or one that does more to a message, or tells the date.
    """
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        source = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    template = load_template(directory, settings)
    if template is None or "strftime_now" in source:
        return None
    mark = "a message of nobody's"

    def render(content: str) -> str:
        return template.render([{"role": "user", "content": content}])

    try:
        text, spaced = render(mark), render(f" {mark} ")
    except GqsaError:
        return None
    if text.count(mark) != 1:
        return None
    before, after = text.split(mark)
    if spaced not in (text, f"{before} {mark} {after}"):
        return None
    return {"before": before, "after": after, "trim": spaced == text}


def _arch_of(library: Path) -> str:
    """Return the architecture that a shared library is for, by its ELF header."""
    machine = int.from_bytes(library.read_bytes()[18:20], "little")
    names = {62: "x86_64", 183: "aarch64"}
    if machine not in names:
        raise CompileError(f"{library} is for a machine (ELF {machine}) that has no bundles.")
    return names[machine]


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CompileError(f"The package {name} is not installed.")
    return Path(spec.origin).parent


__all__ = [
    "PARAMETERS",
    "RawTensor",
    "WeightLoader",
    "bundle_libraries",
    "export_library",
    "library_name",
    "packed_tensors",
]
