"""Perplexity over a text, its standard error, and the divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.evaluate.scorer import Scorer, locate, open_scorer
from gqsa_compiler.progress import Progress

# The context of published WikiText perplexities; a model with a shorter one uses its own.
DEFAULT_CONTEXT = 2048
# Rows of logits worked on at once: 128 rows of a 256k vocabulary are 128 MiB of float32.
_ROWS = 128


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Parameters
    ----------
    perplexity : float
        exp of the mean negative log-likelihood of the scored tokens.
    perplexity_stderr : float
        Its standard error by the delta method: ``perplexity * s / sqrt(tokens)``, where s is the
        sample standard deviation of the tokens' negative log-likelihoods. Tokens count as
        independent, so it says how far the text could have moved the figure, no more.
    tokens : int
        Scored tokens: ``windows * (context - 1)``.
    windows, context : int
        Windows scored, and tokens in each.
    kl_divergence : float or None
        Mean over the scored tokens of KL(reference || model), in nats; None without a reference.
    kl_divergence_stderr : float or None
        Standard error of that mean.
    reference_perplexity : float or None
        The reference's perplexity on the same tokens.
    """

    perplexity: float
    perplexity_stderr: float
    tokens: int
    windows: int
    context: int
    kl_divergence: float | None = None
    kl_divergence_stderr: float | None = None
    reference_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; those of a missing reference are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def cut_windows(
    tokens: NDArray[np.int64], context: int, limit: int | None = None
) -> NDArray[np.int64]:
    """Cut a text into consecutive windows that do not overlap.

    Parameters
    ----------
    tokens : numpy.ndarray
        Token ids, int64 [n].
    context : int
        Tokens in a window, at least 2.
    limit : int, optional
        Keep the first ``limit`` windows only.

    Returns
    -------
    numpy.ndarray
        int64 [windows, context]; a last partial window is dropped.

    Raises
    ------
    UsageError
        The text does not fill one window.
    """
    count = len(tokens) // context
    if count == 0:
        raise UsageError(
            f"The text has {len(tokens)} tokens, fewer than one window of {context}; "
            "give a longer text or a smaller --context."
        )
    if limit is not None:
        count = min(count, limit)
    return tokens[: count * context].reshape(count, context)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log-probabilities: float32 [rows, vocabulary] to the same shape."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def _check_same_tokens(model: Scorer, reference: Scorer, text: str, tokens: Any) -> None:
    if model.vocab_size != reference.vocab_size:
        raise UsageError(
            f"{reference.name} has a vocabulary of {reference.vocab_size} and {model.name} of "
            f"{model.vocab_size}; a reference must share the model's tokeniser."
        )
    if not np.array_equal(reference.tokenize(text), tokens):
        raise UsageError(
            f"{reference.name} and {model.name} cut the text into different tokens; "
            "a reference must share the model's tokeniser."
        )


def _blocks(pieces: Iterator[NDArray[np.float32]], count: int) -> Iterator[NDArray[np.float32]]:
    """Regroup the first `count` rows of logits into blocks of `_ROWS`, the last one shorter."""
    waiting: list[NDArray[np.float32]] = []
    have = 0
    for piece in pieces:
        while len(piece) and count:
            taken = piece[: min(_ROWS, count) - have]
            piece = piece[len(taken) :]
            waiting.append(taken)
            have += len(taken)
            if have == min(_ROWS, count):
                yield np.concatenate(waiting) if len(waiting) > 1 else taken
                count -= have
                waiting, have = [], 0


def _score_window(
    window: NDArray[np.int64], model: Scorer, reference: Scorer | None
) -> NDArray[np.float64]:
    """Return float64 [3, context - 1]: the model's and the reference's NLL, and the divergence."""
    targets = window[1:, None]
    result = np.zeros((3, len(targets)), np.float64)
    ours = _blocks(model.logits(window), len(targets))
    theirs = None if reference is None else _blocks(reference.logits(window), len(targets))
    for start, block in zip(range(0, len(targets), _ROWS), ours, strict=True):
        rows = slice(start, start + len(block))
        logs = log_softmax(block)
        result[0, rows] = -np.take_along_axis(logs, targets[rows], axis=1)[:, 0]
        if theirs is None:
            continue
        wanted = log_softmax(next(theirs))
        result[1, rows] = -np.take_along_axis(wanted, targets[rows], axis=1)[:, 0]
        result[2, rows] = (np.exp(wanted) * (wanted - logs)).sum(axis=1, dtype=np.float64)
    return result


