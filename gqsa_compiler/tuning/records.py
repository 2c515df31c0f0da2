"""What a database holds: one JSON object a line, a trial or the beginning of a session.

Databases come from other machines and people: what does not fit is not believed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.tuning.key import TargetKey

Status = Literal["ok", "wrong", "crash", "hang", "memory", "build"]
"""How a trial ended: timed; other numbers than the reference's; the process died; took too long;
needed too much memory; no code could be made."""
STATUSES: tuple[Status, ...] = get_args(Status)

MOST_LINE = 1 << 20
"""Bytes of a line; longer ones are not ours."""
_MOST_TEXT = 2000
_MOST_RATIO = 1e15  # of two times that were measured; at least its inverse

Number = int | float | str | bool | None | list[Any]


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel, tried.

    Parameters
    ----------
    target : TargetKey
    kernels : str
        Hash of the kernel's sources, see `source_hash`.
    producer : str
        The compiler's version.
    rule : str
    layout_version : int
    spec : LinearSpec
        The rule's `code_key`.
    density : float
        Share of the groups that are kept; 1 for dense layers.
    rows : tuple of int
        Quantiles of the number of groups a row, the distribution that was measured.
    config : dict
        The fields of the rule's configuration.
    status : str
        See `Status`.
    message : str
        Why it failed; empty if it did not.
    calls : dict of int to float
        Calls with so many tokens in the workload that configurations are compared by.
    seconds : dict of int to float
        Median time of a call with so many tokens; empty if it failed.
    ratio : float or None
        Time of the workload's calls to the default configuration's; None if it failed.
    noise : float
        Standard error of `ratio`.
    best : bool
        The best known then: the first, or better than the one before beyond the noise.
    machine : dict of str to str
        Where it was measured: name of the host, threads, system, how.
    session : str
    time : str
        UTC, ISO 8601.
    """

    target: TargetKey
    kernels: str
    producer: str
    rule: str
    layout_version: int
    spec: LinearSpec
    density: float
    rows: tuple[int, ...]
    config: dict[str, Number]
    status: Status
    message: str = ""
    calls: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    ratio: float | None = None
    noise: float = 0.0
    best: bool = False
    machine: dict[str, str] = field(default_factory=dict)
    session: str = ""
    time: str = ""


@dataclass(frozen=True)
class SessionStart:
    """The beginning of a session.

    Parameters
    ----------
    target : TargetKey
    session : str
        Its name.
    model : str
    prompt, gen : int
        The workload: tokens of a prompt, and tokens generated after it.
    tasks : tuple of dict
        Name, rule, spec and number of layers of each task, and the bytes of its packed weight.
    time : str
    read_bandwidth : float
        Bytes a second that the machine can read from memory; 0 if it was not measured.
    """

    target: TargetKey
    session: str
    model: str
    prompt: int
    gen: int
    tasks: tuple[dict[str, Any], ...] = ()
    time: str = ""
    read_bandwidth: float = 0.0


Entry = Trial | SessionStart
_KINDS: dict[str, type[Trial] | type[SessionStart]] = {"trial": Trial, "session": SessionStart}


def config_key(config: Mapping[str, Any]) -> str:
    """Write a configuration's fields so that equal ones are equal texts."""
    return json.dumps(config, sort_keys=True)


