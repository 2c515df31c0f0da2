"""How many threads there are, and whose."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from gqsa_compiler.runtime import load, workers
from gqsa_compiler.runtime.engine import Session
from gqsa_compiler.runtime.errors import UsageError
from gqsa_compiler.runtime.model import Model


def caller(session: Session) -> int:
    """Return the thread that calls TVM, which has one pool for each."""
    return session._on_thread(threading.get_ident)


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_two_loaded_models_use_one_pool(artefact: Path) -> None:
    """As many workers as one has, and their passes take turns."""
    with load(artefact, threads=1) as first:
        first.generate([5], max_tokens=2)
        before = tasks()
        with load(artefact, threads=1) as second:
            text = second.generate([5], max_tokens=2)
            assert caller(first._session) == caller(second._session)
            assert tasks() == before
        assert first.generate([5], max_tokens=2).token_ids == text.token_ids


def test_a_forked_child_says_that_it_has_no_threads(artefact: Path) -> None:
    """It would wait for them for ever."""

    def child(model: Model, said: SimpleQueue[str]) -> None:
        try:
            model.generate([5], max_tokens=2)
        except UsageError as error:
            said.put(str(error))
        model.close()

    context = multiprocessing.get_context("fork")
    with load(artefact, threads=1) as model:
        said = context.SimpleQueue()
        process = context.Process(target=child, args=(model, said))
        process.start()
        process.join(20)
        hangs = process.is_alive()
        process.kill()
        assert not hangs
        assert "before this process was forked" in said.get()
        assert len(model.generate([5], max_tokens=2, ignore_eos=True).token_ids) == 2


def test_sessions_at_once(model: Model) -> None:
    sessions = [model.session(threads=1) for _ in range(3)]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        session = sessions[index]
        sequence = session.add()
        logits = session.prefill(sequence, [3, 4, 5])
        found[index] = []
        for _ in range(20):
            found[index].append(int(logits.argmax()))
            logits = session.decode([sequence], [found[index][-1]])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.close()
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU only")
def test_another_number_of_threads_is_another_pool(model: Model) -> None:
    one, two = model.session(threads=1), model.session(threads=2)
    assert caller(one) != caller(two)
    one.close()
    two.close()


def test_a_gpu_has_one_thread(model: Model) -> None:
    cpu = min(os.sched_getaffinity(0))
    share = workers.Workers.share
    one, two, none = share([cpu], gpu=True), share([cpu, cpu], gpu=True), share([cpu])
    assert one is two is not none
    for each in (none, two, one):
        each.release()


class Noted:
    """Notes the thread on which it goes."""

    def __init__(self, threads: list[int]) -> None:
        self.threads = threads

    def __del__(self) -> None:
        self.threads.append(threading.get_ident())


def test_what_an_owner_leaves_goes_on_the_thread(model: Model) -> None:
    """Before the next call; where there is none, with the workers."""
    own = workers.Workers([min(os.sched_getaffinity(0))], gpu=True)
    thread, gone = own.call(threading.get_ident), list[int]()
    for last in (False, True):
        owner = Noted([])
        own.after(owner, lambda _: None, Noted(gone))
        del owner
        assert gone == [thread] * last
        if not last:
            own.call(int)
            assert gone == [thread]
    del own
    assert gone == [thread, threading.get_ident()]


def test_what_a_failure_leaves_goes_on_the_thread(model: Model) -> None:
    """Its frames keep what they have, as long as somebody has the exception."""
    gone: list[int] = []

    def ask() -> None:
        held = Noted(gone)
        raise ValueError(held.threads)

    def fail() -> None:
        held = Noted(gone)
        try:
            ask()
        except ValueError:
            raise KeyError(held.threads) from None

    shared = workers.Workers.share([min(os.sched_getaffinity(0))], gpu=True)
    with pytest.raises(KeyError) as caught:
        shared.call(fail)
    assert gone == [shared.call(threading.get_ident)] * 2
    assert caught.value.__context__ is not None
    shared.release()


def test_the_last_session_ends_the_threads(model: Model) -> None:
    before = dict(workers._pools)
    cpu = min(os.sched_getaffinity(0))
    first, second = workers.Workers.share([cpu, cpu]), workers.Workers.share([cpu, cpu])
    assert first is second
    first.release()
    assert second.call(lambda: 3) == 3
    second.release()
    assert workers._pools == before
    with pytest.raises(RuntimeError, match="shutdown"):
        second.call(lambda: 3)


def test_a_session_that_cannot_start_gives_its_share_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: pool._users for key, pool in workers._pools.items()}
    monkeypatch.setattr("gqsa_compiler.runtime.engine._limit", lambda *_: 1 << 40)
    with pytest.raises(UsageError, match="cannot be made"):
        model.session(threads=1)
    assert {key: pool._users for key, pool in workers._pools.items()} == before


def test_run_makes_its_calls_on_the_session_s_thread(model: Model) -> None:
    session = model.session(threads=1)
    sequence = session.add()

    def both() -> tuple[int, int]:
        session.prefill(sequence, [3])
        return threading.get_ident(), caller(session)

    assert session.run(both) == (caller(session),) * 2
    assert caller(session) != threading.get_ident()
    session.close()
    assert session.closed
    with pytest.raises(UsageError, match="closed"):
        session.run(threading.get_ident)


def test_what_run_raises_comes_back(model: Model) -> None:
    session = model.session(threads=1)
    with pytest.raises(ZeroDivisionError):
        session.run(lambda: 1 // 0)
    session.close()
