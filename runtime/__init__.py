"""Loads compiled artefacts and runs them; needs no compiler and no torch.

    >>> from gqsa_compiler import runtime
    >>> model = runtime.load("smollm2.gqsa")        # doctest: +SKIP
    >>> model.generate("The capital of France is", max_tokens=8).text   # doctest: +SKIP

Names are imported on first use, so that importing one small module of this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqsa_compiler.runtime.conversation import Conversation
    from gqsa_compiler.runtime.engine import Session
    from gqsa_compiler.runtime.errors import ArtefactError, GqsaError, UsageError
    from gqsa_compiler.runtime.generation import Generation, Options, Timings
    from gqsa_compiler.runtime.manifest import Manifest
    from gqsa_compiler.runtime.model import Model, load
    from gqsa_compiler.runtime.module import Module, load_module
    from gqsa_compiler.runtime.sampling import SamplingOptions
    from gqsa_compiler.runtime.stream import TextStream

__all__ = [
    "ArtefactError",
    "Conversation",
    "Generation",
    "GqsaError",
    "Manifest",
    "Model",
    "Module",
    "Options",
    "SamplingOptions",
    "Session",
    "TextStream",
    "Timings",
    "UsageError",
    "load",
    "load_module",
]

_MODULES = {
    "ArtefactError": "errors",
    "Conversation": "conversation",
    "Generation": "generation",
    "GqsaError": "errors",
    "Manifest": "manifest",
    "Model": "model",
    "Module": "module",
    "Options": "generation",
    "SamplingOptions": "sampling",
    "Session": "engine",
    "TextStream": "stream",
    "Timings": "generation",
    "UsageError": "errors",
    "load": "model",
    "load_module": "module",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