def to_line(entry: Entry) -> bytes:
    """Write an entry as a line, its end included."""
    kind = "trial" if isinstance(entry, Trial) else "session"
    fields = {"type": kind, **asdict(entry)}
    text = json.dumps(fields, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def from_line(line: bytes) -> Entry | None:
    """Read a line.

    Returns
    -------
    Trial, SessionStart or None
        None for a type of entry that a later release has made.

    Raises
    ------
    ValueError
        It is none of ours, or cut.
    """
    if len(line) > MOST_LINE:
        raise ValueError("the line is too long")
    try:
        data = json.loads(line, parse_float=_read_float, parse_constant=_read_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise ValueError("not an entry")
    if data["type"] not in _KINDS:
        return None
    try:
        return _trial(data) if data["type"] == "trial" else _session(data)
    except (KeyError, TypeError, AttributeError, OverflowError, CompileError) as error:
        raise ValueError(f"a field is missing or wrong: {error}") from None


def _trial(data: dict[str, Any]) -> Trial:
    spec = LinearSpec.from_json(json.dumps(data["spec"]))
    spec.check()
    status = data["status"]
    if status not in STATUSES:
        raise ValueError(f"unknown status {status!r}")
    ratio = data["ratio"]
    if status == "ok":
        ratio = _positive(ratio)
        if not 1 / _MOST_RATIO <= ratio <= _MOST_RATIO:
            raise ValueError(f"{ratio} is no ratio of two times")
    if type(data["best"]) is not bool:
        raise ValueError("best is neither true nor false")
    trial = Trial(
        target=_target(data["target"]),
        kernels=_word(data["kernels"]),
        producer=_word(data["producer"]),
        rule=_word(data["rule"]),
        layout_version=int(data["layout_version"]),
        spec=spec,
        density=_finite(data["density"]),
        rows=tuple(int(count) for count in data["rows"]),
        config=_config(data["config"]),
        status=status,
        message=_text(data["message"]),
        calls={int(k): _positive(v) for k, v in data["calls"].items()},
        seconds={int(k): _positive(v) for k, v in data["seconds"].items()},
        ratio=ratio if status == "ok" else None,
        noise=_finite(data["noise"]),
        best=data["best"],
        machine={_text(k): _text(v) for k, v in data["machine"].items()},
        session=session_name(data["session"]) if data["session"] else "",
        time=_text(data["time"]),
    )
    if trial.density > 1.0:
        raise ValueError("density is above 1")
    if trial.seconds.keys() - trial.calls.keys():
        raise ValueError("a time is of a call that the workload does not have")
    if len(trial.rows) > 1000 or len(trial.calls) > 100 or len(trial.seconds) > 100:
        raise ValueError("a list is too long")
    return trial


def _session(data: dict[str, Any]) -> SessionStart:
    tasks = data["tasks"]
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError("tasks is not a list of objects")
    for task in tasks:
        _check_task(task)
    return SessionStart(
        target=_target(data["target"]),
        session=session_name(data["session"]),
        model=_text(data["model"]),
        prompt=int(data["prompt"]),
        gen=int(data["gen"]),
        tasks=tuple(tasks),
        time=_text(data["time"]),
        read_bandwidth=_finite(data["read_bandwidth"]),
    )


def session_name(value: object) -> str:
    """Return a session's name, which names a file too.

    Raises
    ------
    ValueError
        It is none: it has other signs than letters, digits and ``._-``, or begins with a dot.
    """
    text = _text(value)
    if not re.fullmatch(r"[\w-][\w.-]{0,199}", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} is not a session's name")
    return text


def _check_task(task: Mapping[str, Any]) -> None:
    """Check what a session's record says of a task, as far as it says it."""
    for name in ("name", "rule", "spec"):
        _text(task.get(name, ""))
    for name in ("n", "k", "layers", "bytes", "share", "density"):
        _finite(task.get(name, 0))


def _target(data: Mapping[str, Any]) -> TargetKey:
    words = {name: _word(data[name]) for name in ("kind", "arch", "cpu", "chip", "tvm")}
    return TargetKey(features=tuple(_word(f) for f in data["features"]), **words)


def _config(data: object) -> dict[str, Number]:
    """Check a configuration's fields: numbers, words, and lists of them."""
    if not isinstance(data, dict):
        raise ValueError("config is no object")
    for name, value in data.items():
        _word(name)
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, bool | int | float | None):
                _word(item)
    return data


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise ValueError(f"{str(value)[:40]!r} is not a short text")
    return value


def _word(value: object) -> str:
    """Return a text that a terminal can be shown."""
    text = _text(value)
    if not text.isprintable():
        raise ValueError(f"{text[:40]!r} cannot be printed")
    return text


def _read_float(text: str) -> float:
    """Read a number of JSON with a fraction; NaN and infinity, which JSON has not, are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def _finite(value: object) -> float:
    """Return a number that is not negative."""
    return 0.0 if value == 0 and not isinstance(value, bool) else _positive(value)


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    number = float(value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"{number} is not a positive number")
    return number
