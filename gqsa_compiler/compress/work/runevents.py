"""What a run log holds: its events as dataclasses, and each as a line of JSON."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from datetime import datetime, timezone
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

Seconds = float


@dataclass(frozen=True)
class Start:
    """A compression begins. `settings` is JSON of any depth, for people to read."""

    kind: ClassVar[str] = "start"
    settings: dict[str, Any]
    version: str = ""


@dataclass(frozen=True)
class Resume:
    """A later process goes on; `at` says where, e.g. ``block 3``."""

    kind: ClassVar[str] = "resume"
    at: str


@dataclass(frozen=True)
class Calibration:
    """The calibration tokens are there. `source` is the text's path, or ``sampled``."""

    kind: ClassVar[str] = "calibration"
    source: str
    samples: int
    tokens: int
    seconds: Seconds


@dataclass(frozen=True)
class Phase:
    """A part of the work that has no lines of its own is done.

    Parameters
    ----------
    name : str
        What was done, e.g. ``measuring the layers``; a later line of the name counts.
    seconds : float
    facts : dict of str to float
        What is worth knowing about it, by what it is called.
    """

    kind: ClassVar[str] = "phase"
    name: str
    seconds: Seconds
    facts: dict[str, float]


@dataclass(frozen=True)
class Block:
    """A decoder block is done.

    Parameters
    ----------
    index, blocks : int
        Which one, from 0, of how many.
    name : str
        Module path.
    loss_before, loss_after : float
        Squared error of its outputs against the dense model's, relative: after the one-shot
        compression and after stage one. `loss_after` is None where that stage did not run.
    sparsity : dict of str to float
        Share of groups dropped, by the layer's path inside the block.
    seconds : float
        What the block took.
    """

    kind: ClassVar[str] = "block"
    index: int
    blocks: int
    name: str
    loss_before: float
    loss_after: float | None
    sparsity: dict[str, float]
    seconds: Seconds


@dataclass(frozen=True)
class Step:
    """Steps of an end-to-end stage are done: one, or those since the stage's last line.

    Parameters
    ----------
    stage : str
        ``weights`` or ``scales``.
    step, steps : int
        The last step done, counted from 1, of how many.
    loss : float
        The total that is minimised.
    kl, ce : float or None
        Its parts: KL(dense || compressed), and the next-token loss; nats a token.
    rates : dict of str to float
        Learning rates by parameter group.
    tokens : int
        Tokens of the stage so far.
    seconds : float
        What these steps took. Over a stage's lines they add up to its time.
    seconds_left : float or None
        Estimate for the rest of the stage.
    """

    kind: ClassVar[str] = "step"
    stage: str
    step: int
    steps: int
    loss: float
    kl: float | None
    ce: float | None
    rates: dict[str, float]
    tokens: int
    seconds: Seconds
    seconds_left: float | None = None


@dataclass(frozen=True)
class Finish:
    """The checkpoint is written.

    Parameters
    ----------
    seconds : float
        Wall time of this process.
    weights : int
        Weights of the blocks' compressed layers, dropped ones too.
    bytes : dict of str to int
        Stored bytes of the blocks' compressed layers by kind (codes, scales, zeros, indices).
    other_bytes : int
        Stored bytes of all other tensors.
    dense_bytes : int
        What the whole model takes uncompressed.
    head_bytes : int
        Stored bytes of the compressed head; 0 where it is not compressed.
    """

    kind: ClassVar[str] = "finish"
    seconds: Seconds
    weights: int
    bytes: dict[str, int]
    other_bytes: int
    dense_bytes: int
    head_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Of the whole checkpoint."""
        return sum(self.bytes.values()) + self.head_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of the blocks' compressed layers, with all indices and scales."""
        return 8 * sum(self.bytes.values()) / self.weights if self.weights else math.nan


Event = Start | Resume | Calibration | Phase | Block | Step | Finish

_KINDS: MappingProxyType[str, type[Event]] = MappingProxyType(
    {event.kind: event for event in (Start, Resume, Calibration, Phase, Block, Step, Finish)}
)
_NOT_FINITE = ("nan", "inf", "-inf")


def to_line(event: Event) -> bytes:
    """Return an event as a line, with its kind and the time.

    Numbers that are not finite become the texts ``nan``, ``inf`` and ``-inf``: JSON has none.
    """
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    content = {each.name: _to_json(getattr(event, each.name)) for each in fields(event)}
    line = json.dumps({"time": time, "event": event.kind, **content}, ensure_ascii=False)
    return line.encode("utf-8", errors="replace") + b"\n"


def from_line(line: bytes) -> tuple[str, Event | None]:
    """Return a line's time and event, which is None if its kind is not known.

    Raises
    ------
    ValueError, OverflowError, RecursionError
        It is no JSON object, has no time and kind, or a field is missing or of another type.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    time, kind = (_convert(content.get(name), str) for name in ("time", "event"))
    if kind not in _KINDS:
        return time, None
    event = _KINDS[kind]
    hints = get_type_hints(event)
    values = {}
    for each in fields(event):
        if each.name in content:
            values[each.name] = _convert(content[each.name], hints[each.name])
        elif each.default is MISSING:
            raise ValueError(f"no {each.name}")
    return time, event(**values)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _convert(value: Any, hint: Any) -> Any:
    """Check a JSON value against a type of the events above."""
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return {key: _convert(inner, get_args(hint)[1]) for key, inner in value.items()}
    if get_origin(hint) is UnionType:
        return None if value is None else _convert(value, get_args(hint)[0])
    if hint is Any:
        return value
    if hint is float and (value in _NOT_FINITE or type(value) is int):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"not a {hint}")
    return value
