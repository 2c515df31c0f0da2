"""The rule of `gqsa eval`, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.evaluate import scoring
from gqsa_compiler.evaluate.scoring import cut_windows, evaluate

VOCAB = 7


class Table:
    """A scorer whose next-token distribution depends on the last token only."""

    def __init__(
        self,
        logits: NDArray[np.float32],
        *,
        name: str = "table",
        context_length: int = 64,
        piece: int = 3,
        shift: int = 0,
    ) -> None:
        self.table = logits
        self.name = name
        self.vocab_size = logits.shape[1]
        self.context_length = context_length
        self._piece = piece
        self._shift = shift

    def tokenize(self, text: str) -> NDArray[np.int64]:
        return np.array([(int(c) + self._shift) % VOCAB for c in text], np.int64)

    def logits(self, window: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        rows = self.table[window]
        for start in range(0, len(rows), self._piece):
            yield rows[start : start + self._piece]


def _random_table(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)).astype(np.float32) * 3


def _text(length: int) -> str:
    return "".join(str(d) for d in np.random.default_rng(5).integers(0, VOCAB, length))


def _slow(tokens: list[int], context: int, table: NDArray[np.float32]) -> list[float]:
    """NLL of every scored token, one by one in float64."""
    found = []
    for start in range(0, len(tokens) - context + 1, context):
        for i in range(start + 1, start + context):
            row = table[tokens[i - 1]].astype(np.float64)
            found.append(math.log(np.exp(row).sum()) - row[tokens[i]])
    return found


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = evaluate(Table(np.zeros((VOCAB, VOCAB), np.float32)), _text(40), context=8)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(0, abs=1e-5)
    assert (result.tokens, result.windows, result.context) == (35, 5, 8)
    assert result.kl_divergence is None


@pytest.mark.parametrize("rows", [1, 4, 128])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_perplexity_and_its_error(monkeypatch: pytest.MonkeyPatch, rows: int, piece: int) -> None:
    monkeypatch.setattr(scoring, "_ROWS", rows)
    table, text = _random_table(1), _text(50)
    result = evaluate(Table(table, piece=piece), text, context=9)
    nll = _slow([int(c) for c in text], 9, table)
    assert result.tokens == len(nll) == 5 * 8
    assert result.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    error = math.exp(np.mean(nll)) * np.std(nll, ddof=1) / math.sqrt(len(nll))
    assert result.perplexity_stderr == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("pieces", "rows"), [((3, 5), 4), ((100, 1), 128), ((1, 7), 2)])
def test_divergence_from_a_reference(
    monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, int], rows: int
) -> None:
    monkeypatch.setattr(scoring, "_ROWS", rows)
    ours, theirs, text = _random_table(1), _random_table(2), _text(30)
    result = evaluate(
        Table(ours, piece=pieces[0]), text, context=10, reference=Table(theirs, piece=pieces[1])
    )
    p = np.exp(theirs.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    q = np.exp(ours.astype(np.float64))
    q /= q.sum(1, keepdims=True)
    tokens = [int(c) for c in text]
    each = [(p[t] * np.log(p[t] / q[t])).sum() for i, t in enumerate(tokens) if i % 10 != 9]
    assert result.kl_divergence == pytest.approx(np.mean(each), rel=1e-5)
    error = np.std(each, ddof=1) / math.sqrt(len(each))
    assert result.kl_divergence_stderr == pytest.approx(error, rel=1e-4)
    assert result.reference_perplexity == pytest.approx(
        math.exp(np.mean(_slow(tokens, 10, theirs))), rel=1e-5
    )


def test_a_model_does_not_diverge_from_itself() -> None:
    table = Table(_random_table(3))
    result = evaluate(table, _text(40), context=8, reference=table)
    assert result.kl_divergence == pytest.approx(0, abs=1e-6)
    assert result.reference_perplexity == pytest.approx(result.perplexity)


def test_json_names() -> None:
    table = Table(_random_table(3))
    alone = evaluate(table, _text(40), context=8).to_dict()
    assert list(alone) == ["perplexity", "perplexity_stderr", "tokens", "windows", "context"]
    assert "kl_divergence" in evaluate(table, _text(40), context=8, reference=table).to_dict()


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    windows = cut_windows(np.arange(11), 4)
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(np.arange(11), 4, limit=1).tolist() == [[0, 1, 2, 3]]
    assert cut_windows(np.arange(11), 4, limit=9).shape == (2, 4)


def test_default_context_is_the_models_when_it_is_short() -> None:
    table = Table(_random_table(3), context_length=6)
    assert evaluate(table, _text(40)).context == 6
    shorter = Table(_random_table(3), context_length=5)
    assert evaluate(table, _text(40), reference=shorter).context == 5


def test_progress_reaches_its_total() -> None:
    calls: list[tuple[str, int, int]] = []
    table = Table(_random_table(3))
    evaluate(table, _text(40), context=8, progress=lambda *call: calls.append(call))
    assert calls == [("Scoring windows", i, 5) for i in range(6)]


@pytest.mark.parametrize(
    ("text", "context", "words"),
    [
        (_text(7), 8, "7 tokens, fewer than one window of 8"),
        (_text(99), 65, "--context 65 is more than table can take"),
        (_text(99), 1, "at least 2 tokens"),
        ("", 8, "0 tokens"),
    ],
)
def test_bad_requests(text: str, context: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(Table(_random_table(1)), text, context=context)


def test_a_reference_must_share_the_tokeniser() -> None:
    table = _random_table(1)
    with pytest.raises(UsageError, match="different tokens"):
        evaluate(Table(table), _text(40), context=8, reference=Table(table, shift=1))
    wide = np.zeros((VOCAB, VOCAB + 1), np.float32)
    with pytest.raises(UsageError, match="vocabulary of 8 and table of 7"):
        evaluate(Table(table), _text(40), context=8, reference=Table(wide, name="wide"))


def test_broken_logits_are_an_error() -> None:
    table = np.full((VOCAB, VOCAB), np.nan, np.float32)
    with pytest.raises(ModelError, match="not finite"):
        evaluate(Table(table), _text(40), context=8)
