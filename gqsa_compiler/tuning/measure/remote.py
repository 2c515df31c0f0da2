"""Measuring over TVM's RPC: on machines that run its server, found through its tracker.

Code and data are sent to the machine, and it times its calls itself, so the network does not count.
What a candidate does to the server's session ends that session, and its trial, only.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gqsa_compiler._tvm import rpc, runtime
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.workspace import KERNEL, Candidate, Workspace

_MOST_COPIES = 64
_CALLS = 5  # of a sample, each on other weights
_SLACK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
_MOST_REFUSED = 3  # sessions in a row, for each machine
Connect = Callable[[float], Any]
"""Called with the seconds that a session may last; returns one (`tvm.rpc.RPCSession`)."""


def parse_tracker(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``.

    Raises
    ------
    UsageError
        It is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is no tracker; give --tracker HOST:PORT.")
    return host, int(port)


def tracker_connect(host: str, port: int, key: str) -> tuple[Connect, int]:
    """Ask a tracker for its machines of a key.

    Returns
    -------
    callable, int
        What requests one, and how many there are.

    Raises
    ------
    GqsaError
        The tracker does not answer.
    UsageError
        It has no machine of that key.
    """
    try:
        # TVM tries again for a minute.
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
        tracker = rpc.connect_tracker(host, port)
        servers = tracker.summary()["server_info"]
    except Exception as error:
        raise GqsaError(f"The tracker {host}:{port} does not answer: {error}.") from error
    count = sum(str(server["key"]).removeprefix("server:") == key for server in servers)
    if not count:
        raise UsageError(
            f"The tracker {host}:{port} knows no machine of the key {key!r}; start one: python -m "
            f"tvm.exec.rpc_server --tracker {host}:{port} --key {key}."
        )

    def connect(seconds: float) -> Any:
        # A connection of its own: threads do not share one.
        mine = rpc.connect_tracker(host, port)
        return mine.request(key, priority=1, session_timeout=seconds, max_retry=3)

    return connect, count


class RemoteMeasurer:
    """Measures in RPC sessions, one a trial.

    Parameters
    ----------
    connect : callable
        See `Connect`.
    slots : int
        Machines, that is candidates at once.
    name : str
        Of the machines, for the records.
    """

    def __init__(self, connect: Connect, slots: int, name: str) -> None:
        self._connect = connect
        self.slots = slots
        self._name = name
        self._refused = 0  # in a row
        self._lock = threading.Lock()

    read_bandwidth = 0.0

    @property
    def machine(self) -> dict[str, str]:
        """What records say of the machine."""
        return {"host": self._name, "how": "rpc"}

    def measure(
        self, space: Workspace, candidate: Candidate, incumbent: Candidate, rounds: int = 0
    ) -> Outcome:
        """Check a candidate and time it in turns with the incumbent.

        Raises
        ------
        GqsaError
            No machine has given a session for several trials.
        """
        limits = space.limits
        try:
            session = self._connect(limits.run_seconds)
        except Exception as error:
            return self._refuse(error)
        self._refused = 0
        begin = time.monotonic()
        try:
            return _Trial(session, space, candidate, incumbent).measure(rounds or limits.rounds)
        except Exception as error:
            # Whatever ended the session comes back as one of several classes of TVM's.
            said = _said(error)
            if "alloc" in said.lower() or "memory" in said.lower():
                return Outcome("memory", said)
            if time.monotonic() - begin > limits.run_seconds - _SLACK_SECONDS:
                return Outcome("hang", f"It took more than {limits.run_seconds:g} s.")
            return Outcome("crash", f"The session ended: {said}")

    def stop(self) -> bool:
        """Do nothing: the machines' sessions end by themselves."""
        return False

    def _refuse(self, error: Exception) -> Outcome:
        """Fail one trial; one refusal after the other, and the machines are gone."""
        with self._lock:
            self._refused += 1
            times = self._refused
        if times >= _MOST_REFUSED * self.slots:
            raise GqsaError(
                f"{self._name} gave no session {times} times in a row ({_said(error)}); see that "
                "its servers run, and go on with --resume."
            ) from error
        return Outcome("crash", f"{self._name} gave no session: {_said(error)}")


def _said(error: Exception) -> str:
    """Return the end of an error's text in one line: TVM's have the traces of two machines."""
    return " ".join(str(error).split())[-300:]