def evaluate(
    model: Scorer,
    text: str,
    *,
    context: int | None = None,
    reference: Scorer | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Score a text with an open model; see `perplexity` for the rule and the arguments.

    Raises
    ------
    UsageError
        The text is shorter than a window, the context longer than a model's, or the reference
        has another tokeniser.
    ModelError
        The model's logits are not finite.
    """
    longest = min(s.context_length for s in (model, reference) if s is not None)
    size = min(DEFAULT_CONTEXT, longest) if context is None else context
    if size < 2:
        raise UsageError(f"A window needs at least 2 tokens, not {size}; raise --context.")
    for scorer in (model, reference):
        if scorer is not None and size > scorer.context_length:
            raise UsageError(
                f"--context {size} is more than {scorer.name} can take "
                f"({scorer.context_length} tokens)."
            )
    tokens = model.tokenize(text)
    if reference is not None:
        _check_same_tokens(model, reference, text, tokens)
    windows = cut_windows(tokens, size, limit)
    scores = np.empty((3, len(windows), size - 1), np.float64)
    for index, window in enumerate(windows):
        if progress is not None:
            progress("Scoring windows", index, len(windows))
        scores[:, index] = _score_window(window, model, reference)
    if progress is not None:
        progress("Scoring windows", len(windows), len(windows))

    mean, error = _mean_and_error(scores[0].ravel())
    if not math.isfinite(mean):
        raise ModelError(f"{model.name} gives logits that are not finite; its weights are damaged.")
    value = math.exp(min(mean, 700.0))
    found = EvalResult(value, value * error, scores[0].size, len(windows), size)
    if reference is None:
        return found
    divergence, divergence_error = _mean_and_error(scores[2].ravel())
    return EvalResult(
        **found.to_dict(),
        # A model's divergence from itself comes out a rounding below 0.
        kl_divergence=max(divergence, 0.0),
        kl_divergence_stderr=divergence_error,
        reference_perplexity=math.exp(min(float(scores[1].mean()), 700.0)),
    )


def perplexity(
    model: str,
    text: str,
    context: int | None = None,
    *,
    reference: str | None = None,
    limit: int | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure a model's perplexity on a text.

    The text is cut into tokens once, as the model's tokeniser does it by itself, and then into
    consecutive windows of ``context`` tokens that do not overlap. The first token of a window is
    not scored, and a last partial window is dropped.

    Parameters
    ----------
    model : str
        A dense model, a GQSA checkpoint (both run in PyTorch, float32) or an artefact (run by
        its own compiled code).
    text : str
        The text itself, not its path.
    context : int, optional
        Tokens in a window; 2048 or the model's own context, whichever is less, by default.
    reference : str, optional
        A model with the same tokeniser, to measure KL(reference || model) against.
    limit : int, optional
        Score the first ``limit`` windows only.
    threads : int, optional
        CPU threads.
    adapter : str, optional
        One of the artefact's, for `model`; the model alone unless given.
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    GqsaError
        A model cannot be read, or the request does not fit it.
    """
    # Both are found before either is loaded, which may take minutes.
    found, found_reference = locate(model), None if reference is None else locate(reference)
    if progress is not None:
        progress("Loading the model", 0, 0)
    scorer = open_scorer(found, threads=threads, context=context, adapter=adapter)
    other = None
    if found_reference is not None:
        if progress is not None:
            progress("Loading the reference", 0, 0)
        other = open_scorer(found_reference, threads=threads, context=context)
    return evaluate(scorer, text, context=context, reference=other, limit=limit, progress=progress)
