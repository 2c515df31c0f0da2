"""What a captured token needs to find where it was, and that graphs go when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gqsa_compiler._tvm import tvm
from gqsa_compiler.runtime import graphs
from gqsa_compiler.runtime.devices import Device
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.graphs import CHOOSE, DECODE, SCRATCH, DecodeGraphs, Scratch
from gqsa_compiler.schedules.cuda.attention_decode import _MOST_SHARES

MB = 1 << 20


class Machines:
    """Stands for the virtual machines: counts them, and notes what `decode` is called with."""

    def __init__(self) -> None:
        self.made = 0
        self.calls: list[tuple[int, tuple[int, ...], int]] = []
        self.during: Callable[[], None] = lambda: None

    def load(self) -> dict[str, Any]:
        """Make one."""
        self.made += 1
        return {DECODE: self.decode, CHOOSE: lambda logits, draws: (logits, draws)}

    def decode(self, tokens: Any, layout: Any, cache: Any, parameters: Any) -> str:
        """Note the tokens, the layout and the tokens' place."""
        del cache, parameters
        self.during()
        ids = tuple(int(i) for i in np.from_dlpack(tokens))
        self.calls.append((layout[0], ids, tokens.data_ptr()))
        return "logits"


class FakeScratch(Scratch):
    """Scratch that lies where it is told."""

    def __init__(self) -> None:
        self.at = frozenset({1, 2, 3})

    def places(self) -> frozenset[int]:
        """Return that."""
        return self.at


@pytest.fixture
def made() -> tuple[DecodeGraphs, Machines, FakeScratch]:
    """Return graphs of 3 sequences at most, pages of 16 tokens, with what they stand on."""
    assert tvm.cpu() is not None  # TVM's runtime is loaded
    machines, scratch = Machines(), FakeScratch()
    return DecodeGraphs(Device(), machines.load, 3, 16, scratch), machines, scratch


def run(found: DecodeGraphs, *lengths: int, parameters: Any = "weights") -> None:
    """Decode a token of as many sequences."""
    tokens = np.array(lengths, np.int32) * 10
    assert found.run(tokens, lengths, "cache", parameters) == "logits"


def test_tokens_lie_at_one_place(made: tuple[DecodeGraphs, Machines, FakeScratch]) -> None:
    found, machines, _ = made
    for lengths in ((1,), (2,), (7, 70), (8, 71, 5), (3,)):
        run(found, *lengths)
    assert [ids for _, ids, _ in machines.calls][2] == (70, 700)
    assert len({place for _, _, place in machines.calls}) == 1


def test_a_graph_is_for_four_pages(made: tuple[DecodeGraphs, Machines, FakeScratch]) -> None:
    found, machines, _ = made
    lengths: list[tuple[int, ...]] = [(1,), (64,), (65,), (128,), (33, 1), (48, 17), (1, 1, 33)]
    for each in lengths:
        run(found, *each)
    assert [layout for layout, _, _ in machines.calls] == [1, 1, 2, 2, 1, 2, 2]
    assert machines.made == 1


def test_moved_scratch_and_other_weights_end_all_graphs(
    made: tuple[DecodeGraphs, Machines, FakeScratch],
) -> None:
    found, machines, scratch = made
    run(found, 1)
    run(found, 2)
    assert machines.made == 1
    scratch.at = frozenset({1, 2, 9})
    run(found, 3)
    assert machines.made == 2
    run(found, 4)
    assert machines.made == 2
    run(found, 5, parameters="others")
    assert machines.made == 3
    run(found, 6, parameters="others")
    assert machines.made == 3


def test_a_graph_that_moves_scratch_ends_those_before(
    made: tuple[DecodeGraphs, Machines, FakeScratch],
) -> None:
    """The first one may: there are none before. What it moved to is where it stays."""
    found, machines, scratch = made

    def move() -> None:
        scratch.at = frozenset({max(scratch.at) + 1})

    machines.during = move
    run(found, 1)
    machines.during = lambda: None
    run(found, 2)
    assert machines.made == 1
    machines.during = move
    run(found, 100)
    machines.during = lambda: None
    run(found, 101)
    assert machines.made == 2


def test_graphs_are_few(
    made: tuple[DecodeGraphs, Machines, FakeScratch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    found, machines, _ = made
    for length in (1, 100, 1, 100):
        run(found, length)
    assert machines.made == 1
    run(found, 200)
    assert machines.made == 2
    run(found, 201)
    run(found, 1)
    assert machines.made == 2


def test_choosing_is_done_on_the_device(
    made: tuple[DecodeGraphs, Machines, FakeScratch],
) -> None:
    draws = np.ones((2, 5), np.float32)
    logits, there = made[0].choose("logits", draws)
    assert logits == "logits"
    np.testing.assert_array_equal(np.from_dlpack(there), draws)


@pytest.mark.parametrize("words", ["CUDA: out of memory", "driver gone"])
def test_no_memory_for_scratch_is_said(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(Device, "empty", fail)
    kind: type[Exception] = UsageError
    said = r"The GPU is out of memory: .* smaller context or batch"
    if words == "driver gone":
        kind, said = RuntimeError, words
    with pytest.raises(kind, match=said):
        DecodeGraphs.of(Device(), Machines().load, 3, 16)


def test_scratch_tells_that_it_moved() -> None:
    """TVM's own pool, of the CPU: a launch that needs more gets one block's place changed."""

    def places() -> list[frozenset[int]]:
        scratch = Scratch(Device(), [MB, 1, 1, 1])
        found = [scratch.places(), scratch.places()]
        scratch._hold([MB, 1, 1])  # as much as there is
        found.append(scratch.places())
        scratch._hold([64 * MB])
        return [*found, scratch.places()]

    with ThreadPoolExecutor(1) as thread:  # a pool is a thread's: this one has no other's blocks
        first, again, same, moved = thread.submit(places).result()
    assert len(first) == 4
    assert first == again == same != moved


@pytest.mark.parametrize(
    ("batch", "heads", "dim"),
    [(1, 9, 64), (8, 16, 128), (8, 32, 128), (32, 64, 128), (32, 128, 64)],
    ids=["smollm2-135m", "qwen3-0.6b", "llama3-8b", "llama3-70b", "narrow heads"],
)
def test_attention_does_not_move_scratch(batch: int, heads: int, dim: int) -> None:
    """From the first key to the longest context: what its launch takes is there from the start."""

    def places() -> list[frozenset[int]]:
        scratch = Scratch(Device(), SCRATCH)
        found = [scratch.places()]
        for shares in range(1, _MOST_SHARES + 1):
            sums = 4 * batch * shares * heads
            scratch._hold([sums * dim, sums, sums])
            found.append(scratch.places())
        return found

    with ThreadPoolExecutor(1) as thread:
        assert len(set(thread.submit(places).result())) == 1
