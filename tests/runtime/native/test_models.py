"""Whole models in one process: made again in place, passes that fail, callbacks that stop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler._tvm import nn
from tests.runtime import toy
from tests.runtime.native.programs import Probe, Programs, generated

PROMPT = "the man in the inner"
TOKENS = list(range(40, 80))
GREEDY = {"prompt": PROMPT, "max_tokens": 12}


@pytest.fixture
def own(programs: Programs) -> Iterator[Probe]:
    """Return a probe of this test's own, for what stays changed in its process."""
    with Probe(programs.probe) as probe:
        yield probe


class _Turned(toy.Toy):
    """The toy model with logits of the other sign: other code, and the same weights."""

    def logits(self, hidden: Any) -> Any:
        return nn.op.negative(super().logits(hidden))


def test_an_artefact_made_again_runs_its_new_code(
    own: Probe, programs: Programs, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server that loads its model anew: the loader of the system knows libraries by name."""
    own.ask("load", model="first", directory=str(copy))
    old = own.ask("generate", model="first", **GREEDY)["token_ids"]
    monkeypatch.setattr(toy, "Toy", _Turned)
    toy.write_artefact(tmp_path / "made")
    shutil.rmtree(copy)
    (tmp_path / "made").rename(copy)
    own.ask("load", model="second", directory=str(copy))
    new = own.ask("generate", model="second", **GREEDY)["token_ids"]
    words = ["-p", PROMPT, "--max-tokens", "12"]
    assert new == generated(programs, copy, *words)["token_ids"]
    assert new != old
    assert own.ask("generate", model="first", **GREEDY)["token_ids"] == old
    own.ask("free", model="first")
    assert own.ask("generate", model="second", **GREEDY)["token_ids"] == new


@pytest.fixture
def failing(own: Probe, artefact: Path) -> Probe:
    """Load the toy twice: as `plain`, and as `failing`, whose attention fails when it is told."""
    own.ask("load", model="plain", directory=str(artefact))
    own.ask("fail", calls=0)
    own.ask("load", model="failing", directory=str(artefact))
    return own


def _expected(probe: Probe, *prompts: list[int]) -> list[list[float]]:
    """Return the last logits of each prompt, from the model that does not fail."""
    logits = []
    for tokens in prompts:
        sequence = probe.ask("open", model="plain")
        logits.append(probe.ask("prefill", model="plain", sequence=sequence, tokens=tokens))
        probe.ask("close", model="plain", sequence=sequence)
    return logits


# In the first layer, when the second has seen nothing of the pass, and in the second.
@pytest.mark.parametrize("calls", range(1, toy.LAYERS + 1))
def test_a_failing_pass_leaves_no_tokens(failing: Probe, calls: int) -> None:
    want, empty = _expected(failing, TOKENS[:9], TOKENS[:6])
    sequence = failing.ask("open", model="failing")
    failing.ask("prefill", model="failing", sequence=sequence, tokens=TOKENS[:5])
    failing.ask("fail", calls=calls)
    said = failing.error("prefill", model="failing", sequence=sequence, tokens=[3, 4])
    assert "no such luck" in said
    failing.ask("fail", calls=calls)
    failing.error("step", model="failing", sequences=[sequence], tokens=[3])
    got = failing.ask("prefill", model="failing", sequence=sequence, tokens=TOKENS[5:9])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    other = failing.ask("open", model="failing")
    failing.ask("fail", calls=calls)
    failing.error("prefill", model="failing", sequence=other, tokens=[3])
    got = failing.ask("prefill", model="failing", sequence=other, tokens=TOKENS[:6])
    np.testing.assert_allclose(got, empty, rtol=1e-5, atol=1e-5)


def test_a_failing_pass_of_several_sequences(failing: Probe) -> None:
    wanted = _expected(failing, [*TOKENS[:5], 7], [*TOKENS[:8], 9])
    sequences = [failing.ask("open", model="failing") for _ in range(2)]
    for sequence, size in zip(sequences, (5, 8), strict=True):
        failing.ask("prefill", model="failing", sequence=sequence, tokens=TOKENS[:size])
    failing.ask("fail", calls=2)
    failing.error("step", model="failing", sequences=sequences, tokens=[1, 2])
    got = failing.ask("step", model="failing", sequences=sequences, tokens=[7, 9])
    np.testing.assert_allclose(np.reshape(got, (2, -1)), wanted, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_fails_keeps_its_whole_chunks(failing: Probe) -> None:
    """As in Python: the chunks before the one that fails are in the sequence, and count."""
    (want,) = _expected(failing, TOKENS)
    sequence = failing.ask("open", model="failing")
    failing.ask("fail", calls=toy.LAYERS + 1)
    failing.error("prefill", model="failing", sequence=sequence, tokens=TOKENS)
    rest = TOKENS[toy.CHUNK :]
    got = failing.ask("prefill", model="failing", sequence=sequence, tokens=rest)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    room = toy.CONTEXT - len(TOKENS)
    said = failing.error("prefill", model="failing", sequence=sequence, tokens=[1] * (room + 1))
    assert f"has {toy.CONTEXT + 1} tokens" in said
    failing.ask("prefill", model="failing", sequence=sequence, tokens=[1] * room)


def test_failing_passes_take_no_room(failing: Probe) -> None:
    """Their pages are free again: the cache has no more than its sequences may need."""
    sequences = [failing.ask("open", model="failing") for _ in range(toy.BATCH)]
    for _ in range(toy.CONTEXT):
        failing.ask("fail", calls=1)
        failing.error("step", model="failing", sequences=sequences, tokens=[5] * toy.BATCH)
    full = [3] * toy.CONTEXT
    for sequence in sequences:
        failing.ask("prefill", model="failing", sequence=sequence, tokens=full)


@pytest.mark.parametrize("chosen", [{}, {"stop": ["nowhere"]}, {"max_tokens": 1}], ids=str)
def test_a_callback_may_stop_at_any_piece(
    own: Probe, artefact: Path, chosen: dict[str, Any]
) -> None:
    """At the last one too, when nothing is left to be stopped: its writer may have lost it."""
    request = {"model": "toy", **GREEDY, **chosen}
    own.ask("load", model="toy", directory=str(artefact))
    whole = own.ask("generate", **request)
    assert whole["finish"] == 2
    for count in range(1, len(whole["pieces"]) + 1):
        cut = own.ask("generate", **request, pieces=count)
        assert cut["pieces"] == whole["pieces"][:count]
        assert cut["finish"] == 3
        assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert cut["token_ids"] == whole["token_ids"]
