"""A conversation computes only what is new, and answers as if it had computed all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.runtime import stream
from gqsa_compiler.runtime.adapters import Adapters
from gqsa_compiler.runtime.chat import ChatTemplate
from gqsa_compiler.runtime.conversation import Conversation
from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.generation import Generation
from gqsa_compiler.runtime.model import Model
from tests.runtime.toy import CHUNK, SPECIAL

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
Messages = list[dict[str, str]]


@pytest.fixture
def talk(model: Model) -> Iterator[Conversation]:
    with model.conversation() as talk:
        yield talk


@pytest.fixture
def _a_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model is so quick that it ends within one slice."""
    monkeypatch.setattr(stream, "_SLICE", 0.0)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ask(talk: Conversation, messages: Messages, **options: Any) -> Generation:
    """Have an answer added to the messages."""
    answer = talk.stream(messages, **{**GREEDY, **options})
    pieces = list(answer)
    assert "".join(pieces) == answer.result.text
    messages.append(say("assistant", answer.result.text))
    return answer.result


def shared(model: Model, cached: list[int], messages: Messages) -> int:
    """Count the tokens that a prompt begins with and the cache has."""
    prompt = model.tokenize_chat(messages)
    pairs = zip(cached, prompt[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(prompt) - 1))


def test_later_answers_are_those_of_the_whole_prompt(model: Model, talk: Conversation) -> None:
    messages: Messages = [say("system", "a")]
    cached: list[int] = []
    for content in ("the", "in", "an er"):
        messages.append(say("user", content))
        prompt, kept = model.tokenize_chat(messages), shared(model, cached, messages)
        whole = model.chat(messages, **GREEDY)
        found = ask(talk, messages)
        assert (found.text, found.token_ids) == (whole.text, whole.token_ids)
        assert found.prompt_tokens == whole.prompt_tokens == len(prompt)
        assert (found.cached_tokens, whole.cached_tokens) == (kept, 0)
        assert found.timings.prompt_tokens == len(prompt) - kept
        assert not cached or kept > CHUNK
        cached = prompt + list(found.token_ids)[: 6 - 1 if found.finish_reason == "length" else 6]


def test_only_what_is_new_is_computed(
    model: Model, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    run = Session._pass

    def counted(self: Session, sequences: Any, tokens: np.ndarray, *rest: Any) -> np.ndarray:
        computed.append(len(tokens))
        return run(self, sequences, tokens, *rest)

    monkeypatch.setattr(Session, "_pass", counted)
    messages = [say("user", "the man in the inner")]
    first = ask(talk, messages, max_tokens=1)
    assert sum(computed) == first.prompt_tokens > CHUNK
    computed.clear()
    again = ask(talk, messages[:1], max_tokens=1)
    assert again.token_ids == first.token_ids
    assert computed == [1], "the last token of the prompt, whose logits are wanted"
    assert again.cached_tokens == again.prompt_tokens - 1


@pytest.mark.usefixtures("_a_step_at_a_time")
def test_an_answer_that_was_stopped_is_gone_on_from(model: Model, talk: Conversation) -> None:
    messages = [say("user", "the")]
    answer = talk.stream(messages, **{**GREEDY, "max_tokens": 40})
    said = next(answer)
    messages += [say("assistant", said), say("user", "in")]
    whole = model.chat(messages, **GREEDY)
    found = ask(talk, messages)
    assert found.token_ids == whole.token_ids
    assert found.cached_tokens > 4
    with pytest.raises(UsageError, match="Another answer of this conversation has begun"):
        list(answer)
    # ... which did the newer one no harm.
    messages.append(say("user", "x"))
    assert ask(talk, messages).cached_tokens > found.cached_tokens


def test_a_template_that_rewrites_what_was_said(
    model: Model, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that leave out what a model thought earlier: from there on all is computed."""
    source = (
        "{% for m in messages %}" + SPECIAL[1] + "{{ m['role'] if loop.last else 'x' }}"
        "{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(model, "chat_template", ChatTemplate(source, {}))
    messages = [say("user", "the")]
    ask(talk, messages)
    messages.append(say("user", "in"))
    whole = model.chat(messages, **GREEDY)
    found = ask(talk, messages)
    assert (found.token_ids, found.cached_tokens) == (whole.token_ids, 1)


def test_another_adapter_computes_everything(
    model: Model, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the cache is what another model has computed."""
    asked: list[str | None] = []
    add = Session.add

    def added(self: Session, adapter: str | None = None) -> int:
        asked.append(adapter)
        return add(self)

    monkeypatch.setattr(Session, "add", added)
    monkeypatch.setattr(Adapters, "check", lambda self, name: None)
    messages = [say("user", "the")]
    for adapter, kept in (("a", False), ("a", True), ("b", False), (None, False), (None, True)):
        assert (ask(talk, messages[:], adapter=adapter).cached_tokens > 0) == kept
    assert asked == ["a", "b", None]


def test_a_pass_that_fails_ends_what_is_cached(
    model: Model, talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [say("user", "the")]
    first = ask(talk, messages[:])

    def fails(self: Session, *rest: Any) -> np.ndarray:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "decode", fails)
        with pytest.raises(RuntimeError, match="broken"):
            ask(talk, messages[:])
    again = ask(talk, messages)
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 0)


@pytest.mark.usefixtures("_a_step_at_a_time")
def test_it_has_one_place_of_the_cache(model: Model) -> None:
    others = [model.conversation() for _ in range(model.manifest.model.max_batch + 1)]
    for talk in others[:-1]:
        ask(talk, [say("user", "the")], max_tokens=1)
    with pytest.raises(UsageError, match="holds 3 sequences"):
        ask(others[-1], [say("user", "the")])
    answer = others[0].stream([say("user", "in")], **GREEDY)
    next(answer)
    others[0].close()
    others[0].close()
    with pytest.raises(UsageError, match="or it was closed"):
        list(answer)
    assert ask(others[-1], [say("user", "the")]).cached_tokens == 0
    for talk in others:
        talk.close()
    assert model.generate("the", **GREEDY).token_ids


def test_what_cannot_be_answered_leaves_the_rest(model: Model, talk: Conversation) -> None:
    messages = [say("user", "the")]
    ask(talk, messages)
    with pytest.raises(UsageError, match="no room for an answer"):
        talk.stream([*messages, say("user", "x" * 200)])
    messages.append(say("user", "in"))
    assert ask(talk, messages).cached_tokens > 4


def test_rewinding(model: Model) -> None:
    tokens = model.tokenize("the man in the inner there, and the man in there")
    assert len(tokens) > 16 + 5, "more than a page"
    with closing(model.session(max_batch=1)) as session:
        sequence = session.add()
        want = session.prefill(sequence, tokens).copy()
        session.rewind(sequence, len(tokens))
        for length in (17, 5, 0):
            session.rewind(sequence, length)
            assert session.length(sequence) == length
            again = session.prefill(sequence, tokens[length:])
            np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-4)
        for length in (-1, len(tokens) + 1):
            with pytest.raises(UsageError, match=f"; {length} cannot stay"):
                session.rewind(sequence, length)
        with pytest.raises(UsageError, match="no sequence 99"):
            session.rewind(99, 0)
