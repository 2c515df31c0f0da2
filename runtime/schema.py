"""What `manifest.json` is made of: each dataclass is an object of the file, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
