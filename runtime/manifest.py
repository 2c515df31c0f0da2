"""`manifest.json`: what an artefact is, what it needs, and what every byte of it should be.

The dataclasses below are the file's schema. `compile` fills them in and writes them; the runtime
reads them and believes nothing that does not fit: untrusted input ends in an `ArtefactError`.
"""

from __future__ import annotations

import json
import math
import stat
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.json_file import read_json

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "gqsa-artefact"
FORMAT_VERSION = 2
ADAPTERS_VERSION = 3
"""Of a manifest with adapters; one without stays what it was."""
MODULE_FORMAT = "gqsa-module"
"""What `format` says in the manifest of a compiled module (`module_manifest.py`)."""
MANIFEST_FILE = "manifest.json"
_MOST_VARIANTS = 64
_PAGE_MULTIPLE = 8  # what the attention kernels need
_INT64 = 1 << 63
_POSITIONS = "cos_sin"  # ends the names of the tables that have a row for each position
SCORE_ROWS = 64
"""Most rows of hidden states that one call of `logits` takes (or `max_batch`, if larger)."""


def is_artefact(path: str | Path) -> bool:
    """Tell whether a directory is a compiled artefact, by its manifest."""
    return (Path(path) / MANIFEST_FILE).is_file()


@dataclass(frozen=True)
class Versions:
    """Releases that the artefact was built with."""

    tvm: str
    tvm_ffi: str


@dataclass(frozen=True)
class Target:
    """The machine that a library was compiled for.

    `flags` are the CPU features it uses, by their names in /proc/cpuinfo; `device_type` is
    DLPack's number (1 is the CPU).
    """

    name: str
    kind: str
    arch: str
    flags: tuple[str, ...]
    device_type: int
    triple: str


@dataclass(frozen=True)
class Library:
    """The compiled code: a file of the artefact's directory and its SHA-256 in hexadecimal."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Variant:
    """The code for one target; all variants of an artefact read the same parameters."""

    target: Target
    library: Library


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of the model and the limits that it was compiled with, all counted in tokens."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    prefill_chunk: int
    max_batch: int
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    activations: str


@dataclass(frozen=True)
class KVCacheInfo:
    """How the paged key/value cache stores a token."""

    dtype: str
    page_size: int
    bytes_per_token: int


@dataclass(frozen=True)
class Memory:
    """The memory plan, in bytes; the workspace is that of the variant that needs most."""

    weights_bytes: int
    kv_cache_bytes_per_token: int
    workspace_bytes: int


@dataclass(frozen=True)
class Parameter:
    """One packed parameter, as it lies in the parameters file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Kernel:
    """Which kernel serves a layer, for reports; the runtime does not need it to run.

    `config` is what the first variant's code was built with. `weight` says how the checkpoint
    stores the weights (for instance ``bsr-int3``: groups of 3-bit codes); `bytes` is what one pass
    over the kernel's packed copy reads.
    """

    layer: str
    kernel: str
    layout_version: int
    config: dict[str, Any]
    n: int
    k: int
    weight: str
    group_size: int | None
    sparsity: float
    bytes: int
    fallback: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be chosen.

    `rank` is its largest; `parameters` names the tensors that the functions ``with_adapter_...``
    take after the model's own, in order: those of all adapters have the same shapes.
    """

    name: str
    rank: int
    parameters: tuple[str, ...]


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


def check_files(
    variants: Sequence[Variant],
    parameters_file: str,
    parameters: Sequence[Parameter],
    where: str,
) -> None:
    """Check what a manifest says of its files: plain names, none twice, and no parameter twice.

    Raises
    ------
    ArtefactError
        It does not hold.

    """
    if not 1 <= len(variants) <= _MOST_VARIANTS:
        raise ArtefactError(
            f"{where} lists {len(variants)} variants; 1 to {_MOST_VARIANTS} are allowed."
        )
    files = [v.library.file for v in variants]
    for values in ([v.target.name for v in variants], [*files, parameters_file]):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ArtefactError(f"{where} names {twice[0]!r} twice.")
    for name in (*files, parameters_file):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ArtefactError(f"{where} names the file {name!r}, which is not a plain name.")
    if len({p.name for p in parameters}) != len(parameters):
        raise ArtefactError(f"{where} lists a parameter twice.")


def check_adapters(
    adapters: Sequence[Adapter], parameters: Sequence[Parameter], where: str
) -> None:
    """Check that adapters fill the same places with tensors of their own.

    Compiled code reads them as the first adapter's shapes say.

    Raises
    ------
    ArtefactError
        They do not.

    """
    names = [name for adapter in adapters for name in adapter.parameters]
    last = [p.name for p in parameters[len(parameters) - len(names) :]]
    if len({a.name for a in adapters}) != len(adapters) or names != last:
        raise ArtefactError(
            f"{where}: the adapters' parameters are not the last ones, each adapter's in turn; "
            "compile the model again."
        )
    kinds = {p.name: (p.dtype, p.shape) for p in parameters}
    for adapter in adapters:
        first = [kinds[name] for name in adapters[0].parameters]
        if any(dtype not in ("float16", "float32") for dtype, _ in first):
            raise ArtefactError(f"{where}: an adapter's tensors are float16 or float32, no others.")
        if not first or [kinds[name] for name in adapter.parameters] != first:
            raise ArtefactError(
                f"{where}: the adapter {adapter.name!r} has tensors of other shapes than "
                f"{adapters[0].name!r}; compile the model again."
            )


def check_positions(parameters: Sequence[Parameter], context_length: int, where: str) -> None:
    """Check that tables of rotary embeddings have every position: code reads them unchecked.

    Raises
    ------
    ArtefactError
        One has fewer rows than the context has tokens.

    """
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.shape else 0
        if parameter.name.endswith(_POSITIONS) and rows < context_length:
            raise ArtefactError(
                f"{where}: parameter {parameter.name!r} has {rows} rows, fewer than the context "
                f"of {context_length} tokens."
            )


def decode(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON document against a schema of dataclasses and build it.

    Raises
    ------
    ArtefactError
        A missing or unknown key, or a value of a wrong type.

    """
    return _decode(kind, value, where, "")


def _decode(kind: Any, value: Any, where: str, key: str) -> Any:
    """Check `value` against a type annotation of the schema and convert it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):  # the schema has no union but `X | None`
        return None if value is None else _decode(args[0], value, where, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _decode_record(kind, value, where, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_decode(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:  # an exact type: True is no int here
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise ArtefactError(f"{where}: {key} does not fit into 64 bits.")
        return value
    expected = "a list" if origin is tuple else getattr(kind, "__name__", str(kind))
    raise ArtefactError(f"{where}: {key or 'the document'} should be {expected}, not {value!r}.")


def _decode_record(kind: Any, value: Mapping[str, Any], where: str, key: str) -> Any:
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING}
    for name in sorted(required - value.keys()):
        raise ArtefactError(f"{where} has no {prefix}{name}.")
    for name in sorted(map(str, value.keys() - hints.keys())):
        raise ArtefactError(f"{where} has the unknown key {prefix}{name}.")
    return kind(**{k: _decode(hints[k], v, where, prefix + k) for k, v in value.items()})


def plain(value: Any) -> Any:
    """Return plain dictionaries and lists of what `asdict` gives."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
