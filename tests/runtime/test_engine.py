from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.machine import Code
from gqsa_compiler.runtime.model import Model
from tests.runtime import toy
from tests.runtime.conftest import Arrays

TEXT = [int(i) for i in np.random.default_rng(5).integers(3, toy.VOCAB, toy.CONTEXT)]
EXACT = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order; the logits' spread is 4


@pytest.fixture(scope="module")
def expected(arrays: Arrays) -> np.ndarray:
    return toy.reference(arrays, TEXT)


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    session = model.session()
    yield session
    session.close()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40, toy.CONTEXT])
def test_chunked_prefill_is_one_prefill(session: Session, expected: np.ndarray, n: int) -> None:
    sequence = session.add()
    logits = session.prefill(sequence, TEXT[:n])
    assert logits.shape == (toy.VOCAB,)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[n - 1], **EXACT)
    assert session.length(sequence) == n


def test_a_sequence_grows_by_chunks_and_by_tokens(session: Session, expected: np.ndarray) -> None:
    sequence = session.add()
    session.prefill(sequence, TEXT[:20])
    np.testing.assert_allclose(session.prefill(sequence, TEXT[20:23]), expected[22], **EXACT)
    for i in range(23, 50):
        logits = session.decode([sequence], [TEXT[i]])
        np.testing.assert_allclose(logits[0], expected[i], **EXACT)
    np.testing.assert_allclose(session.prefill(sequence, TEXT[50:]), expected[-1], **EXACT)


