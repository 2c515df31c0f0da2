"""Measuring over RPC: in this process's own session, and with a tracker and servers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler._tvm import tvm
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.tuning import prepare as prepare_module
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.lookup import Tuned
from gqsa_compiler.tuning.measure.remote import (
    Connect,
    RemoteMeasurer,
    parse_tracker,
    tracker_connect,
)
from gqsa_compiler.tuning.measure.workspace import KERNEL
from gqsa_compiler.tuning.session import Session
from gqsa_compiler.tuning.task_state import Settings
from gqsa_compiler.tuning.tasks import Workload
from tests.tuning.conftest import HOST, SMALL, Bench, adopt, small_task
from tests.tuning.fakes import FakeBuilders, FakeMeasurer, patch, session


@contextmanager
def servers(key: str, count: int) -> Iterator[tuple[str, int]]:
    """Run a tracker and some servers on this machine; gives the tracker's host and port."""
    from tvm import rpc
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", 9190, 9290, silent=True)
    running = []
    try:
        for _ in range(count):
            address = ("127.0.0.1", tracker.port)
            running.append(
                rpc.Server("127.0.0.1", 9300, 9400, tracker_addr=address, key=key, silent=True)
            )
        yield "127.0.0.1", tracker.port
    finally:
        for server in running:
            server.terminate()
        tracker.terminate()


def local_session(_seconds: float) -> Any:
    """Return a session that is this process."""
    return tvm.rpc.LocalSession()


def test_a_right_candidate_is_timed(bench: Bench) -> None:
    measurer = RemoteMeasurer(local_session, 1, "here")
    outcome = measurer.measure(bench.work, bench.default, bench.default)
    assert (outcome.status, outcome.message) == ("ok", "")
    assert {m: len(s) for m, s in outcome.samples.items()} == {1: SMALL.rounds, 5: SMALL.rounds}
    assert measurer.machine == {"host": "here", "how": "rpc"}


@pytest.mark.parametrize("body", ["", "for (long i = 0; i < size; ++i) y[i] = 0;"])
def test_a_wrong_candidate_is_told(bench: Bench, planted: Callable[[str], Path], body: str) -> None:
    candidate = adopt(bench.work, bench.space[1], planted(body))
    measurer = RemoteMeasurer(local_session, 1, "here")
    outcome = measurer.measure(bench.work, candidate, bench.default)
    assert (outcome.status, outcome.message) == ("wrong", "An output for 1 tokens is wrong.")


def test_a_session_that_breaks_is_a_crash(bench: Bench) -> None:
    class Broken:
        def cpu(self, _index: int) -> None:
            raise RuntimeError("the connection was reset")

    outcome = RemoteMeasurer(lambda _s: Broken(), 1, "here").measure(
        bench.work, bench.default, bench.default
    )
    assert outcome.status == "crash"
    assert "connection was reset" in outcome.message


def test_a_candidate_that_is_wrong_after_some_calls(
    bench: Bench, planted: Callable[[str], Path]
) -> None:
    """Its output is right when it is checked first."""
    body = _SLEEPS.replace("{case}", str(bench.work.root / "case")).replace("{microseconds}", "1")
    spoils = "static int calls = 0; if (++calls > 3) y[0] += 1e6f;"
    candidate = adopt(bench.work, bench.space[1], planted(body + spoils))
    measurer = RemoteMeasurer(local_session, 1, "here")
    outcome = measurer.measure(bench.work, candidate, bench.default)
    assert (outcome.status, outcome.message) == ("wrong", "An output for 1 tokens is wrong.")


def test_a_machine_that_gives_no_session(bench: Bench) -> None:
    """One refusal costs a trial, three in a row of every machine the session."""
    gives = iter([False, False, True, *[False] * 6])

    def connect(_seconds: float) -> Any:
        if not next(gives):
            raise RuntimeError("busy\nand more")
        return tvm.rpc.LocalSession()

    measurer = RemoteMeasurer(connect, 2, "board")
    outcomes = [measurer.measure(bench.work, bench.default, bench.default) for _ in range(8)]
    assert [one.status for one in outcomes] == ["crash"] * 2 + ["ok"] + ["crash"] * 5
    assert outcomes[0].message == "board gave no session: busy and more"
    with pytest.raises(GqsaError, match=r"board gave no session 6 times in a row \(busy and more"):
        measurer.measure(bench.work, bench.default, bench.default)


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:x", "host:0", "host:70000"])
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--tracker HOST:PORT"):
        parse_tracker(text)
    assert parse_tracker("board.local:9190") == ("board.local", 9190)


