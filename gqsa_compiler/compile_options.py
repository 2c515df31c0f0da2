"""What a compilation may be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gqsa_compiler.errors import UsageError
from gqsa_compiler.schedules.activations import (
    check_activations,
    check_shared_weights,
    default_activations,
)
from gqsa_compiler.schedules.kv_cache import DTYPES, CacheDtype
from gqsa_compiler.schedules.low_rank.spec import LowRankDtype
from gqsa_compiler.targets import TargetSpec

if TYPE_CHECKING:
    from gqsa_compiler.schedules.spec import ActivationDtype

HEADS = ("int8", "stored")
ADAPTER_DTYPES = ("float16", "float32")
ACTIVATIONS = ("auto", "float32", "float16", "int16", "int8")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Parameters
    ----------
    target : str
        A TARGET name, see docs/targets.md; or several with commas between them, for an artefact
        with code for each.
    context_length : int or None
        Longest sequence in tokens; None is the model's own, at most
        `gqsa_compiler.frontends.hf.DEFAULT_CONTEXT`.
    prefill_chunk : int
        Most tokens of a prompt that one call takes.
    max_batch : int
        Most sequences at once.
    activations : str
        What compressed layers round their inputs to, on the fly: ``float32`` (nothing), ``int16``
        (a scale a token; x86-64 with AVX2, 64-bit Arm and GPUs), ``int8`` (a scale for 8 columns;
        on Arm with dot products one a token), ``float16`` (GPUs); ``auto`` is ``float16`` on GPUs,
        ``int16`` where the target has kernels for it and ``float32`` elsewhere.
    head : str
        The language-model head of a compressed model: ``int8`` rounds it to 8 bits, ``stored``
        leaves it as it is.
    kv_cache : str
        What keys and values are kept in: ``float16`` (rounded) or ``float32``.
    bundle : bool
        Add TVM's runtime libraries and the native program; always so for a linked target.
    no_fallback : bool
        Fail when a layer that the checkpoint does not list under `ignore` stays dense.
    debug_dump : path or None
        Directory for the module after each phase.
    database : path or None
        What `gqsa tune` has measured; kernels' configurations are chosen by it, and by what is
        shipped for this processor.
    chip : str or None
        The processor to take measurements of, see `gqsa_compiler.tuning.lookup.open_tuned`.
    adapters : mapping of str to path, or None
        LoRA adapters (PEFT directories) by name; one of them, or none, is chosen at run time.
    merge_adapter : path or None
        A LoRA adapter that is always on.
    adapter_dtype : str
        What adapters are stored in: ``float16`` or ``float32``.
    """

    target: str = "cpu"
    context_length: int | None = None
    prefill_chunk: int = 512
    max_batch: int = 4
    activations: ActivationDtype | Literal["auto"] = "auto"
    head: Literal["int8", "stored"] = "int8"
    kv_cache: CacheDtype = "float16"
    bundle: bool = False
    no_fallback: bool = False
    debug_dump: Path | None = None
    database: Path | None = None
    chip: str | None = None
    adapters: Mapping[str, str | Path] | None = None
    merge_adapter: str | Path | None = None
    adapter_dtype: LowRankDtype = "float16"


def check_options(options: CompileOptions, targets: tuple[TargetSpec, ...]) -> None:
    """Check the options against each other and the targets.

    Raises
    ------
    UsageError
        One of them cannot be.
    """
    for name in ("prefill_chunk", "max_batch", "context_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', ' ')} is {value}; it must be at least 1.")
    if options.max_batch > options.prefill_chunk:
        raise UsageError(
            f"max batch is {options.max_batch}, more than the prefill chunk "
            f"{options.prefill_chunk}; raise --prefill-chunk or lower --max-batch."
        )
    if options.activations not in ACTIVATIONS:
        raise UsageError(
            f"Unknown activations {options.activations!r}; choose one of {', '.join(ACTIVATIONS)}."
        )
    if options.head not in HEADS:
        raise UsageError(f"Unknown head {options.head!r}; choose one of {', '.join(HEADS)}.")
    if options.kv_cache not in DTYPES:
        raise UsageError(
            f"Unknown KV cache {options.kv_cache!r}; choose one of {', '.join(DTYPES)}."
        )
    if options.adapter_dtype not in ADAPTER_DTYPES:
        raise UsageError(
            f"Unknown adapter dtype {options.adapter_dtype!r}; choose one of "
            f"{', '.join(ADAPTER_DTYPES)}."
        )
    if options.adapter_dtype != "float16" and not (options.adapters or options.merge_adapter):
        raise UsageError(
            f"The adapter dtype {options.adapter_dtype} needs an adapter (--adapter or "
            "--merge-adapter)."
        )
    if options.adapters and options.merge_adapter is not None:
        raise UsageError(
            "An adapter cannot be merged into a model that has others to choose from; give all of "
            "them with --adapter, or one with --merge-adapter."
        )
    on_gpu = [target.name for target in targets if target.kind == "cuda"]
    if on_gpu and options.kv_cache != "float16":
        raise UsageError(
            f"On a GPU ({on_gpu[0]}) keys and values are kept in float16, not in "
            f"{options.kv_cache}; leave --kv-cache out."
        )
    if options.activations != "auto":
        for target in targets:
            check_activations(options.activations, target)
    check_shared_weights(activations_of(options, targets), targets)


def activations_of(options: CompileOptions, targets: tuple[TargetSpec, ...]) -> ActivationDtype:
    """Return what compressed layers round their inputs to, on every target."""
    wanted = options.activations
    return default_activations(targets[-1]) if wanted == "auto" else wanted