def test_batch_is_its_singles(session: Session, arrays: Arrays) -> None:
    """Sequences of different lengths, decoded together in an order of their own."""
    texts = [TEXT[:33], TEXT[40:45], TEXT[90:91]]
    sequences = [session.add() for _ in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        session.prefill(sequence, text)
    for step in range(20):
        tokens = [TEXT[step], TEXT[step + 30], TEXT[step + 60]]
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        logits = session.decode(sequences[::-1], tokens[::-1])
        if step % 6 == 0:
            for row, text in zip(logits[::-1], texts, strict=True):
                np.testing.assert_allclose(row, toy.reference(arrays, text)[-1], **EXACT)


@pytest.mark.parametrize("n", [1, 16, 61, toy.CONTEXT])
def test_score(model: Model, expected: np.ndarray, n: int) -> None:
    blocks = list(model.score(np.array(TEXT[:n])))
    np.testing.assert_allclose(np.concatenate(blocks), expected[:n], **EXACT)


def test_score_stopped_early_frees_its_sequence(session: Session) -> None:
    for _ in range(2 * toy.BATCH):
        scores = session.score(TEXT)
        next(scores)
        scores.close()
    assert [session.add() for _ in range(toy.BATCH)]


def test_logits_are_tvm_memory_and_stay_valid(session: Session) -> None:
    sequence = session.add()
    first = session.prefill(sequence, TEXT[:5])
    kept = first.copy()
    assert not first.base.flags.owndata
    for token in TEXT[5:20]:
        session.decode([sequence], [token])
    np.testing.assert_array_equal(first, kept)


def test_pages_are_reused_and_the_batch_is_bounded(session: Session) -> None:
    for _ in range(3):
        full = [session.add() for _ in range(toy.BATCH)]
        for sequence in full:
            session.prefill(sequence, TEXT)
        with pytest.raises(UsageError, match="holds 3 sequences, all that max_batch allows"):
            session.add()
        for sequence in full:
            session.remove(sequence)
            session.remove(sequence)


def test_context_is_bounded(session: Session) -> None:
    sequence = session.add()
    words = r"The prompt has 97 tokens and the context 96; .* larger --context"
    with pytest.raises(UsageError, match=words):
        session.prefill(sequence, [*TEXT, 3])
    session.prefill(sequence, TEXT)
    with pytest.raises(UsageError, match=words):
        session.decode([sequence], [3])
    with pytest.raises(UsageError, match=words):
        list(session.score([*TEXT, 3]))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "prompt is empty"),
        ([[3]], r"must be a list of integers, not int64 \(1, 1\)"),
        ([3, toy.VOCAB], f"token id {toy.VOCAB}, and the model's vocabulary is 0 to"),
        ([-1, 3], "token id -1"),
        ([1.5], "must be a list of integers, not float64"),
    ],
)
def test_bad_tokens(session: Session, tokens: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        session.prefill(session.add(), tokens)


def test_a_cpu_chooses_no_tokens(session: Session) -> None:
    """It would give logits where tokens are expected."""
    sequence = session.add()
    session.prefill(sequence, TEXT[:4])
    with pytest.raises(UsageError, match="Only a GPU chooses tokens"):
        session.decode([sequence], [1], np.zeros((1, 5), np.float32))
    session.remove(sequence)


@pytest.mark.parametrize(
    ("sequences", "tokens", "words"),
    [
        ([0], list(range(32)), "32 tokens for 1 sequences"),
        ([0], [1, 2], "2 tokens for 1 sequences"),
        ([0, 1], [1], "1 tokens for 2 sequences"),
        ([], [1], "1 tokens for 0 sequences"),
        ([], [], "empty"),
        ([0, 0], [1, 1], "named twice"),
        ([9], [1], "no sequence 9999999"),
    ],
)
def test_bad_decodes(session: Session, sequences: list[int], tokens: list[int], words: str) -> None:
    opened = [session.add(), session.add()]
    for sequence in opened:
        session.prefill(sequence, TEXT[:4])
    asked = [opened[i] if i < len(opened) else 9_999_999 + i - 9 for i in sequences]
    with pytest.raises(UsageError, match=words):
        session.decode(asked, tokens)
    assert [session.length(sequence) for sequence in opened] == [4, 4]


def test_unknown_sequences(session: Session) -> None:
    with pytest.raises(UsageError, match="no sequence 12345"):
        session.length(12345)
    with pytest.raises(UsageError, match="no sequence 12345"):
        session.prefill(12345, [1])


def test_a_cache_that_does_not_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM says std::bad_alloc."""
    monkeypatch.setattr("gqsa_compiler.runtime.engine._limit", lambda *_: 1 << 40)
    with pytest.raises(UsageError, match=r"GB\) cannot be made: .* smaller context"):
        model.session()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"threads": 0}, "threads is 0 and this process may use"),
        ({"threads": 1000}, "threads is 1000 and this process may use"),
        ({"context_length": 97}, "context_length is 97 and the artefact was compiled for 1 to 96"),
        ({"context_length": 0}, "context_length is 0"),
        ({"max_batch": 4}, "max_batch is 4 and the artefact was compiled for 1 to 3"),
    ],
)
def test_bad_limits(model: Model, limits: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        model.session(**limits)


def test_smaller_limits(model: Model, expected: np.ndarray) -> None:
    session = model.session(threads=1, context_length=20, max_batch=1)
    sequence = session.add()
    np.testing.assert_allclose(session.prefill(sequence, TEXT[:20]), expected[19], **EXACT)
    with pytest.raises(UsageError, match="the context 20"):
        session.decode([sequence], [3])
    with pytest.raises(UsageError, match="1 sequences"):
        session.add()
    session.close()


@pytest.mark.parametrize("threads", range(1, 1 + min(4, len(os.sched_getaffinity(0)))))
def test_threads_are_the_session_s_own(model: Model, threads: int) -> None:
    """Each session has as many as it asked for, whatever others in the process have."""
    before = os.sched_getaffinity(0)
    session = model.session(threads=threads)
    count = session._on_thread(tvm_ffi.get_global_func("runtime.NumThreads"))
    assert (count, session.threads) == (threads, threads)
    assert os.sched_getaffinity(0) == before
    session.close()
    session.close()
    with pytest.raises(UsageError, match="session is closed"):
        session.add()


def test_two_python_threads_share_a_session(session: Session, expected: np.ndarray) -> None:
    results: dict[int, list[np.ndarray]] = {}

    def work(start: int) -> None:
        sequence = session.add()
        results[start] = [session.prefill(sequence, TEXT[:start])]
        for i in range(start, start + 20):
            results[start].append(session.decode([sequence], [TEXT[i]])[0])

    workers = [threading.Thread(target=work, args=(start,)) for start in (10, 30, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for start, rows in results.items():
        np.testing.assert_allclose(rows, expected[start - 1 : start + 20], **EXACT)


def test_an_instrument_sees_every_call(session: Session, expected: np.ndarray) -> None:
    """Before and after, on the session's thread, with the weights that it reads."""
    seen: list[tuple[str, bool, int]] = []
    read: set[int] = set()

    def look(function: object, name: str, before: bool, result: object, *arguments: Any) -> None:
        seen.append((name, before, threading.get_ident()))
        read.update(a.data_ptr() for a in arguments if isinstance(a, tvm_ffi.Tensor))

    session.set_instrument(look)
    sequence = session.add()
    np.testing.assert_allclose(session.prefill(sequence, TEXT[:9]), expected[8], **EXACT)
    np.testing.assert_allclose(session.decode([sequence], [TEXT[9]])[0], expected[9], **EXACT)
    assert {thread for _, _, thread in seen} == {session._on_thread(threading.get_ident)}
    before = [name for name, before, _ in seen if before]
    assert len(before) * 2 == len(seen)
    attention = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"
    assert before.count(attention) == 2 * toy.LAYERS
    assert read >= set(session.parameter_addresses.values())
    assert "head.weight" in session.parameter_addresses


def test_a_failing_pass_leaves_the_session_usable(session: Session, expected: np.ndarray) -> None:
    sequence = session.add()

    def fail(*args: object) -> None:
        raise RuntimeError("no such luck")

    session.prefill(sequence, TEXT[:5])
    with pytest.raises(RuntimeError, match="no such luck"):
        session._pass([sequence], np.array([3], np.int32), fail)
    assert session.length(sequence) == 5
    np.testing.assert_allclose(session.prefill(sequence, TEXT[5:9]), expected[8], **EXACT)
    empty = session.add()
    with pytest.raises(RuntimeError, match="no such luck"):
        session._pass([empty], np.array([3], np.int32), fail)
    np.testing.assert_allclose(session.prefill(empty, TEXT[:9]), expected[8], **EXACT)


@pytest.mark.parametrize("failing", [0, 1, 2, None])
def test_adapters_advance_together_or_not_at_all(
    session: Session, arrays: Arrays, failing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of three adapters, a pass each, one of which fails; then the same once more."""
    texts = [TEXT[:4], TEXT[10:30], TEXT[40:41]]
    sequences = [session.add() for _ in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        session.prefill(sequence, text)
    session._chosen = {sequences[0]: "one", sequences[2]: "two"}
    plain = Code("forward", session._parameters)
    monkeypatch.setattr(session, "_code", lambda name, sequence: plain)
    compute, passes = session._machine.compute, []

    def fail_once(*given: Any) -> np.ndarray:
        passes.append(given)
        if len(passes) - 1 == failing:
            raise RuntimeError("no such luck")
        return compute(*given)

    monkeypatch.setattr(session._machine, "compute", fail_once)
    if failing is not None:
        with pytest.raises(RuntimeError, match="no such luck"):
            session.decode(sequences, [7, 8, 9])
        assert len(passes) == failing + 1
    assert [session.length(s) for s in sequences] == [len(text) for text in texts]
    logits = session.decode(sequences, [7, 8, 9])
    for row, text, token in zip(logits, texts, [7, 8, 9], strict=True):
        np.testing.assert_allclose(row, toy.reference(arrays, [*text, token])[-1], **EXACT)


@pytest.mark.parametrize("n", range(1, 12))
def test_arguments_are_aligned(session: Session, n: int) -> None:
    """Compiled code may use aligned vector loads on every argument; numpy promises 16 bytes."""
    seen = []

    def look(tokens: tvm_ffi.Tensor, rows: tvm_ffi.Tensor, *rest: object) -> tvm_ffi.Tensor:
        seen.extend([tokens.data_ptr() % 64, rows.data_ptr() % 64])
        return tokens

    ids = np.arange(20, dtype=np.int32)[n : 2 * n]
    machine = session._machine
    machine._functions = {**machine._functions, "look": look}
    compute = partial(machine.compute, Code("look", None), ids[:1])
    np.testing.assert_array_equal(session._pass([session.add()], ids, compute), ids)
    assert seen == [0, 0]
