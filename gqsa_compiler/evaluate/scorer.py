"""One face for everything that can be evaluated: text to tokens, tokens to logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gqsa_compiler.errors import UsageError
from gqsa_compiler.runtime.manifest import is_artefact

if TYPE_CHECKING:
    from gqsa_compiler.frontends.source import ModelSource


class Scorer(Protocol):
    """A model that `evaluate` can score a text with."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def vocab_size(self) -> int:
        """Entries of a row of logits."""
        ...

    @property
    def context_length(self) -> int:
        """Longest window it takes, in tokens."""
        ...

    def tokenize(self, text: str) -> NDArray[np.int64]:
        """Cut a text into token ids, int64 [n], with the special tokens the model itself adds."""
        ...

    def logits(self, window: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each token of a window, int64 [n], some rows at a time.

        float32 [rows, vocabulary] each; together they have n rows.
        """
        ...


class TorchScorer:
    """A Hugging Face causal language model in PyTorch, float32 on the CPU."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self._name = name
        self._model = model.eval()
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def vocab_size(self) -> int:
        """Entries of a row of logits."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Longest window it takes, in tokens."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def tokenize(self, text: str) -> NDArray[np.int64]:
        """Cut a text into token ids, int64 [n]."""
        return np.asarray(self._tokenizer(text, verbose=False)["input_ids"], np.int64)

    def logits(self, window: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after every token of a window at once: float32 [n, vocabulary]."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(window))[None]
            found: NDArray[np.float32] = self._model(ids, use_cache=False).logits[0].numpy()
        yield found


class ArtefactScorer:
    """A compiled model, run by its own code."""

    def __init__(self, name: str, model: Any) -> None:
        self._name = name
        self._model = model

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def vocab_size(self) -> int:
        """Entries of a row of logits."""
        return int(self._model.manifest.model.vocab_size)

    @property
    def context_length(self) -> int:
        """Longest window it takes, in tokens."""
        return int(self._model.context_length)

    def tokenize(self, text: str) -> NDArray[np.int64]:
        """Cut a text into token ids, int64 [n]."""
        return np.asarray(self._model.tokenize(text), np.int64)

    def logits(self, window: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each token of a window: float32 [rows, vocabulary]."""
        yield from self._model.score(window)


def locate(model: str) -> Path | ModelSource:
    """Find a model without loading its weights.

    Parameters
    ----------
    model : str
        A dense model, a GQSA checkpoint or an artefact's directory.

    Returns
    -------
    Path or ModelSource
        A path for an artefact, a source for the others.

    Raises
    ------
    GqsaError
        There is no such model, or it is none.
    """
    if is_artefact(model):
        return Path(model)
    from gqsa_compiler.frontends.resolve import resolve

    return resolve(model)


def open_scorer(
    found: Path | ModelSource,
    *,
    threads: int | None = None,
    context: int | None = None,
    adapter: str | None = None,
) -> Scorer:
    """Load a model for evaluation.

    Parameters
    ----------
    found : Path or ModelSource
        From `locate`.
    threads : int, optional
        CPU threads; one for every core of this process by default.
    context : int, optional
        Longest window that will be asked for, in tokens; an artefact reserves memory for it.
    adapter : str, optional
        One of an artefact's.

    Raises
    ------
    GqsaError
        The model is damaged, or `context` is more than it can take.
    """
    if isinstance(found, Path):
        from gqsa_compiler import runtime

        model = runtime.load(
            found, threads=threads, context_length=context, max_batch=1, adapter=adapter
        )
        return ArtefactScorer(found.resolve().name, model)
    if adapter is not None:
        raise UsageError(
            f"{found.path} is no artefact, so there is no adapter to choose; compile it with "
            f"--adapter {adapter}=DIR."
        )
    return _open_torch(found, threads)


def _open_torch(source: ModelSource, threads: int | None) -> TorchScorer:
    import torch

    from gqsa_compiler.frontends.torch_model import load_dense

    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = load_dense(source, torch.float32)
    return TorchScorer(source.name, model, tokenizer)
