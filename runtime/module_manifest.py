"""`manifest.json` of a compiled module: any graph of tensors (`manifest.py` has a decoder's)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gqsa_compiler.runtime.checks import check_files
from gqsa_compiler.runtime.decoding import decode, plain
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.manifest import MANIFEST_FILE, MODULE_FORMAT, Document
from gqsa_compiler.runtime.schema import Kernel, Parameter, Variant, Versions

MODULE_FORMAT_VERSION = 1
_DTYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip
_MOST_RANK = 8
_MOST_SIZE = 1 << 31


@dataclass(frozen=True)
class ModuleTensor:
    """An input or output; each size is a number, or the name of one that varies (as text)."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """A size that varies, with the smallest and largest value that the code was compiled for."""

    name: str
    smallest: int
    largest: int


@dataclass(frozen=True)
class ModuleMemory:
    """The memory plan, in bytes; the workspace is that of the largest inputs."""

    weights_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class ModuleManifest(Document):
    """The whole of a module's `manifest.json`, format version 1."""

    producer: str
    versions: Versions
    variants: tuple[Variant, ...]
    name: str
    inputs: tuple[ModuleTensor, ...]
    outputs: tuple[ModuleTensor, ...]
    sizes: tuple[Size, ...]
    activations: str
    memory: ModuleMemory
    parameters_file: str
    parameters: tuple[Parameter, ...]
    kernels: tuple[Kernel, ...]

    @classmethod
    def from_dict(cls, data: Any, where: str = MANIFEST_FILE) -> ModuleManifest:
        """Check a decoded JSON document and build the manifest from it.

        Raises
        ------
        ArtefactError
            Another format or format version, a missing or unknown key, a value of a wrong type.

        """
        if not isinstance(data, Mapping) or data.get("format") != MODULE_FORMAT:
            raise ArtefactError(
                f"{where} is not the manifest of a compiled module; a language model is loaded "
                "with gqsa_compiler.runtime.load."
            )
        version = data.get("format_version")
        if version != MODULE_FORMAT_VERSION or type(version) is not int:
            raise ArtefactError(
                f"{where} has module format version {version!r} and this runtime reads version "
                f"{MODULE_FORMAT_VERSION}; compile the module again with this release of gqsa."
            )
        body = {k: v for k, v in data.items() if k not in ("format", "format_version")}
        manifest: ModuleManifest = decode(cls, body, where)
        manifest._check(where)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document: plain dictionaries, lists, strings and numbers."""
        head = {"format": MODULE_FORMAT, "format_version": MODULE_FORMAT_VERSION}
        return {**head, **plain(asdict(self))}

    def _check(self, where: str) -> None:
        check_files(self.variants, self.parameters_file, self.parameters, where)
        if not self.inputs or not self.outputs:
            raise ArtefactError(f"{where} lists no inputs or no outputs.")
        known = {size.name for size in self.sizes}
        for size in self.sizes:
            if not 0 < size.smallest <= size.largest < _MOST_SIZE:
                raise ArtefactError(
                    f"{where}: size {size.name} cannot go from {size.smallest} to {size.largest}."
                )
        for tensor in (*self.inputs, *self.outputs):
            if tensor.dtype not in _DTYPES or len(tensor.shape) > _MOST_RANK:
                raise ArtefactError(
                    f"{where}: {tensor.name} is {tensor.dtype} of rank {len(tensor.shape)}, which "
                    "is not supported."
                )
        for tensor in self.inputs:
            for text in tensor.shape:
                if text not in known and not (text.isdecimal() and len(text) < 11):
                    raise ArtefactError(f"{where}: {tensor.name} has the unknown size {text!r}.")
        if len({tensor.name for tensor in self.inputs}) != len(self.inputs):
            raise ArtefactError(f"{where} lists an input twice.")
