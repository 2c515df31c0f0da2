"""`manifest.json`: what an artefact is, what it needs, and what every byte of it should be.

Its schema is `Manifest` and the dataclasses of `schema`. `compile` fills them in and writes them;
the runtime reads them and believes nothing that does not fit: untrusted input ends in an
`ArtefactError`.
"""

from __future__ import annotations

import json
import math
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqsa_compiler.runtime.checks import check_adapters, check_files, check_positions
from gqsa_compiler.runtime.decoding import decode, plain
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.json_file import read_json
from gqsa_compiler.runtime.schema import (
    Adapter,
    Kernel,
    KVCacheInfo,
    Memory,
    ModelInfo,
    Parameter,
    Variant,
    Versions,
)

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "gqsa-artefact"
FORMAT_VERSION = 2
ADAPTERS_VERSION = 3
"""Of a manifest with adapters; one without stays what it was."""
MODULE_FORMAT = "gqsa-module"
"""What `format` says in the manifest of a compiled module (`module_manifest.py`)."""
MANIFEST_FILE = "manifest.json"
_PAGE_MULTIPLE = 8  # what the attention kernels need
SCORE_ROWS = 64
"""Most rows of hidden states that one call of `logits` takes (or `max_batch`, if larger)."""


def is_artefact(path: str | Path) -> bool:
    """Tell whether a directory is a compiled artefact, by its manifest."""
    return (Path(path) / MANIFEST_FILE).is_file()


class Document(ABC):
    """A manifest as a file: that of a language model or of a module."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Any, where: str = MANIFEST_FILE) -> Self:
        """Check a decoded JSON document and build the manifest from it."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document."""

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read `manifest.json` of an artefact directory.

        Raises
        ------
        ArtefactError
            There is no such directory or manifest, or `from_dict` refuses it.

        """
        return cls.from_dict(read_document(directory), str(Path(directory) / MANIFEST_FILE))

    def write(self, directory: str | Path) -> None:
        """Write `manifest.json` into an existing directory."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        (Path(directory) / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Manifest(Document):
    """The whole of `manifest.json`, format version 2, or 3 with adapters.

    `variants` are in order of preference, the most capable machine's first.
    """

    producer: str
    versions: Versions
    variants: tuple[Variant, ...]
    model: ModelInfo
    kv_cache: KVCacheInfo
    memory: Memory
    parameters_file: str
    parameters: tuple[Parameter, ...]
    kernels: tuple[Kernel, ...]
    bytes_per_token: int
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def from_dict(cls, data: Any, where: str = MANIFEST_FILE) -> Manifest:
        """Check a decoded JSON document and build the manifest from it.

        Raises
        ------
        ArtefactError
            Another format or format version, a missing or unknown key, a value of a wrong type.

        """
        if isinstance(data, Mapping) and data.get("format") == MODULE_FORMAT:
            raise ArtefactError(
                f"{where} is the manifest of a module, not of a language model; load it with "
                "gqsa_compiler.runtime.load_module."
            )
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ArtefactError(f"{where} is not the manifest of a GQSA artefact.")
        version = data.get("format_version")
        if version not in (1, FORMAT_VERSION, ADAPTERS_VERSION) or type(version) is not int:
            raise ArtefactError(
                f"{where} has artefact format version {version!r} and this runtime reads versions "
                f"1 to {ADAPTERS_VERSION}; compile the model again with this release of gqsa."
            )
        body = {k: v for k, v in data.items() if k not in ("format", "format_version")}
        if version == 1 and "variants" not in body:
            # Version 1 had the keys of the one variant at the top.
            body["variants"] = [{k: body.pop(k) for k in ("target", "library") if k in body}]
        if ("adapters" in body) != (version == ADAPTERS_VERSION):
            raise ArtefactError(
                f"{where}: format version {ADAPTERS_VERSION} has adapters, and no other has."
            )
        manifest: Manifest = decode(cls, body, where)
        manifest._check(where)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document: plain dictionaries, lists, strings and numbers."""
        fields = plain(asdict(self))
        if not self.adapters:
            del fields["adapters"]
        version = ADAPTERS_VERSION if self.adapters else FORMAT_VERSION
        return {"format": FORMAT, "format_version": version, **fields}

    def adapter_bytes(self, name: str | None) -> int:
        """Sum the bytes of an adapter's tensors; None is none."""
        own = {p for adapter in self.adapters if adapter.name == name for p in adapter.parameters}
        return sum(
            math.prod(p.shape) * int(p.dtype.removeprefix("float")) // 8
            for p in self.parameters
            if p.name in own
        )

    def _check(self, where: str) -> None:
        check_files(self.variants, self.parameters_file, self.parameters, where)
        check_adapters(self.adapters, self.parameters, where)
        model, cache = self.model, self.kv_cache
        # Beyond any model, and small enough for what TVM computes of them in 32 and 64 bits.
        bounded = {
            "model.vocab_size": (model.vocab_size, 1 << 24),
            "model.hidden_size": (model.hidden_size, 1 << 24),
            "model.context_length": (model.context_length, 1 << 27),
            "model.prefill_chunk": (model.prefill_chunk, 1 << 20),
            "model.max_batch": (model.max_batch, 1 << 16),
            "kv_cache.page_size": (cache.page_size, 1 << 12),
            "kv_cache.bytes_per_token": (cache.bytes_per_token, 1 << 40),
        }
        for key, (value, most) in bounded.items():
            if value < 1:
                raise ArtefactError(f"{where}: {key} is {value} and must be positive.")
            if value > most:
                raise ArtefactError(f"{where}: {key} is {value} and must be at most {most}.")
        if cache.page_size % _PAGE_MULTIPLE:
            raise ArtefactError(
                f"{where}: kv_cache.page_size is {cache.page_size} and must be a multiple of "
                f"{_PAGE_MULTIPLE}."
            )
        if model.max_batch > model.prefill_chunk:
            # Decoding puts one token of every sequence into a pass, which has room for a chunk.
            raise ArtefactError(
                f"{where}: model.max_batch is {model.max_batch} and must be at most "
                f"model.prefill_chunk, which is {model.prefill_chunk}; compile the model again."
            )
        # The embedding has a row for every token; of a token beyond it the last row would be taken.
        if not any(model.vocab_size in p.shape for p in self.parameters):
            raise ArtefactError(
                f"{where}: model.vocab_size is {model.vocab_size}, and no parameter has that many "
                "rows; copy or compile the artefact again."
            )
        check_positions(self.parameters, model.context_length, where)


def read_document(directory: str | Path) -> Any:
    """Read the JSON of `manifest.json` in an artefact directory.

    Raises
    ------
    ArtefactError
        There is no such directory or manifest, it is no JSON, or something in the directory is no
        file.

    """
    path = Path(directory) / MANIFEST_FILE
    if not path.parent.is_dir():
        raise ArtefactError(f"There is no artefact at {directory}: no such directory.")
    _check_kinds(path.parent)
    try:
        return read_json(path, distinct=True)
    except FileNotFoundError:
        raise ArtefactError(
            f"{directory} is not a compiled artefact: it has no {MANIFEST_FILE}. "
            "Make one with gqsa-compile."
        ) from None


def _check_kinds(directory: Path) -> None:
    """Refuse pipes and devices: to read one may never end."""
    try:
        found = sorted(directory.iterdir())
    except OSError:
        return  # whoever may not list it may still read the files
    for path in found:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nothing: whoever needs it tells
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ArtefactError(
                f"{path} is a pipe or a device and no file of an artefact's; copy the artefact "
                "again."
            )