def test_a_tracker_that_does_not_answer() -> None:
    with pytest.raises(GqsaError, match="does not answer"):
        tracker_connect("127.0.0.1", 1, "key")


def test_two_machines_share_a_sessions_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Workspace", "make_case"):
        monkeypatch.setattr(prepare_module, name, getattr(prepare_module, name))
    patch()
    spent = {}
    for slots in (1, 2):
        measurer = FakeMeasurer(before=lambda _n: time.sleep(0.1), slots=slots)
        builders = FakeBuilders(slots, 0.04)
        made = session(
            tmp_path / str(slots), measurer, builders=builders, trials=16, search="random"
        )
        made._set_up()
        begin = time.monotonic()
        made._try_all()
        spent[slots] = time.monotonic() - begin
        assert made.trials == made.states[0].trials == 16
    assert spent[2] < 0.6 * spent[1]  # half, within 20%


_SLEEPS = """
    const char* right = out.shape[0] == 1 ? "{case}/wanted-1.bin" : "{case}/wanted-5.bin";
    FILE* file = fopen(right, "rb");
    if (file == nullptr || fread(y, 4, size, file) == 0) return -1;
    fclose(file);
    usleep({microseconds});
"""


@dataclass
class Copies(FakeBuilders):
    """Builders whose every kernel is the same library."""

    library: Path = Path()

    def build(self, work: Any, config: Any, folder: Path) -> None:
        """Copy it."""
        shutil.copyfile(self.library, folder / KERNEL)


@pytest.mark.slow
def test_two_servers_halve_the_time(
    planted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials take the time that their kernels sleep: they need no processor of this machine."""
    pytest.importorskip("tornado", reason="the extra `tune` (tornado) is not installed")
    task = small_task()
    spent = {}
    with servers("sleepers", 2) as (host, port):
        connect = wait_for(host, port, "sleepers", 2)
        for slots in (1, 2):
            folder = tmp_path / str(slots)
            body = _SLEEPS.replace("{case}", str(folder / "work" / "0" / "case"))
            library = planted(body.replace("{microseconds}", "150000"))
            builders = Copies(library=library)
            made = Session(
                (task,), HOST, "chip", "toy", Workload(5, 8), Database(folder / "db"),
                RemoteMeasurer(connect, slots, "here"),
                Settings(trials=6, search="random", limits=SMALL), folder / "work",
                Tuned([], "chip"), builders=builders,
            )  # fmt: skip
            made._set_up()
            begin = time.monotonic()
            made._try_all()
            spent[slots] = time.monotonic() - begin
            assert made.trials == 6
            assert {t.status for t in Database(folder / "db").read().trials} == {"ok"}
    assert spent[2] < 0.6 * spent[1], spent  # half, within 20%


def wait_for(host: str, port: int, key: str, wanted: int) -> Connect:
    """Wait until a tracker knows so many machines of a key."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with suppress(UsageError):
            connect, count = tracker_connect(host, port, key)
            if count == wanted:
                return connect
        time.sleep(0.2)
    raise AssertionError(f"the tracker never had {wanted} machines")


@pytest.mark.slow
def test_a_tracker_with_two_servers(bench: Bench, planted: Callable[[str], Path]) -> None:
    pytest.importorskip("tornado", reason="the extra `tune` (tornado) is not installed")
    with servers("toys", 2) as (host, port):
        connect = wait_for(host, port, "toys", 2)
        with pytest.raises(UsageError, match="no machine of the key 'other'"):
            tracker_connect(host, port, "other")
        measurer = RemoteMeasurer(connect, 2, "toys")
        assert measurer.measure(bench.work, bench.default, bench.default).status == "ok"
        crash = adopt(bench.work, bench.space[1], planted("abort();"))
        assert measurer.measure(bench.work, crash, bench.default).status == "crash"
        hang = adopt(bench.work, bench.space[1], planted("for (;;) pause();"))
        bench.work.limits = replace(SMALL, run_seconds=8.0)
        try:
            assert measurer.measure(bench.work, hang, bench.default).status == "hang"
        finally:
            bench.work.limits = SMALL
        # A server goes on after its session's end.
        assert measurer.measure(bench.work, bench.default, bench.default).status == "ok"