class _Trial:
    """One session's work."""

    def __init__(
        self, session: Any, space: Workspace, candidate: Candidate, incumbent: Candidate
    ) -> None:
        self._session, self._space = session, space
        self._device = session.cpu(0)
        self._pair = (incumbent, candidate)
        self._modules = [self._load(one) for one in self._pair]
        self._copies = self._count()

    def measure(self, rounds: int) -> Outcome:
        """Check both kernels, then time them."""
        self._session.get_function("runtime.config_threadpool")(1, self._space.threads)
        samples: dict[int, list[tuple[float, float]]] = {}
        weights = [self._weights(one) for one in self._pair]
        for tokens in self._space.case.right:
            arguments = [
                self._arguments(one, tokens, copies)
                for one, copies in zip(self._pair, weights, strict=True)
            ]
            for module, some in zip(self._modules, arguments, strict=True):
                module["main"](*some[0])
            wrong = self._wrong(tokens, arguments)
            if wrong is None:
                timers = [
                    module.time_evaluator("main", self._device, number=1, repeat=1)
                    for module in self._modules
                ]
                samples[tokens] = list(self._time(timers, arguments, rounds))
                wrong = self._wrong(tokens, arguments)  # again: a race shows in some calls only
            if wrong is not None:
                return wrong
        return Outcome("ok", samples=samples)

    def _wrong(self, tokens: int, arguments: list[list[list[Any]]]) -> Outcome | None:
        """Hold the outputs of the last calls against the reference; None if they are right."""
        right = self._space.case.right[tokens]
        for what, some in zip((" of the incumbent", ""), arguments, strict=True):
            excess = np.abs(some[0][-1].numpy().astype(np.float64) - right.wanted) / right.bound
            if not excess.max() <= 1.0:
                return Outcome("wrong", f"An output{what} for {tokens} tokens is wrong.")
        return None

    def _time(
        self, timers: list[Any], arguments: list[list[list[Any]]], rounds: int
    ) -> Iterator[tuple[float, float]]:
        place = 0
        for round_ in range(-1, rounds):
            seconds = [0.0, 0.0]
            for which in (0, 1) if round_ % 2 == 0 else (1, 0):
                taken = []
                for call in range(_CALLS):
                    some = arguments[which][(place + call) % len(arguments[which])]
                    taken.append(float(timers[which](*some).results[0]))
                seconds[which] = float(np.median(taken))
            place += _CALLS
            if round_ >= 0:  # the first warms up
                yield seconds[0], seconds[1]

    def _load(self, one: Candidate) -> Any:
        # A name of its own: writing over a library that is loaded would break it.
        name = f"gqsa-{secrets.token_hex(4)}-{KERNEL}"
        self._session.upload(str(one.folder / KERNEL), target=name)
        return self._session.load_module(name)

    def _count(self) -> int:
        size = max(1, self._space.weight_bytes)
        return min(_MOST_COPIES, self._space.limits.rotate_bytes // size + 1)

    def _weights(self, one: Candidate) -> list[dict[str, Any]]:
        """Put copies of a packed weight there: sent once, copied there."""
        packed = self._space.case.pack(one.config)
        first = {name: self._send(array) for name, array in packed.items()}
        copies = [first]
        for _ in range(self._copies - 1):
            copies.append({name: self._copy(array) for name, array in first.items()})
        return copies

    def _arguments(
        self, one: Candidate, tokens: int, copies: list[dict[str, Any]]
    ) -> list[list[Any]]:
        """Put a call's arguments there, for each copy of the weight; they share all the others."""
        case, right = self._space.case, self._space.case.right[tokens]
        data = {
            "x": right.x,
            "residual": right.residual,
            "norm": case.norm,
            "bias": case.bias,
            "!": np.full(right.wanted.shape, np.nan, np.float32),
        }
        names = case.arguments(one.config)
        shared = {name: self._send(data[name]) for name in names if not name.startswith("@")}
        return [
            [weights[name[1:]] if name.startswith("@") else shared[name] for name in names]
            for weights in copies
        ]

    def _send(self, array: Any) -> Any:
        return runtime.tensor(np.ascontiguousarray(array), self._device)

    def _copy(self, array: Any) -> Any:
        return array.copyto(runtime.empty(array.shape, array.dtype, self._device))
