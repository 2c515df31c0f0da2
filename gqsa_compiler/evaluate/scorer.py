"""One face for everything that can be evaluated: text to tokens, tokens to logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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
            found: NDArray[np.float32] = self._model(ids, use_cache=False).logits[0].float().numpy()
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


def open_scorer(model: str, *, threads: int | None = None, context: int | None = None) -> Scorer:
    """Open a model for evaluation.

    Parameters
    ----------
    model : str
        A dense model, a GQSA checkpoint or an artefact's directory.
    threads : int, optional
        CPU threads; every physical core by default.
    context : int, optional
        Longest window that will be asked for, in tokens; an artefact reserves memory for it.

    Raises
    ------
    GqsaError
        The model cannot be read.
    """
    if (Path(model) / "manifest.json").is_file():
        from gqsa_compiler import runtime

        loaded = runtime.load(model, threads=threads, context_length=context, max_batch=1)
        return ArtefactScorer(Path(model).resolve().name, loaded)
    return _open_torch(model, threads)


def _open_torch(model: str, threads: int | None) -> TorchScorer:
    import torch

    from gqsa_compiler.frontends.source import resolve
    from gqsa_compiler.frontends.torch_model import load_checkpoint_dense, load_dense

    if threads is not None:
        torch.set_num_threads(threads)
    source = resolve(model)
    if source.checkpoint is None:
        dense, tokenizer = load_dense(source)
        return TorchScorer(source.name, dense.float(), tokenizer)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path)
    return TorchScorer(source.name, load_checkpoint_dense(source), tokenizer)
